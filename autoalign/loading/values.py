"""Values: what the caller should know of those that are loaded, NaN and losses of a cast."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from autoalign.alignment import Alignment
from autoalign.errors import listed
from autoalign.loading.mapped import CutError
from autoalign.plan.dequantise import is_dequantised
from autoalign.plan.matches import Match
from autoalign.plan.regions import Piece
from autoalign.reports.rows import escaped

Pieces = Callable[[Tensor], Iterable[Tensor]]  # from a tensor to its values, piece by piece

_SAMPLE_LENGTH = 2**10  # elements in a row that are examined, at three places of a tensor


def in_one(tensor: Tensor) -> tuple[Tensor]:
    """Return a tensor as the only piece of it."""
    return (tensor,)


def nan_count(tensor: Tensor, pieces: Pieces = in_one) -> int:
    """Count the NaN in a tensor, if there are some in a sample of it; 0 if not.

    The sample is all of a small tensor and three stretches of any other, so that a mapped file is not read for it.

    >>> nan_count(torch.full((64, 64), torch.nan))
    4096
    """
    if not (tensor.is_floating_point() or tensor.is_complex()) or not _has_values(tensor):
        return 0
    if tensor.layout != torch.strided:
        return 0 if tensor.layout != torch.sparse_coo else nan_count(tensor._values())
    parts = [tensor] if tensor.numel() <= 3 * _SAMPLE_LENGTH else _stretches(tensor)
    sums = [_wide(piece).sum().item() for part in parts for piece in pieces(part)]
    if all(total == total for total in sums):  # a NaN makes one of the sum, as do infinities of both signs
        return 0
    return sum(int(torch.isnan(_wide(piece)).sum()) for piece in pieces(tensor))


def _has_values(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.numel() > 0  # unlike a fake one


def _stretches(tensor: Tensor) -> list[Tensor]:
    """View stretches at the beginning, in the middle and at the end of a tensor."""
    if tensor.is_contiguous():
        tensor = tensor.view(-1)
    found = []
    for place in range(3):
        part = tensor
        while part.dim() > 1:
            part = part[(len(part) - 1) * place // 2]
        length = min(_SAMPLE_LENGTH, len(part))
        found.append(part.narrow(0, (len(part) - length) * place // 2, length))
    return found


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor  # torch does not calculate with float8


def loss_of_kind(source: torch.dtype, target: torch.dtype) -> str | None:
    """Describe what any cast from one dtype to another loses; None where that is nothing but the last digits.

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
    """Describe what a cast loses of a tensor's values; it is only read where its dtype has a wider range.

    >>> loss_of_range(torch.tensor([1.0, 7e4]), torch.float16)
    'values up to 7e+04 become infinite'
    >>> loss_of_range(torch.tensor([1, 300]), torch.uint8)
    'values from 1 to 300 do not fit'
    >>> loss_of_range(torch.ones(1), torch.float16) is None
    True
    """
    source = tensor.dtype
    if source == target or source.is_complex or tensor.layout != torch.strided or not _has_values(tensor):
        return None
    if source.is_floating_point:
        if not target.is_floating_point or target.itemsize == 1:
            return None
        if not torch.finfo(source).max > 2 * torch.finfo(target).max:
            return None
        ranges = (torch.aminmax(torch.nan_to_num(piece, 0, 0, 0)) for piece in pieces(tensor))
        largest = max(max(float(found.max), -float(found.min)) for found in ranges)
        # what is rounded to the largest number is within the range
        fits = bool(torch.isfinite(torch.tensor(largest, dtype=torch.float64).to(source).to(target)))
        return None if fits else f"values up to {largest:.1g} become infinite"
    if source == torch.bool or target == torch.bool:
        return None
    if target.is_complex:  # which is rare
        return None
    if target.is_floating_point:
        last = round(2 / torch.finfo(target).eps)
        first = -last
    else:
        first, last = torch.iinfo(target).min, torch.iinfo(target).max
    if source.itemsize < 8 and last >= 2 ** (8 * source.itemsize) and first < 0:
        return None
    found = [torch.aminmax(piece.long()) for piece in pieces(tensor)]
    low, high = min(int(each.min) for each in found), max(int(each.max) for each in found)
    return None if first <= low and high <= last else f"values from {low} to {high} do not fit"


@dataclass(frozen=True, slots=True)
class Findings:
    """What the caller should know of the values that are loaded."""

    losses: dict[str, str] = field(default_factory=dict)  # from a target key to what its dtype cannot hold
    nan: dict[str, tuple[int, int]] = field(default_factory=dict)  # from a source key to NaN and elements examined
    postponed: list[tuple[Match, Sequence[Tensor], torch.dtype]] = field(default_factory=list)  # yet to be examined
    unexamined: list[str] = field(default_factory=list)  # target keys whose values could not be examined
    pieces: Pieces = in_one  # how values are read

    def examine_postponed(self, count: int) -> None:
        """Examine what was left for later, some of which is in the model already: only CutError is raised."""
        for match, sources, dtype in self.postponed[:count]:
            try:
                self.examine(match, sources, dtype)
            except CutError:
                raise
            except Exception:  # as where there is no memory left
                self.unexamined.append(match.target)
        del self.postponed[:count]

    def examine(self, match: Match, sources: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Examine what a match loads into a tensor of some dtype; codes of quantised tensors are no values."""
        if not is_dequantised(match.operation):
            self._examine(match.target, match.sources, sources, dtype)

    def examined(self, match: Match, pieces: Iterable[Piece], dtype: torch.dtype) -> Iterator[Piece]:
        """Examine the values of quantised tensors as they are computed."""
        own, size = Findings(), 0
        for region, values in pieces:
            part = Findings()
            part._examine(match.target, match.sources[:1], [values], dtype)
            own.merge(part)
            size += values.numel()
            yield region, values
        for key, (count, _) in own.nan.items():
            self.nan.setdefault(key, (count, size))
        for key, loss in own.losses.items():
            self.losses.setdefault(key, loss)

    def _examine(self, target: str, keys: Sequence[str], tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
        for key, tensor in zip(keys, tensors, strict=True):
            loss = loss_of_kind(tensor.dtype, dtype) or loss_of_range(tensor, dtype, self.pieces)
            if loss and target not in self.losses:
                self.losses[target] = f"{tensor.dtype} to {dtype}: {loss}".replace("torch.", "")
            if key not in self.nan and (count := nan_count(tensor, self.pieces)):
                self.nan[key] = count, tensor.numel()

    def merge(self, other: Findings) -> None:
        """Add what was found in other parts of the same tensors."""
        self.losses.update(other.losses)
        self.unexamined.extend(key for key in other.unexamined if key not in self.unexamined)
        for key, (count, size) in other.nan.items():
            known = self.nan.get(key, (0, 0))
            self.nan[key] = known[0] + count, known[1] + size

    def statements(self) -> list[str]:
        """Describe what was found, in a line for each kind."""
        lines = []
        if self.losses:
            named = listed([f"{escaped(key)} ({loss})" for key, loss in self.losses.items()])
            lines.append(f"{len(self.losses)} tensors of the model have a dtype that cannot hold the values: {named}.")
        if self.nan:
            named = listed([f"{escaped(key)} ({count:,} of {size:,})" for key, (count, size) in self.nan.items()])
            lines.append(f"{len(self.nan)} tensors of the checkpoint have NaN: {named}.")
        if self.unexamined:
            lines.append(f"{len(self.unexamined)} tensors could not be checked for NaN: {listed(self.unexamined)}.")
        return lines

    def noted(self, alignment: Alignment) -> Alignment:
        """Return an alignment with notes on what was found, and warnings of the matches concerned."""
        if not self.statements():
            return alignment
        matches = tuple(
            replace(match, warnings=(*match.warnings, f"the cast loses values, {self.losses[match.target]}"))
            if match.target in self.losses
            else match
            for match in alignment.matches
        )
        return replace(alignment, matches=matches, notes=(*alignment.notes, *self.statements()))
