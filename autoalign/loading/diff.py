"""Comparison of two checkpoints: align both, and measure how far what corresponds is apart, block by block."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from autoalign.alignment import Alignment
from autoalign.checkpoints.checkpoint import Checkpoint, Side, checkpoint_of
from autoalign.errors import InputError
from autoalign.loading.fill import Progress, copies_in_place, read_sources, require_values
from autoalign.matching.match import match_tensors
from autoalign.plan.matches import Match, Plan
from autoalign.plan.options import MatchOptions, check_options
from autoalign.reports.changes import Block, Change, blocks_of, changes_to_plain, headline, left_of, render_changes

_UNDONE = "Nothing was compared."
_TOLERANCE = 1e-6  # of changes of values that neither side rounded
_PIECE = 2**22  # elements that a thread reads at a time
_COPIED = 2**20  # the same of a strided view, which is copied: enough to be read in whole cache lines
_CACHED = 2**16  # elements that stay in a core's cache while they are compared, by one thread of torch
_THREADS = 4  # more than cores, perhaps: some wait for the disk


@dataclass(frozen=True, eq=False, repr=False)
class Difference:
    """How far the tensors of two checkpoints are apart that correspond, and which were not compared."""

    alignment: Alignment  # what corresponds, from the first to the second
    changes: tuple[Change, ...]  # one for each of its matches, in the second's order

    @property
    def equal(self) -> bool:
        """True if every tensor that was not excluded has a counterpart, and all are equal or close."""
        return not any(left_of(self.alignment).values()) and all(c.verdict != "changed" for c in self.changes)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The changes by block of the second checkpoint, with their means and largest values."""
        return tuple(blocks_of(self.changes))

    def render(self, *, width: int = 100, limit: int | None = 40) -> str:
        """Write it as plain text, with repeated blocks folded; ``width`` and ``limit`` are those of an alignment's."""
        return render_changes(self.alignment, self.changes, width=width, limit=limit)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, as JSON has it: ``counts``, ``blocks``, ``tensors``, and what was not compared."""
        return changes_to_plain(self.alignment, self.changes)

    def to_html(self, path: str | os.PathLike[str], *, title: str | None = None) -> None:
        """Write it as one HTML file, the page of ``Alignment.to_html`` coloured by change.

        Raises:
            InputError: The file cannot be written there.
        """
        from autoalign.reports.html import write

        write(self.alignment, path, title=title, changes=self.changes)

    def _repr_html_(self) -> str:
        from autoalign.reports.html import notebook_html

        return notebook_html(self.alignment, self.changes)

    def __str__(self) -> str:
        return self.render()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {headline(self.alignment, self.changes)}>"


def diff(
    first: Side,
    second: Side,
    *,
    alignment: Alignment | None = None,
    tolerance: float | None = None,
    progress: Progress | None = None,
    **align_options: Unpack[MatchOptions],
) -> Difference:
    """Compare the values of two checkpoints, whatever their tensors are called.

    Both are aligned, and each tensor of the second is compared with what the alignment makes of the first: split,
    transposed, dequantised. What is ambiguous or of another shape is listed and never compared. Tensors are read piece
    by piece, so that little memory is taken where files are mapped.

    >>> first = {"fc1.weight": torch.ones(4, 2), "fc2.weight": torch.ones(3, 4)}
    >>> second = {"a.weight": torch.ones(4, 2), "b.weight": torch.full((3, 4), 1.5)}
    >>> print(repr(diff(first, second)))
    <Difference: 1 equal, 1 changed (b by 50 %)>

    Args:
        first: A checkpoint, in any of the forms that ``align`` takes.
        second: The other, in any of the same forms.
        alignment: What corresponds, such as an alignment with its choices ``decided``; by default both are aligned.
        tolerance: Changes up to it, as a share of the first's values, are called close. By default 1e-6, or what
            rounding to the coarser dtype changes, where dtypes differ or values were computed.
        progress: Called with the number of tensors compared and of all.
        **align_options: As for ``align``; ``container`` is that of the first.

    Raises:
        InputError: A side or an option cannot be used, or a side has no values.
        CheckpointError: A file cannot be read, or was changed meanwhile.
        PairMismatchError: Keys or shapes are not those that ``alignment`` was made for.
    """
    check_options(diff, align_options, _UNDONE, MatchOptions.__annotations__)
    container = align_options.pop("container", None)
    if alignment is None:
        own = checkpoint_of(first, container=container)
        alignment = Alignment.of(match_tensors(own, second, **align_options))
    elif not isinstance(alignment, Alignment):
        raise InputError(f"alignment= takes an Alignment, not {type(alignment).__name__}. {_UNDONE}")
    else:
        alignment = alignment.applied_to(first, second, container=container)
    if tolerance is not None and not (isinstance(tolerance, int | float) and tolerance >= 0):
        raise InputError(f"tolerance={tolerance!r} is not a share of values, such as 1e-3. {_UNDONE}")
    source, target = alignment.tensors, alignment.target_tensors
    assert isinstance(source, Checkpoint) and isinstance(target, Checkpoint)  # noqa: PT018, both are
    changes = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for match, sources in read_sources(source, alignment, _UNDONE):
            other = target[match.target]
            require_values(match, other, _UNDONE)
            changes.append(_compared(alignment, match, sources, other, tolerance, pool))
            if progress is not None:
                progress(len(changes), len(alignment.matches))
    for side in (source, target):
        side.require_unchanged(f"{_UNDONE} Compare again when it is complete.")
    return Difference(alignment, tuple(changes))


class _Apart(NamedTuple):
    """How far the elements of a piece are apart, and how large the first's are; all zero where bits are equal."""

    total: float = 0.0
    largest: float = 0.0
    size: float = 0.0
    largest_size: float = 0.0
    one_sided: int = 0
    differs: bool = False


def _compared(
    plan: Plan,
    match: Match,
    sources: Sequence[Tensor],
    other: Tensor,
    tolerance: float | None,
    pool: ThreadPoolExecutor,
) -> Change:
    other = _dense(other)
    sources = [_dense(tensor) for tensor in sources]
    fill = copies_in_place(match.operation, sources, other)
    pairs = fill.copies if fill else ((other, plan.tensor(match, sources)),)
    pieces = [piece for part, given in pairs for piece in _pieces(given, part)]
    run = pool.map if len(pieces) > 1 else map
    found = list(run(_apart, pieces))
    same_dtype = {tensor.dtype for tensor in sources} == {other.dtype}
    differs = not same_dtype or any(each.differs for each in found)
    if any(each.total or each.one_sided for each in found):  # then sizes of all of it count
        found += [_size(given) for (given, _), each in zip(pieces, found, strict=True) if not each.differs]
    sums = _sum(found)
    mean, largest = (
        apart / size if size else float(apart > 0)
        for apart, size in ((sums.total, sums.size), (sums.largest, sums.largest_size))
    )
    if tolerance is None:
        exact = same_dtype and fill is not None
        tolerance = _TOLERANCE if exact else max(_rounding(tensor.dtype) for tensor in (*sources, other))
    is_close = max(mean, largest) <= tolerance and not sums.one_sided
    return Change(
        match.target,
        match.sources,
        ("close" if is_close else "changed") if differs else "equal",
        other.numel(),
        mean,
        float("inf") if sums.one_sided else largest,
        sums.one_sided,
    )


def _dense(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def _rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2 if dtype.is_floating_point else _TOLERANCE


def _sum(found: Sequence[_Apart]) -> _Apart:
    total, largest, size, largest_size, one_sided, differs = zip(*found, strict=True)
    return _Apart(sum(total), max(largest), sum(size), max(largest_size), sum(one_sided), any(differs))


def _pieces(first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Divide two tensors of one shape alike, into views."""
    if first.is_contiguous() and second.is_contiguous():
        yield from zip(torch.split(first.view(-1), _PIECE), torch.split(second.view(-1), _PIECE), strict=True)
    elif first.numel() <= _COPIED:
        yield first, second
    else:
        rows = max(_COPIED * len(first) // first.numel(), 1)
        for own, other in zip(torch.split(first, rows), torch.split(second, rows), strict=True):
            yield from _pieces(own[0], other[0]) if rows == 1 else [(own, other)]


def _apart(pair: tuple[Tensor, Tensor]) -> _Apart:
    """Measure a piece; the second tensor's device and dtype may be others."""
    first, second = (tensor.cpu().reshape(-1) for tensor in pair)
    if first.dtype == second.dtype and torch.equal(_bits(first), _bits(second)):
        return _Apart()
    pieces = zip(torch.split(first, _CACHED), torch.split(second, _CACHED), strict=True)
    return _sum([_measured(own, other) for own, other in pieces] or [_Apart()])


def _size(tensor: Tensor) -> _Apart:
    values = _wide(tensor.cpu().reshape(-1)).abs().nan_to_num(nan=0.0, posinf=0.0)
    return _Apart(size=float(values.sum()), largest_size=float(values.amax()))


def _measured(first: Tensor, second: Tensor) -> _Apart:
    own, other = _wide(first), _wide(second)
    apart = torch.sub(other, own).abs_() if own.dtype == other.dtype else (other.double() - own.double()).abs()
    total, size = float(apart.sum()), own.abs()
    if total - total == 0:  # finite, as all values are then
        is_rounded = not total and not first.is_floating_point() and first.dtype == second.dtype  # large integers
        whole = total or float(is_rounded and not torch.equal(first, second))
        return _Apart(whole, float(apart.amax()) or whole, float(size.sum()), float(size.amax()), 0, True)
    own, other = own.double(), other.double()
    apart = (other - own).abs()
    apart[(own == other) | (own.isnan() & other.isnan())] = 0  # equal infinities, too
    odd = ~apart.isfinite()
    apart[odd] = 0
    size = own.abs().nan_to_num(nan=0.0, posinf=0.0)
    return _Apart(float(apart.sum()), float(apart.amax()), float(size.sum()), float(size.amax()), int(odd.sum()), True)


def _wide(flat: Tensor) -> Tensor:
    if flat.is_complex():
        flat = torch.view_as_real(flat.resolve_conj()).reshape(-1)
    if flat.dtype in (torch.float32, torch.float64):
        return flat
    return flat.float() if flat.is_floating_point() else flat.double()


def _bits(flat: Tensor) -> Tensor:
    """View elements as integers, wide ones where they are aligned so, which compare faster."""
    if flat.stride() != (1,):  # one element of another stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    size = flat.element_size()
    is_wide = flat.nbytes % 8 == 0 and flat.storage_offset() * size % 8 == 0
    return flat.view(torch.int64 if is_wide else torch.uint8)
