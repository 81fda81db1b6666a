"""Crossings: blocks of one list whose parts were matched into each other's counterparts.

Two blocks of two equal parts each can be matched straight, block by block, or across: the first parts of both into one
block, the second parts into the other. Votes of the parts for their blocks then confirm one another, and a soft
assignment may settle there. Straight is what leaves blocks whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from autoalign.graph import Path
from autoalign.matching import Assignment
from autoalign.names import numbers, stem

Pairs = list[tuple[int, int]]  # places in the assignment that exchange their sources


@dataclass(frozen=True, slots=True)
class _Pair:
    """A pair of layers in the assignment."""

    place: int
    own: Path  # of the source's layer
    other: Path  # of the target's
    kind: int  # equal where the shapes of both are


_Part = tuple[_Pair, ...]


def crossings(
    assignment: Assignment, source: Sequence[Path], target: Sequence[Path], kind_of: Sequence[int]
) -> list[Pairs]:
    """Find parts of blocks that are more of one piece when they exchange their sources.

    Args:
        assignment: The chosen pairs of units.
        source: The paths of the source's units, in the order of registration.
        target: The paths of the target's units.
        kind_of: [pairs]: equal where the shapes of both units are.

    Returns:
        For each exchange the places that take part, none of them twice.
    """
    places = enumerate(zip(assignment.source.tolist(), assignment.target.tolist(), kind_of, strict=True))
    blocks: dict[Path, list[_Pair]] = {}
    for place, (i, j, kind) in places:
        for depth in range(1, len(target[j])):
            if numbers(target[j][depth - 1]):
                blocks.setdefault(target[j][:depth], []).append(_Pair(place, source[i], target[j], kind))
    lists: dict[tuple[Path, str, Path], list[Path]] = {}  # parent, stem, and what all that fills a member is in
    for block, pairs in blocks.items():
        lists.setdefault((block[:-1], stem(block[-1]), _common([pair.own for pair in pairs])), []).append(block)
    found: list[Pairs] = []
    for (_, _, end), members in lists.items():
        for first, second in zip(members[::2], members[1::2], strict=False):
            best = _best(blocks[first], blocks[second], len(first), len(end))
            if best:
                found.append(best)
    return found


def _best(first: Sequence[_Pair], second: Sequence[_Pair], depth: int, end: int) -> Pairs:
    """Find the exchange of a part of one block with a part of another that leaves both of one piece the most.

    Args:
        first: The layers of a block.
        second: Those of another one.
        depth: Of the blocks.
        end: The depth of the module in the source that has what fills both.
    """
    name = first[0].other[depth - 1]
    if not all(len(pair.own) > end + 1 and _is_member(pair.own[end], name) for pair in (*first, *second)):
        return []
    best: Pairs = []
    wholeness = (_wholeness(first, second, end), 0)
    for one, two in product(_parts(first, depth), _parts(second, depth)):
        if [pair.kind for pair in one] != [pair.kind for pair in two]:
            continue
        moved = {p.place: replace(p, own=q.own) for p, q in (*zip(one, two, strict=True), *zip(two, one, strict=True))}
        sides = [[moved.get(pair.place, pair) for pair in block] for block in (first, second)]
        in_order = sum(numbers(p.own[end]) < numbers(q.own[end]) for p, q in zip(sides[0], sides[1], strict=False))
        after = _wholeness(sides[0], sides[1], end), in_order
        if after[0] > wholeness[0] or (best and after > wholeness):
            best, wholeness = [(p.place, q.place) for p, q in zip(one, two, strict=True)], after
    return best


def _is_member(name: str, like: str) -> bool:
    """Tell whether a name is that of a list's member, as another one is."""
    return bool(numbers(name)) and name.isdecimal() == like.isdecimal()


def _parts(block: Sequence[_Pair], depth: int) -> list[_Part]:
    parts: dict[str, list[_Pair]] = {}
    for pair in block:
        parts.setdefault(pair.other[depth], []).append(pair)
    return [tuple(sorted(part, key=lambda pair: (pair.kind, pair.own))) for part in parts.values()]


def _wholeness(first: Sequence[_Pair], second: Sequence[_Pair], end: int) -> int:
    """Measure how far two blocks are each matched to one module."""
    return sum(count**2 for block in (first, second) for count in Counter(pair.own[end] for pair in block).values())


def _common(paths: Sequence[Path]) -> Path:
    """Give what all paths begin with."""
    first, last = min(paths), max(paths)
    return first[: next((depth for depth, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]
