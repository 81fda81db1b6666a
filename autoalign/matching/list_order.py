"""List order: what is matched in each module, and lists that are matched in an order that no network has.

Where two lists are matched, their numbers run in one direction, the same in all lists of these names. And where both
have the same numbers, or one those of the other with gaps, a number means the same member on both sides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain, combinations, permutations
from math import comb
from operator import attrgetter
from typing import NamedTuple

from autoalign.matching.assignment import Assignment
from autoalign.matching.features import Ints
from autoalign.matching.layers import Path
from autoalign.plan.keys import common_module, numbers, stem, template

_MIN_NUMBERED_MEMBERS = 3  # members of a list whose numbers tell
_MIN_AGREEING_LISTS = 2  # other lists of the same names that tell the direction of one

Repair = dict[int, Path]  # place in the assignment -> the layer of the source that it should have


@dataclass(frozen=True, slots=True)
class Pair:
    """A pair of layers in the assignment."""

    place: int
    own: Path  # of the source's layer
    other: Path  # of the target's
    kind: int  # equal where the shapes of both are


Block = Sequence[Pair]
Blocks = Mapping[Path, Block]  # module of the target -> what is matched in it

_List = tuple[Path, str]  # its parent and the stem of its members
_Numbers = tuple[int, ...]  # of the name of a member
_Members = Mapping[_Numbers, Block]  # of a list of the target
_Homes = Mapping[_Numbers, _Numbers]  # of a member -> of the member of the source's list that fills it


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


def lists_of(paths: Sequence[Path]) -> dict[_List, dict[Path, list[int]]]:
    """Group the members of each list, of modules and of layers, and the places of the layers in each.

    >>> lists_of([("h", "0", "fc"), ("h", "1", "fc")])
    {(('h',), '#'): {('h', '0'): [0], ('h', '1'): [1]}}
    """
    lists: dict[_List, dict[Path, list[int]]] = {}
    for place, path in enumerate(paths):
        for depth, name in enumerate(path):
            if numbers(name):
                members = lists.setdefault((path[:depth], stem(name)), {})
                members.setdefault(path[: depth + 1], []).append(place)
    return lists


def disordered(blocks: Blocks) -> Iterator[Repair]:
    """Find lists of equal blocks that are matched in neither direction, or in another one than lists of their names.

    Yields:
        For each list what its places should have instead.
    """
    lists: list[tuple[tuple[Path, str, Path], int, int, list[_Member]]] = []
    together: Counter[tuple[Path, str, Path]] = Counter()  # names of a list and of what fills it -> its direction
    for (parent, name), of in _numbered(blocks, of_layers=True).items():
        depth = len(parent) + 1
        by_end: dict[Path, list[_Member]] = {}
        for number, pairs in of:
            end = pairs[0].own if len(pairs[0].other) == depth else common_module([pair.own for pair in pairs])
            place = tuple([number for name in end for number in numbers(name)])
            by_end.setdefault(template(end), []).append(_Member(number, end, place, pairs))
        for ends, members in by_end.items():
            if len(members) > 1:
                called, run = (template(parent), name, ends), _run(members)
                together[called] += sign(run)
                lists.append((called, depth, run, members))
    for called, depth, run, members in lists:
        others = together[called] - sign(run)
        if abs(run) == comb(len(members), 2) and others * sign(run) > -_MIN_AGREEING_LISTS:
            continue  # all are in order
        alike: dict[object, list[_Member]] = {}
        for member in members:
            content = frozenset([(p.other[depth:], p.own[len(member.end) :], p.kind) for p in member.pairs])
            alike.setdefault(content, []).append(member)
        for same in alike.values():
            yield _in_order(same, others)


class _Member(NamedTuple):
    """A member of a list of the target."""

    number: _Numbers
    end: Path  # the module of the source that holds all that fills it
    place: _Numbers  # all numbers in the names of that module and those around it
    pairs: Block


def _run(members: Sequence[_Member]) -> int:
    """Count the pairs of members that are matched in the order of their numbers, less those in the other order."""
    in_order = sorted(members, key=attrgetter("number"))
    return sum((a.place < b.place) - (a.place > b.place) for a, b in combinations(in_order, 2))


def sign(value: int) -> int:
    """Return 1, -1 or 0 for a positive number, a negative one or zero."""
    return (value > 0) - (value < 0)


def _in_order(members: Sequence[_Member], others: int) -> Repair:
    """Put what fills members of equal content in the order of their numbers; nothing if it is in order already.

    In ``others`` more lists of the same names the numbers run in the same direction than in the other.
    """
    members = sorted(members, key=attrgetter("number"))
    if len({member.place for member in members}) < len(members):
        return {}
    direction = sign(others) if abs(others) >= _MIN_AGREEING_LISTS else sign(_run(members))
    wanted = sorted(members, key=attrgetter("place"), reverse=direction < 0)
    if not direction or wanted == members:
        return {}
    return {
        pair.place: (*new.end, *pair.own[len(old.end) :])
        for old, new in zip(members, wanted, strict=True)
        for pair in old.pairs
    }


def misnumbered(blocks: Blocks, source: Sequence[Path]) -> Iterator[Repair]:
    """Find lists whose members have other numbers than what fills them, and could have their own; as ``disordered``."""
    long = [members for members in _lists_in(blocks).values() if len(members) >= _MIN_NUMBERED_MEMBERS]
    names = _member_names(source if long else ())
    for members in long:
        counterpart = _counterpart(members)
        if counterpart and _mean_the_same(members.keys(), names[counterpart].keys()):
            yield _by_numbers(members, counterpart)


def _counterpart(members: _Members, *, of_layers: bool = False) -> _List | None:
    """Return the source's list, of modules or of layers as well, that fills most of a list of the target."""
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


def _mean_the_same(own: Set[_Numbers], other: Set[_Numbers]) -> bool:
    """True if one list has the numbers of the other, from the same one on, or with gaps."""
    less, more = sorted(own), sorted(other)
    if len(less) > len(more):
        less, more = more, less
    if not set(less) <= set(more):
        return False
    start = more.index(less[0])
    return start == 0 or more[start : start + len(less)] != less


def _by_numbers(members: _Members, counterpart: _List) -> Repair:
    """Fill each member of a list from what has its number; nothing where that is so already, or all is in reverse."""
    depth = len(counterpart[0])
    inside = {
        number: [pair for pair in block if _is_in(pair, counterpart) and len(pair.own) > depth + 1]
        for number, block in members.items()
    }
    homes = {number: _mostly_from(block, depth) for number, block in sorted(inside.items()) if block}
    order = list(homes.values())
    if list(homes) == order or order == sorted(order, reverse=True):
        return {}
    return _moved(inside, depth, {numbers(pair.own[depth]): pair.own[depth] for of in inside.values() for pair in of})


def _mostly_from(block: Block, depth: int) -> _Numbers:
    """Return the member of the source's list that fills most of a block."""
    return Counter(numbers(pair.own[depth]) for pair in block).most_common(1)[0][0]


def _moved(members: _Members, depth: int, names: Mapping[_Numbers, str]) -> Repair:
    """Fill each member of a list from the member of the source's list whose name is given for its number."""
    return {
        pair.place: (*pair.own[:depth], names[number], *pair.own[depth + 1 :])
        for number, block in members.items()
        if number in names
        for pair in block
    }


def unparallel(blocks: Blocks, paths: tuple[Sequence[Path], Sequence[Path]]) -> Iterator[Repair]:
    """Find lists of one module that are matched member by member otherwise than one beside them that shapes tell.

    A pyramid has a list of layers for what comes from each level, and one for what goes on from it. ``paths`` are those
    of all layers of the source, and of the target. Yields as ``disordered``.
    """
    names = _member_names(paths[0])
    for members, counterpart, homes in _beside(blocks, paths):
        if homes.keys() == members.keys():
            wanted = {number: names[counterpart][home] for number, home in homes.items()}
            yield _moved(members, len(counterpart[0]), wanted)


def _beside(blocks: Blocks, paths: tuple[Sequence[Path], Sequence[Path]]) -> Iterator[tuple[_Members, _List, _Homes]]:
    """List the lists of equal members that are matched otherwise than one of unlike members beside them.

    Both lists have the same numbers, on either side.
    """
    numbered = [_member_names(side) for side in paths]
    lists: dict[object, list[tuple[_Members, _List]]] = {}
    for of, members in _lists_in(blocks, of_layers=True).items():
        counterpart = _counterpart(members, of_layers=True) if len(members) > 1 else None
        if counterpart and all(_is_in(pair, counterpart) for block in members.values() for pair in block):
            same = frozenset(numbered[0][counterpart]), frozenset(numbered[1][of])
            lists.setdefault((_around(*of), _around(*counterpart), *same), []).append((members, counterpart))
    for beside in lists.values():
        unlike = [(counterpart, _homes(members, counterpart)) for members, counterpart in beside if _differ(members)]
        for members, counterpart in beside if unlike else ():
            homes = {} if _differ(members) else _homes(members, counterpart)
            for another, wanted in unlike:
                if another != counterpart and any(wanted.get(place, home) != home for place, home in homes.items()):
                    yield members, counterpart, wanted
                    break


def _member_names(paths: Sequence[Path]) -> dict[_List, dict[_Numbers, str]]:
    """Map, for each list of modules or layers, the numbers of its members to their names."""
    return {of: {numbers(path[-1]): path[-1] for path in members} for of, members in lists_of(paths).items()}


def _numbered(blocks: Blocks, *, of_layers: bool = False) -> Mapping[_List, Sequence[tuple[_Numbers, Block]]]:
    """Group the members of each list of the target, of modules or of layers as well, with their numbers."""
    layers = {pair.other: [pair] for block, pairs in blocks.items() if len(block) == 1 for pair in pairs}
    lists: dict[_List, list[tuple[_Numbers, Block]]] = {}
    for path, pairs in (*blocks.items(), *(layers.items() if of_layers else ())):
        if numbers(path[-1]):
            lists.setdefault((path[:-1], stem(path[-1])), []).append((numbers(path[-1]), pairs))
    return lists


def _lists_in(blocks: Blocks, *, of_layers: bool = False) -> Mapping[_List, _Members]:
    """As ``_numbered``, where a layer stands for the module of its name."""
    return {of: dict(members) for of, members in _numbered(blocks, of_layers=of_layers).items()}


def _around(parent: Path, name: str) -> Path:
    """Name the module that a list is part of; one whose members have but numbers for names is a module itself."""
    return parent[:-1] if name == stem("0") else parent


def _differ(members: _Members) -> bool:
    """True if the shapes in the members of a list tell them apart."""
    kinds = [tuple(sorted(pair.kind for pair in block)) for block in members.values()]
    return len(set(kinds)) == len(kinds)


def _homes(members: _Members, counterpart: _List) -> _Homes:
    """Map each member to the member of the source's list that fills it; nothing where more than one does."""
    depth = len(counterpart[0])
    homes = {number: {numbers(pair.own[depth]) for pair in block} for number, block in members.items()}
    return {number: home.pop() for number, home in homes.items()} if all(len(h) == 1 for h in homes.values()) else {}


def out_of_step(blocks: Blocks, kind_of: Mapping[Path, int], target: Sequence[Path], *, ordered: bool) -> set[int]:
    """Find the places in lists that are matched in a way that no network has: in no order, or across their members.

    Another member of the source's list could fill them as well. ``kind_of`` maps the layers of the source to numbers,
    equal where all shapes are; ``target`` are all layers of the target, ``ordered`` if they come in the order of
    registration.
    """
    tops = (pairs for block, pairs in blocks.items() if len(block) == 1)
    everything = sorted(chain.from_iterable(tops), key=attrgetter("place"))
    result = set[int]()
    for (parent, _), members in _lists_in(blocks, of_layers=True).items():
        counterpart = _counterpart(members) if len(members) > 1 else None
        if counterpart:
            result.update(_across(members, counterpart, kind_of))
            result.update(_beyond(members, len(parent) + 1, counterpart, everything, ordered=ordered))
    for members, _, _ in _beside(blocks, (list(kind_of), target)):
        result.update(pair.place for block in members.values() for pair in block)
    return result


def _is_in(pair: Pair, counterpart: _List) -> bool:
    """True if a layer of the source is in a member of a list."""
    parent, name = counterpart
    return pair.own[: len(parent)] == parent and len(pair.own) > len(parent) and stem(pair.own[len(parent)]) == name


def _across(members: _Members, counterpart: _List, kind_of: Mapping[Path, int]) -> Iterator[int]:
    """Find the places in a list whose members run in no direction, or could be of one piece and are not.

    Where two members of the source's list fill one of the target's, and only one of them has a layer that no layer of
    the other could stand for, the other one, if it fills another one too, belongs there.
    """
    depth = len(counterpart[0])
    inside = [[pair for pair in block if _is_in(pair, counterpart)] for _, block in sorted(members.items())]
    order = [_mostly_from(block, depth) for block in inside if block]
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


def _beyond(members: _Members, above: int, counterpart: _List, everything: Block, *, ordered: bool) -> Iterator[int]:
    """Find the places in a list that could be shifted by one, since a member of the source's list fills another place.

    That is so where a member is filled from elsewhere in turn, or where all that fill them are in no order.
    ``everything`` that is matched is in the target's order; names in the list's members begin at the depth ``above``.
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
