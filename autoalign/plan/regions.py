"""Joining: what puts the parts of a tensor together again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from autoalign.plan.operations import (
    Chain,
    Concatenate,
    Copy,
    Flip,
    Grouped,
    InsertZeros,
    Operation,
    Parallel,
    Permute,
    Reshape,
    Shape,
    Split,
    Stack,
    Transpose,
    Unstack,
    chain,
    output_shapes,
    steps_of,
)

Region: TypeAlias = tuple[tuple[int, int], ...]  # of a tensor: where it starts and how long it is, in each dimension


def narrowed(tensor: Tensor, region: Region) -> Tensor:
    """Take a region of a tensor, as a view.

    >>> narrowed(torch.arange(6).reshape(2, 3), ((1, 1), (0, 2)))
    tensor([[3, 4]])
    """
    for dim, (start, length) in enumerate(region):
        if (start, length) != (0, tensor.shape[dim]):
            tensor = tensor.narrow(dim, start, length)
    return tensor


def joined(shape: Shape, views: Sequence[Operation]) -> Operation | None:
    """Find what puts the parts of a tensor together again.

    >>> from autoalign.plan.operations import Transpose
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


@dataclass(frozen=True, slots=True)
class Regional:
    """A tensor of which any region can be had, and of which no more than that is read."""

    shape: Shape
    dtype: torch.dtype
    read: Callable[[Region], Tensor] = field(repr=False)

    def whole(self) -> Tensor:
        """Read all of it."""
        return self.read(tuple((0, size) for size in self.shape))


def evaluated(operation: Operation, inputs: Sequence[Regional]) -> list[Regional]:
    """Apply an operation without reading anything yet.

    >>> source = Regional((4,), torch.int64, lambda region: narrowed(torch.arange(4), region))
    >>> (result,) = evaluated(Split(0, 2, 2), [source])
    >>> result.shape, result.read(((1, 1),))
    ((2,), tensor([3]))
    """
    match operation:
        case Copy():
            return list(inputs)
        case Chain(steps):
            results = list(inputs)
            for step in steps:
                results = evaluated(step, results)
            return results
        case Parallel(steps):
            pairs = zip(steps, inputs, strict=True)
            return [result for step, given in pairs for result in evaluated(step, [given])]
        case Grouped(size, step):
            starts = range(0, len(inputs), size)
            return [result for start in starts for result in evaluated(step, inputs[start : start + size])]
        case Transpose():
            return [_permuted(given, (1, 0, *range(2, len(given.shape)))) for given in inputs]
        case Permute(dims):
            return [_permuted(given, dims) for given in inputs]
        case Split(dim, start, length):
            return [_split(given, dim % len(given.shape), start, length) for given in inputs]
        case Unstack(dim, index):
            return [_unstacked(given, dim % len(given.shape), index) for given in inputs]
        case Flip(dim):
            return [_flipped(given, dim % len(given.shape)) for given in inputs]
        case Concatenate(dim):
            return [_concatenated(inputs, dim % len(inputs[0].shape))]
        case Stack(dim):
            at = dim % (len(inputs[0].shape) + 1)
            return [_concatenated([_reshaped(given, _with(given.shape, at)) for given in inputs], at)]
        case InsertZeros(index, shape):
            return [*inputs[:index], _zeros(shape, inputs[0].dtype), *inputs[index:]]
        case Reshape(shape):
            return [_reshaped(given, _known(shape, given.shape)) for given in inputs]
        case _:
            return _as_a_whole(operation, inputs)


def _permuted(given: Regional, dims: Sequence[int]) -> Regional:
    def read(region: Region) -> Tensor:
        inner = tuple(region[dims.index(dim)] for dim in range(len(dims)))
        return given.read(inner).permute(*dims)

    return Regional(tuple(given.shape[dim] for dim in dims), given.dtype, read)


def _split(given: Regional, dim: int, start: int, length: int) -> Regional:
    def read(region: Region) -> Tensor:
        first, count = region[dim]
        return given.read((*region[:dim], (start + first, count), *region[dim + 1 :]))

    return Regional((*given.shape[:dim], length, *given.shape[dim + 1 :]), given.dtype, read)


def _unstacked(given: Regional, dim: int, index: int) -> Regional:
    def read(region: Region) -> Tensor:
        return given.read((*region[:dim], (index % given.shape[dim], 1), *region[dim:])).squeeze(dim)

    return Regional((*given.shape[:dim], *given.shape[dim + 1 :]), given.dtype, read)


def _flipped(given: Regional, dim: int) -> Regional:
    def read(region: Region) -> Tensor:
        start, length = region[dim]
        inner = (*region[:dim], (given.shape[dim] - start - length, length), *region[dim + 1 :])
        return given.read(inner).flip(dim)

    return Regional(given.shape, given.dtype, read)


def _concatenated(inputs: Sequence[Regional], dim: int) -> Regional:
    def read(region: Region) -> Tensor:
        start, length = region[dim]
        parts, offset = [], 0
        for given in inputs:
            size = given.shape[dim]
            first, end = max(start - offset, 0), min(start + length - offset, size)
            if first < end:
                parts.append(given.read((*region[:dim], (first, end - first), *region[dim + 1 :])))
            offset += size
        if not parts:
            return torch.empty([count for _, count in region], dtype=inputs[0].dtype, device="cpu")
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    shape = (*inputs[0].shape[:dim], sum(given.shape[dim] for given in inputs), *inputs[0].shape[dim + 1 :])
    return Regional(shape, inputs[0].dtype, read)


def _zeros(shape: Shape, dtype: torch.dtype) -> Regional:
    return Regional(
        tuple(shape), dtype, lambda region: torch.zeros([count for _, count in region], dtype=dtype, device="cpu")
    )


def _with(shape: Shape, dim: int) -> Shape:
    return (*shape[:dim], 1, *shape[dim:])


def _known(shape: Shape, old: Shape) -> Shape:
    """Fill in the one size of a shape that may be -1."""
    rest = prod(size for size in shape if size >= 0)
    return tuple(size if size >= 0 else prod(old) // max(rest, 1) for size in shape)


def _reshaped(given: Regional, shape: Shape) -> Regional:
    def read(region: Region) -> Tensor:
        if not prod(count for _, count in region):
            return torch.empty([count for _, count in region], dtype=given.dtype, device="cpu")
        inner: list[tuple[int, int]] = []
        runs: list[tuple[int, int]] = []  # of each group's elements, where the region is in what is read
        outer: list[tuple[int, int]] = []  # and where it is in them once they have the new shape
        sizes: list[int] = []
        for old, new in _groups(given.shape, shape):
            sides = [shape[dim] for dim in new], [region[dim] for dim in new]
            run = _run(*sides)
            inner_sizes = [given.shape[dim] for dim in old]
            if run is None:  # not one run of elements: all of the group is read
                start, length, rows = 0, prod(inner_sizes), list(sides[1])
                sizes += sides[0]
            else:
                start, length = run
                rows = [(0, count) for _, count in sides[1]]
                sizes += [count for _, count in sides[1]]
            outer += rows
            regions, first = _rows(inner_sizes, start, length)
            inner += regions
            runs.append((first, length))
        tensor = given.read(tuple(inner))
        groups = list(_groups(given.shape, shape))
        tensor = tensor.reshape([prod(inner[dim][1] for dim in old) for old, _ in groups])
        return narrowed(narrowed(tensor, tuple(runs)).reshape(sizes), tuple(outer))

    return Regional(tuple(shape), given.dtype, read)


def _groups(old: Shape, new: Shape) -> Iterator[tuple[list[int], list[int]]]:
    """Pair the smallest runs of dimensions that hold the same elements, dimensions of size 1 with what precedes."""
    i = j = 0
    while i < len(old) or j < len(new):
        left: list[int] = []
        right: list[int] = []
        sizes = [1, 1]
        while not (left or right) or sizes[0] != sizes[1]:
            if i < len(old) and (sizes[0] <= sizes[1] or j == len(new)):
                sizes[0] *= old[i]
                left.append(i)
                i += 1
            else:
                sizes[1] *= new[j]
                right.append(j)
                j += 1
        while i < len(old) and old[i] == 1:
            left.append(i)
            i += 1
        while j < len(new) and new[j] == 1:
            right.append(j)
            j += 1
        yield left, right


def _run(sizes: Sequence[int], region: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Tell which run of elements a region is; None if it is several."""
    start, length, is_open = 0, 1, False
    for size, (first, count) in zip(sizes, region, strict=True):
        if is_open and (first, count) != (0, size):  # the dimensions before it are not single rows
            return None
        start, length = start * size + first, length * count
        is_open = is_open or count > 1
    return start, length


def _rows(sizes: Sequence[int], start: int, length: int) -> tuple[list[tuple[int, int]], int]:
    """Find the smallest region of these dimensions with a run of elements in it, and where the run begins in it."""
    regions: list[tuple[int, int]] = []
    for place, _ in enumerate(sizes):
        inner = prod(sizes[place + 1 :])
        first, last = start // inner, (start + length - 1) // inner
        regions.append((first, last - first + 1))
        start -= first * inner
        if last > first:
            return regions + [(0, size) for size in sizes[place + 1 :]], start
    return regions, start


def _as_a_whole(operation: Operation, inputs: Sequence[Regional]) -> list[Regional]:
    shapes = output_shapes(operation, [given.shape for given in inputs])

    def reader(place: int) -> Callable[[Region], Tensor]:
        return lambda region: narrowed(operation.apply([given.whole() for given in inputs])[place], region)

    return [Regional(shape, inputs[0].dtype, reader(place)) for place, shape in enumerate(shapes)]
