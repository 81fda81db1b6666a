"""Files of safetensors: a JSON header with names, shapes and dtypes, then the data, which is mapped into memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from autoalign.errors import CheckpointError
from autoalign.formats.budget import MEMBERS
from autoalign.stored import Contents, Stored, natural

DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
Mapped: TypeAlias = tuple[torch.UntypedStorage, Mapping[str, tuple[int, int]]]  # of a file, and where in it each is

_ENTRY = b'"data_offsets"'  # is in each of a header
_LONGEST = 10**8  # bytes of a header, by the library's own limit


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of this size that begins with ``head`` is one of safetensors."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size  # the length of a header, which is JSON


def open_safetensors(file: Path) -> Contents:
    """Read the header of a file of safetensors.

    Raises:
        CheckpointError: The file is damaged, or has nothing but dtypes that torch has not.
    """
    from safetensors import SafetensorError, safe_open

    @cache
    def mapped() -> Mapped:
        return _mapped(file)

    def stored(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Stored:
        def read() -> Tensor:
            try:
                return _tensor(mapped(), key, shape, dtype)
            except Exception as error:  # of a file that was changed since, or of a shape that torch cannot hold
                raise _damaged(file, error) from error

        return Stored(shape, dtype, read, mapped=True)

    try:
        _check_count(file)
        # for torch, the file would be mapped writable, which fails for one that is larger than the memory
        with safe_open(file, framework="numpy") as header:
            headers = [(key, header.get_slice(key)) for key in header.keys()]  # noqa: SIM118, it is no mapping
            metadata = header.metadata() or {}
        if _header_of(file).count(_ENTRY) > len(headers):  # which a name may hold too
            json.loads(_header_of(file), object_pairs_hook=_mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(file, error) from error
    # the format sorts by dtype and name, which tells nothing; by number, at least the blocks are in their order
    headers.sort(key=lambda header: natural(header[0]))
    root: dict[str, object] = {}
    left_out = []
    for key, tensor in headers:
        dtype = getattr(torch, DTYPES.get(tensor.get_dtype(), ""), None)
        if isinstance(dtype, torch.dtype):
            root[key] = stored(key, tuple(tensor.get_shape()), dtype)
        else:
            left_out.append(f"{key} {tensor.get_shape()} {tensor.get_dtype()}")
    listed = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
    if left_out and not root:
        raise CheckpointError(
            f"All tensors of {str(file)!r} have a dtype that this version of torch cannot read: {listed}. Nothing was "
            "read. A newer torch may read them; quantised ones must be dequantised first."
        )
    notes = (
        (f"{len(left_out)} tensors have a dtype that this version of torch cannot read and were left out: {listed}.",)
        if left_out
        else ()
    )
    return Contents(root, "safetensors file", metadata, notes=notes)


def _mapped(file: Path) -> Mapped:
    """Map a file whose header is known to be sound, and look up where its tensors are."""
    content = _header_of(file)
    start = 8 + len(content)
    places = {key: entry["data_offsets"] for key, entry in json.loads(content).items() if key != "__metadata__"}
    storage: Any = torch.UntypedStorage.from_file(str(file), False, file.stat().st_size)
    return storage, {key: (start + begin, start + end) for key, (begin, end) in places.items()}


def _tensor(mapped: Mapped, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Take a tensor without touching its memory, as ``get_tensor`` does: what is cut from the file ends the process."""
    storage, places = mapped
    start, end = places[key]
    tensor = torch.empty(0, dtype=dtype, device="cpu")
    if end - start != prod(shape) * dtype.itemsize or end > storage.nbytes():
        raise ValueError(f"{key} is not where it was announced")
    if start < end:
        tensor.set_(storage[start:end])
    return tensor.reshape(shape)


def _check_count(file: Path) -> None:
    """Refuse a header that would take long and much memory to read."""
    count = _header_of(file).count(_ENTRY)
    if count > MEMBERS:
        raise ValueError(f"it announces {count:,} tensors, and no more than {MEMBERS:,} are read")


def _header_of(file: Path) -> bytes:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return stream.read(length) if length <= _LONGEST else b""  # which the library refuses


def _mapping(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("two tensors of one name")
    return found


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{str(file)!r} could not be read as a file of safetensors: {error}. "
        "It may be truncated or damaged; compare its size with the original's."
    )
