"""Reading: what each match needs is read and looked at before anything is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from autoalign.adaptations import needs_target
from autoalign.alignment import Alignment
from autoalign.checkpoint import Checkpoint
from autoalign.copying import Fill, copies_in_place, memory_of
from autoalign.errors import CheckpointError, InputError
from autoalign.layout import escaped
from autoalign.mapped import CutError, MappedFiles
from autoalign.matches import Match
from autoalign.operations import Copy
from autoalign.progress import Step
from autoalign.transaction import is_sharded
from autoalign.values import Pieces, in_one, loss_of_kind, loss_of_range, nan_count

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
            if not source.is_held:
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
