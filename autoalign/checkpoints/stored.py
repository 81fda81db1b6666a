"""Numpy's arrays as torch's tensors: which dtypes both have, and how the one becomes the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoalign.plan.regions import Region

# torch has integers of less than a byte too, which others keep in another way
_INTEGERS = frozenset({"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"})


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


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that is still in its file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor] = field(repr=False)
    mapped: bool = False  # whether reading it takes no memory and cannot fail, as where the file is mapped into memory
    read_region: Callable[[Region], Tensor] | None = field(default=None, repr=False)  # where that reads less


@dataclass(frozen=True, slots=True)
class Contents:
    """What a format makes of a file: names to stored tensors, tensors, mappings of such and whatever else it holds."""

    root: Mapping[str, object]
    flat: str = ""  # what to call a file whose format has no containers; '' for one that may have them
    metadata: Mapping[str, str] = field(default_factory=dict)  # statements of the file about itself
    config: Mapping[str, object] = field(default_factory=dict)  # as of ``Checkpoint``
    notes: tuple[str, ...] = ()  # statements for the report
    opened: tuple[tuple[Path, os.stat_result], ...] = ()  # as of ``Checkpoint``, where there are several files


def as_opened(path: Path) -> tuple[tuple[Path, os.stat_result], ...]:
    """Note how a file is that is about to be opened."""
    return ((path.absolute(), path.stat()),)
