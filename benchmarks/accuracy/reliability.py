"""Judge the confidence of all matches of perturbations and gold cases: ``python -m benchmarks.accuracy.reliability``.

Writes ``matches.npz`` (arrays, one element per match), ``cases.json``, ``reliability.json`` and ``reliability.png``.

    python -m benchmarks.accuracy.reliability --count 2000 --processes 2 --out DIR --worst 20
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from benchmarks.accuracy.judging import JudgedCase, judged_gold, judged_perturbation
from benchmarks.cases import gold
from benchmarks.cases.architectures import Choice
from benchmarks.cases.perturbations import ALL, LEVELS

EDGES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)
SURE = 0.9
_CHUNK = 8  # cases that a process takes at a time


@dataclass(frozen=True, slots=True)
class Bin:
    """The matches of one range of confidence."""

    low: float
    high: float  # exclusive, but for the last bin
    count: int
    right: int
    mean_confidence: float

    @property
    def share(self) -> float:
        return self.right / self.count if self.count else float("nan")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.reliability", description=__doc__)
    parser.add_argument("--count", type=int, default=400, help="how many perturbations (default: 400)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most-tensors", type=int, help="leave out architectures with more")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--no-gold", action="store_true", help="leave out the gold cases, which take minutes")
    parser.add_argument("--worst", type=int, default=0, metavar="N", help="print so many wrong matches at 0.9 or more")
    parser.add_argument("--out", type=Path, help="a folder to write the arrays, the tables and the plot to")
    options = parser.parse_args(arguments)

    judged = list(
        judged_cases(
            options.count,
            options.seed,
            choice=Choice(options.most_tensors),
            with_gold=not options.no_gold,
            processes=options.processes,
            progress=lambda done: print(f"{done} cases", file=sys.stderr) if done % 100 == 0 else None,
        )
    )
    print("\n".join(report(judged, options.worst)))
    if options.out:
        write(judged, options.out)
    return 0


def judged_cases(
    count: int,
    seed: int = 0,
    *,
    choice: Choice = ALL,
    with_gold: bool = False,
    processes: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[JudgedCase]:
    """Judge the perturbations of a seed and then the gold cases, always in the same order."""
    choice.architectures()  # builds the cache once, before other processes read it
    generated = partial(judged_perturbation, seed=seed, choice=choice)
    names = gold.names() if with_gold else []
    if processes == 1:
        yield from _counted(chain(map(generated, range(count)), map(judged_gold, names)), progress)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = chain(pool.map(generated, range(count), chunksize=_CHUNK), pool.map(judged_gold, names))
        yield from _counted(found, progress)


def _counted(found: Iterable[JudgedCase], progress: Callable[[int], None]) -> Iterator[JudgedCase]:
    for done, case in enumerate(found, start=1):
        progress(done)
        yield case


def bins(confidence: Sequence[float], right: Sequence[bool]) -> list[Bin]:
    """Sort matches by their confidence into the ranges between ``EDGES``.

    >>> bins([0.95, 1.0, 0.2], [True, True, False])[-1]
    Bin(low=0.999, high=1.0, count=1, right=1, mean_confidence=1.0)
    """
    values, hits = np.asarray(confidence, dtype=float), np.asarray(right, dtype=bool)
    places = np.clip(np.searchsorted(EDGES, values, side="right") - 1, 0, len(EDGES) - 2)
    return [
        Bin(
            low,
            high,
            int((inside := places == place).sum()),
            int(hits[inside].sum()),
            float(values[inside].mean()) if inside.any() else float("nan"),
        )
        for place, (low, high) in enumerate(pairwise(EDGES))
    ]


def report(judged: Sequence[JudgedCase], worst: int = 0) -> Iterator[str]:
    """Write the tables in markdown, and the wrong matches that were sure."""
    matches = [match for case in judged for match in case.matches]
    yield "| confidence | matches | mean | right | share right |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for one in bins([match.confidence for match in matches], [match.is_right for match in matches]):
        share = f"{one.share:.4%}" if one.count else ""
        mean = f"{one.mean_confidence:.4f}" if one.count else ""
        yield f"| {one.low:g} to {one.high:g} | {one.count:,} | {mean} | {one.right:,} | {share} |"
    yield ""
    yield "| cases | number | perfect | tensors | right | wrong | at 0.9 or more | of them right | wrong | s |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for name, members in groups(judged).items():
        yield _row(name, members)
    failures = [case for case in judged if case.error]
    yield f"\n{len(failures)} of {len(judged)} calls raised."
    yield from (f"* {case.name}, {case.subject}, {case.recipe}: {case.error}" for case in failures[:10])
    if worst:
        yield from _worst(judged, worst)


def groups(judged: Sequence[JudgedCase]) -> dict[str, list[JudgedCase]]:
    """Sort cases by the level of a perturbation and by the group of a gold case, and sum up."""
    result: dict[str, list[JudgedCase]] = {}
    for level, name in LEVELS.items():
        result[f"generated, {level} {name}"] = [case for case in judged if case.level == level]
    result["generated, all"] = [case for case in judged if case.origin == "generated"]
    for case in judged:
        if case.origin == "gold":
            result.setdefault(f"gold, {case.recipe}", []).append(case)
    result["gold, all"] = [case for case in judged if case.origin == "gold"]
    result["all"] = list(judged)
    return {name: members for name, members in result.items() if members}


def _row(name: str, members: Sequence[JudgedCase]) -> str:
    sure = [match for case in members for match in case.matches if match.confidence >= SURE]
    sure_right = sum(match.is_right for match in sure)
    tensors, right = sum(case.tensors for case in members), sum(case.right for case in members)
    perfect = sum(case.right == case.tensors and not case.wrong for case in members)
    return (
        f"| {name} | {len(members)} | {perfect / len(members):.1%} | {tensors:,} | {right / max(tensors, 1):.3%} "
        f"| {sum(case.wrong for case in members):,} | {len(sure):,} | {sure_right / max(len(sure), 1):.4%} "
        f"| {len(sure) - sure_right:,} | {sum(case.seconds for case in members):.1f} |"
    )


def _worst(judged: Sequence[JudgedCase], count: int) -> Iterator[str]:
    """List wrong matches from the surest down, those of one case side by side."""
    wrong = [
        (match, case) for case in judged for match in case.matches if match.confidence >= SURE and not match.is_right
    ]
    surest: dict[str, float] = {}
    for match, case in wrong:
        surest[case.name] = max(match.confidence, surest.get(case.name, 0.0))
    wrong.sort(key=lambda pair: (-surest[pair[1].name], pair[1].name, -pair[0].confidence))
    yield f"\n{len(wrong)} wrong matches at {SURE:g} or more, in {len(surest)} cases:"
    for match, case in wrong[:count]:
        yield (
            f"* {case.subject} ({case.name}; {case.recipe}): {' + '.join(match.sources)} -> {match.target}, "
            f"{match.operation}, truth {match.truth}, confidence {match.confidence:.4f}, cues {dict(match.cues)}"
        )


def write(judged: Sequence[JudgedCase], folder: Path) -> None:
    """Write everything to a folder; the n-th element of each array belongs to the n-th match."""
    from benchmarks.figures.plots import plot_reliability

    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "matches.npz", **arrays(judged))  # type: ignore[arg-type]
    summaries = [
        {key: value for key, value in asdict(case).items() if key != "matches"}
        | {"right": case.right, "wrong": case.wrong}
        for case in judged
    ]
    (folder / "cases.json").write_text(json.dumps(summaries, indent=1), encoding="utf-8")
    matches = [match for case in judged for match in case.matches]
    binned = bins([match.confidence for match in matches], [match.is_right for match in matches])
    (folder / "reliability.json").write_text(json.dumps([asdict(one) for one in binned], indent=1), encoding="utf-8")
    plot_reliability(binned, folder / "reliability.png")


def arrays(judged: Sequence[JudgedCase]) -> dict[str, np.ndarray]:
    """Lay out all matches as arrays.

    Returns:
        ``confidence``, ``is_right``, ``is_loaded``, ``level``, ``case`` (its place in ``cases.json``), ``target``,
        ``sources`` (joined by spaces), ``operation``, ``cues`` [matches, cues] with NaN where a cue said nothing, and
        ``cue_names``.
    """
    pairs = [(index, case, match) for index, case in enumerate(judged) for match in case.matches]
    names = sorted({name for _, _, match in pairs for name in match.cues})
    return {
        "confidence": np.array([match.confidence for _, _, match in pairs]),
        "is_right": np.array([match.is_right for _, _, match in pairs], dtype=bool),
        "is_loaded": np.array([match.is_loaded for _, _, match in pairs], dtype=bool),
        "level": np.array([case.level for _, case, _ in pairs], dtype=np.int8),
        "case": np.array([index for index, _, _ in pairs], dtype=np.int32),
        "target": np.array([match.target for _, _, match in pairs], dtype=np.str_),
        "sources": np.array([" ".join(match.sources[:2]) for _, _, match in pairs], dtype=np.str_),
        "operation": np.array([match.operation[:40] for _, _, match in pairs], dtype=np.str_),
        "cues": np.array([[match.cues.get(name, np.nan) for name in names] for _, _, match in pairs], dtype=np.float32),
        "cue_names": np.array(names, dtype=np.str_),
    }


if __name__ == "__main__":
    sys.exit(main())
