"""Induced rules on the benchmark's cases: how many for how many keys, whether they are exact, and how long it takes."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import autoalign
from benchmarks.cases import gold

_REPEATED = 4  # times a kind of tensor occurs in a network with repeated blocks


@dataclass(frozen=True, slots=True)
class Induction:
    """What came of one case."""

    case: str
    keys: int  # source keys that the rules cover: those that are used or dropped
    rules: int
    exact: bool  # whether the rules give exactly the alignment
    repeated: bool  # whether the network has repeated blocks
    align_seconds: float
    seconds: float


def measure(name: str) -> Induction:
    """Align a case, find its rules, and hold them against the alignment."""
    case = gold.read(name)
    start = time.perf_counter()
    alignment = autoalign.align(case.source, case.target)
    middle = time.perf_counter()
    rules = alignment.rules()
    end = time.perf_counter()
    plan = {
        match.target: (match.sources, match.operation)
        for match in rules.plan({k: tuple(v.shape) for k, v in case.source.items()})
    }
    wanted = {match.target: (match.sources, match.operation) for match in alignment.matches}
    templates: dict[str, int] = {}
    for key in case.source:
        template = re.sub(r"\d+", "#", key)
        templates[template] = templates.get(template, 0) + 1
    repeated = sum(count for count in templates.values() if count >= _REPEATED)
    return Induction(
        name,
        len(case.source),
        len(rules),
        plan == wanted,
        2 * repeated >= len(case.source),
        middle - start,
        end - middle,
    )
