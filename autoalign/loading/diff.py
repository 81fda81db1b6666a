"""Differences of two checkpoints under the same keys: in what is there, in shapes, in dtypes and in values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from autoalign.checkpoints.checkpoint import Checkpoint
from autoalign.checkpoints.formats.safetensors import blocks
from autoalign.errors import InputError
from autoalign.plan.specs import TensorSpec


@dataclass(frozen=True, slots=True)
class Changed:
    """A tensor that is not the same in both checkpoints."""

    first: TensorSpec
    second: TensorSpec
    difference: float | None  # the largest of the values; infinite where one is NaN; None if the shapes differ
    magnitude: float | None  # the largest of the first one's values

    @property
    def key(self) -> str:
        """The key that both have."""
        return self.first.key


@dataclass(frozen=True, slots=True)
class Differences:
    """What two checkpoints differ in."""

    only_first: tuple[TensorSpec, ...]
    only_second: tuple[TensorSpec, ...]
    changed: tuple[Changed, ...]  # in the first one's order
    equal: int  # tensors of which shape, dtype and all values are equal

    @property
    def none(self) -> bool:
        """True if both hold the same."""
        return not (self.only_first or self.only_second or self.changed)


def differences(
    first: Checkpoint, second: Checkpoint, progress: Callable[[int, int], object] | None = None
) -> Differences:
    """Compare two checkpoints key by key, with no more than two tensors in memory.

    Values count as equal if they compare equal or are both NaN, whatever the dtypes; another dtype alone is a
    difference too.

    >>> from autoalign.checkpoints.checkpoint import checkpoint_of
    >>> one, other = ({"a": torch.tensor([1.0, value]), "b": torch.ones(2)} for value in (2.0, 2.5))
    >>> found = differences(checkpoint_of(one), checkpoint_of(other))
    >>> found.equal, [(item.key, item.difference) for item in found.changed]
    (1, [('a', 0.5)])

    Args:
        first: A checkpoint with values.
        second: Another.
        progress: Called with the number of keys compared and of all.

    Raises:
        InputError: A tensor is on the meta device.
    """
    others = {spec.key: spec for spec in second.specs}
    common = [(spec, others[spec.key]) for spec in first.specs if spec.key in others]
    changed, equal = [], 0
    for done, (spec, other) in enumerate(common, start=1):
        difference: float | None = None
        magnitude: float | None = None
        if spec.shape == other.shape:
            difference, magnitude = _compared(spec.key, first[spec.key], second[spec.key])
        if difference == 0 and spec.dtype == other.dtype:
            equal += 1
        else:
            changed.append(Changed(spec, other, difference, magnitude))
        if progress is not None:
            progress(done, len(common))
    return Differences(
        only_first=tuple(spec for spec in first.specs if spec.key not in others),
        only_second=tuple(spec for spec in second.specs if spec.key not in first),
        changed=tuple(changed),
        equal=equal,
    )


def _compared(key: str, one: Tensor, other: Tensor) -> tuple[float, float]:
    """Find the largest difference of two tensors' values and the largest magnitude of the first one's."""
    if one.is_meta or other.is_meta:
        raise InputError(f"{key} is on the meta device and has no values to compare. Give checkpoints with values.")
    one, other = (side.detach().to_dense().cpu().contiguous() for side in (one, other))
    difference = 0.0
    for first, second in zip(blocks(one), blocks(other), strict=True):
        if first.dtype != second.dtype or not torch.equal(_bits(first), _bits(second)):
            difference = max(difference, _largest_difference(first, second))
    return difference, max(map(_magnitude, blocks(one))) if difference else 0.0


def _largest_difference(first: Tensor, second: Tensor) -> float:
    wide = torch.complex128 if first.is_complex() or second.is_complex() else torch.float64
    values = first.to(wide), second.to(wide)
    apart = (values[0] - values[1]).abs()
    apart[(values[0] == values[1]) | (values[0].isnan() & values[1].isnan())] = 0  # of infinities, it is NaN
    largest = float(apart.nan_to_num(nan=inf, posinf=inf).max()) if apart.numel() else 0.0
    whole = first.dtype == second.dtype and not (first.is_floating_point() or first.is_complex())
    return max(largest, 1.0) if whole else largest  # large integers are rounded, and their bits are not equal


def _bits(flat: Tensor) -> Tensor:
    strided = flat.stride() == (1,)  # else it is one element of another stride
    return (flat if strided else flat.clone(memory_format=torch.contiguous_format)).view(torch.uint8)


def _magnitude(block: Tensor) -> float:
    values = block.to(torch.complex128 if block.is_complex() else torch.float64).abs()
    return float(values.nan_to_num(nan=0.0, posinf=inf).max())
