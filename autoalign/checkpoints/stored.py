"""What a format makes of a file: tensors that are read when asked for; and what all formats share in reading one."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoalign.errors import AutoAlignError, CheckpointError
from autoalign.plan.regions import Region

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


def mapped_bytes(file: Path) -> Tensor:
    """Map a file that is not empty into memory; what is written to the tensor stays in memory.

    No memory is set aside for such writes, without which a file may be larger than all memory.
    """
    if sys.platform == "win32":
        return torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
    flags = mmap.MAP_PRIVATE | (_MAP_NORESERVE if sys.platform == "linux" else 0)
    with file.open("rb") as stream:
        area = mmap.mmap(stream.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return torch.frombuffer(area, dtype=torch.uint8)


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
