"""Mapped files: where the values of a mapped tensor are in their file, so that they can be read from there.

What is gone of a mapping, as where another process cuts the file, ends a process that touches it, while a read of the
file gives an error. Reading is no slower: pages of a mapping must be brought in bit by bit, and taken out again in the
end. Linux tells which file is mapped where. Elsewhere, and where it does not tell, the mapping is used.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread

import torch
from torch import Tensor, nn

from autoalign.errors import CheckpointError, NotInvertibleError
from autoalign.loading.prepare import Step
from autoalign.plan.operations import Operation

_MAPS = Path("/proc/self/maps")
_CHUNK = 2**20  # bytes that are read at a time where they are not read into place, so that they stay in the cache
_GAP = 2**14  # bytes between what is wanted that are not worth a read more
_ALIGNMENT = 2**6  # bytes, of which a tensor's place in memory is as much a multiple as its place in the file


class CutError(CheckpointError):
    """A file has become shorter, and what is gone of its mapping would end the process."""


@dataclass(frozen=True, slots=True)
class MappedFiles:
    """Files that this process may have mapped, each opened when something of it is read."""

    paths: frozenset[str]
    starts: list[int] = field(default_factory=list)  # addresses, ascending
    places: list[tuple[int, int, int, str]] = field(default_factory=list)  # end, place in the file, inode and path
    opened: dict[str, int | None] = field(default_factory=dict)  # descriptors; None for a file that is another now
    lock: Lock = field(default_factory=Lock)  # guards `opened`
    buffers: threading.local = field(default_factory=threading.local)  # a chunk for each thread

    def find(self) -> None:
        """Look up where the files are mapped now."""
        if not hasattr(os, "preadv") or not self.paths:
            return
        self.starts.clear()
        self.places.clear()
        ends = tuple(path.replace("\n", "\\012") for path in self.paths)
        with suppress(OSError):
            for line in _MAPS.read_text(encoding="utf-8", errors="surrogateescape").split("\n"):
                if line.endswith(ends):
                    addresses, _, offset, _, inode, path = line.split(" ", 5)
                    if (path := path.lstrip(" ")) in ends:
                        start, _, end = addresses.partition("-")
                        self.starts.append(int(start, 16))
                        self.places.append((int(end, 16), int(offset, 16), int(inode), path.replace("\\012", "\n")))

    def read(self, source: Tensor, target: Tensor) -> bool:
        """Read the values of a mapped tensor into another; False where they are to be copied instead.

        Args:
            source: Lies in a mapping that nobody has written to.
            target: Of the same shape, on any device and of any dtype, and without gradient.

        Raises:
            CutError: The file has become shorter.
        """
        found = self._found(source)
        if found is None:
            return False
        try:
            with torch.no_grad():
                if _is_same_in_memory(source, target):
                    _read(*found, target.reshape(-1).view(torch.uint8).numpy().data)
                    torch.autograd.graph.increment_version(target)
                else:
                    order = sorted(range(source.dim()), key=source.stride, reverse=True)
                    for offset, part, into in _chunks(found[1], source.permute(order), target.permute(order)):
                        into.copy_(self._values(found[0], offset, part))
        except CutError:
            raise
        except (OSError, RuntimeError, MemoryError):  # as where torch has no memory, which copies can do without
            return False
        return True

    def pieces(self, tensor: Tensor) -> Iterator[Tensor]:
        """Give the values of a mapped tensor piece by piece, in some order and in memory; any other as it is.

        A piece holds until the next one is asked for. What cannot be read is given as it is mapped.

        Raises:
            CutError: The file has become shorter.
        """
        found = self._found(tensor)
        if found is None:
            yield tensor
            return
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        given = tensor.permute(order)
        for offset, part, _ in _chunks(found[1], given, given):
            try:
                values = self._values(found[0], offset, part)
            except OSError:
                values = part
            yield values

    def read_together(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Read mapped tensors into memory, with one read for what lies side by side.

        Others are returned as they are, and all are where there is no memory or one cannot be read.

        Raises:
            CutError: A file has become shorter.
        """
        try:
            return self._read_together(tensors)
        except CutError:
            raise
        except (OSError, RuntimeError, MemoryError):
            return list(tensors)

    def _read_together(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        result = list(tensors)
        runs: list[tuple[int, int, int, list[tuple[int, int]]]] = []  # file, start, end, and what is in it where
        found = [(place, index) for index, tensor in enumerate(tensors) if (place := self._found(tensor)) is not None]
        for (file, offset), index in sorted(found):
            end = offset + _extent(tensors[index])
            if runs and runs[-1][0] == file and offset <= runs[-1][2] + _GAP:
                _, start, until, members = runs[-1]
                runs[-1] = file, start, max(until, end), members
                members.append((offset, index))
            else:
                runs.append((file, offset - offset % _ALIGNMENT, end, [(offset, index)]))
        for file, start, end, members in runs:
            memory = torch.empty(end - start, dtype=torch.uint8, device="cpu")
            _read(file, start, memory.numpy().data)
            for offset, index in members:
                result[index] = _as_in_file(memory[offset - start :], tensors[index])
        return result

    def _found(self, tensor: Tensor) -> tuple[int, int] | None:
        """Tell in which file, and where in it, the first element of a tensor is; None where it is not in one."""
        if not self.starts or type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
            return None
        if tensor.device.type != "cpu" or not tensor.numel():
            return None
        return self._place(tensor.data_ptr(), _extent(tensor))

    def _place(self, address: int, size: int) -> tuple[int, int] | None:
        index = bisect_right(self.starts, address) - 1
        if index < 0:
            return None
        end, offset, inode, path = self.places[index]
        if address + size > end:
            return None
        with self.lock:
            if path not in self.opened:
                self.opened[path] = _opened(path, inode)
        descriptor = self.opened[path]
        return None if descriptor is None else (descriptor, offset + address - self.starts[index])

    def _values(self, file: int, offset: int, tensor: Tensor) -> Tensor:
        """Read a tensor of no more than a chunk, whose own memory is not touched, into this thread's buffer."""
        held: Tensor | None = getattr(self.buffers, "held", None)
        if held is None:
            held = self.buffers.held = torch.empty(_CHUNK, dtype=torch.uint8, device="cpu")
        memory = held[: _extent(tensor)]
        _read(file, offset, memory.numpy().data)
        return _as_in_file(memory, tensor)


@contextmanager
def mapped_files(paths: Iterable[str | os.PathLike[str]]) -> Iterator[MappedFiles]:
    """Give access to files that are mapped, once they were found; they are closed again in the end."""
    files = MappedFiles(frozenset(map(os.path.realpath, paths)))
    try:
        yield files
    finally:
        for descriptor in files.opened.values():
            if descriptor is not None:
                os.close(descriptor)


def _chunks(offset: int, source: Tensor, target: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Divide two tensors of one shape, so that what the first has in its file is of no more bytes than a chunk.

    Args:
        offset: Where it is in the file.
        source: Of strides that do not increase.
        target: Divided alike.
    """
    extent = _extent(source)
    if extent <= _CHUNK:
        yield offset, source, target
        return
    step = source.stride(0) * source.element_size()
    row = extent - (len(source) - 1) * step
    if row > _CHUNK or step > max(2 * row, _GAP):  # what lies between rows is not to be read
        for place in range(len(source)):
            yield from _chunks(offset + place * step, source[place], target[place])
        return
    count = (_CHUNK - row) // step + 1
    for place in range(0, len(source), count):
        size = min(count, len(source) - place)
        yield offset + place * step, source.narrow(0, place, size), target.narrow(0, place, size)


def _as_in_file(memory: Tensor, tensor: Tensor) -> Tensor:
    """Take bytes that were read as a tensor like the one that they are the memory of."""
    size = _extent(tensor)
    if memory.storage_offset() % tensor.element_size():
        memory = memory[:size].clone()
    values = memory[:size].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
    values = torch._neg_view(values) if tensor.is_neg() else values
    return values.conj() if tensor.is_conj() else values


def _is_same_in_memory(source: Tensor, target: Tensor) -> bool:
    """Return True if the bytes of one tensor are those that the other has of the same values."""
    return (
        source.dtype == target.dtype
        and type(target) in (Tensor, nn.Parameter)
        and target.device.type == "cpu"
        and not any(tensor.is_conj() or tensor.is_neg() for tensor in (source, target))
        and source.is_contiguous()
        and target.is_contiguous()
    )


def _extent(tensor: Tensor) -> int:
    """Count the bytes from the first to the last element of a tensor in memory."""
    if tensor.is_contiguous():
        return tensor.nbytes
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()


def _read(descriptor: int, offset: int, rest: memoryview) -> None:
    """Read as many bytes as there is room for.

    Raises:
        CutError: The file has become shorter.
        OSError: It cannot be read.
    """
    while rest:
        count = os.preadv(descriptor, [rest], offset)
        if count == 0:
            if os.fstat(descriptor).st_size < offset + len(rest):
                raise CutError("The file has become shorter while it was read.")
            raise OSError("nothing is read of it")
        rest, offset = rest[count:], offset + count


def _opened(path: str, inode: int) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # deleted, or with a name that is written otherwise there
        return None
    if os.fstat(descriptor).st_ino == inode:
        return descriptor
    os.close(descriptor)
    return None


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
