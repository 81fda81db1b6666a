"""Matching long lists by their first blocks finds what matching all blocks finds."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

import autoalign
from autoalign.alignment import Alignment
from autoalign.matching import repeats
from autoalign.plan.matches import Match, Mismatch
from autoalign.plan.operations import Copy
from autoalign.plan.specs import specs_of
from tests.strategies import Case, perturbed, tensors, transformer_cases

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
