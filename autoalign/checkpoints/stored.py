"""What a format makes of a file: tensors that are read when asked for; and what all formats share in reading one."""

from __future__ import annotations

import errno
import io
import mmap
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor

from autoalign.checkpoints.part import Part
from autoalign.errors import AutoAlignError, CheckpointError
from autoalign.plan.regions import Region, narrowed

MAX_MEMBERS = 2**18  # tensors, arrays or records in a file
FREE_STEPS = 2**23  # whatever the size; a step is a byte, a character of text or an element of a tensor
STEPS_PER_BYTE = 4
_MAP_NORESERVE = 0x4000  # of Linux, which Python has no name for yet

DTYPES = {  # of safetensors and GGUF
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}

# torch has integers of less than a byte too, which others keep in another way
_INTEGERS = frozenset({"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"})


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that is still in its file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor] = field(repr=False)
    is_mapped: bool = False  # the file is mapped into memory: reading allocates nothing and cannot fail
    read_region: Callable[[Region], Tensor] | None = field(default=None, repr=False)  # where that reads less
    encoding: str = ""  # as of ``TensorSpec``


Value: TypeAlias = Tensor | StoredTensor


def tensor_of(value: Value) -> Tensor:
    """Read a tensor that may be in its file."""
    return value if isinstance(value, Tensor) else value.read()


def region_of(value: Value, region: Region) -> Tensor:
    """Read a part of a tensor that may be in its file."""
    if isinstance(value, Tensor) or value.read_region is None:
        return narrowed(tensor_of(value), region)
    return value.read_region(region)


def unaligned(data: Tensor, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> StoredTensor:
    """Return a tensor in bytes that do not begin where its numbers may: what is read of it is copied.

    >>> tensor = unaligned(torch.arange(9, dtype=torch.uint8)[1:], (2, 2), (2, 1), torch.int16)
    >>> tensor.read().tolist() == [[0x0201, 0x0403], [0x0605, 0x0807]], region_of(tensor, ((1, 1), (0, 1))).tolist()
    (True, [[1541]])

    Args:
        data: Flat, of uint8.
        shape: Of the tensor.
        stride: In elements.
        dtype: Of the tensor.
    """
    size = dtype.itemsize

    def read_region(region: Region) -> Tensor:
        first = size * sum(start * step for (start, _), step in zip(region, stride, strict=True))
        lengths = (*(length for _, length in region), size)
        found = data.as_strided(lengths, (*(size * step for step in stride), 1), int(data.storage_offset()) + first)
        return found.clone(memory_format=torch.contiguous_format).view(dtype).squeeze(-1)

    whole = tuple((0, length) for length in shape)
    return StoredTensor(tuple(shape), dtype, lambda: read_region(whole), read_region=read_region)


@dataclass(frozen=True, slots=True)
class Contents:
    """Names to stored tensors, tensors, mappings of such and whatever else a file holds."""

    root: Mapping[str, object]
    flat: str = ""  # what to call a file whose format has no containers; '' for one that may have them
    metadata: Mapping[str, str] = field(default_factory=dict)  # statements of the file about itself
    config: Mapping[str, object] = field(default_factory=dict)  # as of ``Checkpoint``
    notes: tuple[str, ...] = ()  # statements for the report
    opened: tuple[tuple[Path, os.stat_result], ...] = ()  # as of ``Checkpoint``, where there are several files


class TooCostlyError(ValueError):
    """A file asks for more than one of its size has reason to."""


class Budget:
    """The steps that are left for reading a checkpoint: time and memory in proportion to its size.

    Attributes:
        total: Those that there were.
        left: Those that are left.
    """

    __slots__ = ("left", "total")

    def __init__(self, size: int) -> None:
        self.total = self.left = FREE_STEPS + STEPS_PER_BYTE * size

    def charge(self, steps: int) -> None:
        """Spend steps.

        Raises:
            TooCostlyError: There are not as many left.
        """
        self.left -= steps
        if self.left < 0:
            raise TooCostlyError(f"reading it would take more than {self.total:,} steps")


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Raise what a damaged file leads its reader to, which may be anything, as a ``CheckpointError``.

    Args:
        path: The file, or the folder.
        kind: What it was taken for, with its article.
    """
    try:
        yield
    except (AutoAlignError, Warning):  # a warning is an error where a filter of the caller's says so
        raise
    except Exception as error:
        raise CheckpointError(
            f"{str(path)!r} could not be read as {kind} ({type(error).__name__}: {error}). Nothing was read. "
            "It may be truncated or damaged; compare its size with the original's."
        ) from error


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of a file stand."""

    file: Path  # that the system knows
    start: int
    size: int

    @classmethod
    def of(cls, file: Path) -> Place:
        """Look up where a file is, which may be a member of an archive."""
        return file.places[str(file)] if isinstance(file, Member) else cls(file, 0, file.stat().st_size)

    @property
    def is_whole(self) -> bool:
        """True if there is nothing else in the file."""
        return not self.start and self.size == self.file.stat().st_size


class Copies:
    """Temporary copies, which are removed when nothing refers to this any more."""

    folder: Path | None = None
    count = size = 0

    def add(self, stream: IO[bytes]) -> Place:
        """Copy what is left of a stream.

        Raises:
            CheckpointError: There is no room for it.
        """
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="autoalign-"))
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.count += 1
        file = self.folder / str(self.count)
        try:
            with file.open("xb") as target:  # since what is mapped must not be written to again
                shutil.copyfileobj(stream, target)
                size = target.tell()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise CheckpointError(
                f"There is no room for a copy of what is packed, in {str(self.folder.parent)!r}. Nothing was read. Set "
                "TMPDIR to a folder with more room, or unpack it yourself and name the file to read."
            ) from error
        self.size += size
        return Place(file, 0, size)


if TYPE_CHECKING:
    _LocalPath = Path
else:
    _LocalPath = type(Path())


class Member(_LocalPath):
    """A path below that of an archive: a file in it, which is read where it stands, or a folder of such.

    It is opened and listed as any path; the system does not know it (see ``local_file``). The members of an archive are
    of a class of their own, so that paths made of them are, too.
    """

    places: ClassVar[dict[str, Place]]  # by path
    names: ClassVar[dict[str, list[str]]]  # what is in a folder, by its path
    copies: ClassVar[Copies]

    @classmethod
    def of(cls, archive: Path, places: Mapping[str, Place], copies: Copies) -> Member:
        """Return the path of an archive as a folder; ``places`` are by paths in it."""
        names: dict[str, dict[str, None]] = {}
        kind: Any = type("Member", (cls,), {"copies": copies})
        root: Member = kind(archive)
        kind.places = {str(root / name): place for name, place in places.items()}
        for name in places:
            path = root / name
            for each, folder in zip((path, *path.parents), path.parents, strict=False):
                if each == root:
                    break
                names.setdefault(str(folder), {})[each.name] = None
        kind.names = {folder: list(found) for folder, found in names.items()}
        return root

    def open(self, *_: Any, **__: Any) -> Any:
        """Open it for reading bytes."""
        place = Place.of(self)
        return io.BufferedReader(Part(place.file.open("rb", 0), place.start, place.size, is_only=True))

    def read_bytes(self) -> bytes:
        with self.open() as stream:
            return bytes(stream.read())

    def read_text(self, *arguments: Any, **options: Any) -> str:
        return self.read_bytes().decode(*arguments, **options)

    def stat(self, **_: Any) -> os.stat_result:
        """Return the state of the archive with the size of the member."""
        place = Place.of(self)
        found = list(place.file.stat())
        found[6] = place.size
        return os.stat_result(found)

    def is_file(self, **_: Any) -> bool:
        return str(self) in self.places

    def is_dir(self, **_: Any) -> bool:
        return str(self) in self.names

    def exists(self, **_: Any) -> bool:
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Any:
        return (self / name for name in self.names[str(self)])


def local_file(file: Path) -> Path:
    """Return a file that the system knows, for libraries that open it; of a part of another one it is a copy."""
    if not isinstance(file, Member):
        return file
    place = Place.of(file)
    if not place.is_whole:
        with file.open() as stream:
            place = file.copies.add(stream)
        file.places[str(file)] = place
    return place.file


def mapped_file(file: Path, max_bytes: int = sys.maxsize, **options: int) -> mmap.mmap:
    """Map the bytes of a file that is not empty; the map may begin before them, and stands where they do."""
    place = Place.of(file)
    before = place.start % mmap.ALLOCATIONGRANULARITY
    if not place.size:
        raise ValueError("it is empty")
    with place.file.open("rb") as stream:
        length = before + min(place.size, max_bytes)
        area = mmap.mmap(stream.fileno(), length, offset=place.start - before, **options)
    area.seek(before)
    return area


def mapped_bytes(file: Path) -> Tensor:
    """Map a file that is not empty into memory; what is written to the tensor stays in memory.

    No memory is set aside for such writes, without which a file may be larger than all memory.
    """
    if sys.platform == "win32":
        place = Place.of(file)
        whole = torch.from_file(str(place.file), shared=False, size=place.start + place.size, dtype=torch.uint8)
        return whole[place.start :]
    flags = mmap.MAP_PRIVATE | (_MAP_NORESERVE if sys.platform == "linux" else 0)
    area = mapped_file(file, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return torch.frombuffer(area, dtype=torch.uint8)[area.tell() :]


def unique_names(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make a mapping, as ``object_pairs_hook`` of a parser.

    Raises:
        ValueError: Two of the names are equal.
    """
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it lists {name[:100]!r} twice")
        found[name] = value
    return found


def left_out_notes(file: Path, root: Mapping[str, object], left_out: str, advice: str) -> tuple[str, ...]:
    """Return a note on tensors of a file that are left out.

    Raises:
        CheckpointError: There are no others.
    """
    if not root:
        raise CheckpointError(f"{str(file)!r} holds nothing but {left_out}. Nothing was read. {advice}")
    return (f"{left_out} were left out. {advice}",)


def as_opened(path: Path) -> tuple[tuple[Path, os.stat_result], ...]:
    """Record the state of a file that is about to be opened."""
    return ((path.absolute(), path.stat()),)


def torch_dtype(dtype: np.dtype) -> torch.dtype | None:
    """Look up torch's counterpart of a numpy dtype, of any byte order; None where torch has none.

    The types that ``ml_dtypes`` adds to numpy, such as bfloat16, have their counterparts too.

    >>> torch_dtype(np.dtype(">f4")), torch_dtype(np.dtype("U3"))
    (torch.float32, None)
    """
    found = named_dtype(dtype.name)
    return found if found is not None and found.itemsize == dtype.itemsize else None


def named_dtype(name: str) -> torch.dtype | None:
    """Look up the dtype that torch and numpy know by one name.

    >>> named_dtype("bfloat16"), named_dtype("object")
    (torch.bfloat16, None)
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        return None
    return found if found.is_floating_point or found.is_complex or name in _INTEGERS else None


def as_tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Make a tensor over the memory of an array; it is copied only where torch cannot take it over.

    >>> as_tensor(np.array([0x3F80], dtype=np.uint16), torch.bfloat16)
    tensor([1.], dtype=torch.bfloat16)

    Args:
        array: Of any layout and byte order.
        dtype: As from ``torch_dtype``, or another of the same size, in which the array's bytes are then read.
    """
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    # torch refuses negative strides and warns of arrays that cannot be written to
    array = np.require(array, requirements=("C", "W"))
    if array.dtype.kind not in "biufc":  # what numpy holds without knowing it
        array = array.view(f"u{array.dtype.itemsize}")
    tensor = torch.from_numpy(array)
    return tensor if tensor.dtype == dtype else tensor.view(dtype)
