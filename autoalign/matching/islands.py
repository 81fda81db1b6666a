"""Islands: groups of modules whose layers are matched to one another, apart from all else that is matched.

Beside a network that corresponds, what is left over of a head may fit into an unlike decoder here and there. Where most
of an island has no counterpart, and the names of its modules have nothing in common, only shapes speak for its pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autoalign.matching.assignment import Assignment
from autoalign.matching.layers import Part, Path, Units, counts_of
from autoalign.matching.names import similar_words, words
from autoalign.matching.vocabulary import LAYER_TYPES

_FILLED = 0.6  # product of both sides' matched shares from which modules correspond as a whole
_ALIKE = 0.3  # how alike two words must be for the names of modules to speak for their pair

_Side = tuple[Units, Sequence[Part]]


@dataclass(frozen=True, slots=True)
class _Level:
    """The modules of one side at one depth."""

    names: Sequence[Path]  # [units]: of the module that a unit is in, or of the unit if it stands at this depth itself
    sizes: Mapping[Path, int]  # layers in each
    deep: frozenset[Path]  # those that hold more than a layer of this name


def groundless(assignment: Assignment, source: _Side, target: _Side, fixed: Collection[int] = ()) -> list[int]:
    """List the pairs of units that nothing but their shapes speaks for.

    The modules at the top are looked at first, then those in the largest island, and so on. Where less than half of the
    pairs are in islands that something speaks for, all names may have been changed, and none is doubted.

    Args:
        assignment: The chosen pairs of units.
        source: Units and parts of the source, under one root.
        target: Those of the target, likewise.
        fixed: Units of the target whose partners are known.

    Returns:
        The places of these pairs.
    """
    sides = source, target
    chosen = assignment.source.tolist(), assignment.target.tolist()
    counts = counts_of(*source).tolist(), counts_of(*target).tolist()
    known = {place for place, unit in enumerate(chosen[1]) if unit in fixed}
    found, places, depths = list[int](), list(range(len(chosen[0]))), (1, 1)
    while places:
        levels = [_level(side[0].paths, *of) for side, *of in zip(sides, counts, depths, strict=True)]
        at = [[level.names[unit] for unit in units] for level, units in zip(levels, chosen, strict=True)]
        islands = _islands({place: (at[0][place], at[1][place]) for place in places})
        doubted = list[int]()
        for island in islands:
            modules = [{names[place] for place in island} for names in at]
            share = 1.0
            for level, of, count, units in zip(levels, modules, counts, chosen, strict=True):
                share *= sum(count[units[place]] for place in island) / sum(map(level.sizes.__getitem__, of))
            is_deep = not any(level.deep.isdisjoint(of) for level, of in zip(levels, modules, strict=True))
            if is_deep and share < _FILLED and known.isdisjoint(island) and not _have_words_in_common(*modules):
                doubted += island
        if 2 * len(doubted) <= len(places):
            found += doubted
        largest = max(islands, key=len)
        single = [len({names[place] for place in largest}) == 1 for names in at]
        if 2 * len(largest) < len(places) or not any(single):
            break
        depths = depths[0] + single[0], depths[1] + single[1]
        ends = [[len(side[0].paths[unit]) for unit in units] for side, units in zip(sides, chosen, strict=True)]
        places = [p for p in largest if ends[0][p] >= depths[0] and ends[1][p] >= depths[1]]
    return sorted(found)


def _level(paths: Sequence[Path], counts: Sequence[int], depth: int) -> _Level:
    names = [path[:depth] for path in paths]
    sizes = Counter[Path]()
    for name, count in zip(names, counts, strict=True):
        sizes[name] += count
    return _Level(names, sizes, frozenset(path[:depth] for path in paths if len(path) > depth))


def _islands(pairs: Mapping[int, tuple[Path, Path]]) -> list[list[int]]:
    """Group pairs of modules, by their places, so that no module is in two groups."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ids: dict[tuple[int, Path], int] = {}
    ends = [[ids.setdefault((side, pair[side]), len(ids)) for pair in pairs.values()] for side in (0, 1)]
    graph = coo_array((np.ones(len(pairs)), ends), shape=(len(ids), len(ids)))
    _, island_of = connected_components(graph, directed=False)
    islands: dict[int, list[int]] = {}
    for place, module in zip(pairs, ends[0], strict=True):
        islands.setdefault(int(island_of[module]), []).append(place)
    return list(islands.values())


def _have_words_in_common(source: Collection[Path], target: Collection[Path]) -> bool:
    """Tell whether modules have names in common, or words in their names that say more than a type of layer."""
    own, other = ({path[-1] for path in modules} for modules in (source, target))
    told = [sorted({word for name in names for word in words(name)} - LAYER_TYPES) for names in (own, other)]
    return not own.isdisjoint(other) or max(similar_words(*told).values(), default=0) >= _ALIKE
