"""Time and memory of thousands of alike layers whose names mean nothing, each case in a process of its own.

Nothing but order tells such layers apart, so that they should be ambiguous, and soon; numbered experts are told.

    python -m benchmarks.speed.nameless "equal layers" 3000    # one measurement, as JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor

import autoalign
from benchmarks.speed.memory import peak_bytes

SECONDS_BUDGET = 5.0  # of all processors together
MEMORY_BUDGET = 10**9  # bytes above that before the first call
LIMIT = 120.0  # seconds that a process may take
EXPERTS = 64  # in each stack

Sides = tuple[dict[str, Tensor], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Point:
    """One case at one size."""

    case: str
    size: int
    matched: int  # tensors of the target
    ambiguous: int
    cpu_seconds: float
    peak_bytes: int
    error: str = ""

    @property
    def is_within_budget(self) -> bool:
        return self.cpu_seconds <= SECONDS_BUDGET and self.peak_bytes <= MEMORY_BUDGET


def _equal(random: Random, size: int) -> Sides:
    def side() -> dict[str, Tensor]:
        return {f"{_word(random)}.weight": _empty(16, 16) for _ in range(size)}

    return side(), side()


def _nested(random: Random, size: int) -> Sides:
    def side() -> dict[str, Tensor]:
        return {f"{'.'.join(_word(random, 3) for _ in range(4))}.weight": _empty(16, 16) for _ in range(size)}

    return side(), side()


def _thirds(random: Random, size: int) -> Sides:
    apart = {f"{_word(random)}.weight": _empty(8, 8) for _ in range(3 * size)}
    return apart, {f"{_word(random)}.weight": _empty(24, 8) for _ in range(size)}


def _experts(random: Random, size: int) -> Sides:
    """Make experts that are numbered, each with a name of its own, and the stacks that they fill."""
    apart = {
        f"l.{layer}.experts.{expert}.{_word(random)}.weight": _empty(8, 8)
        for layer in range(size)
        for expert in range(EXPERTS)
    }
    return apart, {f"layers.{layer}.{_word(random)}": _empty(EXPERTS, 8, 8) for layer in range(size)}


CASES: Mapping[str, tuple[Callable[[Random, int], Sides], int]] = {  # and their full size
    "equal layers": (_equal, 3_000),
    "equal nested layers": (_nested, 3_000),
    "thirds of fused layers": (_thirds, 300),
    "experts of stacks": (_experts, 96),
}


def measure(share: float = 1.0) -> Iterator[Point]:
    """Measure every case at a share of its size."""
    for case, (_, size) in CASES.items():
        yield _in_process(case, max(round(size * share), 1))


def measured(case: str, size: int) -> Point:
    """Measure in this process; imports are done before it."""
    one = {"fc.weight": torch.empty(2, 3)}
    autoalign.align(one, {"head.weight": torch.empty(2, 3)})
    source, target = CASES[case][0](Random(size), size)
    before, start = peak_bytes(), time.process_time()
    alignment = autoalign.align(source, target)
    seconds = time.process_time() - start
    peak = max(peak_bytes() - before, 0)
    return Point(case, size, len(alignment.matches), len(alignment.ambiguous), seconds, peak)


def _in_process(case: str, size: int) -> Point:
    command = [sys.executable, "-m", "benchmarks.speed.nameless", case, str(size)]
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT, cwd=root)
    except subprocess.TimeoutExpired:
        return Point(case, size, 0, 0, 0.0, 0, "too slow")
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        return Point(case, size, 0, 0, 0.0, 0, lines[-1][:120])
    return Point(**json.loads(done.stdout))


def _word(random: Random, letters: int = 8) -> str:
    return "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=letters))


def _empty(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


if __name__ == "__main__":
    print(json.dumps(asdict(measured(sys.argv[1], int(sys.argv[2])))))
