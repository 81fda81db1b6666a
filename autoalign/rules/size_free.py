"""Operations without absolute sizes, which hold for networks of any width.

The operations of a match hold the sizes of its own tensors. The ones here are relative to the shapes of their inputs:
"the second of three equal parts" instead of "rows 768 to 1536". ``size_free`` finds them from examples, and ``exact``
turns them back for given shapes. Where sizes are needed, ``Sized`` keeps them and refuses any others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod

from torch import Tensor

from autoalign.errors import InputError
from autoalign.plan.operations import (
    Chain,
    Grouped,
    InsertZeros,
    Operation,
    Parallel,
    Reshape,
    Shape,
    Split,
    Trace,
    Unstack,
    chain,
    in_parallel,
    output_shapes,
    steps_of,
)
from autoalign.plan.regions import reshape_groups

_MAX_ROLES = 3  # a leading size up to this may be a number of roles (q, k, v; two halves; colours), not of heads


@dataclass(frozen=True, slots=True)
class Relative(Operation, ABC):
    """Base of the operations that depend on the shapes of their inputs."""

    @abstractmethod
    def exact(self, shapes: Sequence[Shape]) -> Operation:
        """Return the same operation for inputs of the given shapes, with absolute sizes."""

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.exact([tuple(tensor.shape) for tensor in tensors]).apply(tensors)

    def trace(self, shapes: Sequence[Shape]) -> list[Trace]:
        return self.exact(shapes).trace(shapes)


@dataclass(frozen=True, slots=True)
class Portion(Relative):
    """The parts ``start : start + length`` of dimension ``dim`` in ``of`` equal parts: the second third.

    >>> import torch
    >>> Portion(0, 1, 1, 2).apply([torch.arange(6)])
    [tensor([3, 4, 5])]
    """

    dim: int
    start: int
    length: int
    of: int

    takes_part = True

    def exact(self, shapes: Sequence[Shape]) -> Operation:
        return in_parallel([self._split(shape) for shape in shapes])

    def _split(self, shape: Shape) -> Operation:
        unit, rest = divmod(shape[self.dim], self.of) if self.dim < len(shape) else (0, 1)
        if rest:
            raise InputError(f"'{self}' does not divide a tensor of shape {list(shape)}. Nothing was converted.")
        return Split(self.dim, self.start * unit, self.length * unit)

    def __str__(self) -> str:
        if self.length == 1:
            return f"part {self.start + 1} of {self.of} (dim {self.dim})"
        return f"parts {self.start + 1} to {self.start + self.length} of {self.of} (dim {self.dim})"


@dataclass(frozen=True, slots=True)
class Regroup(Relative):
    """A reshape in terms of the dimensions of its input.

    >>> print(Regroup(((0,), (1, 2))))
    reshape [d0, d1*d2]
    >>> import torch
    >>> Regroup(((0,), (1, 2))).apply([torch.empty(2, 3, 4)])[0].shape
    torch.Size([2, 12])
    """

    dims: tuple[tuple[int, ...] | int, ...]  # for each dimension its factors, or a size; -1: the rest

    def exact(self, shapes: Sequence[Shape]) -> Operation:
        return in_parallel([self._reshape(shape) for shape in shapes])

    def _reshape(self, shape: Shape) -> Operation:
        if len(shape) <= max((d for dim in self.dims if not isinstance(dim, int) for d in dim), default=-1):
            raise InputError(f"'{self}' does not fit a tensor of shape {list(shape)}. Nothing was converted.")
        sizes = [dim if isinstance(dim, int) else prod(shape[d] for d in dim) for dim in self.dims]
        total, known = prod(shape), prod(size for size in sizes if size != -1)
        if -1 in sizes and known and total % known == 0:
            sizes[sizes.index(-1)] = total // known
        if prod(sizes) != total or -1 in sizes:
            raise InputError(f"'{self}' does not fit a tensor of shape {list(shape)}. Nothing was converted.")
        return Reshape(tuple(sizes))

    def __str__(self) -> str:
        named = (str(dim) if isinstance(dim, int) else "*".join(f"d{d}" for d in dim) or "1" for dim in self.dims)
        return f"reshape [{', '.join(named)}]"


@dataclass(frozen=True, slots=True)
class ZerosLike(Relative):
    """Zeros of the shape of input ``like`` before input ``index``."""

    index: int
    like: int

    def exact(self, shapes: Sequence[Shape]) -> Operation:
        return InsertZeros(self.index, shapes[self.like])

    def __str__(self) -> str:
        return f"zeros at {self.index}, shaped like {self.like}"


@dataclass(frozen=True, slots=True)
class Pick(Operation):
    """Some of the inputs, by place.

    >>> Pick((1,)).apply(["a", "b"])
    ['b']
    """

    places: tuple[int, ...]

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[place] for place in self.places]

    def __str__(self) -> str:
        return f"take {', '.join(str(place + 1) for place in self.places)}"


@dataclass(frozen=True, slots=True)
class Each(Operation):
    """Every slice of dimension ``dim`` in turn, each into a target of its own; ``at`` selects one of them."""

    dim: int

    takes_part = True

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [part for tensor in tensors for part in tensor.unbind(self.dim)]

    def __str__(self) -> str:
        return f"slice n (dim {self.dim})"


@dataclass(frozen=True, slots=True)
class Sized(Relative):
    """An operation that holds for some sizes only and refuses tensors of others."""

    shapes: tuple[Shape, ...]
    operation: Operation

    @property
    def parts(self) -> tuple[Operation, ...]:
        return (self.operation,)

    def exact(self, shapes: Sequence[Shape]) -> Operation:
        if tuple(shapes) != self.shapes:
            raise InputError(
                f"'{self.operation}' was found for {_shapes_text(self.shapes)} and cannot be carried over to "
                f"{_shapes_text(shapes)}. Nothing was converted. Align this pair itself."
            )
        return self.operation

    def __str__(self) -> str:
        return f"{self.operation} of {_shapes_text(self.shapes[:1])} only"


Sample = tuple[Operation, tuple[Shape, ...]]  # an operation and the shapes of its inputs


def _rebuilt(samples: Sequence[Sample], rebuild: Callable[[Sequence[Sample]], Operation | None]) -> Operation | None:
    """Build one operation from samples of one skeleton, part by part; None if ``rebuild`` returns it for any part."""
    first, _ = samples[0]
    if not first.parts or isinstance(first, Relative):
        return rebuild(samples)
    parts: list[Operation] = []
    shapes = [own for _, own in samples]  # of the inputs of the part
    for place in range(len(first.parts)):
        inner = [(operation.parts[place], own) for (operation, _), own in zip(samples, shapes, strict=True)]
        if isinstance(first, Grouped):
            starts = range(0, len(samples[0][1]), first.size)
            inner = [(operation, own[start : start + first.size]) for operation, own in inner for start in starts]
        elif isinstance(first, Parallel):
            inner = [(operation, tuple(first.runs(own)[place][1])) for operation, own in inner]
        found = _rebuilt(inner, rebuild)
        if found is None:
            return None
        parts.append(found)
        if isinstance(first, Chain) and place + 1 < len(first.parts):
            shapes = [tuple(output_shapes(operation, own)) for operation, own in inner]
    if isinstance(first, Grouped):
        return Grouped(first.size, *parts)
    return Parallel(tuple(parts)) if isinstance(first, Parallel) else chain(*parts)


@lru_cache(maxsize=4096)
def exact(operation: Operation, shapes: tuple[Shape, ...]) -> Operation:
    """Return what an operation does to inputs of the given shapes, with absolute sizes.

    >>> exact(Portion(0, 2, 1, 3), ((6, 5),))
    Split(dim=0, start=4, length=2)
    """

    def absolute(samples: Sequence[Sample]) -> Operation:
        ways = {own.exact(given) if isinstance(own, Relative) else own for own, given in samples}
        if len(ways) > 1:
            raise InputError(f"'{operation}' does not fit tensors of unequal shapes. Nothing was converted.")
        return ways.pop()

    found = _rebuilt([(operation, shapes)], absolute)
    assert found is not None
    return found


def at(operation: Operation, index: int) -> Operation:
    """Replace ``Each`` by one slice.

    >>> at(Each(0), 2)
    Unstack(dim=0, index=2)
    """
    return chain(*(Unstack(step.dim, index) if isinstance(step, Each) else step for step in steps_of(operation)))


def slice_count(operation: Operation, shapes: tuple[Shape, ...]) -> int | None:
    """Count the slices that ``Each`` takes of inputs of the given shapes; None for an operation without it."""
    steps = steps_of(operation)
    for place, step in enumerate(steps):
        if isinstance(step, Each):
            (shape,) = output_shapes(exact(chain(*steps[:place]), shapes), shapes)
            return shape[step.dim]
    return None


def _shapes_text(shapes: Sequence[Shape]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)


def size_free(samples: Sequence[Sample], *, even: bool = False, spread: bool = False) -> Operation | None:
    """Find one operation that does the same as each sample, with as few absolute sizes as possible.

    >>> print(size_free([(Split(0, 2, 2), ((6, 4),)), (Split(0, 5, 5), ((15, 4),))], even=True))
    part 2 of 3 (dim 0)
    >>> print(size_free([(Split(0, 4, 1), ((6, 4),))]))
    split(dim 0, 4:5) of [6, 4] only

    None if there is no single one. Parts are known to be equal if ``even``; else they are only taken as such where
    several sizes agree. With ``spread``, slices by ``Unstack`` stand for each slice in turn.
    """
    if len({skeleton(operation) for operation, _ in samples}) > 1:
        return None
    return _rebuilt(samples, lambda inner: _relative(list(dict.fromkeys(inner)), even=even, spread=spread))


def _relative(samples: Sequence[Sample], *, even: bool, spread: bool) -> Operation | None:
    """Find one operation for samples that are not made of others."""
    first, shapes = samples[0]
    match first:
        case Split(dim):
            free = _portion(dim, [(op, own[0][dim]) for op, own in samples if isinstance(op, Split)], even=even)
            return free or _sized(samples)
        case Reshape():
            return _regroup([(own, op.shape) for op, own in samples if isinstance(op, Reshape)]) or _sized(samples)
        case InsertZeros(index):
            zeros = [(op.shape, own) for op, own in samples if isinstance(op, InsertZeros)]
            for place in range(len(shapes)):
                if all(own[place : place + 1] == (shape,) for shape, own in zeros):
                    return ZerosLike(index, place)
            return _sized(samples)
        case Unstack(dim) if spread:
            return Each(dim)
    if first.adapts:
        return _sized(samples)
    return first if len({operation for operation, _ in samples}) == 1 else None


def skeleton(operation: Operation) -> object:
    """Return an operation without its sizes, to compare the kinds of two."""
    match operation:
        case Split(dim) | Unstack(dim) | InsertZeros(dim):
            return type(operation), dim
        case Grouped(size):
            return Grouped, size, skeleton(operation.operation)
        case Reshape():
            return Reshape
    if operation.parts:
        return type(operation), tuple(map(skeleton, operation.parts))
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
    """Express each size of the result as a product of input sizes, as a constant, or as the rest."""
    if any(len(set(shapes)) > 1 for shapes, _ in reshapes):
        return None
    rows = [(shapes[0], wanted) for shapes, wanted in reshapes]
    shape, wanted = rows[0]
    groups = _groups(shape, wanted)
    if any(len(own) != len(shape) or _groups(own, other) != groups for own, other in rows):
        return None
    dims: list[tuple[int, ...] | int] = []
    varying = {place for place in range(len(wanted)) if len({other[place] for _, other in rows}) > 1}
    place_of = {place: group for group in groups for place in group[1]}
    for place in range(len(wanted)):
        own, places = place_of.get(place, ((), (place,)))
        if len(places) == 1:
            dims.append(own)
            continue
        is_heads = place == _heads_place([wanted[p] for p in places], places) and not varying & ({*places} - {place})
        if (place in varying or is_heads) and -1 not in dims:
            dims.append(-1)
        elif place in varying:
            return None
        else:
            dims.append(wanted[place])
    result = Regroup(tuple(dims))
    return result if all(_fits(result, *row) for row in rows) else None


def _heads_place(sizes: Sequence[int], places: Sequence[int]) -> int | None:
    """Choose what is left open in a dimension that is split up: the number of heads, which comes first or second."""
    if sizes[0] > _MAX_ROLES:
        return places[0]
    return places[1] if len(places) > 2 else None


def _fits(regroup: Regroup, shape: Shape, wanted: Shape) -> bool:
    try:
        return regroup.exact([shape]) == Reshape(wanted)
    except InputError:
        return False


def _groups(shape: Shape, wanted: Shape) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Pair runs of dimensions of two shapes that hold the same elements, without those of size 1.

    >>> _groups((768, 12, 64, 1), (768, 768))
    [((0,), (0,)), ((1, 2), (1,))]
    """
    groups = [
        (tuple(place for place in own if shape[place] != 1), tuple(place for place in other if wanted[place] != 1))
        for own, other in reshape_groups(shape, wanted)
    ]
    return [group for group in groups if any(group)]
