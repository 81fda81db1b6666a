"""The state of an assignment between its moves: what fills what, and what stands where; and one change of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations, pairwise

import numpy as np

from autoalign.matching.assignment import Assignment, with_pairs
from autoalign.matching.candidates import Entries
from autoalign.matching.features import Ints, SideFeatures
from autoalign.matching.list_order import Renumbering, have_common_order, renumbered
from autoalign.matching.names import all_counts
from autoalign.matching.paths import Path
from autoalign.plan.keys import common_module, common_prefix, numbers, stem, template

MIN_TRUST_IN_ORDER = 2 / 3  # from which order alone is enough to load
_MAX_LAYERS_COMPARED = 2000  # for whether they stand in one order
_MAX_CHILDREN_COMPARED = 64  # of a module, for whether their order is kept; of more, some at equal distances

_Kept = tuple[float, int]  # how many stand as on the other side, beyond chance; and of how many


@dataclass(frozen=True, slots=True)
class Exchange:
    """One change: some modules of the target, or layers, take what fills others of them, or what is unused."""

    modules: tuple[Path, ...]
    ends: tuple[Path, ...]  # the modules of the source that fill them, and unused ones
    takes: tuple[int, ...]  # of each module: which of the ends it would have instead
    before: tuple[tuple[int, int], ...]  # pairs of units that would be given up
    after: tuple[tuple[int, int], ...]  # those that would be made instead
    ordered: tuple[tuple[int, int], ...] = ()  # pairs of places in both, whose order the change concerns
    is_alone: bool = False  # it is no exchange of the same modules in every block
    anchors: int = 0  # layers beside these that fill the same modules: how many more than after the change

    @property
    def is_of_one_layer(self) -> bool:
        """True if a single layer is filled from an unused one, or an empty one is filled instead."""
        return len(self.before) == 1


def exchanged(
    assignment: Assignment, exchanges: Iterable[Exchange], companions: Mapping[int, Sequence[int]]
) -> Assignment:
    """Make exchanges, each unit at most once; the same assignment if none can be made.

    What follows its companions, of the target, is not moved together with them: they would miss one another.
    """
    own_of = dict(zip(assignment.target.tolist(), assignment.source.tolist(), strict=True))
    used, moved = set(own_of.values()), set[tuple[bool, int]]()
    place_of = {unit: place for place, unit in enumerate(own_of)}
    straight = set[frozenset[Path]]()  # what fills modules that are of one piece now; another way to that would undo it
    for one in exchanges:
        pairs = *one.before, *one.after
        units = {(False, own) for own, _ in pairs} | {(True, other) for _, other in pairs}
        given_up, taken = {own for own, _ in one.before}, {own for own, _ in one.after}
        left, filled = {other for _, other in one.before}, {other for _, other in one.after}
        fits = used.isdisjoint(taken - given_up) and own_of.keys().isdisjoint(filled - left)
        ends = frozenset(one.ends)
        is_straight = one.anchors < 0 and ends in straight
        if fits and moved.isdisjoint(units) and not is_straight:
            moved |= units
            moved |= {(True, other) for _, unit in one.before for other in companions.get(unit, ())}
            straight.add(ends)
            used = (used - given_up) | taken
            place_of.update(
                {other: place_of.pop(unit) for (_, unit), (_, other) in zip(one.before, one.after, strict=True)}
            )
            for _, unit in one.before:
                del own_of[unit]
            own_of.update((other, own) for own, other in one.after)
    if not moved:
        return assignment
    target = sorted(place_of, key=place_of.__getitem__)
    source = np.asarray([own_of[unit] for unit in target], dtype=np.int64)
    return with_pairs(assignment, source, np.asarray(target, dtype=np.int64))


@dataclass(frozen=True)
class State:
    """An assignment, and what its moves are found and judged by."""

    assignment: Assignment
    source: SideFeatures
    target: SideFeatures
    kinds: tuple[Ints, Ints]  # of the units of each side, equal where all shapes are, but for dimensions of size one
    shapes: tuple[Ints, Ints]  # of the units of both sides, equal where all shapes are
    entries: Sequence[Entries]  # of each of the ``kinds``
    slots: tuple[Sequence[Path], Sequence[Path]]  # the paths of each side's units without the numbers of their lists

    @cached_property
    def own_of(self) -> dict[int, int]:
        """The source unit of each matched target unit."""
        return dict(zip(self.assignment.target.tolist(), self.assignment.source.tolist(), strict=True))

    @cached_property
    def other_of(self) -> dict[int, int]:
        """The target unit that each used source unit fills."""
        return {own: other for other, own in self.own_of.items()}

    @cached_property
    def neighbours(self) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """For each matched unit of a side, those just before and after it, where the side is in order."""
        found: list[dict[int, list[int]]] = []
        for side, matched in ((self.source, self.other_of), (self.target, self.own_of)):
            line = sorted(matched, key=side.ancestry.order.__getitem__) if side.ordered else []
            beside: dict[int, list[int]] = {unit: [] for unit in line}
            for first, second in pairwise(line):
                beside[first].append(second)
                beside[second].append(first)
            found.append(beside)
        return found[0], found[1]

    @cached_property
    def alike(self) -> dict[int, int]:
        """Equal for matched target units of which the tensors that both sides have are of the same shapes."""
        pairs = np.stack([self.kinds[0][self.assignment.source], self.kinds[1][self.assignment.target]])
        ways, way_of = np.unique(pairs, axis=1, return_inverse=True)
        ids: dict[object, int] = {}
        found = [ids.setdefault(self._shared(*way), len(ids)) for way in ways.T.tolist()]
        return {unit: found[way] for unit, way in zip(self.assignment.target.tolist(), way_of.tolist(), strict=True)}

    def _shared(self, source: int, target: int) -> object:
        own, other = self.entries[source], self.entries[target]
        return tuple([(name, own[name], other[name]) for name in own if name in other]) or (source, target)

    def renumbered(self, own: int, other: int) -> Renumbering:
        """Return how the numbers in the names of a target unit and its like become those of a source unit's."""
        return self._renumbered(int(self.source.templates[0, own]), int(self.target.templates[0, other]))

    @cached_property
    def _renumbered(self) -> Callable[[int, int], Renumbering]:
        @cache
        def between(*templates: int) -> Renumbering:
            sides: list[dict[int, list[tuple[int, ...]]]] = []
            for side, kinds, wanted in zip((self.source, self.target), self.kinds, templates, strict=True):
                names: dict[int, list[tuple[int, ...]]] = {}
                sides.append(names)
                for unit in np.flatnonzero(side.templates[0] == wanted).tolist():
                    names.setdefault(int(kinds[unit]), []).append(all_counts(side.paths[unit]))
            return renumbered(*sides)

        return between

    @cached_property
    def in_order(self) -> list[list[int]]:
        """The matched target units of each shape, in order, lists in that of their numbers."""
        found: dict[int, list[int]] = {}
        for unit in sorted(self.own_of, key=self.target.places_in_order.__getitem__):
            found.setdefault(self.alike[unit], []).append(unit)
        return list(found.values())

    @cached_property
    def below(self) -> dict[Path, list[int]]:
        """The matched target units in each module, and each layer itself."""
        below: dict[Path, list[int]] = {}
        for unit in self.assignment.target.tolist():
            path = self.target.paths[unit]
            for depth in range(1, len(path) + 1):
                below.setdefault(path[:depth], []).append(unit)
        return below

    @cached_property
    def sequences(self) -> dict[tuple[bool, Path, str, Path], list[int]]:
        """The matched target units, in order, that differ in the number of a list's member alone.

        Those of lists of the target (True), or of the source, where the order of what the other side has tells.
        """
        found: dict[tuple[bool, Path, str, Path], list[int]] = {}
        for unit in sorted(self.own_of, key=self.target.places_in_order.__getitem__):
            for is_target, path in ((False, self.end(unit)), (True, self.target.paths[unit])):
                for depth, name in enumerate(path):
                    if numbers(name):
                        found.setdefault((is_target, path[:depth], stem(name), path[depth + 1 :]), []).append(unit)
        return {key: units for key, units in found.items() if len(units) > 1 and self._is_ordered(key[0], units)}

    @cached_property
    def grids(self) -> list[list[int]]:
        """Groups of matched target units whose paths differ in several places on both sides, as in lists of lists.

        What follows the last number of their paths is the same for all of a group, and what is below it.
        """
        groups: dict[tuple[object, ...], list[int]] = {}
        for unit in self.own_of:
            ways = self.end(unit), self.target.paths[unit]
            heads = [numbered_part(path) for path in ways]
            if all(heads):
                tails = [path[len(head) :] for path, head in zip(ways, heads, strict=True)]
                contents = [
                    side.contents.get(head) for side, head in zip((self.source, self.target), heads, strict=True)
                ]
                groups.setdefault((*tails, *map(len, ways), *contents), []).append(unit)
        return [units for units in groups.values() if len(units) > 3 and self._has_axes(units)]

    def _has_axes(self, units: Sequence[int]) -> bool:
        sides = map(self.end, units), map(self.target.paths.__getitem__, units)
        return all(sum([len(set(names)) > 1 for names in zip(*paths, strict=True)]) > 1 for paths in sides)

    @cached_property
    def grid_of(self) -> dict[int, list[int]]:
        """For each unit in such a group, the whole group."""
        return {unit: units for units in self.grids for unit in units}

    def innermost(self, one: Exchange, *, of_target: bool) -> Sequence[Path]:
        """Return the modules or ends of an exchange; of two, with those inside that hold all of one that moves.

        What both hold it in alike is left out, so that a module that one alone has around it adds to a name.
        """
        tops, paths = (one.modules, self.target.paths) if of_target else (one.ends, self.source.paths)
        if len(tops) != 2:
            return tops
        moved = {pair[of_target]: paths[pair[of_target]] for pair in one.before}
        inside = [[path for path in moved.values() if path[: len(top)] == top] for top in tops]
        inner = [
            max(top, common_module(of), key=len) if len(of) > 1 else top for of, top in zip(inside, tops, strict=True)
        ]
        while all(len(a) > len(b) for a, b in zip(inner, tops, strict=True)) and inner[0][-1] == inner[1][-1]:
            inner = [path[:-1] for path in inner]
        return inner

    def trust_in_order(self, one: Exchange, *, of_list: bool) -> float:
        """Return how far the order around some modules may be believed, in [0, 1]: as far as shapes show it kept.

        What shapes alone match, beside what is exchanged, tells whether both sides have it in one order. What they tell
        elsewhere, and that networks mostly have one order, count as much as one layer beside. Numbers of a list are
        compared with those of its other members only.
        """
        around = common_prefix(one.ends), common_prefix(one.modules)
        if not all(map(self.have_common_order, enumerate(around) if of_list else [None])):
            return 0.0
        kept, count = self._kept(*around)[of_list]
        return (self._trusts[of_list] + kept) / (1 + count)

    @cached_property
    def _trusts(self) -> tuple[float, float]:
        """How far order may be believed in all modules together, those of one name once: of siblings, and of lists."""
        modules = {template(module): module for module, units in self.below.items() if len(units) > 1}
        found = [
            self._kept(common_prefix(list(map(self.end, self.below[module]))), module) for module in modules.values()
        ]
        ways = [[kept[of_list] for kept in found] for of_list in (False, True)]
        siblings, lists = ((1 + sum([kept for kept, _ in of])) / (1 + sum([count for _, count in of])) for of in ways)
        return siblings, lists

    @cached_property
    def have_common_order(self) -> Callable[[tuple[int, Path] | None], bool]:
        """False for layers that stand as if at random: all (None) or members of a list of source (0) or target (1).

        Those of a list are layers themselves, and stand by their numbers.
        """
        return cache(self._stand_in_one_order)

    def _stand_in_one_order(self, listed: tuple[int, Path] | None) -> bool:
        units = self._listed.get(listed, ()) if listed else list(self.own_of)[:_MAX_LAYERS_COMPARED]
        kinds: list[list[int]] = []
        for place, side in enumerate((self.source, self.target)):
            own = [unit if place else self.own_of[unit] for unit in units]
            paths = [side.paths[unit] for unit in own]
            if listed and len({path[:-1] for path in paths}) == 1 and all(numbers(path[-1]) for path in paths):
                ranks = [numbers(path[-1]) for path in paths]
            elif side.ordered:
                ranks = [(int(side.ancestry.order[unit]),) for unit in own]
            else:
                return True
            kinds.append([self.alike[units[k]] for k in sorted(range(len(units)), key=ranks.__getitem__)])
        return have_common_order(*kinds)

    @cached_property
    def _listed(self) -> dict[tuple[int, Path] | None, list[int]]:
        """The matched target units whose layer is itself a member of a list, of the source (0) or of the target (1)."""
        found: dict[tuple[int, Path] | None, list[int]] = {}
        for unit in list(self.own_of)[:_MAX_LAYERS_COMPARED]:
            for side, path in enumerate((self.end(unit), self.target.paths[unit])):
                if numbers(path[-1]):
                    found.setdefault((side, path[:-1]), []).append(unit)
        return found

    @cached_property
    def _kept(self) -> Callable[[Path, Path], tuple[_Kept, _Kept]]:
        return cache(self._children_in_order)

    def _children_in_order(self, end: Path, module: Path) -> tuple[_Kept, _Kept]:
        """Count the children that shapes match and that stand as on the other side: siblings, and members of lists.

        The first of them does not count: there is nothing that it could follow.
        """
        inside = [unit for unit in self.below.get(module, self.own_of) if self.end(unit)[: len(end)] == end]
        often = Counter([self.alike[unit] for unit in inside])
        known: dict[tuple[Path, Path], int] = {}
        for unit in inside:
            if often[self.alike[unit]] == 1:
                child = self.end(unit)[len(end) :][:1], self.target.paths[unit][len(module) :][:1]
                known.setdefault(child, unit)
        children = list(known.items())[:: len(known) // _MAX_CHILDREN_COMPARED + 1]
        are_kept: tuple[list[bool], list[bool]] = ([], [])
        for (own, first), (other, second) in combinations(children, 2):
            if own[0] != other[0] and own[1] != other[1]:
                of_list = all(map(_are_listed, own, other))
                before = self.source.precedes(self.own_of[first], self.own_of[second], by_number=of_list)
                after = self.target.precedes(first, second, by_number=of_list)
                if before is not None and after is not None:
                    are_kept[of_list].append(before == after)
        count = min([len({child[side] for child, _ in children}) for side in (0, 1)]) - 1
        siblings, lists = ((max(2 * sum(of) / len(of) - 1, 0) * count, count) if of else (0.0, 0) for of in are_kept)
        return siblings, lists

    def _is_ordered(self, is_target: bool, units: Sequence[int]) -> bool:
        """True if what the other side has for some units is in order: it is registered, or a list."""
        if (self.source if is_target else self.target).ordered:
            return True
        return len({template(self.end(unit) if is_target else self.target.paths[unit]) for unit in units}) == 1

    def beside_companions(self, unit: int, *, of_target: bool) -> int | None:
        """Return the one unit of the other side, like that matched, beside those matched with a unit's companions."""
        sides = (self.target, self.source) if of_target else (self.source, self.target)
        matched, kinds = (self.own_of, self.kinds[0]) if of_target else (self.other_of, self.kinds[1])
        paths = sides[1].paths
        for companion in sides[0].companions.get(unit, ()):
            if (end := matched.get(companion)) is None:
                continue
            like = kinds[matched[unit]]
            near = [each for each in sides[1].companions.get(end, ()) if kinds[each] == like]
            if not near and len(paths[end]) > 1:
                near = [each for each in sides[1].inside[paths[end][:-1]] if kinds[each] == like and each != end]
            if len(near) == 1:
                return near[0]
        return None

    def end(self, unit: int) -> Path:
        """Return the source layer that fills a target unit."""
        return self.source.paths[self.own_of[unit]]


def paired(state: State, first: Sequence[int], second: Sequence[int], *depths: int) -> list[tuple[int, int]]:
    """Pair target units of the same shapes, by their names below these depths, or else by their order."""
    paths, alike = state.target.paths, state.alike
    other = {paths[unit][depths[1] :]: unit for unit in second}
    pairs = []
    for unit in first:
        same = other.get(paths[unit][depths[0] :])
        if same is not None and alike[same] == alike[unit]:
            pairs.append((unit, same))
    done = {unit for pair in pairs for unit in pair}
    queues: dict[int, list[int]] = {}
    for unit in second:
        if unit not in done:
            queues.setdefault(alike[unit], []).append(unit)
    left = (unit for unit in first if unit not in done)
    return pairs + [(unit, queues[alike[unit]].pop(0)) for unit in left if queues.get(alike[unit])]


def counterparts(state: State, first: Path, second: Path) -> tuple[list[tuple[int, int]], list[int]]:
    """Pair the layers of two modules that have equal shapes, and list those that are left."""
    below = state.below
    pairs = paired(state, below[first], below[second], len(first), len(second))
    done = {unit for pair in pairs for unit in pair}
    return pairs, [unit for unit in (*below[first], *below[second]) if unit not in done]


class Decided:
    """How layers are matched where nothing can be exchanged, in modules of the same content.

    Layers of the same names tell it; where there are none, those whose names differ in the numbers of lists.
    """

    def __init__(self, state: State, pairs: Sequence[tuple[int, int]]) -> None:
        self._named = (state.source.paths, state.target.paths), state.slots
        self._contents = state.source.contents, state.target.contents
        self._pairs = pairs
        self._counts: dict[tuple[bool, int, int], Counter[object]] = {}

    def __call__(self, exchanges: Sequence[Exchange]) -> float:
        """Compare how often layers of these names are matched as here and as after the exchanges."""
        if len(exchanges[0].ends) < 2 or len(exchanges[0].modules) < 2:
            return 0
        for by_slot in (False, True):
            before = after = 0
            for one in exchanges:
                around = len(common_prefix(one.ends)), len(common_prefix(one.modules))
                before += sum([self._count(around, pair, by_slot) for pair in one.before])
                after += sum([self._count(around, pair, by_slot) for pair in one.after])
            if before or after:
                break
        return (before - after) / (before + after + 1)

    def _count(self, around: tuple[int, int], pair: tuple[int, int], by_slot: bool) -> int:
        paths = self._named[0]
        below = by_slot, len(paths[0][pair[0]]) - around[0], len(paths[1][pair[1]]) - around[1]
        if below not in self._counts:
            self._counts[below] = Counter([self._way(other, *below) for other in self._pairs])
        return self._counts[below][self._way(pair, *below)]

    def _way(self, pair: tuple[int, int], by_slot: bool, *below: int) -> object:
        """Name both layers from some modules on, with what these contain."""
        way: list[object] = []
        for side, (unit, contents, depth) in enumerate(zip(pair, self._contents, below, strict=True)):
            path = self._named[0][side][unit]
            cut = max(len(path) - depth, 0)
            way += self._named[by_slot][side][unit][cut:], contents.get(path[:cut])
        return tuple(way)


def numbered_part(path: Path) -> Path:
    """Return a path as far as its last number; nothing if it has none.

    >>> numbered_part(("layers", "3", "attn", "qkv"))
    ('layers', '3')
    """
    return path[: max((depth for depth, name in enumerate(path, start=1) if numbers(name)), default=0)]


def _are_listed(first: Path, second: Path) -> bool:
    """True if two names are of members of one list."""
    return all(map(numbers, (*first, *second))) and first != second and template(first) == template(second) != ()
