"""What is decided and shown around a load: corresponding modules, extra states, versions, counters, progress."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from autoalign.alignment import Alignment
from autoalign.api import load
from autoalign.checkpoints.checkpoint import checkpoint_of
from autoalign.errors import AlignmentError
from autoalign.loading import prepare as module
from autoalign.loading.prepare import (
    Progress,
    absent_counters,
    extra_states,
    progress_of,
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


class Screen(io.StringIO):
    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def shown(
    monkeypatch: pytest.MonkeyPatch, progress: Progress | bool | None, *, terminal: bool, seconds: float = 0
) -> str:
    screen = Screen(terminal=terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_of(progress, 3, 3000, time.perf_counter() - seconds) as step:
        for done in (1, 2, 3):
            step(done, 1000 * done)
    return screen.getvalue()


@pytest.mark.parametrize(
    ("progress", "terminal", "seconds", "expected"),
    [
        (None, True, 0.0, False),
        (None, True, 3.0, True),
        (None, False, 3.0, False),
        (False, True, 3.0, False),
        (True, False, 0.0, True),
        (True, True, 0.0, True),
    ],
)
def test_when_there_is_a_bar(
    monkeypatch: pytest.MonkeyPatch, progress: bool | None, terminal: bool, seconds: float, expected: bool
) -> None:
    text = shown(monkeypatch, progress, terminal=terminal, seconds=seconds)
    assert ("Loading" in text and "3/3 tensors" in text) is expected
    assert bool(text) is expected


def test_a_bar_of_a_load_is_on_stderr_alone(capsys: pytest.CaptureFixture[str]) -> None:
    load(nn.Linear(2, 2), nn.Linear(2, 2), progress=True)
    captured = capsys.readouterr()
    assert "2/2 tensors" in captured.err
    assert captured.out == ""


def test_a_bar_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[str] = []
    made = module._bar(transient=True)
    monkeypatch.setattr(made, "stop", lambda: stopped.append("stopped"))
    monkeypatch.setattr(module, "_bar", lambda **_: made)
    with pytest.raises(ValueError, match="now"), progress_of(True, 1, 1, 0.0) as step:  # noqa: PT012
        step(0, 0)
        raise ValueError("now")
    assert stopped == ["stopped"]


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


def test_a_bar_that_fails_does_not_fail_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Screen):
        def write(self, _text: str) -> int:
            raise BrokenPipeError("nobody reads it")

    monkeypatch.setattr(sys, "stderr", Broken(terminal=True))
    model, source = nn.Linear(2, 1), nn.Linear(2, 1)
    load(model, source.state_dict(), progress=True)
    assert torch.equal(model.weight, source.weight)
