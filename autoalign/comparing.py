"""Comparing: how far two tensors are apart that should be equal, whatever their layouts, and what outputs belong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from autoalign.candidates import squeeze

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of outputs


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """Two outputs that belong together."""

    source: str  # the path in what the source model returns; "" where that is a tensor
    target: str
    difference: float


def relative_difference(got: Tensor, want: Tensor) -> float | None:
    """Tell the largest difference of two tensors as a share of the largest value that is wanted.

    Tensors of other shapes with as many elements are compared as sets of values: one may have channels last, or a
    grid flattened. Two that are both not a number, or equally infinite, are equal.

    >>> relative_difference(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0]))
    0.25
    >>> relative_difference(torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(2, 3).T)
    0.0

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
        first, second = first.flatten().sort().values, second.flatten().sort().values
    first, second = first.flatten(), second.flatten()
    same = (first == second) | (first.isnan() & second.isnan())
    if bool(same.all()):
        return 0.0
    largest = float((first - second).abs().masked_fill(same, 0).max())
    scale = float(second.abs().masked_fill(~second.isfinite(), 0).max())
    return largest / scale if largest == largest and scale else inf


def _comparable(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_floating_point():
        return tensor if tensor.dtype == torch.float64 else tensor.float()
    return tensor.double()


def tolerance_of(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """Choose a tolerance by the least precise floating point type among outputs."""
    dtypes = {tensor.dtype for tensor in (*tensors.values(), *others.values())}
    return max((TOLERANCES.get(dtype, 0.0) for dtype in dtypes), default=0.0) or TOLERANCES[torch.float32]


def output_differences(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> list[OutputDifference]:
    """Pair the outputs of two models and compare them: by name first, the others in order, where they have one size.

    >>> output_differences({"logits": torch.ones(2)}, {"": torch.ones(2), "1": torch.ones(3)})
    [OutputDifference(source='', target='logits', difference=0.0)]
    """
    pairs = [(name, name) for name in want if name in got and got[name].numel() == want[name].numel()]
    free = [name for name in got if name not in dict(pairs)]
    for name in want:
        if name not in dict(pairs):
            sizes = [other for other in free if got[other].numel() == want[name].numel()]
            alike = [other for other in sizes if squeeze(got[other].shape) == squeeze(want[name].shape)]
            for other in (alike or sizes)[:1]:
                pairs.append((name, other))
                free.remove(other)
    found = [(first, second, relative_difference(got[second], want[first])) for first, second in pairs]
    return [OutputDifference(first, second, apart) for first, second, apart in found if apart is not None]
