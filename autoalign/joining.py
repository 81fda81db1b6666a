"""Joining: what puts the parts of a tensor together again."""

from __future__ import annotations

from collections.abc import Sequence

from autoalign.operations import (
    Concatenate,
    Copy,
    Grouped,
    Operation,
    Parallel,
    Shape,
    Split,
    Stack,
    Unstack,
    chain,
    output_shapes,
    steps_of,
)


def joined(shape: Shape, views: Sequence[Operation]) -> Operation | None:
    """Find what puts the parts of a tensor together again.

    >>> from autoalign.operations import Transpose
    >>> print(joined((6, 2), [Split(0, 0, 4), Split(0, 4, 2)]))
    concatenate(dim 0)
    >>> print(joined((6, 2), [chain(Transpose(), Split(0, 0, 1)), chain(Transpose(), Split(0, 1, 1))]))
    concatenate(dim 0) + transpose
    >>> joined((6, 2), [Split(0, 0, 4)]) is None
    True

    Args:
        shape: Of the whole tensor.
        views: What took each part out of it, in the order of ``place_of``.

    Returns:
        From the parts, in this order, to the tensor; None if they overlap or leave something out.
    """
    steps = [steps_of(view) for view in views]
    if len(views) == 1 and not steps[0]:
        return Copy()
    if not all(steps):
        return None
    first = steps[0][0]
    rests = [chain(*rest) for _, *rest in steps]
    if not first.takes_part:
        if any(own[0] != first for own in steps):
            return None
        inner = joined(output_shapes(first, [shape])[0], rests)
        return None if inner is None else chain(inner, first.trace([shape])[0].restore)
    groups: dict[Operation, list[Operation]] = {}
    for (step, *_), rest in zip(steps, rests, strict=True):
        groups.setdefault(step, []).append(rest)
    join = _join(shape, list(groups))
    inner_joins = [joined(output_shapes(step, [shape])[0], members) for step, members in groups.items()]
    if join is None or any(inner is None for inner in inner_joins):
        return None
    known = [inner for inner in inner_joins if inner is not None]
    if len(groups) == len(views):
        return chain(known[0] if len(set(known)) == 1 else Parallel(tuple(known)), join)
    if len({(inner, len(members)) for inner, members in zip(known, groups.values(), strict=True)}) > 1:
        return None
    return chain(Grouped(len(views) // len(groups), known[0]), join)


def place_of(view: Operation) -> tuple[int, ...]:
    """Order parts by their places in the tensor that they were taken from.

    >>> place_of(Split(0, 4, 2)) > place_of(Split(0, 0, 4))
    True
    """
    places = []
    for step in steps_of(view):
        if isinstance(step, Split):
            places.append(step.start)
        elif isinstance(step, Unstack):
            places.append(step.index)
    return tuple(places)


def _join(shape: Shape, parts: Sequence[Operation]) -> Operation | None:
    """Find what joins slices or ranges, in order, if they make up the whole tensor."""
    dims = {part.dim for part in parts if isinstance(part, Split | Unstack)}
    if len(dims) != 1:
        return None
    dim = dims.pop()
    slices = [part.index for part in parts if isinstance(part, Unstack)]
    if slices == list(range(shape[dim])) and len(slices) == len(parts):
        return Stack(dim)
    end = 0
    for part in parts:
        if not isinstance(part, Split) or part.start != end:
            return None
        end += part.length
    return Concatenate(dim) if end == shape[dim] else None
