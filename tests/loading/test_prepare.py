from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from autoalign.alignment import Alignment
from autoalign.checkpoints.checkpoint import checkpoint_of
from autoalign.loading.prepare import absent_counters, extra_states, source_modules, state_metadata
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
