"""Values that a person should know of before they are in a model: NaN, and what a cast to another dtype loses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from autoalign.alignment import Alignment
from autoalign.checkpoints.checkpoint import Checkpoint
from autoalign.errors import CheckpointError, InputError
from autoalign.loading.fill import CutError, Fill, MappedFiles, copies_in_place, memory_of
from autoalign.loading.prepare import Step
from autoalign.loading.transaction import is_sharded
from autoalign.plan.adaptations import needs_target
from autoalign.plan.matches import Match
from autoalign.plan.operations import Copy
from autoalign.reports.rows import escaped

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


_FEW = 3
_AHEAD = 2**22  # bytes that are read into memory before anything is changed; for more, pages must be made first
_SMALL = 2**16  # bytes of a tensor whose read of its own would take longer than its values


@dataclass(frozen=True, slots=True)
class Findings:
    """What a person should know of the values that are loaded."""

    losses: dict[str, str] = field(default_factory=dict)  # from a target key to what its dtype cannot hold
    nan: dict[str, tuple[int, int]] = field(default_factory=dict)  # from a source key to NaN and all elements looked at
    postponed: list[tuple[Match, Sequence[Tensor], torch.dtype]] = field(default_factory=list)  # what to examine yet
    unexamined: list[str] = field(default_factory=list)  # target keys whose values could not be looked at
    pieces: Pieces = in_one  # how values are read to be looked at

    def examine_postponed(self, count: int) -> None:
        """Look at the first of what was left for later, some of which is in the model already.

        Raises:
            CutError: The file was cut. Nothing else is raised.
        """
        for match, sources, dtype in self.postponed[:count]:
            try:
                self.examine(match, sources, dtype)
            except CutError:
                raise
            except Exception:  # as where there is no memory left
                self.unexamined.append(match.target)
        del self.postponed[:count]

    def examine(self, match: Match, sources: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Look at what a match loads into a tensor of some dtype."""
        for key, tensor in zip(match.sources, sources, strict=True):
            loss = loss_of_kind(tensor.dtype, dtype) or loss_of_range(tensor, dtype, self.pieces)
            if loss and match.target not in self.losses:
                self.losses[match.target] = f"{_name(tensor.dtype)} to {_name(dtype)}: {loss}"
            if key not in self.nan and (count := nan_count(tensor, self.pieces)):
                self.nan[key] = count, tensor.numel()

    def merge(self, other: Findings) -> None:
        """Take over what was found in other parts of the same tensors."""
        self.losses.update(other.losses)
        self.unexamined.extend(key for key in other.unexamined if key not in self.unexamined)
        for key, (count, size) in other.nan.items():
            known = self.nan.get(key, (0, 0))
            self.nan[key] = known[0] + count, known[1] + size

    def statements(self) -> list[str]:
        """Say what was found, a line for each kind."""
        lines = []
        if self.losses:
            listed = _listed([f"{escaped(key)} ({loss})" for key, loss in self.losses.items()])
            lines.append(f"{len(self.losses)} tensors of the model have a dtype that cannot hold the values: {listed}.")
        if self.nan:
            listed = _listed([f"{escaped(key)} ({count:,} of {size:,})" for key, (count, size) in self.nan.items()])
            lines.append(f"{len(self.nan)} tensors of the checkpoint have NaN: {listed}.")
        if self.unexamined:
            lines.append(f"{len(self.unexamined)} tensors could not be checked for NaN: {_listed(self.unexamined)}.")
        return lines

    def noted(self, alignment: Alignment) -> Alignment:
        """Say in an alignment what was found."""
        if not self.statements():
            return alignment
        matches = tuple(
            replace(match, warnings=(*match.warnings, f"the cast loses values, {self.losses[match.target]}"))
            if match.target in self.losses
            else match
            for match in alignment.matches
        )
        return replace(alignment, matches=matches, notes=(*alignment.notes, *self.statements()))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items[:_FEW]) + (", ..." if len(items) > _FEW else "")


def check_devices(alignment: Alignment, targets: Mapping[str, Tensor], *, assign: bool) -> None:
    """Refuse to copy into tensors of the model that are on the meta device.

    Raises:
        InputError: There are some.
    """
    on_meta = [match.target for match in alignment.matches if targets[match.target].is_meta]
    if on_meta and not assign:
        raise InputError(
            f"{len(on_meta)} tensors of the model are on the meta device, where a copy does nothing: "
            f"{', '.join(on_meta[:3])}. The model was not changed. Pass assign=True to give it new tensors."
        )


Given = tuple[Match, list[Tensor]]  # what is loaded, and what it is loaded from


def read_ahead(given: Sequence[Given], files: MappedFiles) -> tuple[list[Given], bool]:
    """Read mapped tensors into memory, all of them if they take little of it, and else the small ones.

    Returns:
        The same with what was read in place; and whether all was.

    Raises:
        CutError: A file has become shorter.
    """
    files.find()
    tensors = [tensor for _, sources in given for tensor in sources]
    left = _AHEAD
    if is_all := sum(tensor.nbytes for tensor in tensors if tensor.layout == torch.strided) <= _AHEAD:
        chosen = list(range(len(tensors)))
    else:
        chosen = []
        for index, tensor in enumerate(tensors):
            if tensor.layout == torch.strided and tensor.nbytes < min(_SMALL, left):
                chosen.append(index)
                left -= tensor.nbytes
    read = files.read_together([tensors[index] for index in chosen])
    is_all = is_all and all(new is not tensors[index] for index, new in zip(chosen, read, strict=True))
    for index, tensor in zip(chosen, read, strict=True):
        tensors[index] = tensor
    rest = iter(tensors)
    return [(match, [next(rest) for _ in sources]) for match, sources in given], is_all


def fills_of(
    given: Iterable[Given],
    alignment: Alignment,
    targets: Mapping[str, Tensor],
    findings: Findings,
    step: Step,
    *,
    postpone: bool,
    files: MappedFiles | None = None,
) -> list[Fill]:
    """Find the copies that fill the model's tensors; what takes more than copies is worked out here.

    Args:
        given: What each match is loaded from.
        alignment: What is loaded from where.
        targets: The model's state dict.
        findings: Where to say what is found of the values.
        step: Called after every tensor.
        postpone: Leave the values to be examined when they are copied and in memory anyway, as they are not yet in that
            of a mapped file.
        files: To be read in place of what is mapped, if what takes more than copies is worked out here.

    Raises:
        InputError: The checkpoint has no values.
        CheckpointError: A tensor has another shape than announced, or cannot be read.
    """
    memories = _memories(targets)
    fills, size = [], 0
    for done, (match, sources) in enumerate(given, start=1):
        target = targets[match.target].detach()
        if postpone and all(memory_of(tensor) not in memories for tensor in sources):
            findings.postponed.append((match, sources, target.dtype))
        else:
            findings.examine(match, sources, target.dtype)
        fill = None if needs_target(match.operation) else copies_in_place(match.operation, sources, target)
        if fill is None:
            tensor = alignment.tensor(match, files.read_together(sources) if files is not None else sources)
            _check_shape(match, tensor, target.shape)
            fill = Fill(target, ((target, tensor),))
        # the model's own values may change before they are copied
        copies = [(part, new.clone() if memory_of(new) in memories else new) for part, new in fill.copies]
        fills.append(Fill(target, tuple(copies)))
        size += fill.size
        step(done, size)
    return fills


def tensors_of(
    given: Iterable[Given],
    alignment: Alignment,
    targets: Mapping[str, Tensor],
    findings: Findings,
    step: Step,
    *,
    assign: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
) -> dict[str, Tensor]:
    """Work out what ``load_state_dict`` is given.

    Args:
        given: What each match is loaded from.
        alignment: What is loaded from where.
        targets: The model's state dict.
        findings: Where to say what is found of the values.
        step: Called after every tensor.
        assign: Make tensors of the targets' dtypes and devices, that take their places.
        dtype: Of those of floating point, in place of the target's.
        device: Of those, in place of the target's.

    Raises:
        InputError: The checkpoint has no values.
        CheckpointError: A tensor has another shape than announced, or cannot be read.
    """
    memories = _memories(targets)
    assigned: dict[int, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    size = 0
    for done, (match, sources) in enumerate(given, start=1):
        target = targets[match.target]
        wanted = dtype if dtype is not None and target.dtype.is_floating_point else target.dtype
        if isinstance(match.operation, Copy):
            sources = [_like(tensor, target) for tensor in sources]
        findings.examine(match, sources, wanted)
        tensor = alignment.tensor(match, sources)
        if not is_lazy(target):
            _check_shape(match, tensor, target.shape)
        if assign:
            tensor = assigned.setdefault(id(target), _assignable(tensor, target, wanted, device))
        elif target.layout not in (torch.strided, torch.sparse_coo) and tensor._nnz() != target._nnz():
            raise InputError(
                f"{match.target} of the model is a {target.layout} of {target._nnz()} numbers, and torch copies no "
                f"{tensor._nnz()} into it. The model was not changed. Pass assign=True to give it a new tensor."
            )
        elif memory_of(tensor) in memories:  # as above
            tensor = tensor.clone()
        tensors[match.target] = tensor
        size += tensor.numel() * tensor.dtype.itemsize
        step(done, size)
    ties = {key: assigned[id(target)] for key, target in targets.items() if id(target) in assigned}
    return tensors | ties  # a tied key that no match fills would keep the old tensor


def _memories(targets: Mapping[str, Tensor]) -> set[int | None]:
    return {memory_of(target) for target in targets.values() if isinstance(target, Tensor)} - {None}


def given_by(source: Checkpoint, alignment: Alignment) -> Iterator[Given]:
    """Read the sources of each match, each once if that takes memory."""
    uses = Counter(key for match in alignment.matches for key in match.sources)
    kept: dict[str, Tensor] = {}
    for match in alignment.matches:
        tensors = []
        for key in match.sources:
            tensor = kept[key] if key in kept else source[key]
            if tensor.is_meta:
                raise InputError(
                    f"{', '.join(match.sources)} of the checkpoint is on the meta device and has no values. "
                    "The model was not changed. Give a checkpoint with values."
                )
            uses[key] -= 1
            if not source.is_resident:
                kept[key] = tensor
                if not uses[key]:
                    del kept[key]
            if tensor.layout != torch.strided and not isinstance(match.operation, Copy):
                tensor = tensor.to_dense()
            tensors.append(whole(key, tensor))
        yield match, tensors


def whole(key: str, tensor: Tensor) -> Tensor:
    """Gather a tensor that is spread over several processes, which all must ask for it; others are returned as is.

    Raises:
        InputError: The processes are not there, as where it was read from a file of one of them.
    """
    if not is_sharded(tensor):
        return tensor
    part: Any = tensor
    try:
        return part.to_local() if part.device_mesh.size() == 1 else part.full_tensor()  # type: ignore[no-any-return]
    except Exception as error:  # torch raises whatever the missing group led to
        raise InputError(
            f"{key} of the checkpoint is a part of a tensor that is spread over {part.device_mesh.size()} processes, "
            "and the others could not be asked for theirs. The model was not changed. Give a state dict of whole "
            "tensors, or a folder of torch.distributed.checkpoint."
        ) from error


def _like(tensor: Tensor, target: Tensor) -> Tensor:
    """Give a tensor the layout of another, between which torch does not copy."""
    if is_lazy(target) or tensor.layout == target.layout:
        return tensor
    if target.layout == torch.strided:
        return tensor.to_dense()
    return tensor.to_dense().to_sparse(layout=target.layout)


def _check_shape(match: Match, tensor: Tensor, shape: Sequence[int]) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"size mismatch for {match.target}: {', '.join(match.sources)} was read with shape "
            f"{list(tensor.shape)} where {list(shape)} was announced. The model was not changed."
        )


def _assignable(tensor: Tensor, target: Tensor, dtype: torch.dtype, device: torch.device | str | int | None) -> Tensor:
    if device is None:
        device = tensor.device if target.is_meta else target.device
    tensor = tensor.to(device=device, dtype=dtype)
    if tensor.layout == torch.strided and not tensor.is_contiguous():  # as a transposed view of what is mapped
        tensor = tensor.contiguous()
    return nn.Parameter(tensor, requires_grad=target.requires_grad) if isinstance(target, nn.Parameter) else tensor
