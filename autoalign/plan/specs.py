"""Tensor specs: the name, shape, dtype and ties of a tensor, known without reading its data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape and dtype of one tensor of a state dict."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int | None = None  # equal for keys that share one storage; None where that is unknown
    encoding: str = ""  # the format of bytes that hold other values than their own, such as "GGUF Q4_K"

    @property
    def numel(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def dtype_name(self) -> str:
        """The encoding, or the dtype as people write it, without ``torch.``."""
        return self.encoding or str(self.dtype).removeprefix("torch.")

    @property
    def kind(self) -> str:
        """Shape and dtype, as in ``[2, 3] float32``."""
        return f"{list(self.shape)} {self.dtype_name}"

    def __str__(self) -> str:
        return f"{self.key} {self.kind}"


def specs_of(state_dict: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    """List the specs of a state dict's tensors, in its order.

    Entries that are no tensors (such as ``_extra_state``) are skipped. Keys that view the same memory in the same way,
    as tied parameters do, have an equal ``storage``.

    >>> weight = torch.zeros(2, 3)
    >>> first, second = specs_of({"a": weight, "b": weight.detach()})
    >>> print(first, first.storage == second.storage)
    a [2, 3] float32 True
    """
    return tuple(spec_of(key, tensor) for key, tensor in state_dict.items() if isinstance(tensor, Tensor))


def spec_of(key: str, tensor: Tensor) -> TensorSpec:
    """Describe one tensor."""
    shape = tuple(tensor.shape)
    encoding = f"torch's {str(tensor.dtype).removeprefix('torch.')}" if tensor.is_quantized else ""
    encoding = "torchao" if type(tensor).__module__.startswith("torchao.") else encoding
    return TensorSpec(key, shape, tensor.dtype, _storage_id(tensor, shape), encoding)


def _storage_id(tensor: Tensor, shape: tuple[int, ...]) -> int | None:
    if 0 in shape or tensor.layout != torch.strided:
        return None
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a wrapper subclass without a storage of its own
        return None
    return hash((storage._cdata, tensor.storage_offset(), shape, tensor.stride()))


def packing_of(tensor: Tensor) -> str | None:
    """Name the class of a tensor whose elements are not its values and that no table of schemes has; else None.

    >>> packing_of(torch.zeros(2)) is None
    True
    """
    kind: type[object] = type(tensor)
    if kind.__module__.startswith(("torch.distributed.", "torchao.")):  # plain tensors, or a known scheme
        return None
    packed: object = tensor  # for type checkers, no tensor is of such a class
    if is_traceable_wrapper_subclass(packed) or getattr(packed, "quant_state", None) is not None:
        return kind.__name__  # of torchao, of nested tensors, and of bitsandbytes
    return None


def tied_groups(specs: Iterable[TensorSpec]) -> tuple[tuple[str, ...], ...]:
    """Group the keys that share one storage; keys that share it with no other are skipped."""
    groups: dict[int, list[str]] = {}
    for spec in specs:
        if spec.storage is not None:
            groups.setdefault(spec.storage, []).append(spec.key)
    return tuple(tuple(keys) for keys in groups.values() if len(keys) > 1)
