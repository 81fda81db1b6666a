"""choices: what is ambiguous is one statement for each move, and the rules of an option do what it says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import autoalign
from autoalign.alignment import Alignment
from autoalign.errors import InputError
from autoalign.plan.matches import Candidate, Match
from autoalign.plan.operations import Concatenate, Operation, Transpose
from autoalign.plan.specs import specs_of
from autoalign.reports.choices import Choice, Option, answers
from benchmarks.cases.gold import read
from tests.matching.test_operation_pairs import LLAMA
from tests.reference_models.llama import MetaLlama

Shapes = Mapping[str, tuple[int, ...]]


def shaped(shapes: Shapes) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def blocks(*names: str, count: int = 3) -> dict[str, Tensor]:
    """Blocks of norms that their shapes do not tell apart, around a layer that is the same on both sides."""
    layers = {f"h.{i}.{name}.{leaf}": (8,) for i in range(count) for name in names for leaf in ("weight", "bias")}
    return shaped(layers | {f"h.{i}.fc.weight": (16, 8) for i in range(count)})


def plan(ambiguous: Sequence[Match], source: Shapes, target: Shapes, matches: Sequence[Match] = ()) -> Alignment:
    return Alignment(tuple(matches), tuple(ambiguous), (), specs_of(shaped(source)), specs_of(shaped(target)))


def unsure(target: str, source: str, *rivals: str, operation: Operation | None = None) -> Match:
    ways = tuple(Candidate((rival,), operation or Match("", ()).operation, 0.0) for rival in rivals)
    return Match(target, (source,), confidence=0.4, alternatives=ways)


SIDES = dict(sorted(blocks("a", "b").items())), blocks("one", "two")


def exchangeable() -> Alignment:
    """Two norms in each of three blocks, which nothing tells apart."""
    sources = {"one": ("a", "b"), "two": ("b", "a")}
    ambiguous, matches = [], []
    for key in SIDES[1]:
        start, name, leaf = key.rsplit(".", 2)
        if name == "fc":
            matches.append(Match(key, (key,)))
        else:
            source, rival = (f"{start}.{other}.{leaf}" for other in sources[name])
            ambiguous.append(replace(unsure(key, source, rival), warnings=("nothing tells one from two",)))
    own, other = map(specs_of, SIDES)
    return Alignment(tuple(matches), tuple(ambiguous), (), own, other, tensors=SIDES[0], target_tensors=SIDES[1])


def test_an_exchange_in_every_block_is_one_choice() -> None:
    alignment = exchangeable()
    (choice,) = alignment.choices
    assert choice.targets == tuple(match.target for match in alignment.ambiguous)
    assert len(choice.targets) == 12
    assert [option.rules for option in choice.options] == [
        ((r"^h\.(\d+)\.a\.", r"h.\1.one."), (r"^h\.(\d+)\.b\.", r"h.\1.two.")),
        ((r"^h\.(\d+)\.b\.", r"h.\1.one."), (r"^h\.(\d+)\.a\.", r"h.\1.two.")),
    ]
    assert choice.why == ("nothing tells one from two",)
    assert choice.confidence == 0.4


@pytest.mark.parametrize("chosen", [0, 1])
def test_the_rules_that_are_shown_can_be_pasted(chosen: int) -> None:
    (choice,) = exchangeable().choices
    line = answers(choice, 0)[chosen]
    changed = autoalign.align(*SIDES, rules=eval(line.partition("rules=")[2]))
    loaded = {match.target: match for match in changed.matches}
    assert not changed.ambiguous
    for match in choice.options[chosen].matches:
        assert loaded[match.target].sources == match.sources
        assert loaded[match.target].confidence == loaded[match.target].evidence["rule"] == 1.0


def test_a_decided_alignment_loads_what_the_option_says() -> None:
    alignment = exchangeable()
    option = alignment.choices[0].options[1]
    changed = alignment.decided(option)
    assert changed.missing_keys == changed.unexpected_keys == []
    assert changed.choices == ()
    assert changed.applied_to(*SIDES) == changed
    assert changed.mapping["h.2.b.bias"] == "h.2.one.bias"
    assert "it was chosen" in str(changed.explain("h.2.one.bias"))
    with pytest.raises(InputError, match=r"'h\.0\.one\.bias' is not ambiguous\. Nothing was decided"):
        changed.decided(option)


def test_choices_outlast_saving(tmp_path: Path) -> None:
    alignment = exchangeable()
    alignment.save(tmp_path / "saved.json")
    assert Alignment.read(tmp_path / "saved.json").choices == alignment.choices
    (plain,) = alignment.to_dict()["choices"]
    assert plain["targets"] == list(alignment.choices[0].targets)
    assert plain["options"][1]["rules"] == [list(pair) for pair in alignment.choices[0].options[1].rules]
    assert plain["options"][1]["fills"][0] == {
        "target": "h.0.one.weight",
        "sources": ["h.0.b.weight"],
        "operation": {"kind": "Copy"},
    }


def test_layouts_of_one_doubt_are_one_choice_that_an_alignment_decides() -> None:
    alignment = autoalign.align(MetaLlama(frequencies=False).state_dict(), LLAMA().state_dict())
    (choice,) = alignment.choices
    assert {key.rsplit(".", 2)[1] for key in choice.targets} == {"q_proj", "k_proj"}
    proposal, *others = choice.options
    assert proposal.rules
    assert others
    assert not any(option.rules for option in others)
    assert any("'rotary_interleaved'" in text for text in choice.settled_by)
    assert "To settle queries" in str(alignment)
    assert "Note: To settle queries" not in str(alignment)  # it stands with the choice
    decided = alignment.decided(others[0])
    assert {match.target: match.operation for match in decided.matches}[choice.targets[0]] == others[0].matches[
        0
    ].operation


def test_the_order_of_registration_is_named_where_keys_are_sorted() -> None:
    alignment = exchangeable()
    assert "order of registration, which sorted keys have lost" in alignment.choices[0].settled_by[0]
    in_order = replace(alignment, source_specs=alignment.source_specs[::-1])
    assert not any("order of registration" in text for text in in_order.choices[0].settled_by)


def test_two_modules_at_hand_are_called() -> None:
    modules = [nn.ModuleDict({name: nn.LayerNorm(8) for name in names}) for names in (("a", "b"), ("one", "two"))]
    settled = autoalign.align(*modules, min_confidence=1.0).choices[0].settled_by
    assert settled[-1] == "autoalign.verify(source, model, inputs)"


def test_an_option_takes_nothing_that_is_loaded() -> None:
    shapes = dict.fromkeys("abc", (4,))
    match = unsure("a", "a", "b", "c")
    (choice,) = plan([match], shapes, shapes, [Match("b", ("b",))]).choices
    assert [option.rules for option in choice.options] == [(("a", "a"),), (("c", "a"),)]


def test_no_option_is_the_proposal_or_stands_twice() -> None:
    tensor = torch.empty(4, device="meta")
    source = specs_of({"a": tensor, "tied": tensor, "b": torch.empty(4, device="meta")})
    match = unsure("x", "a", "a", "tied", "b", "b")
    alignment = Alignment((), (match,), (), source, specs_of(shaped({"x": (4,)})))
    assert [option.rules for option in alignment.choices[0].options] == [(("a", "x"),), (("b", "x"),)]


def test_a_cycle_is_one_choice_whose_options_are_one_to_one() -> None:
    shapes = {f"m.{key}": (4,) for key in "abc"}
    cycle = [unsure("m.a", "m.a", "m.b"), unsure("m.b", "m.b", "m.c"), unsure("m.c", "m.c", "m.b")]
    (choice,) = plan(cycle, shapes, shapes).choices
    filled = [[match.sources for match in option.matches] for option in choice.options]
    assert filled[0] == [("m.a",), ("m.b",), ("m.c",)]
    assert all(len(set(sources)) == 3 for sources in filled)
    assert {(own, other) for sources in filled for own, other in zip("abc", sources, strict=True)} >= {
        ("a", ("m.b",)),
        ("b", ("m.c",)),
        ("c", ("m.b",)),
    }


def test_tied_targets_are_filled_together_and_named_once() -> None:
    table = torch.empty(5, 4, device="meta")
    target = {"embed.weight": table, "head.weight": table}
    matches = tuple(unsure(key, "wte", "lm") for key in target)
    alignment = Alignment((), matches, (), specs_of(shaped({"wte": (5, 4), "lm": (5, 4)})), specs_of(target))
    (choice,) = alignment.choices
    assert choice.targets == ("embed.weight", "head.weight")
    assert [option.rules for option in choice.options] == [(("wte", "embed.weight"),), (("lm", "embed.weight"),)]
    assert [match.sources for match in choice.options[1].matches] == [("lm",), ("lm",)]


def test_an_option_that_rules_cannot_say_has_none() -> None:
    shapes = {"q": (2, 4), "k": (2, 4), "sq": (4, 4)}
    joined = Match("qk", ("q", "k"), Concatenate(0), 0.4, {}, (Candidate(("k", "q"), Concatenate(0), 0.0),))
    turned = unsure("t", "sq", "sq", operation=Transpose())
    choices = plan([joined, turned], shapes, {"qk": (4, 4), "t": (4, 4)}).choices
    assert [[option.rules for option in choice.options] for choice in choices] == [[(), ()], [(("sq", "t"),), ()]]
    assert answers(choices[0], 0)[:2] == [
        "as proposed: alignment.decided(alignment.choices[0].options[0])",
        "or by 'concatenate(dim 0)' of k + q: alignment.decided(alignment.choices[0].options[1])",
    ]


def test_rules_are_written_for_a_shell_too() -> None:
    (choice,) = exchangeable().choices
    assert answers(choice, 0, for_shell=True)[1] == (
        r"or: --rule '^h\.(\d+)\.b\.=h.\1.one.' --rule '^h\.(\d+)\.a\.=h.\1.two.'"
    )


def test_many_pairs_are_named_by_where_they_are() -> None:
    choice = Choice((), (), (Option((), tuple((f"a{n}", f"b{n}") for n in range(9))),), 0.4)
    assert answers(choice, 3)[0] == "as proposed: 9 pairs in rules=alignment.choices[3].options[0].rules"
    assert answers(choice, 3, for_shell=True)[0] == "as proposed: 9 pairs of --rule, which --format json has"


def test_a_report_shows_choices_whole_or_not_at_all() -> None:
    shapes = {f"{name}.weight": (size,) for size, name in enumerate("abcdefgh", 1)}
    ambiguous = [unsure(key, key) for key in shapes]
    alignment = plan(ambiguous, shapes, shapes)
    assert len(alignment.choices) == 8
    text = alignment.render(limit=14)
    assert 0 < text.count("as proposed: ") < 8
    assert text.count("as proposed: ") == text.count("its confidence is below min_confidence")
    assert alignment.render(limit=None).count("as proposed: ") == 8


def test_of_a_large_choice_a_report_has_a_few_rows() -> None:
    keys = [f"a.{name}.weight" for name in ("one", "two", "three", "four", "five", "six", "seven")]
    shapes = {key: (size, 2) for size, key in enumerate(keys, 1)}
    matches = [replace(unsure(key, key, key, operation=Transpose()), warnings=("doubt",)) for key in keys]
    alignment = plan(matches, shapes, shapes)
    assert "    and 3 more: alignment.choices[0].targets\n" in str(alignment)
    assert keys[-1] in alignment.render(limit=None)


SAMPLE = (
    *("LSTMCell-stack->torch.LSTM(bi,3)", "blinkdl.rwkv4->hf.rwkv", "meta.llama->hf.llama"),
    *("allenai.olmo->hf.olmo", "x-transformers.llama-like->hf.llama", "magicleap.superpoint->hf.superpoint"),
    *("torch.LSTM->keras-style-lstm", "esrgan.old-arch->esrgan.rrdbnet", "hf.phi3->litgpt.phi3"),
    "timojl.clipseg->hf.clipseg",
)


def options_of(name: str) -> Iterator[tuple[Alignment, Choice, Option]]:
    for with_sorted_keys in (False, True):
        case = read(name, with_sorted_keys=with_sorted_keys)
        alignment = autoalign.align(case.source, case.target)
        assert sorted(key for choice in alignment.choices for key in choice.targets) == sorted(
            match.target for match in alignment.ambiguous
        )
        for match in (*alignment.matches, *alignment.ambiguous):
            ways = {(way.sources, way.operation) for way in match.alternatives} - {(match.sources, match.operation)}
            assert len(ways) == len(match.alternatives)
        for choice in alignment.choices:
            for option in choice.options:
                yield alignment, choice, option


@pytest.mark.parametrize("name", SAMPLE)
def test_each_option_of_a_real_pair_does_what_it_says(name: str) -> None:
    case = read(name)
    for alignment, choice, option in options_of(name):
        assert tuple(match.target for match in option.matches) == choice.targets
        if not option.rules:
            continue
        changed = autoalign.align(alignment.tensors, case.target, rules=option.rules)
        loaded = {match.target: match for match in changed.matches}
        for match in option.matches:
            assert (loaded[match.target].sources, loaded[match.target].operation) == (match.sources, match.operation)
            assert (loaded[match.target].confidence, loaded[match.target].evidence) == (1.0, {"rule": 1.0})
        if all(case.is_right(match.target, match) for match in option.matches):  # what is wrong leads astray
            known = {match.target for match in alignment.matches if case.is_right(match.target, match)}
            assert [key for key in known & loaded.keys() if not case.is_right(key, loaded[key])] == []


@pytest.mark.parametrize("name", SAMPLE)
def test_options_of_a_real_pair_differ(name: str) -> None:
    case = read(name)
    for _, choice, option in options_of(name):
        if option is choice.options[0]:
            for one, two in combinations(choice.options, 2):
                ways = zip(one.matches, two.matches, strict=True)
                assert not all(torch.equal(_value(case, own), _value(case, other)) for own, other in ways)


def _value(case: object, match: Match) -> Tensor:
    (tensor,) = match.operation.apply([case._value(key) for key in match.sources])  # type: ignore[attr-defined]
    return tensor
