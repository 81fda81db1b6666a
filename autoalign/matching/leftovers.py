"""Mismatches: layers that correspond, although no operation turns the shape of one into that of the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from autoalign.matching.branch_order import common
from autoalign.matching.candidates import squeeze
from autoalign.matching.features import SideEvidence, name_scores
from autoalign.matching.layers import Part, Path, Unit, Units, block_around
from autoalign.matching.names import kind, words

_ENOUGH = 0.5  # of names alike, or of one neighbour in common, for a counterpart
_NAMED = 0.1  # of names alike, for the block that both stand in to count


def mismatched_units(
    source: tuple[Units, Sequence[Part], SideEvidence],
    target: tuple[Units, Sequence[Part], SideEvidence],
    partners: Mapping[int, int],
) -> list[tuple[int, int]]:
    """Pair the layers that are left on both sides: of the same kind, and alike in name or in the same surroundings.

    Surroundings are the neighbours, the block, and the end of the network.

    Args:
        source: Units, parts and evidence of the source.
        target: Those of the target.
        partners: The matched units, target -> source.

    Returns:
        Pairs of a source and a target unit, each the other's best.
    """
    used = set(partners.values())
    rows = [index for index in range(len(source[0])) if index not in used]
    columns = [index for index in range(len(target[0])) if index not in partners]
    if not rows or not columns:
        return []
    scores = name_scores([source[0].paths[i] for i in rows], [target[0].paths[j] for j in columns])
    blocks = source[0].blocks, target[0].blocks
    together = Counter((blocks[1][j], blocks[0][i]) for j, i in partners.items())
    counterpart = dict(pair for pair, _ in reversed(together.most_common()))  # target block -> source block
    last = len(source[0]) - 1, len(target[0]) - 1
    kinds = [_kind(source[0][i], source[1]) for i in rows], [_kind(target[0][j], target[1]) for j in columns]
    alike = _equal([of for of, _ in kinds[0]], [of for of, _ in kinds[1]])
    alike |= _equal([of for _, of in kinds[0]], [of for _, of in kinds[1]])
    extra = _equal([blocks[0][i] or None for i in rows], [counterpart.get(blocks[1][j], ()) for j in columns])
    extra &= scores > _NAMED
    extra |= np.outer([i == last[0] for i in rows], [j == last[1] for j in columns])
    scores[extra] += 0.5
    for own, other in ((source[2].previous, target[2].previous), (source[2].next, target[2].next)):
        beside = [own[i] if own[i] >= 0 else None for i in rows]
        scores[_equal(beside, [partners.get(int(other[j]), -1) for j in columns])] += 0.5
    scores[_equal([source[0].paths[i] for i in rows], [target[0].paths[j] for j in columns])] += 1
    scores[~alike] = -1
    best, best_row = scores.argmax(axis=1).tolist(), scores.argmax(axis=0).tolist()
    return [
        (rows[row], columns[column])
        for row, column in enumerate(best)
        if scores[row, column] >= _ENOUGH and best_row[column] == row
    ]


def _equal(first: Sequence[Hashable], second: Sequence[Hashable]) -> NDArray[np.bool_]:
    """Tell which of one list are equal to which of another: [first, second]."""
    numbers: dict[Hashable, int] = {}
    own, other = ([numbers.setdefault(value, len(numbers)) for value in values] for values in (first, second))
    return np.equal.outer(own, other)


def _kind(unit: Unit, parts: Sequence[Part]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Count the dimensions of each of a layer's tensors, with and without those of size one."""
    shapes = [parts[index].shape for name, index in unit.parts if name in ("weight", "bias", "other")]
    return tuple(map(len, shapes)), tuple(len(squeeze(shape)) for shape in shapes)


_Values = tuple[tuple[int, ...], str]  # shape and numeric


def lone_pairs(source: Sequence[Part], target: Sequence[Part], matched: Mapping[int, int]) -> dict[int, int]:
    """Pair the parameters that are left over: the only ones of a shape and a name in modules that correspond.

    Under other names, they must stand directly in these modules, within a numbered block.

    >>> names = ("gate.weight", "up.weight", "score_bias"), ("gate.weight", "up.weight", "gate.score_bias")
    >>> own, other = ([Part(k, (*name.split("."),), (4,), "float") for k, name in enumerate(side)] for side in names)
    >>> lone_pairs(own, other, {0: 0, 1: 1})
    {2: 2}

    Args:
        source: The parts of the source.
        target: Those of the target.
        matched: From each matched part of the target to that of the source.

    Returns:
        More of the same.
    """
    used = set(matched.values())
    spare = [index for index, part in enumerate(source) if index not in used and _has_own_name(part)]
    fitting = {_values(source[index]) for index in spare}
    vacant = [
        index
        for index, part in enumerate(target)
        if index not in matched and _has_own_name(part) and _values(part) in fitting
    ]
    if not vacant:
        return {}
    partners: dict[Path, list[Path]] = {module: [] for index in vacant for module in _modules(target[index])}
    for other, partner in matched.items():
        for module in _modules(target[other]):
            if module in partners:
                partners[module].append(source[partner].path)
    sizes = Counter(module for index in used for module in _modules(source[index]))
    below = _below(source, spare), _below(target, vacant)
    pairs: dict[int, int] = {}
    for index in vacant:
        path, values = target[index].path, _values(target[index])
        for module in _modules(target[index]):
            counterpart = common(partners[module]) if partners[module] else None
            if counterpart is None or sizes[counterpart] > len(partners[module]):
                continue  # nothing tells what corresponds, or that holds more than this module does
            own, rivals = below[0].get((counterpart, values), []), below[1][module, values]
            is_direct = module == path[:-1] and all(source[k].path[:-1] == counterpart for k in own)
            if not (is_direct and block_around(path) and len(own) == len(rivals) == 1):
                own = [k for k in own if words(source[k].path[-1]) == words(path[-1]) != ()]
                rivals = [k for k in rivals if words(target[k].path[-1]) == words(path[-1])]
            if own:
                pairs |= {index: own[0]} if len(own) == len(rivals) == 1 else {}
                break
    return pairs


def _below(parts: Sequence[Part], indices: Sequence[int]) -> dict[tuple[Path, _Values], list[int]]:
    """List some parts of each shape in each module."""
    found: dict[tuple[Path, _Values], list[int]] = {}
    for index in indices:
        for module in _modules(parts[index]):
            found.setdefault((module, _values(parts[index])), []).append(index)
    return found


def _has_own_name(part: Part) -> bool:
    """Tell a name like ``sinks`` or ``score_bias`` from ``weight`` or ``bias``, which every layer has."""
    return bool(kind(part.path[-1])[1])


def _values(part: Part) -> _Values:
    return squeeze(part.shape), part.numeric


def _modules(part: Part) -> list[Path]:
    """List the modules that a part is in, from the innermost to the root."""
    return [part.path[:depth] for depth in range(len(part.path) - 1, -1, -1)]
