"""Every match of one alignment, judged: its confidence, its cues, and whether it is right."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import autoalign
from autoalign.alignment import Alignment
from autoalign.plan.matches import Match
from autoalign.plan.operations import Copy
from benchmarks.cases import gold, perturbations
from benchmarks.cases.architectures import Choice


@dataclass(frozen=True, slots=True)
class Judged:
    """One match, loaded or proposed."""

    target: str
    sources: tuple[str, ...]
    operation: str
    confidence: float
    is_loaded: bool  # else it is among the ambiguous
    is_right: bool
    truth: str | None  # what should fill the target key, in words
    cues: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class JudgedCase:
    """All matches of one case."""

    name: str
    origin: str  # "generated" or "gold"
    subject: str  # the architecture, or the gold case
    recipe: str  # the perturbation, or the gold case's group
    level: int  # of difficulty; 0 for gold cases
    tensors: int  # of the target that have a counterpart
    seconds: float  # of the call of align
    matches: tuple[Judged, ...]
    error: str = ""  # what align raised, if it did

    @property
    def right(self) -> int:
        return sum(match.is_right for match in self.matches if match.is_loaded)

    @property
    def wrong(self) -> int:
        return sum(not match.is_right for match in self.matches if match.is_loaded)


def judged_perturbation(index: int, seed: int, choice: Choice = perturbations.ALL) -> JudgedCase:
    """Make a perturbation, align it and judge the result; only copies of the true source are right."""
    case = perturbations.case(index, seed, choice)

    def is_right(match: Match) -> bool:
        truth = case.truth[match.target]
        return match.sources == (truth,) and isinstance(match.operation, Copy)

    matches, seconds, error = _judged(
        lambda: autoalign.align(perturbations.on_meta(case.source), perturbations.on_meta(case.target)),
        is_right,
        case.truth.get,
    )
    count = sum(source is not None for source in case.truth.values())
    side = "target" if case.is_target_perturbed else "source"
    return JudgedCase(
        f"perturbation {case.name}",
        "generated",
        case.architecture,
        f"{side}: {case.recipe}",
        case.level,
        count,
        seconds,
        matches,
        error,
    )


def judged_gold(name: str) -> JudgedCase:
    """Align a gold case and judge the result."""
    case = gold.read(name)
    matches, seconds, error = _judged(
        lambda: autoalign.align(case.source, case.target),
        lambda match: case.is_right(match.target, match),
        lambda key: None if case.expressions[key] is None else str(case.expressions[key])[:200],
        case.expressions,
    )
    return JudgedCase(case.name, "gold", case.name, case.group, 0, case.gold_count, seconds, matches, error)


def _judged(
    align: Callable[[], Alignment],
    is_right: Callable[[Match], bool],
    truth: Callable[[str], str | None],
    counted: Mapping[str, object] | None = None,
) -> tuple[tuple[Judged, ...], float, str]:
    start = time.perf_counter()
    try:
        alignment = align()
    except Exception as error:
        return (), time.perf_counter() - start, f"{type(error).__name__}: {error}"[:300]
    seconds = time.perf_counter() - start

    def judge(matches: Sequence[Match], *, is_loaded: bool) -> list[Judged]:
        return [
            Judged(
                match.target,
                match.sources,
                str(match.operation),
                match.confidence,
                is_loaded,
                is_right(match),
                truth(match.target),
                match.evidence,
            )
            for match in matches
            if counted is None or match.target in counted
        ]

    return (*judge(alignment.matches, is_loaded=True), *judge(alignment.ambiguous, is_loaded=False)), seconds, ""
