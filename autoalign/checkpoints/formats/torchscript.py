"""TorchScript archives: the tensors of a program that was saved along with its code, none of which is run.

The archive holds a pickle of its modules, of classes that only its own code defines. Here each of them becomes a plain
record of what was saved for it, and its tensors are the state dict.
"""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoalign.checkpoints.formats.unpickler import span, unpickle
from autoalign.checkpoints.stored import Contents, StoredTensor, TooCostlyError, reading
from autoalign.errors import CheckpointError

_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
_MAX_PICKLE_BYTES = 2**28  # of a pickle that holds no tensor data
_MAX_VALUES = 2**20  # modules, and what is in them
_KIND = "a TorchScript archive"


def is_torchscript(names: Sequence[str]) -> bool:
    """Return True if torch would take a zip file with these members for a TorchScript archive."""
    return any(name.lower().endswith("/constants.pkl") for name in names)  # torch finds records in any case


def open_torchscript(file: Path) -> Contents:
    """Read which tensors the modules of a TorchScript archive hold, without running or compiling its code.

    Raises:
        CheckpointError: The archive is damaged, or holds modules with a state of their own making, as quantised ones.
    """

    @cache
    def opened() -> zipfile.ZipFile:
        return zipfile.ZipFile(file)

    with reading(file, _KIND):
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
            pickled = next((name for name in members if name.lower().endswith("/data.pkl")), None)
            if pickled is None:
                raise ValueError("no data.pkl")
            size, limit = members[pickled].file_size, min(_MAX_PICKLE_BYTES, file.stat().st_size)
            if size > limit:
                raise TooCostlyError(f"a pickle of {size} bytes, of {limit} at most")
            content = archive.read(pickled)
        module = unpickle(content, file.stat().st_size, _stand_in, _storage)
        if not isinstance(module, _Module):
            raise ValueError(f"there is a {type(module).__name__} where a module should be")
        folder = pickled[: -len("data.pkl")] + "data/"
        # code may be compressed, and tensors are not
        sizes = {name: info.file_size for name, info in members.items() if info.compress_type == zipfile.ZIP_STORED}
        root = {
            key: _stored(key, view, file, opened, f"{folder}{view.storage.name}", sizes) for key, view in _views(module)
        }
    return Contents(root, "TorchScript archive")


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: torch.dtype
    name: str  # of its record


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor, known to be within what its storage announces."""

    storage: _Storage
    offset: int  # in elements, as all of these
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Unused:
    """What is of no concern, such as the value of a function that is not called."""

    state: object = None

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Module(_Unused):
    """Anything of a class of the archive's own: what was saved for it."""


def _stand_in(module: str, name: str) -> Any:
    """Return what stands for a name; no code of the archive or of any other origin is reached."""
    if module == "__torch__" or module.startswith("__torch__."):
        return _Module
    if module == "torch" and name in _STORAGES:
        return _STORAGES[name]
    return _STAND_INS.get((module, name), _Unused)


def _view(storage: object, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: object) -> _View:
    if not isinstance(storage, _Storage) or len(shape) != len(stride):
        raise ValueError("a tensor without a storage")
    if any(type(number) is not int or not 0 <= number < 2**63 for number in (offset, *shape, *stride)):
        raise ValueError(f"a tensor of shape {shape} and stride {stride}")
    return _View(storage, offset, shape, stride)


_STAND_INS: Mapping[tuple[str, str], Callable[..., object]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _view,
    ("collections", "OrderedDict"): OrderedDict,
}


def _storage(identity: Any) -> _Storage:
    _, dtype, name, *_ = identity
    if not isinstance(dtype, torch.dtype) or not isinstance(name, str):
        raise ValueError(f"storage {identity}")
    return _Storage(dtype, name)


def _views(module: _Module) -> Iterator[tuple[str, _View]]:
    """Yield the tensors of a module and of those in it, depth first as ``state_dict`` does."""
    waiting: list[tuple[str, object]] = [("", module)]
    for _ in range(_MAX_VALUES):
        if not waiting:
            return
        path, value = waiting.pop()
        if isinstance(value, _View):
            yield path, value
        elif isinstance(value, _Module):
            if not isinstance(value.state, dict | None):
                raise CheckpointError(
                    f"The module {path!r} of the TorchScript archive has a state that only its code can read, as "
                    "quantised modules have. Nothing was read. If you trust its source, pass "
                    "torch.jit.load(path).state_dict()."
                )
            items = [(f"{path}.{name}" if path else str(name), item) for name, item in (value.state or {}).items()]
            waiting += reversed(items)
    raise ValueError(f"more than {_MAX_VALUES} modules, or one that holds itself")


def _stored(
    key: str,
    view: _View,
    file: Path,
    opened: Callable[[], zipfile.ZipFile],
    record: str,
    sizes: Mapping[str, int],
) -> StoredTensor:
    dtype, numel = view.storage.dtype, prod(view.shape)
    needed = max(span(view.offset, view.shape, view.stride), numel) * dtype.itemsize
    if record not in sizes or needed > sizes[record]:
        raise ValueError(f"{key} {list(view.shape)} is not within its record {record!r}")

    def read() -> Tensor:
        with reading(file, _KIND):
            data = bytearray(opened().read(record))
            if not numel:
                return torch.empty(view.shape, dtype=dtype, device="cpu")
            tensor = torch.frombuffer(data, dtype=dtype).as_strided(view.shape, view.stride, view.offset)
            return tensor if tensor.nbytes == len(data) else tensor.clone()  # which keeps no more than its own values

    return StoredTensor(view.shape, dtype, read)
