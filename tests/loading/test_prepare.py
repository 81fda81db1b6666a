"""What is decided around a load: corresponding modules, extra states, versions, counters; and what is in conflict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import autoalign
from autoalign.alignment import Alignment
from autoalign.api import load
from autoalign.checkpoints.checkpoint import checkpoint_of
from autoalign.errors import AlignmentError, ChoiceWarning, IncompatibleTensorsError, PartialLoadWarning
from autoalign.loading.prepare import (
    absent_counters,
    extra_states,
    source_modules,
    state_metadata,
)
from autoalign.plan.matches import Match
from autoalign.plan.operations import Reshape, Split


def aligned(model: nn.Module, source: dict[str, object], mapping: dict[str, str]) -> Alignment:
    """Align as ``mapping`` says, from the checkpoint's keys to the model's."""
    checkpoint = checkpoint_of(source)
    matches = tuple(Match(key, (source_key,)) for source_key, key in mapping.items())
    return Alignment(matches, (), (), checkpoint.specs, checkpoint_of(model).specs, tensors=checkpoint)


def matched(*matches: Match) -> Alignment:
    return Alignment(matches, (), (), (), ())


def test_modules_correspond_where_the_rest_of_the_keys_is_equal() -> None:
    alignment = matched(
        Match("layers.0.fc.weight", ("module.blocks.0.fc.weight",)),
        Match("layers.0.fc.bias", ("module.blocks.0.fc.bias",)),
        Match("norm.weight", ("module.ln.weight",)),
        Match("norm.bias", ("module.ln.beta",)),
    )
    assert source_modules(alignment) == {
        "layers.0.fc": "module.blocks.0.fc",
        "layers.0": "module.blocks.0",
        "layers": "module.blocks",
        "norm": "module.ln",
    }


def test_module_with_tensors_of_two_modules_corresponds_to_none() -> None:
    alignment = matched(Match("fc.weight", ("a.weight",)), Match("fc.bias", ("b.bias",)))
    assert source_modules(alignment) == {}


def test_part_of_a_tensor_says_nothing_of_modules() -> None:
    assert source_modules(matched(Match("q.weight", ("qkv.weight",), Split(0, 0, 1)))) == {}


@pytest.mark.parametrize(
    ("key", "source_key"),
    [
        ("a.b._extra_state", "x.b._extra_state"),
        ("_extra_state", "_extra_state"),
        ("a.c.d._extra_state", "z._extra_state"),
    ],
)
def test_extra_state_is_looked_up_by_the_nearest_module(key: str, source_key: str) -> None:
    source = checkpoint_of({"w": torch.zeros(1), "x.b._extra_state": 1, "_extra_state": 2, "z._extra_state": 3})
    states = extra_states(source, {key: object(), "a.w": object()}, {"a": "x", "a.c.d": "z"})
    assert states == {key: source.extras[source_key]}


def test_extra_state_that_the_checkpoint_lacks_is_left_out() -> None:
    assert extra_states(checkpoint_of({"w": torch.zeros(1)}), {"a._extra_state": object()}, {"a": ""}) == {}


def test_version_is_the_models_own_where_a_tensor_was_changed() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    source: Any = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm2d(3)).state_dict()
    source._metadata["0"]["version"], source._metadata["1"]["version"] = 7, 8
    checkpoint = checkpoint_of(source)
    matches = [Match(key, (key,)) for key in source]
    matches[0] = Match("0.weight", ("0.weight",), Reshape((3, 2, 1, 1)))
    alignment = Alignment(tuple(matches), (), (), checkpoint.specs, checkpoint_of(model).specs, tensors=checkpoint)
    targets: Any = model.state_dict()
    metadata = state_metadata(checkpoint, alignment, targets, source_modules(alignment), frozenset())
    assert metadata == {"": {"version": 1}, "0": {"version": 1}, "1": {"version": 8}}
    assert targets._metadata["1"] == {"version": 2}
    assert metadata["0"] is not targets._metadata["0"]


@pytest.mark.parametrize("names", [("weight", "running_mean"), ("gamma", "moving_mean")])
def test_counter_is_absent_where_the_rest_of_its_module_is_there(names: tuple[str, str]) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(4))
    source: dict[str, object] = {f"bn.{names[0]}": torch.zeros(3), f"bn.{names[1]}": torch.zeros(3)}
    mapping = {f"bn.{names[0]}": "0.weight", f"bn.{names[1]}": "0.running_mean"}
    alignment = aligned(model, source, mapping)
    counters = absent_counters(model, checkpoint_of(source), alignment, source_modules(alignment))
    assert counters == {"0.num_batches_tracked"}


def test_counter_that_was_there_and_not_aligned_is_not_absent() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    source: dict[str, object] = {"bn.weight": torch.zeros(3), "bn.num_batches_tracked": torch.tensor(1)}
    alignment = aligned(model, source, {"bn.weight": "0.weight"})
    assert absent_counters(model, checkpoint_of(source), alignment, source_modules(alignment)) == frozenset()


def test_a_model_that_changes_while_it_is_read_is_not_filled(tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    arrays: Any = {f"x.{key}": np.ones(tensor.shape, np.float32) for key, tensor in model.state_dict().items()}
    with (tmp_path / "a").open("wb") as stream:
        np.savez(stream, **arrays)
    new, kept = nn.Linear(2, 2), model[0].weight
    before = [kept.clone(), new.weight.clone(), model[1].weight.clone()]

    def change(done: int, _: int) -> None:
        if done == 2:
            model[0] = new

    with pytest.raises(AlignmentError, match=r"The model changed while it was loaded: .* Nothing was loaded"):
        load(model, tmp_path / "a", progress=change)
    for tensor, value in zip((kept, new.weight, model[1].weight), before, strict=True):
        assert torch.equal(tensor, value)


def test_a_model_that_changes_while_it_is_loaded_is_put_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    first = model[0]

    def change(done: int, _: int) -> None:
        if done == 2:
            model[0] = nn.Linear(2, 2)

    source = {f"x.{key}": torch.ones_like(value) for key, value in before.items()}
    with pytest.raises(RuntimeError, match=r"The model changed while it was loaded: it has other tensors now for 0"):
        load(model, source, progress=change)
    assert model[0] is first
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


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
