"""What reading may cost: time and memory in proportion to the size of a checkpoint, counted over all that reads it."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO

FREE = 2**23  # steps, whatever the size; a step is a byte, a character of text or an element of a tensor
FOR_EACH_BYTE = 4  # steps more
MEMBERS = 2**18  # of a file: tensors, arrays, records

_END, _END_64, _PLACE_64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"  # how the records at the end of a zip file begin
_TAIL = 56 + 20 + 22  # bytes of the three of them
_SIZES_64 = 1  # the kind of a member's extra field that holds sizes beyond 32 bits


class TooCostlyError(ValueError):
    """A file asks for more than one of its size has reason to."""


class Budget:
    """The steps that are left for reading a checkpoint.

    Attributes:
        most: Those that there were.
        left: Those that are left.
    """

    __slots__ = ("left", "most")

    def __init__(self, size: int) -> None:
        self.most = self.left = FREE + FOR_EACH_BYTE * size

    def charge(self, steps: int) -> None:
        """Take steps.

        Raises:
            TooCostlyError: There are not as many left.
        """
        self.left -= steps
        if self.left < 0:
            raise TooCostlyError(f"reading it would take more than {self.most:,} steps")


def members_of(file: Path | IO[bytes], size: int) -> list[zipfile.ZipInfo]:
    """List the members of a zip file in which all readers see the same ones.

    Readers differ in where they look for the directory. Where it is not the one thing before the end, a file may
    hold a harmless one for the reader that checks it and another for the reader that unpacks it.

    Raises:
        TooCostlyError: It has too many.
        ValueError: It does not end as the files of torch do, or is damaged in other ways.
    """
    if isinstance(file, Path):
        with file.open("rb") as stream:
            return members_of(stream, size)
    file.seek(max(size - _TAIL, 0))
    count = _directory(file.read(_TAIL), size)
    if count is None:
        raise ValueError("it may be read as two different zip files")
    if count > MEMBERS:
        raise TooCostlyError(f"it has {count:,} members, of {MEMBERS:,} at most")
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from error
    if len(members) != count or any(_has_two_sizes(info.extra) for info in members):
        raise ValueError("it may be read as two different zip files")
    return members


def check_archive(file: Path | IO[bytes], size: int) -> int:
    """Make sure that what is in a zip file takes no more than the file.

    Returns:
        The largest size of a ``data.pkl``, in whatever case.

    Raises:
        TooCostlyError: It would take more.
        ValueError: As ``members_of``.
    """
    members = members_of(file, size)
    total = sum(info.file_size for info in members)
    if total > size:
        raise TooCostlyError(f"it is a compressed zip file, as torch writes none, of {total} bytes when unpacked")
    return max((info.file_size for info in members if info.filename.lower().endswith("/data.pkl")), default=0)


def _directory(tail: bytes, size: int) -> int | None:
    """Return the number of members in a directory that is followed by nothing but the end; None if it is not so."""
    end, place, large = tail[-22:], tail[-42:-22], tail[-98:-42]
    if not end.startswith(_END) or end[20:] != b"\0\0":  # bytes of a comment
        return None
    if not place.startswith(_PLACE_64):
        count, length, start = (_number(end, at, width) for at, width in ((10, 2), (12, 4), (16, 4)))
        return count if start + length == size - 22 else None
    count, length, start = (_number(large, at, 8) for at in (32, 40, 48))
    is_there = large.startswith(_END_64) and _number(place, 8, 8) == size - 98
    return count if is_there and start + length == size - 98 else None


def _has_two_sizes(extra: bytes) -> bool:
    found = 0
    while len(extra) >= 4:
        kind, length = _number(extra, 0, 2), _number(extra, 2, 2)
        found += kind == _SIZES_64
        extra = extra[4 + length :]
    return found > 1


def _number(data: bytes, at: int, width: int) -> int:
    return int.from_bytes(data[at : at + width], "little")
