"""Pickles of torch read without any of their code: tensors and plain data as they are, and stubs for all else.

A stub is made of the name of a class or function alone, takes whatever a pickle calls it with, and does nothing. Whole
modules, whose classes are stubs too, become their parameters and buffers.
"""

from __future__ import annotations

import mmap
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from autoalign.checkpoints.formats.unpickler import check_cost, span, unpickle
from autoalign.checkpoints.stored import TooCostlyError, Value, mapped_bytes, mapped_file, unaligned
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
    "UntypedStorage": torch.uint8,
}
_MAX_PICKLE_BYTES = 2**28  # of a pickle that holds no tensor data
_MAX_NAMES = 2**12  # of classes and functions
_MAX_VALUES = 2**20  # modules, and what is in them
_MAX_DEPTH = 64
_HEADER_BYTES = 30  # of a member of a zip file, before its name
_NUMBER = re.compile(r"[biufc]\d{1,2}")  # dtypes of numpy that hold nothing but numbers
_ARRAY = re.compile(r"numpy\._?core\.multiarray\.(_reconstruct|scalar)")
_MAKERS = ("._rebuild_wrapper_subclass", "._reconstruct", "._reconstructor")  # of what is of their first argument
_PARTS = ("_parameters", "_buffers", "_modules")  # of the state of a module


class Stub:
    """What stands for a value of a class that is not looked up: what a pickle put into it."""

    path = ""  # of the class or function, such as "argparse.Namespace"
    given: tuple[object, ...]
    state: Any
    entries: dict[Any, Any]
    members: list[Any]

    def __new__(cls, *given: object, **_: object) -> Stub:
        self = super().__new__(cls)
        self.given, self.state, self.entries, self.members = given, None, {}, []
        return self

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        self.entries[key] = value

    def append(self, item: object) -> None:
        self.members.append(item)

    add = append

    @property
    def fields(self) -> Mapping[Any, Any]:
        """Its attributes, where the pickle has them under their names."""
        return self.state if isinstance(self.state, dict) else {}


@dataclass(frozen=True, slots=True)
class Storage:
    """The data of one or several tensors, outside the pickle."""

    dtype: torch.dtype
    name: str


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as the pickle describes it, which may not be within its storage."""

    storage: Storage
    dtype: torch.dtype
    offset: int  # in elements, as all of these
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Places:
    """Where the data of storages is in a file.

    Attributes:
        file: The file.
        spans: Of each storage, by name, the first byte and the length.
        data: All of the file, mapped into memory.
        is_copied: Storages that do not begin where numbers may are copied, else what is read of them.
        storages: Of torch, those of tensors that were asked for.
    """

    file: Path
    spans: Mapping[str, tuple[int, int]]
    data: Tensor
    is_copied: bool
    storages: dict[str, torch.UntypedStorage] = field(default_factory=dict)

    @classmethod
    def of(cls, file: Path, spans: Mapping[str, tuple[int, int]], *, is_copied: bool = False) -> Places:
        """Map a file."""
        return cls(file, spans, mapped_bytes(file), is_copied)

    def tensor(self, view: View) -> Value:
        """Return a tensor over the mapped file, or one that is copied when it is read where its data is not aligned.

        Raises:
            ValueError: It is not within its storage.
        """
        if not prod(view.shape):
            return torch.empty(view.shape, dtype=view.dtype, device="cpu")
        size, name = view.dtype.itemsize, view.storage.name
        start, length = self.spans.get(name, (0, 0))
        if span(view.offset, view.shape, view.stride) * size > min(length, len(self.data) - start):
            raise ValueError(f"a tensor {list(view.shape)} is not within its record {name!r}")
        data = self.data[start : start + length]
        if data.storage_offset() % size and not self.is_copied:
            return unaligned(data[view.offset * size :], view.shape, view.stride, view.dtype)
        if name not in self.storages:  # each of its own, so that who saves a tensor does not save the file
            data = data.clone() if data.storage_offset() % size else data
            begin = int(data.storage_offset())
            self.storages[name] = data.untyped_storage()[begin : begin + len(data)]
        return torch.empty(0, dtype=view.dtype, device="cpu").set_(
            self.storages[name], view.offset, view.shape, view.stride
        )


def read_zipped(file: Path, checked: bytes = b"") -> tuple[object, Places]:
    """Unpickle a zip file of torch, whose tensors are views yet; the cost of a pickle that was ``checked`` is known.

    Raises:
        TooCostlyError: Reading it would take too much time or memory.
        Exception: It is damaged, and may lead anywhere.
    """
    size = file.stat().st_size
    with file.open("rb") as stream, zipfile.ZipFile(stream) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickled = next((name for name in members if name.lower().endswith("/data.pkl")), None)
        if pickled is None:
            raise ValueError("no data.pkl")
        folder = pickled[: -len("data.pkl")]
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers have their bytes in the other order")
        if members[pickled].file_size > min(_MAX_PICKLE_BYTES, size):
            raise TooCostlyError(f"a pickle of {members[pickled].file_size} bytes")
        content = archive.read(pickled)
        start = f"{folder}data/"
        spans = {
            name.removeprefix(start): (_data_offset(stream, info.header_offset), info.file_size)
            for name, info in members.items()
            if name.startswith(start) and info.compress_type == zipfile.ZIP_STORED  # code may be compressed
        }
    return unpickle(content, size, finder(), _storage, is_checked=content == checked), Places.of(file, spans)


def _data_offset(stream: BinaryIO, header: int) -> int:
    stream.seek(header)
    lengths = stream.read(_HEADER_BYTES)[26:]  # of the name, and of the extra field
    return header + _HEADER_BYTES + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def read_legacy(file: Path) -> tuple[object, Places]:
    """Do what ``read_zipped`` does for a file from before torch 1.6: five pickles, then the data of each storage."""
    size = file.stat().st_size
    storages: dict[str, Storage] = {}

    def storage(identity: Any) -> Any:
        found = _storage(identity)
        return storages.setdefault(found.name, found) if isinstance(found, Storage) else found

    with mapped_file(file, access=mmap.ACCESS_READ) as data:
        found, before = [], data.tell()
        for _ in range(5):
            start = data.tell()
            check_cost(data, size)
            content = data[start : data.tell()]
            found.append(unpickle(content, size, finder(), storage))
        _, _, system, value, names = found
        if not isinstance(system, dict) or system.get("little_endian") is not True or not isinstance(names, list):
            raise ValueError("it does not begin as files of torch do")
        at, spans = data.tell(), dict[str, tuple[int, int]]()
        for name in names:
            length = int.from_bytes(data[at : at + 8], "little") * storages[str(name)].dtype.itemsize
            spans[str(name)] = at + 8 - before, length
            at += 8 + length
    return value, Places.of(file, spans, is_copied=True)


def _storage(identity: Any) -> Any:
    if identity[0] == "module":  # a class, which older files have with its source code
        return identity[1]
    _, dtype, name, _, _, *rest = identity
    if not isinstance(dtype, torch.dtype) or not isinstance(name, str) or any(rest):
        raise ValueError(f"storage {identity!r}"[:100])
    return Storage(dtype, name)


def _view(storage: Any, offset: int, shape: Any, stride: Any, *rest: object) -> View:
    dtype = next((each for each in rest if isinstance(each, torch.dtype)), storage.dtype)
    shape, stride = tuple(shape), tuple(stride)
    if not isinstance(storage, Storage) or len(shape) != len(stride):
        raise ValueError("a tensor without a storage")
    if any(isinstance(each, dict) and each and type(each) is dict for each in rest):
        raise ValueError("a tensor whose values are to be negated or conjugated")
    if any(type(number) is not int or not 0 <= number < 2**63 for number in (offset, *shape, *stride)):
        raise ValueError(f"a tensor of shape {shape} and stride {stride}")
    return View(storage, dtype, offset, shape, stride)


def _encoded(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"the encoding {encoding}")
    return text.encode("latin1")


_FUNCTIONS: Mapping[str, Callable[..., object]] = {
    "_codecs.encode": _encoded,  # of bytes, in older pickles
    "builtins.set": set,
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": lambda *_: {},
    "torch.Size": tuple,
    "torch._tensor._rebuild_from_type_v2": lambda make, _, given, *__: make(*given),
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_tensor_v3": _view,
}


def finder() -> Callable[[str, str], Any]:
    """Return a function from the names of a module and of something in it to what stands for that."""
    stubs: dict[str, type[Stub]] = {}

    def found(module: str, name: str) -> Any:
        path = f"{module}.{name}".replace("__builtin__.", "builtins.", 1)
        if path in _FUNCTIONS:
            return _FUNCTIONS[path]
        if module in ("torch", "torch.storage"):
            dtype = _STORAGES.get(name, vars(torch).get(name))  # without torch's own look-up, which may import
            if isinstance(dtype, torch.dtype):
                return dtype
        if path not in stubs:
            if len(stubs) >= _MAX_NAMES:
                raise TooCostlyError(f"it names more than {_MAX_NAMES:,} classes and functions")
            stubs[path] = type("Stub", (Stub,), {"path": path})
        return stubs[path]

    return found


# What is read, without stubs where they hold tensors


def is_module(value: object) -> bool:
    """True if a stub has the state of a module of torch."""
    return isinstance(value, Stub) and all(isinstance(value.fields.get(part), dict) for part in _PARTS)


def module_tensors(module: Stub, is_inner: Callable[[object], bool]) -> Iterator[tuple[str, View]]:
    """Yield the tensors of a module and of those in it, depth first as ``state_dict`` does.

    Args:
        module: A stub of torch's modules, or of one whose attributes are its parameters, as TorchScript has them.
        is_inner: Whether a value in it is a module too.

    Raises:
        CheckpointError: A module has a state of its own making.
        ValueError: There are too many.
    """
    waiting: list[tuple[str, object]] = [("", module)]
    for _ in range(_MAX_VALUES):
        if not waiting:
            return
        path, value = waiting.pop()
        if isinstance(value, View):
            yield path, value
        elif isinstance(value, Stub) and is_inner(value):
            if not isinstance(value.state, dict | None):
                raise CheckpointError(
                    f"The module {path!r} has a state that only its code can read, as quantised modules have. Nothing "
                    "was read. If you trust its source, load it with its own code and pass its state_dict()."
                )
            fields = value.fields
            if is_module(value):
                passing = fields.get("_non_persistent_buffers_set")
                fields = {name: item for part in _PARTS for name, item in fields[part].items()}
                fields = {name: item for name, item in fields.items() if not (passing and name in passing)}
            items = [(f"{path}.{name}" if path else str(name), item) for name, item in fields.items()]
            waiting += reversed(items)
    raise ValueError(f"more than {_MAX_VALUES} modules, or one that holds itself")


class Reading:
    """The values of a pickle, in which views become tensors and stubs what they hold.

    Attributes:
        ignored: The names of classes and functions with nothing of use in them, and where each stands.
    """

    def __init__(self, places: Places) -> None:
        self.places = places
        self.ignored: list[tuple[str, str]] = []
        self._known: dict[int, object] = {}
        self._tensors: dict[View, Value] = {}

    def value(self, found: object, path: str = "", depth: int = 0) -> object:
        """Return what stands for a value; ``path`` is where it stands."""
        if isinstance(found, View):
            if found not in self._tensors:
                self._tensors[found] = self.places.tensor(found)
            return self._tensors[found]
        if depth > _MAX_DEPTH or not isinstance(found, Stub | type | dict | list | tuple):
            return found
        if id(found) not in self._known:
            self._known[id(found)] = found  # where it holds itself
            self._known[id(found)] = self._made(found, path, depth + 1)
        return self._known[id(found)]

    def _made(self, found: Any, path: str, depth: int) -> object:
        if isinstance(found, Stub) and is_module(found):
            tensors = module_tensors(found, is_module)
            return OrderedDict((key, self.value(view)) for key, view in tensors)
        if isinstance(found, Stub) and (array := _array(found)) is not None:
            return array
        if isinstance(found, Stub):
            found = found.entries or found.members or found
        if isinstance(found, dict):
            made = type(found)(
                (key, self.value(item, f"{path}.{key}".strip("."), depth)) for key, item in found.items()
            )
            if hasattr(found, "_metadata"):
                made.__dict__["_metadata"] = found._metadata
            return made
        if isinstance(found, list | tuple):
            return type(found)(self.value(item, f"{path}.{place}", depth) for place, item in enumerate(found))
        if isinstance(found, Stub) or (isinstance(found, type) and issubclass(found, Stub)):
            kind = next(iter(getattr(found, "given", ())), found)
            is_made_of = found.path.endswith(_MAKERS) and hasattr(kind, "path")
            self.ignored.append((kind.path if is_made_of else found.path, path))
        return found


def _array(stub: Stub) -> object:
    """Return the numbers of a stub of one of numpy's arrays or scalars; None for others."""
    kind = _ARRAY.fullmatch(stub.path)
    if not kind:
        return None
    try:
        if kind[1] == "scalar":
            dtype, data = stub.given
            return np.frombuffer(data, _numpy_dtype(dtype))[0].item()  # type: ignore[call-overload]
        _, shape, dtype, in_columns, data = stub.state
        array = np.frombuffer(data, _numpy_dtype(dtype)).reshape(shape, order="F" if in_columns else "C")
    except (ValueError, TypeError, IndexError):  # of texts or objects, or damaged
        return None
    return array.copy()  # which can be written to


def _numpy_dtype(stub: object) -> np.dtype:
    code = stub.given[0] if isinstance(stub, Stub) and stub.path == "numpy.dtype" and stub.given else ""
    if not isinstance(stub, Stub) or not isinstance(code, str) or not _NUMBER.fullmatch(code):
        raise ValueError("not a dtype of numbers")
    order = stub.state[1] if isinstance(stub.state, tuple) and stub.state[1] in ("<", ">", "|") else "="
    return np.dtype(f"{order}{code}")
