"""Quantised tensors: integers or small floats that are values only together with a scale, zero point or table.

No library is recognised by its name: ``groups_of`` finds, from names, shapes and dtypes alone, a tensor of codes with
companions beside it whose names say what they are for and whose shapes fit. ``as_values`` puts the tensor of its values
in place of each group that ``dequantise`` can compute; all others are left out, for ``can_fill`` allows codes to be
copied only where the other side has them in the same scheme.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from autoalign.plan.adaptations import needs_target
from autoalign.plan.dequantise import (
    AWQ_IN_ORDER,
    GPTQ_FORMS,
    OF_CALLS,
    SCHEMES,
    Dequantise,
    is_dequantised,
    mlx_shape,
    schemes_of,
)
from autoalign.plan.keys import common_prefix, split_key
from autoalign.plan.operations import Copy, Operation, Permute, chain, in_parallel, output_shapes
from autoalign.plan.parametrised import Parametrised
from autoalign.plan.specs import TensorSpec

ADVICE = "Load the checkpoint from before it was quantised, or dequantise it first."
VALUES = torch.float32  # what quantised tensors are dequantised to


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
    "index": "idx perm",
    "format": "format",
    "layout": "shape state bits nbits",
}
_ROLE_OF = {word: role for role, words in _ROLES.items() for word in words.split()}
_QUALIFIERS = OF_CALLS | {"global", "nested"}
_FILLERS = frozenset({"inv", "inverse", "point", "quant", "factor", "group", "g"})
_PAYLOADS = frozenset(
    {"weight", "weights", "kernel", "embedding", "w", "q", "qweight"}
    | {"packed", "blocks", "codes", "data", "qdata", "values", "indices", "idxs", "quantized"}
)
_MAX_PACKED = 32  # codes in an element

_MAX_STATE = 2**16  # bytes of JSON
_STATEMENTS = ("quantization_config", "quantization")  # of Hugging Face's configurations, and of MLX's

_OF_CODES = re.compile(r"[._](packed|blocks)$|^_data$|^blocks$")
_WORDS = re.compile(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*|\d+")
_STATE = ".quant_state.bitsandbytes__"
_NAMED = re.compile(r"bitsandbytes__([a-z0-9]+)$")


@dataclass(frozen=True, slots=True)
class Quantised:
    """A tensor of codes with the companions that its values are computed from."""

    scheme: str  # such as "FP8 in blocks"
    codes: TensorSpec
    companions: tuple[TensorSpec, ...]
    roles: tuple[str, ...]  # of the codes and of each companion, such as "scale" or "scale global"
    names: str  # of both within their module, such as "weight with weight_scale_inv"
    is_packed: bool  # True if the codes have another shape than the values
    is_whole: bool  # True if all that is named as a companion has a shape that fits

    @property
    def kind(self) -> tuple[str, torch.dtype]:
        """What two must have in common for one to be a copy of the other."""
        return self.scheme, self.codes.dtype

    @property
    def sides_of_scale(self) -> list[bool]:
        """True for the rows, and for the columns, if a matrix has as many as its scale has values in one dimension."""
        scale = next((spec.shape for role, spec in zip(self.roles, self.specs, strict=True) if role == "scale"), ())
        return [scale == (size,) for size in self.codes.shape[:2]]

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The codes and the companions."""
        return self.codes, *self.companions

    @property
    def key_of_values(self) -> str:
        """The key that the tensor has before it is quantised."""
        module, name = split_key(self.codes.key)
        words = {word.lower() for word in _WORDS.findall(name)}
        is_weight = not words.isdisjoint({"weight", "qweight"}) and words <= _PAYLOADS  # "_weight_qdata", too
        name = "weight" if is_weight else _OF_CODES.sub("", name)
        return f"{module}.{name}".strip(".")

    def dequantise(self, tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> Operation | None:
        """Return the operation that computes the values; None where that is not known.

        Args:
            tensors: From which the companion is read that holds the shape, in formats that have one.
            config: What its makers wrote down of the network, which tells variants of a format apart.
        """
        stated = next((each for name in _STATEMENTS if isinstance(each := config.get(name), Mapping)), {})
        name = self.scheme
        if name == "GPTQ":
            name = GPTQ_FORMS.get(str(stated.get("checkpoint_format")), name)
        elif name == "AWQ" and "gptqmodel" in str(stated.get("meta")):
            name = AWQ_IN_ORDER
        scheme = SCHEMES.get(name)
        if scheme is None or not self.is_whole or not scheme.takes(self.roles):
            return None
        shapes = {role: spec.shape for role, spec in zip(self.roles, self.specs, strict=True)}
        shape = known = scheme.shape(shapes)
        if scheme.stored is not None:
            role, read = scheme.stored
            tensor = tensors[self.specs[self.roles.index(role)].key]
            try:
                shape = None if tensor.is_meta or tensor.numel() > _MAX_STATE else read(tensor, shapes)
            except Exception:  # it may say anything
                return None
        elif name == "MLX":
            own = stated.get(split_key(self.codes.key)[0])
            group = (own if isinstance(own, Mapping) else stated).get("group_size")
            shape = mlx_shape(shapes, group) if isinstance(group, int) and group > 0 else known
        if shape is None:
            return None
        step = Dequantise(name, self.roles, () if shape == known else shape)
        is_turned = self.codes.key.endswith("_blocks") and len(shape) == 3  # transformers' experts, [in, out] each
        return chain(step, Permute((0, 2, 1))) if is_turned else step


@dataclass(frozen=True, slots=True)
class Member:
    """A tensor of such a group."""

    group: Quantised
    spec: TensorSpec
    role: str  # "codes", or that of a companion, such as "scale" or "scale global"

    @property
    def is_needed(self) -> bool:
        """True if the values cannot be computed without it."""
        return " " not in self.role or OF_CALLS.isdisjoint(self.role.split())


Members = Mapping[str, Member]  # by key


def groups_of(specs: Sequence[TensorSpec]) -> Members:
    """Find the tensors of codes among some tensors, and their companions.

    >>> weight = TensorSpec("fc.weight", (256, 512), torch.float8_e4m3fn)
    >>> found = groups_of([weight, TensorSpec("fc.weight_scale_inv", (2, 4), torch.float32)])
    >>> [(key, member.role, member.group.scheme) for key, member in found.items()]
    [('fc.weight', 'codes', 'FP8 in blocks'), ('fc.weight_scale_inv', 'scale', 'FP8 in blocks')]
    """
    return _groups_of(tuple(specs)) if any(spec.encoding or spec.dtype in _CODES for spec in specs) else {}


@lru_cache(maxsize=4)  # an alignment asks again for what its sides have
def _groups_of(specs: tuple[TensorSpec, ...]) -> Members:
    stated = {spec.key.partition(_STATE)[0] for spec in specs if _STATE in spec.key}  # codes that may be kept as floats
    codes = {
        spec.key: spec
        for spec in specs
        if spec.encoding or ((spec.dtype in _CODES or spec.key in stated) and spec.numel > 1)
    }
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
                beside[module, stem].append((name, spec))
        if module in codes:  # "weight.absmax" belongs to "weight"
            inside[module].append((name, spec))
            continue
        if module not in outer:
            outer[module] = split_key(module)
        above, last = outer[module]
        if above in codes:  # and so does "weight.quant_state.nf4"
            inside[above].append((f"{last}.{name}", spec))
    found: dict[str, Member] = {}
    for key, spec in codes.items():
        module, name = split_key(key)
        role, stem, _ = _read(name)
        if key in found or (role and spec.dtype not in _TORCH):
            continue
        near = [] if spec.encoding and spec.dtype not in _TORCH else beside.get((module, stem), [])
        companions = _companions(spec, inside.get(key, []), near, tied=bool(stem))
        if companions is None:
            continue
        group = Quantised(
            scheme=_scheme(spec, companions),
            codes=spec,
            companions=tuple(other for _, other, _ in companions),
            roles=("codes", *(role for _, _, role in companions)),
            names=_names(name, [own for own, _, _ in companions], is_shared=bool(stem)),
            is_packed=spec.dtype not in _UNPACKED or any(role.startswith("table") for _, _, role in companions),
            is_whole=len(companions) == len(inside.get(key, [])) + len(near),
        )
        found[key] = Member(group, spec, "codes")
        for _, other, role in companions:
            found.setdefault(other.key, Member(group, other, role))
    return found


_Near = tuple[str, TensorSpec]  # a tensor near one of codes, with its name within the module
_Companion = tuple[str, TensorSpec, str]  # and its role


def _companions(
    codes: TensorSpec, inside: Sequence[_Near], beside: Sequence[_Near], *, tied: bool
) -> list[_Companion] | None:
    """List the companions of a tensor; None if it does not hold codes.

    Args:
        codes: The tensor.
        inside: Tensors whose names continue its own.
        beside: Others that may be its companions.
        tied: Their names share more words than those for weights and roles.
    """
    found = [(name, spec, _read(name.rpartition(".")[2])[0] or "layout") for name, spec in inside]
    is_known = (
        codes.dtype in _TORCH
        or bool(codes.encoding)
        or any(role.startswith(("scale", "table")) for _, _, role in found)
    )
    for name, spec in beside:
        role, _, is_named = _read(name)
        if role.startswith(("layout", "index", "format")) or codes.dtype in _TORCH:
            found.append((name, spec, role))
            is_known |= role == "format"
        elif prod(spec.shape) <= codes.numel if role.startswith("table") else _is_for_parts(spec.shape, codes.shape):
            found.append((name, spec, role))
            is_known |= _is_evidence(codes, spec, tied=tied or is_named)
        elif role == "scale":  # of another shape, which makes no values of codes
            is_known |= _is_evidence(codes, spec, tied=tied or is_named)
    return found if is_known else None


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


def _is_evidence(codes: TensorSpec, companion: TensorSpec, *, tied: bool) -> bool:
    """True if a companion shows that a tensor holds codes.

    An integer of few bits is no weight by itself. A small float may be one, with a learned scale beside it, unless that
    is named after the weight or has a value for each block of it.
    """
    if codes.dtype not in _FLOAT8:
        return True
    return companion.dtype != codes.dtype and (tied or len(companion.shape) == len(codes.shape) > 1)


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
    few, many = sorted((count, size))
    if not few or any(32 * few == bits * many for bits in range(1, 9)):  # packed, as codes are, and zero points
        return few > 0
    if count > size:
        return count % size == 0 and count // size <= _MAX_PACKED
    block = -(-size // count)
    return -(-size // block) == count


def _scheme(codes: TensorSpec, companions: Sequence[_Companion]) -> str:
    """Name a scheme as its makers do where its parts identify it, else by its dtype and the reach of a scale."""
    if codes.encoding:
        return codes.encoding
    dtype = codes.dtype
    parts = {role: spec for _, spec, role in reversed(companions)}
    scale, zero = parts.get("scale"), parts.get("zero")
    for name, _, _ in companions:
        if known := _NAMED.search(name):
            return known[1].upper()
    if "table" in parts:
        return f"{codes.dtype_name} codes of a table"
    if scale is not None and scale.dtype in _POWERS:
        return "MXFP8" if dtype in _FLOAT8 else "MXFP4"
    if scale is not None and scale.dtype == torch.float8_e4m3fn:
        return "NVFP4"
    reach = "" if scale is None else _reach(codes.shape, scale.shape)
    if dtype in _FLOAT8:
        return f"FP8{reach}"
    if dtype == torch.int8:
        return "LLM.int8" if any(name.endswith("SCB") for name, _, _ in companions) else f"INT8{reach}"
    if any(name.endswith("_shape") for name, _, _ in companions):
        return "compressed-tensors"
    if scale is not None and zero is not None:
        if (zero.shape, zero.dtype) == (scale.shape, scale.dtype) and dtype == torch.uint32:
            return "MLX"
        if zero.dtype == dtype == torch.int32:
            return "GPTQ" if codes.shape[-1] == scale.shape[-1] else "AWQ"
    return f"packed {codes.dtype_name}{reach}"


def _reach(codes: Sequence[int], scale: Sequence[int]) -> str:
    if prod(scale) == 1:
        return " by tensor"
    return " by row" if sum(size > 1 for size in scale) == 1 and prod(scale) in codes else " in blocks"


@dataclass(frozen=True, slots=True)
class Values:
    """One side with a tensor of values in place of each group that they are computed from."""

    specs: tuple[TensorSpec, ...]
    groups: Mapping[str, tuple[Quantised | Parametrised, Operation]]  # by the key of the values
    members: Members  # of all other quantised tensors

    @property
    def keys_of_codes(self) -> dict[str, str]:
        """The key of the values for each key of codes."""
        return {group.codes.key: key for key, (group, _) in self.groups.items()}

    def codes_of(self, key: str) -> str:
        """Return the key of the codes of values, or the key itself where it is of no values."""
        return self.groups[key][0].codes.key if key in self.groups else key

    def from_members(self, sources: Sequence[str], operation: Operation) -> tuple[tuple[str, ...], Operation]:
        """Return an operation on values as one on the tensors that they are computed from."""
        if self.groups.keys().isdisjoint(sources):
            return tuple(sources), operation
        members: list[str] = []
        steps: list[Operation] = [Copy()] if needs_target(operation) else []
        for key in reversed(sources):
            group, step = self.groups.get(key, (None, Copy()))
            members[:0] = [key] if group is None else [spec.key for spec in group.specs]
            steps.insert(0, step)
        return tuple(members), chain(in_parallel(steps), operation)


def as_values(
    specs: Sequence[TensorSpec],
    own: Members,
    other: Members,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, object],
    combined: Iterable[Parametrised] = (),
) -> Values:
    """Put values in place of quantised tensors, but for those of schemes that the other side has too.

    >>> specs = [TensorSpec("fc.weight", (2, 8), torch.int8), TensorSpec("fc.SCB", (2,), torch.float32)]
    >>> print(*as_values(specs, groups_of(specs), {}, {}, {}).specs)
    fc.weight [2, 8] float32

    Args:
        specs: Of one side.
        own: The quantised tensors in it.
        other: Those of the other side.
        tensors: As for ``Quantised.dequantise``.
        config: As well.
        combined: Weights to put in place of what they are computed from, too.
    """
    shared = {member.group.kind for member in other.values()}
    given = {spec.key for spec in specs}
    groups: dict[str, tuple[Quantised | Parametrised, Operation]] = {
        each.key_of_values: (each, each.operation) for each in combined
    }
    turned = {member.group.names for member in own.values() if member.group.sides_of_scale == [False, True]}
    for key, member in own.items():
        group = member.group
        if group.names in turned and group.sides_of_scale == [True, True]:  # which are scales of columns there, too
            continue
        is_free = group.kind not in shared or bool(group.codes.encoding)  # which no other file would keep
        if member.role == "codes" and is_free and given.issuperset(spec.key for spec in group.specs):
            step = group.dequantise(tensors, config)
            named = group.key_of_values
            named = key if named in given or named in groups else named
            if step is not None:
                groups[named] = group, step
    of_values = {}
    for key, (whole, step) in groups.items():
        (shape,) = output_shapes(step, [spec.shape for spec in whole.specs])
        kind = (VALUES, whole.codes.storage) if isinstance(whole, Quantised) else (whole.codes.dtype, None)
        of_values[whole.codes.key] = TensorSpec(key, shape, *kind)
    taken = {spec.key for group, _ in groups.values() for spec in group.specs}
    return Values(
        tuple(of_values.get(spec.key, spec) for spec in specs if spec.key in of_values or spec.key not in taken),
        groups,
        {key: member for key, member in own.items() if key not in taken},
    )


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
    """True if tensors may fill another by an operation: codes only the same codes, or by way of their values."""
    wanted = other.get(target)
    if wanted is None:
        known = {own[key].group.scheme for key in sources if key in own}
        return bool(known) == is_dequantised(operation) and schemes_of(operation) <= known
    first = own.get(sources[0]) if len(sources) == 1 else None
    if first is None or first.role != wanted.role or first.group.kind != wanted.group.kind or operation != Copy():
        return False
    dtypes = {first.spec.dtype, wanted.spec.dtype}
    return len(dtypes) == 1 or all(dtype.is_floating_point and dtype.itemsize > 1 for dtype in dtypes)


def describe_schemes(members: Members, used: Iterable[str] = ()) -> list[str]:
    """Describe each scheme with the number of tensors that are quantised in it, without those that are used.

    >>> weight = TensorSpec("fc.weight", (2, 8), torch.int8)
    >>> describe_schemes(groups_of([weight, TensorSpec("fc.SCB", (2,), torch.float32)]))
    ['1 tensors quantised as LLM.int8 (weight with SCB)']
    """
    done = set(used)
    schemes: dict[str, list[Quantised]] = defaultdict(list)
    for key, member in members.items():
        if member.role == "codes" and key not in done:
            schemes[member.group.scheme].append(member.group)
    return [f"{len(groups)} tensors quantised as {scheme} ({groups[0].names})" for scheme, groups in schemes.items()]
