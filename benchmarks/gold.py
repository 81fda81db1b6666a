"""Score ``align`` on the gold cases: ``python -m benchmarks.gold``.

Per case:  right    target tensors that are loaded as the truth has them
           missing  tensors that the source has and that are not loaded
           wrong    loaded otherwise, or although the source has nothing for them; sure-wrong: at 0.9 and more
           named    of the missing: proposed as ambiguous, with the truth as the proposal or among its alternatives
A case is perfect if nothing is missing and nothing is wrong. A wrong tensor is worse than a missing one.

    python -m benchmarks.gold --sorted --processes 2            # the sources' keys in alphabetical order
    python -m benchmarks.gold --only vit --verbose              # every missing and wrong key of the cases named so
    python -m benchmarks.gold --json new.json --against old.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import autoalign
from autoalign.plan.matches import Match
from benchmarks.cases.gold import GoldCase, names, read

SURE = 0.9
GROUPS = ("rename", "partial", "operations", "layout", "scale")


@dataclass(frozen=True, slots=True)
class Score:
    """What ``align`` made of one case."""

    name: str
    libraries: tuple[str, ...]
    group: str
    gold: int  # target tensors that the source has something for
    right: int
    missing: tuple[str, ...]
    wrong: tuple[str, ...]
    sure_wrong: tuple[str, ...]  # those of the wrong at ``SURE`` and more
    named: int
    seconds: float  # of align
    error: str = ""  # what it raised

    @property
    def is_perfect(self) -> bool:
        return self.right == self.gold and not self.wrong and not self.error


@dataclass(frozen=True, slots=True)
class Total:
    """The sums over several cases."""

    cases: int
    perfect: int
    gold: int
    right: int
    wrong: int
    sure_wrong: int
    named: int
    missing: int

    def __str__(self) -> str:
        gold = max(self.gold, 1)
        return (
            f"cases {self.cases:>4}  perfect {self.perfect:>4} ({self.perfect / max(self.cases, 1):6.1%})  "
            f"right {self.right:>6}/{self.gold:<6} ({self.right / gold:7.2%})  "
            f"wrong {self.wrong:>5} ({self.wrong / gold:.3%})  sure-wrong {self.sure_wrong}  "
            f"named {self.named}/{self.missing}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Score, print, and return the exit status: 1 if a case raised or got worse, 2 if there is none of that name."""
    options = _parser().parse_args(arguments)
    chosen = names(options.only, most_tensors=options.most_tensors)
    if not chosen:
        print(f"No case has {options.only!r} in its name.")
        return 2
    scores = []
    for one in scored_cases(chosen, with_sorted_keys=options.sorted, processes=options.processes):
        scores.append(one)
        print("\n".join(_lines(one, is_verbose=options.verbose)), flush=True)
    print("\n".join(report(scores, by_library=options.kin)))
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in scores], indent=1), encoding="utf-8")
    worse: list[str] = []
    if options.against:
        better, worse = changes(scores, json.loads(options.against.read_text(encoding="utf-8")))
        print("\n".join([*(f"BETTER: {line}" for line in better), *(f"WORSE: {line}" for line in worse)]))
    return 1 if worse or any(one.error for one in scores) else 0


def scored_cases(chosen: Iterable[str], *, with_sorted_keys: bool = False, processes: int = 1) -> Iterator[Score]:
    """Score the cases of these names, in their order."""
    one = partial(_scored, with_sorted_keys=with_sorted_keys)
    if processes == 1:
        yield from map(one, chosen)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(one, chosen)


def scored(case: GoldCase) -> Score:
    """Align a case and judge every target tensor that counts."""
    start = time.perf_counter()
    try:
        alignment = autoalign.align(case.source, case.target)
    except Exception as error:  # one case must not hide the others
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return _score(case, time.perf_counter() - start, error=text)
    seconds = time.perf_counter() - start
    loaded = {match.target: match for match in alignment.matches}
    proposed = {match.target: match for match in alignment.ambiguous}
    right, named, missing, wrong = 0, 0, [], []
    for key, expression in case.expressions.items():
        if (match := loaded.get(key)) is not None:
            if case.is_right(key, match):
                right += 1
            else:
                wrong.append(match)
        elif expression is not None:
            missing.append(key)
            if key in proposed:
                match = proposed[key]
                named += case.is_right(key, match) or any(case.is_right(key, way) for way in match.alternatives)
    return _score(case, seconds, right=right, missing=missing, wrong=wrong, named=named)


def total(scores: Sequence[Score]) -> Total:
    """Sum up."""
    return Total(
        len(scores),
        sum(one.is_perfect for one in scores),
        sum(one.gold for one in scores),
        sum(one.right for one in scores),
        sum(len(one.wrong) for one in scores),
        sum(len(one.sure_wrong) for one in scores),
        sum(one.named for one in scores),
        sum(len(one.missing) for one in scores),
    )


def report(scores: Sequence[Score], *, by_library: bool = False) -> Iterator[str]:
    """Yield a line for each group and one for all, and first, if asked for, one for each library."""
    if by_library:
        for library in sorted({library for one in scores for library in one.libraries}):
            yield f"{library[:28]:<29}{total([one for one in scores if library in one.libraries])}"
    for group in GROUPS:
        if members := [one for one in scores if one.group == group]:
            yield f"{group:<11}{total(members)}"
    yield f"{'all':<11}{total(scores)}  crashed {sum(bool(one.error) for one in scores)}"


def changes(scores: Sequence[Score], stored: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """List the cases that got better and those that got worse since ``--json`` wrote some scores.

    Fewer wrong tensors are better, then more right ones.
    """
    before = {one["name"]: one for one in stored}
    better: list[str] = []
    worse: list[str] = []
    for one in scores:
        if (old := before.get(one.name)) is None:
            continue
        old_figures, figures = ((-len(old["wrong"]), old["right"]), (-len(one.wrong), one.right))
        line = f"{one.name}: right {old['right']} -> {one.right}, wrong {len(old['wrong'])} -> {len(one.wrong)}"
        if figures != old_figures:
            (better if figures > old_figures else worse).append(line)
    return better, worse


def _scored(name: str, *, with_sorted_keys: bool) -> Score:
    torch.set_num_threads(1)  # there is nothing to share between threads that wait for one another
    return scored(read(name, with_sorted_keys=with_sorted_keys))


def _score(
    case: GoldCase,
    seconds: float,
    *,
    right: int = 0,
    missing: Sequence[str] = (),
    wrong: Sequence[Match] = (),
    named: int = 0,
    error: str = "",
) -> Score:
    return Score(
        case.name,
        tuple(sorted(case.libraries)),
        case.group,
        case.gold_count,
        right,
        tuple(missing),
        tuple(match.target for match in wrong),
        tuple(match.target for match in wrong if match.confidence >= SURE),
        named,
        seconds,
        error,
    )


def _lines(one: Score, *, is_verbose: bool) -> Iterator[str]:
    flag = "ok" if one.is_perfect else "--"
    counts = f"right {one.right:>5}/{one.gold:<5} wrong {len(one.wrong):>4}  {one.seconds * 1e3:8.1f} ms"
    yield f"{flag} {one.name:<78} {counts}  {one.error}".rstrip()
    if is_verbose and (one.missing or one.wrong):
        expressions = read(one.name).expressions
        yield from (f"      missing {key}  gold {json.dumps(expressions[key])}" for key in one.missing)
        yield from (f"      wrong   {key}  gold {json.dumps(expressions[key])}" for key in one.wrong)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gold", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only the cases whose name contains this")
    parser.add_argument("--most-tensors", type=int, metavar="N", help="leave out cases with more on a side")
    parser.add_argument("--sorted", action="store_true", help="sort the sources' keys, as safetensors files have them")
    parser.add_argument("--kin", action="store_true", help="print a line for each library")
    parser.add_argument("--verbose", action="store_true", help="print every missing and wrong key")
    parser.add_argument("--processes", type=int, default=1, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every score there")
    parser.add_argument("--against", type=Path, metavar="FILE", help="list what got better or worse since that --json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
