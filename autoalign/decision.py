"""Deciding: how sure a match is, and whether two networks are related at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoalign.candidates import squeeze
from autoalign.evidence import Floats
from autoalign.graph import Path, block_around
from autoalign.matching import Assignment
from autoalign.names import stem
from autoalign.units import Part, Unit

_LIKELY = 0.3  # the confidence from which a pair counts for the relation of two networks
_SOUND = 0.5  # the fit of shapes from which a pair is more than elements of equal number
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
) -> bool:
    """Tell whether two networks have enough in common for any of it to be believed.

    Where a block has a true counterpart, nearly all of its layers do. Between unrelated networks shapes agree here
    and there, and blocks are filled in part. So the blocks that are touched at all must be filled nearly completely,
    on one side or, to a lesser degree, on both. And the first layers must not be of different kinds: a network that
    starts with a table of words is not one that starts with a convolution.
    """
    likely = confidence > _LIKELY
    used = tuple(
        np.isin(np.arange(len(units)), index[likely])
        for (units, _), index in ((source, assignment.source), (target, assignment.target))
    )
    if not likely.any() or max(used[0].mean(), used[1].mean()) < _LEAST:
        return False
    first = [_first_layer(*side) for side in (source, target)]
    if first[0] and first[1] and first[0][1] != first[1][1]:
        sound = likely & (assignment.cues["shape"] >= _SOUND)
        if first[0][0] not in assignment.source[sound] and first[1][0] not in assignment.target[sound]:
            return False
    filled = _filled(source[0], used[0]), _filled(target[0], used[1])
    return max(filled) >= _COMPLETE or filled[0] * filled[1] >= _TOGETHER


def special_units(units: Sequence[Unit], parts: Sequence[Part]) -> list[int]:
    """List the layers whose shape says something: not all of its sizes are the one that most layers have.

    A matrix of the network's width by its width may be anything; one with as many rows as there are words may not.
    """
    sizes = [{size for _, part in unit.parts for size in squeeze(parts[part].shape)} for unit in units]
    common = Counter(size for of in sizes for size in of).most_common(1)
    return [index for index, of in enumerate(sizes) if of - {size for size, _ in common}]


def _first_layer(units: Sequence[Unit], parts: Sequence[Part]) -> tuple[int, int] | None:
    """Find the first layer with a matrix or a kernel, and how many dimensions that has."""
    for index, unit in enumerate(units):
        for values, part in unit.parts:
            if values == "weight" and parts[part].path[-1] == "weight" and len(parts[part].shape) > 1:
                return index, len(parts[part].shape)
    return None


def _filled(units: Sequence[Unit], used: NDArray[np.bool_]) -> float:
    """Measure the share of partnered layers in the blocks that have any."""
    blocks: dict[Path, list[bool]] = {}
    for unit, partnered in zip(units, used, strict=True):
        blocks.setdefault(block_around(unit.path), []).append(bool(partnered))
    touched = [block for block in blocks.values() if any(block)]
    return sum(map(sum, touched)) / max(sum(map(len, touched)), 1)


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
