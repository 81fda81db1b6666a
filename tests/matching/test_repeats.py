"""Repeats: equal names, consistent renamings, and long lists find what the whole search finds."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

import autoalign
from autoalign.alignment import Alignment
from autoalign.checkpoints.checkpoint import checkpoint_of
from autoalign.matching import match as aligning
from autoalign.matching import repeats
from autoalign.matching.confidence import INFERRED
from autoalign.matching.layers import Part, parts_of
from autoalign.matching.repeats import is_renamed, with_same_names
from autoalign.plan.matches import Match, Mismatch
from autoalign.plan.operations import Copy
from autoalign.plan.specs import specs_of
from tests.strategies import Case, conv_cases, perturbed, real_cases, renamed, tensors, transformer_cases

ALL = 10**6  # blocks of a list that are matched: no list is longer


def state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def found(alignment: Alignment) -> dict[str, tuple[tuple[str, ...], str]]:
    return {match.target: (match.sources, str(match.operation)) for match in alignment.matches}


def moe(layers: int, experts: int, prefix: str, expert: str, gate: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}embed.weight": (50, 8)}
    for layer in range(layers):
        block = f"{prefix}layers.{layer}"
        shapes |= {f"{block}.norm.weight": (8,), f"{block}.{gate}.weight": (experts, 8)}
        for index in range(experts):
            shapes |= {f"{block}.{expert}.{index}.{w}.weight": (12, 8) for w in ("w1", "w3")}
            shapes |= {f"{block}.{expert}.{index}.w2.weight": (8, 12)}
    return shapes


@settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(transformer_cases() | perturbed())
def test_the_first_blocks_tell_what_all_blocks_tell(case: Case) -> None:
    short = autoalign.align(tensors(case.source), tensors(case.target))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeats, "KEPT", ALL)
        whole = autoalign.align(tensors(case.source), tensors(case.target))
    assert found(short) == found(whole)
    assert {key for key, status in short.status.items() if status == "matched"} == set(found(whole))


@pytest.mark.parametrize(("layers", "more"), [(9, 0), (9, 3), (6, -1)])
def test_lists_in_lists_are_paired_by_their_numbers(layers: int, more: int) -> None:
    source = moe(layers, 11, "model.", "mlp.experts", "mlp.gate")
    target = moe(layers + more, 11, "", "moe.experts", "moe.router")
    alignment = autoalign.align(state(source), state(target))
    assert alignment.mapping == {
        f"model.{key.replace('moe.router', 'mlp.gate').replace('moe', 'mlp')}": key
        for key in target
        if f"model.{key.replace('moe.router', 'mlp.gate').replace('moe', 'mlp')}" in source
    }


def test_one_list_against_two_of_the_same_blocks_is_matched_as_a_whole() -> None:
    block = {"norm.weight": (8,), "up.weight": (32, 8), "down.weight": (8, 32)}
    source = {f"layers.{index}.{key}": shape for index in range(12) for key, shape in block.items()}
    target = {
        f"stages.{stage}.{index}.{key}": shape
        for stage in range(2)
        for index in range(6)
        for key, shape in block.items()
    }
    alignment = autoalign.align(state(source), state(target))
    assert list(alignment.mapping.values()) == list(target)
    assert list(alignment.mapping) == list(source)


def test_equal_blocks_are_one_run_and_others_end_it() -> None:
    shapes = {f"h.{index}.weight": (8, 9 if index == 7 else 8) for index in range(14)}
    runs = repeats.runs_of(specs_of(state(shapes)))
    assert {len(run) for run in runs.run_of.values()} == {7, 6}
    assert [spec.key for spec in runs.kept] == [f"h.{index}.weight" for index in (0, 1, 2, 3, 7, 8, 9, 10, 11)]
    assert list(runs.counts) == [1, 1, 1, 4, 1, 1, 1, 1, 3]
    assert sum(runs.counts) == len(shapes)


def test_a_pinned_key_keeps_the_member_around_it_whole_and_no_other() -> None:
    shapes = {f"h.{n}.weight": (4, 4) for n in range(12)} | {"h.12.weight": (4, 4), "h.12.head": (9, 4)}
    specs = specs_of({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    assert repeats.runs_of(specs, pinned=["h.12.head"]).run_of["h.0"] == tuple(f"h.{n}" for n in range(12))
    assert repeats.runs_of(specs, pinned=["h.6.weight"]).run_of["h.7"] == tuple(f"h.{n}" for n in range(7, 12))


def test_mismatches_and_alternatives_go_on_in_later_blocks() -> None:
    own = repeats.runs_of(specs_of(state({f"h.{index}.{name}": (4, 4) for index in range(9) for name in "ab"})))
    other = repeats.runs_of(specs_of(state({f"g.{index}.{name}": (4, 4) for index in range(9) for name in "ab"})))
    rival = [
        Match(
            f"g.{index}.a",
            (f"h.{index}.a",),
            alternatives=(
                autoalign.Candidate((f"h.{index}.b",), Copy(), 0.0),
                autoalign.Candidate(("elsewhere",), Copy(), 0.0),
            ),
        )
        for index in range(repeats.KEPT)
    ]
    unlike: list[Mismatch] = [Mismatch(f"g.{index}.b", f"h.{index}.b", (4, 4), (4, 5)) for index in range(repeats.KEPT)]
    matches, mismatched = repeats.extended(rival, unlike, own, other)
    assert [(match.target, match.sources) for match in matches] == [
        (f"g.{index}.a", (f"h.{index}.a",)) for index in range(9)
    ]
    assert [candidate.sources for candidate in matches[-1].alternatives] == [("h.8.b",)]
    assert [(item.key, item.source_key) for item in mismatched] == [
        (f"g.{index}.b", f"h.{index}.b") for index in range(9)
    ]


_CHANNELS = (3, 4, 6, 6, 8)
_SHARED: dict[str, tuple[int, ...]] = {f"features.{n}.weight": (_CHANNELS[n + 1], _CHANNELS[n], 3, 3) for n in range(4)}
_SHARED |= {f"features.{n}.bias": (_CHANNELS[n + 1],) for n in range(4)}


def _side(more: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in (_SHARED | more).items()}


_CLASSIFIERS = (
    {
        "classifier.0.weight": (16, 72),
        "classifier.0.bias": (16,),
        "classifier.3.weight": (5, 16),
        "classifier.3.bias": (5,),
    },
    {"pre.fc.weight": (16, 8, 3, 3), "pre.fc.bias": (16,), "head.fc.weight": (5, 16), "head.fc.bias": (5,)},
)


@pytest.mark.parametrize("pair", [_CLASSIFIERS, _CLASSIFIERS[::-1]])
def test_the_rest_is_matched_as_the_optimisation_would(
    pair: tuple[dict[str, tuple[int, ...]], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = map(_side, pair)
    alignment = autoalign.align(source, target)
    assert not alignment.missing_keys
    assert not alignment.unexpected_keys
    monkeypatch.setattr(aligning, "with_same_names", lambda *_: None)
    expected = autoalign.align(source, target)
    assert [(match.target, match.sources, match.operation) for match in alignment.matches] == [
        (match.target, match.sources, match.operation) for match in expected.matches
    ]


@pytest.mark.parametrize(
    ("own", "other"),
    [
        ({"a.weight": (5, 8)}, {"b.weight": (8, 5)}),  # which must be transposed
        ({"a.weight": (5, 8)}, {"a.weight": (6, 8)}),
        ({"a.weight": (6, 6, 3, 3)}, {"b.weight": (6, 6, 3, 3)}),  # as others have
        ({"a.weight": (5, 8), "b.weight": (5, 8)}, {"a.weight": (5, 8), "c.weight": (5, 8)}),
        ({"a.weight": (5, 8), "b.weight": (5, 8)}, {"d.weight": (5, 8), "c.weight": (5, 8)}),
        ({"a.kernel": (3, 3, 4, 6)}, {"b.kernel": (3, 3, 4, 6)}),  # as many elements as others have, in another layout
        (
            {"a.weight": (5, 8), "b.weight": (9, 8), "a.bias": (5,)},
            {"a.weight": (5, 8), "b.weight": (9, 8), "b.bias": (5,)},
        ),
        ({"patch.weight": (16, 3, 4, 4)}, {"projection.weight": (16, 48)}),  # in which order is not known
        ({"a.weight": (5, 8)}, {"a.weight": (5, 8), "b.weight": (6, 8)}),
    ],
)
def test_what_is_not_certain_is_left_to_the_optimisation(
    own: dict[str, tuple[int, ...]], other: dict[str, tuple[int, ...]]
) -> None:
    specs = [checkpoint_of(_side(side)).specs for side in (own, other)]
    assert with_same_names(*specs) is None


some = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def proven(source: Mapping[str, tuple[int, ...]], target: Mapping[str, tuple[int, ...]]) -> bool:
    return is_renamed(parts_of(specs_of(tensors(source))), parts_of(specs_of(tensors(target))))


@some
@given(perturbed() | renamed(real_cases) | transformer_cases() | conv_cases())
def test_what_is_proven_is_the_truth(case: Case) -> None:
    if proven(case.source, case.target):
        assert dict(zip(case.target, case.source, strict=True)) == case.truth


BLOCK = {
    "norm1.weight": (8,),
    "attn.q.weight": (8, 8),
    "attn.k.weight": (8, 8),
    "norm2.weight": (8,),
    "up.weight": (32, 8),
}


def blocks(prefix: str, names: Mapping[str, str], numbers: range) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}{number}.{names.get(key, key)}": shape for number in numbers for key, shape in BLOCK.items()} | {
        "head.weight": (5, 8)
    }


HUGGING_FACE = {"attn.q.weight": "attention.query.weight", "attn.k.weight": "attention.key.weight"}
EXCHANGED = {"attn.q.weight": "attn.k.weight", "attn.k.weight": "attn.q.weight"}
UNTOLD = {"attn.q.weight": "attn.first.weight", "attn.k.weight": "attn.second.weight"}


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (blocks("blocks.", {}, range(4)), blocks("layers.", HUGGING_FACE, range(4)), True),
        (blocks("blocks.", {}, range(4)), blocks("layers.", EXCHANGED, range(4)), False),
        (blocks("blocks.", {}, range(4)), blocks("layers.", UNTOLD, range(4)), False),
        (blocks("blocks.", {}, range(4)), blocks("refine.", {}, range(1, 5)), False),  # one of a short list may be last
        (blocks("blocks.", {}, range(8)), blocks("group.", {}, range(1, 9)), True),
        (blocks("blocks.", {}, range(8)), blocks("group.", {}, range(9, 1, -1)), False),
    ],
)
def test_names_must_tell_siblings_of_one_shape_apart(
    source: dict[str, tuple[int, ...]], target: dict[str, tuple[int, ...]], expected: bool
) -> None:
    assert proven(source, target) is expected
    assert proven(target, source) is expected


def test_wrappers_and_a_consistent_renaming_are_seen_through() -> None:
    source, target = blocks("blocks.", {}, range(12)), blocks("stack.", HUGGING_FACE, range(12))
    wrapped = {f"module.model.{key}": shape for key, shape in source.items()}
    assert proven(wrapped, target)
    alignment = autoalign.align(tensors(wrapped), tensors(target))
    assert alignment.mapping == dict(zip(wrapped, target, strict=True))
    assert min(match.confidence for match in alignment.matches) > 0.9


def test_layers_that_only_look_alike_are_no_only_ones() -> None:
    same = {"a.weight": (7, 5), "b.weight": (5, 9)}
    source, target = ({**same, f"{name}.weight": (4, *shape)} for name, shape in (("c", (2, 3, 1)), ("d", (3, 2, 1))))
    assert with_same_names(specs_of(state(source)), specs_of(state(target))) is None


def test_two_modules_are_not_renamed_to_one() -> None:
    own, other = (
        [Part(n, (*name.split("."), "weight"), (n + 1, n + 2), "float") for n, name in enumerate(names)]
        for names in (["a.x", "b.x", *"cdefgh"], ["a.x", "a.y", *"cdefgh"])
    )
    assert not is_renamed(own, other)


def test_the_root_is_above_keys_of_any_depth() -> None:
    above = list(repeats._above(".".join("m" * 100)))
    assert (len(above), above[0], above[-1]) == (65, ".".join("m" * 99), "")


def test_a_block_is_told_from_one_whose_number_begins_alike() -> None:
    specs = specs_of(state({f"h.{n}.weight": (2, 2) for n in range(6)}))
    runs = repeats.runs_of(specs)
    last = "h.3.weight"
    assert [key for _, key, _ in repeats._in_last_blocks({last: 0, "h.31.weight": 0}, runs)] == [last]
    (match,) = repeats.less_sure(runs, [Match(last, (last,), Copy())])
    assert match.confidence < 1


def test_what_is_found_in_the_last_block_alone_is_not_continued() -> None:
    runs = repeats.runs_of(specs_of(state({f"h.{n}.weight": (2, 2) for n in range(6)})))
    alone = Mismatch("h.3.weight", "h.3.weight", (2, 2), (3, 3))
    assert repeats.extended([], [alone], runs, runs) == ([], [alone])
    match = Match("h.3.weight", ("h.3.weight",), Copy())
    assert repeats.extended([match], [], runs, runs) == ([match], [])


def test_too_many_blocks_to_be_compared_are_believed_no_more_than_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aligning, "is_settled", lambda *_: False)
    monkeypatch.setattr(aligning, "MAX_PAIRS_OF_ALL", -1)
    sides = [state({f"{name}.{n}.{part}.weight": (2, 3) for n in range(6) for part in "ab"}) for name in ("h", "net")]
    alignment = autoalign.align(*sides)
    assert {match.confidence for match in (*alignment.matches, *alignment.ambiguous)} <= {INFERRED}
