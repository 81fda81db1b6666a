"""Conventions: one side as torch names its parameters and lays them out.

What unknown names of parameters mean shows in their company: of a matrix and a vector of its length, one is the weight
and the other the bias; two vectors are the gain and the bias of a norm, and with two more, its mean and variance. What
a name means in one layer it means in all. Kernels of JAX, Keras and TensorFlow are viewed as torch's weights.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

from autoalign.matching.layers import Part, Parts, Path, Unit
from autoalign.matching.names import kind, words
from autoalign.matching.vocabulary import AFTER_ATTENTION, AROUND_MLP, FUSED, KERNELS, TORCH_NAMES
from autoalign.plan.keys import numbers, stem
from autoalign.plan.operations import Operation, Permute, Reshape, Shape, Transpose, chain, output_shapes

_NORM_KINDS = {2: ("weight", "bias"), 4: ("weight", "bias", "mean", "var")}  # by their number, as they are registered
_MIN_VOTES = 2  # of layers for what a name means
_MIN_SHARE_OF_VOTES = 0.9
_ATTENTION_ROLES = frozenset(role for word in ("qkv", "gateup") for roles in FUSED[word] for role in roles)

_Layer = Sequence[Part]  # the tensors of a module that has no others below it
_Meanings = Mapping[str, str]  # own name of a tensor -> kind of values


def with_torch_names(parts: Sequence[Part], *, ordered: bool) -> list[Part]:
    """Rename the parameters of layers whose names are unknown as torch names them; the rest stay as they are.

    >>> shapes = {"0.mat": (8, 4), "0.vec": (8,), "1.a": (8,), "1.b": (8,), "2.mat": (8, 8), "2.vec": (8,)}
    >>> parts = [Part(n, tuple(key.split(".")), shape, "float") for n, (key, shape) in enumerate(shapes.items())]
    >>> [".".join(part.path) for part in with_torch_names(parts, ordered=True)]
    ['0.weight', '0.bias', '1.a', '1.b', '2.weight', '2.bias']

    Args:
        parts: The parts of one side.
        ordered: True if they are in the order of registration.
    """
    names = {part.path[-1] for part in parts}
    known = {name: values for name in names for values, rest in [kind(name)] if not rest and values in TORCH_NAMES}
    unknown = {name for name in names if kind(name)[0] == "other"}
    layers = _layers(parts, unknown) if unknown else []
    if not layers:
        return list(parts)
    found: dict[str, str] = {}
    for _ in range(2):  # what one name means may imply what another does
        found |= _agreed(_by_company(layers, known | found))
    known |= found
    by_order = _agreed(pair for layer in layers for pair in _unknown(_floats(layer), known)) if ordered else {}
    in_layers = {id(part) for layer in layers for part in layer}
    return [
        replace(part, path=(*part.path[:-1], TORCH_NAMES[meaning]), by_order=part.path[-1] in by_order)
        if id(part) in in_layers and (meaning := found.get(part.path[-1]) or by_order.get(part.path[-1]))
        else part
        for part in parts
    ]


def _layers(parts: Sequence[Part], names: Collection[str]) -> list[_Layer]:
    """List the layers with a tensor of one of these names."""
    modules: dict[tuple[str, ...], list[Part]] = defaultdict(list)
    for part in parts:
        modules[part.path[:-1]].append(part)
    above = {path[:depth] for path in modules for depth in range(len(path))}
    return [
        layer for path, layer in modules.items() if path not in above and any(part.path[-1] in names for part in layer)
    ]


def _by_company(layers: Iterable[_Layer], known: _Meanings) -> Iterator[tuple[str, str]]:
    """Yield what names mean where the shapes of a layer tell, or the names of all its other tensors do."""
    for layer in layers:
        floats = _floats(layer)
        counters = [part.path[-1] for part in layer if part.numeric == "int" and not part.shape]
        if len(floats) == 2:
            matrix, vector = sorted(floats, key=lambda part: -len(part.shape))
            meanings = {matrix.path[-1]: "weight", vector.path[-1]: "bias"}
            fits = len(matrix.shape) > 1 and len(vector.shape) == 1 and vector.shape[0] in matrix.shape
            if fits and all(known.get(name, values) == values for name, values in meanings.items()):
                yield from meanings.items()
        unknown = _unknown(floats, known)
        if len(unknown) == 1:
            yield from unknown
        if _is_norm(floats) and len(counters) == 1:
            yield counters[0], "count"


def _unknown(floats: _Layer, known: _Meanings) -> list[tuple[str, str]]:
    """Pair the unknown names of a norm's tensors with what is left for them to mean, in torch's order."""
    if not _is_norm(floats):
        return []
    names = [part.path[-1] for part in floats]
    taken = [known[name] for name in names if name in known]
    left = [values for values in _NORM_KINDS[len(floats)] if values not in taken]
    unknown = [name for name in names if name not in known]
    return list(zip(unknown, left, strict=True)) if len(unknown) == len(left) else []


def _floats(layer: _Layer) -> _Layer:
    return [part for part in layer if part.numeric == "float"]


def _is_norm(floats: _Layer) -> bool:
    return len(floats) in _NORM_KINDS and len({part.shape for part in floats}) == 1 and len(floats[0].shape) == 1


def _agreed(votes: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return what nearly all layers say that an unknown name means."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for name, values in votes:
        if kind(name)[0] == "other":
            counts[name][values] += 1
    best = {name: count.most_common(1)[0] for name, count in counts.items()}
    return {
        name: values
        for name, (values, number) in best.items()
        if number >= max(_MIN_VOTES, _MIN_SHARE_OF_VOTES * counts[name].total())
    }


def with_literal_norms(parts: Sequence[Part], others: Sequence[Part]) -> Sequence[Part]:
    """Read ``post_attention_norm`` literally if the block also has a norm named before or after the MLP.

    Otherwise it is the norm before the MLP. If the other side has the name too, the name is enough.

    >>> parts = [Part(0, ("0", "post_attention_norm"), (8,), "float"), Part(1, ("0", "post_mlp_norm"), (8,), "float")]
    >>> with_literal_norms(parts, [])[0].path
    ('0', 'attn_post_norm')
    """
    around = set(filter(AROUND_MLP.match, {name for part in parts for name in part.path}))
    if not around or any(map(AFTER_ATTENTION.match, {name for part in others for name in part.path})):
        return parts
    beside = {part.path[:k] for part in parts for k, name in enumerate(part.path) if name in around}
    return [
        replace(
            part,
            path=tuple(
                AFTER_ATTENTION.sub("attn_post", name) if part.path[:k] in beside else name
                for k, name in enumerate(part.path)
            ),
        )
        for part in parts
    ]


def with_claimed_roles(parts: Sequence[Part]) -> Sequence[Part]:
    """Read a name as a mere number where a layer of its shapes beside it has the role's own name: `w1` beside `wg`.

    >>> parts = [Part(k, (name, "weight"), (8, 4), "float") for k, name in enumerate(("w1", "wg"))]
    >>> [part.path[0] for part in with_claimed_roles(parts)]
    ['1', 'wg']
    """
    beside: dict[tuple[Path, str, Shape], set[str]] = defaultdict(set)
    for part in parts:
        if len(part.path) > 1:
            beside[part.path[:-2], part.path[-1], part.shape].add(part.path[-2])
    plain = {
        (module, name): "".join(map(str, numbers(name)))
        for (module, _, _), names in beside.items()
        for name in names
        if len(words(name)) == 1 and words(name) != words(stem(name))  # its number is a part of the word
        if any(words(name)[0] in words(other) and not numbers(other) for other in names)
    }
    if not plain:
        return parts
    return [
        replace(part, path=(*part.path[:-2], plain[part.path[:-2], part.path[-2]], part.path[-1]))
        if (part.path[:-2], *part.path[-2:-1]) in plain
        else part
        for part in parts
    ]


def as_in_torch(parts: Sequence[Part]) -> Parts:
    """View the parts of one side in torch's layout; those that have it already stay as they are.

    >>> (part,) = as_in_torch([Part(0, ("dense", "kernel"), (8, 4), "float")])
    >>> part.shape, part.view
    ((4, 8), Transpose())
    """
    parts = Parts(parts)
    layers = [(unit, kinds) for unit in parts.units if "weight" in (kinds := dict(unit.parts))]
    shapes = [{values: parts[index].shape for values, index in kinds.items()} for _, kinds in layers]
    named = [parts[kinds["weight"]].path[-1].lower().endswith(KERNELS) for _, kinds in layers]
    is_named = any(named)
    if not is_named and sum(map(_spatial_first, shapes)) <= 0:
        return parts
    widths = Counter(shape[0] for of in shapes for shape in of.values() if len(shape) == 1).most_common(1)
    width = widths[0][0] if widths else 0
    heads = {
        of["weight"][1:]
        for (unit, _), of, is_kernel in zip(layers, shapes, named, strict=True)
        if is_kernel and _keeps_heads(unit, of)
    }
    result = [_viewed(part, Permute((0, 2, 1))) if is_named and _is_stack(part) else part for part in parts]
    for (unit, kinds), of, is_kernel in zip(layers, shapes, named, strict=True):
        view = None
        if is_kernel:
            view = _kernel_view(unit, of, heads, width)
        elif len(of["weight"]) > 3:
            view = _convolution(of["weight"], of.get("bias"))
        if view is None:
            continue
        result[kinds["weight"]] = _viewed(parts[kinds["weight"]], view)
        if len(of.get("bias", ())) > 1:
            result[kinds["bias"]] = _viewed(parts[kinds["bias"]], Reshape((prod(of["bias"]),)))
    return Parts(result)


def _is_stack(part: Part) -> bool:
    """True for kernels of equal layers, such as experts, in one parameter of another name."""
    return len(part.shape) == 3 and min(part.shape) > 1 and kind(part.path[-1])[0] == "other"


def _viewed(part: Part, view: Operation) -> Part:
    (shape,) = output_shapes(view, [part.shape])
    return replace(part, shape=shape, view=chain(part.view, view))


def _kernel_view(unit: Unit, shapes: Mapping[str, Shape], heads: set[Shape], width: int) -> Operation | None:
    """Return the view of a kernel of JAX, Keras or TensorFlow as a weight of torch; None if they are the same.

    Args:
        unit: The layer of the kernel.
        shapes: The shapes in the layer, by kind.
        heads: The numbers and sizes of heads of the projections to queries, keys and values.
        width: The size of most vectors of the network.
    """
    weight, bias = shapes["weight"], shapes.get("bias")
    if len(weight) < 2:
        return None
    if len(weight) == 2:
        return Transpose()
    if _keeps_heads(unit, shapes):
        if bias is None and weight[1] == width != weight[0]:  # (heads, in, head_dim)
            return chain(Permute((1, 0, 2)), Reshape((width, weight[0] * weight[2])), Transpose())
        return chain(Reshape((weight[0], prod(weight[1:]))), Transpose())
    is_output = weight[:2] in heads or (bias is None and weight[2] == width and _is_output(unit))
    if len(weight) == 3 and is_output and bias in (None, weight[2:]):
        return chain(Reshape((prod(weight[:2]), weight[2])), Transpose())
    return _convolution(weight, bias)


def _is_output(unit: Unit) -> bool:
    """True if the name is that of a projection that joins heads."""
    found = {word for name in unit.path[-2:] for word in words(name)}
    return "o" in found or found >= {"attn", "out"}


def _keeps_heads(unit: Unit, shapes: Mapping[str, Shape]) -> bool:
    """True for a kernel that maps to several heads: its bias has them too, or its name is that of a projection."""
    weight, bias = shapes["weight"], shapes.get("bias")
    if bias is not None:
        return len(bias) > 1 and weight[1:] == bias
    return len(weight) == 3 and not _ATTENTION_ROLES.isdisjoint(words(unit.path[-1]))


def _convolution(weight: Shape, bias: Shape | None) -> Operation:
    """Return the view of a kernel ``(*spatial, in, out)`` as torch's ``(out, in, *spatial)``.

    A kernel of several inputs and one output is depthwise, ``(*spatial, channels, 1)``, unless its bias or a spatial
    size of one shows that it sums its inputs.
    """
    last = len(weight) - 1
    *spatial, channels, outputs = weight
    is_depthwise = outputs == 1 < channels and (bias == (channels,) or (bias is None and prod(spatial) > 1))
    ends = (last - 1, last) if is_depthwise else (last, last - 1)
    return Permute((*ends, *range(last - 1)))


def _spatial_first(shapes: Mapping[str, Shape]) -> int:
    """Vote on where the weight of a convolution has its spatial dimensions: 1 first, -1 last, 0 unclear."""
    weight, bias = shapes["weight"], shapes.get("bias")
    if len(weight) < 4:
        return 0
    if bias is not None and bias in (weight[:1], weight[-1:]) and weight[0] != weight[-1]:
        return 1 if bias == weight[-1:] else -1
    first, last = weight[0] == weight[1], weight[-1] == weight[-2]
    if first == last:
        return (weight[0] < weight[-1]) - (weight[0] > weight[-1]) if first else 0
    return 1 if first else -1
