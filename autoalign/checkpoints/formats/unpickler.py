"""Pickles that may be hostile: what reading one would cost, and an unpickler that reaches only an allow list.

Three formats are pickles: files of ``torch.save``, TorchScript archives and the metadata of distributed checkpoints.
Of the last an outline is all that is needed.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import sys
from collections.abc import Callable, Sequence
from math import prod
from mmap import mmap
from typing import Any, BinaryIO, ClassVar

from autoalign.checkpoints.stored import FREE_STEPS, Budget, TooCostlyError

_MAX_OPERATIONS = 2**22  # of which a tensor takes thirty; torch does a million in a second
_MAX_DEPTH = 2**10  # marks in each other
_MAX_KEY_DEPTH = 64  # tuples in each other in a key
_ITEM_STEPS = 2**4  # for anything but texts and tensors
_ENCODINGS = frozenset({"ascii", "latin1", "latin-1", "utf-8", "utf8"})  # which make no text much longer, in no time
_TENSORS = {  # from names to elements in an element of a storage, of which some hold several
    "torch._utils _rebuild_tensor": 1,
    "torch._utils _rebuild_tensor_v2": 1,
    "torch._utils _rebuild_tensor_v3": 1,
    "torch._utils _rebuild_qtensor": 4,
}
_TEXT, _SEQUENCE = (str, bytes), (tuple, list)  # unions would be made anew for each of a million values
_HASHING = (" set", " frozenset", " Counter", " OrderedDict")  # the ends of names of what hashes items, or their first
_PARAMETERS = frozenset({"torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state"})


def unpickle(
    content: bytes,
    size: int,
    allowed: Callable[[str, str], Any],
    storage: Callable[[Any], Any] | None = None,
    max_operations: int = _MAX_OPERATIONS,
    *,
    is_checked: bool = False,
) -> Any:
    """Read a pickle whose cost is within bounds and that reaches nothing but what an allow list has.

    >>> unpickle(pickle.dumps(Sequence), 30, lambda module, name: f"{module}.{name}")
    'collections.abc.Sequence'

    Args:
        content: The pickle.
        size: Of the whole file, in bytes.
        allowed: From the names of a module and of something in it to what stands for it; it raises for all others.
        storage: From what identifies the data of a tensor, outside the pickle, to what stands for it.
        max_operations: Of the pickle.
        is_checked: It was given to ``check_cost``.

    Raises:
        TooCostlyError: Reading it would take too much time or memory.
        Exception: It is damaged, and may lead anywhere.
    """
    if not is_checked:
        check_cost(io.BytesIO(content), size, max_operations)
    return _RestrictedUnpickler(content, allowed, storage).load()


class _RestrictedUnpickler(pickle._Unpickler):  # in Python, whose memory an index in a pickle cannot exhaust
    stack: list[Any]

    def __init__(
        self, content: bytes, allowed: Callable[[str, str], Any], storage: Callable[[Any], Any] | None
    ) -> None:
        super().__init__(io.BytesIO(content))
        self.allowed, self.storage = allowed, storage
        self.classes: set[type] = set()

    def find_class(self, module: str, name: str) -> Any:
        found = self.allowed(module, name)
        if isinstance(found, type):
            self.classes.add(found)
        return found

    def persistent_load(self, pid: Any) -> Any:
        if self.storage is None:
            raise ValueError("a reference to a storage, where there is none")
        return self.storage(pid)

    def load_build(self) -> None:
        """Set the state of an object that this pickle made; classes and functions are everyone's."""
        built = self.stack[-2]
        if type(built) not in self.classes:
            raise ValueError(f"a state for a {type(built).__name__}, which a pickle does not make")
        super().load_build()  # type: ignore[misc]

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}


def check_cost(
    stream: BinaryIO | mmap, size: int, max_operations: int = _MAX_OPERATIONS, budget: Budget | None = None
) -> object:
    """Go through one pickle, from where a stream is to behind it.

    >>> check_cost(io.BytesIO(pickle.dumps({"a": (1, 2)}, protocol=2)), 30)
    ['a', (1, 2)]

    Args:
        stream: What holds the pickle.
        size: Of the whole file, in bytes.
        max_operations: Of the pickle.
        budget: Of all that is read with it; that of the file alone if it is not given.

    Returns:
        An outline of the value: mappings and what is called are lists, and names stand for themselves.

    Raises:
        TooCostlyError: Reading it would take too much time or memory.
        ValueError: It is not a sound pickle.
    """
    return _CostReader(size, budget or Budget(size)).run(stream, max_operations)


def count_of(value: object, max_steps: int = FREE_STEPS) -> int:
    """Count the steps to go through the outline of a value, to each thing as often as it is reached.

    Raises:
        TooCostlyError: There are more than that.
    """
    found, waiting = _ITEM_STEPS, [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, _TEXT):
            found += len(each)
        elif isinstance(each, _SEQUENCE):
            found += _ITEM_STEPS * len(each) + (each.numel if isinstance(each, Made) else 0)
            waiting += each
        if found > max_steps:
            raise TooCostlyError("it holds values that refer to each other so often that they have no end")
    return found


class Name(str):
    """A function or class: the names of its module and its own."""

    __slots__ = ()


class _Items(list):  # type: ignore[type-arg]
    """The items of a set."""

    equal_hashes: dict[int, int] | None = None  # from hashes of keys that are not text to how many have it


class Pairs(_Items):
    """A mapping: keys and values in turn."""


class Made(_Items):
    """What a function or class gave, with what was put into it later."""

    name = ""  # of the module and of the function or class
    numel = 0  # of a tensor


class _Storage:
    __slots__ = ("numel",)

    def __init__(self, numel: int) -> None:
        self.numel = numel


def _frozen(key: object, depth: int = 0) -> object:
    """Return a key whose hash is as that of what an outline stands for: equal if those of its parts are."""
    if isinstance(key, tuple | _Items):
        if depth > _MAX_KEY_DEPTH:
            raise TypeError("it is too deep")
        return tuple(_frozen(item, depth + 1) for item in key)
    return key


class _CostReader:
    """A reader of pickles that makes an outline of the value alone, and charges what a reader of it would do."""

    def __init__(self, size: int, budget: Budget) -> None:
        self.size = size
        self.budget = budget
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # stacks, below a mark each
        self.memo: dict[int, Any] = {}
        self.storages: dict[str | bytes | int, int] = {}  # from names to elements
        self.numel = 0  # of all storages

    def run(self, stream: BinaryIO | mmap, max_operations: int) -> object:
        read, find = stream.read, _OPERATIONS.get
        for _ in range(max_operations + 1):
            code = read(1)
            if code == pickle.STOP:
                return self.stack.pop()
            operation = find(code)
            if operation is None:
                raise ValueError(f"unsupported operation {code!r}" if code else "it has no end")
            operation(self, stream)
        raise TooCostlyError(f"it has more than {max_operations:,} operations")

    def walk(self, value: object) -> None:
        self.budget.charge(count_of(value, self.budget.left))

    def hash_keys(self, keys: Sequence[Any], owner: _Items) -> None:
        """Charge what a mapping or set takes to hash its keys, and to tell them from others of equal hashes."""
        for key in keys:
            if type(key) is tuple or isinstance(key, Made):
                self.walk(key)
            if not isinstance(key, _TEXT):  # whose hashes nobody can foresee
                try:
                    value = hash(_frozen(key))
                except TypeError:  # of what has no hash as an outline, and may stand for any
                    value = 0
                counts = owner.equal_hashes = owner.equal_hashes or {}
                counts[value] = counts.get(value, 0) + 1
                self.budget.charge(counts[value])

    def mark(self) -> None:
        if len(self.outer) > _MAX_DEPTH:
            raise TooCostlyError(f"it has more than {_MAX_DEPTH:,} values in each other")
        self.outer.append(self.stack)
        self.stack = []

    def marked(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def collect(self, make: Callable[[list[Any]], Any]) -> None:
        items = self.marked()
        self.stack.append(make(items))

    def replace(self, count: int, make: Callable[[list[Any]], Any] = tuple) -> None:
        if len(self.stack) < count:
            raise ValueError("an operation without its values")
        self.stack[-count:] = [make(self.stack[-count:])]

    def extend(self, items: Sequence[Any], step: int | None = None) -> None:
        """Add items to a list, or to a mapping or set, in which every ``step``-th is a key."""
        target = self.stack[-1]
        if step and isinstance(target, _Items):
            self.hash_keys(items[::step], target)
        elif step or not isinstance(target, list):
            raise ValueError(f"items for a {type(target).__name__}")
        target.extend(items)

    def frozen(self, items: Sequence[Any]) -> tuple[Any, ...]:
        self.hash_keys(items, _Items())
        return tuple(items)

    def mapping(self, items: Sequence[Any]) -> Pairs:
        made = Pairs(items)
        self.hash_keys(made[::2], made)
        return made

    def stored(self, identity: Any) -> object:
        """Count a storage, by what a reader is told of it."""
        self.walk(identity)
        if isinstance(identity, tuple) and identity[:1] == ("module",) and len(identity) > 1:  # with its source code
            return identity[1]
        if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] not in ("storage", b"storage"):
            raise ValueError("a reference to something that is not a storage")
        key, numel = identity[2], identity[4]
        if not isinstance(key, str | bytes | int) or type(numel) is not int or numel < 0:
            raise ValueError("a storage without a name and a size")
        if isinstance(key, int) and abs(key) >= sys.hash_info.modulus:  # beyond which many have one hash
            raise ValueError("a storage whose name is too large a number")
        if key not in self.storages:  # else it is as large as it was announced first
            self.storages[key] = numel
            self.numel += numel
        if self.numel > 8 * self.size:  # of which some have fewer bits than a byte
            raise TooCostlyError(f"it announces {self.numel:,} elements in a file of {self.size:,} bytes")
        return _Storage(self.storages[key])

    def reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.called(self.stack[-1], arguments)

    def called(self, function: Any, arguments: Any) -> object:
        """Count what a function does, by its arguments."""
        if not isinstance(function, Name) or not isinstance(arguments, _SEQUENCE):
            raise ValueError("a call of something that is not a function")
        made = Made()
        made.name = function
        if not arguments:
            return made
        if function == "torch Size":  # whose hash is that of its numbers
            self.walk(arguments)
            made.extend(arguments)
            return made
        if function in _TENSORS:
            return self.tensor(*arguments[:4], packed=_TENSORS[function])
        if function in _PARAMETERS and arguments and isinstance(arguments[0], Made):
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
        for argument in arguments if function.endswith(_HASHING) else ():
            if isinstance(argument, _SEQUENCE):
                self.hash_keys(argument, _Items())
                self.hash_keys([each[0] for each in argument if isinstance(each, _SEQUENCE) and each], _Items())
        return made

    def tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *, packed: int = 1) -> Made:
        """Make sure that a tensor is within its storage, which a reader may enlarge if it is not."""
        numbers = (offset, *shape, *stride)
        if not isinstance(storage, _Storage) or len(shape) != len(stride) or len(shape) > 64:
            raise ValueError("a tensor without a storage")
        if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers):
            raise ValueError("a tensor of an impossible shape")
        needed = span(offset, shape, stride)
        if needed > packed * storage.numel:
            raise ValueError(f"a tensor of {needed:,} elements in a storage of {storage.numel:,}")
        made = Made()
        made.numel = prod(shape)
        return made

    def build(self) -> None:
        state, built = self.stack.pop(), self.stack[-1]
        if isinstance(state, tuple) and state and isinstance(state[0], _Storage):  # of the oldest files
            made = self.tensor(*state[:4])
            if isinstance(built, Made):
                built.numel = made.numel
        elif isinstance(built, Made) and isinstance(state, _SEQUENCE):
            built.append(state)  # which may count where it is hashed
            if not isinstance(state, Pairs):
                self.walk(state)

    def named(self, parts: list[Any]) -> Name:
        if not all(type(part) is str for part in parts):
            raise ValueError("a name that is not text")
        return Name(" ".join(parts))


def span(offset: int, shape: Sequence[int], stride: Sequence[int]) -> int:
    """Count the elements of a storage up to the last one that a view of it has.

    >>> span(1, (2, 3), (4, 1)), span(1, (0, 3), (4, 1))
    (8, 0)
    """
    return offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1 if prod(shape) else 0


_NUMBERS = "INT LONG LONG1 LONG4 FLOAT BINFLOAT"
_TEXTS = "STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE8"
_BYTES = "SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8"
_WITH_VALUE: dict[str, Callable[[_CostReader, Any], object]] = {  # as pickletools reads it
    **dict.fromkeys(f"{_NUMBERS} {_TEXTS} {_BYTES}".split(), lambda reader, value: reader.stack.append(value)),
    **dict.fromkeys(("PROTO", "FRAME"), lambda _reader, _: None),
    "GLOBAL": lambda reader, name: reader.stack.append(Name(name)),
}
_BY_NAME: dict[str, Callable[[_CostReader, Any], object]] = {  # which read what they need of the stream
    **dict.fromkeys(("NONE", "NEWTRUE", "NEWFALSE"), lambda reader, _: reader.stack.append(None)),
    "BININT": lambda reader, stream: reader.stack.append(int.from_bytes(stream.read(4), "little", signed=True)),
    "BININT1": lambda reader, stream: reader.stack.append(stream.read(1)[0]),
    "BININT2": lambda reader, stream: reader.stack.append(int.from_bytes(stream.read(2), "little")),
    "SHORT_BINUNICODE": lambda reader, stream: reader.stack.append(
        str(stream.read(stream.read(1)[0]), "utf-8", "surrogatepass")
    ),
    "BINUNICODE": lambda reader, stream: reader.stack.append(
        str(stream.read(int.from_bytes(stream.read(4), "little")), "utf-8", "surrogatepass")
    ),
    # "PUT" takes numbers of any size, of which many have one hash
    "BINPUT": lambda reader, stream: reader.memo.__setitem__(stream.read(1)[0], reader.stack[-1]),
    "LONG_BINPUT": lambda reader, stream: reader.memo.__setitem__(
        int.from_bytes(stream.read(4), "little"), reader.stack[-1]
    ),
    "BINGET": lambda reader, stream: reader.stack.append(reader.memo[stream.read(1)[0]]),
    "LONG_BINGET": lambda reader, stream: reader.stack.append(reader.memo[int.from_bytes(stream.read(4), "little")]),
    "EMPTY_TUPLE": lambda reader, _: reader.stack.append(()),
    "EMPTY_LIST": lambda reader, _: reader.stack.append([]),
    "EMPTY_DICT": lambda reader, _: reader.stack.append(Pairs()),
    "EMPTY_SET": lambda reader, _: reader.stack.append(_Items()),
    "MARK": lambda reader, _: reader.mark(),
    "POP": lambda reader, _: reader.stack.pop() if reader.stack else reader.marked(),
    "POP_MARK": lambda reader, _: reader.marked(),
    "DUP": lambda reader, _: reader.stack.append(reader.stack[-1]),
    "MEMOIZE": lambda reader, _: reader.memo.__setitem__(len(reader.memo), reader.stack[-1]),
    "TUPLE": lambda reader, _: reader.collect(tuple),
    "TUPLE1": lambda reader, _: reader.replace(1),
    "TUPLE2": lambda reader, _: reader.replace(2),
    "TUPLE3": lambda reader, _: reader.replace(3),
    "LIST": lambda reader, _: reader.collect(list),
    "DICT": lambda reader, _: reader.collect(reader.mapping),
    "FROZENSET": lambda reader, _: reader.collect(reader.frozen),
    "APPEND": lambda reader, _: reader.extend([reader.stack.pop()]),
    "APPENDS": lambda reader, _: reader.extend(reader.marked()),
    "SETITEM": lambda reader, _: reader.extend([reader.stack.pop(), reader.stack.pop()][::-1], step=2),
    "SETITEMS": lambda reader, _: reader.extend(reader.marked(), step=2),
    "ADDITEMS": lambda reader, _: reader.extend(reader.marked(), step=1),
    "STACK_GLOBAL": lambda reader, _: reader.replace(2, reader.named),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda reader, _: reader.reduce()),
    "NEWOBJ_EX": lambda reader, _: reader.replace(3, lambda items: reader.called(items[0], (*items[1], items[2]))),
    "BUILD": lambda reader, _: reader.build(),
    "BINPERSID": lambda reader, _: reader.replace(1, lambda items: reader.stored(items[0])),
}


def _operation(each: pickletools.OpcodeInfo) -> Callable[[_CostReader, Any], object]:
    if not each.arg or each.name in _BY_NAME:
        return _BY_NAME[each.name]
    operation, read = _WITH_VALUE[each.name], each.arg.reader
    return lambda reader, stream: operation(reader, read(stream))


_OPERATIONS = {
    each.code.encode("latin-1"): _operation(each)
    for each in pickletools.opcodes
    if each.name in _BY_NAME or each.name in _WITH_VALUE
}
