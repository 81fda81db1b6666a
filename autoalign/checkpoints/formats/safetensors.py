"""Files of safetensors: a JSON header with names, shapes and dtypes, then the data, which is mapped into memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from autoalign.checkpoints.stored import (
    DTYPES,
    MAX_MEMBERS,
    Contents,
    Place,
    StoredTensor,
    Value,
    left_out_notes,
    mapped_bytes,
    reading,
    region_of,
    tensor_of,
    unaligned,
    unique_names,
)
from autoalign.errors import InputError, listed
from autoalign.plan.keys import natural
from autoalign.plan.regions import Region
from autoalign.plan.specs import TensorSpec

_KIND = "a file of safetensors"
_ENTRY = b'"data_offsets"'  # is in each of a header
_MAX_HEADER_BYTES = 10**8  # which readers take


def is_safetensors(head: bytes, size: int) -> bool:
    """Return True if a file of this size that begins with ``head`` is one of safetensors."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size  # the length of a header, which is JSON


def open_safetensors(file: Path) -> Contents:
    """Read the header of a file of safetensors.

    Raises:
        CheckpointError: The file is damaged, or has only dtypes that torch does not have.
    """
    with reading(file, _KIND):
        content = _header_of(file)
        first, known = 8 + len(content), hash(content)
        count = content.count(_ENTRY)  # which a name may hold too
        if count > MAX_MEMBERS:  # which would take long and much memory to read
            raise ValueError(f"it announces {count:,} tensors, and no more than {MAX_MEMBERS:,} are read")
        entries = json.loads(content)
        if count > len(entries.keys() - {"__metadata__"}):
            entries = json.loads(content, object_pairs_hook=unique_names)
        metadata = entries.pop("__metadata__", {})
        _check(metadata, entries, file.stat().st_size - first)
        place = Place.of(file).start  # in an archive, whose makers align nothing

    @cache
    def mapped() -> tuple[Any, int]:
        if hash(_header_of(file)) != known:
            raise ValueError("its header was changed after it was opened")
        whole = mapped_bytes(file)
        return whole.untyped_storage(), int(whole.storage_offset()) + first

    def found(key: str, offsets: list[int], shape: tuple[int, ...], dtype: torch.dtype) -> Value:
        """Return a tensor whose memory is not touched; what is cut from the file ends the process that does."""
        with reading(file, _KIND):
            data, begin = mapped()
            start, end = (begin + offset for offset in offsets)
            if end > data.nbytes():
                raise ValueError(f"{key} is not where it was announced")
            if start == end:
                return torch.empty(shape, dtype=dtype, device="cpu")
            if place % dtype.itemsize == 0:
                return torch.empty(0, dtype=dtype, device="cpu").set_(data[start:end]).reshape(shape)
            there = torch.empty(0, dtype=torch.uint8, device="cpu").set_(data[start:end])
            return unaligned(there, shape, torch.empty(shape, device="meta").stride(), dtype)

    root: dict[str, object] = {}
    left_out = []
    # the format sorts by dtype and name; by the numbers in names, at least the blocks are in their order
    for key in sorted(entries, key=natural):
        entry = entries[key]
        shape, dtype = tuple(entry["shape"]), DTYPES.get(entry["dtype"])
        if dtype is not None:
            find = partial(found, key, entry["data_offsets"], shape, dtype)
            read, read_region = partial(_read, find), partial(_read_region, find)
            is_mapped = place % dtype.itemsize == 0
            root[key] = StoredTensor(shape, dtype, read, is_mapped=is_mapped, read_region=read_region)
        else:
            left_out.append(f"{key} {list(shape)} {entry['dtype']}")
    if not left_out:
        return Contents(root, "safetensors file", metadata)
    what = f"{len(left_out)} tensors of a dtype that this version of torch cannot read ({listed(left_out)})"
    advice = "A newer torch may read them; dequantise quantised ones first."
    return Contents(root, "safetensors file", metadata, notes=left_out_notes(file, root, what, advice))


def _read(find: Callable[[], Value]) -> Tensor:
    return tensor_of(find())


def _read_region(find: Callable[[], Value], region: Region) -> Tensor:
    return region_of(find(), region)


def _header_of(file: Path) -> bytes:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"header too large: {length:,} bytes, of {_MAX_HEADER_BYTES:,} at most")
        return bytes(stream.read(length))


def _check(metadata: object, entries: Mapping[str, Any], size: int) -> None:
    """Make sure that a header is sound, as the format's own library does: the tensors make up all of the data.

    Raises:
        Exception: It is not.
    """
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is more than texts")
    at = 0
    for start, end, key in sorted((*entry["data_offsets"], key) for key, entry in entries.items()):
        entry = entries[key]
        if any(type(number) is not int or not 0 <= number < 2**63 for number in (start, end, *entry["shape"])):
            raise ValueError(f"{key[:100]} has numbers that are none of a tensor")
        dtype = DTYPES.get(entry["dtype"])
        if start != at or end < at or (dtype and end - at != prod(entry["shape"]) * dtype.itemsize):
            raise ValueError(f"{key[:100]} {entry['shape']} {entry['dtype']} is not the bytes {start} to {end}")
        at = end
    if at != size:
        raise ValueError(f"it announces {at:,} bytes of tensors and has {size:,}")


BLOCK_ELEMENTS = 2**20  # few megabytes, and enough for a strided view to be read in whole cache lines


def blocks(tensor: Tensor, size: int = BLOCK_ELEMENTS) -> Iterator[Tensor]:
    """Yield the elements of a tensor in row-major order, as flat tensors of at most ``size`` elements.

    A block is a view where the memory of its elements is in this order, else a copy.

    >>> [block.tolist() for block in blocks(torch.arange(6).reshape(2, 3).T, 2)]
    [[0, 3], [1, 4], [2, 5]]
    """
    if tensor.numel() <= size:
        yield tensor.reshape(-1)
    elif tensor.is_contiguous():
        yield from torch.split(tensor.view(-1), size)
    elif len(tensor) == 1:
        yield from blocks(tensor[0], size)
    else:
        for part in torch.split(tensor, max(size * len(tensor) // tensor.numel(), 1)):
            yield from blocks(part, size)


_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8  # bytes, of the header


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
            f"{part!r}, in a key or in the metadata, is not Unicode text, which safetensors needs. Nothing was written."
        ) from error
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > _MAX_HEADER_BYTES:
        raise InputError(
            f"The names of {len(specs)} tensors and the metadata take {len(text)} bytes, and readers of safetensors "
            f"take {_MAX_HEADER_BYTES}. Nothing was written. Pass a smaller max_shard_size."
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
    """Return a tensor without its gradient.

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
