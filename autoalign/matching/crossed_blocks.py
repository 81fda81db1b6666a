"""Crossed blocks: what is matched in each module of the target, and blocks whose parts are matched across.

Two blocks of two equal parts each can be matched straight, block by block, or across: the first parts of both into one
block, the second parts into the other. Votes of the parts for their blocks then confirm one another, and a soft
assignment may converge there. Straight is what leaves blocks whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise, product

from autoalign.matching.assignment import Assignment
from autoalign.matching.features import Ints
from autoalign.matching.layers import Path
from autoalign.plan.keys import common_module, numbers, stem, template

Repair = dict[int, Path]  # place in the assignment -> the layer of the source that it should have

_MAX_CROSSED_BLOCKS = 12  # blocks that are crossed with one another, of which only neighbours are compared


@dataclass(frozen=True, slots=True)
class Pair:
    """A pair of layers in the assignment."""

    place: int
    own: Path  # of the source's layer
    other: Path  # of the target's
    kind: int  # equal where the shapes of both are


Block = Sequence[Pair]
Blocks = Mapping[Path, Block]  # module of the target -> what is matched in it


def shape_pair_ids(assignment: Assignment, kinds: tuple[Ints, Ints]) -> list[int]:
    """Number the pairs so that pairs whose layers have the same shapes on both sides have the same number."""
    own, other = kinds
    alike: Ints = own[assignment.source] * (int(other.max(initial=0)) + 1) + other[assignment.target]
    return list(alike.tolist())


def blocks_of(assignment: Assignment, source: Sequence[Path], target: Sequence[Path], kind_of: Sequence[int]) -> Blocks:
    """List the matched layers of each module of the target; ``kind_of`` are the ``shape_pair_ids`` of the pairs."""
    blocks: dict[Path, list[Pair]] = {}
    chosen = zip(assignment.source.tolist(), assignment.target.tolist(), kind_of, strict=True)
    for place, (i, j, kind) in enumerate(chosen):
        path = target[j]
        pair = Pair(place, source[i], path, kind)
        for depth in range(1, len(path)):
            blocks.setdefault(path[:depth], []).append(pair)
    return blocks


def crossings(blocks: Blocks) -> list[Repair]:
    """Find parts of blocks that are more of one piece when they swap their sources.

    Returns:
        For each swap what its places should have, none of them twice.
    """
    spread: dict[tuple[Path, Path], list[Path]] = {}  # names around, and what all that fills a block is in
    for block, pairs in blocks.items():
        if len(pairs) > 1:
            owns = [pair.own for pair in pairs]
            end = common_module(owns)
            if max(map(len, owns)) > len(end) + 1:
                spread.setdefault((template(block[:-1]), end), []).append(block)
    found: list[Repair] = []
    moved = set[int]()
    for (_, end), modules in spread.items():
        for first, second in combinations(modules, 2) if len(modules) <= _MAX_CROSSED_BLOCKS else pairwise(modules):
            repair = _straightened(blocks[first], blocks[second], len(first), len(end))
            if repair and moved.isdisjoint(repair):
                moved.update(repair)
                found.append(repair)
    return found


def _straightened(first: Block, second: Block, depth: int, end: int) -> Repair:
    """Swap parts of two blocks, one after another, as long as that leaves both more of one piece."""
    repair: Repair = {}
    while best := _straight(first, second, depth, end):
        repair |= best
        first, second = ([replace(p, own=best.get(p.place, p.own)) for p in block] for block in (first, second))
    return repair


def _straight(first: Block, second: Block, depth: int, end: int) -> Repair:
    """Find the swap of a part of one block with a part of another that leaves both of one piece the most.

    ``depth`` is that of the blocks, ``end`` that of the module in the source that holds what fills both.
    """
    before = _wholeness(first, second, end)
    if before == len(first) ** 2 + len(second) ** 2:
        return {}
    homes = [_home(block, other, end) for block, other in ((first, second), (second, first))]
    at_home = homes[0] != homes[1] and None not in homes
    if not at_home and not _are_lists(first, second, depth, end):
        return {}
    parts = [_parts(block, depth, deep=at_home) for block in (first, second)]
    if at_home:
        parts = [[part for part in of if own not in _ends(part, end)] for of, own in zip(parts, homes, strict=True)]
    alike = (
        len({name.isdecimal() for pair in (*first, *second) for name in (pair.other[depth - 1], pair.own[end])}) == 1
    )
    best: Repair = {}
    wholeness = (before, 0)
    for one, two in product(*parts):
        if [pair.kind for pair in one] != [pair.kind for pair in two]:
            continue
        if not (at_home or alike) and any(p.own[end + 1 :] != q.own[end + 1 :] for p, q in zip(one, two, strict=True)):
            continue  # the target might be a list of blocks, and the source one list for each of their parts
        moved = {p.place: replace(p, own=q.own) for p, q in (*zip(one, two, strict=True), *zip(two, one, strict=True))}
        sides = [[moved.get(pair.place, pair) for pair in block] for block in (first, second)]
        in_order = sum(numbers(p.own[end]) < numbers(q.own[end]) for p, q in zip(sides[0], sides[1], strict=False))
        after = _wholeness(sides[0], sides[1], end), in_order
        if after[0] > wholeness[0] or (best and after > wholeness):
            best, wholeness = {place: pair.own for place, pair in moved.items()}, after
    return best


def _home(block: Block, other: Block, end: int) -> str | None:
    """Name the module that fills most of a block, or most of what the other block has nothing to swap for."""
    kinds = {pair.kind for pair in other}
    for pairs in ([pair for pair in block if pair.kind not in kinds], block):
        (name, count), *others = _ends(pairs, end).most_common(2) or [("", 0)]
        if pairs and 2 * count >= len(pairs) and all(count > other for _, other in others):
            return name
    return None


def _are_lists(first: Block, second: Block, depth: int, end: int) -> bool:
    """True if two blocks are members of one list, and what fills them is in members of one."""
    pairs = (*first, *second)
    return all(
        all(map(numbers, names)) and len(set(map(stem, names))) == 1
        for names in ({pair.other[depth - 1] for pair in pairs}, {pair.own[end] for pair in pairs})
    ) and all(len(pair.own) > end + 1 for pair in pairs)


def _parts(block: Block, depth: int, *, deep: bool) -> list[Block]:
    """List the modules and layers in a block, and if ``deep`` those in its modules."""
    parts: dict[Path, list[Pair]] = {}
    for pair in block:
        for end in range(depth + 1, len(pair.other) + 1 if deep else depth + 2):
            parts.setdefault(pair.other[:end], []).append(pair)
    return [sorted(part, key=lambda pair: (pair.kind, pair.own)) for part in parts.values()]


def _ends(block: Block, end: int) -> Counter[str]:
    return Counter(pair.own[end] for pair in block)


def _wholeness(first: Block, second: Block, end: int) -> int:
    """Measure how far two blocks are each matched to one module."""
    return sum(count**2 for block in (first, second) for count in _ends(block, end).values())
