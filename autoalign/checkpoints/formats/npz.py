"""Files of ``numpy.savez``: a zip file of arrays, whose headers tell shapes and dtypes. Nothing is ever unpickled."""

from __future__ import annotations

import io
import zipfile
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from autoalign.checkpoints.stored import (
    MAX_MEMBERS,
    Budget,
    Contents,
    Member,
    StoredTensor,
    as_tensor,
    left_out_notes,
    reading,
    torch_dtype,
)

_KIND = "a file of numpy"
_MAX_HEADER_BYTES = 2**14  # of an array; numpy takes 10,000, and one of numbers has a hundred
_FIRST_BYTES = 2**8  # that are read of each array, and seldom more
_SUFFIX = ".npy"


def is_npz(head: bytes) -> bool:
    """Return True if a file that begins with ``head`` is a zip file whose first member is an array of numpy."""
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    return head.startswith(b"PK\x03\x04") and name.endswith(_SUFFIX.encode())


def open_npz(file: Path) -> Contents:
    """Read the headers of the arrays in a file.

    Arrays of bfloat16, whose dtype numpy does not save, are known by their two nameless bytes. Arrays of objects are
    pickles, which may run code; they and all others that torch cannot hold are left out, with a note.

    Raises:
        CheckpointError: The file is damaged, or has nothing but arrays that are left out.
    """

    @cache
    def opened() -> zipfile.ZipFile:
        return zipfile.ZipFile(file.open("rb") if isinstance(file, Member) else file)

    def stored(member: str, shape: tuple[int, ...], dtype: torch.dtype) -> StoredTensor:
        def read() -> Tensor:
            with reading(file, _KIND), opened().open(member) as stream:
                return as_tensor(npy.read_array(stream, allow_pickle=False), dtype)

        return StoredTensor(shape, dtype, read)

    root: dict[str, object] = {}
    budget = Budget(file.stat().st_size)
    left_out: dict[str, str] = {}  # from a name to why
    with reading(file, _KIND), file.open("rb") as whole, zipfile.ZipFile(whole) as archive:
        if len(archive.infolist()) > MAX_MEMBERS:
            raise ValueError(f"{len(archive.infolist()):,} members, and no more than {MAX_MEMBERS:,} are read")
        for info in archive.infolist():
            if not info.filename.endswith(_SUFFIX):
                continue
            name = info.filename.removesuffix(_SUFFIX)
            if name in root or name in left_out:
                raise ValueError(f"it has two arrays {name!r}")
            with archive.open(info) as stream:
                start = stream.read(_FIRST_BYTES)
                if int.from_bytes(start[8:10], "little") > _FIRST_BYTES - 10:
                    start += stream.read(_MAX_HEADER_BYTES)
            budget.charge(len(start))
            shape, dtype, length = _header(io.BytesIO(start))
            if dtype.hasobject:
                left_out[name] = "objects, which only unpickling would give, and a pickle may run code"
                continue
            kind = torch.bfloat16 if dtype == np.dtype("V2") else torch_dtype(dtype)
            if kind is None:
                left_out[name] = f"dtype {dtype}, which torch does not have"
                continue
            if info.file_size != length + prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has {info.file_size} bytes, not those of {list(shape)} {dtype}")
            root[name] = stored(info.filename, shape, kind)
    if not left_out:
        return Contents(root, "npz file")
    listed = "; ".join(f"{name}: {why}" for name, why in list(left_out.items())[:3])
    advice = "Save plain arrays, a name for each, as in numpy.savez(path, **{name: array})."
    return Contents(
        root, "npz file", notes=left_out_notes(file, root, f"{len(left_out)} arrays of the file ({listed})", advice)
    )


def _header(stream: io.BytesIO) -> tuple[tuple[int, ...], np.dtype, int]:
    """Read the header of an array: its shape, its dtype, and where its data begins."""
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):  # of which the latest is for the names of fields
        raise ValueError(f"arrays of version {version}")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(stream)
    if any(not 0 <= size < 2**63 for size in shape):
        raise ValueError(f"shape {shape}")
    return shape, dtype, stream.tell()
