"""Directions: short lists of equal modules, which may as well run the other way round.

Long lists of blocks run from the input to the output in every library. Short ones whose members are equal need not;
where the two sides number them otherwise, their order alone decides. And where such a list has one member for each
level of another list beside it, the members do not follow one another: a decoder that begins with the last level is
listed in either direction, and nothing tells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from autoalign.graph import Path
from autoalign.matching import Assignment
from autoalign.names import numbers, stem
from autoalign.units import Part, Unit

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
