"""Measure accuracy and time of autoalign and of its peers in one run, and print the figures as markdown tables."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.accuracy import contest_gold, contest_pairs, contest_partial, contest_perturbed, reliability
from benchmarks.accuracy.contest import Attempt, Tally, tallied
from benchmarks.accuracy.judging import JudgedCase
from benchmarks.cases import moe
from benchmarks.cases.architectures import Choice
from benchmarks.cases.perturbations import ALL
from benchmarks.figures import plots, tables
from benchmarks.peers import PEERS, Peer
from benchmarks.speed import align as align_time
from benchmarks.speed import baseline, scaling, worst_cases
from benchmarks.speed import files as file_loading
from benchmarks.speed import imports as import_time
from benchmarks.speed import sharded as sharded_loading
from benchmarks.speed.machine import machine, machine_line

_FEW, _QUICK = Choice(few=True), Choice(most_tensors=400)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    repeats: int = 5
    processes: int = 5  # measured processes of each import
    perturbed: int = 81  # cases; three of each recipe
    pairs: int | None = None  # of each group; None for all
    partial: int | None = None
    gold: int | None = None  # cases, from all over their list
    judged: int = 200  # perturbations for the reliability
    judged_among: Choice = ALL
    contested: Choice = _QUICK  # what is perturbed for all matchers, the slow ones too
    slow_peers: bool = True  # whether the peers take part in the scaling series
    sizes: tuple[int, ...] = tuple(moe.SIZES)
    worst_cases_share: float = 1.0  # of the full size of each case
    file_bytes: int = 2_000_000_000
    file_ways: tuple[str, ...] = file_loading.WAYS
    sharded_bytes: int = 500_000_000
    sharded_formats: tuple[str, ...] = file_loading.FORMATS
    subjects: int | None = None  # of the time of align


SMOKE = Plan(
    repeats=3,
    processes=1,
    perturbed=27,
    pairs=1,
    partial=1,
    gold=2,
    judged=27,
    judged_among=_FEW,
    contested=_FEW,
    slow_peers=False,
    sizes=(1_000,),
    worst_cases_share=0.03,
    file_bytes=30_000_000,
    file_ways=("own", "renamed"),
    sharded_bytes=30_000_000,
    sharded_formats=file_loading.FORMATS[:1],
    subjects=1,
)


@dataclass(slots=True)
class Results:
    """What was measured, by part."""

    timings: list[align_time.Timing] = field(default_factory=list)
    imports: tuple[float, ...] = ()
    first_uses: tuple[float, ...] = ()
    attempts: list[Attempt] = field(default_factory=list)
    judged: list[JudgedCase] = field(default_factory=list)
    points: list[scaling.Point] = field(default_factory=list)
    worst_points: list[worst_cases.Point] = field(default_factory=list)
    loads: list[file_loading.Load] = field(default_factory=list)
    sharded_loads: list[sharded_loading.ShardedLoad] = field(default_factory=list)

    @property
    def tallies(self) -> list[Tally]:
        return tallied(self.attempts)

    def figures(self) -> dict[str, baseline.Figure]:
        return dict(baseline.figures(self.timings, self.tallies, self.points, self.loads))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status: 1 if a result is wrong or, with ``--check``, a figure is worse."""
    options = _parser().parse_args(arguments)
    plan = SMOKE if options.smoke else Plan()
    if options.repeats:
        plan = replace(plan, repeats=options.repeats, processes=options.repeats)
    if options.count:
        plan = replace(plan, perturbed=options.count, judged=options.count)
    if options.gold:
        plan = replace(plan, gold=options.gold)
    peers = [peer for name, peer in PEERS.items() if not options.matchers or name in options.matchers]
    print(f"{machine_line()}\n")
    for peer in peers:
        if not peer.is_available:
            print(f"{peer.name} is left out: {peer.requires} is not installed.")
    peers = [peer for peer in peers if peer.is_available]
    for peer in peers:
        peer.warm_up()
    results, lines = Results(), list[str]()
    for part, measure in PARTS.items():
        if part in (options.only or PARTS):
            start = time.perf_counter()
            new = [f"## {part}", "", *measure(results, plan, peers), ""]
            print("\n".join(new), flush=True)
            print(f"{part}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
            lines += new
    if options.out:
        save(results, lines, options.out)
    if options.store:
        baseline.store(results.figures())
    faults = list(mistakes(results)) + (baseline.worse(results.figures()) if options.check else [])
    print("\n".join(f"WORSE: {fault}" for fault in faults))
    return 1 if faults else 0


def _time(results: Results, plan: Plan, _: Sequence[Peer]) -> Iterator[str]:
    results.timings = [align_time.measure(subject, plan.repeats) for subject in align_time.SUBJECTS[: plan.subjects]]
    return tables.timing_table(results.timings)


def _import(results: Results, plan: Plan, _: Sequence[Peer]) -> Iterator[str]:
    results.imports = import_time.measure(import_time.IMPORT, plan.processes)
    results.first_uses = import_time.measure(import_time.FIRST_USE, plan.processes)
    return tables.import_table(results.imports, results.first_uses)


def _pairs(results: Results, plan: Plan, peers: Sequence[Peer]) -> Iterator[str]:
    return _contest(results, contest_pairs.attempts(peers, plan.pairs))


def _perturbed(results: Results, plan: Plan, peers: Sequence[Peer]) -> Iterator[str]:
    attempts = contest_perturbed.attempts(peers, plan.perturbed, choice=plan.contested)
    return _contest(results, sorted(attempts, key=lambda one: one.group))


def _partial(results: Results, plan: Plan, peers: Sequence[Peer]) -> Iterator[str]:
    return _contest(results, contest_partial.attempts(peers, plan.partial))


def _gold(results: Results, plan: Plan, peers: Sequence[Peer]) -> Iterator[str]:
    return _contest(results, contest_gold.attempts(peers, plan.gold))


def _contest(results: Results, attempts: Iterable[Attempt]) -> Iterator[str]:
    new = list(attempts)
    results.attempts += new
    rest = [""], tables.accuracy_table(tallied(new)), tables.time_lines(new)
    return chain(tables.matrix(tallied(new)), *rest)


def _reliability(results: Results, plan: Plan, _: Sequence[Peer]) -> Iterator[str]:
    results.judged = list(reliability.judged_cases(plan.judged, choice=plan.judged_among))
    return reliability.report(results.judged)


def _scaling(results: Results, plan: Plan, peers: Sequence[Peer]) -> Iterator[str]:
    results.points = list(
        scaling.measure(peers if plan.slow_peers else peers[:1], plan.sizes, max(1, plan.repeats // 2))
    )
    if plan.gold is None:
        results.points += scaling.measure_gold(max(1, plan.repeats // 2))
    return tables.scaling_table(results.points)


def _worst_cases(results: Results, plan: Plan, _: Sequence[Peer]) -> Iterator[str]:
    results.worst_points = list(worst_cases.measure(plan.worst_cases_share))
    return tables.worst_cases_table(results.worst_points)


def _files(results: Results, plan: Plan, _: Sequence[Peer]) -> Iterator[str]:
    results.loads = list(file_loading.measure(plan.file_bytes, plan.repeats, plan.file_ways))
    return tables.loading_table(results.loads)


def _sharded(results: Results, plan: Plan, _: Sequence[Peer]) -> Iterator[str]:
    results.sharded_loads = list(sharded_loading.measure(plan.sharded_bytes, plan.sharded_formats))
    return tables.sharded_table(results.sharded_loads)


# each part measures, keeps the figures in the results, and gives its tables
PARTS: dict[str, Callable[[Results, Plan, Sequence[Peer]], Iterator[str]]] = {
    "time": _time,
    "import": _import,
    "pairs": _pairs,
    "perturbed": _perturbed,
    "partial": _partial,
    "gold": _gold,
    "reliability": _reliability,
    "scaling": _scaling,
    "worst cases": _worst_cases,
    "files": _files,
    "sharded": _sharded,
}


def mistakes(results: Results) -> Iterator[str]:
    """List the results that make a time of autoalign's meaningless."""
    for point in results.points:
        # layouts that no shape shows are listed as ambiguous in a gold case, and so are not loaded
        is_faulty = not point.is_perfect if point.size else bool(point.wrong or point.error)
        if point.peer == "autoalign" and is_faulty:
            counts = f"{point.right:,} of {point.tensors:,} right, {point.wrong:,} wrong"
            yield f"scaling, {point.case}, {point.size:,}: {point.error or counts}"
    for case in results.worst_points:
        if case.error or not case.is_within_budget:
            figures = f"{case.cpu_seconds:.1f} CPU seconds, {case.peak_bytes / 1e6:.0f} MB"
            yield f"worst cases, {case.case}, {case.size:,}: {case.error or figures}"
    for load in results.loads:
        if not load.is_right:
            yield f"{load.format}, {load.way}: values differ after the load"
        if load.way != "own" and not load.is_within_memory_budget:
            yield f"{load.format}, {load.way}: {load.memory_bytes:,} bytes of memory beyond the model"
    for part in results.sharded_loads:
        if not part.is_right:
            yield f"{part.format}, {part.way}, rank {part.rank}: values differ after the load"
        if part.way != "own" and not part.is_within_budget:
            read = f"{part.read_bytes:,} bytes read for {part.held_bytes:,}"
            yield f"{part.format}, {part.way}, rank {part.rank}: {read}, {part.memory_bytes:,} of memory"


def save(results: Results, lines: Sequence[str], folder: Path) -> None:
    """Write the tables, all figures and the plots to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures.md").write_text("\n".join([machine_line(), "", *lines, ""]), encoding="utf-8")
    (folder / "figures.json").write_text(json.dumps(_as_json(results), indent=1), encoding="utf-8")
    if results.judged:
        reliability.write(results.judged, folder)
    by_peer: dict[str, dict[str, float]] = {}
    for tally in results.tallies:
        if tally.group.startswith("perturbed") and tally.gold:
            by_peer.setdefault(tally.peer, {})[tally.group.removeprefix("perturbed, ")] = tally.right / tally.gold
    if by_peer:
        levels = sorted({level for shares in by_peer.values() for level in shares})
        whole = {
            peer: [shares[level] for level in levels] for peer, shares in by_peer.items() if len(shares) == len(levels)
        }
        plots.plot_accuracy(levels, whole, folder / "accuracy.png")
    curves: dict[str, list[tuple[int, float]]] = {}
    for point in results.points:
        if point.seconds:
            curves.setdefault(point.peer, []).append((point.tensors, point.median_seconds))
    if curves:
        plots.plot_scaling(curves, folder / "scaling.png")


def _as_json(results: Results) -> dict[str, Any]:
    return {
        "machine": machine(),
        "align": [asdict(timing) | {"ratio": timing.ratio} for timing in results.timings],
        "import_seconds": results.imports,
        "first_use_seconds": results.first_uses,
        "accuracy": [asdict(tally) for tally in results.tallies],
        "scaling": [asdict(point) for point in results.points],
        "worst_cases": [asdict(point) for point in results.worst_points],
        "files": [asdict(load) for load in results.loads],
        "sharded": [asdict(load) for load in results.sharded_loads],
        "figures": {name: figure.value for name, figure in results.figures().items()},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"some of: {', '.join(PARTS)}")
    parser.add_argument("--matchers", nargs="+", choices=PEERS, metavar="NAME", help=f"some of: {', '.join(PEERS)}")
    parser.add_argument("--repeats", type=int, help=f"measured runs of each time (default: {Plan().repeats})")
    parser.add_argument(
        "--count", type=int, help=f"perturbations (default: {Plan().perturbed}, {Plan().judged} judged)"
    )
    parser.add_argument(
        "--gold",
        type=int,
        metavar="COUNT",
        help="gold cases, from all over their list (default: all)",
    )
    parser.add_argument("--smoke", action="store_true", help="a little of every part, in less than a minute")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write tables, figures and plots there")
    parser.add_argument("--check", action="store_true", help="compare ratios and shares with the stored baseline")
    parser.add_argument("--store", action="store_true", help="store the ratios and shares as the baseline")
    return parser


if __name__ == "__main__":
    sys.exit(main())
