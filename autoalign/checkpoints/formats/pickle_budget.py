"""What reading may cost: time and memory in proportion to the size of a checkpoint, counted over all that reads it."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Callable, Sequence
from itertools import starmap
from math import prod
from mmap import mmap
from pathlib import Path
from typing import IO, Any, BinaryIO

FREE = 2**23  # steps, whatever the size; a step is a byte, a character of text or an element of a tensor
FOR_EACH_BYTE = 4  # steps more
MEMBERS = 2**18  # of a file: tensors, arrays, records

_END, _END_64, _PLACE_64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"  # how the records at the end of a zip file begin
_TAIL = 56 + 20 + 22  # bytes of the three of them
_SIZES_64 = 1  # the kind of a member's extra field that holds sizes beyond 32 bits


class TooCostlyError(ValueError):
    """A file asks for more than one of its size has reason to."""


class Budget:
    """The steps that are left for reading a checkpoint.

    Attributes:
        most: Those that there were.
        left: Those that are left.
    """

    __slots__ = ("left", "most")

    def __init__(self, size: int) -> None:
        self.most = self.left = FREE + FOR_EACH_BYTE * size

    def charge(self, steps: int) -> None:
        """Take steps.

        Raises:
            TooCostlyError: There are not as many left.
        """
        self.left -= steps
        if self.left < 0:
            raise TooCostlyError(f"reading it would take more than {self.most:,} steps")


def members_of(file: Path | IO[bytes], size: int) -> list[zipfile.ZipInfo]:
    """List the members of a zip file in which all readers see the same ones.

    Readers differ in where they look for the directory. Where it is not the one thing before the end, a file may
    hold a harmless one for the reader that checks it and another for the reader that unpacks it.

    Raises:
        TooCostlyError: It has too many.
        ValueError: It does not end as the files of torch do, or is damaged in other ways.
    """
    if isinstance(file, Path):
        with file.open("rb") as stream:
            return members_of(stream, size)
    file.seek(max(size - _TAIL, 0))
    count = _directory(file.read(_TAIL), size)
    if count is None:
        raise ValueError("it may be read as two different zip files")
    if count > MEMBERS:
        raise TooCostlyError(f"it has {count:,} members, of {MEMBERS:,} at most")
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from error
    if len(members) != count or any(_has_two_sizes(info.extra) for info in members):
        raise ValueError("it may be read as two different zip files")
    return members


def check_archive(file: Path | IO[bytes], size: int) -> int:
    """Make sure that what is in a zip file takes no more than the file.

    Returns:
        The largest size of a ``data.pkl``, in whatever case.

    Raises:
        TooCostlyError: It would take more.
        ValueError: As ``members_of``.
    """
    members = members_of(file, size)
    total = sum(info.file_size for info in members)
    if total > size:
        raise TooCostlyError(f"it is a compressed zip file, as torch writes none, of {total} bytes when unpacked")
    return max((info.file_size for info in members if info.filename.lower().endswith("/data.pkl")), default=0)


def _directory(tail: bytes, size: int) -> int | None:
    """Return the number of members in a directory that is followed by nothing but the end; None if it is not so."""
    end, place, large = tail[-22:], tail[-42:-22], tail[-98:-42]
    if not end.startswith(_END) or end[20:] != b"\0\0":  # bytes of a comment
        return None
    if not place.startswith(_PLACE_64):
        count, length, start = (_number(end, at, width) for at, width in ((10, 2), (12, 4), (16, 4)))
        return count if start + length == size - 22 else None
    count, length, start = (_number(large, at, 8) for at in (32, 40, 48))
    is_there = large.startswith(_END_64) and _number(place, 8, 8) == size - 98
    return count if is_there and start + length == size - 98 else None


def _has_two_sizes(extra: bytes) -> bool:
    found = 0
    while len(extra) >= 4:
        kind, length = _number(extra, 0, 2), _number(extra, 2, 2)
        found += kind == _SIZES_64
        extra = extra[4 + length :]
    return found > 1


def _number(data: bytes, at: int, width: int) -> int:
    return int.from_bytes(data[at : at + width], "little")


_MOST = 2**22  # operations, of which a tensor takes thirty; torch does a million in a second
_DEEPEST = 2**10  # marks in each other
_STEP = 2**4  # steps for what is no text and no tensor
_ENCODINGS = frozenset({"ascii", "latin1", "latin-1", "utf-8", "utf8"})  # which make no text much longer, in no time
_TENSORS = {  # from names to elements in an element of a storage, of which some hold several
    "torch._utils _rebuild_tensor": 1,
    "torch._utils _rebuild_tensor_v2": 1,
    "torch._utils _rebuild_tensor_v3": 1,
    "torch._utils _rebuild_qtensor": 4,
}
_PARAMETERS = frozenset({"torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state"})


def check_cost(stream: BinaryIO | mmap, size: int, most: int = _MOST, budget: Budget | None = None) -> object:
    """Go through one pickle, from where a stream is to behind it.

    >>> import io, pickle
    >>> check_cost(io.BytesIO(pickle.dumps({"a": (1, 2)}, protocol=2)), 30)
    ['a', (1, 2)]

    Args:
        stream: What holds the pickle.
        size: Of the whole file, in bytes.
        most: Operations.
        budget: Of all that is read with it; that of the file alone if it is not given.

    Returns:
        An outline of the value: mappings and what is called are lists, and names stand for themselves.

    Raises:
        TooCostlyError: Reading it would take too much time or memory.
        ValueError: It is no sound pickle.
    """
    return _Reading(size, budget or Budget(size)).run(stream, most)


def count_of(value: object, most: int = FREE) -> int:
    """Count the steps to go through the outline of a value, to each thing as often as it is reached.

    Raises:
        TooCostlyError: There are more than that.
    """
    found, waiting = _STEP, [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, tuple | list):
            found += _STEP * len(each) + (each.numel if isinstance(each, _Made) else 0)
        elif isinstance(each, str | bytes):
            found += len(each)
        if found > most:
            raise TooCostlyError("it holds values that refer to each other so often that they have no end")
        if isinstance(each, tuple | list):
            waiting += each
    return found


class _Name(str):
    """A function or class."""

    __slots__ = ()


class _Dict(list):  # type: ignore[type-arg]
    """Keys and values in turn."""

    __slots__ = ()


class _Made(list):  # type: ignore[type-arg]
    """What a function gave, with what was put into it later."""

    __slots__ = ("numel",)

    def __init__(self, numel: int = 0) -> None:
        super().__init__()
        self.numel = numel


class _Storage:
    __slots__ = ("numel",)

    def __init__(self, numel: int) -> None:
        self.numel = numel


class _Reading:
    """The state of a reader of pickles."""

    def __init__(self, size: int, budget: Budget) -> None:
        self.size = size
        self.budget = budget
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # stacks, below a mark each
        self.memo: dict[int, Any] = {}
        self.storages: set[str | bytes | int] = set()
        self.numel = 0  # of all storages

    def run(self, stream: BinaryIO | mmap, most: int) -> object:
        operations: Any = pickletools.genops(stream)  # type: ignore[arg-type]
        for number, (operation, argument, _) in enumerate(operations):
            if number > most:
                raise TooCostlyError(f"it has more than {most:,} operations")
            name = operation.name
            if name in _PUSHED:
                self.stack.append(argument)
            elif name in _PUTS:
                self.memo[argument] = self.stack[-1]
            elif name in _GETS:
                self.stack.append(self.memo[argument])
            elif name in _OPERATIONS:
                _OPERATIONS[name](self, argument)
            elif name == "STOP":
                return self.stack.pop()
            else:
                raise ValueError(f"unsupported operation {name}")
        raise ValueError("it has no end")

    def walk(self, value: object) -> None:
        self.budget.charge(count_of(value, self.budget.left))

    def hashed(self, keys: Sequence[Any]) -> None:
        for key in keys:
            if type(key) is tuple or isinstance(key, _Made):
                self.walk(key)

    def mark(self, _: object) -> None:
        if len(self.outer) > _DEEPEST:
            raise TooCostlyError(f"it has more than {_DEEPEST:,} values in each other")
        self.outer.append(self.stack)
        self.stack = []

    def marked(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def replace(self, count: int, make: Callable[[list[Any]], Any] = tuple) -> None:
        if len(self.stack) < count:
            raise ValueError("an operation without its values")
        self.stack[-count:] = [make(self.stack[-count:])]

    def extend(self, items: Sequence[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise ValueError(f"a {type(target).__name__} that is given items")
        target.extend(items)

    def set_items(self, items: Sequence[Any]) -> None:
        self.hashed(items[::2])
        self.extend(items)

    def add_items(self, items: Sequence[Any]) -> None:
        self.hashed(items)
        self.extend(items)

    def frozen(self, items: Sequence[Any]) -> tuple[Any, ...]:
        self.hashed(items)
        return tuple(items)

    def mapping(self, items: Sequence[Any]) -> _Dict:
        self.hashed(items[::2])
        return _Dict(items)

    def stored(self, identity: Any) -> _Storage:
        """Take a storage, by what a reader is told of it."""
        self.walk(identity)
        if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] not in ("storage", b"storage"):
            raise ValueError("something from elsewhere that is no storage")
        key, numel = identity[2], identity[4]
        if not isinstance(key, str | bytes | int) or type(numel) is not int or numel < 0:
            raise ValueError("a storage without a name and a size")
        self.numel += numel if key not in self.storages else 0
        self.storages.add(key)
        if self.numel > 8 * self.size:  # of which some have fewer bits than a byte
            raise TooCostlyError(f"it announces {self.numel:,} elements in a file of {self.size:,} bytes")
        return _Storage(numel)

    def called(self, function: Any, arguments: Any) -> object:
        """Count what a function does, by its arguments."""
        if not isinstance(function, _Name) or not isinstance(arguments, tuple | list):
            raise ValueError("a call of what is no function")
        if function in _TENSORS:
            return self.tensor(*arguments[:4], packed=_TENSORS[function])
        if function in _PARAMETERS and arguments and isinstance(arguments[0], _Made):
            self.walk(arguments[1:])
            return arguments[0]
        if function == "torch._tensor _rebuild_from_type_v2":
            inner, kind, given, state = arguments
            self.walk((kind, state))
            return self.called(inner, given)
        if function == "_codecs encode" and not any(each in _ENCODINGS for each in arguments[1:2] if type(each) is str):
            raise TooCostlyError("it asks for an encoding that may make text endlessly longer")
        if function.endswith(" bytearray") and arguments and isinstance(arguments[0], int):
            self.budget.charge(max(arguments[0], 0))
        self.walk(arguments)
        return _Made()

    def tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *, packed: int = 1) -> _Made:
        """Make sure that a tensor is within its storage, which a reader may enlarge if it is not."""
        numbers = (offset, *shape, *stride)
        if not isinstance(storage, _Storage) or len(shape) != len(stride) or len(shape) > 64:
            raise ValueError("a tensor without a storage")
        if any(not isinstance(number, int) or not 0 <= number < 2**63 for number in numbers):
            raise ValueError("a tensor of a shape that there is not")
        numel = prod(shape)
        needed = offset + sum(starmap(_distance, zip(shape, stride, strict=True))) + 1 if numel else 0
        if needed > packed * storage.numel:
            raise ValueError(f"a tensor of {needed:,} elements in a storage of {storage.numel:,}")
        return _Made(numel)

    def reduce(self, _: object) -> None:
        self.replace(2, lambda items: self.called(*items))

    def new_with_names(self, _: object) -> None:
        self.replace(3, lambda items: self.called(items[0], (*items[1], items[2])))

    def build(self, _: object) -> None:
        state, built = self.stack.pop(), self.stack[-1]
        if isinstance(state, tuple) and state and isinstance(state[0], _Storage):  # of the oldest files
            made = self.tensor(*state[:4])
            if isinstance(built, _Made):
                built.numel = made.numel
        elif isinstance(built, _Made) and isinstance(state, tuple | list):
            built.append(state)  # which may count where it is hashed
            if not isinstance(state, _Dict):
                self.walk(state)

    def named(self, parts: list[Any]) -> _Name:
        if not all(type(part) is str for part in parts):
            raise ValueError("a name that is no text")
        return _Name(" ".join(parts))


def _distance(size: int, stride: int) -> int:
    return (size - 1) * stride


_PUSHED = frozenset(
    {
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
    }
    | {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
    | {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"}
)
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_OPERATIONS: dict[str, Callable[[_Reading, Any], object]] = {
    "PROTO": lambda _reading, _: None,
    "FRAME": lambda _reading, _: None,
    "MARK": _Reading.mark,
    "POP": lambda reading, _: reading.stack.pop() if reading.stack else reading.marked(),
    "POP_MARK": lambda reading, _: reading.marked(),
    "DUP": lambda reading, _: reading.stack.append(reading.stack[-1]),
    "MEMOIZE": lambda reading, _: reading.memo.__setitem__(len(reading.memo), reading.stack[-1]),
    "EMPTY_TUPLE": lambda reading, _: reading.stack.append(()),
    "EMPTY_LIST": lambda reading, _: reading.stack.append([]),
    "EMPTY_DICT": lambda reading, _: reading.stack.append(_Dict()),
    "EMPTY_SET": lambda reading, _: reading.stack.append([]),
    "TUPLE": lambda reading, _: _push(reading, tuple, reading.marked()),
    "TUPLE1": lambda reading, _: reading.replace(1),
    "TUPLE2": lambda reading, _: reading.replace(2),
    "TUPLE3": lambda reading, _: reading.replace(3),
    "LIST": lambda reading, _: _push(reading, list, reading.marked()),
    "DICT": lambda reading, _: _push(reading, reading.mapping, reading.marked()),
    "FROZENSET": lambda reading, _: _push(reading, reading.frozen, reading.marked()),
    "APPEND": lambda reading, _: reading.extend([reading.stack.pop()]),
    "APPENDS": lambda reading, _: reading.extend(reading.marked()),
    "SETITEM": lambda reading, _: reading.set_items([reading.stack.pop(), reading.stack.pop()][::-1]),
    "SETITEMS": lambda reading, _: reading.set_items(reading.marked()),
    "ADDITEMS": lambda reading, _: reading.add_items(reading.marked()),
    "GLOBAL": lambda reading, name: reading.stack.append(_Name(name)),
    "STACK_GLOBAL": lambda reading, _: reading.replace(2, reading.named),
    "REDUCE": _Reading.reduce,
    "NEWOBJ": _Reading.reduce,
    "NEWOBJ_EX": _Reading.new_with_names,
    "BUILD": _Reading.build,
    "BINPERSID": lambda reading, _: reading.replace(1, lambda items: reading.stored(items[0])),
}


def _push(reading: _Reading, make: Callable[[list[Any]], Any], items: list[Any]) -> None:
    reading.stack.append(make(items))
