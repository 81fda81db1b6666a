"""Notice any change of what ``align`` says of some gold cases: ``python -m benchmarks.fingerprints``.

Of each case, ``tests/matching/fingerprints.json`` keeps three short hashes: of what is filled from where and how, of
how sure that is, and of warnings and notes. A test compares them. Whoever changes the matcher looks at what changed
and, if that is meant, keeps the new ones.

    python -m benchmarks.fingerprints                  # which cases changed
    python -m benchmarks.fingerprints --show vit       # all that is said of the cases named so, as text to compare
    python -m benchmarks.fingerprints --keep           # keep the new ones
    python -m benchmarks.fingerprints --add NAME...    # of more cases, as they are or with one of ``VARIANTS``
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch

import autoalign
from autoalign.matching.architectures import fingerprint as fingerprint_of
from autoalign.matching.architectures import index, likenesses, of_equal_blocks
from autoalign.plan.matches import Match
from autoalign.plan.options import ADAPTS
from autoalign.plan.specs import TensorSpec, specs_of
from benchmarks.cases.gold import read

FILE = Path(__file__).parents[1] / "tests/matching/fingerprints.json"
VARIANTS = (  # "NAME | sorted" and so on
    "sorted",  # the source's keys are sorted
    "adapted",  # all changes of values are allowed
    "pinned",  # every tenth plain pair is known beforehand
    "alike",  # which architectures the source is like, instead of what is aligned
)
PARTS = ("what is filled", "how sure it is", "warnings and notes")


def kept() -> dict[str, str]:
    """Read the fingerprints that are kept, by case."""
    result: dict[str, str] = json.loads(FILE.read_text(encoding="utf-8"))
    return result


def said(name: str) -> tuple[list[str], list[str], list[str]]:
    """List all that ``align`` says of a case, or of a variant of it, in the three ``PARTS``."""
    case_name, _, variant = name.partition(" | ")
    case = read(case_name, with_sorted_keys=variant == "sorted")
    if variant == "alike":
        return _alike(specs_of(case.source)), [], []
    plain = [(source, key) for key, source in case.expressions.items() if isinstance(source, str)]
    alignment = autoalign.align(
        case.source,
        case.target,
        adapt=ADAPTS if variant == "adapted" else (),
        rules=plain[::10] if variant == "pinned" else (),
    )
    proposals: list[tuple[str, Match]] = [("", match) for match in alignment.matches]
    proposals += [("unsure ", match) for match in alignment.ambiguous]
    filled = [f"{unsure}{match.target} <- {match.sources} {match.operation}" for unsure, match in proposals]
    filled += [f"mismatched {mismatch}" for mismatch in alignment.mismatched]
    sureness = [f"{match.target} {match.confidence:.3f} {_figures(match)}" for _, match in proposals]
    texts = [f"{match.target}: {warning}" for _, match in proposals for warning in match.warnings]
    return filled, sureness, [*texts, *alignment.notes]


def fingerprint(name: str) -> str:
    """Return a short hash of each part of what is said."""
    return "-".join(hashlib.sha256("\n".join(lines).encode()).hexdigest()[:6] for lines in said(name))


def changed_parts(before: str, after: str) -> str:
    """Say in which parts two fingerprints differ.

    >>> changed_parts("0a-1b-2c", "0a-1b-3d")
    'warnings and notes'
    """
    pairs = zip(PARTS, before.split("-"), after.split("-"), strict=True)
    return ", ".join(part for part, old, new in pairs if old != new)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, show or keep, and return the exit status: 1 if what is kept is not what is said."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fingerprints",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--show", metavar="TEXT", help="print all that is said of the cases whose name contains this")
    parser.add_argument("--keep", action="store_true", help="keep the fingerprints of what is said now")
    parser.add_argument("--add", nargs="+", default=[], metavar="NAME", help="keep those of these cases too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    before = kept()
    if options.show is not None:
        print("\n".join(_shown(name for name in before if options.show in name)))
        return 0
    after = {name: fingerprint(name) for name in sorted({*before, *options.add})}
    changes = [name for name in before if before[name] != after[name]]
    for name in changes:
        print(f"{name}: {changed_parts(before[name], after[name])}")
    print(f"{len(changes)} of {len(before)} changed.")
    if options.keep or options.add:
        FILE.write_text(json.dumps(after, indent=0) + "\n", encoding="utf-8")
        return 0
    return int(bool(changes))


def _alike(specs: Sequence[TensorSpec]) -> list[str]:
    own, known = fingerprint_of(specs), index()
    of_blocks = "" if (found := of_equal_blocks(own, known)) is None else f"{found} {found.builder} {found.config}"
    blocks = hashlib.sha256(repr(sorted(own.blocks.items())).encode()).hexdigest()
    lines = [f"{own.width} wide, {own.depth} deep; blocks {blocks}", f"of equal blocks: {of_blocks}"]
    for one in likenesses(specs, own, known):
        left = [sorted(shapes.items()) for shapes in (one.missing, one.extra)]
        lines.append(f"{', '.join(map(str, one.architectures))}: {one.common} of {one.own} and {one.total}, {left}")
        lines.append(f"names {one.names:.3f} after {one.prefix!r}, {one.classes} classes, {one.is_exact}")
    return lines


def _figures(match: Match) -> str:
    evidence = (f"{cue}={value:.3f}" for cue, value in match.evidence.items())
    rivals = (f"or {rival.sources} {rival.operation} {rival.score:.3f}" for rival in match.alternatives)
    return " ".join(chain(evidence, rivals))


def _shown(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        yield f"== {name}"
        for part, lines in zip(PARTS, said(name), strict=True):
            yield f"-- {part}"
            yield from lines


if __name__ == "__main__":
    sys.exit(main())
