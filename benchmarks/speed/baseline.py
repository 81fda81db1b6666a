"""Ratios that do not depend on the machine's speed, and their comparison with stored ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accuracy.contest import Tally
from benchmarks.speed.align import Timing
from benchmarks.speed.files import SMALLEST_FILE, Load, ratio
from benchmarks.speed.scaling import Point, growth

FILE = Path(__file__).with_name("baseline.json")
TOLERANCE = 1.6  # a time's ratio may grow by this factor, as a shared machine's ratios do by chance
SHARE_TOLERANCE = 0.005  # a share of right tensors may fall by so much


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of the baseline: a ratio of times, which should be small, or a share, which should be large."""

    value: float
    is_share: bool = False

    def is_worse_than(self, stored: float) -> bool:
        """Compare, within the tolerances."""
        return self.value < stored - SHARE_TOLERANCE if self.is_share else self.value > stored * TOLERANCE


def figures(
    timings: Sequence[Timing] = (),
    tallies: Sequence[Tally] = (),
    points: Sequence[Point] = (),
    loads: Sequence[Load] = (),
) -> Iterator[tuple[str, Figure]]:
    """Reduce what was measured to figures with names; they name the number of cases too, as it changes shares."""
    for timing in timings:
        yield f"align over load_state_dict, {timing.name}", Figure(timing.ratio)
    for tally in tallies:
        if tally.peer == "autoalign" and tally.gold:
            yield f"right, {tally.group}, {tally.cases} cases", Figure(tally.right / tally.gold, is_share=True)
    if (grown := growth(points, 9_100, 91_000)) is not None:
        yield "growth from 9,100 to 91,000 tensors", Figure(grown)
    own = {load.format: load for load in loads if load.way == "own"}
    for load in loads:
        if load.way in ("renamed", "apart") and load.file_bytes >= SMALLEST_FILE:
            name = f"load over the format's own, {load.format}, {load.way}"
            for from_disk, place in ((True, "disk"), (False, "memory")):
                times = ratio(load, own[load.format], from_disk=from_disk)
                if times is not None:
                    yield f"{name}, about {round(load.file_bytes / 1e8) * 100:,} MB from {place}", Figure(times)


def worse(measured: Mapping[str, Figure], path: Path = FILE) -> list[str]:
    """List what is worse than the stored figures, in words; figures that are not stored are passed over."""
    stored: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return [
        f"{name}: {figure.value:.4g}, stored {stored[name]:.4g}"
        for name, figure in measured.items()
        if name in stored and figure.is_worse_than(stored[name])
    ]


def store(measured: Mapping[str, Figure], path: Path = FILE) -> None:
    """Write the figures, beside those stored under other names."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    stored |= {name: float(f"{figure.value:.4g}") for name, figure in measured.items()}
    path.write_text(json.dumps(dict(sorted(stored.items())), indent=1) + "\n", encoding="utf-8")
