"""Arguments of the public functions: known to type checkers, wrong ones refused, and junk an error of ours."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from torch import nn

import autoalign
from autoalign import Alignment, AutoAlignError, Rule, Rules
from autoalign.plan import options
from autoalign.plan.options import AlignOptions, MatchOptions

ROOT = Path(__file__).parent.parent
WRONG = "  # wrong"
# Lines that a type checker must refuse are marked.
CALLS = """
import re
from typing import Unpack, assert_type

import torch
from torch import nn

import autoalign

model, source = nn.Linear(2, 2), {"a.weight": torch.ones(2, 2)}
images = torch.ones(1, 2)
autoalign.align(source, model, rules={"a": "b"}, include=["a", re.compile("b")], exclude="fc", adapt="head")
autoalign.load(model, source, rules=[("a", "b")], exclude=("fc", "layer4"), adapt=("head", "vocab"), strict=True)
autoalign.load(model, "a.pth", min_confidence=0.9, container="ema", example_inputs=images, dtype="bfloat16")
autoalign.convert(source, model, "b.safetensors", exclude=re.compile("fc"), format="dcp", max_shard_size="5GB")
autoalign.verify(model, model, images, exclude="fc", tolerance=1e-3, trials=0)
autoalign.align(source, model, exlude="fc")  # wrong
autoalign.load(model, source, exlude="fc")  # wrong
autoalign.load(model, source, asign=True)  # wrong
autoalign.load(model, source, exclude=3)  # wrong
autoalign.load(model, source, adapt="heads")  # wrong
autoalign.load(model, source, min_confidence="high")  # wrong
autoalign.load(model, source, rules=["a"])  # wrong
autoalign.convert(source, model, "b.safetensors", exlude="fc")  # wrong
autoalign.convert(source, model, "b.safetensors", format="gguf")  # wrong
autoalign.verify(model, model, images, exlude="fc")  # wrong
autoalign.verify(model, model, images, container=3)  # wrong


def my_load(**options: Unpack[autoalign.AlignOptions]) -> autoalign.Alignment:
    return autoalign.load(model, source, **options)


my_load(exclude="fc")
my_load(exlude="fc")  # wrong
assert_type(my_load().render(width=80, limit=None), str)
my_load().render(widht=80)  # wrong
missing, unexpected = my_load()
assert_type(missing, list[str])
"""
MARKED = {number for number, line in enumerate(CALLS.splitlines(), 1) if line.endswith(WRONG)}


def test_mypy_refuses_wrong_options_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "calls.py").write_text(CALLS, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", str(tmp_path / "calls.py")]  # in the folder whose cache mypy has filled
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    found = {int(line) for line in re.findall(r"calls\.py:(\d+): error:", done.stdout)}
    assert found == MARKED, done.stdout + done.stderr


@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="pyright is not installed")
def test_pyright_refuses_wrong_options_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "calls.py").write_text(CALLS, encoding="utf-8")
    settings = {"include": ["calls.py"], "extraPaths": [str(ROOT)], "typeCheckingMode": "strict"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "-p", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    problems = json.loads(done.stdout)["generalDiagnostics"]
    found = {problem["range"]["start"]["line"] + 1 for problem in problems if problem["severity"] == "error"}
    assert found == MARKED, done.stdout


def test_the_type_of_the_options_is_that_of_align() -> None:
    hints = get_type_hints(autoalign.align)
    parameters = inspect.signature(autoalign.align).parameters.values()
    own = {item.name: hints[item.name] for item in parameters if item.kind is item.KEYWORD_ONLY}
    assert get_type_hints(AlignOptions, {**vars(options), "nn": nn}) == own
    calling = ("example_inputs", "source_model")
    assert get_type_hints(MatchOptions) == {name: hint for name, hint in own.items() if name not in calling}


def layers() -> tuple[nn.Linear, nn.Linear]:
    return nn.Linear(2, 2), nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("function", "arguments", "undone"),
    [
        (autoalign.align, (), "Nothing was aligned."),
        (autoalign.load, (), "Nothing was loaded."),
        (autoalign.convert, ("never_written.safetensors",), "Nothing was written."),
        (autoalign.verify, (torch.ones(1, 2),), "Nothing was verified."),
    ],
    ids=["align", "load", "convert", "verify"],
)
@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ({"exlude": "fc"}, "an unexpected keyword argument 'exlude'. Did you mean 'exclude'?"),
        ({"minimum_confidence": 0.9}, "an unexpected keyword argument 'minimum_confidence'. Did you mean 'min_conf"),
        ({"xyz": 1}, "an unexpected keyword argument 'xyz'."),
        ({"rule": {}, "exclude": "fc", "adpat": ()}, "unexpected keyword arguments 'rule'. Did you mean 'rules'? 'adp"),
    ],
)
def test_a_wrong_option_is_refused_with_the_nearest(
    function: Callable[..., object], arguments: tuple[Any, ...], undone: str, given: dict[str, Any], nearest: str
) -> None:
    text = re.escape(f"{function.__name__}() got {nearest}") + ".*" + re.escape(undone)
    with pytest.raises(autoalign.InputError, match=text):
        function(*layers(), *arguments, **given)


def test_an_option_of_the_function_itself_may_be_meant() -> None:
    with pytest.raises(TypeError, match=r"'asign'. Did you mean 'assign'"):
        autoalign.load(*layers(), asign=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"'tolerence'. Did you mean 'tolerance'"):
        autoalign.verify(*layers(), torch.ones(1, 2), tolerence=1)  # type: ignore[call-arg]


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
