"""List order: short lists of equal members that one side may number the other way round.

Nothing in their names shows it; where such a list has one of unlike members beside it, as the levels of a pyramid are,
even the order of its numbers is no reason.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, pstdev

from autoalign.matching.assignment import Assignment
from autoalign.matching.layers import Part, Unit, Units, lists_of
from autoalign.matching.paths import Path
from autoalign.plan.keys import numbers

REVERSIBLE = "right shape, but the members of this list are alike, and one side may list them in reverse order"

_MAX_REVERSIBLE_LENGTH = 6  # members of a list that may as well be in reverse order
_MIN_LEVELS = 3  # unlike members from which on a list is one of levels; the last two may be alike
_SHUFFLES = 8
_MIN_DEVIATIONS = 4.0  # of chance, between its agreement and the best one: with less, none can be told from the other
_MIN_AGREEMENT = 0.25  # of the best beyond chance, which is 0; few real pairs in registered order have less

_Side = tuple[Units, Sequence[Part]]
_Members = Mapping[Path, Sequence[int]]  # of a list: each with the layers in it


_Numbers = tuple[int, ...]  # of a name
Renumbering = Sequence[Mapping[int, int] | None]  # of each number in a name; None where it stays


def renumbered(own: Mapping[int, Sequence[_Numbers]], other: Mapping[int, Sequence[_Numbers]]) -> Renumbering:
    """Return how each number in names of the other side becomes one of this side, as members of unique shapes show.

    >>> renumbered({0: [(3,)], 1: [(1,), (2,)]}, {0: [(0,)], 1: [(1,), (2,)]})
    [{0: 3, 1: 2, 2: 1}]

    ``own`` and ``other`` hold the numbers in the names that differ in them alone, by shape. Where what is shown is no
    step nor turn of the whole list, or several, nothing is mapped.
    """
    lengths = {len(each) for names in (*own.values(), *other.values()) for each in names}
    ways: list[Mapping[int, int] | None] = []
    for place in range(lengths.pop()) if len(lengths) == 1 else ():
        sides = [{kind: {each[place] for each in names} for kind, names in side.items()} for side in (own, other)]
        shown = [tuple(side[kind] for side in sides) for kind in sides[0].keys() & sides[1].keys()]
        decided = {(*first, *second) for first, second in shown if len(first) == len(second) == 1}
        known, members = (set().union(*side.values()) for side in sides)
        if all(first == second for first, second in decided):
            ways.append(None)
            continue
        steps = [(sign, {first - sign * second for first, second in decided}) for sign in (1, -1)]
        maps = [
            {k: sign * k + shift for k in members} for sign, shifts in steps if len(shifts) == 1 for shift in shifts
        ]
        fitting = [way for way in maps if known.issuperset(way.values())]
        ways.append(fitting[0] if len(fitting) == 1 else {})
    return ways


@dataclass(frozen=True, slots=True)
class ReversibleLists:
    """The pairs in short lists of equal members, which only the order of the list tells apart."""

    by_order: frozenset[int]  # their places
    reverse: Mapping[int, int]  # place of a pair whose order says nothing -> its source unit, were the list reversed


def reversible_lists(assignment: Assignment, source: _Side, target: _Side) -> ReversibleLists:
    """Find the pairs that only the order of a short list tells apart, and those that not even it does."""
    own = _short_lists(source)
    other = _short_lists(target) if own else []
    if not other:
        return ReversibleLists(frozenset(), {})
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
    return ReversibleLists(frozenset(by_order), reverse)


def _short_lists(side: _Side) -> list[list[Path]]:
    """List the short lists of equal modules, each in the order of its numbers."""
    units, parts = side

    def is_whole(members: _Members) -> bool:
        """True if all stand for as many tensors: more do so in the last member of a list that was cut."""
        return len({min([parts[units[i].parts[0][1]].count for i in below]) for below in members.values()}) == 1

    return [
        sorted(members, key=lambda member: numbers(member[-1]))
        for members in lists_of(units.paths).values()
        if 1 < len(members) <= _MAX_REVERSIBLE_LENGTH
        and any(len(units[below[-1]].path) > len(member) for member, below in members.items())
        and len(_contents(members, side)) == 1
        and is_whole(members)
    ]


def _contents(members: _Members, side: _Side) -> set[frozenset[object]]:
    """Collect what the members of a list consist of: names and shapes."""
    units, parts = side
    shapes = {i: tuple([parts[part].shape for _, part in units[i].parts]) for below in members.values() for i in below}
    return {frozenset([(units[i].path[len(member) :], shapes[i]) for i in below]) for member, below in members.items()}


def _around(units: Sequence[Unit], lists: Sequence[Sequence[Path]]) -> list[dict[int, int]]:
    """Map, for each layer, the lists that it is in to its place in each."""
    place_of = {member: (index, place) for index, members in enumerate(lists) for place, member in enumerate(members)}
    return [
        dict([place_of[above] for depth in range(1, len(unit.path)) if (above := unit.path[:depth]) in place_of])
        for unit in units
    ]


def _levels(side: _Side) -> list[tuple[Path, int]]:
    """List the parents and the lengths of lists of unlike members."""
    return [
        (parent, len(members))
        for (parent, _), members in lists_of(side[0].paths).items()
        if len(_contents(members, side)) >= max(_MIN_LEVELS, len(members) - 1)
    ]


def _has_levels(members: Sequence[Path], levels: Sequence[tuple[Path, int]]) -> bool:
    """True if a list that is in no other has one of levels beside it: as long, in the same part of the network."""
    parent = members[0][:-1]
    return not any(map(numbers, parent)) and any(
        count == len(members) and (other == parent or other[: len(parent)] != parent) for other, count in levels
    )


def have_common_order(first: Sequence[Hashable], second: Sequence[Hashable]) -> bool:
    """Return False if the kinds of layers stand on one side as if at random, as seen from the other.

    How far two orders agree is the length of their longest common subsequence, beyond that of shuffled ones, as a share
    of the longest that there could be. Where that is no more than chance, nothing can be told.

    >>> have_common_order("abcdefghi", "abcdefghi"), have_common_order("abcdefghi", "ehadhbgcf")
    (True, False)
    >>> have_common_order("aaaa", "aaaa")
    True
    """
    if len(set(first)) < 2:
        return True
    draw = random.Random(0)
    by_chance = [_common_length(draw.sample(first, len(first)), second) for _ in range(_SHUFFLES)]
    mean, best = fmean(by_chance), min(len(first), len(second))
    agreed = _common_length(first, second) - mean
    return best - mean < _MIN_DEVIATIONS * pstdev(by_chance) or agreed >= _MIN_AGREEMENT * (best - mean)


def _common_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Return the length of the longest common subsequence, by bits as in Hyyrö, "Bit-parallel LCS-length", 2004.

    >>> _common_length("banana", "atana")
    4
    """
    places: Counter[Hashable] = Counter()
    for place, item in enumerate(first):
        places[item] |= 1 << place
    row = every = (1 << len(first)) - 1
    for item in second:
        kept = row & places[item]
        row = (row + kept | row - kept) & every
    return len(first) - row.bit_count()
