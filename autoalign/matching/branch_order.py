"""Crossings: blocks whose parts were matched into each other's counterparts.

Two blocks of two equal parts each can be matched straight, block by block, or across: the first parts of both into one
block, the second parts into the other. Votes of the parts for their blocks then confirm one another, and a soft
assignment may settle there. Straight is what leaves blocks whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, pairwise, product

from autoalign.matching.assignment import Assignment
from autoalign.matching.layers import Part, Path, Unit
from autoalign.matching.names import ordinal
from autoalign.plan.keys import numbers, stem


def parting(first: Path, second: Path) -> tuple[Path, Path] | None:
    """Cut two paths after the first component in which they differ."""
    depth = shared(first, second)
    return None if depth == min(len(first), len(second)) else (first[: depth + 1], second[: depth + 1])


_LATE = (9,)  # the ordinal from which on a layer is one of the last of its block


def ordinals_agree(source: tuple[Path, Path], target: tuple[Path, Path]) -> int:
    """Tell the same of what comes first by a word on one side (``pre``, ``post``) and a word or number on the other."""
    own, other = (_places_in_block(parting(*side) or side) for side in (source, target))
    if not (_differ(own) or _differ(other)):
        return 0
    own = own if _differ(own) else [numbers(path[-1]) for path in source]
    other = other if _differ(other) else [numbers(path[-1]) for path in target]
    if not (_differ(own) and _differ(other)):
        return 0
    return 1 if (own[0] < own[1]) == (other[0] < other[1]) else -1


def _places_in_block(pair: tuple[Path, Path]) -> list[tuple[int, ...]]:
    """Tell the places of two modules by their names; one without comes before what is called the last."""
    places = [ordinal(path[-1]) for path in pair]
    return [place or ((0,) if max(places) >= _LATE else ()) for place in places]


def _differ(places: Sequence[tuple[int, ...]]) -> bool:
    return all(places) and places[0] != places[1]


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


def crossings(blocks: Blocks) -> list[Repair]:
    """Find parts of blocks that are more of one piece when they exchange their sources.

    Returns:
        For each exchange what its places should have, none of them twice.
    """
    spread: dict[tuple[Path, Path], list[Path]] = {}  # names around, and what all that fills a block is in
    for block, pairs in blocks.items():
        if len(pairs) > 1:
            owns = [pair.own for pair in pairs]
            end = common(owns)
            if max(map(len, owns)) > len(end) + 1:
                spread.setdefault((tuple(map(stem, block[:-1])), end), []).append(block)
    found: list[Repair] = []
    moved = set[int]()
    for (_, end), modules in spread.items():
        for first, second in combinations(modules, 2) if len(modules) <= _MAX_CROSSED_BLOCKS else pairwise(modules):
            repair = _straightened(blocks[first], blocks[second], len(first), len(end))
            if repair and moved.isdisjoint(repair):
                moved.update(repair)
                found.append(repair)
    return found


def blocks_of(assignment: Assignment, source: Sequence[Path], target: Sequence[Path], kind_of: Sequence[int]) -> Blocks:
    """List the layers of each module of the target that is matched.

    Args:
        assignment: The chosen pairs of units.
        source: The paths of the source's units.
        target: The paths of the target's units.
        kind_of: [pairs]: equal where the shapes of both units are.
    """
    blocks: dict[Path, list[Pair]] = {}
    chosen = zip(assignment.source.tolist(), assignment.target.tolist(), kind_of, strict=True)
    for place, (i, j, kind) in enumerate(chosen):
        path = target[j]
        pair = Pair(place, source[i], path, kind)
        for depth in range(1, len(path)):
            blocks.setdefault(path[:depth], []).append(pair)
    return blocks


def _straightened(first: Block, second: Block, depth: int, end: int) -> Repair:
    """Exchange parts of two blocks, one after another, as long as that leaves both more of one piece."""
    repair: Repair = {}
    while best := _straight(first, second, depth, end):
        repair |= best
        first, second = ([replace(p, own=best.get(p.place, p.own)) for p in block] for block in (first, second))
    return repair


def _straight(first: Block, second: Block, depth: int, end: int) -> Repair:
    """Find the exchange of a part of one block with a part of another that leaves both of one piece the most.

    Args:
        first: The layers of a block.
        second: Those of another one.
        depth: Of the blocks.
        end: The depth of the module in the source that has what fills both.
    """
    before = _wholeness(first, second, end)
    if before == len(first) ** 2 + len(second) ** 2:
        return {}
    home = [_home(block, other, end) for block, other in ((first, second), (second, first))]
    told = home[0] != home[1] and None not in home
    if not told and not _are_lists(first, second, depth, end):
        return {}
    parts = [_parts(block, depth, deep=told) for block in (first, second)]
    if told:
        parts = [[part for part in of if own not in _ends(part, end)] for of, own in zip(parts, home, strict=True)]
    alike = (
        len({name.isdecimal() for pair in (*first, *second) for name in (pair.other[depth - 1], pair.own[end])}) == 1
    )
    best: Repair = {}
    wholeness = (before, 0)
    for one, two in product(*parts):
        if [pair.kind for pair in one] != [pair.kind for pair in two]:
            continue
        if not (told or alike) and any(p.own[end + 1 :] != q.own[end + 1 :] for p, q in zip(one, two, strict=True)):
            continue  # the target might be a list of blocks, and the source one list for each of their parts
        moved = {p.place: replace(p, own=q.own) for p, q in (*zip(one, two, strict=True), *zip(two, one, strict=True))}
        sides = [[moved.get(pair.place, pair) for pair in block] for block in (first, second)]
        in_order = sum(numbers(p.own[end]) < numbers(q.own[end]) for p, q in zip(sides[0], sides[1], strict=False))
        after = _wholeness(sides[0], sides[1], end), in_order
        if after[0] > wholeness[0] or (best and after > wholeness):
            best, wholeness = {place: pair.own for place, pair in moved.items()}, after
    return best


def _home(block: Block, other: Block, end: int) -> str | None:
    """Name the module that fills most of a block, or most of what the other block has nothing to exchange for."""
    kinds = {pair.kind for pair in other}
    for pairs in ([pair for pair in block if pair.kind not in kinds], block):
        (name, count), *others = _ends(pairs, end).most_common(2) or [("", 0)]
        if pairs and 2 * count >= len(pairs) and all(count > other for _, other in others):
            return name
    return None


def _are_lists(first: Block, second: Block, depth: int, end: int) -> bool:
    """Tell whether two blocks are members of one list, and what fills them is in members of one."""
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


def common(paths: Sequence[Path]) -> Path:
    """Give the module that all paths are in."""
    first = min(paths)
    return first[: min(shared(first, max(paths)), len(first) - 1)]


def shared(first: Path, second: Path) -> int:
    """Count the components that two paths begin with alike."""
    depth = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        depth += 1
    return depth


REVERSIBLE = "right shape, but the members of this list are alike, and one side may list them in reverse order"
_SHORT = 6  # members of a list that may as well be in reverse order
_LEVELS = 3  # unlike members from which on a list is one of levels; the last two may be alike

_Side = tuple[Sequence[Unit], Sequence[Part]]
_Members = Mapping[Path, Sequence[int]]  # of a list: each with the layers in it


@dataclass(frozen=True, slots=True)
class Undirected:
    """The pairs that are told apart by the order of a short list."""

    by_order: frozenset[int]  # places of pairs that order decides
    reverse: Mapping[int, int]  # place of a pair whose order says nothing -> its source unit, were the list reversed


def undirected(assignment: Assignment, source: _Side, target: _Side) -> Undirected:
    """Find the pairs that only the order of a short list decides, and those that not even it does."""
    own = _short_lists(source)
    other = _short_lists(target) if own else []
    if not other:
        return Undirected(frozenset(), {})
    around = _around(source[0], own), _around(target[0], other)
    pairs = list(zip(assignment.source.tolist(), assignment.target.tolist(), strict=True))
    votes = Counter(
        (a, b) for i, j in pairs for a in around[0][i] for b in around[1][j] if len(own[a]) == len(other[b])
    )
    partner: dict[int, int] = {}
    for (a, b), _ in votes.most_common():
        if a not in partner and b not in partner.values():
            partner[a] = b
    unit_at = {unit.path: index for index, unit in enumerate(source[0])}
    by_order: set[int] = set()
    reverse: dict[int, int] = {}
    levels = cache(lambda: (_levels(source), _levels(target)))
    for place, (i, j) in enumerate(pairs):
        for a, index in around[0][i].items():
            b = partner.get(a)
            if b is None or b not in around[1][j]:
                continue
            member, wanted = own[a][index], other[b][around[1][j][b]]
            if numbers(member[-1]) == numbers(wanted[-1]):
                continue
            by_order.add(place)
            mirrored = unit_at.get((*own[a][-1 - index], *source[0][i].path[len(member) :]))
            if mirrored is not None and all(map(_has_levels, (own[a], other[b]), levels())):
                reverse[place] = mirrored
    return Undirected(frozenset(by_order), reverse)


def _lists(units: Sequence[Unit]) -> dict[tuple[Path, str], _Members]:
    """List the lists of a side, each by its parent and the stem of its members."""
    lists: dict[tuple[Path, str], dict[Path, list[int]]] = {}
    for index, unit in enumerate(units):
        for depth, name in enumerate(unit.path):
            if numbers(name):
                members = lists.setdefault((unit.path[:depth], stem(name)), {})
                members.setdefault(unit.path[: depth + 1], []).append(index)
    return {key: members for key, members in lists.items() if len(members) > 1}


def _short_lists(side: _Side) -> list[list[Path]]:
    """List the short lists of equal modules, each in the order of its numbers."""
    units, parts = side

    def is_whole(members: _Members) -> bool:
        """Tell whether all stand for as many tensors: more do so in the last member of a list that was cut."""
        return len({min([parts[units[i].parts[0][1]].count for i in below]) for below in members.values()}) == 1

    return [
        sorted(members, key=lambda member: numbers(member[-1]))
        for members in _lists(units).values()
        if len(members) <= _SHORT
        and any(len(units[below[-1]].path) > len(member) for member, below in members.items())
        and len({len(below) for below in members.values()}) == 1
        and len(_contents(members, side)) == 1
        and is_whole(members)
    ]


def _contents(members: _Members, side: _Side) -> set[frozenset[object]]:
    """Collect what the members of a list consist of: names and shapes."""
    units, parts = side
    shapes = {i: tuple([parts[part].shape for _, part in units[i].parts]) for below in members.values() for i in below}
    return {frozenset([(units[i].path[len(member) :], shapes[i]) for i in below]) for member, below in members.items()}


def _around(units: Sequence[Unit], lists: Sequence[Sequence[Path]]) -> list[dict[int, int]]:
    """Tell for each layer in which lists it is, and its place in each."""
    place_of = {member: (index, place) for index, members in enumerate(lists) for place, member in enumerate(members)}
    return [
        dict([place_of[above] for depth in range(1, len(unit.path)) if (above := unit.path[:depth]) in place_of])
        for unit in units
    ]


def _levels(side: _Side) -> list[tuple[Path, int]]:
    """List the parents and the lengths of lists of unlike members."""
    return [
        (parent, len(members))
        for (parent, _), members in _lists(side[0]).items()
        if len(_contents(members, side)) >= max(_LEVELS, len(members) - 1)
    ]


def _has_levels(members: Sequence[Path], levels: Sequence[tuple[Path, int]]) -> bool:
    """Tell whether a list that is in no other has one of levels beside it: as long, in the same part of the network."""
    parent = members[0][:-1]
    return not any(map(numbers, parent)) and any(
        count == len(members) and other[:1] == parent[:1] and (other == parent or other[: len(parent)] != parent)
        for other, count in levels
    )
