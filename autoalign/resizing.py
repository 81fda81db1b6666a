"""From operations with sizes to one without, which holds for all the tensors that it was seen on, and for their kin."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod

from autoalign.errors import InputError
from autoalign.operations import (
    Chain,
    Grouped,
    InsertZeros,
    Operation,
    Parallel,
    Reshape,
    Shape,
    Split,
    Unstack,
    chain,
    output_shapes,
)
from autoalign.relative import Each, Portion, Regroup, Relative, Sized, ZerosLike

Sample = tuple[Operation, tuple[Shape, ...]]  # an operation and the shapes of its inputs
_COUNT = 3  # a leading size up to this may be a number of roles (q, k, v; two halves; colours) and not of heads


def size_free(samples: Sequence[Sample], *, even: bool = False, spread: bool = False) -> Operation | None:
    """Find one operation that does what each sample does, with as few absolute sizes as can be.

    >>> print(size_free([(Split(0, 2, 2), ((6, 4),)), (Split(0, 5, 5), ((15, 4),))], even=True))
    part 2 of 3 (dim 0)
    >>> print(size_free([(Split(0, 4, 1), ((6, 4),))]))
    split(dim 0, 4:5) of [6, 4] only

    Args:
        samples: At least one.
        even: Whether parts are known to be equal; else they are only taken so where several sizes agree.
        spread: Whether slices by ``Unstack`` stand for each slice in turn.

    Returns:
        The operation, or None if there is no single one.
    """
    samples = list(dict.fromkeys(samples))
    first, shapes = samples[0]
    if len({skeleton(operation) for operation, _ in samples}) > 1:
        return None
    match first:
        case Chain(steps):
            done = []
            current = [(operation, list(own)) for operation, own in samples]
            for place in range(len(steps)):
                step = size_free([(op.steps[place], tuple(own)) for op, own in current], even=even, spread=spread)  # type: ignore[attr-defined]
                if step is None:
                    return None
                done.append(step)
                current = [(op, output_shapes(op.steps[place], own)) for op, own in current]  # type: ignore[attr-defined]
            return chain(*done)
        case Grouped(size, _):
            groups = [
                (op.operation, own[start : start + size])  # type: ignore[attr-defined]
                for op, own in samples
                for start in range(0, len(own), size)
            ]
            inner = size_free(groups, even=even)
            return None if inner is None else Grouped(size, inner)
        case Parallel(operations):
            sides = [
                size_free([(op.operations[place], (own[place],)) for op, own in samples], even=even)  # type: ignore[attr-defined]
                for place in range(len(operations))
            ]
            known = [side for side in sides if side is not None]
            return Parallel(tuple(known)) if len(known) == len(sides) else None
        case Split(dim):
            free = _portion(dim, [(op, own[0][dim]) for op, own in samples if isinstance(op, Split)], even=even)
            return free or _sized(samples)
        case Reshape():
            return _regroup([(own, op.shape) for op, own in samples if isinstance(op, Reshape)]) or _sized(samples)
        case InsertZeros(index):
            places = [
                place
                for place in range(len(shapes))
                if all(place < len(own) and own[place] == op.shape for op, own in samples)  # type: ignore[attr-defined]
            ]
            return ZerosLike(index, places[0]) if places else _sized(samples)
        case Unstack(dim) if spread:
            return Each(dim)
    if first.adapts:
        return _sized(samples)
    return first if len({operation for operation, _ in samples}) == 1 else None


def skeleton(operation: Operation) -> object:
    """Leave the sizes out of an operation, to see whether two are of one kind."""
    match operation:
        case Chain(steps) | Parallel(steps):
            return type(operation), tuple(map(skeleton, steps))
        case Grouped(size, inner):
            return Grouped, size, skeleton(inner)
        case Split(dim) | Unstack(dim) | InsertZeros(dim):
            return type(operation), dim
        case Reshape():
            return Reshape
    return type(operation) if operation.adapts else operation


def _sized(samples: Sequence[Sample]) -> Operation | None:
    ((operation, shapes), *others) = samples
    return None if others or isinstance(operation, Relative) else Sized(shapes, operation)


def _portion(dim: int, splits: Sequence[tuple[Split, int]], *, even: bool) -> Operation | None:
    ways = set()
    for split, size in splits:
        unit = split.length if even else gcd(split.start, split.length, size)
        if not unit or size % unit or split.start % unit:
            return None
        ways.add((split.start // unit, split.length // unit, size // unit))
    if len(ways) > 1 or not (even or len({size for _, size in splits}) > 1):
        return None
    return Portion(dim, *ways.pop())


def _regroup(reshapes: Sequence[tuple[Sequence[Shape], Shape]]) -> Operation | None:
    """Say each size of the result as a product of sizes that come in, as a constant, or as what is left."""
    rows = []
    for shapes, wanted in reshapes:
        if len(set(shapes)) > 1:
            return None
        rows.append((shapes[0], wanted, _groups(shapes[0], wanted)))
    if len({(len(shape), tuple(map(str, groups))) for shape, _, groups in rows}) > 1:
        return None
    dims: list[tuple[int, ...] | int] = []
    _, wanted, groups = rows[0]
    free = False
    place_of = {place: (own, places) for own, places in groups for place in places}
    for place in range(len(wanted)):
        sizes = {result[place] for _, result, _ in rows}
        own, places = place_of.get(place, ((), (place,)))
        if len(places) == 1:
            dims.append(own)
            continue
        varies = len(sizes) > 1
        heads = place == _open_place([wanted[p] for p in places], places)
        if (varies or (heads and not _varying(rows, places, beside=place))) and not free:
            dims.append(-1)
            free = True
        elif varies:
            return None
        else:
            dims.append(wanted[place])
    result = Regroup(tuple(dims))
    return result if all(_fits(result, own, want) for own, want, _ in rows) else None


def _open_place(sizes: Sequence[int], places: Sequence[int]) -> int | None:
    """Choose what is left open in a dimension that is taken apart: the number of heads, which comes first or second."""
    if sizes[0] > _COUNT:
        return places[0]
    return places[1] if len(places) > 2 else None


def _varying(rows: Sequence[tuple[Shape, Shape, object]], places: Sequence[int], *, beside: int) -> bool:
    return any(len({wanted[place] for _, wanted, _ in rows}) > 1 for place in places if place != beside)


def _fits(regroup: Regroup, shape: Shape, wanted: Shape) -> bool:
    try:
        return regroup.exact([shape]) == Reshape(wanted)
    except InputError:
        return False


def _groups(shape: Shape, wanted: Shape) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Pair runs of dimensions of two shapes that hold the same elements; those of size 1 stand in none.

    >>> _groups((768, 12, 64, 1), (768, 768))
    [((0,), (0,)), ((1, 2), (1,))]
    """
    own = [place for place, size in enumerate(shape) if size != 1]
    other = [place for place, size in enumerate(wanted) if size != 1]
    groups = []
    while own and other:
        left, right = [own.pop(0)], [other.pop(0)]
        while (have := prod(shape[p] for p in left)) != (want := prod(wanted[p] for p in right)):
            side, rest = (left, own) if have < want else (right, other)
            if not rest:
                return []
            side.append(rest.pop(0))
        groups.append((tuple(left), tuple(right)))
    return groups if not own and not other else []
