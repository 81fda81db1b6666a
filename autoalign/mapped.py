"""Mapped files: where the values of a mapped tensor are in their file, so that they can be read into place.

To copy from a mapping, its pages must be brought in bit by bit, and taken out again in the end; reading the same bytes
spares both. Linux tells which file is mapped where. Elsewhere, and where it does not tell, nothing is read.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from autoalign.errors import CheckpointError

_MAPS = Path("/proc/self/maps")
_LEAST = 2**16  # bytes of a tensor; less is copied as fast


@dataclass(frozen=True, slots=True)
class MappedFiles:
    """The files that this process has mapped, each opened when something of it is read."""

    starts: list[int]  # addresses, ascending
    places: list[tuple[int, int, int, str]]  # of each: its end, the place of its start in the file, inode and path
    opened: dict[str, int | None] = field(default_factory=dict)  # descriptors; None for a file that is another now
    lock: Lock = field(default_factory=Lock)  # of what is opened, by one of several threads

    def read(self, source: Tensor, target: Tensor) -> bool:
        """Read the values of a mapped tensor into another; False where they are to be copied instead.

        Args:
            source: Lies in a mapping that nobody has written to.
            target: On the CPU, of the same shape, and without gradient.

        Raises:
            CheckpointError: The file has become shorter, and what is gone of its mapping would end the process.
        """
        if source.dtype != target.dtype or source.nbytes < _LEAST:
            return False
        if any(tensor.is_conj() or tensor.is_neg() for tensor in (source, target)):  # not what their bytes say
            return False
        if not (source.is_contiguous() and target.is_contiguous()):
            return False
        found = self._place(source.data_ptr(), source.nbytes)
        if found is None:
            return False
        descriptor, offset = found
        rest = target.reshape(-1).view(torch.uint8).numpy().data
        while rest:
            try:
                count = os.preadv(descriptor, [rest], offset)
            except OSError:
                return False
            if count == 0:
                if os.fstat(descriptor).st_size < offset + len(rest):
                    raise CheckpointError("The file has become shorter while it was read.")
                return False
            rest, offset = rest[count:], offset + count
        torch.autograd.graph.increment_version(target)
        return True

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


@contextmanager
def mapped_files() -> Iterator[MappedFiles]:
    """Find the files that are mapped now; they are closed again in the end."""
    files = MappedFiles([], [])
    if hasattr(os, "preadv"):
        with suppress(OSError):
            for line in _MAPS.read_text(encoding="utf-8", errors="surrogateescape").split("\n"):
                addresses, _, offset, _, inode, path, *_ = (*line.split(" ", 5), *[""] * 6)
                if inode not in ("", "0") and (path := path.lstrip(" ")):
                    start, _, end = addresses.partition("-")
                    files.starts.append(int(start, 16))
                    files.places.append((int(end, 16), int(offset, 16), int(inode), path))
    try:
        yield files
    finally:
        for descriptor in files.opened.values():
            if descriptor is not None:
                os.close(descriptor)


def _opened(path: str, inode: int) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # deleted, or with a name that is written otherwise there
        return None
    if os.fstat(descriptor).st_ino == inode:
        return descriptor
    os.close(descriptor)
    return None
