"""Matchers that compare names among the tensors of one shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

Keys = dict[tuple[int, ...], list[str]]


def exact(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, str]:
    """Take equal names of equal shape, as ``load_state_dict(strict=False)`` would."""
    return {key: key for key, tensor in target.items() if key in source and source[key].shape == tensor.shape}


def longest_suffix(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, str]:
    """Take the source key of equal shape that shares the most components at the end, if no other shares as many.

    detectron2's and mmcv's loaders work so; here a key need not be the whole end of the other.
    """
    by_shape = _by_shape(source)
    matched = {}
    for key, tensor in target.items():
        lengths = {other: _common_suffix(key, other) for other in by_shape.get(tuple(tensor.shape), ())}
        longest = max(lengths.values(), default=0)
        found = [other for other, length in lengths.items() if length == longest]
        if longest and len(found) == 1:
            matched[key] = found[0]
    return matched


def hungarian(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, str]:
    """Assign the tensors of each shape so that the similarities of their names add up to the most."""
    from rapidfuzz import fuzz, process
    from scipy.optimize import linear_sum_assignment

    by_shape = _by_shape(source)
    matched: dict[str, str] = {}
    for shape, keys in _by_shape(target).items():
        others = by_shape.get(shape, [])
        if others:
            rows, columns = linear_sum_assignment(process.cdist(keys, others, scorer=fuzz.ratio), maximize=True)
            matched.update((keys[row], others[column]) for row, column in zip(rows, columns, strict=True))
    return matched


def _by_shape(tensors: Mapping[str, Tensor]) -> Keys:
    keys: Keys = defaultdict(list)
    for key, tensor in tensors.items():
        keys[tuple(tensor.shape)].append(key)
    return keys


def _common_suffix(first: str, second: str) -> int:
    count = 0
    for one, other in zip(reversed(first.split(".")), reversed(second.split(".")), strict=False):
        if one != other:
            break
        count += 1
    return count
