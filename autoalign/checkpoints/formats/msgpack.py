"""Files of Flax's ``msgpack_serialize``: nested mappings of arrays, through the package ``msgpack``.

An array is an extension that holds its shape, the name of its dtype and its bytes. A very large one is a mapping of
pieces. The file is read as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoalign.checkpoints.stored import Contents, StoredTensor, as_tensor, named_dtype, reading, unique_names
from autoalign.errors import DependencyError

_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3  # the codes of Flax's extensions
_PIECES = "__msgpack_chunked_array__"
_MAX_LIST_ITEMS, _MAX_MAPPING_ITEMS, _MAX_DEPTH = 2**16, 2**20, 64


def is_msgpack(head: bytes) -> bool:
    """Return True if a file that begins with ``head`` is a mapping of msgpack with a name as its first key."""
    sizes = {0xDE: 3, 0xDF: 5}  # bytes before the first key
    if len(head) < 8 or not (0x81 <= head[0] <= 0x8F or head[0] in sizes):
        return False
    key = head[sizes.get(head[0], 1)]
    return 0xA0 <= key <= 0xBF or key in (0xD9, 0xDA)


def open_msgpack(file: Path) -> Contents:
    """Read a file of Flax.

    Raises:
        CheckpointError: The file is damaged, or holds a dtype that torch does not have.
        DependencyError: The package ``msgpack`` is not installed.
    """
    try:
        import msgpack
    except ImportError as error:
        raise DependencyError.reading("Files of Flax", "msgpack") from error

    def extension(code: int, data: bytes) -> object:
        if code == _COMPLEX:
            return complex(*msgpack.unpackb(data))
        if code not in (_ARRAY, _SCALAR):
            raise ValueError(f"an extension of code {code}")
        shape, name, values = msgpack.unpackb(data, raw=False, max_array_len=_MAX_LIST_ITEMS)
        return _array(shape, name.decode() if isinstance(name, bytes) else name, values)

    limits = {"raw": False, "max_array_len": _MAX_LIST_ITEMS, "max_map_len": _MAX_MAPPING_ITEMS}
    with reading(file, "a msgpack file of Flax"):
        found = msgpack.unpackb(file.read_bytes(), ext_hook=extension, object_pairs_hook=unique_names, **limits)
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
        return Contents(_with_whole_arrays(found, _MAX_DEPTH))


def _array(shape: Any, name: str, values: bytes) -> StoredTensor:
    _check_shape(shape)
    dtype = named_dtype(name)
    if dtype is None or prod(shape) * dtype.itemsize != len(values):
        raise ValueError(f"an array of shape {shape} and dtype {name} in {len(values)} bytes")

    def read() -> Tensor:
        data = np.frombuffer(values, np.uint8)
        if not len(data):
            return torch.empty(tuple(shape), dtype=dtype, device="cpu")
        return as_tensor(data, torch.uint8).view(dtype).reshape(tuple(shape))

    return StoredTensor(tuple(shape), dtype, read)


def _check_shape(shape: Any) -> None:
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"shape {shape}")


def _with_whole_arrays(found: Mapping[str, Any], depth: int) -> dict[str, object]:
    """Join the pieces of large arrays."""
    if not depth:
        raise ValueError(f"more than {_MAX_DEPTH} mappings in each other")
    return {
        name: value
        if not isinstance(value, dict)
        else _whole(value)
        if _PIECES in value
        else _with_whole_arrays(value, depth - 1)
        for name, value in found.items()
    }


def _whole(value: Mapping[str, Any]) -> StoredTensor:
    shape = tuple(value["shape"][str(index)] for index in range(len(value["shape"])))
    pieces: list[StoredTensor] = [value["chunks"][str(index)] for index in range(len(value["chunks"]))]
    (dtype,) = {piece.dtype for piece in pieces}
    _check_shape(shape)
    if prod(shape) != sum(prod(piece.shape) for piece in pieces):
        raise ValueError(f"an array of shape {shape} in pieces of other sizes")
    return StoredTensor(shape, dtype, lambda: torch.cat([piece.read().reshape(-1) for piece in pieces]).reshape(shape))
