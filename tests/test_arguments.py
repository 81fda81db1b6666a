"""Arguments of every public function that are of no use raise errors of ours, and change nothing."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autoalign
from autoalign import Alignment, AutoAlignError, Rule, Rules

JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 2**70, 1.5, float("nan"), float("inf"), "", "x", "\ud800", "\x00", b"x", "x" * 300),
    *([], [[]], ["a", 3], (1, 2), {}, {"kind": 1}, {1: 2}, {1: torch.ones(1)}, {"a": torch.ones(2), 1: 3}),
    *(object(), torch.ones(1), int, nn.Linear(2, 2), Rule(("a",)), partial(int)),
)
SOURCE = {"a.weight": torch.ones(2, 2), "a.bias": torch.zeros(2)}
ALIGN = ("rules", "include", "exclude", "adapt", "min_confidence", "container", "example_inputs")


def calls(folder: Path) -> Iterator[tuple[str, Callable[[Any], object]]]:
    """List calls that take one argument that may be anything."""
    alignment = autoalign.align(SOURCE, nn.Linear(2, 2))
    rules = alignment.rules()
    functions: list[tuple[Callable[..., Any], dict[str, Callable[[], Any]]]] = [
        (autoalign.align, {"source": lambda: SOURCE, "target": lambda: nn.Linear(2, 2)}),
        (autoalign.load, {"model": lambda: nn.Linear(2, 2), "checkpoint": lambda: SOURCE}),
        (
            autoalign.convert,
            {
                "checkpoint": lambda: SOURCE,
                "target": lambda: nn.Linear(2, 2),
                "output_path": lambda: folder / "c.safetensors",
                "overwrite": lambda: True,
            },
        ),
        (
            autoalign.verify,
            {
                "source_model": lambda: nn.Linear(2, 2),
                "target_model": lambda: nn.Linear(2, 2),
                "example_inputs": lambda: torch.ones(1, 2),
            },
        ),
        (autoalign.open_checkpoint, {"path": lambda: "x"}),
        (autoalign.execution_order, {"module": lambda: nn.Linear(2, 2), "example_inputs": lambda: torch.ones(1, 2)}),
    ]
    for function, given in functions:
        names = {*given, *inspect.signature(function).parameters, *ALIGN} - {"align_options", "unknown"}
        for name in names if function.__name__ in ("align", "load", "convert", "verify") else names - set(ALIGN):
            yield f"{function.__name__} {name}", partial(_called, function, given, name)
    for method in ("save", "to_html", "explain", "tensor"):
        yield method, getattr(alignment, method)
    yield "render width", lambda junk: alignment.render(width=junk)
    yield "render limit", lambda junk: alignment.render(limit=junk)
    yield "read", Alignment.read
    yield "applied_to a checkpoint", lambda junk: alignment.applied_to(junk, nn.Linear(2, 2))
    yield "applied_to a model", lambda junk: alignment.applied_to(SOURCE, junk)
    for name in ("apply", "plan", "rule_of", "to_python"):
        yield name, getattr(rules, name)
    yield "from_json", Rules.from_json
    yield "rules", Rules
    yield "a rule", lambda junk: Rules((junk,))
    for name in ("sources", "targets", "operations", "tied"):
        yield f"rule {name}", partial(_applied, name)


def _called(function: Callable[..., object], given: Mapping[str, Callable[[], Any]], name: str, junk: Any) -> object:
    return function(**({key: make() for key, make in given.items()} | {name: junk}))


def _applied(name: str, junk: Any) -> object:
    fields: dict[str, Any] = {"sources": ("a",), name: junk}
    return Rules((Rule(**fields),)).apply(SOURCE)


def test_no_argument_raises_anything_but_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    faults = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, call in calls(tmp_path):
            for place, junk in enumerate(JUNK):
                if name.endswith("progress") and callable(junk):
                    continue  # what it raises cancels the call
                try:
                    call(junk)
                except AutoAlignError:
                    continue
                except Exception as error:
                    faults.append(f"{name} of {type(junk).__name__} ({place}): {type(error).__name__}: {error}"[:150])
    assert not faults, "\n".join(faults)
