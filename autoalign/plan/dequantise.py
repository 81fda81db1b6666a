"""The values of quantised tensors: a row of ``SCHEMES`` for each published format, and the operation that applies it.

All values are computed in float32, in little more memory than they take. No function reads more than its inputs, so
that an operation means the same wherever its tensors come from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from autoalign.errors import CheckpointError, InputError
from autoalign.plan.operations import Operation, Shape

Inputs = Mapping[str, Tensor]  # by role: "codes", and those of companions, see ``plan.quantised``
Shapes = Mapping[str, Shape]  # the same

_VARIANT = re.compile(" (v|of ).*")  # in the names of schemes, whose tensors look alike
GPTQ_FORMS = {"gptq": "GPTQ", "gptq_v2": "GPTQ v2", "gptq_p": "GPTQ v2 in planes"}  # by what a configuration states
AWQ_IN_ORDER = "AWQ of GPTQModel"  # which writes other numbers of bits than four, and says that it did
OF_CALLS = frozenset({"input", "output", "act", "activation"})  # scales of a layer's inputs or outputs


@dataclass(frozen=True, slots=True)
class Scheme:
    """A published format."""

    values: Callable[[Inputs, Shape], Tensor]  # of this shape
    shape: Callable[[Shapes], Shape | None]  # of the values; None for inputs of shapes that do not belong together
    needs: str  # roles of the companions that it must have
    allows: str = ""  # and of those that it may have
    stored: tuple[str, Callable[[Tensor, Shapes], Shape | None]] | None = None  # what tells the shape, and how
    is_sure: bool = True  # no value of the inputs can make it fail
    rows: int | None = 0  # the dimension of the inputs that has the rows of the values; None where there is none
    is_flat: bool = False  # that dimension runs through all rows, without a break between them
    judged: str = ""  # the role of an input of which all counts for a part of the values too

    def takes(self, roles: Sequence[str]) -> bool:
        """True if these are the roles of all that the values are computed from."""
        own = [role for role in roles[1:] if OF_CALLS.isdisjoint(role.split())]
        needs, allows = set(filter(None, self.needs.split(", "))), set(self.allows.split(", "))
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
        shapes = [tuple(tensor.shape) for tensor in tensors]
        fits = len(shapes) == self.arity
        shape = (self.shape or SCHEMES[self.scheme].shape(dict(zip(self.roles, shapes, strict=True)))) if fits else None
        if shape is None:
            listed = ", ".join(str(list(own)) for own in shapes)
            raise InputError(f"'{self}' does not fit tensors of shapes {listed}. Nothing was converted.")
        return self.values(dict(zip(self.roles, tensors, strict=True)), shape)

    def values(self, inputs: Inputs, shape: Shape) -> Tensor:
        """Return the values of one quantised tensor, or of some rows of it."""
        if inputs["codes"].is_meta:
            return torch.empty(shape, dtype=torch.float32, device="meta")
        try:
            return SCHEMES[self.scheme].values(inputs, shape)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"'{self}' of a tensor of shape {list(shape)} failed: {error}. Nothing was converted. Its scales, zero "
                "points or indices are not those of its codes; compare the file with the original."
            ) from error

    def __str__(self) -> str:
        return f"dequantise({self.scheme})"


def schemes_of(operation: Operation) -> frozenset[str]:
    """List the schemes of the quantised tensors that an operation takes for their values, without their versions."""
    own = {_VARIANT.sub("", operation.scheme)} if isinstance(operation, Dequantise) else set()
    return frozenset(own).union(*map(schemes_of, operation.parts))


def is_sure(operation: Operation) -> bool:
    """True if an operation dequantises, by schemes of which no value can make it fail."""
    names = schemes_of(operation)
    return bool(names) and not operation.adapts and all(SCHEMES[name].is_sure for name in names)


def is_dequantised(operation: Operation) -> bool:
    """True if an operation takes quantised tensors for their values."""
    return bool(schemes_of(operation))


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
    of = (shapes[role] for role in ("scale", "zero") if role in shapes)
    return None if None in (_blocks(shapes["codes"], shape) for shape in of) else shapes["codes"]


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
        raise ValueError("weight_format is not 0, so that the codes are in an order of some GPU")
    scale = inputs["scale"].to(torch.float32).reshape(-1, 1)
    return inputs["codes"].to(torch.float32).mul_(scale).mul_(1 / 127).reshape(shape)


def _rows(shapes: Shapes) -> Shape | None:
    codes, scale = shapes["codes"], shapes["scale"]
    return codes if len(codes) == 2 and scale in ((codes[0],), (codes[0], 1)) else None


def _spread(codes: Tensor, bits: int, table: Tensor | None = None, *, highest_first: bool = False) -> Tensor:
    """Return the numbers that are packed in the last dimension, the lowest bits first, in float32.

    Args:
        codes: Of any integers; a number may reach from one into the next.
        bits: Of each number.
        table: From numbers to values; by default themselves.
        highest_first: In each byte, instead.
    """
    codes = codes.contiguous().view(torch.uint8)
    if table is None:
        table = torch.arange(1 << bits, dtype=torch.float32, device=codes.device)
    step = bits if 8 % bits else 1  # bytes that hold whole numbers
    count = 8 * step // bits
    shifts = torch.arange(0, 8 * step, bits, device=codes.device)
    shifts = shifts.flip(0) if highest_first else shifts
    if step == 1:
        whole = (torch.arange(256, device=codes.device)[:, None] >> shifts) & ((1 << bits) - 1)
        by_byte = table[whole]  # all numbers of a byte at once
    source = codes.reshape(-1, step)
    result = torch.empty(len(source), count, dtype=torch.float32, device=codes.device)
    powers = 256 ** torch.arange(step, device=codes.device)
    for into, part in _by_rows(result, source):
        if step == 1:
            torch.index_select(by_byte, 0, part[:, 0].int(), out=into)
        else:
            numbers = (part.long() * powers).sum(1, keepdim=True)
            into.copy_(table[(numbers >> shifts) & ((1 << bits) - 1)])
    return result.reshape(*codes.shape[:-1], codes.shape[-1] * 8 // bits)


def _bits(codes: Shape, values: Shape) -> int:
    """Return the bits of a number in codes of 32-bit words."""
    return 32 * prod(codes) // prod(values)


def _four_bits_of_bitsandbytes(inputs: Inputs, shape: Shape) -> Tensor:
    """Return what Linear4bit stores: places in a table, times the largest value of each block, which may be codes."""
    state: Any = json.loads(bytes(inputs["layout"].reshape(-1).tolist()))
    scale = inputs["scale"]
    if "scale nested" in inputs:
        largest = inputs["table nested"].to(torch.float32)[scale.long()]
        for part, own in zip(torch.split(largest, state["nested_blocksize"]), inputs["scale nested"], strict=True):
            part.mul_(own)
        scale = largest.add_(state["nested_offset"])
    table = inputs["table"].to(torch.float32)
    values = _spread(inputs["codes"].reshape(-1), 4, table, highest_first=True)[: prod(shape)]
    size = state["blocksize"]
    whole = len(values) // size
    values[: whole * size].view(-1, size).mul_(scale[:whole, None])
    values[whole * size :].mul_(scale[whole:])
    return values.reshape(shape)


def _shape_of_state(tensor: Tensor, shapes: Shapes) -> Shape | None:
    state: Any = json.loads(bytes(tensor.reshape(-1).tolist()))
    shape = tuple(int(size) for size in state["shape"])
    width = -(-prod(shape) // 2) / max(prod(shapes["codes"]), 1)  # of the dtype that the codes are kept in, in bytes
    fits = width in (1, 2, 4) and prod(shapes["scale"]) == -(-prod(shape) // state["blocksize"])
    is_nested = {"nested_blocksize", "nested_offset"} <= state.keys()
    return shape if fits and is_nested == ("scale nested" in shapes) == ("table nested" in shapes) else None


def _gptq(inputs: Inputs, shape: Shape, *, form: str) -> Tensor:
    """Return what GPTQ stores by columns: (codes - zero point) * scale of the group of each input.

    The first version stores zero points less one, which is taken from whole words where numbers fill them: that of 0
    borrows from the next. Where all are the middle of the range, codes are symmetric and this shows the version.
    """
    codes, words = inputs["codes"], inputs["zero"]
    bits = _bits(tuple(codes.shape), shape)
    spread = _planes if form == "gptq_p" or bits in (5, 6, 7) else _spread
    zeros = spread(words, bits)
    every = spread(inputs["every zero"], bits) if "every zero" in inputs else zeros
    if form == "gptq" and spread is _spread and not (every == 2 ** (bits - 1)).all():
        ones = (2**32 - 1) // (2**bits - 1)
        zeros = (zeros + 1) % 2**bits if 32 % bits else spread(words + ones, bits)
    scale = inputs["scale"].T.to(torch.float32)
    return _of_groups(spread(codes.T, bits), zeros.T, scale, inputs.get("index"))


def _of_groups(values: Tensor, zeros: Tensor, scale: Tensor, index: Tensor | None) -> Tensor:
    """Subtract zero points from values and scale them, in place, by the group of each column in their row."""
    if index is None or (index == -1).all():  # groups of columns that follow each other
        index = torch.arange(values.shape[1], device=values.device) // -(-values.shape[1] // scale.shape[1])
    index = index.long()
    for part, zero, own in _by_rows(values, zeros, scale):
        part.sub_(zero[:, index]).mul_(own[:, index])
    return values


def _planes(codes: Tensor, bits: int) -> Tensor:
    """Return numbers of which every 32 are in words for their lowest bits, then in words for those above."""
    words = codes.reshape(len(codes), -1, bits)
    values = torch.zeros(*words.shape[:2], 32, device=codes.device)
    for into, part in _by_rows(values, words):
        done = 0
        for width in (width for width in (8, 4, 2, 1) if bits & width):
            into.add_(_spread(part[..., done : done + width], width).view(into.shape), alpha=2**done)
            done += width
    return values.flatten(1)


def _by_rows(values: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split values and what has as many rows into parts that are worked on at a time."""
    step = max(_CHUNK * len(values) // max(values.numel(), 1), 1)
    return zip(*(torch.split(tensor, step) for tensor in (values, *others)), strict=True)


def _gptq_shape(shapes: Shapes) -> Shape | None:
    codes, scale, zero = shapes["codes"], shapes["scale"], shapes["zero"]
    if not (len(codes) == len(scale) == len(zero) == 2) or (scale[1], zero[0]) != (codes[1], scale[0]):
        return None
    bits = 32 * zero[1] / codes[1]
    columns = 32 * codes[0] / bits if bits else 0
    if bits not in range(2, 9) or columns % 1 or shapes.get("index", (columns,)) != (columns,):
        return None
    return (codes[1], int(columns)) if "index" in shapes or columns % scale[0] == 0 else None


_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where the columns stand in a word of four bits each


def _awq(inputs: Inputs, shape: Shape) -> Tensor:
    """Return what AWQ stores by rows of inputs: (codes - zero point) * scale of the group of each.

    Four bits are in an order of their own; GPTQModel writes others one after another.
    """
    codes, scale = inputs["codes"], inputs["scale"].to(torch.float32)
    bits = _bits(tuple(codes.shape), shape)

    def ordered(codes: Tensor) -> Tensor:
        numbers = _spread(codes, bits)
        return numbers.reshape(len(codes), -1, 8)[..., _AWQ_ORDER].flatten(1) if bits == 4 else numbers

    zeros = ordered(inputs["zero"])
    values = torch.empty(len(codes), scale.shape[1], dtype=torch.float32, device=codes.device)
    size = len(codes) // len(scale)
    for into, part, zero, own in zip(torch.split(values, size), torch.split(codes, size), zeros, scale, strict=True):
        into.copy_(ordered(part)).sub_(zero).mul_(own)
    return values.T


def _awq_shape(shapes: Shapes, *, widths: Sequence[int] = (4,)) -> Shape | None:
    codes, scale = shapes["codes"], shapes["scale"]
    if not len(codes) == len(scale) == 2 or shapes["zero"] != (scale[0], codes[1]) or not scale[0]:
        return None
    fits = any(32 * codes[1] == bits * scale[1] for bits in widths) and codes[0] % scale[0] == 0
    return (scale[1], codes[0]) if fits else None


_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _fp4(inputs: Inputs, shape: Shape) -> Tensor:
    """Return floats of four bits times a scale for each block of 32 (MXFP4) or 16 (NVFP4).

    NVFP4 has one scale more for all of them, by which ModelOpt multiplies and compressed-tensors divides.
    """
    table = torch.tensor(_FP4, device=inputs["codes"].device)
    scale = inputs["scale"]
    blocks = (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).to(torch.float32)
    if "scale 2" in inputs:
        blocks = blocks * inputs["scale 2"].to(torch.float32)
    if "scale global" in inputs:
        blocks = blocks / inputs["scale global"].to(torch.float32)
    values = _spread(inputs["codes"], 4, table)
    return values.view(*scale.shape, -1).mul_(blocks[..., None]).reshape(shape)


def _fp4_shape(shapes: Shapes, *, size: int) -> Shape | None:
    codes, scale = shapes["codes"], shapes["scale"]
    if not scale or sum(role in shapes for role in ("scale 2", "scale global")) != (size == 16):
        return None
    columns = scale[-1] * size
    halves = (*scale[:-1], columns // 2), (*scale, size // 2), (*scale[:-1], columns // 8)  # bytes or words
    return (*scale[:-1], columns) if codes in halves else None


def _mlx(inputs: Inputs, shape: Shape) -> Tensor:
    """Return what MLX stores: codes * scale + bias of each group of inputs."""
    values = _spread(inputs["codes"], _bits(tuple(inputs["codes"].shape), shape))
    groups = values.view(*inputs["scale"].shape, -1)
    groups.mul_(inputs["scale"].to(torch.float32)[..., None]).add_(inputs["zero"].to(torch.float32)[..., None])
    return values


def mlx_shape(shapes: Shapes, group: int) -> Shape | None:
    """Return the shape of the values in groups of some size, which the shapes of the inputs leave open."""
    codes, scale = shapes["codes"], shapes["scale"]
    if not scale or codes[:-1] != scale[:-1] or shapes["zero"] != scale or not scale[-1]:
        return None
    bits = 32 * codes[-1] / (group * scale[-1])
    return (*scale[:-1], scale[-1] * group) if bits in (2, 3, 4, 5, 6, 8) else None


def _packed(inputs: Inputs, shape: Shape) -> Tensor:
    """Return what compressed-tensors packs: (codes - the zero point, or the middle of their range) * scale."""
    codes, scale = inputs["codes"], inputs["scale"].to(torch.float32)
    (bits,) = _bits_of_words(shape[1], codes.shape[1])
    values, zeros = _spread(codes, bits)[:, : shape[1]], torch.full_like(scale, 2 ** (bits - 1))
    if "zero" in inputs:
        zeros = _spread(inputs["zero"].T, bits).T[: len(scale)]
    return _of_groups(values, zeros, scale, inputs.get("index"))


def _bits_of_words(count: int, words: int) -> list[int]:
    """List how many bits each of some numbers may have in so many words, of which the last may not be full."""
    return [bits for bits in (1, 2, 4, 8) if -(-count * bits // 32) == words]


def _packed_shape(tensor: Tensor, shapes: Shapes) -> Shape | None:
    shape = tuple(int(size) for size in tensor.tolist())
    codes, scale = shapes["codes"], shapes["scale"]
    if not len(shape) == len(codes) == len(scale) == 2 or not codes[0] == scale[0] == shape[0] or not scale[1]:
        return None
    bits = _bits_of_words(shape[1], codes[1])
    if len(bits) != 1 or shape[1] % scale[1]:
        return None
    zeros = -(-shape[0] * bits[0] // 32), scale[1]
    fits = shapes.get("zero", zeros) == zeros and shapes.get("index", shape[1:]) == shape[1:]
    return shape if fits else None


def _gguf(inputs: Inputs, shape: Shape, *, name: str) -> Tensor:
    """Return what llama.cpp stores, by the package gguf, which holds twice what it is given at a time."""
    from gguf import GGMLQuantizationType, quants

    codes, values = inputs["codes"].cpu(), torch.empty(shape)
    for into, part in _by_rows(values.view(-1, shape[-1]), codes.reshape(-1, codes.shape[-1])):
        into.copy_(torch.from_numpy(quants.dequantize(part.numpy(), GGMLQuantizationType[name])))
    return values


def _gguf_shape(shapes: Shapes, *, name: str) -> Shape | None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    *rows, count = shapes["codes"] or (1,)
    return (*rows, count // size * block) if count % size == 0 else None


def _of_torch(inputs: Inputs, _: Shape) -> Tensor:
    """Return the values of torch's own quantised tensors, which hold their scales; those beside are of the outputs."""
    return inputs["codes"].dequantize().to(torch.float32)


_GGUF = (
    "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K TQ1_0 TQ2_0 MXFP4 IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ1_S "
    "IQ1_M IQ4_NL IQ4_XS"
)
_CHUNK = 2**18  # numbers that are worked on at a time

_PLAIN = Scheme(_scaled, _same_shape, needs="scale")
_TORCH = Scheme(_of_torch, _same_shape, needs="", allows="scale, zero", rows=None)
_STORED = Scheme(_four_bits_of_bitsandbytes, lambda _: None, needs="scale, table, layout", is_sure=False)
_BITSANDBYTES = replace(_STORED, allows="scale nested, table nested", stored=("layout", _shape_of_state), is_flat=True)
_IN_WORDS = Scheme(_awq, _awq_shape, needs="scale, zero", rows=-1)
_GPTQ = replace(_IN_WORDS, shape=_gptq_shape, allows="index", is_sure=False, judged="zero")
SCHEMES: dict[str, Scheme] = {
    f"GGUF {name}": Scheme(partial(_gguf, name=name), partial(_gguf_shape, name=name), needs="")
    for name in _GGUF.split()
} | {
    "torchao": replace(_TORCH, is_sure=False),
    **dict.fromkeys(("torch's qint8", "torch's quint8", "torch's qint32", "torch's packed bias"), _TORCH),
    **dict.fromkeys(("FP8 by tensor", "FP8 by row", "FP8 in blocks", "MXFP8"), _PLAIN),
    **dict.fromkeys(("INT8 by tensor", "INT8 by row", "INT8 in blocks"), replace(_PLAIN, allows="zero")),
    "LLM.int8": Scheme(_int8_of_bitsandbytes, _rows, needs="scale", allows="format", is_sure=False),
    **dict.fromkeys(("NF4", "FP4"), _BITSANDBYTES),
    **{name: replace(_GPTQ, values=partial(_gptq, form=form)) for form, name in GPTQ_FORMS.items()},
    "AWQ": _IN_WORDS,
    AWQ_IN_ORDER: replace(_IN_WORDS, shape=partial(_awq_shape, widths=(2, 3, 4, 5, 6, 7, 8))),
    "MXFP4": Scheme(_fp4, partial(_fp4_shape, size=32), needs="scale"),
    "NVFP4": Scheme(_fp4, partial(_fp4_shape, size=16), needs="scale", allows="scale 2, scale global"),
    "MLX": Scheme(_mlx, partial(mlx_shape, group=64), needs="scale, zero"),
    "compressed-tensors": replace(
        _STORED, values=_packed, needs="scale, layout", allows="zero, index", stored=("layout", _packed_shape)
    ),
}
