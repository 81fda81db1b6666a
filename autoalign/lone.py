"""Lone parameters: tensors with names of their own that nothing was matched to, in modules that correspond.

A bias that corrects the scores of a router may stand in the router on one side and in the module around it on the
other, and so belongs to no unit that fits. Once all else is matched, the modules tell which corresponds to which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from autoalign.candidates import squeeze
from autoalign.crossings import common
from autoalign.graph import Path, block_around
from autoalign.names import kind, words
from autoalign.units import Part

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
