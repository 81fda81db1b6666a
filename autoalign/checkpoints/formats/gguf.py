"""GGUF files, as of llama.cpp, through the package ``gguf``.

Its shapes are in the order of torch here. Quantised tensors are their bytes, in rows, under the name of their encoding.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoalign.checkpoints.stored import DTYPES, Contents, StoredTensor, as_tensor, local_file, mapped_bytes, reading
from autoalign.errors import DependencyError

_MAX_HEADER_VALUES = 2**22  # a vocabulary has some hundred thousand
_MAX_ENTRY_VALUES = 2**10  # of an entry that is handed on; longer ones are vocabularies


def is_gguf(head: bytes) -> bool:
    """Return True if a file that begins with ``head`` is one of GGUF."""
    return head.startswith(b"GGUF")


def open_gguf(file: Path) -> Contents:
    """Read the header of a GGUF file. Its entries, such as ``llama.attention.head_count``, are the configuration.

    Raises:
        CheckpointError: The file is damaged.
        DependencyError: The package ``gguf`` is not installed.
    """
    try:
        from gguf import GGUFEndian, GGUFReader, GGUFValueType
    except ImportError as error:
        raise DependencyError.reading("GGUF files", "gguf") from error

    class Reader(GGUFReader):  # type: ignore[misc]
        """One that stops at the end of the file, and takes lists as a whole where the package's own does item by item.

        The lists are vocabularies of some hundred thousand words, over which it would take half a minute.
        """

        asked = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, *arguments: Any, **options: Any) -> Any:
            values = super()._get(offset, dtype, count, *arguments, **options)
            self.asked += 1
            if len(values) < count or self.asked > _MAX_HEADER_VALUES:
                raise ValueError(f"values beyond the end of the file, or more than {_MAX_HEADER_VALUES} in its header")
            return values

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            types = [GGUFValueType.ARRAY, GGUFValueType(kind[0])]
            begin = orig_offs + kind.nbytes + count.nbytes
            number = self.gguf_scalar_to_np.get(types[1])
            if number is not None:
                values = self._get(begin, number, int(count[0]))
                return begin + values.nbytes - orig_offs, [kind, count, values], [2], types
            if types[1] != GGUFValueType.STRING or count[0] > _MAX_HEADER_VALUES:
                raise ValueError(f"a list of {count[0]} of {types[1].name}")
            length = struct.Struct(">Q" if self.endianess == GGUFEndian.BIG else "<Q")
            end, data = begin, memoryview(self.data)
            for _ in range(int(count[0])):
                end += length.size + length.unpack_from(data, end)[0]
            return end - orig_offs, [kind, count, self._get(begin, np.uint8, end - begin)], [], types

    with reading(file, "a GGUF file"):
        file = local_file(file)
        reader = Reader(file, "r")
        end = int(reader.data_offset)
        for tensor in sorted(reader.tensors, key=lambda tensor: tensor.data_offset):
            if tensor.data_offset < end:
                raise ValueError(f"{tensor.name} overlaps what is before it")
            end = int(tensor.data_offset) + int(tensor.n_bytes)
        config = {name: value for name, field in reader.fields.items() if (value := _value(field)) is not None}
        data = mapped_bytes(file).numpy()  # for which no memory is set aside, as for a map that can be written to
        root = {
            str(tensor.name): _stored(tensor, data, is_big_endian=reader.endianess == GGUFEndian.BIG)
            for tensor in reader.tensors
        }
    return Contents(root, "GGUF file", config=config)


def _value(field: Any) -> object:
    """Return an entry of the header that is short and of plain data, else None."""
    if field.name.startswith("GGUF.") or not field.data or field.parts[field.data[0]].size > _MAX_ENTRY_VALUES:
        return None
    value: object = field.contents()
    return value


def _stored(tensor: Any, whole: np.ndarray, *, is_big_endian: bool) -> StoredTensor:
    name, start = tensor.tensor_type.name, int(tensor.data_offset)
    data = whole[start : start + int(tensor.n_bytes)].view(tensor.data.dtype).reshape(tensor.data.shape)
    dtype, encoding = DTYPES.get(name, torch.uint8), ""
    shape = tuple(reversed([int(size) for size in tensor.shape]))
    if name not in DTYPES:
        shape, encoding = data.shape, f"GGUF {name}" + (" in big endian" if is_big_endian else "")
    elif dtype == torch.bfloat16:  # which is bytes to numpy
        data = data.view(">u2" if is_big_endian else "<u2")

    def read() -> Tensor:
        return as_tensor(np.asarray(data), dtype)

    return StoredTensor(shape, dtype, read, is_mapped=not is_big_endian, encoding=encoding)
