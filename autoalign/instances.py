"""Instances: pairs of modules, and of layers, that could trade places as far as their shapes tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from autoalign.evidence import Ints, SideEvidence
from autoalign.graph import Path, block_around
from autoalign.matching import Assignment
from autoalign.names import numbers, stem

_UNLIKE = 0.5  # share of the layers of two modules that may have no counterpart in the other
_MANY = 12  # siblings of which only those of one content are compared; more of these, neighbour by neighbour

Pairs = tuple[tuple[int, int], ...]  # places in the assignment that would exchange their sources


@dataclass(frozen=True, slots=True)
class Instance:
    """One exchange of two modules of the target, or of two of its layers."""

    modules: tuple[Path, Path]
    ends: tuple[Path, Path]  # the modules of the source that they are matched to, as far as these differ
    pairs: Pairs
    anchors: int
    gain: float = 0.0


def instances_of(
    assignment: Assignment,
    source: SideEvidence,
    target: SideEvidence,
    place_of: Mapping[int, int],
    alike: Ints,
) -> Iterator[Instance]:
    """List pairs of target modules that share most shapes below, and of layers of one block that have the same."""
    paths = target.paths
    below: dict[Path, list[int]] = {}
    for unit in place_of:
        for depth in range(1, len(paths[unit]) + 1):
            below.setdefault(paths[unit][:depth], []).append(unit)
    siblings: dict[Path, list[Path]] = {}
    for module in below:
        siblings.setdefault(module[:-1], []).append(module)
    layers: dict[tuple[Path, int], list[Path]] = {}
    unit_at = {paths[unit]: unit for unit in place_of}
    for path, unit in unit_at.items():
        layers.setdefault((block_around(path), int(alike[place_of[unit]])), []).append(path)

    def instances(
        first: Path, second: Path, pairs: Sequence[tuple[int, int]], rest: Sequence[int], top: Path
    ) -> Iterator[Instance]:
        by_ends: dict[tuple[Path, Path], list[tuple[int, int]]] = {}  # some may be exchanged and others not
        for pair in ((place_of[a], place_of[b]) for a, b in pairs):
            ends = parting(*(source.paths[assignment.source[place]] for place in pair))
            if ends is not None:
                by_ends.setdefault(ends, []).append(pair)
        for ends, places in by_ends.items():
            anchors = 0
            for unit in rest:
                path, own = source.paths[assignment.source[place_of[unit]]], paths[unit][: len(top)] == top
                inside = [path[: len(end)] == end for end in ends]
                anchors += (inside[0] - inside[1]) * (1 if own else -1)
            yield Instance((first, second), ends, tuple(places), anchors)

    def content(module: Path) -> tuple[int, ...]:
        return tuple(sorted(int(alike[place_of[unit]]) for unit in below[module]))

    for modules in siblings.values():
        for first, second in _compared(modules, content):
            pairs, rest = _counterparts(first, second, below, paths, lambda unit: int(alike[place_of[unit]]))
            if pairs and len(rest) <= _UNLIKE * (len(rest) + 2 * len(pairs)):
                yield from instances(first, second, pairs, rest, first)
    for within in layers.values():
        for first, second in _compared(within, len):
            if first[:-1] != second[:-1]:  # siblings were compared already
                tops = parting(first, second) or (first, second)
                pair = unit_at[first], unit_at[second]
                rest = [unit for top in tops for unit in below[top] if unit not in pair]
                yield from instances(first, second, [pair], rest, tops[0])


def _compared(modules: Sequence[Path], content: Callable[[Path], object]) -> Iterator[tuple[Path, Path]]:
    """List the siblings that may be exchanged; of many only those of one content, of a list those that follow."""
    by_content: dict[object, list[Path]] = {}
    is_list = len({stem(module[-1]) for module in modules}) == 1 and all(numbers(module[-1]) for module in modules)
    for module in sorted(modules, key=lambda module: numbers(module[-1])) if is_list else modules:
        by_content.setdefault(content(module), []).append(module)
    if is_list or len(modules) > _MANY:
        for members in by_content.values():
            yield from pairwise(members) if is_list or len(members) > 2 * _MANY else combinations(members, 2)
    else:
        yield from combinations(modules, 2)


def _counterparts(
    first: Path, second: Path, below: Mapping[Path, Sequence[int]], paths: Sequence[Path], kind: Callable[[int], int]
) -> tuple[list[tuple[int, int]], list[int]]:
    """Pair the layers of two modules that have equal shapes, by their names within them, or else by their order.

    Returns:
        The pairs, and the layers that are left.
    """
    own = {paths[unit][len(first) :]: unit for unit in below[first]}
    other = {paths[unit][len(second) :]: unit for unit in below[second]}
    pairs = [(unit, other[name]) for name, unit in own.items() if name in other and kind(unit) == kind(other[name])]
    done = {unit for pair in pairs for unit in pair}
    queues: dict[int, list[int]] = {}
    for unit in other.values():
        if unit not in done:
            queues.setdefault(kind(unit), []).append(unit)
    left = (unit for unit in own.values() if unit not in done)
    pairs += [(unit, queues[kind(unit)].pop(0)) for unit in left if queues.get(kind(unit))]
    done = {unit for pair in pairs for unit in pair}
    return pairs, [unit for unit in (*below[first], *below[second]) if unit not in done]


def parting(first: Path, second: Path) -> tuple[Path, Path] | None:
    """Cut two paths after the first component in which they differ."""
    depth = shared(first, second)
    return None if depth == min(len(first), len(second)) else (first[: depth + 1], second[: depth + 1])


def shared(first: Path, second: Path) -> int:
    """Count the components that two paths begin with alike."""
    return next(
        (depth for depth, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
