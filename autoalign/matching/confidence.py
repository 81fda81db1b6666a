"""Confidence: how far matches may be believed, from their scores, from caps, and from what two networks have in common.

The score and the margin of a pair make a raw confidence, which ``calibration.json`` turns into one that was held by
matches with known truth. It is a table of knots: a raw confidence, and the least share of right ones (the lower end of
Wilson's interval at 95 %) among the matches about there. ``python -m benchmarks.accuracy.calibration`` remakes it. It
only ever lowers a confidence, so that what is said is at most what was seen.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from statistics import median

import numpy as np
from numpy.typing import NDArray

from autoalign.matching.assignment import Assignment
from autoalign.matching.features import Floats
from autoalign.matching.layers import Part, Unit, Units, counts_of
from autoalign.matching.names import similar_words, words
from autoalign.matching.paths import Path
from autoalign.matching.vocabulary import LAYER_TYPES, MODULE_TYPES
from autoalign.plan.keys import numbers, template

CALIBRATION_FILE = "calibration.json"
WEIGHTS_FILE = "weights.json"

# Caps: the most that a match is believed.
PROVEN = 0.99  # where shapes alone prove it, or only names differ, and consistently
ADAPTED_BY_RULE = 0.95  # where a rule names a counterpart of another shape
INFERRED = 0.85  # where order, a config, or that nothing else is left tells it
ADAPTED = 0.8  # where a counterpart of another shape has the same name or place, and the other dimensions agree
AMBIGUOUS = 0.45  # where something else would be as good, or speaks against the match; it is not loaded by default
SPLIT_BY_ORDER_FACTOR = 0.85  # of the confidence of a match whose parts only their order tells apart

# Thresholds of what two networks have in common.
MIN_LIKELY = 0.3  # the confidence from which a pair counts for the relation of two networks
_MIN_ISLAND_SHARE = 0.6  # product of both sides' matched shares from which modules correspond as a whole
_MIN_WORD_SIMILARITY = 0.3  # from which the names of modules speak for their pair

_Side = tuple[Units, Sequence[Part]]


def calibrated(confidence: Floats) -> Floats:
    """Turn the optimisation's confidence into a calibrated one, each in [0, 1].

    >>> bool((calibrated(np.linspace(0, 1, 9, dtype=np.float32)) <= np.linspace(0, 1, 9) + 1e-6).all())
    True
    """
    raw, held = _knots()
    return np.asarray(np.interp(confidence, raw, held), dtype=np.float32)


def uncalibrated(confidence: Floats) -> Floats:
    """Turn a calibrated confidence back, to calibrate anew.

    >>> print(np.round(uncalibrated(calibrated(np.float32([0.2, 0.7, 0.97]))), 3))
    [0.2  0.7  0.97]
    """
    raw, held = _knots()
    return np.asarray(np.interp(confidence, held, raw), dtype=np.float32)


@cache
def _knots() -> tuple[Floats, Floats]:
    knots = json.loads(files("autoalign.matching").joinpath(CALIBRATION_FILE).read_text(encoding="utf-8"))["knots"]
    raw, held = zip(*((knot["raw"], knot["held"]) for knot in knots), strict=True)
    return np.asarray(raw, dtype=np.float64), np.asarray(held, dtype=np.float64)


@cache
def fitted_weights(of: str) -> Mapping[str, float]:
    """Read fitted weights: those of the "cues" of moves, or of the "relation" of two networks."""
    text = files("autoalign.matching").joinpath(WEIGHTS_FILE).read_text(encoding="utf-8")
    return dict(json.loads(text)[of])


def confidence_of(assignment: Assignment) -> Floats:
    """Turn the score and the margin of each chosen pair into the confidence that it is right, in [0, 1]."""
    strong = 1 / (1 + np.exp(-5.0 * (assignment.score - 2.45)))
    alone = 1 / (1 + np.exp(-12.0 * (assignment.margin + 0.05)))
    return np.asarray(strong * alone, dtype=np.float32)


def unused_duplicates(assignment: Assignment, source: _Side) -> NDArray[np.bool_]:
    """For each pair, True if it takes a parameter that stands alone and an unused one has the same name and shape."""
    used = set(assignment.source.tolist())
    left = {_alone(unit, source[1]) for index, unit in enumerate(source[0]) if index not in used} - {None}
    return np.asarray([bool(left) and _alone(source[0][i], source[1]) in left for i in assignment.source], dtype=bool)


def _alone(unit: Unit, parts: Sequence[Part]) -> tuple[str, tuple[int, ...]] | None:
    """Return the name and the shape of a parameter that belongs to no layer and no list; None for all else."""
    if unit.kinds != ("other",) or len(unit.path) < 2 or any(map(numbers, unit.path)):
        return None
    return unit.path[-1], parts[unit.parts[0][1]].shape


def special_units(units: Sequence[Unit], parts: Sequence[Part]) -> list[int]:
    """List the layers whose shape says something: not all of its sizes are the one that most layers have.

    A matrix of the network's width by its width may be anything; one with as many rows as there are words may not.
    """
    sizes = [{size for _, part in unit.parts for size in parts[part].shape} - {1} for unit in units]
    common = Counter(size for of in sizes for size in of).most_common(1)
    return [index for index, of in enumerate(sizes) if of - {size for size, _ in common}]


def coherence(assignment: Assignment, source: Units, target: Units, confidence: Floats) -> Floats:
    """Compute how far each pair's blocks are filled, against other blocks of the same kind, in [0, 1].

    A pair that takes a single layer of a block, where others of its kind are taken whole, is a coincidence.
    """
    likely = confidence > MIN_LIKELY
    result = np.ones(len(confidence), dtype=np.float32)
    for units, index in ((source, assignment.source), (target, assignment.target)):
        block = units.blocks
        size, taken = Counter(block), Counter([block[i] for i in index[likely].tolist()])
        typical: dict[Path, list[float]] = {}
        for path, count in taken.items():
            typical.setdefault(template(path), []).append(count / size[path])
        usual = {kind: median(shares) for kind, shares in typical.items()}
        share = {path: taken[path] / size[path] / usual.get(template(path), 1.0) for path in size}
        result = np.minimum(result, np.asarray([share[block[i]] for i in index.tolist()], dtype=np.float32))
    return result


@dataclass(frozen=True, slots=True)
class _Level:
    """The modules of one side at one depth."""

    names: Sequence[Path]  # [units]: of the module that a unit is in, or of the unit if it stands at this depth itself
    sizes: Mapping[Path, int]  # layers in each
    deep: frozenset[Path]  # those that hold more than a layer of this name


def shape_only_pairs(assignment: Assignment, source: _Side, target: _Side, fixed: Collection[int] = ()) -> list[int]:
    """List the places of the pairs that nothing but their shapes speaks for; ``fixed`` are units of the target.

    Beside a network that corresponds, what is left over of a head may fit into an unlike decoder here and there. An
    island is a group of modules whose layers are matched to one another, apart from all else that is matched. Where
    most of it has no counterpart, and the names of its modules have nothing in common, only shapes speak for its pairs.

    The modules at the top, under the one root, are looked at first, then those in the largest island, and so on. Where
    less than half of the pairs are in islands that something speaks for, all names may have been changed, and none is
    doubted.
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
            if (
                is_deep
                and share < _MIN_ISLAND_SHARE
                and known.isdisjoint(island)
                and not _have_words_in_common(*modules)
            ):
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
    """True if modules have names in common, or words in their names that say more than a type of layer."""
    own, other = ({path[-1] for path in modules} for modules in (source, target))
    telling = [
        sorted({word for name in names for word in words(name)} - LAYER_TYPES - MODULE_TYPES) for names in (own, other)
    ]
    return not own.isdisjoint(other) or max(similar_words(*telling).values(), default=0) >= _MIN_WORD_SIMILARITY
