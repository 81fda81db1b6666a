"""Time and memory of one mixture of experts at four sizes, each in a process of its own, every result checked.

So are the gold cases of large language models.

    python -m benchmarks.speed.scaling 91000 autoalign 1    # one measurement, as JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

import autoalign
from benchmarks.cases import gold
from benchmarks.cases.moe import INFERENCE, PUBLISHED, SIZES, state_dict, truth
from benchmarks.peers import PEERS, Peer
from benchmarks.speed.memory import peak_bytes

Result = TypeVar("Result")
LIMIT = 120.0  # seconds that a process may take, after which the peer has no figure at this size


@dataclass(frozen=True, slots=True)
class Point:
    """One matcher at one size."""

    peer: str
    size: int  # the nominal number, a key of SIZES; 0 for a gold case
    tensors: int  # of the target that have a source
    right: int
    wrong: int
    seconds: tuple[float, ...]  # of each repeat, in one process
    cpu_seconds: tuple[float, ...]  # of all threads; a busy machine hardly changes them
    peak_bytes: int  # of resident memory above that before the first call
    error: str = ""
    case: str = "mixture of experts"

    @property
    def median_seconds(self) -> float:
        return median(self.seconds) if self.seconds else float("nan")

    @property
    def is_perfect(self) -> bool:
        return self.right == self.tensors and not self.wrong


def measure(peers: Sequence[Peer], sizes: Sequence[int], repeats: int) -> Iterator[Point]:
    """Measure every matcher at every size, until one size is too much for it."""
    for peer in peers:
        for size in sizes:
            point = _in_process(peer, size, repeats)
            yield point
            if point.error:
                break


def measure_gold(repeats: int) -> Iterator[Point]:
    """Measure autoalign on the gold cases of large models."""
    for entry in gold.index():
        if entry.group == "scale":
            yield _in_process(PEERS["autoalign"], 0, repeats, entry.name)


def _in_process(peer: Peer, size: int, repeats: int, case: str = "") -> Point:
    command = [sys.executable, "-m", "benchmarks.speed.scaling", case or str(size), peer.name, str(repeats)]
    if peer.most_tensors is not None and size > peer.most_tensors:
        return Point(peer.name, size, 0, 0, 0, (), (), 0, f"more than {peer.most_tensors:,} tensors: not tried")
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            timeout=LIMIT * (1 + repeats),
            cwd=Path(__file__).resolve().parents[2],
        )
    except subprocess.TimeoutExpired:
        return Point(peer.name, size, 0, 0, 0, (), (), 0, "too slow")
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        return Point(peer.name, size, 0, 0, 0, (), (), 0, lines[-1][:120])
    figures = json.loads(done.stdout)
    return Point(**figures | {name: tuple(figures[name]) for name in ("seconds", "cpu_seconds")})


def measured(peer: Peer, size: int, repeats: int) -> Point:
    """Measure in this process: the first call counts too, since a person makes one; imports are done before it."""
    moe = SIZES[size]
    tiny = {"fc.weight": next(iter(state_dict(SIZES[min(SIZES)], PUBLISHED).values()))}
    _quietly(lambda: peer.match(tiny, tiny))
    source, target = state_dict(moe, PUBLISHED), state_dict(moe, INFERENCE)
    true_keys = truth(moe, PUBLISHED, INFERENCE)
    before = peak_bytes()
    mapping, seconds, cpu_seconds = _timed(lambda: peer.match(source, target), repeats)
    right = sum(true_keys[key] == own for key, own in mapping.items())
    peak = max(peak_bytes() - before, 0)
    return Point(peer.name, size, len(target), right, len(mapping) - right, seconds, cpu_seconds, peak)


def measured_gold(name: str, repeats: int) -> Point:
    """Measure a gold case in this process; a match is right if it reads the gold source keys."""
    one = {"fc.weight": torch.empty(2, 3)}
    autoalign.align(one, one)
    case = gold.read(name)
    before = peak_bytes()
    alignment, seconds, cpu_seconds = _timed(lambda: autoalign.align(case.source, case.target), repeats)
    peak = max(peak_bytes() - before, 0)
    judged = [case.is_right(match.target, match) for match in alignment.matches if match.target in case.expressions]
    right, wrong = sum(judged), len(judged) - sum(judged)
    return Point("autoalign", 0, case.gold_count, right, wrong, seconds, cpu_seconds, peak, case=case.name)


def growth(points: Sequence[Point], small: int, large: int) -> float | None:
    """Divide autoalign's time at one size by that at another."""
    times = {
        point.size: point.median_seconds
        for point in points
        if point.peer == "autoalign" and point.size and point.seconds
    }
    return times[large] / times[small] if {small, large} <= set(times) else None


def _timed(call: Callable[[], Result], repeats: int) -> tuple[Result, tuple[float, ...], tuple[float, ...]]:
    """Call, and give the last result with the seconds of the clock and of the processors for each time."""
    seconds, cpu_seconds, results = [], [], []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        results = [call()]
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return results[0], tuple(seconds), tuple(cpu_seconds)


def _quietly(call: Callable[[], object]) -> None:
    try:
        call()
    except Exception:  # what it makes of one tensor does not matter
        return


if __name__ == "__main__":
    what, matcher, times = sys.argv[1:]
    found = measured(PEERS[matcher], int(what), int(times)) if what.isdecimal() else measured_gold(what, int(times))
    print(json.dumps(asdict(found)))
