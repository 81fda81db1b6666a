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

from autoalign.api import load
from autoalign.errors import AlignmentError
from autoalign.loading import prepare as module
from autoalign.loading.prepare import Progress, progress_of


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
