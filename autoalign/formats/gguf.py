"""GGUF files, as of llama.cpp: tensors that are not quantised, through the package ``gguf``.

Its shapes are in the order of torch here. Quantised tensors are blocks of packed bytes and are left out, with a note.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoalign.arrays import as_tensor
from autoalign.errors import CheckpointError, DependencyError
from autoalign.stored import Contents, Stored

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
_MOST = 2**23  # values in a header; a vocabulary has some hundred thousand
_LONGEST = 2**10  # values of an entry that is handed on; longer ones are vocabularies


def is_gguf(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is one of GGUF."""
    return head.startswith(b"GGUF")


def open_gguf(file: Path) -> Contents:
    """Read the header of a GGUF file. Its entries, such as ``llama.attention.head_count``, are the configuration.

    Raises:
        CheckpointError: The file is damaged, or has only quantised tensors.
        DependencyError: The package ``gguf`` is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise DependencyError(
            "GGUF files are read through the package gguf, which is not installed. Nothing was read. "
            "Install it with: pip install 'autoalign[formats]'"
        ) from error

    class Reader(GGUFReader):  # type: ignore[misc]
        """One that does not go on for as long as a damaged header may ask for."""

        asked = 0

        def _get(self, *arguments: Any, **options: Any) -> Any:
            self.asked += 1
            if self.asked > _MOST:
                raise ValueError(f"more than {_MOST} values in the header")
            return super()._get(*arguments, **options)

    try:
        reader = Reader(file)
        tensors = sorted(reader.tensors, key=lambda tensor: tensor.data_offset)
        end = int(reader.data_offset)
        for tensor in tensors:
            if tensor.data_offset < end:
                raise ValueError(f"{tensor.name} overlaps what is before it")
            end = int(tensor.data_offset) + int(tensor.n_bytes)
        config = {name: value for name, field in reader.fields.items() if (value := _value(field)) is not None}
        root = {
            str(tensor.name): _stored(tensor, big=reader.byte_order == "S")
            for tensor in reader.tensors
            if tensor.tensor_type.name in _DTYPES
        }
    except Exception as error:  # the reader raises whatever the damaged part of a file led to
        raise CheckpointError(
            f"{str(file)!r} could not be read as a GGUF file ({type(error).__name__}: {error}). "
            "It may be truncated or damaged; compare its size with the original's."
        ) from error
    quantised = Counter(tensor.tensor_type.name for tensor in reader.tensors if tensor.tensor_type.name not in _DTYPES)
    listed = ", ".join(f"{count} of {name}" for name, count in sorted(quantised.items()))
    if quantised and not root:
        raise CheckpointError(
            f"All tensors of {str(file)!r} are quantised ({listed}), which no model of torch takes as they are. "
            "Nothing was read. Use the file of F16, BF16 or F32, or convert it with llama-quantize."
        )
    notes = (
        (f"{quantised.total()} quantised tensors of the file were left out: {listed}. Use its F16, BF16 or F32 form.",)
        if quantised
        else ()
    )
    return Contents(root, "GGUF file", config=config, notes=notes)


def _value(field: Any) -> object:
    """Take over an entry of the header that is short and of plain data."""
    if field.name.startswith("GGUF.") or len(field.data) > _LONGEST:
        return None
    value: object = field.contents()
    return value


def _stored(tensor: Any, *, big: bool) -> Stored:
    dtype = _DTYPES[tensor.tensor_type.name]
    data: np.ndarray = tensor.data  # mapped into memory
    if dtype == torch.bfloat16:  # which is bytes to numpy
        data = data.view(">u2" if big else "<u2")

    def read() -> Tensor:
        return as_tensor(np.asarray(data), dtype)

    return Stored(tuple(reversed([int(size) for size in tensor.shape])), dtype, read)
