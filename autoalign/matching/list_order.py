"""List order: members of a list that were matched to those of another one in an order that no network has.

Where two lists are matched, their numbers run in one direction, the same in all lists of these names. And where both
have the same numbers, or one those of the other with gaps, a number means the same member on both sides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from math import comb
from operator import attrgetter

from autoalign.matching.crossed_blocks import Block, Blocks, Pair, Repair
from autoalign.matching.layers import Path
from autoalign.plan.keys import common_module, numbers, stem, template

_MIN_NUMBERED_MEMBERS = 3  # members of a list whose numbers tell
_MIN_AGREEING_LISTS = 2  # other lists of the same names that tell the direction of one

_List = tuple[Path, str]  # its parent and the stem of its members
_Members = Mapping[tuple[int, ...], Block]  # of a list of the target, by their numbers
_Homes = Mapping[tuple[int, ...], tuple[int, ...]]  # number of a member -> that of what fills it
_Called = tuple[Path, Path]  # the names of a target's list and of what fills it, without numbers


def disordered(blocks: Blocks) -> Iterator[Repair]:
    """Find lists of equal blocks that are matched in neither direction, or in another one than lists of their names.

    Yields:
        For each list what its places should have instead.
    """
    tops = [pairs for block, pairs in blocks.items() if len(block) == 1]
    layers = {pair.other: [pair] for pairs in tops for pair in pairs}
    numbered: dict[_List, list[tuple[Path, Block]]] = {}
    for block, pairs in (*blocks.items(), *layers.items()):
        if numbers(block[-1]):
            numbered.setdefault((block[:-1], stem(block[-1])), []).append((block, pairs))
    lists: list[tuple[_Called, int, list[_Member]]] = []
    together: Counter[_Called] = Counter()
    for of in numbered.values():
        by_end: dict[Path, list[_Member]] = {}
        for block, pairs in of if len(of) > 1 else ():
            end = pairs[0].own if block == pairs[0].other else common_module([pair.own for pair in pairs])
            place = tuple([number for name in end for number in numbers(name)])
            by_end.setdefault(template(end), []).append(_Member(block, end, place, pairs))
        for names, members in by_end.items():
            if len(members) > 1:
                called, run = (template(of[0][0]), names), _run(members)
                together[called] += sign(run)
                lists.append((called, run, members))
    for called, run, members in lists:
        others = together[called] - sign(run)
        if abs(run) == comb(len(members), 2) and others * sign(run) > -_MIN_AGREEING_LISTS:
            continue  # all are in order
        alike: dict[object, list[_Member]] = {}
        for member in members:
            alike.setdefault(member.content, []).append(member)
        for same in alike.values():
            if len(same) > 1:
                yield _in_order(same, others)


@dataclass(frozen=True, slots=True)
class _Member:
    """A member of a list of the target."""

    path: Path
    end: Path  # the module of the source that holds all that fills it
    place: tuple[int, ...]  # all numbers in the names of that module and those around it
    pairs: Block

    @property
    def numbers(self) -> tuple[int, ...]:
        return numbers(self.path[-1])

    @property
    def content(self) -> object:
        return frozenset([(p.other[len(self.path) :], p.own[len(self.end) :], p.kind) for p in self.pairs])


def _run(members: Sequence[_Member]) -> int:
    """Count the pairs of members that are matched in the order of their numbers, less those in the other order."""
    places = [member.place for member in sorted(members, key=attrgetter("numbers"))]
    return sum((a < b) - (a > b) for a, b in combinations(places, 2))


def sign(value: int) -> int:
    """Return 1, -1 or 0 for a positive number, a negative one or zero."""
    return (value > 0) - (value < 0)


def _in_order(members: Sequence[_Member], others: int) -> Repair:
    """Put what fills the members of a list in the order of its numbers; nothing if it is in order already.

    Args:
        members: Of equal content.
        others: In how many more lists of the same names the numbers run in the same direction than in the other.
    """
    members = sorted(members, key=attrgetter("numbers"))
    places = [member.place for member in members]
    if len(set(places)) < len(places):
        return {}
    is_monotone = places in (sorted(places), sorted(places, reverse=True))
    direction = sign(others) if abs(others) >= _MIN_AGREEING_LISTS else 0 if is_monotone else sign(_run(members))
    wanted = sorted(members, key=lambda member: member.place, reverse=direction < 0)
    if not direction or wanted == members:
        return {}
    return {
        pair.place: (*new.end, *pair.own[len(old.end) :])
        for old, new in zip(members, wanted, strict=True)
        for pair in old.pairs
    }


def misnumbered(blocks: Blocks, source: Sequence[Path]) -> Iterator[Repair]:
    """Find lists whose members have other numbers than what fills them, and could have their own; as ``disordered``.

    Args:
        blocks: What is matched.
        source: The paths of the source's units.
    """
    lists = _lists_in(blocks)
    long = [members for members in lists.values() if len(members) >= _MIN_NUMBERED_MEMBERS]
    numbers_of = _numbers_of(source if long else ())
    for members in long:
        counterpart = _counterpart(members)
        if counterpart and _mean_the_same(set(members), numbers_of[counterpart]):
            yield _by_numbers(members, counterpart)


def _counterpart(members: Mapping[tuple[int, ...], Block], *, of_layers: bool = False) -> _List | None:
    """Name the list of the source that fills most of a list of the target; None if none does.

    Args:
        members: Of the target's list.
        of_layers: Whether layers count as members of the source's list, or modules only.
    """
    votes = Counter(
        [
            (pair.own[:depth], stem(name))
            for block in members.values()
            for pair in block
            for depth, name in enumerate(pair.own if of_layers else pair.own[:-1])
            if numbers(name)
        ]
    )
    size = sum(map(len, members.values()))
    lists = [place for place, count in votes.items() if 2 * count > size]
    return max(lists, key=lambda place: len(place[0]), default=None)


def _mean_the_same(own: set[tuple[int, ...]], other: set[tuple[int, ...]]) -> bool:
    """True if one list has the numbers of the other, from the same one on, or with gaps."""
    less, more = sorted((own, other), key=len)
    if not less <= more:
        return False
    in_row, first = sorted(more), min(less)
    start = in_row.index(first)
    return start == 0 or in_row[start : start + len(less)] != sorted(less)


def _by_numbers(members: Mapping[tuple[int, ...], Block], counterpart: _List) -> Repair:
    """Fill each member of a list from what has its number; nothing where that is so already, or all is in reverse."""
    parent, depth = counterpart[0], len(counterpart[0])
    inside = {
        number: [
            p
            for p in block
            if len(p.own) > depth + 1 and p.own[:depth] == parent and stem(p.own[depth]) == counterpart[1]
        ]
        for number, block in members.items()
    }
    homes = {
        number: Counter(numbers(pair.own[depth]) for pair in block).most_common(1)[0][0]
        for number, block in sorted(inside.items())
        if block
    }
    order = list(homes.values())
    if list(homes) == order or order == sorted(order, reverse=True):
        return {}
    names = {numbers(pair.own[depth]): pair.own[depth] for block in inside.values() for pair in block}
    return {
        pair.place: (*parent, names[number], *pair.own[depth + 1 :])
        for number, block in inside.items()
        for pair in block
        if number in names
    }


def unparallel(blocks: Blocks, paths: tuple[Sequence[Path], Sequence[Path]]) -> Iterator[Repair]:
    """Find lists of one module that are matched member by member otherwise than one beside them that shapes tell.

    A pyramid has a list of layers for what comes from each level, and one for what goes on from it.

    Args:
        blocks: What is matched.
        paths: Of all layers of the source, and of the target.

    Yields:
        As ``disordered``.
    """
    for members, counterpart, homes in _beside(blocks, paths):
        if homes.keys() == members.keys():
            yield _renumbered(members, counterpart, homes)


def _beside(blocks: Blocks, paths: tuple[Sequence[Path], Sequence[Path]]) -> Iterator[tuple[_Members, _List, _Homes]]:
    """List the lists of equal members that are matched otherwise than one of unlike members beside them.

    Both lists have the same numbers, on either side.
    """
    numbered = [_numbers_of(side) for side in paths]
    lists: dict[object, list[tuple[_Members, _List]]] = {}
    for of, members in _lists_in(blocks, of_layers=True).items():
        counterpart = _counterpart(members, of_layers=True) if len(members) > 1 else None
        if counterpart and all(_is_in(pair, counterpart) for block in members.values() for pair in block):
            own, other = numbered[0][counterpart], numbered[1][of]
            key = _around(*of), _around(*counterpart), frozenset(own), frozenset(other)
            lists.setdefault(key, []).append((members, counterpart))
    for beside in lists.values():
        told = [
            (counterpart, _homes(members, counterpart)) for members, counterpart in beside if _kinds_differ(members)
        ]
        for members, counterpart in beside if told else ():
            homes: _Homes = {} if _kinds_differ(members) else _homes(members, counterpart)
            for another, wanted in told:
                if another != counterpart and any(wanted.get(place, home) != home for place, home in homes.items()):
                    yield members, counterpart, wanted
                    break


def _numbers_of(paths: Sequence[Path]) -> dict[_List, set[tuple[int, ...]]]:
    """Collect the numbers that each list has, of modules and of layers."""
    result: dict[_List, set[tuple[int, ...]]] = {}
    for path in paths:
        for depth, name in enumerate(path):
            if numbers(name):
                result.setdefault((path[:depth], stem(name)), set()).add(numbers(name))
    return result


def _lists_in(blocks: Blocks, *, of_layers: bool = False) -> Mapping[_List, _Members]:
    """Group the members of each list of the target, of modules or of layers as well, by their numbers."""
    layers = {pair.other: [pair] for block, pairs in blocks.items() if len(block) == 1 for pair in pairs}
    lists: dict[_List, dict[tuple[int, ...], Block]] = {}
    for path, pairs in (*blocks.items(), *(layers.items() if of_layers else ())):
        if numbers(path[-1]):
            lists.setdefault((path[:-1], stem(path[-1])), {})[numbers(path[-1])] = pairs
    return lists


def _around(parent: Path, name: str) -> Path:
    """Name the module that a list is part of; one whose members have but numbers for names is a module itself."""
    return parent[:-1] if name == stem("0") else parent


def _kinds_differ(members: Mapping[tuple[int, ...], Block]) -> bool:
    kinds = [tuple(sorted(pair.kind for pair in block)) for block in members.values()]
    return len(set(kinds)) == len(kinds)


def _homes(members: _Members, counterpart: _List) -> _Homes:
    """Map each member to the member of the source's list that fills it; nothing where more than one does."""
    depth = len(counterpart[0])
    homes = {number: {numbers(pair.own[depth]) for pair in block} for number, block in members.items()}
    return {number: home.pop() for number, home in homes.items()} if all(len(h) == 1 for h in homes.values()) else {}


def _renumbered(members: _Members, counterpart: _List, homes: _Homes) -> Repair:
    """Fill each member of a list from another member of the source's list."""
    depth = len(counterpart[0])
    return {
        pair.place: (*pair.own[:depth], _with_numbers(pair.own[depth], homes[number]), *pair.own[depth + 1 :])
        for number, block in members.items()
        for pair in block
    }


def _with_numbers(name: str, wanted: Sequence[int]) -> str:
    """Write other numbers into a name.

    >>> _with_numbers("lateral_2", (3,))
    'lateral_3'
    """
    digits = iter(wanted)
    return re.sub(r"\d+", lambda match: str(next(digits, match[0])), name)


def out_of_step(blocks: Blocks, kind_of: Mapping[Path, int], target: Sequence[Path], *, ordered: bool) -> set[int]:
    """Find the places in lists that are matched in a way that no network has: in no order, or across their members.

    Args:
        blocks: What is matched.
        kind_of: Path of a layer of the source -> its kind: equal where all tensors have the same shapes.
        target: The paths of all layers of the target.
        ordered: Whether the order of the target's layers tells anything.

    Returns:
        The places that another member of the source's list could fill as well.
    """
    everything = sorted((pair for block, pairs in blocks.items() if len(block) == 1 for pair in pairs), key=_place)
    result = set[int]()
    for (parent, _), members in _lists_in(blocks, of_layers=True).items():
        counterpart = _counterpart(members) if len(members) > 1 else None
        if counterpart:
            result.update(_across(members, counterpart, kind_of))
            result.update(_beyond(members, len(parent) + 1, counterpart, everything, ordered=ordered))
    for members, _, _ in _beside(blocks, (list(kind_of), target)):
        result.update(pair.place for block in members.values() for pair in block)
    return result


_place = attrgetter("place")


def _is_in(pair: Pair, counterpart: _List) -> bool:
    """True if a layer of the source is in a member of a list."""
    parent, name = counterpart
    return pair.own[: len(parent)] == parent and len(pair.own) > len(parent) and stem(pair.own[len(parent)]) == name


def _across(members: Mapping[tuple[int, ...], Block], counterpart: _List, kind_of: Mapping[Path, int]) -> Iterator[int]:
    """Find the places in a list whose members run in no direction, or could be of one piece and are not.

    Where two members of the source's list fill one of the target's, and only one of them has a layer that no layer of
    the other could stand for, the other one, if it fills another one too, belongs there.
    """
    depth = len(counterpart[0])
    inside = [[pair for pair in block if _is_in(pair, counterpart)] for _, block in sorted(members.items())]
    order = [Counter(numbers(p.own[depth]) for p in block).most_common(1)[0][0] for block in inside if block]
    in_order = order in (sorted(order), sorted(order, reverse=True))
    fills = Counter(name for block in inside for name in {pair.own[depth] for pair in block})
    kinds: dict[str, set[int]] = {}
    for path, kind in kind_of.items():
        if path[:depth] == counterpart[0] and len(path) > depth and path[depth] in fills:
            kinds.setdefault(path[depth], set()).add(kind)
    for block in inside:
        filling = {pair.own[depth] for pair in block}
        needed = {
            (own, other)
            for own, other in permutations(filling, 2)
            if any(pair.own[depth] == own and kind_of[pair.own] not in kinds[other] for pair in block)
        }
        for pair in block:
            own = pair.own[depth]
            rivals = set(fills) - {own}
            if in_order:
                rivals = {other for other in filling if (other, own) in needed and (own, other) not in needed}
                rivals = rivals if fills[own] > 1 else set()
            others = ((*counterpart[0], name, *pair.own[depth + 1 :]) for name in rivals)
            if any(kind_of.get(path) == kind_of[pair.own] for path in others):
                yield pair.place


def _beyond(
    members: Mapping[tuple[int, ...], Block], above: int, counterpart: _List, everything: Block, *, ordered: bool
) -> Iterator[int]:
    """Find the places in a list that could be shifted by one, since a member of the source's list fills another place.

    That is so where a member is filled from elsewhere in turn, or where all that fill them are in no order.

    Args:
        members: Of a list of the target.
        above: The depth of their layers' names within them.
        counterpart: The source's list that fills most of it.
        everything: All that is matched, in the target's order.
        ordered: Whether that order tells anything.
    """
    depth = len(counterpart[0])
    listed = {pair.place for block in members.values() for pair in block}
    foreign = {
        (pair.other[above:], pair.kind) for block in members.values() for pair in block if not _is_in(pair, counterpart)
    }
    alike: dict[tuple[Path, int], list[Pair]] = {}
    for pair in everything:
        if _is_in(pair, counterpart):
            alike.setdefault((pair.own[depth + 1 :], pair.kind), []).append(pair)
    for pairs in alike.values():
        inside = [pair.place in listed for pair in pairs]
        places = [numbers(pair.own[depth]) for pair in pairs]
        if all(inside) or not any(inside):
            continue
        replaced = any((pair.other[above:], pair.kind) in foreign for pair in pairs if pair.place in listed)
        if replaced or (ordered and places not in (sorted(places), sorted(places, reverse=True))):
            yield from [pair.place for pair in pairs]
