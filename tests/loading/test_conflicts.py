"""Conflicts: different tensors for one that the model ties, and biases for layers that have none, are said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import autoalign
from autoalign.errors import ChoiceWarning, IncompatibleTensorsError, PartialLoadWarning


class Tied(nn.Module):
    """A language model in small, whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.fc, self.head = nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False)
        self.head.weight = self.emb.weight


NAMES = [("", "emb", "head"), ("net.", "emb", "head"), ("net.", "wte", "lm_out")]


def saved(prefix: str, first: str, second: str, value: float = 2.0, rows: int = 10) -> dict[str, Tensor]:
    return {
        f"{prefix}{first}.weight": torch.ones(10, 4),
        f"{prefix}fc.weight": torch.ones(4, 4),
        f"{prefix}fc.bias": torch.ones(4),
        f"{prefix}{second}.weight": torch.full((rows, 4), value),
    }


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("names", NAMES)
def test_different_tensors_for_a_tied_one_are_said(tmp_path: Path, names: tuple[str, str, str], as_file: bool) -> None:
    checkpoint = saved(*names)
    if as_file:
        save_file(checkpoint, tmp_path / "saved.safetensors")
    given = tmp_path / "saved.safetensors" if as_file else checkpoint
    model = Tied()
    prefix, first, second = names
    taken, other = f"{prefix}{first}.weight", f"{prefix}{second}.weight"
    said = f"emb.weight and head.weight are one tensor in the model, and differ in the checkpoint: {taken} was taken"
    with pytest.warns(ChoiceWarning, match=f"{said}, not {other}"):
        alignment = autoalign.load(model, given)
    assert (model.emb.weight == 1).all()
    assert (alignment.missing_keys, alignment.unexpected_keys) == ([], [other])
    with pytest.raises(IncompatibleTensorsError, match=other):
        autoalign.load(Tied(), given, strict=True)


@pytest.mark.parametrize("names", NAMES)
def test_equal_tensors_for_a_tied_one_are_no_conflict(names: tuple[str, str, str]) -> None:
    model = Tied()
    alignment = autoalign.load(model, saved(*names, value=1.0), strict=True)
    assert (model.emb.weight == 1).all()
    assert alignment.unexpected_keys == []


@pytest.mark.parametrize("prefix", ["", "net."])
def test_a_tensor_of_another_shape_for_a_tied_one_is_said(prefix: str) -> None:
    checkpoint = saved(prefix, "emb", "head", rows=12)
    with pytest.warns(ChoiceWarning, match=rf"{prefix}emb.weight was taken, not {prefix}head.weight \[12, 4\]"):
        alignment = autoalign.load(Tied(), checkpoint)
    assert alignment.unexpected_keys == [f"{prefix}head.weight"]


def test_a_conversion_says_and_settles_what_differs_for_a_tied_tensor(tmp_path: Path) -> None:
    with pytest.warns(ChoiceWarning, match="emb.weight was taken, not head.weight"):
        autoalign.convert(saved(*NAMES[0]), Tied(), tmp_path / "out.safetensors")
    written = load_file(tmp_path / "out.safetensors")
    assert torch.equal(written["head.weight"], written["emb.weight"])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_dropped_bias_is_said_if_it_is_not_zero(value: float) -> None:
    source = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
    target = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
    with torch.no_grad():
        source.get_parameter("0.bias").fill_(value)
    if not value:
        assert autoalign.load(target, source).unexpected_keys == ["0.bias"]
        return
    with pytest.warns(ChoiceWarning, match=r"1 biases have no place in the model.*: 0\.bias\. Unless they are added"):
        assert autoalign.load(target, source).unexpected_keys == ["0.bias"]
    assert autoalign.load(target, source, exclude=r"re:^0\.bias$").missing_keys == []


class Detector(nn.Module):
    """The end of a detector, with a box for each class, or for each but the background."""

    def __init__(self, boxes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 64))
        self.predictor = nn.ModuleDict({"cls_score": nn.Linear(64, 81), "bbox_pred": nn.Linear(64, 4 * boxes)})


def test_rows_whose_order_the_boxes_give_away_are_said() -> None:
    said = "predictor.cls_score.weight may be in another order: of its 81 classes one is the background"
    with pytest.warns(ChoiceWarning, match=said), pytest.warns(PartialLoadWarning):
        autoalign.load(Detector(81), Detector(80).state_dict())
    same = autoalign.load(Detector(80), Detector(80).state_dict(), strict=True)
    assert same.notes == ()
