"""Memory-mapped files: read the values of a mapped tensor from its file instead of touching the mapping.

A process that touches a mapping whose file was cut by another one is killed, while a read of the file only gives a
CutError. Reading is no slower: pages of a mapping must be brought in bit by bit, and taken out again in the end. Linux
tells which file is mapped where. Elsewhere, and where it does not tell, the mapping is used.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from autoalign.errors import CheckpointError

_MAPS = Path("/proc/self/maps")
_CHUNK_BYTES = 2**20  # read at a time where they are not read into place, so that they stay in the cache
_MAX_GAP_BYTES = 2**14  # between two wanted ranges that are read at once
_ALIGNMENT = 2**6  # bytes, of which a tensor's place in memory is as much a multiple as its place in the file


class CutError(CheckpointError):
    """A file has become shorter, and what is gone of its mapping would end the process."""


@dataclass(frozen=True, slots=True)
class MappedFiles:
    """Files that this process may have mapped, each opened when something of it is read."""

    paths: frozenset[str]
    starts: list[int] = field(default_factory=list)  # addresses, ascending
    places: list[tuple[int, int, int, str]] = field(default_factory=list)  # end, place in the file, inode and path
    opened: dict[str, int | None] = field(default_factory=dict)  # descriptors; None for a file that was replaced
    lock: threading.Lock = field(default_factory=threading.Lock)  # guards `opened`: copy threads open files lazily
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
        """Read the values of a mapped tensor into another, without gradient; False if they are to be copied instead.

        The target is of the same shape, on any device and of any dtype. Nobody has written to the mapping.
        """
        found = self._found(source)
        if found is None:
            return False
        try:
            with torch.no_grad():
                if _has_same_bytes(source, target):
                    _read(*found, target.reshape(-1).view(torch.uint8).numpy().data)
                    torch.autograd.graph.increment_version(target)
                else:
                    for offset, part, into in _chunks(found[1], *_by_stride(source, target)):
                        into.copy_(self._values(found[0], offset, part))
        except CutError:
            raise
        except (OSError, RuntimeError, MemoryError):  # as where torch has no memory, which copies can do without
            return False
        return True

    def read_part(self, tensor: Tensor) -> Tensor:
        """Read a view of a mapped tensor into memory, without what is between its rows; any other is returned."""
        found = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        return found if self._found(tensor) and self.read(tensor, found) else tensor

    def pieces(self, tensor: Tensor) -> Iterator[Tensor]:
        """Yield the values of a mapped tensor piece by piece, in some order and in memory; any other as it is.

        A piece holds until the next one is asked for. What cannot be read is given as it is mapped.
        """
        found = self._found(tensor)
        if found is None:
            yield tensor
            return
        for offset, part, _ in _chunks(found[1], *_by_stride(tensor, tensor)):
            try:
                values = self._values(found[0], offset, part)
            except OSError:
                values = part
            yield values

    def read_together(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Read mapped tensors into memory, with one read for what lies side by side.

        Others are returned as they are, and all are where there is no memory or one cannot be read.
        """
        result = list(tensors)
        runs: list[tuple[int, int, int, list[tuple[int, int]]]] = []  # file, start, end, and what is in it where
        found = [(place, index) for index, tensor in enumerate(tensors) if (place := self._found(tensor)) is not None]
        for (file, offset), index in sorted(found):
            end = offset + _extent(tensors[index])
            if runs and runs[-1][0] == file and offset <= runs[-1][2] + _MAX_GAP_BYTES:
                _, start, until, members = runs[-1]
                runs[-1] = file, start, max(until, end), members
                members.append((offset, index))
            else:
                runs.append((file, offset - offset % _ALIGNMENT, end, [(offset, index)]))
        try:
            for file, start, end, members in runs:
                memory = torch.empty(end - start, dtype=torch.uint8, device="cpu")
                _read(file, start, memory.numpy().data)
                for offset, index in members:
                    result[index] = _as_in_file(memory[offset - start :], tensors[index])
        except CutError:
            raise
        except (OSError, RuntimeError, MemoryError):
            return list(tensors)
        return result

    def _found(self, tensor: Tensor) -> tuple[int, int] | None:
        """Return the file that a tensor lies in, opened, and the offset of its first element; None if in none."""
        if not self.starts or type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
            return None
        if tensor.device.type != "cpu" or not tensor.numel():
            return None
        address = tensor.data_ptr()
        index = bisect_right(self.starts, address) - 1
        if index < 0:
            return None
        end, offset, inode, path = self.places[index]
        if address + _extent(tensor) > end:
            return None
        with self.lock:
            if path not in self.opened:
                self.opened[path] = _opened(path, inode)
        descriptor = self.opened[path]
        return None if descriptor is None else (descriptor, offset + address - self.starts[index])

    def _values(self, file: int, offset: int, tensor: Tensor) -> Tensor:
        """Read a tensor of no more than a chunk, whose own memory is not touched, into this thread's buffer."""
        buffer: Tensor | None = getattr(self.buffers, "buffer", None)
        if buffer is None:
            buffer = self.buffers.buffer = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, device="cpu")
        memory = buffer[: _extent(tensor)]
        _read(file, offset, memory.numpy().data)
        return _as_in_file(memory, tensor)


@contextmanager
def mapped_files(paths: Iterable[str | os.PathLike[str]]) -> Iterator[MappedFiles]:
    """Open mapped files as they are found, and close them in the end."""
    files = MappedFiles(frozenset(map(os.path.realpath, paths)))
    try:
        yield files
    finally:
        for descriptor in files.opened.values():
            if descriptor is not None:
                os.close(descriptor)


def _by_stride(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Permute two tensors of one shape so that the strides of the first do not increase."""
    order = sorted(range(source.dim()), key=source.stride, reverse=True)
    return source.permute(order), target.permute(order)


def _chunks(offset: int, source: Tensor, target: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Divide two tensors of ``_by_stride`` alike, so that the first takes no more than a chunk of its file."""
    extent = _extent(source)
    if extent <= _CHUNK_BYTES:
        yield offset, source, target
        return
    step = source.stride(0) * source.element_size()
    row = extent - (len(source) - 1) * step
    if row > _CHUNK_BYTES or step > max(2 * row, _MAX_GAP_BYTES):  # what lies between rows is not to be read
        for place in range(len(source)):
            yield from _chunks(offset + place * step, source[place], target[place])
        return
    count = (_CHUNK_BYTES - row) // step + 1
    for place in range(0, len(source), count):
        size = min(count, len(source) - place)
        yield offset + place * step, source.narrow(0, place, size), target.narrow(0, place, size)


def _as_in_file(memory: Tensor, tensor: Tensor) -> Tensor:
    """View the bytes of a tensor, as they were read from its file, as a tensor like it."""
    size = _extent(tensor)
    if memory.storage_offset() % tensor.element_size():
        memory = memory[:size].clone()
    values = memory[:size].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
    values = torch._neg_view(values) if tensor.is_neg() else values
    return values.conj() if tensor.is_conj() else values


def _has_same_bytes(source: Tensor, target: Tensor) -> bool:
    """Return True if both tensors represent equal values by equal bytes in one run of memory."""
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
    """Fill a buffer from a file."""
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
