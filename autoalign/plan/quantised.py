"""Quantised tensors: integers or small floats that are values only together with a scale, zero point or table.

No library is recognised by its name: ``groups_of`` finds, from names, shapes and dtypes alone, a tensor of codes with
companions beside it whose names say what they are for and whose shapes fit. ``can_fill`` allows codes to be copied only
where the other side has them in the same scheme.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

from autoalign.plan.keys import common_prefix, split_key
from autoalign.plan.operations import Copy, Operation
from autoalign.plan.specs import TensorSpec

ADVICE = "Load the checkpoint from before it was quantised, or dequantise it first."


def _dtypes(names: str) -> frozenset[torch.dtype]:
    """Look up the dtypes that this version of torch has."""
    return frozenset(dtype for name in names.split() if isinstance(dtype := getattr(torch, name, None), torch.dtype))


_FLOAT8 = _dtypes("float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz")
_POWERS = _dtypes("float8_e8m0fnu uint8")  # scales that are powers of two
_TORCH = _dtypes("qint8 quint8 qint32 quint4x2 quint2x4")  # which hold their scales themselves
_CODES = _dtypes("int8 uint8 int16 uint16 int32 uint32 float4_e2m1fn_x2") | _FLOAT8 | _TORCH
_UNPACKED = _FLOAT8 | {torch.int8}  # of codes that mostly have the shape of what they stand for

# The role of a companion, by the words of its name; of several, the first of this table counts.
_ROLES = {
    "scale": "scale scales wscale wscales wtscale wcscales scaling scb absmax amax",
    "zero": "zero zeros qzeros zp biases shift offset",
    "table": "codebook codebooks lut map centroids palette",
    "layout": "shape format idx perm state bits nbits",
}
_ROLE_OF = {word: role for role, words in _ROLES.items() for word in words.split()}
_OF_CALLS = frozenset({"input", "output", "act", "activation"})  # scales of a layer's inputs or outputs
_QUALIFIERS = _OF_CALLS | {"global", "nested"}
_FILLERS = frozenset({"inv", "inverse", "point", "quant", "factor", "group", "g"})
_PAYLOADS = frozenset(
    {"weight", "weights", "kernel", "embedding", "w", "q", "qweight"}
    | {"packed", "blocks", "codes", "data", "qdata", "values", "indices", "idxs", "quantized"}
)
_PAIR = ("scale", "zero_point")  # of what a layer that torch quantised gives
_MAX_PACKED = 32  # codes in an element

_WORDS = re.compile(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*|\d+")
_NAMED = re.compile(r"bitsandbytes__([a-z0-9]+)$")


@dataclass(frozen=True, slots=True)
class Quantised:
    """A tensor of codes with the companions that its values are computed from."""

    scheme: str  # such as "FP8 in blocks"
    codes: TensorSpec
    companions: tuple[TensorSpec, ...]
    names: str  # of both within their module, such as "weight with weight_scale_inv"
    is_packed: bool  # True if the codes have another shape than the values

    @property
    def kind(self) -> tuple[str, torch.dtype]:
        """What two must have in common for one to be a copy of the other."""
        return self.scheme, self.codes.dtype


@dataclass(frozen=True, slots=True)
class Member:
    """A tensor of such a group."""

    group: Quantised
    spec: TensorSpec
    role: str  # "codes", or that of a companion, such as "scale" or "scale global"

    @property
    def is_needed(self) -> bool:
        """True if the values cannot be computed without it."""
        return " " not in self.role or _OF_CALLS.isdisjoint(self.role.split())


Members = Mapping[str, Member]  # by key


def groups_of(specs: Sequence[TensorSpec]) -> Members:
    """Find the tensors of codes among some tensors, and their companions.

    >>> weight = TensorSpec("fc.weight", (256, 512), torch.float8_e4m3fn)
    >>> found = groups_of([weight, TensorSpec("fc.weight_scale_inv", (2, 4), torch.float32)])
    >>> [(key, member.role, member.group.scheme) for key, member in found.items()]
    [('fc.weight', 'codes', 'FP8 in blocks'), ('fc.weight_scale_inv', 'scale', 'FP8 in blocks')]
    """
    return _groups_of(tuple(specs)) if any(spec.dtype in _CODES for spec in specs) else {}


@lru_cache(maxsize=4)  # an alignment asks again for what its sides have
def _groups_of(specs: tuple[TensorSpec, ...]) -> Members:
    codes = {spec.key: spec for spec in specs if spec.dtype in _CODES and spec.numel > 1}
    modules = {split_key(key)[0] for key in codes}
    outer = {module: split_key(module) for module in modules}
    modules |= {module for module, _ in outer.values()}
    beside: dict[tuple[str, frozenset[str]], list[_Near]] = defaultdict(list)
    inside: dict[str, list[_Near]] = defaultdict(list)
    for spec in specs:
        module, name = split_key(spec.key)
        if module in modules:
            role, stem, _ = _read(name)
            if role:
                beside[module, stem].append((spec, (name, spec.shape, spec.dtype)))
        if module in codes:  # "weight.absmax" belongs to "weight"
            inside[module].append((spec, (name, spec.shape, spec.dtype)))
            continue
        if module not in outer:
            outer[module] = split_key(module)
        above, last = outer[module]
        if above in codes:  # and so does "weight.quant_state.nf4"
            inside[above].append((spec, (f"{last}.{name}", spec.shape, spec.dtype)))
    found: dict[str, Member] = {}
    for key, spec in codes.items():
        module, name = split_key(key)
        role, stem, _ = _read(name)
        if key in found or (role and spec.dtype not in _TORCH):
            continue
        near = [*inside.get(key, ()), *beside.get((module, stem), ())]
        if spec.dtype in _TORCH and not near:  # those of a packed layer's outputs stand beside the layer's module
            around = beside.get((split_key(module)[0], frozenset()), ())
            pair = [(other, what) for other, what in around if what[0] in _PAIR]
            near = pair if len(pair) == len(_PAIR) else []
        read = _judged((name, spec.shape, spec.dtype), tuple(what for _, what in near), len(inside.get(key, ())))
        if read is not None:
            companions = tuple(near[place][0] for place, _ in read.companions)
            group = Quantised(read.scheme, spec, companions, read.names, read.is_packed)
            found[key] = Member(group, spec, "codes")
            for other, (_, role) in zip(companions, read.companions, strict=True):
                found.setdefault(other.key, Member(group, other, role))
    return found


_What = tuple[str, tuple[int, ...], torch.dtype]  # a tensor's name within a module, its shape and dtype
_Near = tuple[TensorSpec, _What]


@dataclass(frozen=True, slots=True)
class _Judgement:
    """A tensor of codes and its companions."""

    scheme: str
    companions: tuple[tuple[int, str], ...]  # places among those near it, and roles
    names: str
    is_packed: bool


@lru_cache(maxsize=4096)
def _judged(codes: _What, near: tuple[_What, ...], inside: int) -> _Judgement | None:
    """Read a tensor of codes with its companions; None if it holds values. Cached, since layers are alike.

    Args:
        codes: The tensor.
        near: Those that may be its companions.
        inside: How many of these, the first, have names that go on where the tensor's ends.
    """
    name, shape, dtype = codes
    _, stem, _ = _read(name)
    is_known, places = dtype in _TORCH, []
    for place, other in enumerate(near):
        role, _, is_named = _read(other[0].rpartition(".")[2])
        if place < inside:
            places.append((place, role or "layout"))
            is_known |= role.startswith(("scale", "table"))
        elif role.startswith("layout") or dtype in _TORCH:
            places.append((place, role))
        elif _fits(role, other[1], shape):
            places.append((place, role))
            is_known |= _is_evidence(codes, other, tied=bool(stem) or is_named)
    if not is_known:
        return None
    companions = [(near[place], role) for place, role in places]
    return _Judgement(
        scheme=_scheme(codes, companions),
        companions=tuple(places),
        names=_names(name, [near[place][0] for place, _ in places], is_shared=bool(stem)),
        is_packed=dtype not in _UNPACKED or any(role.startswith("table") for _, role in places),
    )


def _names(codes: str, companions: Sequence[str], *, is_shared: bool) -> str:
    """Write the names of a group, without their common prefix where that tells one group of a module from another."""
    shared = common_prefix([codes, *companions]).rstrip("_.") if is_shared and companions else ""
    first, *rest = (f"*{name[len(shared) :]}" if shared else name for name in (codes, *companions))
    return f"{first} with {', '.join(rest)}" if rest else first


@lru_cache(maxsize=4096)
def _read(name: str) -> tuple[str, frozenset[str], bool]:
    """Read a tensor's own name: its role ('' if it is no companion), what it is of, and whether it says weight."""
    words = [word.lower() for word in _WORDS.findall(name)]
    named = [word for word in words if word in _ROLE_OF and (word != "map" or "quant" in words)]
    if not named:
        return "", frozenset(words) - _PAYLOADS, not _PAYLOADS.isdisjoint(words)
    role = min((_ROLE_OF[word] for word in named), key=list(_ROLES).index)
    numbers = {word for word in words[words.index(named[0]) :] if word.isdigit()}  # as in "weight_scale_2"
    stem = frozenset(words) - {*named, *numbers} - _QUALIFIERS - _FILLERS - _PAYLOADS
    qualifiers = sorted(numbers | (_QUALIFIERS & set(words)))
    return " ".join((role, *qualifiers)), stem, not _PAYLOADS.isdisjoint(words)


def _is_evidence(codes: _What, companion: _What, *, tied: bool) -> bool:
    """True if a companion shows that a tensor holds codes.

    An integer of few bits is no weight by itself. A small float may be one, with a learned scale beside it, unless that
    is named after the weight or has a value for each block of it.
    """
    if codes[2] not in _FLOAT8:
        return True
    return companion[2] != codes[2] and (tied or len(companion[1]) == len(codes[1]) > 1)


def _fits(role: str, shape: Sequence[int], codes: Sequence[int]) -> bool:
    """True if a table is smaller than its codes, or another companion has a value for each part of them."""
    return prod(shape) <= prod(codes) if role.startswith("table") else _is_for_parts(shape, codes)


def _is_for_parts(shape: Sequence[int], codes: Sequence[int]) -> bool:
    """True if a shape has a value for all codes, or for each of their rows, columns or blocks; codes may be packed."""
    small, large = ([size for size in of if size != 1] for of in (shape, codes))
    if not small or small in (large[: len(small)], large[len(large) - len(small) :]):
        return True
    if len(small) == len(large) == 1:
        return _divides(small[0], large[0])
    if len(shape) != len(codes):
        return False
    turned = reversed(codes) if len(codes) == 2 else codes
    return any(all(map(_divides, shape, of)) for of in (codes, turned))


def _divides(count: int, size: int) -> bool:
    """True if so many blocks, of which the last may be shorter, make up a dimension, whose elements may be packed."""
    if not (count and size):
        return False
    if count > size:
        return count % size == 0 and count // size <= _MAX_PACKED
    if any(32 * count == bits * size for bits in range(1, 9)):  # packed itself, as zero points are
        return True
    block = -(-size // count)
    return -(-size // block) == count


def _scheme(codes: _What, companions: Sequence[tuple[_What, str]]) -> str:
    """Name a scheme as its makers do where its parts identify it, else by its dtype and the reach of a scale."""
    _, shape, dtype = codes
    parts = {role: what for what, role in reversed(companions)}
    scale, zero = parts.get("scale"), parts.get("zero")
    for (name, _, _), _ in companions:
        if known := _NAMED.search(name):
            return known[1].upper()
    if dtype in _TORCH:
        return f"torch's {_name_of(dtype)}"
    if "table" in parts:
        return f"{_name_of(dtype)} codes of a table"
    if scale is not None and scale[2] in _POWERS:
        return "MXFP8" if dtype in _FLOAT8 else "MXFP4"
    if scale is not None and scale[2] == torch.float8_e4m3fn:
        return "NVFP4"
    reach = "" if scale is None else _reach(shape, scale[1])
    if dtype in _FLOAT8:
        return f"FP8{reach}"
    if dtype == torch.int8:
        return f"INT8{reach}"
    if any(name.endswith("shape") for (name, _, _), _ in companions):
        return "compressed-tensors"
    if scale is not None and zero is not None:
        if zero[1:] == scale[1:] and dtype == torch.uint32:
            return "MLX"
        if zero[2] == dtype == torch.int32:
            return "GPTQ" if shape[-1] == scale[1][-1] else "AWQ"
    return f"packed {_name_of(dtype)}{reach}"


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _reach(codes: Sequence[int], scale: Sequence[int]) -> str:
    if prod(scale) == 1:
        return " by tensor"
    return " by row" if sum(size > 1 for size in scale) == 1 and prod(scale) in codes else " in blocks"


def hidden_keys(own: Members, other: Members) -> frozenset[str]:
    """List the keys of one side that take no part in the matching, since the other side has none of their scheme.

    Codes that have the shape of their values take part, for they show where the tensors around them belong.
    """
    shared = {member.group.kind for member in other.values()}
    return frozenset(
        key
        for key, member in own.items()
        if member.group.kind not in shared and (member.role != "codes" or member.group.is_packed)
    )


def can_fill(sources: Sequence[str], target: str, operation: Operation, own: Members, other: Members) -> bool:
    """True if tensors may fill another by an operation: codes fill only the same codes, unchanged."""
    wanted = other.get(target)
    if wanted is None:
        return own.keys().isdisjoint(sources)
    first = own.get(sources[0]) if len(sources) == 1 else None
    if first is None or first.role != wanted.role or first.group.kind != wanted.group.kind or operation != Copy():
        return False
    dtypes = {first.spec.dtype, wanted.spec.dtype}
    return len(dtypes) == 1 or all(dtype.is_floating_point and dtype.itemsize > 1 for dtype in dtypes)


def describe_schemes(members: Members, used: Iterable[str] = ()) -> list[str]:
    """Describe each scheme with the number of tensors that are quantised in it, without those that are used.

    >>> weight = TensorSpec("fc.weight", (2, 8), torch.int8)
    >>> describe_schemes(groups_of([weight, TensorSpec("fc.SCB", (2,), torch.float32)]))
    ['1 tensors quantised as INT8 by row (weight with SCB)']
    """
    done = set(used)
    schemes: dict[str, list[Quantised]] = defaultdict(list)
    for key, member in members.items():
        if member.role == "codes" and key not in done:
            schemes[member.group.scheme].append(member.group)
    return [f"{len(groups)} tensors quantised as {scheme} ({groups[0].names})" for scheme, groups in schemes.items()]
