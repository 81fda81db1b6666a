"""Kernels: layers laid out as JAX, Keras and TensorFlow do, seen as torch lays them out.

There, a dense kernel is ``(in, out)``, that of a convolution ``(*spatial, in, out)``, and those of attention keep heads
apart: ``(in, heads, head_dim)`` or ``(heads, in, head_dim)``, and ``(heads, head_dim, out)``. A layout is a property of
a whole checkpoint: where its names or its own biases tell it, each tensor is viewed in torch's layout before anything
is compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from autoalign.names import kind, words
from autoalign.operations import Operation, Permute, Reshape, Shape, Transpose, chain, output_shapes
from autoalign.units import Part, Parts, Unit
from autoalign.vocabulary import FUSED, KERNELS

_ROLES = frozenset(role for word in ("qkv", "gateup") for roles in FUSED[word] for role in roles)


def as_in_torch(parts: Sequence[Part]) -> Parts:
    """View the parts of one side as torch lays them out; those that are laid out so already stay as they are.

    >>> (part,) = as_in_torch([Part(0, ("dense", "kernel"), (8, 4), "float")])
    >>> part.shape, part.view
    ((4, 8), Transpose())
    """
    parts = Parts(parts)
    layers = [(unit, kinds) for unit in parts.units if "weight" in (kinds := dict(unit.parts))]
    shapes = [{values: parts[index].shape for values, index in kinds.items()} for _, kinds in layers]
    named = [_is_kernel(parts[kinds["weight"]]) for _, kinds in layers]
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


def _is_kernel(part: Part) -> bool:
    return part.path[-1].lower().endswith(KERNELS)


def _is_stack(part: Part) -> bool:
    """Tell kernels of equal layers, such as experts, that one parameter of another name holds."""
    return len(part.shape) == 3 and min(part.shape) > 1 and kind(part.path[-1])[0] == "other"


def _viewed(part: Part, view: Operation) -> Part:
    (shape,) = output_shapes(view, [part.shape])
    return replace(part, shape=shape, view=chain(part.view, view))


def _kernel_view(unit: Unit, shapes: Mapping[str, Shape], heads: set[Shape], width: int) -> Operation | None:
    """Tell how a kernel of JAX, Keras or TensorFlow is turned into a weight of torch.

    Args:
        unit: Its layer.
        shapes: Of what the layer holds.
        heads: The numbers and sizes of heads of the projections to queries, keys and values.
        width: Of the network: the size of most vectors.
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
    """Tell the projection that joins heads by its name."""
    found = {word for name in unit.path[-2:] for word in words(name)}
    return "o" in found or found >= {"attn", "out"}


def _keeps_heads(unit: Unit, shapes: Mapping[str, Shape]) -> bool:
    """Tell a kernel that maps to several heads: its bias has them too, or its name is that of a projection."""
    weight, bias = shapes["weight"], shapes.get("bias")
    if bias is not None:
        return len(bias) > 1 and weight[1:] == bias
    return len(weight) == 3 and not _ROLES.isdisjoint(words(unit.path[-1]))


def _convolution(weight: Shape, bias: Shape | None) -> Operation:
    """Return the view of a kernel ``(*spatial, in, out)`` as torch's ``(out, in, *spatial)``.

    One of several inputs and one output is depthwise, ``(*spatial, channels, 1)``, unless its bias or its size of one
    shows that it adds up its inputs.
    """
    last = len(weight) - 1
    *spatial, channels, outputs = weight
    is_depthwise = outputs == 1 < channels and (bias == (channels,) or (bias is None and prod(spatial) > 1))
    ends = (last - 1, last) if is_depthwise else (last, last - 1)
    return Permute((*ends, *range(last - 1)))


def _spatial_first(shapes: Mapping[str, Shape]) -> int:
    """Vote on where the weight of a convolution has its spatial dimensions: 1 first, -1 last, 0 no telling."""
    weight, bias = shapes["weight"], shapes.get("bias")
    if len(weight) < 4:
        return 0
    if bias is not None and bias in (weight[:1], weight[-1:]) and weight[0] != weight[-1]:
        return 1 if bias == weight[-1:] else -1
    first, last = weight[0] == weight[1], weight[-1] == weight[-2]
    if first == last:
        return (weight[0] < weight[-1]) - (weight[0] > weight[-1]) if first else 0
    return 1 if first else -1
