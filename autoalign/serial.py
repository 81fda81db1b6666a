"""Operations as plain data, for the JSON of alignments and of rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from inspect import isabstract
from typing import Any

from autoalign import adaptations, operations, relative
from autoalign.errors import InputError
from autoalign.operations import Operation

Plain = dict[str, Any]  # of what JSON has: strings, numbers, booleans, lists and further ones

_KINDS: dict[str, type[Operation]] = {
    name: kind
    for module in (operations, adaptations, relative)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and issubclass(kind, Operation) and not isabstract(kind)
}


def to_plain(operation: Operation) -> Plain:
    """Write an operation as plain data.

    >>> from autoalign.operations import Chain, Concatenate, Transpose
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

    Raises:
        InputError: It is no operation that this version knows.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("kind"), str) or data["kind"] not in _KINDS:
        raise InputError(f"{str(data)[:80]!r} is no operation that this version of autoalign knows. Nothing was read.")
    kind = _KINDS[data["kind"]]
    names = {field.name for field in fields(kind)}
    given = {name: _value(value) for name, value in data.items() if name != "kind"}
    try:
        if not given.keys() <= names:
            raise TypeError(f"it has no {', '.join(sorted(given.keys() - names))}")
        return kind(**given)
    except TypeError as error:
        raise InputError(f"The operation {data['kind']} is malformed: {error}. Nothing was read.") from error


def _plain(value: object) -> object:
    if isinstance(value, Operation):
        return to_plain(value)
    return [_plain(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _value(value: object) -> object:
    if isinstance(value, Mapping):
        return from_plain(value)
    return tuple(_value(item) for item in value) if isinstance(value, list) else value
