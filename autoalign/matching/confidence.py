"""Calibration: from the optimisation's own confidence to one that was held by matches with known truth.

``calibration.json`` is a table of knots: a confidence as the optimisation gives it, and the least share of right ones
(the lower end of Wilson's interval at 95 %) among the matches about there. ``python -m
benchmarks.accuracy.calibration`` remakes it. It only ever lowers a confidence: what is said is at most what was seen.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cache
from importlib.resources import files
from statistics import median

import numpy as np
from numpy.typing import NDArray

from autoalign.matching.assignment import Assignment
from autoalign.matching.features import Floats
from autoalign.matching.layers import Part, Path, Unit, Units, counts_of, units_of
from autoalign.plan.keys import numbers, stem

FILE = "calibration.json"


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
    knots = json.loads(files("autoalign.matching").joinpath(FILE).read_text(encoding="utf-8"))["knots"]
    raw, held = zip(*((knot["raw"], knot["held"]) for knot in knots), strict=True)
    return np.asarray(raw, dtype=np.float64), np.asarray(held, dtype=np.float64)


_LIKELY = 0.3  # the confidence from which a pair counts for the relation of two networks
_SOUND = 0.5  # the fit of shapes from which a pair is more than elements of equal number
_WHOLE = 0.35  # the mean fit below which layers have little but one tensor each in common
_LEAST = 0.3  # of either side's layers that must have a partner
_COMPLETE = 0.92  # filled share of one side's blocks that settles the relation alone
_TOGETHER = 0.6  # product of both sides' filled shares that settles it together

_Side = tuple[Units, Sequence[Part]]


def confidence_of(assignment: Assignment) -> Floats:
    """Turn the score and the margin of each chosen pair into the confidence that it is right, in [0, 1]."""
    strong = 1 / (1 + np.exp(-5.0 * (assignment.score - 2.45)))
    alone = 1 / (1 + np.exp(-12.0 * (assignment.margin + 0.05)))
    return np.asarray(strong * alone, dtype=np.float32)


def related(
    assignment: Assignment,
    confidence: Floats,
    source: _Side,
    target: _Side,
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
    counts = counts_of(*source), counts_of(*target)
    used = np.zeros(len(source[0]), dtype=bool), np.zeros(len(target[0]), dtype=bool)
    used[0][assignment.source[likely]] = used[1][assignment.target[likely]] = True
    if not likely.any() or max(of[by].sum() / of.sum() for by, of in zip(used, counts, strict=True)) < _LEAST:
        return False
    if assignment.cues["shape"][likely].mean() < _WHOLE:
        return False
    filled = _filled(source[0], used[0], counts[0]), _filled(target[0], used[1], counts[1])
    if max(filled) < _COMPLETE and filled[0] * filled[1] < _TOGETHER:
        return False
    sound = likely & (assignment.cues["shape"] >= _SOUND)
    tops = [
        {side[1][part].path[:1] for unit in index[sound].tolist() for _, part in side[0][unit].parts}
        for side, index in ((source, assignment.source), (target, assignment.target))
    ]
    for around in ((source, target), [(units_of(parts), parts) for parts in whole]):
        for own, other in (map(_first_layer, around), map(_first_layer, around, tops)):
            if own is None or other is None or len(own.shape) == len(other.shape):
                continue
            if not _are_partnered(own.tensor, other.tensor, assignment, likely, source, target):
                return False
    return True


def _are_partnered(
    own: int,
    other: int,
    assignment: Assignment,
    likely: NDArray[np.bool_],
    source: _Side,
    target: _Side,
) -> bool:
    """Tell whether two tensors are matched to one another, however they fit, or one of them to one that fits well."""
    for place in np.flatnonzero(likely):
        units = source[0][assignment.source[place]], target[0][assignment.target[place]]
        has_own = any(source[1][part].tensor == own for _, part in units[0].parts)
        has_other = any(target[1][part].tensor == other for _, part in units[1].parts)
        if (has_own and has_other) or ((has_own or has_other) and assignment.cues["shape"][place] >= _SOUND):
            return True
    return False


def twins(assignment: Assignment, source: _Side) -> NDArray[np.bool_]:
    """Find the pairs of a parameter that stands alone and has a twin of its name and shape, which is left over."""
    used = set(assignment.source.tolist())
    left = {_alone(unit, source[1]) for index, unit in enumerate(source[0]) if index not in used} - {None}
    return np.asarray([bool(left) and _alone(source[0][i], source[1]) in left for i in assignment.source], dtype=bool)


def _alone(unit: Unit, parts: Sequence[Part]) -> tuple[str, tuple[int, ...]] | None:
    """Give the name and the shape of a parameter that belongs to no layer and no list; None for all else."""
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


def _first_layer(side: _Side, tops: Collection[Path] | None = None) -> Part | None:
    """Find the matrix or the kernel of the first layer that has one, of all layers or of those in some top modules."""
    units, parts = side
    for unit in units:
        for values, index in unit.parts:
            part = parts[index]
            is_matrix = values == part.path[-1] == "weight" and len(part.shape) > 1
            if is_matrix and (tops is None or part.path[:1] in tops):
                return part
    return None


def _filled(units: Units, used: NDArray[np.bool_], counts: NDArray[np.int64]) -> float:
    """Measure the share of partnered layers in the blocks that have any."""
    numbered: dict[Path, int] = {}
    block = np.asarray([numbered.setdefault(block, len(numbered)) for block in units.blocks])
    filled, size = np.bincount(block, used * counts), np.bincount(block, counts)
    return float(filled.sum() / max(size[filled > 0].sum(), 1))


def coherence(assignment: Assignment, source: Units, target: Units, confidence: Floats) -> Floats:
    """Tell how far each pair's blocks are filled, against other blocks of the same kind, in [0, 1].

    A pair that takes a single layer of a block, where others of its kind are taken whole, is a coincidence.
    """
    likely = confidence > _LIKELY
    result = np.ones(len(confidence), dtype=np.float32)
    for units, index in ((source, assignment.source), (target, assignment.target)):
        block = units.blocks
        size, taken = Counter(block), Counter([block[i] for i in index[likely].tolist()])
        typical: dict[Path, list[float]] = {}
        for path, count in taken.items():
            typical.setdefault(tuple(map(stem, path)), []).append(count / size[path])
        usual = {kind: median(shares) for kind, shares in typical.items()}
        share = {path: taken[path] / size[path] / usual.get(tuple(map(stem, path)), 1.0) for path in size}
        result = np.minimum(result, np.asarray([share[block[i]] for i in index.tolist()], dtype=np.float32))
    return result
