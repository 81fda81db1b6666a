"""Writing files of safetensors as a stream: the header from specs alone, then the data, tensor by tensor.

The library's own ``save_file`` wants all tensors in memory at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import BinaryIO

import torch
from torch import Tensor

from autoalign.blocks import blocks
from autoalign.errors import InputError
from autoalign.formats.safetensors import DTYPES
from autoalign.specs import TensorSpec

_NAMES = {getattr(torch, name): known for known, name in DTYPES.items() if hasattr(torch, name)}
_ALIGNMENT = 8  # bytes, of the header
_LARGEST = 100_000_000  # bytes of a header that readers take


def in_file_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Order tensors as a file holds them: wide elements first, so that all are aligned, else as they come."""
    return sorted(specs, key=lambda spec: -spec.dtype.itemsize)


def header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Write the length and the header of a file that holds tensors in this order.

    >>> header([TensorSpec("bias", (3,), torch.float32)], {})[8:]
    b'{"bias":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}      '

    Raises:
        InputError: The format does not hold such a dtype, key or number of tensors.
    """
    listed: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for spec in specs:
        if spec.dtype not in _NAMES:
            raise InputError(
                f"{spec} cannot be written: safetensors has no such dtype. Nothing was written. "
                "Pass dtype= to convert floating-point tensors, or exclude the key."
            )
        end = start + spec.numel * spec.dtype.itemsize
        entry = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
        if spec.key == "__metadata__" or listed.setdefault(spec.key, entry) is not entry:
            raise InputError(f"No tensor of a file of safetensors can be called {spec.key!r}. Nothing was written.")
        start = end
    try:
        text = json.dumps(listed, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        part = error.object[max(error.start - 20, 0) : error.end + 20]
        raise InputError(
            f"{part!r}, in a key or in the metadata, is no Unicode text, which safetensors needs. Nothing was written."
        ) from error
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > _LARGEST:
        raise InputError(
            f"The names of {len(specs)} tensors and the metadata take {len(text)} bytes, and readers of safetensors "
            f"take {_LARGEST}. Nothing was written. Pass a smaller max_shard_size."
        )
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    stream: BinaryIO, specs: Sequence[TensorSpec], read: Callable[[TensorSpec], Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a file; one tensor is read at a time.

    Args:
        stream: To write to.
        specs: What to write, ``in_file_order``; values are converted to the dtypes that they name.
        read: From each of ``specs`` to a tensor of its shape, on any device and of any strides.
        metadata: The file's own.

    Raises:
        InputError: As ``header``, or a tensor is sparse or of a class of its own.
    """
    stream.write(header(specs, metadata))
    for spec in specs:
        _write_values(stream, dense(spec.key, read(spec)), spec.dtype)


def _write_values(stream: BinaryIO, tensor: Tensor, dtype: torch.dtype) -> None:
    """Write the values of a tensor, of which nothing is held when this is done."""
    for block in blocks(tensor):
        plain = block.resolve_conj().resolve_neg().to("cpu", dtype)
        stream.write(_little_endian(plain).numpy().data)


def dense(key: str, tensor: Tensor) -> Tensor:
    """Take a tensor without its gradient.

    Raises:
        InputError: It is sparse or of a class of its own.
    """
    tensor = tensor.detach()
    if type(tensor) is not Tensor or tensor.layout != torch.strided:
        kind = type(tensor).__name__ if type(tensor) is not Tensor else str(tensor.layout)
        raise InputError(
            f"{key} is a {kind} and not a plain tensor of all its values. Nothing was written. "
            "Make it one first, as to_dense() and full_tensor() do."
        )
    return tensor


def _little_endian(flat: Tensor) -> Tensor:
    """Return the bytes of a flat tensor as a file has them; they are a view, except on big-endian machines."""
    if flat.stride() != (1,):  # which contiguous() lets pass for one element
        flat = flat.clone(memory_format=torch.contiguous_format)
    data = flat.view(torch.uint8)
    if sys.byteorder == "little":
        return data
    width = flat.dtype.itemsize // (2 if flat.is_complex() else 1)
    return data.view(-1, width).flip(1).reshape(-1)
