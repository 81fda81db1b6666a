"""The values of quantised tensors: a row of ``SCHEMES`` for each published format, and the operation that applies it.

All values are computed in float32, in little more memory than they take. No function reads more than its inputs, so
that an operation means the same wherever its tensors come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod

import torch
from torch import Tensor

from autoalign.errors import InputError
from autoalign.plan.operations import Operation, Shape

Inputs = Mapping[str, Tensor]  # by role: "codes", and those of companions, see ``plan.quantised``
Shapes = Mapping[str, Shape]  # the same

OF_CALLS = frozenset({"input", "output", "act", "activation"})  # scales of a layer's inputs or outputs


@dataclass(frozen=True, slots=True)
class Scheme:
    """A published format."""

    values: Callable[[Inputs, Shape], Tensor]  # of this shape
    shape: Callable[[Shapes], Shape | None]  # of the values; None for inputs of shapes that do not belong together
    needs: str  # roles of the companions that it must have
    allows: str = ""  # and of those that it may have

    def takes(self, roles: Sequence[str]) -> bool:
        """True if these are the roles of all that the values are computed from."""
        own = [role for role in roles[1:] if OF_CALLS.isdisjoint(role.split())]
        needs, allows = set(self.needs.split(", ")), set(self.allows.split(", "))
        return len(own) == len(set(own)) and needs <= set(own) <= needs | allows


@dataclass(frozen=True, slots=True)
class Dequantise(Operation):
    """The values of every run of inputs that are one quantised tensor, in float32.

    >>> codes, scale = torch.tensor([[-127, 64]], dtype=torch.int8), torch.tensor([[0.5]])
    >>> Dequantise("INT8 by row", ("codes", "scale")).apply([codes, scale])
    [tensor([[-63.5000,  32.0000]])]
    """

    scheme: str
    roles: tuple[str, ...]  # of the inputs: "codes" first, then those of the companions
    shape: Shape = ()  # of the values, where the shapes of the inputs do not tell

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES or self.roles[:1] != ("codes",) or not SCHEMES[self.scheme].takes(self.roles):
            raise TypeError(f"{self.scheme!r} of {self.roles!r} cannot be dequantised")

    @property
    def arity(self) -> int:
        return len(self.roles)

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        starts = range(0, len(tensors), self.arity)
        return [self._values(tensors[start : start + self.arity]) for start in starts]

    def _values(self, tensors: Sequence[Tensor]) -> Tensor:
        scheme, shapes = SCHEMES[self.scheme], [tuple(tensor.shape) for tensor in tensors]
        known = len(shapes) == self.arity
        shape = self.shape or (scheme.shape(dict(zip(self.roles, shapes, strict=True))) if known else None)
        if shape is None:
            listed = ", ".join(str(list(own)) for own in shapes)
            raise InputError(f"'{self}' does not fit tensors of shapes {listed}. Nothing was converted.")
        if tensors[0].is_meta:
            return torch.empty(shape, dtype=torch.float32, device="meta")
        return scheme.values(dict(zip(self.roles, tensors, strict=True)), shape)

    def __str__(self) -> str:
        return f"dequantise({self.scheme})"


def result_dtype(operation: Operation, dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the dtype of what an operation makes of inputs of some dtypes."""
    return torch.float32 if is_dequantised(operation) else reduce(torch.promote_types, dtypes)


def is_dequantised(operation: Operation) -> bool:
    """True if an operation takes quantised tensors for their values."""
    return isinstance(operation, Dequantise) or any(map(is_dequantised, operation.parts))


# Codes of the shape of the values, with scales for all, for each row or for blocks


def block_size(size: int, count: int) -> int | None:
    """Return the size of blocks of which so many make up a dimension; the last may be shorter.

    Blocks are as long as a power of two, or else all of one length.

    >>> block_size(192, 2), block_size(512, 4), block_size(120, 40), block_size(7, 3)
    (128, 128, 3, None)
    """
    if count == 1:
        return size
    power = 1 << max((-(-size // count) - 1).bit_length(), 0) if count else 0
    if power and -(-size // power) == count:
        return power
    return None if not count or size % count else size // count


def _blocks(codes: Shape, scale: Shape) -> list[int] | None:
    """Return the size of the blocks that a scale has values for, in each dimension; None if the shapes do not fit."""
    if prod(scale) == 1:
        return list(codes)
    counts = (*scale, *[1] * (len(codes) - len(scale)))
    found = []
    for size, count in zip(codes, counts, strict=False):
        block = block_size(size, count)
        if block is None or (len(scale) != len(codes) and 1 < count < size):
            return None
        found.append(block)
    inner = {block for block, size, count in zip(found, codes, counts, strict=False) if 1 < count < size}
    return found if len(counts) == len(codes) and len(inner) < 2 else None  # blocks are square


def _same_shape(shapes: Shapes) -> Shape | None:
    fits = all(_blocks(shapes["codes"], shapes[role]) is not None for role in ("scale", "zero") if role in shapes)
    return shapes["codes"] if fits else None


def _scaled(inputs: Inputs, shape: Shape) -> Tensor:
    """Return (codes - zero point) * scale."""
    values = inputs["codes"].to(torch.float32)
    if "zero" in inputs:
        _in_blocks(values, inputs["zero"].to(torch.float32), Tensor.sub_)
    scale = inputs["scale"]
    powers = scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale
    _in_blocks(values, powers.to(torch.float32), Tensor.mul_)
    return values.reshape(shape)


def _in_blocks(values: Tensor, own: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Change values in place by one number for each block of them."""
    blocks = _blocks(tuple(values.shape), tuple(own.shape))
    assert blocks is not None
    own = own.reshape(*own.shape, *[1] * (values.dim() - own.dim())) if own.numel() > 1 else own.reshape(())
    split = [dim for dim in range(own.dim()) if 1 < own.shape[dim] < values.shape[dim]]
    for dim in split[1:]:
        own = own.repeat_interleave(blocks[dim], dim).narrow(dim, 0, values.shape[dim])
    if not split:
        change(values, own)
        return
    parts = torch.split(values, blocks[split[0]], split[0])
    for part, number in zip(parts, torch.split(own, 1, split[0]), strict=True):
        change(part, number)


def _int8_of_bitsandbytes(inputs: Inputs, shape: Shape) -> Tensor:
    """Return what LLM.int8 stores by rows: codes times the largest value of each row / 127."""
    layout = inputs.get("format")
    if layout is not None and layout.numel() and int(layout.reshape(-1)[0]) != 0:
        raise InputError(
            "weight_format is not 0: these int8 codes are in an order of some GPU. Nothing was dequantised. Save the "
            "model again with a current bitsandbytes."
        )
    scale = inputs["scale"].to(torch.float32).reshape(-1, 1)
    return inputs["codes"].to(torch.float32).mul_(scale).mul_(1 / 127).reshape(shape)


def _rows(shapes: Shapes) -> Shape | None:
    codes, scale = shapes["codes"], shapes["scale"]
    return codes if len(codes) == 2 and scale in ((codes[0],), (codes[0], 1)) else None


_PLAIN = Scheme(_scaled, _same_shape, needs="scale")
_WITH_ZEROS = Scheme(_scaled, _same_shape, needs="scale", allows="zero")
SCHEMES: dict[str, Scheme] = {
    "FP8 by tensor": _PLAIN,
    "FP8 by row": _PLAIN,
    "FP8 in blocks": _PLAIN,
    "MXFP8": _PLAIN,
    "INT8 by tensor": _WITH_ZEROS,
    "INT8 by row": _WITH_ZEROS,
    "INT8 in blocks": _WITH_ZEROS,
    "LLM.int8": Scheme(_int8_of_bitsandbytes, _rows, needs="scale", allows="format"),
}
