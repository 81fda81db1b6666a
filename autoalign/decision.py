"""Deciding: how sure a match is, and whether two networks are related at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from autoalign.candidates import squeeze
from autoalign.evidence import Floats
from autoalign.graph import Path, block_around
from autoalign.matching import Assignment
from autoalign.names import numbers, stem
from autoalign.units import Part, Unit, counts_of, units_of

_LIKELY = 0.3  # the confidence from which a pair counts for the relation of two networks
_SOUND = 0.5  # the fit of shapes from which a pair is more than elements of equal number
_WHOLE = 0.35  # the mean fit below which layers have little but one tensor each in common
_LEAST = 0.3  # of either side's layers that must have a partner
_COMPLETE = 0.92  # filled share of one side's blocks that settles the relation alone
_TOGETHER = 0.6  # product of both sides' filled shares that settles it together


def confidence_of(assignment: Assignment) -> Floats:
    """Turn the score and the margin of each chosen pair into the confidence that it is right, in [0, 1]."""
    strong = 1 / (1 + np.exp(-5.0 * (assignment.score - 2.45)))
    alone = 1 / (1 + np.exp(-12.0 * (assignment.margin + 0.05)))
    return np.asarray(strong * alone, dtype=np.float32)


def related(
    assignment: Assignment,
    confidence: Floats,
    source: tuple[Sequence[Unit], Sequence[Part]],
    target: tuple[Sequence[Unit], Sequence[Part]],
    whole: tuple[Sequence[Part], Sequence[Part]],
) -> bool:
    """Tell whether two networks have enough in common for any of it to be believed.

    Where a block has a true counterpart, nearly all of its layers do, with nearly all of their tensors. Between
    unrelated networks shapes agree here and there, and blocks are filled in part. So the blocks that are touched at all
    must be filled nearly completely, on one side or, to a lesser degree, on both. And the networks must not begin with
    layers of different kinds: one that starts with a table of words is not one that starts with a convolution.

    Args:
        assignment: The chosen pairs of units.
        confidence: Of each.
        source: Units and parts of the source that take part.
        target: Those of the target.
        whole: All parts of both sides, in scope or not.
    """
    likely = confidence > _LIKELY
    used = tuple(
        np.isin(np.arange(len(units)), index[likely])
        for (units, _), index in ((source, assignment.source), (target, assignment.target))
    )
    counts = counts_of(*source), counts_of(*target)
    if not likely.any() or max(np.average(by, weights=of) for by, of in zip(used, counts, strict=True)) < _LEAST:
        return False
    if assignment.cues["shape"][likely].mean() < _WHOLE:
        return False
    sound = likely & (assignment.cues["shape"] >= _SOUND)
    partnered = [
        [side[1][part] for unit in index[sound] for _, part in side[0][unit].parts]
        for side, index in ((source, assignment.source), (target, assignment.target))
    ]
    matched = frozenset(part.tensor for part in partnered[0]), frozenset(part.tensor for part in partnered[1])
    pairs = frozenset(
        (source[1][a].tensor, target[1][b].tensor)
        for i, j in zip(assignment.source[likely].tolist(), assignment.target[likely].tolist(), strict=True)
        for (_, a), (_, b) in product(source[0][i].parts, target[0][j].parts)
    )
    tops = [frozenset(part.path[:1] for part in side) for side in partnered]
    for around in ((source[1], target[1]), whole):
        own, other = (units_of(parts) for parts in around)
        upper = [
            [unit for unit in units if unit.path[:1] in top] for units, top in zip((own, other), tops, strict=True)
        ]
        for units in ((own, other), (upper[0], upper[1])):
            if _begin_differently(units, around, matched, pairs):
                return False
    filled = _filled(source[0], used[0], counts[0]), _filled(target[0], used[1], counts[1])
    return max(filled) >= _COMPLETE or filled[0] * filled[1] >= _TOGETHER


def _begin_differently(
    units: tuple[Sequence[Unit], Sequence[Unit]],
    parts: tuple[Sequence[Part], Sequence[Part]],
    matched: tuple[frozenset[int], frozenset[int]],
    pairs: frozenset[tuple[int, int]],
) -> bool:
    """Tell whether the first layers of two networks are of different kinds and matched to nothing, or to no first one.

    Args:
        units: Of both sides.
        parts: Of both sides.
        matched: Tensors of both sides with partners whose shapes fit well.
        pairs: Tensors of both sides that are matched to one another, however they fit.
    """
    first = [_first_layer(*side) for side in zip(units, parts, strict=True)]
    if first[0] is None or first[1] is None or len(first[0].shape) == len(first[1].shape):
        return False
    if (first[0].tensor, first[1].tensor) in pairs:
        return False
    return first[0].tensor not in matched[0] and first[1].tensor not in matched[1]


def twins(assignment: Assignment, source: tuple[Sequence[Unit], Sequence[Part]]) -> NDArray[np.bool_]:
    """Find the pairs of a parameter that stands alone and has a twin of its name and shape, which is left over."""
    used = set(assignment.source.tolist())
    alone = [_alone(unit, source[1]) for unit in source[0]]
    left = {twin for index, twin in enumerate(alone) if twin and index not in used}
    return np.asarray([alone[i] in left for i in assignment.source], dtype=bool)


def _alone(unit: Unit, parts: Sequence[Part]) -> tuple[str, tuple[int, ...]] | None:
    """Give the name and the shape of a parameter that belongs to no layer and no list; None for all else."""
    if unit.kinds != ("other",) or len(unit.path) < 2 or any(map(numbers, unit.path)):
        return None
    return unit.path[-1], parts[unit.parts[0][1]].shape


def special_units(units: Sequence[Unit], parts: Sequence[Part]) -> list[int]:
    """List the layers whose shape says something: not all of its sizes are the one that most layers have.

    A matrix of the network's width by its width may be anything; one with as many rows as there are words may not.
    """
    sizes = [{size for _, part in unit.parts for size in squeeze(parts[part].shape)} for unit in units]
    common = Counter(size for of in sizes for size in of).most_common(1)
    return [index for index, of in enumerate(sizes) if of - {size for size, _ in common}]


def _first_layer(units: Sequence[Unit], parts: Sequence[Part]) -> Part | None:
    """Find the matrix or the kernel of the first layer that has one."""
    for unit in units:
        for values, part in unit.parts:
            if values == "weight" and parts[part].path[-1] == "weight" and len(parts[part].shape) > 1:
                return parts[part]
    return None


def _filled(units: Sequence[Unit], used: NDArray[np.bool_], counts: NDArray[np.int64]) -> float:
    """Measure the share of partnered layers in the blocks that have any."""
    numbered: dict[Path, int] = {}
    block = np.asarray([numbered.setdefault(block_around(unit.path), len(numbered)) for unit in units])
    filled, size = np.bincount(block, used * counts), np.bincount(block, counts)
    return float(filled.sum() / max(size[filled > 0].sum(), 1))


def coherence(assignment: Assignment, source: Sequence[Unit], target: Sequence[Unit], confidence: Floats) -> Floats:
    """Tell how far each pair's blocks are filled, against other blocks of the same kind, in [0, 1].

    A pair that takes a single layer of a block, where others of its kind are taken whole, is a coincidence.
    """
    likely = confidence > _LIKELY
    result = np.ones(len(confidence), dtype=np.float32)
    for units, index in ((source, assignment.source), (target, assignment.target)):
        block = [block_around(unit.path) for unit in units]
        size, taken = Counter(block), Counter(block[i] for i in index[likely])
        typical: dict[Path, list[float]] = {}
        for path, count in taken.items():
            typical.setdefault(tuple(map(stem, path)), []).append(count / size[path])
        usual = {kind: float(np.median(shares)) for kind, shares in typical.items()}
        own = [taken[block[i]] / size[block[i]] / usual.get(tuple(map(stem, block[i])), 1.0) for i in index]
        result = np.minimum(result, np.asarray(own, dtype=np.float32))
    return result
