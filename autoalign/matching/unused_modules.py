"""Vacancies: modules that nothing is matched to, and that would fit where another one of the same content is.

Of two towers of one shape, a network may have both and a checkpoint one. The votes of its layers agree on either; what
tells which one it is are the names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, combinations, pairwise, product

from autoalign.matching.assignment import Assignment
from autoalign.matching.branch_order import common, parting
from autoalign.matching.features import Ints
from autoalign.matching.layers import Path, block_around
from autoalign.matching.names import likeness, words
from autoalign.plan.keys import numbers, stem

_CLEAR = 0.05  # how much better the names of the one that was taken must fit
_LEAST = 3  # layers of a module; rivals of a single layer show in its margin

_Module = tuple[Path, list[int]]  # its path and the units in it
_Side = tuple[Sequence[Path], Ints]  # paths of the units, and their kinds: equal where all tensors have the same shapes


def rivalled(assignment: Assignment, source: _Side, target: _Side, fixed: Collection[int] = ()) -> list[int]:
    """Find the pairs of modules that a vacant one of the same content could take part in as well.

    Args:
        assignment: The chosen pairs of units.
        source: The units of the source.
        target: Those of the target.
        fixed: Places that are known.

    Returns:
        The places of these pairs.
    """
    result = set[int]()
    ways = (
        (assignment.source, source, assignment.target, target, assignment.names),
        (assignment.target, target, assignment.source, source, assignment.names.T),
    )
    for chosen, own, others, other, names in ways:
        place_of = {unit: place for place, unit in enumerate(chosen.tolist())}
        for (module, taken), (rival, vacant) in _alike(own, place_of):
            places = [place_of[unit] for unit in taken]
            ends = others[places]
            gain = float((names[taken, ends] - names[vacant, ends]).mean())
            counterpart = common([other[0][unit] for unit in ends.tolist()])
            called = words(counterpart[-1]) if counterpart else ()
            gain += likeness(words(module[-1]), called) - likeness(words(rival[-1]), called)
            if gain < _CLEAR and set(fixed).isdisjoint(places):
                result.update(places)
    return sorted(result)


def _alike(side: _Side, matched: Collection[int]) -> Iterator[tuple[_Module, _Module]]:
    """List siblings of the same content of which one is matched as a whole, and the other not at all."""
    paths, kinds = side
    if len(paths) - len(matched) < _LEAST:
        return
    below: dict[Path, list[int]] = defaultdict(list)
    for unit, path in enumerate(paths):
        for depth in range(1, len(path)):
            below[path[:depth]].append(unit)
    siblings: dict[Path, tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
    for module, units in below.items():
        if len(units) >= _LEAST and len({unit in matched for unit in units}) == 1:
            siblings[module[:-1]][units[0] in matched].append(module)
    content = cache(lambda module: frozenset((paths[unit][len(module) :], int(kinds[unit])) for unit in below[module]))
    for vacant, taken in siblings.values():
        for first, second in product(taken, vacant):
            told = numbers(first[-1]) and stem(first[-1]) == stem(second[-1])  # by numbers
            if not told and content(first) == content(second):
                in_order = [sorted(below[module], key=paths.__getitem__) for module in (first, second)]
                yield (first, in_order[0]), (second, in_order[1])


_UNLIKE = 0.5  # share of the layers of two modules that may have no counterpart in the other
_BRANCHES = 0.9  # the same for layers of the same names in members of one list: branches may only begin alike
_FEW = 6  # members of a list that are all compared with one another: they may be branches rather than blocks
_MANY = 12  # siblings of which only those of one content are compared; more of these, neighbour by neighbour

_STEP = re.compile(r"(?<=\d)_(?=\d)")  # in "branch2_0": a branch, and a step of it

Pairs = tuple[tuple[int, int], ...]  # places in the assignment that would exchange their sources


@dataclass(frozen=True, slots=True)
class Instance:
    """One exchange of two modules of the target, or of two of its layers."""

    modules: tuple[Path, Path]
    ends: tuple[Path, Path]  # the modules of the source that they are matched to, as far as these differ
    pairs: Pairs
    anchors: int


def instances_of(
    source: Sequence[Path], target: Sequence[Path], alike: Sequence[int], below: Mapping[Path, Sequence[int]]
) -> Iterator[Instance]:
    """List pairs of target modules that share most shapes below, and of layers of one block that have the same.

    Args:
        source: [places]: the layers of the source in the assignment.
        target: [places]: those of the target.
        alike: [places]: equal where the shapes of both are.
        below: The places below each module and layer of the target.
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
        by_ends: dict[tuple[Path, Path], list[tuple[int, int]]] = {}  # some may be exchanged and others not
        for a, b in pairs:
            ends = parting(source[a], source[b])
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
            if len(rest) > _UNLIKE * (len(rest) + 2 * len(pairs)):
                named = [(a, b) for a, b in pairs if target[a][len(first) :] == target[b][len(second) :]]
                rest += [place for pair in pairs if pair not in named for place in pair]
                pairs = named if stem(first[-1]) == stem(second[-1]) else []
            if pairs and len(rest) <= _BRANCHES * (len(rest) + 2 * len(pairs)):
                yield from instances(first, second, pairs, rest, first)
    for within in layers.values():
        for first, second in _compared(within, len) if len(within) > 1 else ():
            if first[:-1] != second[:-1]:  # siblings were compared already
                tops = parting(first, second) or (first, second)
                pair = place_of[first], place_of[second]
                rest = [place for top in tops for place in below[top] if place not in pair]
                yield from instances(first, second, [pair], rest, tops[0])


def _inside(path: Path, ends: tuple[Path, Path]) -> tuple[bool, bool]:
    """Tell for each of two siblings whether a layer is in it, or in another step of the branch that it is a step of.

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


def places_below(paths: Sequence[Path]) -> dict[Path, list[int]]:
    """List the places of the layers in each module, and those of the layers themselves."""
    below: dict[Path, list[int]] = {}
    for place, path in enumerate(paths):
        for depth in range(1, len(path) + 1):
            below.setdefault(path[:depth], []).append(place)
    return below


def _compared(modules: Sequence[Path], content: Callable[[Path], object]) -> Iterable[tuple[Path, Path]]:
    """List the siblings that may be exchanged; of many only those of one content, of a list those that follow."""
    is_list = all(numbers(module[-1]) for module in modules) and len({stem(module[-1]) for module in modules}) == 1
    if len(modules) <= (_FEW if is_list else _MANY):
        return combinations(modules, 2)
    by_content: dict[object, list[Path]] = {}
    for module in sorted(modules, key=lambda module: numbers(module[-1])) if is_list else modules:
        by_content.setdefault(content(module), []).append(module)
    return chain.from_iterable(
        pairwise(members) if is_list or len(members) > 2 * _MANY else combinations(members, 2)
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
