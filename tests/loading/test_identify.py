"""identify: a network is known whatever its names and order are, near ones are named with the difference."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import autoalign
from autoalign import cli
from autoalign.matching.architectures import index
from benchmarks.cases.handwritten import handwritten


def state_of(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + key: value for key, value in model.state_dict().items()}


def on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, **options)
    return model


def test_a_wrapped_file_with_an_average_inside(tmp_path: Path) -> None:
    model = torchvision.models.resnet18(num_classes=10)
    model.bn1.num_batches_tracked.fill_(12000)
    state = state_of(model, "module.")
    path = str(tmp_path / "model.pth")
    torch.save({"state_dict": state, "ema": {key: value.clone() for key, value in state.items()}}, path)
    found = autoalign.identify(path)
    assert found.verdict == "known"
    assert found.best is not None
    assert {"torchvision:resnet18", "timm:resnet18", "mmpretrain:resnet18"} < set(found.best.architectures)
    assert (found.best.classes, found.best.target) == (10, "torchvision:resnet18(num_classes=10)")
    assert str(found).splitlines() == [
        "122 tensors, torch file, wrapped by DDP or DataParallel, EMA inside (ema).",
        "It is resnet18 of torchvision, timm and mmpretrain, resnetblur18 of timm, resnet-18 of transformers (122 of "
        "122 shapes, 100% of the names), head of 10 classes, trained (BatchNorm has seen 12,000 batches).",
        f"Load it with: autoalign.load(torchvision.models.get_model('resnet18', num_classes=10), {path!r})",
    ]
    assert json.loads(json.dumps(found.to_dict()))["candidates"][0]["common"] == 122
    assert ">122 of 122</td>" in found._repr_html_()


@pytest.mark.parametrize("name", ["resnet26d", "vit_small_patch16_224", "swin_tiny_patch4_window7_224", "ghostnet_100"])
def test_names_and_order_are_not_needed(name: str) -> None:
    items = list(state_of(on_meta(name, num_classes=7)).items())
    random.Random(0).shuffle(items)
    renamed = {f"tensor{number}": value for number, (_, value) in enumerate(items) if value.is_floating_point()}
    found = autoalign.identify(renamed)
    assert found.best is not None
    assert f"timm:{name}" in found.best.architectures
    assert (found.verdict, found.best.classes, found.trained) == ("known", 7, None)


def test_the_nearest_is_named_with_the_difference() -> None:
    found = autoalign.identify(on_meta("vit_tiny_patch16_224", mlp_ratio=3.0))
    assert found.verdict == "near"
    assert found.best is not None
    assert found.best.architectures[0] == "timm:vit_tiny_patch16_224"
    assert found.best.roles == ("another MLP ratio",)
    assert "blocks.#.mlp.fc#.bias is [576], not [768] (12 x)" in found.best.differences
    assert "Width 192 and depth 12: no published size; nearest is vit_tiny_patch16_224" in str(found)


def test_of_an_unknown_size_the_kind_of_blocks_is_said() -> None:
    found = autoalign.identify(on_meta("vit_tiny_patch16_224", embed_dim=200, num_heads=4, depth=5))
    assert (found.verdict, found.candidates) == ("unknown", ())
    assert found.blocks_like is not None
    assert found.blocks_like.startswith("timm:deit_tiny")
    assert "Unknown: it is near no known architecture (width 200 and depth 5)." in str(found)


def test_a_part_is_named_where_the_whole_is_unknown() -> None:
    pair = nn.ModuleDict({name: nn.ModuleDict({"net": on_meta("resnet18")}) for name in ("student", "teacher")})
    found = autoalign.identify(pair)
    assert (found.part, found.copies, found.verdict) == ("student", ("teacher",), "known")


def test_experts_are_known_apart_and_fused() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = transformers.MixtralModel(transformers.MixtralConfig())
    saved = revert_weight_conversion(model, dict(model.state_dict()))
    assert len(saved) > len(model.state_dict())
    for given in (model, saved):
        found = autoalign.identify(given)
        assert (found.verdict, found.best and found.best.architectures[0]) == ("known", "transformers:Mixtral-8x7B")


def test_what_has_no_head_is_built_without_one() -> None:
    best = autoalign.identify(on_meta("resnet18d", num_classes=0)).best
    assert best is not None
    assert best.target == "timm:resnet18d(num_classes=0)"
    assert best.load_with == "autoalign.load(timm.create_model('resnet18d', num_classes=0), checkpoint)"


def test_networks_written_by_hand_are_unknown() -> None:
    networks = [model for _, model in handwritten()]
    assert len(networks) >= 100
    verdicts = [autoalign.identify(model).verdict for model in networks[::5]]
    assert verdicts.count("unknown") >= 0.95 * len(verdicts)


def test_what_was_not_trained_is_said_to_be() -> None:
    assert autoalign.identify(timm.create_model("test_vit")).trained == "not trained (the weights of all norms are 1)"


def test_a_load_of_unrelated_networks_says_what_they_look_like() -> None:
    model = on_meta("resnet18")
    with pytest.raises(
        autoalign.NothingLoadedError, match=r"The source looks like timm's vit_tiny_.* \(152 of"
    ) as info:
        autoalign.load(model, on_meta("vit_tiny_patch16_224"), assign=True)
    assert "single layers have matching shapes" in info.value.details  # and not in the text
    assert "single layers" not in str(info.value)


def test_a_strict_load_of_another_size_says_so() -> None:
    looks = r"The source looks like .*'s resnet34 \(.*\). The target looks like .*'s resnet18 \("
    with pytest.raises(autoalign.IncompatibleTensorsError, match=looks):
        autoalign.load(on_meta("resnet18"), on_meta("resnet34"), assign=True, strict=True)
    with pytest.raises(autoalign.IncompatibleTensorsError, match="was not changed") as info:
        autoalign.load(on_meta("resnet18"), on_meta("resnet18", num_classes=10), assign=True, strict=True)
    assert "looks like" not in str(info.value)


def test_the_command_exits_with_1_for_what_is_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known, unknown = str(tmp_path / "known.pth"), str(tmp_path / "unknown.pth")
    torch.save(timm.create_model("test_resnet").state_dict(), known)
    torch.save(nn.Linear(3, 4).state_dict(), unknown)
    assert cli.main(["identify", known, "--format", "json"]) == cli.COMPLETE
    assert json.loads(capsys.readouterr().out)["candidates"][0]["architectures"] == ["timm:test_resnet"]
    assert cli.main(["identify", unknown]) == cli.INCOMPLETE
    assert "near no known architecture" in capsys.readouterr().out


def test_what_only_mmpretrain_has_is_named_as_it_is_built() -> None:
    known = index()
    (group,) = {one.group for group in known.architectures for one in group if one.name == "mff_vit-base-p16"}
    shapes = enumerate(known.shapes_of(group).elements())
    found = autoalign.identify({str(place): torch.empty(shape, device="meta") for place, shape in shapes})
    assert found.best is not None
    assert found.best.target.startswith("mmpretrain:get_model(model='mff_vit-base-p16_8xb512-")
    assert found.best.load_with.startswith("autoalign.load(mmpretrain.get_model(model='mff_vit-base-p16_8xb512-")
