"""Layouts: tensors whose shapes fit although their rows may be in another order.

Nothing in two lists of shapes shows these. A match in doubt carries a warning and its other layouts; it is loaded only
where something else in the two checkpoints tells the layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice, permutations
from math import gcd, prod

from autoalign.matching.composition import Composition, composition_of, layer_name
from autoalign.matching.fusion import ALTERNATING, UNCERTAIN_ORDER, Fusion
from autoalign.matching.layers import Part
from autoalign.matching.names import kind, role_words, words
from autoalign.matching.paths import Path
from autoalign.matching.rotary import ROTATED, Rotation, is_same_code, layouts_of, role_of, rotation_of, text_config
from autoalign.matching.vocabulary import (
    CONFIG_HEADS,
    FUSED,
    GATE_FIRST,
    GROUPED,
    INTERLEAVED,
    MODULATION,
    ROLES,
)
from autoalign.plan.keys import numbers, stem
from autoalign.plan.operations import Copy, Flip, Operation, Permute, Reshape, Shape, Split, Transpose, Unstack, chain
from autoalign.plan.specs import TensorSpec

_MAX_ORDERS = 24  # of the parts of a tensor that are told
_USUAL_HEAD_SIZES = (
    64,
    128,
    80,
    96,
    32,
    256,
    112,
    72,
    88,
    48,
    40,
    160,
    192,
    16,
)  # the most frequent first
_MAX_IMAGE_CHANNELS = 4
_STATE = frozenset(
    {"hh", *(role for roles in FUSED["hh"] for role in roles)}
)  # what maps the state of a recurrent layer

ROTARY = (
    "right shape, but rotary layouts differ between Meta's and Hugging Face's code: "
    "the rows of each query and key head may have to be reordered"
)
BY_HEAD = "right shape, but one side may interleave query, key and value by head"
_PATCHES = "right shape, but the pixels of a patch may be flattened in another order (channels first or last)"
_GATES = "right shape, but Keras orders the gates of a GRU as update, reset, new, and torch as reset, update, new"
_MERGED = "right shape, but one side merges patches by unfolding, with the channels first, and the other does not"
_MERGED_OTHERWISE = "taken as it is, though one side may merge patches by unfolding, with the channels first"
_FLATTENED = "right shape, but one side may flatten images with the channels last and the other with the channels first"
_FLATTENED_OTHERWISE = "taken as it is, though one side may flatten images with the channels last"
_CONCATENATED_OTHERWISE = "taken as it is, though one side may concatenate the newest features first and the other last"
OTHERWISE = frozenset({_MERGED_OTHERWISE, _FLATTENED_OTHERWISE, _CONCATENATED_OTHERWISE})  # reasons to look at code
_SUM = "right shape, but the source has two biases here, and that of the target may be their sum"
_HALVES = "right shape, but one side may hold the gate first and the other what it gates"
_SHIFT = "right shape, but scale and shift of an adaptive norm may be in the other order"


@dataclass(frozen=True, slots=True)
class Blocks:
    """A layout by blocks of rows."""

    made: tuple[Operation, ...]  # from the source's part to each block
    places: tuple[Operation, ...]  # from the target's part to each block


@dataclass(frozen=True, slots=True)
class Doubt:
    """Why a part might be laid out otherwise, and what would turn one layout into the other."""

    reason: str
    otherwise: tuple[Operation, ...] = ()  # from the source's part to the target's, the likeliest first
    is_known: bool = False  # whether the first of these is the right one by what else is known
    is_unlikely: bool = False  # whether all of these are unusual, so that the part is taken as it is
    blocks: tuple[Blocks, ...] = ()  # instead of `otherwise`, where blocks of rows are laid out by an operation each


@dataclass(frozen=True, slots=True)
class Style:
    """What a side shows of the code that it comes from."""

    rotation: Rotation  # of its queries and keys
    rotated: int | None  # rows of a head that are rotated, as a companion buffer of frequencies tells
    head_dim: int | None  # rows of a head, as its config or the norms of its heads tell
    rows: int  # which the size of a head divides
    doubled: frozenset[Path]  # layers that hold a gate and what it gates, as the width of the layer after them tells
    gated: frozenset[Path]  # recurrent layers of three gates in Keras' order, which is not torch's
    adds_biases: bool  # whether its recurrent layers have a bias for the state besides that for the input
    composition: Composition  # of what its layers are given


def style_of(specs: Sequence[TensorSpec], parts: Sequence[Part], config: Mapping[str, object]) -> Style:
    """Read the style off a side's keys, its shapes and its config."""
    frequencies = {
        2 * spec.shape[0] for spec in specs if spec.key.endswith(("rope.freqs", "inv_freq")) and len(spec.shape) == 1
    }
    rows = [part.shape[0] for part in parts if len(part.shape) == 2 and {"q", "k"} & role_words(part.path)]
    sizes = _head_dims(parts, gcd(*rows) if rows else 0, config)
    return Style(
        rotation=rotation_of(specs, config),
        rotated=frequencies.pop() if len(frequencies) == 1 else None,
        head_dim=sizes.pop() if len(sizes) == 1 else None,
        rows=gcd(*rows) if rows else 0,
        doubled=_doubled(parts),
        gated=frozenset(
            part.path[:-1]
            for part in parts
            if part.path[-1] == "recurrent_kernel" and len(part.shape) == 2 and part.shape[0] == 3 * part.shape[1]
        ),
        adds_biases=any(kind(part.path[-1])[0] == "bias" and _STATE & role_words(part.path) for part in parts),
        composition=composition_of(
            parts,
            channels_last=any(
                isinstance(part.view, Permute) and len(part.view.dims) > 3 and part.view.dims[0] > 1 for part in parts
            ),
        ),
    )


def _doubled(parts: Sequence[Part]) -> frozenset[Path]:
    last: dict[tuple[Path, object], int] = {}  # module, shape or columns -> the last place of such a matrix below it
    matrices = [part for part in parts if len(part.shape) == 2 and not part.view.takes_part]
    matrices = [part for part in matrices if {"ih", "hh"}.isdisjoint(words(part.path[-1]))]  # gates of another kind
    shapes = {part.shape for part in matrices}
    if all((columns, rows // 2) not in shapes for rows, columns in shapes):
        return frozenset()
    for place, part in enumerate(matrices):
        for up in range(2, 5):
            last[part.path[:-up], part.shape] = last[part.path[:-up], part.shape[1]] = place
    found = set()
    for place, part in enumerate(matrices):
        rows, columns = part.shape
        # keys and values together have twice as many rows as columns, often
        if rows % 2 or rows == 2 * columns:
            continue
        for up in range(2, 5):
            if last.get((part.path[:-up], (columns, rows // 2)), -1) > place:
                found.add(part.path[:-1])
            elif last.get((part.path[:-up], rows), -1) <= place:
                continue  # no layer here takes all rows
            break
    return frozenset(found)


def _order_of_halves(path: Path) -> tuple[str, ...]:
    """Return what shows the order of a gate and what it gates: that the gate is first, or else the layer's name."""
    found = words(layer_name(path))
    return ("gateup",) if "gateup" in found or found in GATE_FIRST else found


def _head_dims(parts: Sequence[Part], rows: int, config: Mapping[str, object]) -> set[int]:
    """Collect the sizes of heads that a config states, or that norms of single queries and keys have."""
    known = text_config(config)
    prefix = config.get("general.architecture")  # of the names in a header of GGUF

    def stated(names: Sequence[str]) -> int | None:
        asked = [*names, *(f"{prefix}.{name}" for name in names if prefix)]
        values = [value for name in asked if isinstance(value := known.get(name), int) and value > 0]
        return values[0] if values else None

    heads, width, size = (stated(names) for names in CONFIG_HEADS)
    if size:
        return {size}
    if heads and width and width % heads == 0:
        return {width // heads}
    return {
        part.shape[0]
        for part in (parts if rows else ())
        if len(part.shape) == 1
        and part.shape[0] < rows
        and "norm" in (roles := role_words(part.path))
        and not roles.isdisjoint(("q", "k"))
    }


def doubt_about(
    source: Part, target: Part, operation: Operation, styles: tuple[Style, Style], weight: Shape
) -> Doubt | None:
    """Return what speaks against taking a source part by this operation for a target part.

    ``weight`` is the shape of the matrix of the source's layer, of which the part may be the bias.
    """
    if not source.shape:
        return None
    doubled = len(weight) == 2 and max(weight) == 2 * min(weight) and max(weight) in source.shape
    if doubled and (_modulates(source) or _modulates(target)):
        if source.path[-3:-1] == target.path[-3:-1]:
            return None
        dim = source.shape.index(max(weight))
        halves = Reshape((*source.shape[:dim], 2, min(weight), *source.shape[dim + 1 :]))
        is_known = {_modulates_last(source), _modulates_last(target)} == {"shift", "scale"}
        return Doubt(_SHIFT, (chain(halves, Flip(dim), Reshape(source.shape), operation),), is_known)
    doubt = _doubt(source, target, styles, weight)
    if doubt is None or not isinstance(operation, Transpose) or source.shape[0] >= source.shape[1]:
        return doubt and replace(doubt, otherwise=tuple(chain(way, operation) for way in doubt.otherwise))
    columns = replace(source, shape=source.shape[::-1])  # which are the rows in torch's layout
    turned = _doubt(columns, target, styles, weight[::-1])
    return turned and replace(turned, otherwise=tuple(chain(operation, way) for way in turned.otherwise))


def _doubt(source: Part, target: Part, styles: tuple[Style, Style], weight: Shape) -> Doubt | None:
    layers = source.path[:-1], target.path[:-1]
    if (layers[0] in styles[0].gated) != (layers[1] in styles[1].gated):
        is_known = any({"ih", "hh"} & set(words(name)) for part in (source, target) for name in part.path[-2:])
        first, second, last = gates = _splits((source.shape[0] // 3,) * 3)
        return Doubt(_GATES, is_known=is_known, blocks=(Blocks((second, first, last), gates),))
    is_bias = kind(source.path[-1])[0] == "bias"
    if is_bias and styles[0].adds_biases > styles[1].adds_biases and "ih" in role_words(source.path):
        return Doubt(_SUM)
    composed = _composed(source, layers, (styles[0].composition, styles[1].composition))
    if composed and not composed.is_unlikely:
        return composed
    both_doubled = layers[0] in styles[0].doubled and layers[1] in styles[1].doubled
    if (
        both_doubled
        and source.shape[0] % 2 == 0
        and stem(layer_name(source.path)) != stem(layer_name(target.path))
        and (source.path[-1] != target.path[-1] or kind(source.path[-1])[0] != "other")  # a parameter of its own
        and (_order_of_halves(source.path) != _order_of_halves(target.path))
    ):
        halves = (2, source.shape[0] // 2, *source.shape[1:])
        return Doubt(_HALVES, (chain(Reshape(halves), Flip(0), Reshape(source.shape)),))
    interleaved = interleaves(source.path)
    own, other = role_words(source.path), role_words(target.path)
    is_fused = "qkv" in own | other and ROLES.isdisjoint(own | other) and len(weight) > 1
    if is_fused or "qkv" in own & other:
        roles, is_mixed = _blocks(source, weight), interleaved != interleaves(target.path)
        has_other_name = interleaved and layer_name(source.path) != layer_name(target.path)
        if len(set(roles)) > 1 and (is_mixed or has_other_name):
            return _by_group(source.shape, roles, styles)
        if is_mixed:
            return _by_head(source, interleaved, styles)
    if len(source.shape) < 3 and (doubt := _rotary(source, target, styles, weight)):
        return doubt
    if {len(source.shape), len(target.shape)} in ({2, 4}, {2, 5}):
        return _patches(source.shape, target.shape)
    return composed


def _composed(source: Part, layers: tuple[Path, Path], sides: tuple[Composition, Composition]) -> Doubt | None:
    """Doubt the order of what a layer is given, where the sides show unlike ones, or call the layers unlike names."""
    own, other = sides
    dim = min(len(source.shape), 2) - 1
    width = source.shape[dim]
    (columns, name), (_, called) = own.merging.get(layers[0], (0, "")), other.merging.get(layers[1], (0, ""))
    is_known = own.unfolds != other.unfolds
    if width == columns and (is_known or (called and name != called)):
        sizes = (width // 4, 2, 2) if own.unfolds else (2, 2, width // 4)
        way = _with_columns(source.shape, sizes, (2, 1, 0))
        return Doubt(_MERGED if is_known else _MERGED_OTHERWISE, (way,), is_known, is_unlikely=not is_known)
    channels, name = own.flattened.get(layers[0], ((), ""))
    is_alike = own.channels_last == other.channels_last
    if channels and len(source.shape) == 2 and not (is_alike and name == layer_name((*layers[1], "weight"))):
        grids = [(width // size, size)[:: 1 if own.channels_last else -1] for size in channels]
        grids += [grid[::-1] for grid in grids] if is_alike else []
        ways = tuple(_with_columns(source.shape, grid, (1, 0)) for grid in grids)
        return Doubt(_FLATTENED_OTHERWISE if is_alike else _FLATTENED, ways, is_unlikely=is_alike)
    (given, name), (_, called) = own.dense.get(layers[0], ((), "")), other.dense.get(layers[1], ((), ""))
    if width == sum(given) and called and name != called:
        made = tuple(Split(dim, sum(given[:k]), size) for k, size in enumerate(given))
        starts = accumulate(given[::-1], initial=0)
        places = tuple(Split(dim, start, size) for start, size in zip(starts, given[::-1], strict=False))
        return Doubt(_CONCATENATED_OTHERWISE, is_unlikely=True, blocks=(Blocks(made[::-1], places),))
    return None


def _with_columns(shape: Shape, sizes: Shape, order: Shape) -> Operation:
    """Split the last dimension into several of these sizes, put them into another order, and join them again."""
    rest = range(len(shape) - 1)
    apart = Permute((*rest, *(len(rest) + dim for dim in order)))
    return chain(Reshape((*shape[:-1], *sizes)), apart, Reshape(shape))


def _modulates(part: Part) -> bool:
    """True for a layer that gives the scale and shift of a norm: by its name, or as a part of the last norm."""
    names = [set(words(name)) for name in part.path[-4:-1]]
    return any(found & MODULATION for found in names) or any({"norm", "out"} <= found for found in names[:-1])


def _modulates_last(part: Part) -> str:
    """Return what comes first in the layer that modulates a network's last norm: "shift", "scale", or "" if unknown.

    Code with a ``final_layer``, as DiT's, has the shift first; diffusers, with a ``norm_out``, the scale.
    """
    names = [set(words(name)) for name in part.path[:-1]]
    first = next((k for k, found in enumerate(names) if found >= {"norm", "out"} or "last" in found), len(names))
    if any(map(numbers, part.path[:first])) or first == len(names):
        return ""
    if names[first] == {"norm", "out"}:
        return "scale" if names[first + 1 :] == [{"linear"}] else ""
    return "shift" if any(found & MODULATION for found in names[first:]) else ""


def interleaves(path: Path) -> bool:
    """True if a fused tensor's name is one of code that lays the roles out head by head."""
    return not INTERLEAVED.isdisjoint(path)


def _rotary(source: Part, target: Part, styles: tuple[Style, Style], weight: Shape) -> Doubt | None:
    """Doubt the order of the rows of rotated queries and keys, separate or together."""
    own, other = (
        style.rotation.projections.get(part.tensor) for style, part in zip(styles, (source, target), strict=True)
    )
    role, _ = role_of(source.path)
    if own is None or other is None or role not in ROTATED or role_of(target.path)[0] != role:
        return None
    if kind(source.path[-1])[0] not in ("weight", "bias"):
        return None
    towers, sides = (own.tower, other.tower), [style.rotation for style in styles]
    if any(tower.positions for tower in towers) or not any(tower.rotated for tower in towers):
        return None
    layouts = layouts_of(*sides)
    are_known = None not in layouts
    is_hugging_face = all(side.hugging_face for side in sides)
    if layouts[0] == layouts[1] if are_known else is_same_code(own, other, hugging_face=is_hugging_face):
        return None
    heads = {size for style in styles for size in (style.rotated, style.head_dim) if size}
    likelier = ("pairs", "halves") if sides[1].hugging_face else ("halves", "pairs")  # of the source
    directions = [way for way in likelier if layouts[0] in (None, way) and layouts[1] != way]
    sizes = _blocks(source, weight) if role == "qkv" else source.shape[:1]
    if any(side.partial for side in sides) or len(heads) > 1 or not sizes:  # a part of each head is rotated
        return Doubt(ROTARY)
    known = next(iter(heads), None)
    ways = [
        tuple(_repaired(size, source.shape[1:], head, to_pairs=way == "halves") for size in sizes[:2])
        for way in directions
        for head in _sizes(known, gcd(*sizes, *(style.rows for style in styles)))
        if head % 2 == 0 and head > 2
    ]
    is_known = are_known and known is not None and bool(ways)
    if role == "qkv":
        places = _splits(sizes)
        made = (tuple(map(chain, places, (*way, Copy()))) for way in ways)
        return Doubt(ROTARY, is_known=is_known, blocks=tuple(Blocks(each, places) for each in made))
    return Doubt(ROTARY, tuple(way for (way,) in ways), is_known)


def _blocks(source: Part, weight: Shape) -> tuple[int, ...]:
    """Return the rows of query, key and value in a tensor of one after another; as many queries as it is wide."""
    rows, width = source.shape[0], weight[1] if len(weight) == 2 else 0
    rest = rows - width if width and rows != 3 * width else 2 * rows // 3
    return (rows - rest, rest // 2, rest // 2) if rest > 0 and rest % 2 == 0 else ()


def _repaired(rows: int, rest: Shape, head: int, *, to_pairs: bool) -> Operation:
    """Put rows that are rotated together, as the halves of each head, beside one another; or these apart again."""
    pairs = (rows // head, 2, head // 2, *rest) if to_pairs else (rows // head, head // 2, 2, *rest)
    return chain(Reshape(pairs), Permute((0, 2, 1, *range(3, len(pairs)))), Reshape((rows, *rest)))


def _by_head(source: Part, interleaved: bool, styles: tuple[Style, Style]) -> Doubt:
    known = next((style.head_dim for style in styles if style.head_dim), None)
    rows, rest = source.shape[0], source.shape[1:]
    ways: list[Operation] = []
    for size in _sizes(known, rows // 3 if rows % 3 == 0 else 0):
        heads = rows // 3 // size
        if heads == 1:
            continue  # a single head is not interleaved
        apart = (heads, 3, size, *rest) if interleaved else (3, heads, size, *rest)
        ways.append(chain(Reshape(apart), Permute((1, 0, 2, *range(3, len(apart)))), Reshape(source.shape)))
    return Doubt(BY_HEAD, tuple(ways))


def _by_group(shape: Shape, sizes: Shape, styles: tuple[Style, Style]) -> Doubt:
    """Doubt whether the queries of a group stand beside their key and value, on one side or the other."""
    places, ways = _splits(sizes), list[Blocks]()
    known = next((style.head_dim for style in styles if style.head_dim), None)
    for size in _sizes(known, sizes[1]):
        groups = sizes[1] // size
        if groups > 1 and sizes[0] % (groups * size) == 0:
            apart = _group_parts(shape, 0, sizes, groups, size)
            ways += [Blocks(apart, places), Blocks(places, apart)]
    return Doubt(BY_HEAD, blocks=tuple(ways))


def _splits(sizes: Shape) -> tuple[Operation, ...]:
    return tuple(Split(0, sum(sizes[:place]), size) for place, size in enumerate(sizes))


def _patches(source: Shape, target: Shape) -> Doubt | None:
    """Doubt how the kernel of the first convolution was flattened into a matrix."""
    kernel = max(source, target, key=len)
    if not 1 < kernel[1] <= _MAX_IMAGE_CHANNELS or prod(kernel[2:]) == 1:
        return None
    last = (0, *range(2, len(kernel)), 1)
    if kernel == source:
        return Doubt(_PATCHES, (Permute(last),))
    first = Permute((0, len(kernel) - 1, *range(1, len(kernel) - 1)))
    return Doubt(_PATCHES, (chain(Reshape(tuple(kernel[dim] for dim in last)), first, Reshape(source)),))


def _sizes(known: int | None, rows: int) -> list[int]:
    """List the sizes that heads may have, the likeliest first."""
    if known is not None:
        return [known] if rows and rows % known == 0 else []
    usual = {size: place for place, size in enumerate(_USUAL_HEAD_SIZES)}
    sizes = [size for size in range(2, rows + 1) if rows % size == 0]
    return sorted(sizes, key=lambda size: (usual.get(size, len(usual)), -size))


def other_layouts(
    fusion: Fusion, path: Path, styles: tuple[Style, Style], *, is_convolved: bool = False
) -> tuple[str, list[tuple[Operation, ...]]]:
    """List the other ways to take the parts out of a fused tensor of this path: in another order, or head by head.

    ``is_convolved``: its layer is a convolution of width one. Code that descends from OpenAI's first diffusion models
    (Dhariwal and Nichol, 2021) has each head's query, key and value together there.

    Returns:
        The reason to doubt, empty for none; and for each other layout, what takes each part out.
    """
    plan = fusion.plan
    if plan.doubt == ALTERNATING:
        pairs = Reshape((*fusion.shape[: plan.dim], plan.sizes[0], len(plan.sizes), *fusion.shape[plan.dim + 1 :]))
        parts = tuple(chain(fusion.base, pairs, Unstack(plan.dim + 1, role)) for role in range(len(plan.sizes)))
        return plan.doubt, [parts]
    if plan.doubt:
        is_open = plan.doubt == UNCERTAIN_ORDER or len(set(plan.sizes)) == 1
        orders = list(islice(permutations(range(len(plan.sizes))), 1, _MAX_ORDERS)) if is_open else []
        ways = [
            [
                Split(plan.dim, sum(plan.sizes[k] for k in order[: order.index(role)]), size)
                for role, size in enumerate(plan.sizes)
            ]
            for order in orders
        ]
        return plan.doubt, [tuple(chain(fusion.base, view) for view in views) for views in ways]
    least = min(plan.sizes)
    grouped = max(plan.sizes) > least and (plan.unnamed or not GROUPED.isdisjoint(path))
    if not (interleaves(path) or grouped or is_convolved) or any(size % least for size in plan.sizes):
        return "", []
    known = next((style.head_dim for style in styles if style.head_dim), None)
    sizes = [size for size in _sizes(known, least) if least > size]
    heads = [
        tuple(
            chain(fusion.base, part) for part in _group_parts(fusion.shape, plan.dim, plan.sizes, least // size, size)
        )
        for size in sizes
    ]
    return (BY_HEAD if heads or known is None else ""), heads


def _group_parts(shape: Shape, dim: int, sizes: Shape, groups: int, size: int) -> tuple[Operation, ...]:
    """Build what takes the parts out of a tensor which holds, group by group, the heads of each role."""
    heads = [length // groups // size for length in sizes]
    before, after = shape[:dim], shape[dim + 1 :]
    apart = Reshape((*before, groups, sum(heads), size, *after))
    return tuple(
        chain(apart, Split(dim + 1, sum(heads[:role]), count), Reshape((*before, groups * count * size, *after)))
        for role, count in enumerate(heads)
    )
