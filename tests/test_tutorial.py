"""The cases of the transfer-learning tutorial, on torchvision's ResNets: another head, and changed upper stages.

There each is solved by deleting keys by hand and ``load_state_dict(strict=False)``; here each is one call.
"""

from __future__ import annotations

import re

import pytest
import torch
import torchvision
from torch import Tensor, nn

import autoalign
from autoalign.errors import PartialLoadWarning, PatternError

HEAD = ["fc.weight", "fc.bias"]


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Tensor]:
    """A ResNet-18 of 1,000 classes."""
    state_dict: dict[str, Tensor] = torchvision.models.resnet18(weights=None).state_dict()
    return state_dict


@pytest.fixture
def model() -> nn.Module:
    """Another ResNet-18 of 1,000 classes, whose values are all different."""
    network: nn.Module = torchvision.models.resnet18(weights=None)
    for tensor in network.state_dict().values():
        tensor.fill_(7)
    return network


def loaded_keys(model: nn.Module, checkpoint: dict[str, Tensor]) -> set[str]:
    return {key for key, tensor in model.state_dict().items() if torch.equal(tensor, checkpoint[key])}


def test_the_whole_network_loads(model: nn.Module, checkpoint: dict[str, Tensor]) -> None:
    alignment = autoalign.load(model, checkpoint, strict=True)
    assert repr(alignment) == "<All keys matched successfully>"
    assert alignment.coverage == 1
    assert loaded_keys(model, checkpoint) == set(checkpoint)


def test_a_head_is_left_out(model: nn.Module, checkpoint: dict[str, Tensor]) -> None:
    missing_keys, unexpected_keys = autoalign.load(model, checkpoint, exclude=("fc",))
    assert missing_keys == HEAD
    assert unexpected_keys == HEAD
    assert loaded_keys(model, checkpoint) == checkpoint.keys() - set(HEAD)
    assert torch.all(model.state_dict()["fc.weight"] == 7)


def test_a_head_and_the_upper_stage_are_left_out(model: nn.Module, checkpoint: dict[str, Tensor]) -> None:
    missing_keys, _ = autoalign.load(model, checkpoint, exclude=("fc", "layer4"))
    left_out = [key for key in checkpoint if key.startswith(("fc", "layer4"))]
    assert missing_keys == left_out
    assert loaded_keys(model, checkpoint) == checkpoint.keys() - set(left_out)


def test_only_what_is_included_loads(model: nn.Module, checkpoint: dict[str, Tensor]) -> None:
    autoalign.load(model, checkpoint, include=r"re:^layer[12]\.", exclude=re.compile("bn2"))
    wanted = {key for key in checkpoint if key.startswith(("layer1.", "layer2.")) and "bn2" not in key}
    assert loaded_keys(model, checkpoint) == wanted


def test_another_number_of_classes_needs_nothing_named(checkpoint: dict[str, Tensor]) -> None:
    model = torchvision.models.resnet18(weights=None, num_classes=10)
    before = model.fc.weight.detach().clone()
    with pytest.warns(PartialLoadWarning, match=r"fc\.weight, fc\.bias"):
        alignment = autoalign.load(model, checkpoint)
    assert alignment.missing_keys == HEAD
    assert alignment.unexpected_keys == HEAD
    shapes = {
        mismatch.key: (mismatch.shape, mismatch.source_key, mismatch.source_shape)
        for mismatch in alignment.mismatched_keys
    }
    assert shapes["fc.weight"] == ((10, 512), "fc.weight", (1000, 512))
    assert shapes["fc.bias"] == ((10,), "fc.bias", (1000,))
    assert loaded_keys_of_body(model, checkpoint) == checkpoint.keys() - set(HEAD)
    assert torch.equal(model.fc.weight, before)


def loaded_keys_of_body(model: nn.Module, checkpoint: dict[str, Tensor]) -> set[str]:
    return {
        key
        for key, tensor in model.state_dict().items()
        if tensor.shape == checkpoint[key].shape and torch.equal(tensor, checkpoint[key])
    }


def test_a_head_can_be_replaced_after_loading(model: nn.Module, checkpoint: dict[str, Tensor]) -> None:
    autoalign.load(model, checkpoint)
    model.fc = nn.Linear(512, 10)
    fine_tuned = model.state_dict()
    again = torchvision.models.resnet18(weights=None, num_classes=10)
    assert repr(autoalign.load(again, fine_tuned)) == "<All keys matched successfully>"
    with torch.inference_mode():
        images = torch.randn(1, 3, 64, 64)
        assert torch.equal(again.eval()(images), model.eval()(images))


def test_a_head_of_several_layers_replaces_the_old_one(model: nn.Module, checkpoint: dict[str, Tensor]) -> None:
    model.fc = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))
    with pytest.warns(PartialLoadWarning, match=r"fc\.0\.weight"):
        alignment = autoalign.load(model, checkpoint)
    assert alignment.missing_keys == ["fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias"]
    assert len(alignment.matches) == len(checkpoint) - 2


def test_a_changed_upper_stage_leaves_the_lower_ones_loaded(checkpoint: dict[str, Tensor]) -> None:
    model = torchvision.models.resnet18(weights=None)
    model.layer4 = nn.Sequential(nn.Conv2d(256, 512, 5, bias=False), nn.GroupNorm(8, 512))
    with pytest.warns(PartialLoadWarning, match="layer4"):
        alignment = autoalign.load(model, checkpoint)
    assert alignment.missing_keys == ["layer4.0.weight", "layer4.1.weight", "layer4.1.bias"]
    assert alignment.mapping == {key: key for key in checkpoint if not key.startswith("layer4")}


def test_a_renaming_rule_is_followed(model: nn.Module, checkpoint: dict[str, Tensor]) -> None:
    renamed = {f"trunk.{key.replace('layer', 'part')}": tensor for key, tensor in checkpoint.items()}
    alignment = autoalign.load(model, renamed, rules={r"^trunk\.part(\d)": r"layer\1", r"^trunk\.": ""}, strict=True)
    assert alignment.mapping == {f"trunk.{key.replace('layer', 'part')}": key for key in checkpoint}
    assert loaded_keys(model, checkpoint) == set(checkpoint)


def test_a_rule_wins_over_the_names(model: nn.Module, checkpoint: dict[str, Tensor]) -> None:
    pinned = "layer1.0.conv2.weight", "layer1.0.conv1.weight"
    alignment = autoalign.load(model, checkpoint, rules=[pinned])
    (matched,) = [match for match in alignment.matches if match.target == pinned[1]]
    assert matched.sources == (pinned[0],)
    assert matched.confidence == 1
    assert "rule" in matched.evidence
    assert torch.equal(model.state_dict()[pinned[1]], checkpoint[pinned[0]])
    others = [match for match in alignment.matches if match is not matched]
    assert pinned[0] not in {key for match in others for key in match.sources}


def test_a_rule_steers_what_it_does_not_name(model: nn.Module, checkpoint: dict[str, Tensor]) -> None:
    """Of two equal networks in one checkpoint, the one that a single pair is pinned to is loaded whole."""
    towers = {f"{side}.{key}": tensor.clone() for side in ("left", "right") for key, tensor in checkpoint.items()}
    alignment = autoalign.load(model, towers, rules=[("right.fc.bias", "fc.bias")])
    assert alignment.missing_keys == []
    assert alignment.mapping == {f"right.{key}": key for key in checkpoint}
    assert alignment.unexpected_keys == [f"left.{key}" for key in checkpoint]


def test_a_rule_for_a_key_that_does_not_exist_is_refused(model: nn.Module, checkpoint: dict[str, Tensor]) -> None:
    with pytest.raises(PatternError, match="no_such_key"):
        autoalign.load(model, checkpoint, rules=[("no_such_key", "fc.bias")])
