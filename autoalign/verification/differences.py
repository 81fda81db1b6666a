"""Differences: how far two tensors are apart, and which sizes of their values that is a share of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from autoalign.matching.layers import squeeze

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of outputs

_MIN_SLICE = 8  # values of a slice that counts by itself
_IGNORED_ROUNDINGS = 4  # of the largest value, which are no difference of a slice with small ones
_ROUNDINGS = 100  # by which the sums of equal tensors may differ, within these bounds
_MIN_PRECISION, _MAX_PRECISION = 1e-5, 1e-2
_CHUNK = 1 << 14  # values that are summed up at once, so that they stay in the cache


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """Two outputs that belong together."""

    source: str  # the path in what the source model returns; "" where that is a tensor
    target: str
    difference: float


def relative_difference(got: Tensor, want: Tensor, sizes: Tensor | None = None) -> float | None:
    """Compute the largest difference of two tensors as a share of the largest value that is wanted.

    With ``sizes`` of the wanted values, as ``with_sizes`` measures them, that of each slice of the tensor counts by
    itself, in each dimension: a small channel beside a large one too. Tensors of other shapes with as many elements are
    compared as sets of values: one may have channels last, or a grid flattened. Two that are both not a number, or
    equally infinite, are equal.

    >>> relative_difference(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0]))
    0.25
    >>> relative_difference(torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(2, 3).T)
    0.0
    >>> want, noise = torch.tensor([[1.0], [1e-3]]).expand(2, 9), torch.tensor([[0.0], [1e-4]])
    >>> [f"{relative_difference(want + noise, want, sizes):.0e}" for sizes in (None, want)]
    ['1e-04', '1e-01']

    Returns:
        The difference; infinite where nothing but zeros was wanted; None where the numbers of elements differ.
    """
    if got.numel() != want.numel() or got.is_meta or want.is_meta:
        return None
    if not got.numel():
        return 0.0
    first, second = _comparable(got).to(want.device), _comparable(want)
    if first.dtype != second.dtype:
        first, second = first.double(), second.double()
    if squeeze(first.shape) != squeeze(second.shape):
        first, second, sizes = first.flatten().sort().values, second.flatten().sort().values, None
    first = first.reshape(second.shape)
    same = (first == second) | (first.isnan() & second.isnan())
    if bool(same.all()):
        return 0.0
    apart = (first - second).abs().masked_fill(same, 0)
    largest = float(apart.max())
    whole = float(second.abs().masked_fill(~second.isfinite(), 0).max())
    if largest != largest or not whole:
        return inf
    found = largest / whole
    if sizes is None or sizes.shape != second.shape:
        return found
    dtypes = [tensor.dtype for tensor in (got, want) if tensor.is_floating_point()]
    ignored = _IGNORED_ROUNDINGS * max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0) * whole
    for dim, count in enumerate(second.shape):
        if count > 1 and second.numel() >= _MIN_SLICE * count:
            others = [other for other in range(second.dim()) if other != dim]
            errors, scales = apart.amax(others), sizes.amax(others).clamp(max=whole)
            shares = errors / scales.to(errors)
            found = max(found, float(shares.masked_fill(errors <= ignored, 0).max()))
    return found


def _comparable(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor.double()


def tolerance_of(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """Choose a tolerance by the least precise floating point type among outputs."""
    dtypes = {tensor.dtype for tensor in (*tensors.values(), *others.values())}
    return max((TOLERANCES.get(dtype, 0.0) for dtype in dtypes), default=0.0) or TOLERANCES[torch.float32]


def output_differences(
    got: Mapping[str, Tensor], want: Mapping[str, Tensor], sizes: Mapping[str, Tensor]
) -> list[OutputDifference]:
    """Pair the outputs of two models and compare them: by name first, the others in order, where they have one size.

    >>> output_differences({"logits": torch.ones(2)}, {"": torch.ones(2), "1": torch.ones(3)}, {})
    [OutputDifference(source='', target='logits', difference=0.0)]
    """
    pairs = [(name, name) for name in want if name in got and got[name].numel() == want[name].numel()]
    free = [name for name in got if name not in dict(pairs)]
    for name in want:
        if name not in dict(pairs):
            fitting = [other for other in free if got[other].numel() == want[name].numel()]
            alike = [other for other in fitting if squeeze(got[other].shape) == squeeze(want[name].shape)]
            for other in (alike or fitting)[:1]:
                pairs.append((name, other))
                free.remove(other)
    found = [(one, other, relative_difference(got[other], want[one], sizes.get(one))) for one, other in pairs]
    return [OutputDifference(first, second, apart) for first, second, apart in found if apart is not None]


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums of the powers of a tensor's values, which recognise them in any order and so in any layout."""

    numel: int
    signed: tuple[float, ...]  # of the values and of their cubes
    absolute: tuple[float, ...]  # of the absolute values to the power of 1, 2, 3 and 4
    precision: float  # relative difference up to which sums count as equal

    def like(self, other: Sums) -> bool:
        """Return True if two tensors have the same values, in any order, as far as sums tell."""
        allowed = max(self.precision, other.precision)
        scales = [max(pair) for pair in zip(self.absolute, other.absolute, strict=True)]
        sums = [*zip(self.absolute, other.absolute, strict=True), *zip(self.signed, other.signed, strict=True)]
        return self.numel == other.numel and all(
            abs(own - theirs) <= allowed * scale or (own == theirs)
            for (own, theirs), scale in zip(sums, [*scales, scales[0], scales[2]], strict=True)
        )


def sums_of(tensor: Tensor) -> Sums:
    """Sum up the powers of a tensor's values in double precision.

    >>> sums = sums_of(torch.tensor([1.0, -2.0]))
    >>> sums.signed, sums.absolute, sums.like(sums_of(torch.tensor([[-2.0], [1.0]])))
    ((-1.0, -7.0), (3.0, 5.0, 9.0, 17.0), True)
    """
    sums = torch.zeros(6, dtype=torch.float64, device=tensor.device)
    for part in torch.split(tensor.detach().flatten(), _CHUNK):
        values = part.double()
        squares, sizes = values * values, values.abs()
        factors = ((values, squares), (sizes, squares), (squares, squares))
        sums += torch.stack([values.sum(), sizes.sum(), squares.sum(), *(one.dot(other) for one, other in factors)])
    first, absolute, second, third, absolute_third, fourth = sums.tolist()
    precision = min(max(_ROUNDINGS * torch.finfo(tensor.dtype).eps, _MIN_PRECISION), _MAX_PRECISION)
    return Sums(tensor.numel(), (first, third), (absolute, second, absolute_third, fourth), precision)
