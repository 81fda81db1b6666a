"""Filling: read the sources of a plan's matches, copy them into a model's tensors or make new ones; the progress."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from autoalign.alignment import Alignment
from autoalign.checkpoints.checkpoint import Checkpoint
from autoalign.errors import CheckpointError, InputError, NotInvertibleError
from autoalign.loading.mapped import MappedFiles
from autoalign.loading.transaction import is_sharded, memory_of
from autoalign.loading.values import Findings
from autoalign.plan.adaptations import needs_target
from autoalign.plan.dequantise import is_dequantised, is_sure
from autoalign.plan.matches import Match
from autoalign.plan.operations import Copy, Operation, output_shapes
from autoalign.plan.regions import Piece, divided, narrowed, put_together

Sources = tuple[Match, list[Tensor]]  # a match, and the tensors that it is made of
Progress = Callable[[int, int], object]  # called with the tensors that are done and all of them
Step = Callable[[int, int], object]  # called with the tensors that are done, and their bytes

_UNCHANGED = "The model was not changed."
_MAX_READ_AHEAD_BYTES = 2**22  # read into memory before anything is changed; for more, pages must be made first
_MAX_COMPUTED_BYTES = 2**24  # of what is computed before it is copied, and kept until then
_MAX_SMALL_BYTES = 2**16  # of a tensor whose read of its own would take longer than its values
_BATCH_BYTES = 2**24  # that a thread copies at a time
_MIN_PARALLEL_BYTES = 2**26  # from which on threads are worth their start
_MAX_THREADS = 4  # more do not copy faster, and these read ahead of each other from a disk
_SECONDS_WITHOUT_BAR = 1.0


@dataclass(frozen=True, slots=True)
class Fill:
    """How one target tensor is filled: copies from views of the sources into views of it."""

    target: Tensor  # without gradient
    copies: tuple[tuple[Tensor, Tensor], ...]  # of target and source, of equal shapes
    compute: Callable[[], Iterable[Piece]] | None = None  # the source, which is on meta here

    @property
    def size(self) -> int:
        """Bytes of the target."""
        return self.target.numel() * self.target.dtype.itemsize


def check_devices(alignment: Alignment, targets: Mapping[str, Tensor], *, assign: bool) -> None:
    """Raise InputError if values would be copied into tensors of the model that are on the meta device."""
    on_meta = [match.target for match in alignment.matches if targets[match.target].is_meta]
    if on_meta and not assign:
        raise InputError(
            f"{len(on_meta)} tensors of the model are on the meta device, where a copy does nothing: "
            f"{', '.join(on_meta[:3])}. {_UNCHANGED} Pass assign=True to give it new tensors."
        )


def require_shape(match: Match, found: Sequence[int], announced: Sequence[int], undone: str = _UNCHANGED) -> None:
    """Raise CheckpointError unless what was read for a match has the shape that was announced."""
    if tuple(found) != tuple(announced):
        raise CheckpointError(
            f"size mismatch for {match.target}: {', '.join(match.sources)} was read with shape {list(found)} where "
            f"{list(announced)} was announced. {undone}".rstrip()
        )


def require_values(match: Match, tensor: Tensor, undone: str = _UNCHANGED) -> None:
    """Raise InputError if what was read for a match is on the meta device."""
    if tensor.is_meta:
        raise InputError(
            f"{', '.join(match.sources)} of the checkpoint is on the meta device and has no values. "
            f"{undone} Give a checkpoint with values."
        )


def read_sources(source: Checkpoint, alignment: Alignment, undone: str = _UNCHANGED) -> Iterator[Sources]:
    """Read the sources of each match, each once if that takes memory."""
    uses = Counter(key for match in alignment.matches for key in match.sources)
    kept: dict[str, Tensor] = {}
    for match in alignment.matches:
        tensors = []
        for key in match.sources:
            tensor = kept[key] if key in kept else source[key]
            require_values(match, tensor, undone)
            uses[key] -= 1
            if not source.is_resident:
                kept[key] = tensor
                if not uses[key]:
                    del kept[key]
            if tensor.layout != torch.strided and not isinstance(match.operation, Copy):
                tensor = tensor.to_dense()
            tensors.append(_gathered(key, tensor) if is_sharded(tensor) else tensor)
        yield match, tensors


def _gathered(key: str, tensor: Any) -> Tensor:
    """Gather a tensor that is spread over several processes, which all must ask for it."""
    try:
        return tensor.to_local() if tensor.device_mesh.size() == 1 else tensor.full_tensor()  # type: ignore[no-any-return]
    except Exception as error:  # torch raises whatever the missing group led to
        raise InputError(
            f"{key} of the checkpoint is a part of a tensor that is spread over {tensor.device_mesh.size()} processes, "
            f"and the others could not be asked for theirs. {_UNCHANGED} Give a state dict of whole tensors, or a "
            "folder of torch.distributed.checkpoint."
        ) from error


def read_ahead(given: Sequence[Sources], files: MappedFiles) -> tuple[list[Sources], bool]:
    """Read mapped tensors into memory in place of themselves, all if they take little of it, and else the small ones.

    Returned is also whether all were read.
    """
    files.find()
    tensors = [tensor for _, sources in given for tensor in sources]
    left = _MAX_READ_AHEAD_BYTES
    if is_all := sum(tensor.nbytes for tensor in tensors if tensor.layout == torch.strided) <= left:
        chosen = list(range(len(tensors)))
    else:
        chosen = []
        for index, tensor in enumerate(tensors):
            if tensor.layout == torch.strided and tensor.nbytes < min(_MAX_SMALL_BYTES, left):
                chosen.append(index)
                left -= tensor.nbytes
    read = files.read_together([tensors[index] for index in chosen])
    is_all = is_all and all(new is not tensors[index] for index, new in zip(chosen, read, strict=True))
    for index, tensor in zip(chosen, read, strict=True):
        tensors[index] = tensor
    rest = iter(tensors)
    return [(match, [next(rest) for _ in sources]) for match, sources in given], is_all


def fills_of(
    given: Iterable[Sources],
    alignment: Alignment,
    targets: Mapping[str, Tensor],
    findings: Findings,
    step: Step,
    *,
    postpone: bool,
    files: MappedFiles,
) -> list[Fill]:
    """List the copies that fill the tensors of a model's state dict.

    What takes more than copies is computed here, so that it cannot fail later; what takes much memory is dropped and
    computed once more when it is copied, or only then, where no value can make it fail and a larger one was computed.

    ``findings`` receives what is found of the values. With ``postpone`` they are left to be examined when they are
    copied and in memory anyway, as those of a mapped file are not yet.
    """
    memories = _memories(targets)
    room, largest = _MAX_COMPUTED_BYTES, 0
    fills, size = [], 0
    for done, (match, sources) in enumerate(given, start=1):
        target = targets[match.target].detach()
        is_own = any(memory_of(tensor) in memories for tensor in sources)
        if postpone and not is_own and not is_dequantised(match.operation):
            findings.postponed.append((match, sources, target.dtype))
        else:
            findings.examine(match, sources, target.dtype)
        fill = None if needs_target(match.operation) else copies_in_place(match.operation, sources, target)
        if fill is None:
            compute = partial(_computed, alignment, match, sources, files, findings, target.shape, target.dtype)
            is_late = postpone and not is_own and target.numel() <= largest and is_sure(match.operation)
            if is_late:
                findings.postponed.append((match, (), target.dtype))
            else:
                largest = max(largest, target.numel())
                room -= 4 * target.numel()
            if is_late or (room < 0 and not is_own and not needs_target(match.operation)):
                if not is_late:
                    deque(compute(), maxlen=0)
                fill = Fill(target, ((target, torch.empty_like(target, device="meta")),), compute)
            else:
                fill = Fill(target, tuple((narrowed(target, region), values) for region, values in compute()))
        # the model's own values may change before they are copied
        copies = [(part, new.clone() if memory_of(new) in memories else new) for part, new in fill.copies]
        fills.append(replace(fill, copies=tuple(copies)))
        size += fill.size
        step(done, size)
    return fills


def _computed(
    alignment: Alignment,
    match: Match,
    sources: Sequence[Tensor],
    files: MappedFiles,
    findings: Findings,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Iterable[Piece]:
    """Compute the tensor of a match, piece by piece where it is quantised."""
    if is_dequantised(match.operation) and not needs_target(match.operation):
        require_shape(match, output_shapes(match.operation, [tuple(each.shape) for each in sources])[0], shape)
        pieces: Iterable[Piece] = divided(match.operation, sources, files.read_part)
    else:
        tensor = alignment.tensor(match, files.read_together(sources))
        require_shape(match, tensor.shape, shape)
        pieces = [(tuple((0, size) for size in shape), tensor)]
    return findings.examined(match, pieces, dtype) if is_dequantised(match.operation) else pieces


def copies_in_place(operation: Operation, sources: Sequence[Tensor], target: Tensor) -> Fill | None:
    """Find the copies between views by which an operation fills a target; None where it takes more than copies.

    >>> from autoalign.plan.operations import Concatenate
    >>> target = torch.zeros(3)
    >>> fill = copies_in_place(Concatenate(0), [torch.ones(1), torch.full((2,), 2.0)], target)
    >>> copy_all([fill], lambda done, size: None)
    >>> target
    tensor([1., 2., 2.])
    """
    try:
        traces = operation.trace([tuple(source.shape) for source in sources])
    except NotInvertibleError:
        return None
    pairs = []
    for source, trace in zip(sources, traces, strict=True):
        (part,), (given,) = trace.restore.apply([target]), trace.view.apply([source])
        if trace.output or part.shape != given.shape or memory_of(part) != memory_of(target):
            return None
        pairs.append((part, given))
    if sum(part.numel() for part, _ in pairs) != target.numel():  # zeros are in none of the sources
        return None
    return Fill(target, tuple(pairs))


def tensors_of(
    given: Iterable[Sources],
    alignment: Alignment,
    targets: Mapping[str, Tensor],
    findings: Findings,
    step: Step,
    *,
    assign: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """Compute the tensors that ``load_state_dict`` is given.

    With ``assign``, these are to take the places of the targets: they get their devices and dtypes, or else ``device``
    and, for floating-point ones, ``dtype``.
    """
    memories = _memories(targets)
    assigned: dict[int, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    size = 0
    for done, (match, sources) in enumerate(given, start=1):
        target = targets[match.target]
        wanted = dtype if dtype is not None and target.dtype.is_floating_point else target.dtype
        if isinstance(match.operation, Copy) and not is_lazy(target):
            sources = [_in_layout_of(target, tensor) for tensor in sources]
        findings.examine(match, sources, wanted)
        if is_dequantised(match.operation) and not is_lazy(target):
            pieces = _computed(alignment, match, sources, MappedFiles(frozenset()), findings, target.shape, wanted)
            tensor = put_together(pieces, target.shape, wanted)
        else:
            tensor = alignment.tensor(match, sources)
        if not is_lazy(target):
            require_shape(match, tensor.shape, target.shape)
        if assign:
            tensor = assigned.setdefault(id(target), _assignable(tensor, target, wanted, device))
        elif target.layout not in (torch.strided, torch.sparse_coo) and tensor._nnz() != target._nnz():
            raise InputError(
                f"{match.target} of the model is a {target.layout} of {target._nnz()} numbers, and torch copies no "
                f"{tensor._nnz()} into it. {_UNCHANGED} Pass assign=True to give it a new tensor."
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


def _in_layout_of(target: Tensor, tensor: Tensor) -> Tensor:
    """Convert a tensor to the layout of another, since torch does not copy between layouts."""
    if tensor.layout == target.layout:
        return tensor
    dense = tensor.to_dense()
    return dense if target.layout == torch.strided else dense.to_sparse(layout=target.layout)


def _assignable(tensor: Tensor, target: Tensor, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    if device is None:
        device = tensor.device if target.is_meta else target.device
    tensor = tensor.to(device=device, dtype=dtype)
    if tensor.layout == torch.strided and not tensor.is_contiguous():  # as a transposed view of what is mapped
        tensor = tensor.contiguous()
    return nn.Parameter(tensor, requires_grad=target.requires_grad) if isinstance(target, nn.Parameter) else tensor


def copy_all(fills: Sequence[Fill], step: Step, files: MappedFiles | None = None) -> None:
    """Carry out the copies, in order for each storage of the model, and on several threads where that is faster.

    All copies are carried out, even if ``step``, which is called after every batch in this thread, raises an error or
    no thread can be started, unless the error is that a file has changed. What is mapped is read from ``files``.
    """
    is_parallel = sum(fill.size for fill in fills) >= _MIN_PARALLEL_BYTES and all(
        type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"
        for fill in fills
        for pair in fill.copies
        for tensor in pair  # on another device, copies belong to a stream that is this thread's
    )
    batches = list(_batches(fills)) if is_parallel else [[fill] for fill in fills]
    waiting = deque(batches)
    finished: SimpleQueue[list[Fill] | BaseException] = SimpleQueue()

    def copy_next() -> bool:
        """Carry out one batch and report it, or what went wrong; False if there is none."""
        try:
            batch = waiting.popleft()
        except IndexError:
            return False
        try:
            with torch.no_grad():  # which is each thread's own
                for fill in batch:
                    for part, given in fill.copies:
                        if fill.compute is not None:
                            for region, values in fill.compute():
                                _copy_values(narrowed(part, region), values)
                        elif files is None or not files.read(given, part):
                            _copy_values(part, given)
        except BaseException as error:  # raised again in the thread that waits for it
            if isinstance(error, CheckpointError):  # what is left of the file is not to be touched
                waiting.clear()
            finished.put(error)
        else:
            finished.put(batch)
        return True

    def copy_waiting() -> None:
        while copy_next():
            pass

    threads: list[Thread] = []
    for number in range(min(_MAX_THREADS, 2 * (os.cpu_count() or 1)) if is_parallel else 0):
        thread = Thread(target=copy_waiting, name=f"autoalign-{number}")
        try:
            thread.start()
        except (RuntimeError, MemoryError):  # a limit on threads is no error, for this one is enough
            break
        threads.append(thread)
    done = size = 0
    try:
        for _ in batches:
            if not threads:
                copy_next()
            batch = finished.get()
            if isinstance(batch, BaseException):
                raise batch
            done, size = done + len(batch), size + sum(fill.size for fill in batch)
            step(done, size)
    except CheckpointError:  # as above
        waiting.clear()
        raise
    finally:
        copy_waiting()
        for thread in threads:
            thread.join()


def _copy_values(target: Tensor, source: Tensor) -> None:
    """Copy, in halves where there is no memory for what a copy between devices or layouts allocates."""
    try:
        target.copy_(source)
    except (RuntimeError, MemoryError) as error:
        length = max(target.shape, default=1)
        if length == 1 or not is_out_of_memory(error):
            raise
        dim = target.shape.index(length)
        halves = [length // 2, length - length // 2]
        for half, given in zip(torch.split(target, halves, dim), torch.split(source, halves, dim), strict=True):
            _copy_values(half, given)


def is_out_of_memory(error: Exception) -> bool:
    """Return True if torch found no memory, for which it has no error of its own on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "allocate memory" in str(error) or "not enough memory" in str(error)


def _batches(fills: Iterable[Fill]) -> Iterator[list[Fill]]:
    """Group the fills of each storage, and small ones of several."""
    by_memory: dict[int | None, list[Fill]] = {}
    for fill in fills:
        by_memory.setdefault(memory_of(fill.target), []).append(fill)
    batch: list[Fill] = []
    for group in by_memory.values():
        batch += group
        if sum(fill.size for fill in batch) >= _BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


@contextmanager
def progress_of(progress: Progress | bool | None, tensors: int, size: int, since: float) -> Iterator[Step]:
    """Report how far a load has come, for as long as the block runs.

    ``progress`` is that of ``autoalign.load``; ``tensors`` of ``size`` bytes are loaded ``since`` a ``perf_counter``.
    """
    if callable(progress):
        call = progress
        yield lambda done, _size: call(done, tensors)
        return
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield lambda _done, _size: None
        return
    bar: Any = None
    failed = False

    def step(done: int, done_size: int) -> None:
        nonlocal bar, failed
        if failed:
            return
        try:
            if bar is None and (progress or time.perf_counter() - since > _SECONDS_WITHOUT_BAR):
                bar = _bar(transient=progress is None)
                bar.start()
                bar.add_task("Loading", total=size, tensors=tensors, done=done)
            if bar is not None:
                bar.update(0, completed=done_size, done=done)
        except Exception:  # stderr may be closed, or no thread be left: no reason not to load
            failed = True

    try:
        yield step
    finally:
        if bar is not None:
            with suppress(Exception):
                bar.stop()


def _bar(*, transient: bool) -> Any:
    from rich.console import Console  # late, as all that a load without a bar does not need
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[done]}/{task.fields[tensors]} tensors"),
        TimeRemainingColumn(),
    )

    class Screen(Console):
        def on_broken_pipe(self) -> None:  # rich would close stdout and end the process
            self.quiet = True

    return Progress(*columns, console=Screen(stderr=True), transient=transient)
