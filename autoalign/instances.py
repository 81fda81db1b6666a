"""Instances: pairs of modules, and of layers, that could trade places as far as their shapes tell."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, pairwise

from autoalign.crossings import shared
from autoalign.graph import Path, block_around
from autoalign.names import numbers, stem

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


def parting(first: Path, second: Path) -> tuple[Path, Path] | None:
    """Cut two paths after the first component in which they differ."""
    depth = shared(first, second)
    return None if depth == min(len(first), len(second)) else (first[: depth + 1], second[: depth + 1])
