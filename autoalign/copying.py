"""Copies: how a match fills the model's own tensor without a second one, and all such copies at once.

Most operations only move elements. What they do to each source is then a copy from a view of the source into a view of
the target, which takes no memory of its own and cannot fail halfway.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread

import torch
from torch import Tensor, nn

from autoalign.errors import CheckpointError, NotInvertibleError
from autoalign.mapped import MappedFiles
from autoalign.operations import Operation
from autoalign.progress import Step

_BATCH = 2**24  # bytes that a thread copies at a time
_PARALLEL = 2**26  # bytes from which on threads are worth their start
_THREADS = 4  # more do not copy faster, and these read ahead of each other from a disk


@dataclass(frozen=True, slots=True)
class Fill:
    """How one target tensor is filled: copies from views of the sources into views of it."""

    target: Tensor  # without gradient
    copies: tuple[tuple[Tensor, Tensor], ...]  # of target and source, of equal shapes

    @property
    def size(self) -> int:
        """Bytes of the target."""
        return self.target.numel() * self.target.dtype.itemsize


def copies_in_place(operation: Operation, sources: Sequence[Tensor], target: Tensor) -> Fill | None:
    """Find the copies between views by which an operation fills a target; None where it takes more than copies.

    >>> from autoalign.operations import Concatenate
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


def memory_of(tensor: Tensor) -> int | None:
    """Tell apart the storages of tensors; None for a subclass without one of its own."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError, ValueError):  # the last of a lazy one
        return None


def copy_all(fills: Sequence[Fill], step: Step, files: MappedFiles | None = None) -> None:
    """Carry out the copies, in order for each storage of the model, and on several threads where that is faster.

    All copies are carried out, even if ``step`` raises an error or no thread can be started, unless the error is that
    a file has changed.

    Args:
        fills: What to copy. Two that fill the same memory are carried out one after the other.
        step: Called after every batch of copies with what is done, in this thread.
        files: From which to read what is mapped; None where it may have been written to in memory.
    """
    is_parallel = sum(fill.size for fill in fills) >= _PARALLEL and all(_is_plain(fill) for fill in fills)
    batches = list(_batches(fills)) if is_parallel else [[fill] for fill in fills]
    waiting = deque(batches)
    finished: SimpleQueue[list[Fill] | BaseException] = SimpleQueue()
    threads = _started(_copy_waiting, (waiting, finished, files)) if is_parallel else []
    done = size = 0
    try:
        for _ in batches:
            if not threads:
                _copy_next(waiting, finished, files)
            batch = finished.get()
            if isinstance(batch, BaseException):
                raise batch
            done, size = done + len(batch), size + sum(fill.size for fill in batch)
            step(done, size)
    except CheckpointError:  # what is left of the file is not to be touched
        waiting.clear()
        raise
    finally:
        _copy_waiting(waiting, finished, files)
        for thread in threads:
            thread.join()


_Waiting = deque[list[Fill]]
_Finished = SimpleQueue["list[Fill] | BaseException"]


def _started(work: Callable[..., None], arguments: tuple[object, ...]) -> list[Thread]:
    """Start as many threads as are of use and can be had; a limit on them is no error, for this thread is enough."""
    threads: list[Thread] = []
    for number in range(min(_THREADS, 2 * (os.cpu_count() or 1))):
        thread = Thread(target=work, args=arguments, name=f"autoalign-{number}")
        try:
            thread.start()
        except (RuntimeError, MemoryError):
            break
        threads.append(thread)
    return threads


def _copy_waiting(waiting: _Waiting, finished: _Finished, files: MappedFiles | None) -> None:
    """Carry out what no other thread has begun."""
    while _copy_next(waiting, finished, files):
        pass


def _copy_next(waiting: _Waiting, finished: _Finished, files: MappedFiles | None) -> bool:
    """Carry out one batch and say so, or say what went wrong; False if there is none."""
    try:
        batch = waiting.popleft()
    except IndexError:
        return False
    try:
        _copy(batch, files)
    except BaseException as error:  # raised again in the thread that waits for it
        if isinstance(error, CheckpointError):  # as above
            waiting.clear()
        finished.put(error)
    else:
        finished.put(batch)
    return True


def _copy(fills: Iterable[Fill], files: MappedFiles | None) -> None:
    with torch.no_grad():  # which is each thread's own
        for fill in fills:
            for part, given in fill.copies:
                if files is None or not files.read(given, part):
                    _copy_values(part, given)


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
    """Gather the fills of each storage, and small ones of several."""
    by_memory: dict[int | None, list[Fill]] = {}
    for fill in fills:
        by_memory.setdefault(memory_of(fill.target), []).append(fill)
    batch: list[Fill] = []
    for group in by_memory.values():
        batch += group
        if sum(fill.size for fill in batch) >= _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _is_plain(fill: Fill) -> bool:
    """Whether any thread may carry it out: on another device, copies belong to a stream that is this thread's."""
    tensors = (tensor for pair in fill.copies for tensor in pair)
    return all(type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" for tensor in tensors)
