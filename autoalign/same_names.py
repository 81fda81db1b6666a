"""Same names: the easy case, in which both sides list the same tensors under the same names, a few layers aside.

It is taken only where it proves itself: each of these few is the only layer of its shapes, on both sides, and none of
the others has a tensor of as many elements, in whatever layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from autoalign.assembly import Found, SideParts, assembled
from autoalign.candidates import operation_between
from autoalign.matches import Match
from autoalign.names import split_key
from autoalign.operations import Shape
from autoalign.specs import TensorSpec
from autoalign.units import Part, Unit

_MOST = 0.5  # share of the tensors that may have other names or shapes
_FEW = 32  # such tensors, which are seldom the only ones of their shapes if they are more
_SURE = 0.99  # the confidence where shapes alone tell, beyond doubt
_BY_NAME = {"name": 1.0, "shape": 1.0}
_BY_SHAPE = {"structure": 1.0, "shape": 1.0}

_Content = tuple[tuple[str, str, Shape], ...]  # kind, numeric and flat shape of each tensor of a layer


def with_same_names(source: Sequence[TensorSpec], target: Sequence[TensorSpec]) -> list[Match] | None:
    """Match two sides by the same names; None where that does not match each tensor of either side for certain.

    >>> import torch
    >>> shapes = {"a.weight": (3, 2), "b.weight": (4, 3), "c.weight": (5, 4)}
    >>> source = [TensorSpec(key, shape, torch.float32) for key, shape in shapes.items()]
    >>> target = [*source[:2], TensorSpec("head.weight", (5, 4), torch.float32)]
    >>> [(match.sources, match.target) for match in with_same_names(source, target) or ()][2:]
    [(('c.weight',), 'head.weight')]

    Args:
        source: The tensors of the source.
        target: Those of the target.
    """
    shapes = {spec.key: spec.shape for spec in source}
    if len(shapes) != len(target):
        return None
    rest = [spec for spec in target if shapes.get(spec.key) != spec.shape]
    if not rest:
        return [Match(spec.key, (spec.key,), evidence=_BY_NAME) for spec in target]
    if len(rest) > min(_MOST * len(target), _FEW):
        return None
    known = {spec.key: spec.shape for spec in target if shapes.get(spec.key) == spec.shape}
    own = [spec for spec in source if spec.key not in known]
    modules = {split_key(key)[0] for key in known}
    if any(split_key(spec.key)[0] in modules for spec in (*own, *rest)):  # parts of layers that are known otherwise
        return None
    found = _only_ones(own, rest, set(map(prod, known.values())))
    return found and [Match(key, (key,), evidence=_BY_NAME) for key in known] + found


def _only_ones(source: Sequence[TensorSpec], target: Sequence[TensorSpec], others: set[int]) -> list[Match] | None:
    """Match layers that are the only ones of their shapes.

    Args:
        source: Tensors of the source.
        target: As many of the target.
        others: The numbers of elements of all other tensors.
    """
    sides = SideParts.of(source, {}), SideParts.of(target, {})
    own, other = ({_content(unit, side.parts): unit for unit in side.parts.units} for side in sides)
    if len(own) < len(sides[0].parts.units) or len(other) < len(sides[1].parts.units) or own.keys() != other.keys():
        return None
    if any(max(prod(shape) for _, _, shape in content) in others for content in own):
        return None
    found = {}
    for content, unit in own.items():
        for (_, a), (_, b) in zip(unit.parts, other[content].parts, strict=True):
            operation = operation_between(sides[0].parts[a].shape, sides[1].parts[b].shape)
            if operation is None:
                return None
            found[b] = Found(a, operation, _SURE, _BY_SHAPE, None)
    matches = assembled(*sides, found)
    return matches if len(matches) == len(target) and all(match.confidence == _SURE for match in matches) else None


def _content(unit: Unit, parts: Sequence[Part]) -> _Content:
    return tuple((kind, parts[index].numeric, _flat(parts[index].shape)) for kind, index in unit.parts)


def _flat(shape: Shape) -> Shape:
    return (shape[0], prod(shape[1:])) if shape else (1, 1)
