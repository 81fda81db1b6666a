"""Rules as values: what they say of a state dict, their JSON, and what they refuse."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from autoalign import InputError, PatternError, Rule, Rules, RulesError
from autoalign.plan.adaptations import ResizeGrid, TakeRows
from autoalign.plan.keys import TimeLimit
from autoalign.plan.operations import (
    Chain,
    Concatenate,
    Copy,
    Grouped,
    InsertZeros,
    Operation,
    Parallel,
    Split,
    Stack,
    Transpose,
    Unstack,
)
from autoalign.rules.rule import fitted
from autoalign.rules.size_free import Each, Portion, Regroup, Sized, ZerosLike

EVERY_KIND = Rules(
    (
        Rule((r"^fc\.",)),
        Rule((r"^layer(\d+)\.(\d+)\.",), (r"stages.{\1 - 1}.\2.",)),
        Rule((r"^(\d+)\.q\.", r"^(\d+)\.k\."), (r"attn.\1.qk.",), (Concatenate(0),)),
        Rule((r"^kv$",), ("k", "v"), (Portion(0, 0, 1, 2), Portion(0, 1, 1, 2))),
        Rule(
            (r"^e\.(?P<n>\d+)\.gate$", r"^e\.(?P<n>\d+)\.up$"),
            ("experts",),
            (Chain((Grouped(2, Concatenate(0)), Stack(0))),),
        ),
        Rule((r"^stacked$",), ("list.{n + 1}.weight",), (Chain((Each(0), Transpose())),)),
        Rule((r"^tied$",), ("first", "second"), tied=True),
    ),
    ("a note",),
)


def tensors() -> dict[str, torch.Tensor]:
    shapes = {"fc.weight": (2, 3), "layer1.0.w": (2,), "layer2.7.w": (3,), "0.q.b": (2,), "1.k.b": (4,), "0.k.b": (1,)}
    shapes |= {"1.q.b": (4,), "kv": (4, 2), "stacked": (3, 2, 5), "tied": (1,), "kept": (2,)}
    shapes |= {f"e.{i}.{part}": (2, 3) for i in (10, *range(10)) for part in ("up", "gate")}
    return {key: torch.rand(shape) for key, shape in shapes.items()}


def test_every_kind_of_rule_is_applied() -> None:
    source = tensors()
    before = {key: tensor.clone() for key, tensor in source.items()}
    result = EVERY_KIND.apply(source)
    experts = torch.stack([torch.cat([source[f"e.{i}.gate"], source[f"e.{i}.up"]]) for i in range(11)])
    wanted = {
        "stages.0.0.w": source["layer1.0.w"],
        "stages.1.7.w": source["layer2.7.w"],
        "attn.0.qk.b": torch.cat([source["0.q.b"], source["0.k.b"]]),
        "attn.1.qk.b": torch.cat([source["1.q.b"], source["1.k.b"]]),
        "k": source["kv"][:2],
        "v": source["kv"][2:],
        "list.1.weight": source["stacked"][0].T,
        "list.2.weight": source["stacked"][1].T,
        "list.3.weight": source["stacked"][2].T,
        "first": source["tied"],
        "second": source["tied"],
        "kept": source["kept"],
        "experts": experts,
    }
    assert result.keys() == wanted.keys()
    assert all(torch.equal(result[key], tensor) for key, tensor in wanted.items())
    assert all(torch.equal(source[key], tensor) for key, tensor in before.items())


def test_json_holds_all_of_them() -> None:
    text = EVERY_KIND.to_json()
    assert json.loads(text)["version"] == 1
    assert Rules.from_json(text) == EVERY_KIND


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"version": 1, "rules": [{}], "notes": []}', '{"version": 1, "rules": 3, "notes": []}'],
)
def test_what_is_no_json_of_rules_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="not JSON of autoalign's rules"):
        Rules.from_json(text)


def test_another_version_is_refused() -> None:
    with pytest.raises(InputError, match="have version 2; this autoalign reads 1"):
        Rules.from_json('{"version": 2}')


OPERATIONS: list[tuple[dict[str, object], str]] = [
    ({"kind": "Split", "dim": "0, 0, 1); evil(", "start": 0, "length": 1}, "dim of Split cannot be '0, 0, 1"),
    ({"kind": "Split", "dim": 0, "start": None, "length": 1}, "start of Split cannot be None"),
    ({"kind": "Split", "dim": 0, "start": 1.5, "length": 1}, "start of Split cannot be 1.5"),
    ({"kind": "Split", "dim": True, "start": 0, "length": 1}, "dim of Split cannot be True"),
    ({"kind": "Split", "dim": 64, "start": 0, "length": 1}, "dim of Split cannot be 64"),
    ({"kind": "Split", "dim": 0, "start": -1, "length": 1}, "start of Split cannot be -1"),
    ({"kind": "Split", "dim": 0, "start": 0, "length": 2**63}, "length of Split cannot be 9"),
    ({"kind": "Reshape", "shape": 3}, "shape of Reshape cannot be 3"),
    ({"kind": "Reshape", "shape": ["2"]}, "shape of Reshape cannot be"),
    ({"kind": "Reshape", "shape": [[2]]}, "shape of Reshape cannot be"),
    ({"kind": "Regroup", "dims": [[[0]]]}, "dims of Regroup cannot be"),
    ({"kind": "Grouped", "size": 0, "operation": {"kind": "Copy"}}, "size of Grouped cannot be 0"),
    ({"kind": "Grouped", "size": 1, "operation": 3}, "int is not a known kind"),
    ({"kind": "Chain", "steps": [{"kind": "Flip", "dim": "x"}]}, "dim of Flip cannot be 'x'"),
    ({"kind": "Chain", "steps": {"kind": "Copy"}}, "steps of Chain cannot be"),
    ({"kind": "ResizeGrid", "old": [1], "new": [1, 2]}, "old of ResizeGrid cannot be"),
    ({"kind": "ResizeGrid", "old": [1, 2], "new": [1, 2], "channels_last": 1}, "channels_last of ResizeGrid"),
    ({"kind": "Transpose", "apply": 1}, "Transpose has no 'apply'"),
    ({"kind": "Single"}, "has no kind that this version knows"),
]


@pytest.mark.parametrize(("operation", "message"), OPERATIONS)
def test_every_number_of_an_operation_is_checked(operation: dict[str, object], message: str) -> None:
    rule = {"sources": ["a"], "targets": ["b"], "operations": [operation]}
    with pytest.raises(InputError, match=message):
        Rules.from_json(json.dumps({"version": 1, "rules": [rule], "notes": []}))


@pytest.mark.parametrize(
    "change",
    [
        {"version": True},
        {"version": 1.0},
        {"version": "1"},
        {"notes": "abc"},
        {"notes": [1]},
        {"rules": {}},
        {"rules": ["a"]},
        {"rules": [{"sources": "a", "targets": []}]},
        {"rules": [{"sources": ["a"], "targets": [1]}]},
        {"rules": [{"sources": ["a"], "targets": ["b"], "tied": 1}]},
        {"rules": [{"sources": ["a"], "targets": ["b"], "operations": "Copy"}]},
    ],
)
def test_every_field_of_rules_is_checked(change: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"not JSON of autoalign's rules: .* Nothing was read"):
        Rules.from_json(json.dumps({"version": 1, "rules": [], "notes": []} | change))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"version": ' + "1" * 5000 + "}",
        '{"version": NaN}',
        '{"version": 1, "notes": [], "rules": [{"sources": ["^a"], "targets": ["b"], "operations": ['
        + '{"kind": "Grouped", "size": 1, "operation": ' * 60
        + '{"kind": "Copy"}'
        + "}" * 60
        + "]}]}",
    ],
)
def test_json_that_python_cannot_hold_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="Nothing was read"):
        Rules.from_json(text)


def test_a_number_of_an_operation_cannot_become_code() -> None:
    evil: Any = "0, 0, 1); evil("
    with pytest.raises(PatternError, match="malformed operation: dim of Split cannot be '0, 0, 1"):
        Rules((Rule(("a",), ("b",), (Split(evil, 0, 1),)),))
    rules = Rules((Rule(("a",), ("b",), (Chain((Split(0, 0, 1), Each(0))),)),))
    for operation in rules.rules[0].operations[0].parts:
        object.__setattr__(operation, "dim", evil)
        with pytest.raises(TypeError, match="dim of"):
            rules.to_python()
        object.__setattr__(operation, "dim", 0)


def test_a_rule_of_fewer_operations_than_targets_is_refused() -> None:
    with pytest.raises(PatternError, match="as many operations as targets or none"):
        Rules((Rule(("a",), ("b", "c"), (Transpose(),)),))
    with pytest.raises(PatternError, match="must have tuples"):
        Rules((Rule("ab", ("c",)),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(("^a",), ("b",), (Chain((InsertZeros(0, (10**13,)), Concatenate(0))),)), "makes many times more zeros"),
        (Rule((r"^a(\d+)",), (r"b{\1 * \1}",)), "a number over 10"),
        (Rule((r"^(.*)",), (r"b{\1 + 1}",)), "'a1111111111' is not a number"),
        (Rule((r"^a(?P<n>.*)",), ("b",), (Stack(0),)), "'' is not a number of at most 18 digits"),
        (Rule((r"^a(\d+)",), (r"b{\1 // (\1 - \1)}",)), "a division by zero"),
        (Rule((r"^a(\d+)",), (r"b{-\1}",)), "gives -1111111111"),
        (Rule((r"^a(\d+)",), (r"b{(1, 2)}",)), "is not a number"),
        (Rule((r"^a(\d+)",), (r"b{n}",)), "n is not captured"),
        (Rule(("^a",), ("b",), (Parallel((Copy(), Copy())),)), "does not make one tensor|Nothing was converted"),
        (Rule(("^a",), ("b",), (Unstack(0, 9),)), "Nothing was converted"),
        (Rule(("^a",), ("b",), (TakeRows(0, 1, 1),)), "Nothing was converted"),
        (Rule(("^a",), ("b",), (ResizeGrid((9, 9), (2, 2)),)), "Nothing was converted"),
    ],
)
def test_rules_that_do_not_hold_raise_nothing_of_torch(rule: Rule, message: str) -> None:
    with pytest.raises(RulesError, match=message):
        Rules((rule,)).apply({"a1111111111": torch.ones(2, 2), "a": torch.ones(2, 2)})


@pytest.mark.parametrize(
    "expression", [r"\1" + r" + \1" * 100, r"\1" + r" + \1" * 10_000, "(" * 10_000, "\0", "9" * 5000]
)
def test_arithmetic_is_bounded(expression: str) -> None:
    with pytest.raises(PatternError, match="arithmetic"):
        Rules((Rule((r"^a(\d+)",), (f"b{{{expression}}}",)),))


@pytest.mark.parametrize(
    "operation", [{"kind": "Explode"}, {"kind": "Reshape", "size": 3}, {"kind": "Chain"}, {"kind": 3}, "Copy"]
)
def test_an_operation_that_is_not_known_is_refused(operation: object) -> None:
    rule = {"sources": ["a"], "targets": ["b"], "operations": [operation]}
    with pytest.raises(InputError, match="Nothing was read"):
        Rules.from_json(json.dumps({"version": 1, "rules": [rule], "notes": []}))


def test_the_first_rule_that_matches_takes_a_key_once() -> None:
    rules = Rules((Rule((r"^a\.",), ("b.",)), Rule((r"^b\.",), ("a.",)), Rule((r"^b\.x",), ("c",))))
    assert list(rules.apply({"a.x": torch.ones(1), "b.x": torch.ones(1)})) == ["b.x", "a.x"]


def test_the_rule_of_a_key() -> None:
    assert EVERY_KIND.rule_of("layer3.0.x") is EVERY_KIND.rules[1]
    assert EVERY_KIND.rule_of("1.k.b") is EVERY_KIND.rules[2]
    assert EVERY_KIND.rule_of("other") is None


@pytest.mark.parametrize(
    ("rule", "keys", "message"),
    [
        (Rule(("^q", "^k"), ("qk",), (Concatenate(0),)), {"q": (2,)}, "q: there is no ^k beside it"),
        (Rule(("^q",), ("k",), (Portion(0, 0, 1, 3),)), {"q": (4,)}, "does not divide a tensor of shape [4]"),
        (Rule(("^q",), ("k",), (Regroup(((0,), -1, 7)),)), {"q": (2, 6)}, "does not fit a tensor of shape [2, 6]"),
        (Rule(("^q",), ("k",), (Sized(((3,),), Transpose()),)), {"q": (4,)}, "was found for [3] and cannot be"),
        (Rule(("^q",), ("k",), (Transpose(),)), {"q": (4,)}, "Nothing was converted"),
        (Rule((r"^q(\d+)",), (r"k{\1 - 1}",)), {"q0": (4,)}, r"{\1 - 1} gives -1"),
        (Rule((r"^q(\d+)",), (r"k{(4, 5)[\1]}",)), {"q2": (4,)}, "the table of 2 numbers has no place 2"),
        (Rule((r"^q",), ("k",)), {"q": (4,), "k": (4,)}, "k is filled from q and k"),
        (Rule(("^q", "^k"), ("qk",), (Copy(),)), {"q": (2,), "k": (2,)}, "'copy' does not make one tensor of 2"),
        (Rule((r"^(?P<n>\d+)",), ("k",), (Stack(0),)), {"0": (4,), "2": (4,)}, "members of a list are not complete"),
    ],
)
def test_rules_that_do_not_hold_say_why(rule: Rule, keys: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(RulesError, match=re.escape(message)):
        Rules((rule,)).plan(keys)


@pytest.mark.parametrize(
    ("sources", "targets", "operations"),
    [
        (("(",), ("b",), ()),
        ((), ("b",), ()),
        (("a",), (r"\1",), ()),
        (("(a)",), (r"{\2 + 1}",), ()),
        (("(?P<m>a)",), ("b",), ()),
        ((r"(a)\1",), ("b",), ()),
        (("a",), ("b{",), ()),
        ((r"(\d+)",), (r"{__import__('os')}",), ()),
        ((r"(\d+)",), (r"{\1 ** 9}",), ()),
        (("a",), ("b",), (Transpose(), Transpose())),
    ],
)
def test_a_malformed_rule_is_refused(
    sources: tuple[str, ...], targets: tuple[str, ...], operations: tuple[Operation, ...]
) -> None:
    with pytest.raises(PatternError, match=r"rule|expression|replacement|group|arithmetic"):
        Rules((Rule(sources, targets, operations),))


def test_text_of_rules() -> None:
    assert str(EVERY_KIND).splitlines() == [
        r"^fc\.                       -> (dropped)",
        r"^layer(\d+)\.(\d+)\.        -> stages.{\1 - 1}.\2.",
        r"^(\d+)\.{q, k}\.            -> attn.\1.qk.   concatenate(dim 0)",
        r"^kv$                        -> {k, v}   2 equal parts (dim 0)",
        r"^e\.(?P<n>\d+)\.{gate, up}$ -> experts   concatenate(dim 0) by 2 + stack(dim 0)",
        r"^stacked$                   -> list.{n + 1}.weight   slice n (dim 0) + transpose",
        r"^tied$                      -> {first, second}   (tied)",
        "a note",
    ]


def test_rules_of_nothing() -> None:
    rules = Rules(())
    assert str(rules) == "No rules: every key stays as it is."
    assert len(rules) == 0
    assert list(rules.apply({"a": torch.ones(1)})) == ["a"]


def test_zeros_take_the_shape_of_an_input() -> None:
    operation = Chain((ZerosLike(1, 0), Concatenate(0)))
    rules = Rules((Rule(("^q", "^v"), ("qkv",), (operation,)),))
    assert rules.apply({"q": torch.ones(1), "v": torch.ones(1)})["qkv"].tolist() == [1, 0, 1]


def test_json_with_a_pattern_that_is_none_is_refused() -> None:
    rule = {"sources": ["("], "targets": ["b"]}
    with pytest.raises(PatternError, match=r"not a valid regular expression.*Nothing was read"):
        Rules.from_json(json.dumps({"version": 1, "rules": [rule], "notes": []}))


def test_patterns_that_take_long_together_alone_are_an_error_too() -> None:
    with pytest.raises(PatternError, match="takes too long"):
        EVERY_KIND._taken("fc.weight", TimeLimit(0, "", seconds=0))


@pytest.mark.parametrize(
    ("rows", "arithmetic"),
    [
        ({(0,): 0, (1,): 3, (2,): 4}, r"(0, 3, 4)[\1]"),
        ({(0,): 0, (1,): 3, (4,): 8}, None),
        ({(0, 0): 0, (0, 1): 1, (1, 0): 5, (1, 1): 6, (4, 0): 7}, None),
    ],
)
def test_arithmetic_is_found_where_numbers_have_no_gaps(
    rows: dict[tuple[int, ...], int], arithmetic: str | None
) -> None:
    found = fitted(rows)
    assert (found and found[1]) == arithmetic
