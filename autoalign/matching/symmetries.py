"""Symmetries: changes of the assignment that shapes allow; the better ones are made, and the others are doubts.

Blocks that are crossed are straightened, lists are put in order, alike modules are swapped where that fits better.
Where a change would be as good as what is, the pairs that it concerns are ambiguous.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations, pairwise, product

import numpy as np

from autoalign.matching.assignment import Assignment, with_sources
from autoalign.matching.confidence import AMBIGUOUS
from autoalign.matching.features import Floats, Ints, SideFeatures
from autoalign.matching.layers import Part, Path, Unit, Units
from autoalign.matching.list_order import (
    Block,
    Blocks,
    Pair,
    Repair,
    blocks_of,
    disordered,
    lists_of,
    misnumbered,
    out_of_step,
    shape_pair_ids,
    unparallel,
)
from autoalign.matching.swaps import MIN_NAME_GAIN, places_of, swapped, swaps_of
from autoalign.plan.keys import common_module, numbers, stem, template

REVERSIBLE = "right shape, but the members of this list are alike, and one side may list them in reverse order"
_NOTHING_TELLS = "right shape, but nothing tells {} from {}"
_OUT_OF_STEP = "right shape, but its list would be matched in no order, or across its members"
_LEFT_OVER = "right shape, but a module of the same content is left over, and nothing tells which of them it is"

_MAX_SWAP_ROUNDS = 3
_MAX_STRAIGHTENING_ROUNDS = 6
_MAX_CROSSED_BLOCKS = 12  # blocks that are crossed with one another, of which only neighbours are compared
_MAX_NAMED_SIBLINGS = 3  # siblings that differ in a number and are no list of blocks
_MIN_LAYERS_OF_UNUSED = 3  # of a module; rivals of a single layer show in its margin
_MAX_REVERSIBLE_LENGTH = 6  # members of a list that may as well be in reverse order
_MIN_LEVELS = 3  # unlike members from which on a list is one of levels; the last two may be alike

_PathsAndKinds = tuple[Sequence[Path], Ints]  # of the units of a side; kinds are equal where all shapes are
_Side = tuple[Units, Sequence[Part]]
_Members = Mapping[Path, Sequence[int]]  # of a list: each with the layers in it


@dataclass(frozen=True, slots=True)
class Resolved:
    """An assignment in which all changes that are better are made."""

    assignment: Assignment
    caps: Floats  # the confidence that each of its pairs cannot exceed
    doubts: Mapping[int, str]  # place of a pair that is as good another way -> why; its runner-up is that way


def resolve_symmetries(
    assignment: Assignment,
    source: SideFeatures,
    target: SideFeatures,
    kinds: tuple[Ints, Ints],
    fixed: Collection[int] = (),
) -> Resolved:
    """Make the changes that are better, and cap the confidence of pairs for which another one is as good.

    ``kinds`` are, for the units of each side, equal where all tensors have the same kinds and shapes; the matches of
    the ``fixed`` target units do not change.
    """
    fixed_places = {place for place, unit in enumerate(assignment.target.tolist()) if unit in fixed}
    unit_at = {path: unit for unit, path in enumerate(source.paths)}
    alike = shape_pair_ids(assignment, kinds)  # no change alters it

    def repaired(assignment: Assignment, find: Callable[[Blocks], Iterable[Repair]]) -> Assignment:
        for repair in filter(None, find(blocks_of(assignment, source.paths, target.paths, alike))):
            wanted = {place: unit_at.get(path, -1) for place, path in repair.items()}
            assignment = _with_wanted(assignment, wanted, kinds[0], fixed_places)
        return assignment

    for _ in range(_MAX_STRAIGHTENING_ROUNDS):
        before, assignment = assignment, repaired(assignment, crossings)
        if assignment is before:
            break
    assignment = repaired(assignment, partial(misnumbered, source=source.paths))
    assignment = repaired(assignment, disordered)
    assignment = repaired(assignment, partial(unparallel, paths=(source.paths, target.paths)))
    slots = _slots(source.paths), _slots(target.paths)
    for _ in range(_MAX_SWAP_ROUNDS):
        found = swaps_of(assignment, source, target, alike, slots)
        better = [swap for swap in found if swap.is_better and fixed_places.isdisjoint(places_of(swap.pairs))]
        if not better:
            break
        assignment = swapped(assignment, better)
    else:
        found = swaps_of(assignment, source, target, alike, slots)
    caps = np.ones(len(assignment.source), dtype=np.float32)
    rival, doubts = assignment.runner_up.copy(), dict[int, str]()
    for swap in found:
        pairs = [pair for pair in swap.pairs if fixed_places.isdisjoint(pair)]
        places = list(places_of(pairs))
        caps[places] = np.minimum(caps[places], swap.cap)
        if swap.cap > AMBIGUOUS:
            continue
        for p, q in pairs:
            if doubts.keys().isdisjoint((p, q)):
                names = [slots[1][unit] for unit in assignment.target[[p, q]].tolist()]
                doubts[p] = doubts[q] = _NOTHING_TELLS.format(*names)
                rival[[p, q]] = assignment.source[[q, p]]
    sides = (source.paths, kinds[0]), (target.paths, kinds[1])
    crossed = out_of_step(
        blocks_of(assignment, source.paths, target.paths, alike),
        dict(zip(source.paths, kinds[0].tolist(), strict=True)),
        target.paths,
        ordered=target.ordered,
    )
    crossed -= fixed_places
    caps[list(crossed)] = np.minimum(caps[list(crossed)], AMBIGUOUS)
    doubts |= dict.fromkeys(crossed - doubts.keys(), _OUT_OF_STEP)
    left_over = ambiguous_with_unused(assignment, *sides, fixed_places)
    caps[left_over] = AMBIGUOUS
    doubts |= dict.fromkeys(left_over, _LEFT_OVER)
    return Resolved(replace(assignment, runner_up=rival), caps, doubts)


def _slots(paths: Sequence[Path]) -> list[str]:
    """Write the names of layers without the numbers of their lists; numbers of a few siblings stay.

    >>> _slots([("h", str(n), f"norm{k}") for n in range(2) for k in (1, 2)])
    ['h.#.norm1', 'h.#.norm2', 'h.#.norm1', 'h.#.norm2']
    """
    long = {
        member
        for (_, name), members in lists_of(paths).items()
        if name == "#" or len(members) > _MAX_NAMED_SIBLINGS
        for member in members
    }
    return [  # the root has no name
        ".".join([stem(name) if path[: depth + 1] in long else name for depth, name in enumerate(path) if name])
        for path in paths
    ]


def _with_wanted(assignment: Assignment, wanted: Mapping[int, int], kinds: Ints, fixed: set[int]) -> Assignment:
    """Assign the wanted source units to some places, -1 for one that there is not, or change nothing.

    They must be of the same kinds as what is there, and no other place may have them or be fixed to what it has.
    """
    places, units = list(wanted), list(wanted.values())
    chosen = assignment.source.copy()
    chosen[places] = units
    others = set(np.delete(assignment.source, places).tolist())
    if len({-1, *units}) <= len(units) or not others.isdisjoint(units):
        return assignment  # there is no such unit, or more than one place should have it
    moved = np.flatnonzero(chosen != assignment.source)
    if (kinds[chosen] != kinds[assignment.source]).any() or not len(moved) or not fixed.isdisjoint(moved.tolist()):
        return assignment
    return with_sources(assignment, chosen)


def crossings(blocks: Blocks) -> list[Repair]:
    """Find parts of blocks that are more of one piece when they swap their sources.

    Two blocks of two equal parts each can be matched straight, block by block, or across: the first parts of both into
    one block, the second parts into the other. Votes of the parts for their blocks then confirm one another, and a soft
    assignment may converge there. Straight is what leaves blocks whole.

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


def ambiguous_with_unused(
    assignment: Assignment, source: _PathsAndKinds, target: _PathsAndKinds, fixed: set[int]
) -> list[int]:
    """List the places in matched modules for which an unused module with identical shapes fits as well."""
    result = set[int]()
    ways = (
        (source, assignment.source, assignment.target, assignment.names),
        (target, assignment.target, assignment.source, assignment.names.T),
    )
    for side, chosen, others, names in ways:
        place_of = {unit: place for place, unit in enumerate(chosen.tolist())}
        for taken, unused in _alike_siblings(side, place_of):
            places = [place_of[unit] for unit in taken]
            ends = others[places]
            gain = float((names[taken, ends] - names[unused, ends]).mean())
            if gain < MIN_NAME_GAIN and fixed.isdisjoint(places):
                result.update(places)
    return sorted(result)


def _alike_siblings(side: _PathsAndKinds, matched: Collection[int]) -> Iterator[tuple[list[int], list[int]]]:
    """List the units of siblings of the same content of which one is matched as a whole, and the other not at all."""
    paths, kinds = side
    if len(paths) - len(matched) < _MIN_LAYERS_OF_UNUSED:
        return
    below: dict[Path, list[int]] = defaultdict(list)
    for unit, path in enumerate(paths):
        for depth in range(1, len(path)):
            below[path[:depth]].append(unit)
    siblings: dict[Path, tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
    for module, units in below.items():
        if len(units) >= _MIN_LAYERS_OF_UNUSED and len({unit in matched for unit in units}) == 1:
            siblings[module[:-1]][units[0] in matched].append(module)
    content = cache(lambda module: frozenset((paths[unit][len(module) :], int(kinds[unit])) for unit in below[module]))
    for unused, taken in siblings.values():
        for first, second in product(taken, unused):
            is_numbered = numbers(first[-1]) and stem(first[-1]) == stem(second[-1])
            if not is_numbered and content(first) == content(second):
                yield (
                    sorted(below[first], key=paths.__getitem__),
                    sorted(below[second], key=paths.__getitem__),
                )


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
