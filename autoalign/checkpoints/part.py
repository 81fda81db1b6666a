"""A part of a file, such as a member of an archive. It imports nothing of the package, as ``hdf5_process`` needs it."""

from __future__ import annotations

import io
from typing import Any


class Part(io.RawIOBase):
    """A part of an open file, as a file of its own; it closes the whole if it is the only one to read it."""

    def __init__(self, whole: Any, start: int, size: int, *, is_only: bool = False) -> None:
        self.whole, self.start, self.size, self.at, self.is_only = whole, start, size, 0, is_only

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(offset + (0, self.at, self.size)[whence], 0)
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.whole.seek(self.start + self.at)
        count: int = self.whole.readinto(memoryview(buffer)[: max(self.size - self.at, 0)])
        self.at += count
        return count

    def close(self) -> None:
        super().close()
        if self.is_only:
            self.whole.close()
