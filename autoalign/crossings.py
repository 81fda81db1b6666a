"""Crossings: blocks whose parts were matched into each other's counterparts, and lists that were matched out of order.

Two blocks of two equal parts each can be matched straight, block by block, or across: the first parts of both into one
block, the second parts into the other. Votes of the parts for their blocks then confirm one another, and a soft
assignment may settle there. Straight is what leaves blocks whole. In the same way, the members of a list may be matched
to the right members, in an order that no network has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise, product

from autoalign.graph import Path
from autoalign.matching import Assignment
from autoalign.names import numbers, stem

Pairs = list[tuple[int, int]]  # places in the assignment that exchange their sources, one after the other

_MANY = 12  # blocks that are crossed with one another, of which only neighbours are compared
_ORDERED = 3  # members of a list that have an order


@dataclass(frozen=True, slots=True)
class _Pair:
    """A pair of layers in the assignment."""

    place: int
    own: Path  # of the source's layer
    other: Path  # of the target's
    kind: int  # equal where the shapes of both are


_Block = Sequence[_Pair]


def crossings(
    assignment: Assignment, source: Sequence[Path], target: Sequence[Path], kind_of: Sequence[int]
) -> list[Pairs]:
    """Find parts of blocks that are more of one piece when they exchange their sources.

    Args:
        assignment: The chosen pairs of units.
        source: The paths of the source's units.
        target: The paths of the target's units.
        kind_of: [pairs]: equal where the shapes of both units are.

    Returns:
        For each exchange the places that take part, none of them twice.
    """
    blocks = _blocks(assignment, source, target, kind_of)
    spread: dict[tuple[Path, Path], list[Path]] = {}  # names around, and what all that fills a block is in
    for block, pairs in blocks.items():
        end = _common([pair.own for pair in pairs])
        if any(len(pair.own) > len(end) + 1 for pair in pairs):
            spread.setdefault((tuple(map(stem, block[:-1])), end), []).append(block)
    found: list[Pairs] = []
    moved = set[int]()
    for (_, end), modules in spread.items():
        for first, second in combinations(modules, 2) if len(modules) <= _MANY else pairwise(modules):
            best = _straight(blocks[first], blocks[second], len(first), len(end))
            places = {place for pair in best for place in pair}
            if moved.isdisjoint(places):
                moved |= places
                found += [best] if best else []
    return found


def disordered(
    assignment: Assignment, source: Sequence[Path], target: Sequence[Path], kind_of: Sequence[int]
) -> list[Pairs]:
    """Find lists of equal blocks that are matched to other lists in neither direction; the arguments are as above."""
    blocks = _blocks(assignment, source, target, kind_of)
    lists: dict[object, list[Path]] = {}
    for block, pairs in blocks.items():
        if numbers(block[-1]):
            end = _common([pair.own for pair in pairs])
            shapes = frozenset((pair.other[len(block) :], pair.own[len(end) :], pair.kind) for pair in pairs)
            lists.setdefault((block[:-1], stem(block[-1]), tuple(map(stem, end)), shapes), []).append(block)
    found: list[Pairs] = []
    for members in lists.values():
        if len(members) >= _ORDERED:
            members.sort(key=lambda member: numbers(member[-1]))
            found += _in_order([blocks[member] for member in members])
    return found


def _blocks(
    assignment: Assignment, source: Sequence[Path], target: Sequence[Path], kind_of: Sequence[int]
) -> Mapping[Path, _Block]:
    """List the layers of each module that has several."""
    blocks: dict[Path, list[_Pair]] = {}
    chosen = zip(assignment.source.tolist(), assignment.target.tolist(), kind_of, strict=True)
    for place, (i, j, kind) in enumerate(chosen):
        for depth in range(1, len(target[j])):
            blocks.setdefault(target[j][:depth], []).append(_Pair(place, source[i], target[j], kind))
    return blocks


def _straight(first: _Block, second: _Block, depth: int, end: int) -> Pairs:
    """Find the exchange of a part of one block with a part of another that leaves both of one piece the most.

    Args:
        first: The layers of a block.
        second: Those of another one.
        depth: Of the blocks.
        end: The depth of the module in the source that has what fills both.
    """
    home = [_home(block, end) for block in (first, second)]
    told = home[0] != home[1] and None not in home
    if not told and not _are_lists(first, second, depth, end):
        return []
    parts = [_parts(block, depth, deep=told) for block in (first, second)]
    if told:
        parts = [[part for part in of if own not in _ends(part, end)] for of, own in zip(parts, home, strict=True)]
    best: Pairs = []
    wholeness = (_wholeness(first, second, end), 0)
    for one, two in product(*parts):
        if [pair.kind for pair in one] != [pair.kind for pair in two]:
            continue
        moved = {p.place: replace(p, own=q.own) for p, q in (*zip(one, two, strict=True), *zip(two, one, strict=True))}
        sides = [[moved.get(pair.place, pair) for pair in block] for block in (first, second)]
        in_order = sum(numbers(p.own[end]) < numbers(q.own[end]) for p, q in zip(sides[0], sides[1], strict=False))
        after = _wholeness(sides[0], sides[1], end), in_order
        if after[0] > wholeness[0] or (best and after > wholeness):
            best, wholeness = [(p.place, q.place) for p, q in zip(one, two, strict=True)], after
    return best


def _home(block: _Block, end: int) -> str | None:
    """Name the module that fills at least half of a block, and more than any other does."""
    (name, count), *others = _ends(block, end).most_common(2)
    return name if 2 * count >= len(block) and all(count > other for _, other in others) else None


def _are_lists(first: _Block, second: _Block, depth: int, end: int) -> bool:
    """Tell whether two blocks are members of one list, and what fills them is in members of one.

    Else the target might be a list of blocks, and the source one list for each of their parts.
    """
    names = [block[0].other[depth - 1] for block in (first, second)]
    like = [numbers(name) != () and name.isdecimal() == names[0].isdecimal() for name in names]
    ends = {pair.own[end] for pair in (*first, *second) if len(pair.own) > end + 1}
    return (
        all(like)
        and stem(names[0]) == stem(names[1])
        and all(numbers(name) and name.isdecimal() == names[0].isdecimal() for name in ends)
        and all(len(pair.own) > end + 1 for pair in (*first, *second))
    )


def _parts(block: _Block, depth: int, *, deep: bool) -> list[_Block]:
    """List the modules and layers in a block, and if ``deep`` those in its modules."""
    parts: dict[Path, list[_Pair]] = {}
    for pair in block:
        for end in range(depth + 1, len(pair.other) + 1 if deep else depth + 2):
            parts.setdefault(pair.other[:end], []).append(pair)
    return [sorted(part, key=lambda pair: (pair.kind, pair.own)) for part in parts.values()]


def _ends(block: _Block, end: int) -> Counter[str]:
    return Counter(pair.own[end] for pair in block)


def _wholeness(first: _Block, second: _Block, end: int) -> int:
    """Measure how far two blocks are each matched to one module."""
    return sum(count**2 for block in (first, second) for count in _ends(block, end).values())


def _in_order(members: Sequence[_Block]) -> Iterator[Pairs]:
    """Give the members of a list what fills them in the order of its numbers; nothing if it is in order already."""
    ends = [_common([pair.own for pair in block]) for block in members]
    places = [tuple(number for name in end for number in numbers(name)) for end in ends]
    if len(set(places)) < len(places) or places in (sorted(places), sorted(places, reverse=True)):
        return
    agreed = sum((a < b) - (a > b) for a, b in combinations(places, 2))
    wanted = [ends[places.index(place)] for place in sorted(places, reverse=agreed < 0)]
    at = {pair.place: pair.own for block in members for pair in block}
    holder = {own: place for place, own in at.items()}
    for block, old, new in zip(members, ends, wanted, strict=True):
        exchange = []
        for p, own in ((pair.place, (*new, *pair.own[len(old) :])) for pair in block):
            q, before = holder[own], at[p]
            if p != q:
                at[p], at[q], holder[own], holder[before] = own, before, p, q
                exchange.append((p, q))
        if exchange:
            yield exchange


def _common(paths: Sequence[Path]) -> Path:
    """Give the module that all paths are in."""
    first, last = min(paths), max(paths)
    depth = next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: min(depth, len(first) - 1)]
