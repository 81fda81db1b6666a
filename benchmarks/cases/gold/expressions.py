"""The truth of one target tensor, as plain data: a source key, or an operation on source keys.

    "layers.0.weight"                                        the tensor as it is
    {"reshape": X, "shape": [2, 3]}                          without a shape: to that of the target tensor
    {"transpose": X}                                         a matrix
    {"permute": X, "dims": [1, 0, 2]}
    {"cat": [X, Y], "dim": 0}  {"stack": [X, Y], "dim": 0}
    {"chunk": X, "dim": 0, "of": 3, "index": 1}              the second of three parts
    {"split": X, "dim": 0, "start": 8, "length": 4}          a run of slices
    {"take": X, "dim": 0, "indices": [0, 2, 1, 3]}           slices in this order
    {"zeros": X}                                             zeros in the shape of X

X and Y are expressions themselves. Each dim may be left out where it is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Expression = str | Mapping[str, Any]

_OPERATIONS = ("reshape", "transpose", "permute", "cat", "stack", "chunk", "split", "take", "zeros")
_SHOWN_BY_SHAPES = frozenset(_OPERATIONS) - {"take", "zeros"}  # unless they are nested


def operation_of(expression: Expression) -> str:
    """Return the name of the outermost operation, "copy" for a key alone.

    Raises:
        ValueError: It is not exactly one of those that there are.
    """
    if isinstance(expression, str):
        return "copy"
    names = [name for name in _OPERATIONS if name in expression]
    if len(names) != 1:
        raise ValueError(f"{dict(expression)} has {len(names)} operations, not one of: {', '.join(_OPERATIONS)}")
    return names[0]


def operands(expression: Expression) -> Sequence[Expression]:
    """Return what the outermost operation is applied to.

    >>> operands({"cat": ["a", {"zeros": "a"}]})
    ['a', {'zeros': 'a'}]
    """
    if isinstance(expression, str):
        return ()
    operand = expression[operation_of(expression)]
    return operand if isinstance(operand, list) else [operand]


def source_keys(expression: Expression) -> Iterator[str]:
    """Yield the source keys that an expression reads, as often as it does."""
    if isinstance(expression, str):
        yield expression
    for operand in operands(expression):
        yield from source_keys(operand)


def is_layout(expression: Expression) -> bool:
    """True if elements change places in a way that no shape shows."""
    if isinstance(expression, str):
        return False
    return operation_of(expression) not in _SHOWN_BY_SHAPES or not all(isinstance(x, str) for x in operands(expression))


def evaluate(expression: Expression, read: Callable[[str], Tensor], shape: Sequence[int]) -> Tensor:
    """Compute the tensor that an expression stands for.

    Args:
        expression: What is computed.
        read: Returns the source tensor of a key.
        shape: That of the target tensor, for a reshape that names none.

    >>> evaluate({"take": "a", "indices": [1, 0]}, {"a": torch.tensor([5, 7])}.__getitem__, (2,))
    tensor([7, 5])
    """
    if isinstance(expression, str):
        return read(expression)
    inputs = [evaluate(operand, read, shape) for operand in operands(expression)]
    tensor, dim = inputs[0], expression.get("dim", 0)
    match operation_of(expression):
        case "reshape":
            return tensor.reshape(list(expression.get("shape", shape)))
        case "transpose":
            return tensor.t()
        case "permute":
            return tensor.permute(expression["dims"])
        case "cat":
            return torch.cat(inputs, dim)
        case "stack":
            return torch.stack(inputs, dim)
        case "chunk":
            return tensor.chunk(expression["of"], dim)[expression["index"]]
        case "split":
            return tensor.narrow(dim, expression["start"], expression["length"])
        case "take":
            return tensor.index_select(dim, torch.tensor(expression["indices"], device=tensor.device))
        case _:
            return torch.zeros_like(tensor)
