"""The exported function does what ``apply`` does, or an error says that it cannot."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import autoalign
from autoalign import InputError, Match, Rule, Rules, RulesError
from autoalign.plan.adaptations import SumChannels
from autoalign.plan.dequantise import Dequantise
from autoalign.plan.operations import (
    Chain,
    Concatenate,
    Flip,
    Grouped,
    InsertZeros,
    Operation,
    Parallel,
    Permute,
    Reshape,
    Split,
    Stack,
    Transpose,
    Unstack,
)
from autoalign.rules.size_free import Pick, Portion, Regroup, Sized, ZerosLike
from tests.rules.test_export_renamings import RENAMINGS, gpt_like, halved, llama, same
from tests.rules.test_induce import few, made, renamings
from tests.rules.test_rules import EVERY_KIND, tensors


def function_of(rules: Rules) -> Any:
    space: dict[str, Any] = {}
    exec(rules.to_python("convert"), space)
    return space["convert"]


def test_python_does_what_the_rules_do() -> None:
    source = tensors()
    assert same(function_of(EVERY_KIND)(source, None), EVERY_KIND.apply(source))


@settings(few, max_examples=60)
@given(renamings())
def test_python_agrees_with_apply_on_any_names(names: tuple[list[str], list[str]]) -> None:
    keys, targets = names
    source = {key: torch.rand(1) for key in keys}
    matches = [Match(target, (key,)) for key, target in zip(keys, targets, strict=True) if target]
    rules = made(source, {match.target: torch.empty(1) for match in matches}, *matches).rules()
    assert same(function_of(rules)(source), rules.apply(source))


@pytest.mark.parametrize("key", ['a"b', "a'b", "a\"'b", "a\\b", "a\nb", "a{b}", "a\\", '"""', "é"])
def test_keys_with_odd_characters_are_escaped(key: str) -> None:
    rules = Rules(
        (Rule((f"^{re.escape(key)}$",), (key.replace("\\", "\\\\").replace("{", "\\{").replace("}", "\\}"),)),)
    )
    longer = Rules((Rule((f"^(x){re.escape(key)}$",), (rules.rules[0].targets[0] + r"\1",)),))
    assert list(function_of(rules)({key: 1})) == [key]
    assert list(function_of(longer)({"x" + key: 1})) == [key + "x"]


def test_the_function_runs_without_autoalign(tmp_path: Path) -> None:
    model = llama()
    source = gpt_like(model)
    rules = autoalign.align(halved(source), model).rules()
    (tmp_path / "filters.py").write_text(rules.to_python(), encoding="utf-8")
    torch.save(source, tmp_path / "source.pt")
    code = f"""
        import sys
        sys.modules["autoalign"] = None  # so that importing it fails
        sys.path.insert(0, {str(tmp_path)!r})
        import torch
        from filters import checkpoint_filter_fn
        torch.save(checkpoint_filter_fn(torch.load("source.pt"), None), "result.pt")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, check=True)
    assert same(torch.load(tmp_path / "result.pt"), rules.apply(source))


def test_the_function_is_formatted_as_ruff_leaves_it(tmp_path: Path) -> None:
    long = "a_rather_long_name." * 5
    for number, rules in enumerate(
        (
            EVERY_KIND,
            RENAMINGS,
            Rules(()),
            Rules((Rule((f"^{long}",), (long,)),)),
            Rules(
                (Rule((rf"^{long}(\d+)",), (r"x.{(0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 4, 4, 4, 5, 5, 6)[\1]}",)),)
            ),
        )
    ):
        (tmp_path / f"rules{number}.py").write_text(rules.to_python(), encoding="utf-8")
    for command in (["format", "--check"], ["check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--isolated", str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


def test_the_name_of_the_function_is_checked() -> None:
    for name in ("a b", "class", ""):
        with pytest.raises(InputError, match="not a valid function name"):
            RENAMINGS.to_python(name)


def test_a_missing_part_is_an_error_of_the_function() -> None:
    rules = Rules((Rule(("^q", "^k"), ("qk",), (Concatenate(0),)),))
    with pytest.raises(KeyError, match="a part is missing"):
        function_of(rules)({"q": torch.ones(1)})


def test_an_operation_without_a_short_form_is_refused() -> None:
    rules = Rules((Rule(("^w",), ("w",), (SumChannels(3),)), Rule(("^v",), ("v",), (Transpose(),))))
    with pytest.raises(RulesError, match="1 of 2 rules hold operations that have no short form") as caught:
        rules.to_python()
    assert "sum 3 channels" in str(caught.value)


@few
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2))
def test_parts_are_written_as_they_are_applied(of: int, length: int, dim: int) -> None:
    for start in range(of - length + 1):
        rules = Rules((Rule(("^w",), ("v",), (Portion(dim, start, length, of),)),))
        source = {"w": torch.rand(12, 24, 36)}
        assert same(function_of(rules)(source), rules.apply(source))


@pytest.mark.parametrize(
    "operation",
    [
        Chain((InsertZeros(1, (2, 3)), Concatenate(0))),
        Chain((ZerosLike(1, 0), Concatenate(0))),
        Sized(((2, 3), (2, 3)), Concatenate(0)),
        Chain((Parallel((Flip(0), Reshape((2, 3)))), Concatenate(0))),
        Chain((Concatenate(0), Flip(0))),
        Chain((Concatenate(0), Reshape((12,)))),
        Chain((Pick((1, 0, 1)), Concatenate(0))),
        Chain((Grouped(1, Unstack(0, 1)), Stack(0))),
        Chain((Parallel((Sized(((2, 3),), Transpose()), Regroup(((1,), (0,))))), Concatenate(0))),
    ],
    ids=str,
)
def test_operations_are_written_as_they_are_applied(operation: Operation) -> None:
    rules = Rules((Rule(("^a$", "^b$"), ("c",), (operation,)),))
    source = {key: torch.rand(2, 3) for key in "ab"}
    assert same(function_of(rules)(source), rules.apply(source))


@pytest.mark.parametrize(
    "operation",
    [
        Permute((1, 0)),
        Split(0, 1, 1),
        Unstack(1, 2),
        Regroup(((1,), (0,))),
        Regroup(((0, 1),)),
        Sized(((2, 3),), Transpose()),
        Chain((Pick((0, 0)), Concatenate(1))),
    ],
    ids=str,
)
def test_operations_on_one_tensor_are_written_as_they_are_applied(operation: Operation) -> None:
    rules = Rules((Rule(("^a$",), ("c",), (operation,)),))
    source = {"a": torch.rand(2, 3)}
    assert same(function_of(rules)(source), rules.apply(source))


def test_codes_without_companions_are_dequantised_by_the_function() -> None:
    step = Dequantise("GGUF Q8_0", ("codes",))
    half = torch.tensor([0x00, 0x38], dtype=torch.uint8)  # the scale, 0.5 in float16, before 32 codes
    codes = torch.cat([half, torch.arange(32, dtype=torch.uint8)])[None]
    (values,) = function_of(Rules((Rule(("^a$",), ("b",), (step,)),)))({"a": codes}).values()
    assert torch.equal(values, torch.arange(32)[None] / 2)
