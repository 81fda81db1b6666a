"""What it would cost to read a pickle, found by going through its operations without making any of its values.

A pickle of some hundred bytes can ask for more than any machine has: tuples of the same tuple twice, forty deep, take
2**40 steps to be hashed or printed, and so it is with text that is encoded again and again, or one number that is
expanded to a tensor of terabytes. What readers do with a value is counted here, as if nothing in it were shared, and
must be in proportion to the file.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Sequence
from itertools import starmap
from math import prod
from mmap import mmap
from typing import Any, BinaryIO

from autoalign.formats.budget import FREE, Budget, TooCostlyError

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
