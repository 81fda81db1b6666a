"""Metamorphic properties: how the alignments of inputs that are made of each other must be related."""

from __future__ import annotations

from random import Random

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import autoalign
from autoalign import Alignment, Rules
from autoalign.plan.specs import TensorSpec
from benchmarks.cases.architectures import Architecture, few_architectures
from benchmarks.cases.changes import CHANGES, changed
from benchmarks.cases.perturbations import on_meta
from tests.strategies import (
    LEAVES,
    Case,
    Shapes,
    identical,
    in_alphabetical_order,
    renamed,
    reordered,
    shortened,
    tensors,
    wrapped,
    written_cases,
)

few = settings(
    max_examples=settings().max_examples // 12,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    phases=[Phase.explicit, Phase.generate],  # shrinking a whole network takes minutes and tells little
)
Pairs = dict[str, tuple[tuple[str, ...], object]]


def align(source: Shapes, target: Shapes) -> Alignment:
    return autoalign.align(tensors(source), tensors(target))


def pairs(alignment: Alignment) -> Pairs:
    """What fills each target tensor that is filled, and how."""
    return {match.target: (match.sources, match.operation) for match in alignment.matches}


def sure(alignment: Alignment) -> dict[str, tuple[str, ...]]:
    """What fills each target tensor at 0.9 and more: where names tell nothing, orders may differ on the way."""
    return {match.target: match.sources for match in alignment.matches if match.confidence >= 0.9}


def rewritten(cases: st.SearchStrategy[Case]) -> st.SearchStrategy[Case]:
    return wrapped(cases) | reordered(cases) | renamed(cases, LEAVES) | in_alphabetical_order(cases)


def changes(cases: st.SearchStrategy[Case]) -> st.SearchStrategy[Case]:
    return rewritten(cases) | shortened(cases)


@st.composite
def chains(draw: st.DrawFn) -> tuple[Shapes, Shapes, Shapes]:
    """Three writings of one network, of which each is another change of the one after it."""
    case = draw(written_cases)
    return draw(changes(st.just(identical(case.source)))).source, case.source, case.target


@few
@given(changes(written_cases))
def test_an_alignment_inverted_does_not_contradict_that_of_the_sides_exchanged(case: Case) -> None:
    inverse, exchanged = (
        pairs(one) for one in (align(case.source, case.target).inverse(), align(case.target, case.source))
    )
    assert {key: way for key, way in inverse.items() if key in exchanged} == {
        key: way for key, way in exchanged.items() if key in inverse
    }


@few
@given(chains())
def test_one_alignment_after_another_does_not_contradict_that_of_the_first_with_the_last(
    chain: tuple[Shapes, Shapes, Shapes],
) -> None:
    first, second, third = chain
    before, after, whole = (sure(align(*sides)) for sides in ((first, second), (second, third), (first, third)))
    joined = {key: before[own] for key, (own,) in after.items() if own in before}
    assert all(whole[key] == sources for key, sources in joined.items() if key in whole)


@few
@given(changes(written_cases), st.sampled_from(["unused", "net.unused.weight", "zz.bias"]))
def test_a_tensor_that_nothing_has_a_place_for_changes_no_match(case: Case, name: str) -> None:
    more: Shapes = {**case.source, name: (977, 3)}
    assert pairs(align(more, case.target)) == pairs(align(case.source, case.target))
    more = {**case.target, name: (977, 3)}
    assert pairs(align(case.source, more)) == pairs(align(case.source, case.target))


@few
@given(changes(written_cases), st.sampled_from(["module", "net", "a.b", "0"]))
def test_a_prefix_changes_no_match(case: Case, prefix: str) -> None:
    more = {f"{prefix}.{key}": shape for key, shape in case.source.items()}
    expected = {
        target: (tuple(f"{prefix}.{key}" for key in sources), operation)
        for target, (sources, operation) in pairs(align(case.source, case.target)).items()
    }
    assert pairs(align(more, case.target)) == expected


@few
@given(rewritten(written_cases))
def test_a_copy_more_changes_no_match(case: Case) -> None:
    both = {f"{copy}.{key}": shape for copy in ("model", "ema") for key, shape in case.source.items()}
    once = pairs(align(case.source, case.target))
    assert pairs(align(both, case.target)) == {
        target: (tuple(f"model.{key}" for key in sources), operation) for target, (sources, operation) in once.items()
    }


@few
@given(changes(written_cases), st.randoms(use_true_random=False))
def test_siblings_that_have_nothing_in_common_in_another_order_change_no_match(case: Case, random: Random) -> None:
    tops = list(dict.fromkeys(key.partition(".")[0] for key in case.source))
    shapes = {top: {case.source[key] for key in case.source if key.partition(".")[0] == top} for top in tops}
    alone = [top for top in tops if all(shapes[top].isdisjoint(shapes[other]) for other in tops if other != top)]
    place = dict(zip(alone, random.sample(alone, len(alone)), strict=True))
    order = {place.get(top, top): number for number, top in enumerate(tops)}
    moved = dict(sorted(case.source.items(), key=lambda item: order[item[0].partition(".")[0]]))
    found, before = pairs(align(moved, case.target)), pairs(align(case.source, case.target))
    assert {target: before.get(target) for target in found} == found  # less may be sure: shapes show that order changed


@few
@given(changes(written_cases))
def test_rules_give_what_they_were_made_from(case: Case) -> None:
    alignment = align(case.source, case.target)
    rules = Rules.from_json(alignment.rules().to_json())
    made = {match.target: (match.sources, match.operation) for match in rules.plan(dict(case.source))}
    assert {target: made[target] for target in pairs(alignment)} == pairs(alignment)


@few
@given(written_cases, st.data())
def test_no_match_is_surer_with_less_evidence(case: Case, data: st.DataObject) -> None:
    less = data.draw(renamed(st.just(case), LEAVES))
    known = {match.target: match.confidence for match in align(case.source, case.target).matches}
    names = dict(zip(case.source, less.source, strict=True))
    for match in align(less.source, case.target).matches:
        if names[case.truth[match.target]] == match.sources[0] and match.target in known:
            assert match.confidence <= known[match.target] + 0.01, match


@settings(few, max_examples=settings().max_examples // 4)
@given(st.sampled_from(few_architectures()), st.sampled_from(list(CHANGES)), st.integers(0, 2**16))
def test_a_changed_checkpoint_of_an_architecture_fills_it(architecture: Architecture, change: str, seed: int) -> None:
    entries = changed(architecture.specs, change, Random(seed))
    truth = {entry.origin: entry.key for entry in entries if entry.origin is not None}
    source = on_meta(tuple(TensorSpec(entry.key, entry.shape, entry.dtype) for entry in entries))
    alignment = autoalign.align(source, on_meta(architecture.specs))
    wrong = [match for match in alignment.matches if match.sources != (truth.get(match.target),)]
    assert change == "anonymous" or not [match for match in wrong if match.confidence >= 0.9]
    if change in ("unchanged", "wrapped", "sorted", "without last stage"):
        assert not wrong
        assert {match.target for match in alignment.matches} == truth.keys()
