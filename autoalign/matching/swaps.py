"""Swaps: modules that could take each other's place, and what tells that they must not.

A score measures a pair against its rivals one at a time. Where two modules have the same shapes below them, all of
their layers could be swapped at once, and where they stand in every block, in every block at once: then structure and
pooled evidence would say the same as before. What is left to tell them apart is what does not depend on the matching:
names, numbers, order, and other places where one of them stands without the other.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, combinations, pairwise
from operator import add, sub

import numpy as np

from autoalign.matching.assignment import Assignment, with_sources
from autoalign.matching.confidence import AMBIGUOUS, INFERRED
from autoalign.matching.features import SideFeatures
from autoalign.matching.layers import Path, block_around
from autoalign.matching.list_order import sign
from autoalign.matching.names import likeness, ordinal, words
from autoalign.matching.vocabulary import ROLES
from autoalign.plan.keys import common_prefix, numbers, stem, template

MIN_NAME_GAIN = 0.05  # how much better names must fit one way than the other to tell anything
_ROLE_GAIN = 0.5  # what it tells that only one way matches a query, a key or a value to one
_MODULE_NAME_WEIGHT = 0.5  # of the own names of two modules beside those of the layers in them
_MAX_UNPAIRED_SHARE = 0.5  # of the layers of two modules: those that have no counterpart in the other
_MAX_UNPAIRED_SHARE_OF_BRANCHES = 0.9  # the same for layers of the same names in members of one list
_MAX_LIST_COMPARED = 6  # members of a list that are all compared: they may be branches rather than blocks
_MAX_SIBLINGS_COMPARED = 12  # siblings of unlike content that are compared; of twice as many, neighbours only
_FIRST_LATE_ORDINAL = (9,)  # from which on a layer is one of the last of its block

_STEP = re.compile(r"(?<=\d)_(?=\d)")  # in "branch2_0": a branch, and a step of it

Pairs = tuple[tuple[int, int], ...]  # places in the assignment that would swap their sources
_Numbers = tuple[int, ...]  # of the name of a member of a list
_Run = Mapping[_Numbers, _Numbers]  # members of a list of the target -> those of the source's that they have
_Key = tuple[Path, ...]  # of two modules and of what they are matched to, without numbers


@dataclass(frozen=True, slots=True)
class Swap:
    """All swaps of one kind: the same two modules in every block that has them."""

    pairs: Pairs
    anchors: int  # layers that only one of the two has: how many more are matched to the same place as these than not
    is_list: bool  # whether the two are members of one numbered list, on both sides
    names: float  # how much better the names fit as they are, in about [-2, 2]
    numbers: int  # whether the numbers of the two agree as they are: 1, when swapped: -1, or neither: 0
    order: int  # whether their order is the same on both sides: 1, the other way round: -1, or says nothing: 0
    elsewhere: int  # pairs of layers of the same names that cannot be swapped and are matched likewise
    ordinals: int  # whether ordinals in their names agree: 1, speak for the swap: -1, or say nothing: 0
    mirrored: int  # how many more of the same modules are matched the other way round than this way
    is_led: bool  # whether the other members of the list tell that it runs the other way round
    is_shifted: bool  # whether they tell by how much its numbers differ from the source's

    @property
    def is_better(self) -> bool:
        """True if what tells the two apart says that they should be swapped."""
        if self.is_shifted:
            return self.order < 0
        if self.is_led:
            return self.order < 0 and self.names < MIN_NAME_GAIN
        if self.numbers > 0:
            return False
        if self.anchors < 0:
            return self.names < MIN_NAME_GAIN
        fits_better = self.names < -MIN_NAME_GAIN
        if self.names < MIN_NAME_GAIN:
            fits_better |= self.mirrored > 0 and self.order <= 0 and not self.is_list
            fits_better |= self.order == 0 and min(self.numbers, self.ordinals) < 0
            fits_better |= self.is_list and self.numbers == 0 and self.order < 0
        return fits_better and self.elsewhere <= 0 and self.anchors == 0

    @property
    def cap(self) -> float:
        """The most that the matches as they are may be believed, in [0, 1]."""
        if self.is_shifted and self.order > 0:
            return 1.0
        if self.names < -MIN_NAME_GAIN and min(self.numbers, self.anchors) >= 0 < max(self.numbers, self.anchors):
            return INFERRED  # names speak for the swap, and what they stand in against it
        if self.numbers < 0 or self.anchors < 0 or self.names < -MIN_NAME_GAIN:
            return AMBIGUOUS
        if self.names >= MIN_NAME_GAIN or self.elsewhere > 0 or self.anchors > 0 or self.numbers > 0:
            return 1.0
        if self.order + self.ordinals > 0:
            return 1.0 if self.order > 0 and (self.is_list or self.ordinals > 0) else INFERRED
        return AMBIGUOUS


@dataclass(frozen=True, slots=True)
class Instance:
    """One swap of two modules of the target, or of two of its layers."""

    modules: tuple[Path, Path]
    ends: tuple[Path, Path]  # the modules of the source that they are matched to, as far as these differ
    pairs: Pairs
    anchors: int


def _instances(
    source: Sequence[Path], target: Sequence[Path], alike: Sequence[int], below: Mapping[Path, Sequence[int]]
) -> Iterator[Instance]:
    """List pairs of target modules that share most shapes below, and of layers of one block that have the same.

    All but ``below``, the places below each module and layer of the target, is given for each place of the assignment:
    the layers of both sides, and what is alike where their shapes are.
    """
    layers: dict[tuple[Path, int], list[Path]] = {}
    for place, path in enumerate(target):
        layers.setdefault((block_around(path), alike[place]), []).append(path)
    siblings: dict[Path, list[Path]] = {}
    for module in below:
        siblings.setdefault(module[:-1], []).append(module)
    place_of = {path: place for place, path in enumerate(target)}
    kinds = {module: {alike[place] for place in places} for module, places in below.items()}

    def instances(
        first: Path, second: Path, pairs: Sequence[tuple[int, int]], rest: Sequence[int], top: Path
    ) -> Iterator[Instance]:
        by_ends: dict[tuple[Path, Path], list[tuple[int, int]]] = {}  # some may be swapped and others not
        for a, b in pairs:
            ends = _cut_apart(source[a], source[b])
            if ends is not None:
                by_ends.setdefault(ends, []).append((a, b))
        for ends, places in by_ends.items():
            anchors = 0
            for place in rest:
                path, own = source[place], target[place][: len(top)] == top
                inside = _inside(path, ends)
                anchors += (inside[0] - inside[1]) * (1 if own else -1)
            yield Instance((first, second), ends, tuple(places), anchors)

    def content(module: Path) -> tuple[int, ...]:
        return tuple(sorted([alike[place] for place in below[module]]))

    for modules in siblings.values():
        for first, second in _compared(modules, content) if len(modules) > 1 else ():
            if kinds[first].isdisjoint(kinds[second]):
                continue
            pairs, rest = _counterparts(first, second, below, target, alike)
            if len(rest) > _MAX_UNPAIRED_SHARE * (len(rest) + 2 * len(pairs)):
                named = [(a, b) for a, b in pairs if target[a][len(first) :] == target[b][len(second) :]]
                rest += [place for pair in pairs if pair not in named for place in pair]
                pairs = named if stem(first[-1]) == stem(second[-1]) else []
            if pairs and len(rest) <= _MAX_UNPAIRED_SHARE_OF_BRANCHES * (len(rest) + 2 * len(pairs)):
                yield from instances(first, second, pairs, rest, first)
    for within in layers.values():
        for first, second in _compared(within, len) if len(within) > 1 else ():
            if first[:-1] != second[:-1]:  # siblings were compared already
                tops = _cut_apart(first, second) or (first, second)
                pair = place_of[first], place_of[second]
                rest = [place for top in tops for place in below[top] if place not in pair]
                yield from instances(first, second, [pair], rest, tops[0])


def _places_below(paths: Sequence[Path]) -> dict[Path, list[int]]:
    """List the places of the layers in each module, and those of the layers themselves."""
    below: dict[Path, list[int]] = {}
    for place, path in enumerate(paths):
        for depth in range(1, len(path) + 1):
            below.setdefault(path[:depth], []).append(place)
    return below


def _inside(path: Path, ends: tuple[Path, Path]) -> tuple[bool, bool]:
    """For each of two siblings, True if a layer is in it or in another step of the branch that it is a step of.

    >>> _inside(("mixed", "branch2_1", "conv"), (("mixed", "branch1_0"), ("mixed", "branch2_0")))
    (False, True)
    """
    *around, _ = ends[0]
    depth = len(around)
    if path[:depth] != tuple(around) or len(path) == depth:
        return False, False
    name, first, second = path[depth], ends[0][-1], ends[1][-1]
    branch, own, other = (_STEP.split(each)[0] for each in (name, first, second))
    return (branch == own, branch == other) if own != other else (name == first, name == second)


def _compared(modules: Sequence[Path], content: Callable[[Path], object]) -> Iterable[tuple[Path, Path]]:
    """List the siblings that may be swapped; of many only those of one content, of a list those that follow."""
    is_list = all(numbers(module[-1]) for module in modules) and len({stem(module[-1]) for module in modules}) == 1
    if len(modules) <= (_MAX_LIST_COMPARED if is_list else _MAX_SIBLINGS_COMPARED):
        return combinations(modules, 2)
    by_content: dict[object, list[Path]] = {}
    for module in sorted(modules, key=lambda module: numbers(module[-1])) if is_list else modules:
        by_content.setdefault(content(module), []).append(module)
    return chain.from_iterable(
        pairwise(members) if is_list or len(members) > 2 * _MAX_SIBLINGS_COMPARED else combinations(members, 2)
        for members in by_content.values()
    )


def _counterparts(
    first: Path, second: Path, below: Mapping[Path, Sequence[int]], paths: Sequence[Path], kind: Sequence[int]
) -> tuple[list[tuple[int, int]], list[int]]:
    """Pair the layers of two modules that have equal shapes, by their names within them, or else by their order.

    Returns:
        The pairs, and the layers that are left.
    """
    own = {paths[place][len(first) :]: place for place in below[first]}
    other = {paths[place][len(second) :]: place for place in below[second]}
    pairs = [(a, b) for name, a in own.items() if (b := other.get(name)) is not None and kind[a] == kind[b]]
    if len(pairs) == len(own) == len(other):
        return pairs, []
    done = {place for pair in pairs for place in pair}
    queues: dict[int, list[int]] = {}
    for place in other.values():
        if place not in done:
            queues.setdefault(kind[place], []).append(place)
    left = (place for place in own.values() if place not in done)
    pairs += [(place, queues[kind[place]].pop(0)) for place in left if queues.get(kind[place])]
    done = {place for pair in pairs for place in pair}
    return pairs, [place for place in (*below[first], *below[second]) if place not in done]


def _cut_apart(first: Path, second: Path) -> tuple[Path, Path] | None:
    """Cut two paths after the first component in which they differ."""
    depth = len(common_prefix((first, second)))
    return None if depth == min(len(first), len(second)) else (first[: depth + 1], second[: depth + 1])


def swaps_of(
    assignment: Assignment,
    source: SideFeatures,
    target: SideFeatures,
    alike: Sequence[int],
    slots: tuple[Sequence[str], Sequence[str]],
) -> list[Swap]:
    """Find what could be swapped.

    ``alike`` are the ``shape_pair_ids`` of the pairs, ``slots`` the names of each side's layers without the numbers of
    their lists.
    """
    chosen = assignment.source.tolist(), assignment.target.tolist()
    own, other = [source.paths[i] for i in chosen[0]], [target.paths[j] for j in chosen[1]]
    below = _places_below(other)
    listed = list(_instances(own, other, alike, below))
    if not listed:
        return []
    gains, orders = _gains(assignment, source, target, listed)
    names = [slots[0][i] for i in chosen[0]], [slots[1][j] for j in chosen[1]]
    together = Counter(zip(*names, strict=True))

    def mirrored(pairs: Pairs) -> int:
        """Count how many more of the same layers are matched the other way round than this way."""
        ways = (
            {(names[0][p], names[1][q]) for pair in pairs for p, q in (pair, pair[::-1])},
            {(names[0][place], names[1][place]) for pair in pairs for place in pair},
        )
        return min(together[both] for both in ways[0]) - min(together[both] for both in ways[1])

    found: dict[tuple[_Key, bool, bool], list[int]] = {}
    for index, one in enumerate(listed):
        gains[index] += _MODULE_NAME_WEIGHT * _module_name_gain(one)
        key = tuple([template(path) for path in (*one.modules, *one.ends)])
        found.setdefault((key, gains[index] < 0, mirrored(one.pairs) > 0), []).append(index)

    @cache
    def run(source: Path, target: Path) -> _Run:
        return _run_of(own, other, below.get(target[:-1], range(len(other))), source, target)

    result = []
    for (key, *_), indices in found.items():
        instances = [listed[index] for index in indices]
        pairs = tuple([pair for one in instances for pair in one.pairs])
        is_list = key[0] == key[1] and key[2] == key[3]
        runs = [run(_list_around(one.ends[0]), _list_around(one.modules[0])) for one in instances] if is_list else []
        shifted = is_list and all(map(_is_shifted, runs, instances))
        leads = [0] * len(instances) if shifted or not is_list else list(map(_direction, runs, instances))
        order = sum(orders[index] * (lead or 1) for index, lead in zip(indices, leads, strict=True))
        inside = Counter([(names[0][place], names[1][place]) for pair in pairs for place in pair])
        in_row = sum(orders[index] for index in indices)
        result.append(
            Swap(
                pairs=pairs,
                anchors=sum(one.anchors for one in instances),
                is_list=is_list,
                names=float(np.mean([gains[index] for index in indices])),
                numbers=sign(sum(_number_agreement(one.ends, one.modules) for one in instances)),
                order=sign(order) if is_list or (source.ordered and target.ordered) else 0,
                elsewhere=min(together[both] - count for both, count in inside.items()),
                ordinals=sign(sum(_ordinal_agreement(one.ends, one.modules) for one in instances)),
                mirrored=mirrored(pairs) + (in_row < 0),
                is_led=is_list and all(lead < 0 for lead in leads),
                is_shifted=shifted,
            )
        )
    return result


def _gains(
    assignment: Assignment, source: SideFeatures, target: SideFeatures, instances: Sequence[Instance]
) -> tuple[list[float], list[int]]:
    """Compute how much better the names of each instance's layers fit as they are, and how many more are in order.

    A role that only one of two layers has tells most.
    """
    pairs = [pair for one in instances for pair in one.pairs]
    (i, k), (j, m) = (chosen[np.asarray(pairs).T] for chosen in (assignment.source, assignment.target))
    roles = [
        [ROLES.intersection(words(side.paths[unit][-1])) for unit in chosen.tolist()]
        for side, chosen in ((source, assignment.source), (target, assignment.target))
    ]
    by_role = np.zeros(len(pairs))
    for index, (p, q) in enumerate(pairs):
        if roles[0][p] or roles[0][q]:
            as_is = roles[0][p] & roles[1][p] or roles[0][q] & roles[1][q]
            if_swapped = roles[0][p] & roles[1][q] or roles[0][q] & roles[1][p]
            by_role[index] = _ROLE_GAIN * (bool(as_is) - bool(if_swapped))
    names, own, other = assignment.names, source.ancestry.order, target.ancestry.order
    gain = by_role + (names[i, j] + names[k, m] - names[i, m] - names[k, j])
    order = np.where((own[i] < own[k]) == (other[j] < other[m]), 1, -1)
    sizes = np.asarray([len(one.pairs) for one in instances])
    starts = np.cumsum(sizes) - sizes
    return (np.add.reduceat(gain, starts) / sizes).tolist(), np.add.reduceat(order, starts).tolist()


def _module_name_gain(one: Instance) -> float:
    """Module-name similarity of the current assignment minus that of the swap."""
    (a, b), (x, y) = (
        [tuple([word for name in path[len(common_prefix(pair)) :] for word in words(name)]) for path in pair]
        for pair in (one.modules, one.ends)
    )
    return likeness(x, a) + likeness(y, b) - likeness(x, b) - likeness(y, a)


def _list_around(member: Path) -> Path:
    """Return the path of a list: that of its member, the last name without its numbers."""
    return (*member[:-1], stem(member[-1]))


def _run_of(own: Sequence[Path], other: Sequence[Path], places: Iterable[int], source: Path, target: Path) -> _Run:
    """Map the members of a list of the target, in order, to what most of each is matched to in the source's list.

    ``own`` and ``other`` are the layers of both sides in the assignment; ``places`` those around the target's list.
    """
    votes: dict[_Numbers, Counter[_Numbers]] = {}
    for place in places:
        partner, member = own[place][: len(source)], other[place][: len(target)]
        if (_list_around(partner), _list_around(member)) == (source, target):
            votes.setdefault(numbers(member[-1]), Counter())[numbers(partner[-1])] += 1
    return {member: found.most_common(1)[0][0] for member, found in sorted(votes.items())}


def _others(run: _Run, one: Instance) -> _Run:
    """Leave out of a run the two members that an instance would swap."""
    parent = one.modules[0][:-1]
    out = [numbers(path[-1]) for path in one.modules if path[:-1] == parent]
    return {member: partner for member, partner in run.items() if member not in out}


def _direction(run: _Run, one: Instance) -> int:
    """Return 1 if the other members of a list are matched in order, -1 if in reverse order, else 0."""
    steps = {(a < b) - (a > b) for a, b in pairwise(_others(run, one).values())}
    return steps.pop() if len(steps) == 1 else 0


def _is_shifted(run: _Run, one: Instance) -> bool:
    """True if all other members of a list have other numbers by as much as the two taken together."""
    shifts = {
        tuple(map(sub, member, partner)) if len(member) == len(partner) else ()
        for member, partner in _others(run, one).items()
    }
    shift = shifts.pop() if len(shifts) == 1 else ()
    ends, modules = ([numbers(path[-1]) for path in pair] for pair in (one.ends, one.modules))
    return any(shift) and sorted(tuple(map(add, end, shift)) for end in ends) == sorted(modules)


def _number_agreement(source: tuple[Path, Path], target: tuple[Path, Path]) -> int:
    """Return 1 if two pairs of modules have the same numbers in this order, -1 if in the other, else 0.

    Those of their own names, else all that stand in their paths, as where one side writes a path as one name.
    """
    for own, other in (
        ([numbers(path[-1]) for path in side] for side in (source, target)),
        ([tuple([n for name in path for n in numbers(name)]) for path in side] for side in (source, target)),
    ):
        if all(own) and all(other) and own[0] != own[1] and own in (other, other[::-1]):
            return 1 if own == other else -1
    return 0


def _ordinal_agreement(source: tuple[Path, Path], target: tuple[Path, Path]) -> int:
    """As ``_number_agreement``, by ordinal words (``pre``, ``post``) on one side, and words or numbers on the other."""
    own, other = (_places_in_block(_cut_apart(*side) or side) for side in (source, target))
    if not (_differ(own) or _differ(other)):
        return 0
    own = own if _differ(own) else [numbers(path[-1]) for path in source]
    other = other if _differ(other) else [numbers(path[-1]) for path in target]
    if not (_differ(own) and _differ(other)):
        return 0
    return 1 if (own[0] < own[1]) == (other[0] < other[1]) else -1


def _places_in_block(pair: tuple[Path, Path]) -> list[tuple[int, ...]]:
    """Read the places of two modules off their names; one without comes before what is called the last."""
    places = [ordinal(path[-1]) for path in pair]
    return [place or ((0,) if max(places) >= _FIRST_LATE_ORDINAL else ()) for place in places]


def _differ(places: Sequence[tuple[int, ...]]) -> bool:
    return all(places) and places[0] != places[1]


def swapped(assignment: Assignment, chosen: Sequence[Swap]) -> Assignment:
    """Make swaps, each layer at most once."""
    source, moved = assignment.source.copy(), set[int]()
    for swap in sorted(chosen, key=lambda one: one.names * len(one.pairs)):
        places = places_of(swap.pairs)
        if moved.isdisjoint(places):
            moved |= places
            for p, q in swap.pairs:
                source[[p, q]] = source[[q, p]]
    return with_sources(assignment, source)


def places_of(pairs: Iterable[tuple[int, int]]) -> set[int]:
    """Collect the places in pairs of places."""
    return {place for pair in pairs for place in pair}
