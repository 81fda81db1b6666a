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

from autoalign.graph import Path
from autoalign.matching import Assignment
from autoalign.names import numbers, stem
from autoalign.units import Part, Unit

REVERSIBLE = "right shape, but the members of this list are alike, and one side may list them in reverse order"
_SHORT = 6  # members of a list that may as well be in reverse order
_LEVELS = 3  # unlike members from which on a list is one of levels; the last two may be alike

_List = tuple[Path, str]  # its parent and the stem of its members


@dataclass(frozen=True, slots=True)
class Undirected:
    """The pairs that are told apart by the order of a short list."""

    by_order: frozenset[int]  # places of pairs that order decides
    reverse: Mapping[int, int]  # place of a pair whose order says nothing -> its source unit, were the list reversed


@dataclass(frozen=True, slots=True)
class _Lists:
    """The short lists of equal modules of one side."""

    members: Mapping[_List, Sequence[Path]]  # in the order of their numbers
    around: Sequence[Mapping[_List, int]]  # for each layer, the lists that it is in and its place in each
    levels: Sequence[tuple[Path, int]]  # the parents and the lengths of lists of unlike members


def undirected(
    assignment: Assignment,
    source: tuple[Sequence[Unit], Sequence[Part]],
    target: tuple[Sequence[Unit], Sequence[Part]],
) -> Undirected:
    """Find the pairs that only the order of a short list decides, and those that not even it does."""
    pairs = list(zip(assignment.source.tolist(), assignment.target.tolist(), strict=True))
    own, other = _short_lists(*source), _short_lists(*target)
    votes = Counter(
        (a, b)
        for i, j in pairs
        for a in own.around[i]
        for b in other.around[j]
        if len(own.members[a]) == len(other.members[b])
    )
    partner: dict[_List, _List] = {}
    for (a, b), _ in votes.most_common():
        if a not in partner and b not in partner.values():
            partner[a] = b
    unit_at = {unit.path: index for index, unit in enumerate(source[0])}
    by_order: set[int] = set()
    reverse: dict[int, int] = {}
    for place, (i, j) in enumerate(pairs):
        for a, index in own.around[i].items():
            b = partner.get(a)
            if b is None or b not in other.around[j]:
                continue
            members, wanted = own.members[a], other.members[b][other.around[j][b]]
            if numbers(members[index][-1]) == numbers(wanted[-1]):
                continue
            by_order.add(place)
            rest = source[0][i].path[len(members[index]) :]
            mirrored = unit_at.get((*members[-1 - index], *rest))
            beside = _has_levels(a[0], len(members), own) and _has_levels(b[0], len(members), other)
            if beside and mirrored is not None:
                reverse[place] = mirrored
    return Undirected(frozenset(by_order), reverse)


def _short_lists(units: Sequence[Unit], parts: Sequence[Part]) -> _Lists:
    content: dict[Path, set[tuple[Path, tuple[tuple[int, ...], ...]]]] = {}
    counts: dict[Path, int] = {}  # of tensors that each stands for: more in the last member of a list that was cut
    for unit in units:
        shapes = tuple(parts[part].shape for _, part in unit.parts)
        count = parts[unit.parts[0][1]].count
        for depth, name in enumerate(unit.path, start=1):
            if numbers(name):
                content.setdefault(unit.path[:depth], set()).add((unit.path[depth:], shapes))
                counts[unit.path[:depth]] = min(count, counts.get(unit.path[:depth], count))
    lists: dict[_List, list[Path]] = {}
    for member in content:
        lists.setdefault((member[:-1], stem(member[-1])), []).append(member)
    kinds = {key: len({frozenset(content[member]) for member in members}) for key, members in lists.items()}
    short = {
        key: sorted(members, key=lambda member: numbers(member[-1]))
        for key, members in lists.items()
        if 1 < len(members) <= _SHORT and kinds[key] == 1 and len({counts[member] for member in members}) == 1
    }
    place_of = {member: (key, place) for key, members in short.items() for place, member in enumerate(members)}
    around = [
        dict(place_of[unit.path[:depth]] for depth in range(1, len(unit.path)) if unit.path[:depth] in place_of)
        for unit in units
    ]
    levels = [(key[0], len(members)) for key, members in lists.items() if kinds[key] >= max(_LEVELS, len(members) - 1)]
    return _Lists(short, around, levels)


def _has_levels(parent: Path, length: int, lists: _Lists) -> bool:
    """Tell whether a list that is in no other has one of levels beside it: as long, in the same part of the network."""
    return not any(map(numbers, parent)) and any(
        count == length and other[:1] == parent[:1] and (other == parent or other[: len(parent)] != parent)
        for other, count in lists.levels
    )
