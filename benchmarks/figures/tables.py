"""The figures as markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from benchmarks.accuracy.contest import Attempt, Tally, time_ratios
from benchmarks.speed import imports as import_time
from benchmarks.speed import worst_cases
from benchmarks.speed.align import Timing
from benchmarks.speed.files import MEMORY_BUDGET, SMALLEST_FILE, TIME_BUDGET, Load, ratio
from benchmarks.speed.scaling import Point, growth
from benchmarks.speed.sharded import ShardedLoad


def spread(values: Sequence[float], unit: float, digits: int = 1) -> str:
    """Write the median and, in brackets, the smallest and the largest of some values.

    >>> spread([0.001, 0.004, 0.002], 1e3)
    '2.0 (1.0 to 4.0)'
    """
    scaled = [value * unit for value in values]
    return f"{median(scaled):.{digits}f} ({min(scaled):.{digits}f} to {max(scaled):.{digits}f})"


def accuracy_table(tallies: Sequence[Tally]) -> Iterator[str]:
    """Write a line for each group and matcher; what raised loaded nothing."""
    yield "| group | matcher | cases | perfect | tensors right | wrong | raised | median, ms |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for tally in tallies:
        if not tally.cases:
            continue
        right = f"{tally.right / tally.gold:.2%}" if tally.gold else ""
        yield (
            f"| {tally.group} | {tally.peer} | {tally.cases} | {tally.perfect / tally.cases:.1%} | {right} "
            f"| {tally.wrong:,} | {tally.raised} | {tally.median_seconds * 1e3:.1f} |"
        )
    reasons: dict[str, dict[str, int]] = {}
    for tally in tallies:
        for reason, count in tally.reasons.items():
            own = reasons.setdefault(tally.peer, {})
            own[reason] = own.get(reason, 0) + count
    for peer, found in reasons.items():
        yield (
            f"\n{peer} loaded nothing or was not tried: " + ", ".join(f"{why} ({n})" for why, n in found.items()) + "."
        )


def matrix(tallies: Sequence[Tally]) -> Iterator[str]:
    """Write a line for each group and a column for each matcher: perfect cases, and tensors right and wrong."""
    peers = list(dict.fromkeys(tally.peer for tally in tallies))
    cells = {(tally.group, tally.peer): _cell(tally) for tally in tallies}
    yield f"| perfect; tensors right, wrong | cases | {' | '.join(peers)} |"
    yield "| --- | ---: |" + " ---: |" * len(peers)
    for group in dict.fromkeys(tally.group for tally in tallies):
        count = max(tally.cases for tally in tallies if tally.group == group)
        yield f"| {group} | {count} | " + " | ".join(cells.get((group, peer), "") for peer in peers) + " |"


def time_lines(attempts: Sequence[Attempt]) -> Iterator[str]:
    """Write a line for each peer that is slower than ours where both solve a case."""
    for peer in dict.fromkeys(one.peer for one in attempts):
        ratios = time_ratios(attempts, peer)
        if peer != "autoalign" and ratios and median(ratios) > 1:
            cases = f"{len(ratios)} cases" if len(ratios) > 1 else "case"
            yield (
                f"\n{peer} takes {ratios[0]:.1f} to {ratios[-1]:.0f} times as long as autoalign, "
                f"{median(ratios):.0f} in the median, on the {cases} that both solve."
            )


def _cell(tally: Tally) -> str:
    if not tally.cases:
        return ""
    right = f"{tally.right / tally.gold:.1%}, " if tally.gold else ""
    note = f" (of {tally.cases})" if tally.skipped else ""
    return f"{tally.perfect / tally.cases:.0%}; {right}{tally.wrong:,}{note}"


def timing_table(timings: Sequence[Timing]) -> Iterator[str]:
    """Write a line for each subject."""
    yield "| align | tensors | align, ms | load_state_dict, ms | ratio | budget | | weightbridge, ms | over align |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: |"
    for timing in timings:
        budget = f"{timing.budget:g}x" if timing.budget is not None else ""
        verdict = "" if timing.budget is None else "ok" if timing.is_within_budget else "OVER"
        peer = spread(timing.weightbridge, 1e3, digits=0) if timing.weightbridge else ""
        over = f"{timing.peer_ratio:.0f}x" if timing.peer_ratio else "not right" if peer else ""
        yield (
            f"| {timing.name} | {timing.tensors} | {spread(timing.align, 1e3)} | {spread(timing.load_state_dict, 1e3)} "
            f"| {timing.ratio:.1f}x | {budget} | {verdict} | {peer} | {over} |"
        )


def import_table(imports: Sequence[float], first_uses: Sequence[float]) -> Iterator[str]:
    """Write the times of the import and of the first use, a line each."""
    yield "| on top of `import torch` | seconds | budget | |"
    yield "| --- | ---: | ---: | --- |"
    verdict = "ok" if median(imports) <= import_time.BUDGET else "OVER"
    yield f"| `import autoalign` | {spread(imports, 1, digits=3)} | {import_time.BUDGET} | {verdict} |"
    yield f"| the import and a first `align` | {spread(first_uses, 1, digits=3)} | | |"


def scaling_table(points: Sequence[Point]) -> Iterator[str]:
    """Write a line for each matcher and size, and the growth."""
    yield "| case | matcher | tensors | right | wrong | seconds | CPU seconds | peak memory, MB |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for point in points:
        name = f"{point.case}, about {point.size:,}" if point.size else point.case
        if point.error:
            yield f"| {name} | {point.peer} | | | | {point.error} | | |"
        else:
            yield (
                f"| {name} | {point.peer} | {point.tensors:,} | {point.right:,} | {point.wrong:,} "
                f"| {spread(point.seconds, 1, digits=2)} | {spread(point.cpu_seconds, 1, digits=2)} "
                f"| {point.peak_bytes / 1e6:.0f} |"
            )
    if (grown := growth(points, 9_100, 91_000)) is not None:
        yield f"\nFrom about 9,100 to 91,991 tensors the time of autoalign grows {grown:.1f}-fold."


def worst_cases_table(points: Sequence[worst_cases.Point]) -> Iterator[str]:
    """Write a line for each of the inputs that are worst for ``align``."""
    budgets = f"{worst_cases.SECONDS_BUDGET:g} CPU seconds, {worst_cases.MEMORY_BUDGET / 1e6:.0f} MB"
    yield f"| worst cases | size | matched | ambiguous | CPU seconds | peak memory, MB | {budgets} |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | --- |"
    for point in points:
        figures = f"{point.cpu_seconds:.1f} | {point.peak_bytes / 1e6:.0f}"
        verdict = point.error or ("ok" if point.is_within_budget else "OVER")
        yield f"| {point.case} | {point.size:,} | {point.matched:,} | {point.ambiguous:,} | {figures} | {verdict} |"


_LOADS = {
    "own": "the format's own, same names",
    "renamed": "`autoalign.load`, other names",
    "apart": "the same, query, key and value apart",
    "assign": "`assign=True`, to a model on meta",
}


def loading_table(loads: Sequence[Load]) -> Iterator[str]:
    """Write a line for each format and way; the ratios are of medians."""
    yield "| file | way | MB | from disk, s | over own | from memory, s | over own | memory, MiB | allowed | | right |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |"
    own = {load.format: load for load in loads if load.way == "own"}
    for load in loads:
        ratios = [ratio(load, own[load.format], from_disk=from_disk) for from_disk in (True, False)]
        disk, memory = ("" if one is None else f"{one:.2f}x" for one in ratios)
        seconds = (spread(times, 1, digits=2) if times else "" for times in (load.from_disk, load.from_memory))
        taken = "" if load.memory_bytes is None else f"{load.memory_bytes / 2**20:.0f}"
        is_slow = load.way == "renamed" and load.file_bytes >= SMALLEST_FILE and (ratios[0] or 0) > TIME_BUDGET
        verdict = "OVER" if is_slow or not load.is_within_memory_budget else "ok"
        yield (
            f"| {load.format} | {_LOADS[load.way]} | {load.file_bytes / 1e6:,.0f} "
            f"| {next(seconds)} | {disk} | {next(seconds)} | {memory} "
            f"| {taken} | {(load.largest_bytes + MEMORY_BUDGET) / 2**20:.0f} "
            f"| {'' if load.way == 'own' else verdict} | {'yes' if load.is_right else 'NO'} |"
        )
    yield "\nMemory is beyond the model; the format's own is `safetensors.torch.load_model`, and `load_state_dict` of"
    yield f"`torch.load(mmap=True)`. From the disk, other names may take {TIME_BUDGET} times its time."


def sharded_table(loads: Sequence[ShardedLoad]) -> Iterator[str]:
    """Write a line for each format, way and rank."""
    yield "| file | way | rank | MB | it holds | it read | mapped | memory, MiB | allowed | seconds | | right |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |"
    for load in loads:
        read = "" if load.read_bytes is None else f"{load.read_bytes / 1e6:,.1f}"
        mapped = "" if load.mapped_bytes is None else f"{load.mapped_bytes / 1e6:,.0f}"
        taken = "" if load.memory_bytes is None else f"{load.memory_bytes / 2**20:.0f}"
        verdict = "" if load.way == "own" else "ok" if load.is_within_budget else "OVER"
        yield (
            f"| {load.format} | {_SHARDED_LOADS[load.way]} | {load.rank} | {load.file_bytes / 1e6:,.0f} "
            f"| {load.held_bytes / 1e6:,.1f} | {read} | {mapped} | {taken} "
            f"| {(load.largest_bytes + MEMORY_BUDGET) / 2**20:.0f} | {load.seconds:.2f} | {verdict} "
            f"| {'yes' if load.is_right else 'NO'} |"
        )
    yield "\nFSDP2 over two processes. What is mapped are pages of the file that are in the rank's memory."


_SHARDED_LOADS = _LOADS | {"own": "torch's `set_model_state_dict`, same names"}
