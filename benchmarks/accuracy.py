"""Accuracy on the benchmark's cases, by its own scoring script, where it lies beside this project."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCORE = Path(__file__).resolve().parents[2] / "shared" / "alignbench" / "score.py"


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Counts over the cases of one group."""

    group: str
    cases: int
    perfect: int  # cases with nothing missing and nothing wrong
    gold: int  # tensors that have a source
    right: int
    wrong: int
    sure_wrong: int  # wrong at a confidence of 0.9 or more
    seconds: float  # of all the calls of align


def is_available() -> bool:
    """Tell whether the benchmark lies beside this project."""
    return SCORE.is_file()


def measure() -> list[Accuracy]:
    """Score all cases, in a process of its own, and sum them up by group and over all."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "rows.json"
        subprocess.run(
            [sys.executable, str(SCORE), "--json", str(report)],
            cwd=Path(__file__).resolve().parents[1],
            stdout=subprocess.DEVNULL,
            check=True,
        )
        rows = list(json.loads(report.read_text(encoding="utf-8")).values())
    groups = dict.fromkeys(row["group"] for row in rows)
    return [*(_summed(group, [row for row in rows if row["group"] == group]) for group in groups), _summed("all", rows)]


def _summed(group: str, rows: list[Mapping[str, Any]]) -> Accuracy:
    return Accuracy(
        group,
        cases=len(rows),
        perfect=sum(row["perfect"] for row in rows),
        gold=sum(row["gold"] for row in rows),
        right=sum(row["right"] for row in rows),
        wrong=sum(len(row["wrong"]) for row in rows),
        sure_wrong=sum(len(row["sure_wrong"]) for row in rows),
        seconds=sum(row["seconds"] for row in rows),
    )
