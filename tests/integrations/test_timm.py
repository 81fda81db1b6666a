"""timm's own functions, with checkpoints of torchvision's and transformers' networks."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from autoalign import PartialLoadWarning
from autoalign.integrations.timm import checkpoint_filter_fn, pretrained_cfg_overlay

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


@pytest.fixture
def path(tmp_path: Path) -> str:
    theirs = torchvision.models.regnet_y_400mf()
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in theirs.state_dict().items()}}, tmp_path / "a.pth"
    )
    return str(tmp_path / "a.pth")


def weights(path: str) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]  # type: ignore[no-any-return]


def test_load_checkpoint_takes_it_as_its_filter(path: str) -> None:
    model = timm.create_model("regnety_004")
    assert timm.models.load_checkpoint(model, path, filter_fn=checkpoint_filter_fn) == ([], [])
    assert torch.equal(model.stem.conv.weight, weights(path)["module.stem.0.weight"])


def test_create_model_takes_any_weights_as_pretrained_ones(path: str) -> None:
    overlay = pretrained_cfg_overlay("regnety_004", path)
    create = partial(timm.create_model, "regnety_004", pretrained=True, pretrained_cfg_overlay=overlay)
    model = create()
    assert torch.equal(model.head.fc.weight, weights(path)["module.fc.weight"])
    smaller = create(num_classes=10, in_chans=1)
    assert torch.equal(smaller.s1.b1.conv1.conv.weight, model.s1.b1.conv1.conv.weight)
    assert torch.allclose(smaller.stem.conv.weight, model.stem.conv.weight.sum(1, keepdim=True))


def test_weights_of_another_number_of_classes_are_described(path: str) -> None:
    given = weights(path)
    given |= {key: given[key][:7] for key in ("module.fc.weight", "module.fc.bias")}
    with pytest.warns(PartialLoadWarning, match="2 get nothing from it: head.fc.weight, head.fc.bias"):
        pretrained_cfg_overlay("regnety_004", given)
    overlay = pretrained_cfg_overlay("regnety_004(num_classes=7)", given)
    model = timm.create_model("regnety_004", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7)
    assert torch.equal(model.head.fc.weight, given["module.fc.weight"])


def test_timm_raises_where_its_own_load_is_strict(path: str) -> None:
    model = timm.create_model("regnety_004", num_classes=10)
    with pytest.warns(PartialLoadWarning), pytest.raises(RuntimeError, match="Missing key"):
        timm.models.load_checkpoint(model, path, filter_fn=checkpoint_filter_fn)


def test_a_model_that_is_there_is_loaded_by_the_filter() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_labels": 1000}
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    model = timm.create_model("vit_tiny_patch16_224")
    cfg = {**model.pretrained_cfg, "state_dict": theirs.state_dict()}
    timm.models.load_pretrained(model, cfg, filter_fn=partial(checkpoint_filter_fn, min_confidence=0.4))
    assert torch.equal(model.head.weight, theirs.classifier.weight)
