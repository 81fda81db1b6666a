"""Induced rules on the benchmark's cases: how many for how many keys, whether they are exact, and how long it takes."""

from __future__ import annotations

import gzip
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import autoalign
from benchmarks import gold

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


def sides(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read a case's source and target, on the meta device."""
    with gzip.open(path, "rt") as file:
        case: Mapping[str, Any] = json.load(file)
    both = []
    for side in ("source", "target"):
        tensors = {
            key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for key, shape, dtype in case[side]
        }
        both.append(tensors)
    source, target = both
    for first, *aliases in case.get("tied_source", []):
        source.update(dict.fromkeys(aliases, source[first]))
    first_of: dict[str, str] = {}
    for key, expression in case["gold"].items():  # what one tensor fills is one tensor of the model
        if expression and "copy" in expression and key in target:
            target[key] = target[first_of.setdefault(expression["copy"], key)]
    return source, target


def measure(path: Path) -> Induction:
    """Align a case, find its rules, and hold them against the alignment."""
    source, target = sides(path)
    start = time.perf_counter()
    alignment = autoalign.align(source, target)
    middle = time.perf_counter()
    rules = alignment.rules()
    end = time.perf_counter()
    plan = {
        match.target: (match.sources, match.operation)
        for match in rules.plan({k: tuple(v.shape) for k, v in source.items()})
    }
    wanted = {match.target: (match.sources, match.operation) for match in alignment.matches}
    templates: dict[str, int] = {}
    for key in source:
        template = re.sub(r"\d+", "#", key)
        templates[template] = templates.get(template, 0) + 1
    repeated = sum(count for count in templates.values() if count >= _REPEATED)
    return Induction(
        path.name.removesuffix(".json.gz"),
        len(source),
        len(rules),
        plan == wanted,
        2 * repeated >= len(source),
        middle - start,
        end - middle,
    )


def cases() -> list[Path]:
    """List the benchmark's cases, by name."""
    return gold.paths()
