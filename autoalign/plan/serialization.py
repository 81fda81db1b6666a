"""The JSON form of operations, for alignments and rules: every type and number that is read is checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from inspect import isabstract
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from autoalign.errors import InputError
from autoalign.plan.operations import KINDS, Operation

Plain = dict[str, Any]  # what JSON holds: strings, numbers, booleans, lists, and further ones

MAX_INTEGER = 2**63 - 1  # the largest that torch takes
MAX_NUMBER = 1e30  # of a finite number
_MAX_DEPTH = 16  # of operations in each other
_MAX_PLAIN_DEPTH = 3 * _MAX_DEPTH  # of lists and operations in each other
_MAX_SHOWN = 80  # characters of what is malformed
_RANGES = {
    "dim": (-64, 63),  # torch has 64 dimensions at most
    "dims": (-64, MAX_INTEGER),
    "shape": (-1, MAX_INTEGER),  # -1: the rest
    "tokens": (-1, MAX_INTEGER),
    "size": (1, MAX_INTEGER),
    "of": (1, MAX_INTEGER),
    "channels": (1, MAX_INTEGER),
}  # of numbers by the names of fields; all others are not negative


def parsed(text: str | bytes) -> Any:
    """Read JSON, or raise a ValueError; what Python's reader accepts beyond JSON, and what is too deep, is refused."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def to_plain(operation: Operation) -> Plain:
    """Write an operation as plain data.

    >>> from autoalign.plan.operations import Chain, Concatenate, Transpose
    >>> to_plain(Chain((Transpose(), Concatenate(0))))
    {'kind': 'Chain', 'steps': [{'kind': 'Transpose'}, {'kind': 'Concatenate', 'dim': 0}]}
    """
    return {"kind": type(operation).__name__} | {
        field.name: _plain(getattr(operation, field.name)) for field in fields(operation)
    }


def from_plain(data: object) -> Operation:
    """Read an operation from plain data.

    >>> from_plain({"kind": "Reshape", "shape": [2, 3]})
    Reshape(shape=(2, 3))
    """
    try:
        operation = _operation(data, 0)
        check_operation(operation)
    except TypeError as error:
        raise InputError(f"{_short(data)} is not an operation of autoalign: {error}. Nothing was read.") from error
    return operation


def check_operation(operation: object, depth: int = 0) -> None:
    """Raise a TypeError unless an operation is of a known kind, and all its fields of their types and ranges."""
    kind = type(operation)
    if _known(kind.__name__) is not kind:
        raise TypeError(f"{kind.__name__} is not a known kind")
    if depth > _MAX_DEPTH:
        raise TypeError("operations are nested too deeply")
    for name, hint in _hints(kind).items():
        value = getattr(operation, name)
        if not _fits(value, hint, _RANGES.get(name, (0, MAX_INTEGER)), depth):
            raise TypeError(f"{name} of {kind.__name__} cannot be {_short(value)}")


def text(value: object) -> str:
    """Return a string, or raise a TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"{_short(value)} is not a string")
    return value


def items(value: object) -> list[Any]:
    """Return a list, or raise a TypeError."""
    if not isinstance(value, list):
        raise TypeError(f"{_short(value)} is not a list")
    return value


def texts(value: object) -> tuple[str, ...]:
    """Return the strings of a list, or raise a TypeError."""
    return tuple(map(text, items(value)))


def integer(value: object) -> int:
    """Return a whole number that is not negative, or raise a TypeError."""
    if type(value) is not int or not 0 <= value <= MAX_INTEGER:
        raise TypeError(f"{_short(value)} is not a whole number from 0 to {MAX_INTEGER}")
    return value


def number(value: object, low: float = -MAX_NUMBER, high: float = MAX_NUMBER) -> float:
    """Return a finite number in a range, or raise a TypeError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:  # nor is NaN
        raise TypeError(f"{_short(value)} is not a number from {low:g} to {high:g}")
    return float(value)


def _known(name: object) -> type[Operation] | None:
    kind = KINDS.get(name) if isinstance(name, str) else None
    return None if kind is None or isabstract(kind) else kind


def _operation(data: object, depth: int) -> Operation:
    if not isinstance(data, Mapping) or (kind := _known(data.get("kind"))) is None:
        raise TypeError(f"{_short(data)} has no kind that this version knows")
    if depth > _MAX_PLAIN_DEPTH:
        raise TypeError("operations are nested too deeply")
    given = {name: _value(value, depth + 1) for name, value in data.items() if name != "kind"}
    unknown = given.keys() - _hints(kind).keys()
    if unknown:
        raise TypeError(f"{data['kind']} has no {_short(min(unknown))}")
    return kind(**given)


@cache
def _hints(kind: type[Operation]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _fits(value: object, hint: Any, numbers: tuple[int, int], depth: int) -> bool:
    """True if a value is of a type that the fields of operations have, and its numbers are in range."""
    if hint is int or hint is bool:
        return type(value) is hint and (hint is bool or numbers[0] <= value <= numbers[1])
    if hint is float:
        return type(value) is float and abs(value) <= MAX_NUMBER
    if hint is str:
        return type(value) is str
    if hint is Operation:
        check_operation(value, depth + 1)
        return True
    kinds = get_args(hint)
    if get_origin(hint) is UnionType:
        return any(_fits(value, kind, numbers, depth) for kind in kinds)
    if not isinstance(value, tuple):
        return False
    if kinds[1:] == (...,):
        return all(_fits(item, kinds[0], numbers, depth) for item in value)
    return len(value) == len(kinds) and all(_fits(*pair, numbers, depth) for pair in zip(value, kinds, strict=True))


def _plain(value: object) -> object:
    if isinstance(value, Operation):
        return to_plain(value)
    return [_plain(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _value(value: object, depth: int) -> object:
    if isinstance(value, Mapping):
        return _operation(value, depth)
    if not isinstance(value, list):
        return value
    if depth > _MAX_PLAIN_DEPTH:
        raise TypeError("lists are nested too deeply")
    return tuple(_value(item, depth + 1) for item in value)


def _short(value: object) -> str:
    try:
        written = repr(value)
    except (RecursionError, ValueError):  # too deep, or a number of more digits than Python writes
        return f"this {type(value).__name__}"
    return written if len(written) <= _MAX_SHOWN else f"{written[:_MAX_SHOWN]}..."
