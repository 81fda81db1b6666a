"""Every architecture of torchvision and timm, changed in ten ways: ``python -m benchmarks.accuracy.architectures``.

A checkpoint of an architecture is changed and aligned to the architecture; where each tensor came from is known. The
table tells, for each change: architectures in which all is right, the shares of tensors that are right (loaded as the
truth has them), wrong (loaded otherwise), wrong at 0.9 and more, ambiguous, and how many checkpoints were refused.

    python -m benchmarks.accuracy.architectures --sample 100 --seed 3 --processes 2 --rows

``architectures.csv`` beside this file, from ``--csv``, has the outcome of each.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from random import Random

import torch
from rich.progress import track

import autoalign
from autoalign.plan.operations import Copy
from autoalign.plan.specs import TensorSpec
from benchmarks.cases.architectures import every_architecture, is_fitted, named_architecture
from benchmarks.cases.changes import CHANGES, changed
from benchmarks.cases.perturbations import on_meta
from benchmarks.gold import SURE


@dataclass(frozen=True, slots=True)
class Outcome:
    """What ``align`` made of one changed checkpoint; counts of tensors of the target."""

    architecture: str
    change: str
    known: int  # that the checkpoint has something for
    right: int
    wrong: int
    sure: int  # of the wrong, at 0.9 and more
    ambiguous: int
    error: str = ""


def outcome(architecture: str, specs: Sequence[TensorSpec], change: str, seed: int) -> Outcome:
    """Change the checkpoint of an architecture, align it to the architecture, and compare with the truth."""
    entries = changed(specs, change, Random(f"{seed} {architecture} {change}"))
    truth = {entry.origin: entry.key for entry in entries if entry.origin is not None}
    source = tuple(TensorSpec(entry.key, entry.shape, entry.dtype) for entry in entries)
    try:
        found = autoalign.align(on_meta(source), on_meta(tuple(specs)))
    except autoalign.AutoAlignError as error:
        return Outcome(architecture, change, len(truth), 0, 0, 0, 0, f"{type(error).__name__}: {error}"[:300])
    wrong = [
        match
        for match in found.matches
        if match.sources != (truth.get(match.target),) or not isinstance(match.operation, Copy)
    ]
    sure = sum(match.confidence >= SURE for match in wrong)
    right = len(found.matches) - len(wrong)
    return Outcome(architecture, change, len(truth), right, len(wrong), sure, len(found.ambiguous))


def outcomes(name: str, changes: Sequence[str], seed: int) -> list[Outcome]:
    """Build an architecture without memory, and try changes of it; none if it can't be built so."""
    torch.set_num_threads(1)
    architecture = named_architecture(name)
    return [outcome(name, architecture.specs, change, seed) for change in changes] if architecture else []


def table(found: Iterable[Outcome]) -> Iterator[str]:
    """Yield the lines of a table with a row for each change."""
    listed = list(found)
    yield "change               architectures  all right    right    wrong     sure  ambiguous  refused"
    for change in dict.fromkeys(one.change for one in listed):
        own = [one for one in listed if one.change == change]
        known = max(sum(one.known for one in own), 1)
        shares = (sum(getattr(one, of) for one in own) / known for of in ("right", "wrong", "sure", "ambiguous"))
        right, wrong, sure, ambiguous = (f"{share:.3%}" for share in shares)
        perfect = sum(one.right == one.known and not one.wrong for one in own)
        refused = sum(bool(one.error) or (one.known > 0 and not one.right) for one in own)
        yield f"{change:20} {len(own):13} {perfect:10} {right:>8} {wrong:>8} {sure:>8} {ambiguous:>10} {refused:8}"


def rows(found: Iterable[Outcome]) -> Iterator[list[str]]:
    """Yield the rows of a table: of each architecture right/wrong/all tensors for each change.

    >>> list(rows([Outcome("tiny", "sorted", 4, 3, 1, 0, 0)]))
    [['architecture', 'sorted'], ['tiny', '3/1/4']]
    """
    listed, told = list(found), dict[str, dict[str, str]]()
    for one in listed:
        told.setdefault(one.architecture, {})[one.change] = f"{one.right}/{one.wrong}/{one.known}"
    yield ["architecture", *dict.fromkeys(one.change for one in listed)]
    for name, changes in told.items():
        yield [name, *changes.values()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Try all changes of all architectures, or of a sample; print the table."""
    options = _parser().parse_args(arguments)
    names = [name for name in every_architecture() if options.only in name]
    names = [name for name in names if not (options.unseen and is_fitted(name))]
    if options.sample and options.sample < len(names):
        names = Random(options.seed).sample(names, options.sample)
    job = partial(outcomes, changes=options.change or list(CHANGES), seed=options.seed)
    found: list[Outcome] = []
    with ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for own in track(pool.map(job, names), total=len(names), disable=not sys.stderr.isatty()):
            found += own
            for one in own if options.rows else ():
                if one.wrong or one.error or one.right < one.known:
                    print(one, flush=True)
    print("\n".join(table(found)))
    versions = {library: version(library) for library in ("torch", "torchvision", "timm")}
    print(f"{len(names)} architectures, seed {options.seed}, {versions}")
    if options.csv:
        with options.csv.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows(found))
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(one) for one in found]), encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.architectures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only the architectures whose name contains this")
    parser.add_argument("--change", action="append", choices=list(CHANGES), help="only this change; may be repeated")
    parser.add_argument("--unseen", action="store_true", help="leave out those that the weights are fitted to")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="so many architectures, chosen by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, metavar="N")
    parser.add_argument("--rows", action="store_true", help="print every outcome in which something is not right")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a table with a row for each architecture")
    parser.add_argument("--json", metavar="FILE", help="write all outcomes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
