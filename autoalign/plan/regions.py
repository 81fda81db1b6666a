"""Parts of tensors: the operation that puts them together, and regions of a result from the least of its sources."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import lcm, prod
from typing import TypeAlias

import torch
from torch import Tensor

from autoalign.plan.dequantise import SCHEMES, Dequantise, Scheme, block_size
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
    in_parallel,
    output_shapes,
    steps_of,
)

Region: TypeAlias = tuple[tuple[int, int], ...]  # of a tensor: where it starts and how long it is, in each dimension
Piece: TypeAlias = tuple[Region, Tensor]  # the values of a region
PIECE_ELEMENTS = 2**21
_OF_ROWS = frozenset({"codes", "scale", "zero", "scale nested"})  # roles of inputs that have the rows of the values


def narrowed(tensor: Tensor, region: Region) -> Tensor:
    """Return a region of a tensor, as a view.

    >>> narrowed(torch.arange(6).reshape(2, 3), ((1, 1), (0, 2)))
    tensor([[3, 4]])
    """
    for dim, (start, length) in enumerate(region):
        if (start, length) != (0, tensor.shape[dim]):
            tensor = tensor.narrow(dim, start, length)
    return tensor


def joined(shape: Shape, views: Sequence[Operation]) -> Operation | None:
    """Find the operation that puts the parts of a tensor together again; None if they overlap or leave something out.

    ``views`` took them out of the whole, which has this shape, in the order of ``place_of``.

    >>> from autoalign.plan.operations import Transpose
    >>> print(joined((6, 2), [Split(0, 0, 4), Split(0, 4, 2)]))
    concatenate(dim 0)
    >>> print(joined((6, 2), [chain(Transpose(), Split(0, 0, 1)), chain(Transpose(), Split(0, 1, 1))]))
    concatenate(dim 0) + transpose
    >>> joined((6, 2), [Split(0, 0, 4)]) is None
    True

    """
    steps = [steps_of(view) for view in views]
    if len(views) == 1 and not steps[0]:
        return Copy()
    if not all(steps):
        return None
    first = steps[0][0]
    if not first.takes_part:
        if any(own[0] != first for own in steps):
            return None
        inner = joined(output_shapes(first, [shape])[0], [chain(*rest) for _, *rest in steps])
        return None if inner is None else chain(inner, first.trace([shape])[0].restore)
    groups: dict[Operation, list[Operation]] = {}
    for step, *rest in steps:
        groups.setdefault(step, []).append(chain(*rest))
    join = _join(shape, list(groups))
    inner_joins = [joined(output_shapes(step, [shape])[0], members) for step, members in groups.items()]
    known = [inner for inner in inner_joins if inner is not None]
    if join is None or len(known) < len(groups):
        return None
    if len(groups) == len(views):
        return chain(in_parallel(known), join)
    if len({(inner, len(members)) for inner, members in zip(known, groups.values(), strict=True)}) > 1:
        return None
    return chain(Grouped(len(views) // len(groups), known[0]), join)


def place_of(view: Operation) -> tuple[int, ...]:
    """Return the place of a part in the tensor that it was taken from, to order parts by.

    >>> place_of(Split(0, 4, 2)) > place_of(Split(0, 0, 4))
    True
    """
    return tuple(
        step.start if isinstance(step, Split) else step.index
        for step in steps_of(view)
        if isinstance(step, Split | Unstack)
    )


def _join(shape: Shape, parts: Sequence[Operation]) -> Operation | None:
    """Find what joins slices or ranges, in order, if they make up the whole tensor."""
    dims = {part.dim for part in parts if isinstance(part, Split | Unstack)}
    if len(dims) != 1:
        return None
    dim = dims.pop()
    if len(parts) == shape[dim] and list(parts) == [Unstack(dim, index) for index in range(shape[dim])]:
        return Stack(dim)
    end = 0
    for part in parts:
        if not isinstance(part, Split) or part.start != end:
            return None
        end += part.length
    return Concatenate(dim) if end == shape[dim] else None


@dataclass(frozen=True, slots=True)
class Regional:
    """A tensor that is read region by region."""

    shape: Shape
    dtype: torch.dtype
    read: Callable[[Region], Tensor] = field(repr=False)

    def whole(self) -> Tensor:
        """Read all of it."""
        return self.read(tuple((0, size) for size in self.shape))


def evaluated(operation: Operation, inputs: Sequence[Regional]) -> list[Regional]:
    """Apply an operation lazily: inputs are read when a region of a result is.

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
        case Parallel():
            return [result for step, given in operation.runs(inputs) for result in evaluated(step, given)]
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
            at = dim % len(inputs[0].shape)
            rows = [_split(given, at, index % given.shape[at], 1) for given in inputs]
            return [_reshaped(row, (*row.shape[:at], *row.shape[at + 1 :])) for row in rows]
        case Flip(dim):
            return [_flipped(given, dim % len(given.shape)) for given in inputs]
        case Concatenate(dim):
            return [_concatenated(inputs, dim % len(inputs[0].shape))]
        case Stack(dim):
            at = dim % (len(inputs[0].shape) + 1)
            rows = [_reshaped(given, (*given.shape[:at], 1, *given.shape[at:])) for given in inputs]
            return [_concatenated(rows, at)]
        case InsertZeros(index, shape):
            dtype = inputs[0].dtype
            return [*inputs[:index], Regional(shape, dtype, lambda region: _zeros(region, dtype)), *inputs[index:]]
        case Dequantise():
            starts = range(0, len(inputs), operation.arity)
            return [_dequantised(operation, inputs[start : start + operation.arity]) for start in starts]
        case Reshape(shape):
            return [_reshaped(given, _known(shape, given.shape)) for given in inputs]
        case _:
            return _evaluated_whole(operation, inputs)


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


def _flipped(given: Regional, dim: int) -> Regional:
    def read(region: Region) -> Tensor:
        start, length = region[dim]
        inner = (*region[:dim], (given.shape[dim] - start - length, length), *region[dim + 1 :])
        return given.read(inner).flip(dim)

    return Regional(given.shape, given.dtype, read)


def _concatenated(inputs: Sequence[Regional], dim: int) -> Regional:
    dtype = inputs[0].dtype

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
            return _zeros(region, dtype)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    shape = (*inputs[0].shape[:dim], sum(given.shape[dim] for given in inputs), *inputs[0].shape[dim + 1 :])
    return Regional(shape, dtype, read)


def _zeros(region: Region, dtype: torch.dtype) -> Tensor:
    return torch.zeros([length for _, length in region], dtype=dtype, device="cpu")


def _known(shape: Shape, old: Shape) -> Shape:
    """Fill in the one size of a shape that may be -1."""
    rest = prod(size for size in shape if size >= 0)
    return tuple(size if size >= 0 else prod(old) // max(rest, 1) for size in shape)


def _reshaped(given: Regional, shape: Shape) -> Regional:
    groups = list(reshape_groups(given.shape, shape))

    def read(region: Region) -> Tensor:
        if not prod(length for _, length in region):
            return _zeros(region, given.dtype)
        inner: list[tuple[int, int]] = []  # what is read
        runs: list[tuple[int, int]] = []  # where the elements of the region are in it, in each group
        sizes: list[int] = []  # their new shape
        outer: list[tuple[int, int]] = []  # where the region is in that
        for old, new in groups:
            old_sizes, new_sizes = [given.shape[dim] for dim in old], [shape[dim] for dim in new]
            wanted = [region[dim] for dim in new]
            run = _run(new_sizes, wanted)
            if run is None:  # not one run of elements: all of the group is read
                run = 0, prod(old_sizes)
            else:
                new_sizes = [length for _, length in wanted]
                wanted = [(0, length) for length in new_sizes]
            regions, first = _rows(old_sizes, *run)
            inner += regions
            runs.append((first, run[1]))
            sizes += new_sizes
            outer += wanted
        tensor = given.read(tuple(inner)).reshape([prod(inner[dim][1] for dim in old) for old, _ in groups])
        return narrowed(narrowed(tensor, tuple(runs)).reshape(sizes), tuple(outer))

    return Regional(tuple(shape), given.dtype, read)


def reshape_groups(old: Shape, new: Shape) -> Iterator[tuple[list[int], list[int]]]:
    """Pair the smallest runs of dimensions of two shapes that hold the same elements.

    Dimensions of size 1 go with what precedes them. Where the numbers of elements differ, the last ones are left out.

    >>> list(reshape_groups((768, 12, 64), (768, 768, 1)))
    [([0], [0]), ([1, 2], [1, 2])]
    >>> list(reshape_groups((2, 3), (4,)))
    []
    """
    i = j = 0
    while i < len(old) or j < len(new):
        left: list[int] = []
        right: list[int] = []
        sizes = [1, 1]
        while not (left or right) or sizes[0] != sizes[1]:
            if i == len(old) and j == len(new):
                return
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
    """Return the start and length of a region's elements; None if they are not one run."""
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


def _dequantised(operation: Dequantise, inputs: Sequence[Regional]) -> Regional:
    """Compute the rows of a region, with those that share a number with one of them."""
    shapes = [given.shape for given in inputs]
    (shape,) = output_shapes(operation, shapes)
    scheme = SCHEMES[operation.scheme]
    shares = [_share(scheme, *each, shape) for each in zip(operation.roles, shapes, strict=True)]
    step = lcm(*(rows for _, rows in filter(None, shares) if rows))
    if None in shares:
        (whole,) = _evaluated_whole(operation, inputs)
        return replace(whole, dtype=torch.float32)

    def read(region: Region) -> Tensor:
        (start, count), *rest = region
        if not count:
            return _zeros(region, torch.float32)
        first, last = start - start % step, min(-(-(start + count) // step) * step, shape[0])
        found = {}
        for role, given, (elements, rows) in zip(operation.roles, inputs, filter(None, shares), strict=True):
            inner = [(0, size) for size in given.shape]
            if rows and scheme.rows is not None:
                begin, end = first // rows * elements, min(-(-last // rows) * elements, given.shape[scheme.rows])
                inner[scheme.rows] = begin, end - begin
            found[role] = given.read(tuple(inner))
            if role == scheme.judged:
                found[f"every {role}"] = given.whole()
        values = operation.values(found, (last - first, *shape[1:]))
        return narrowed(values, ((start - first, count), *rest))

    return Regional(shape, torch.float32, read)


def _share(scheme: Scheme, role: str, own: Shape, shape: Shape) -> tuple[int, int] | None:
    """Return how many elements of an input belong to how many rows of the values: 0 to 0 where all belong to each.

    None is returned where rows have no share of their own. Blocks are of a power of two, so that they stay the same in
    a part; the last may be shorter, but not where they run on from row to row.
    """
    rows = shape[0] if shape else 0
    if scheme.rows is None or rows < 2:
        return None
    count = own[scheme.rows] if own else 1
    if count == 1 or role not in _OF_ROWS:
        return 0, 0
    if scheme.rows == -1:  # words of 32 bits, whose numbers may be of 3 or in planes
        return (32 * count // rows, 32) if rows % 32 == 0 == 32 * count % rows else None
    if not count or (scheme.is_flat and (prod(shape) % count or not _is_power(prod(shape) // count))):
        return None
    if count % rows == 0:
        return count // rows, 1
    block = block_size(rows, count)
    return (1, block) if block and _is_power(block) and not (scheme.is_flat and rows % count) else None


def _is_power(size: int) -> bool:
    return size & (size - 1) == 0


def put_together(pieces: Iterable[Piece], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the tensor that pieces make up, in some dtype."""
    result: Tensor | None = None
    for region, values in pieces:
        if tuple(values.shape) == tuple(shape):
            return values.to(dtype)
        result = torch.empty(tuple(shape), dtype=dtype, device=values.device) if result is None else result
        narrowed(result, region).copy_(values)
    return torch.empty(tuple(shape), dtype=dtype) if result is None else result


def divided(
    operation: Operation,
    tensors: Sequence[Tensor],
    read: Callable[[Tensor], Tensor] = lambda part: part,
    most: int = PIECE_ELEMENTS,
) -> Iterator[Piece]:
    """Compute the result of an operation piece by piece, where each of them takes no more than its share of the inputs.

    >>> weight = torch.arange(8).reshape(4, 2)
    >>> [(region[0], values.tolist()) for region, values in divided(Transpose(), [weight], most=4)]
    [((0, 1), [[0, 2, 4, 6]]), ((1, 1), [[1, 3, 5, 7]])]

    Args:
        operation: With one result.
        tensors: Of the inputs.
        read: What is done with a view of an input before anything is computed of it.
        most: Elements of a piece, about.
    """
    inputs = [
        Regional(tuple(each.shape), each.dtype, lambda region, each=each: read(narrowed(each, region)))  # type: ignore[misc]
        for each in tensors
    ]
    taken: list[int] = []

    def counted(region: Region) -> Tensor:
        lengths = [length for _, length in region]
        taken.append(prod(lengths))
        return torch.empty(lengths, device="meta")

    (trial,) = evaluated(operation, [replace(given, read=counted) for given in inputs])
    (result,) = evaluated(operation, inputs)
    whole = tuple((0, size) for size in trial.shape)
    every = sum(prod(given.shape) for given in inputs)
    for dim, size in enumerate(trial.shape if prod(trial.shape) > most else ()):
        length = max(most * size // prod(trial.shape), 1)
        taken.clear()
        trial.read((*whole[:dim], (0, length), *whole[dim + 1 :]))
        if length < size and sum(taken) * size <= 2 * every * length:
            for start in range(0, size, length):
                region = (*whole[:dim], (start, min(length, size - start)), *whole[dim + 1 :])
                yield region, result.read(region)
            return
    yield whole, result.whole()


def _evaluated_whole(operation: Operation, inputs: Sequence[Regional]) -> list[Regional]:
    shapes = output_shapes(operation, [given.shape for given in inputs])

    def reader(place: int) -> Callable[[Region], Tensor]:
        return lambda region: narrowed(operation.apply([given.whole() for given in inputs])[place], region)

    return [Regional(shape, inputs[0].dtype, reader(place)) for place, shape in enumerate(shapes)]
