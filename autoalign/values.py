"""Values that a person should know of before they are in a model: NaN, and what a cast to another dtype loses."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Pieces = Callable[[Tensor], Iterable[Tensor]]  # from a tensor to its values, piece by piece

_SAMPLE = 2**10  # elements in a row that are looked at, at three places of a tensor


def in_one(tensor: Tensor) -> tuple[Tensor]:
    """Give a tensor in one piece, as it is."""
    return (tensor,)


def nan_count(tensor: Tensor, pieces: Pieces = in_one) -> int:
    """Count the NaN in a tensor, if there are some in a sample of it; 0 if not.

    Small tensors are looked at as a whole. Of others, three stretches are, so that a mapped file is not read for it.

    >>> nan_count(torch.full((64, 64), torch.nan))
    4096

    Args:
        tensor: What to look at.
        pieces: How to read it, where it is in a file.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()) or not _has_values(tensor):
        return 0
    if tensor.layout != torch.strided:
        return 0 if tensor.layout != torch.sparse_coo else nan_count(tensor._values())
    parts = [tensor] if tensor.numel() <= 3 * _SAMPLE else _stretches(tensor)
    sums = [_wide(piece).sum().item() for part in parts for piece in pieces(part)]
    if all(total == total for total in sums):  # a NaN makes one of the sum, as do infinities of both signs
        return 0
    return sum(int(torch.isnan(_wide(piece)).sum()) for piece in pieces(tensor))


def _has_values(tensor: Tensor) -> bool:
    """Whether a tensor has values that can be looked at, as a fake one has not."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.numel() > 0


def _stretches(tensor: Tensor) -> list[Tensor]:
    """Take stretches at the beginning, in the middle and at the end of a tensor, as views."""
    if tensor.is_contiguous():
        tensor = tensor.view(-1)
    places = (0, 1, 2)
    parts = [tensor] * len(places)
    while parts[0].dim() > 1:
        parts = [part[(len(part) - 1) * place // 2] for part, place in zip(parts, places, strict=True)]
    length = min(_SAMPLE, len(parts[0]))
    return [
        part.narrow(0, (len(part) - length) * place // 2, length) for part, place in zip(parts, places, strict=True)
    ]


def _wide(tensor: Tensor) -> Tensor:
    """Give a tensor a dtype with which torch calculates, unlike with float8."""
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor


def loss_of_kind(source: torch.dtype, target: torch.dtype) -> str | None:
    """Say what any cast from one dtype to another loses; None where that is nothing but the last digits.

    >>> loss_of_kind(torch.float32, torch.int8)
    'fractions are cut off'
    >>> loss_of_kind(torch.float32, torch.bfloat16) is None
    True
    """
    if source == target:
        return None
    if source.is_complex and not target.is_complex:
        return "imaginary parts are dropped"
    if target == torch.bool:
        return "all but zero becomes True"
    if source.is_floating_point and not (target.is_floating_point or target.is_complex):
        return "fractions are cut off"
    if target.is_floating_point and target.itemsize == 1:
        return "values are rounded to 8 bits"
    return None


def loss_of_range(tensor: Tensor, target: torch.dtype, pieces: Pieces = in_one) -> str | None:
    """Say what a cast loses of the values that a tensor has; it is only read where its dtype has a wider range.

    >>> loss_of_range(torch.tensor([1.0, 7e4]), torch.float16)
    'values up to 7e+04 become infinite'
    >>> loss_of_range(torch.tensor([1, 300]), torch.uint8)
    'values from 1 to 300 do not fit'
    >>> loss_of_range(torch.ones(1), torch.float16) is None
    True

    Args:
        tensor: What is cast.
        target: The dtype that it gets.
        pieces: As of ``nan_count``.
    """
    source = tensor.dtype
    if source == target or source.is_complex or tensor.layout != torch.strided or not _has_values(tensor):
        return None
    if source.is_floating_point:
        if not target.is_floating_point or target.itemsize == 1 or not _limit(source) > 2 * _limit(target):
            return None
        ranges = (torch.aminmax(torch.nan_to_num(piece, 0, 0, 0)) for piece in pieces(tensor))
        largest = max(max(float(found.max), -float(found.min)) for found in ranges)
        # what is rounded to the largest number is within the range
        fits = bool(torch.isfinite(torch.tensor(largest, dtype=torch.float64).to(source).to(target)))
        return None if fits else f"values up to {largest:.1g} become infinite"
    if source == torch.bool or target == torch.bool:
        return None
    exact = _exact_integers(target)
    if exact is None or (source.itemsize < 8 and exact[1] >= 2 ** (8 * source.itemsize) and exact[0] < 0):
        return None
    found = [torch.aminmax(piece.long()) for piece in pieces(tensor)]
    low, high = min(int(each.min) for each in found), max(int(each.max) for each in found)
    return None if exact[0] <= low and high <= exact[1] else f"values from {low} to {high} do not fit"


def _limit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max


def _exact_integers(dtype: torch.dtype) -> tuple[int, int] | None:
    """Tell between which numbers a dtype holds every integer; None for a complex one, which is seldom."""
    if dtype.is_complex:
        return None
    if not dtype.is_floating_point:
        return torch.iinfo(dtype).min, torch.iinfo(dtype).max
    most = round(2 / torch.finfo(dtype).eps)
    return -most, most
