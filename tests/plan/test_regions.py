from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autoalign.plan.adaptations import ResizePositions
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
    Split,
    Stack,
    Transpose,
    Unstack,
)
from autoalign.plan.regions import Region, Regional, evaluated, narrowed

Shape = tuple[int, ...]
CASES: tuple[tuple[Operation, list[Shape]], ...] = (
    (Copy(), [(3, 4)]),
    (Transpose(), [(3, 4)]),
    (Transpose(), [(3, 4, 2)]),
    (Permute((3, 2, 0, 1)), [(2, 3, 4, 5)]),
    (Flip(1), [(3, 4)]),
    (Split(0, 2, 3), [(6, 2)]),
    (Split(-1, 1, 2), [(2, 4)]),
    (Unstack(0, 1), [(3, 4, 2)]),
    (Unstack(1, -1), [(3, 4, 2)]),
    (Concatenate(0), [(2, 3), (1, 3), (4, 3)]),
    (Concatenate(-1), [(2, 3), (2, 1)]),
    (Stack(0), [(2, 3), (2, 3)]),
    (Stack(2), [(2, 3), (2, 3)]),
    (Chain((InsertZeros(1, (2,)), Concatenate(0))), [(3,), (1,)]),
    (Reshape((6, 4)), [(2, 3, 4)]),
    (Reshape((2, 3, 4)), [(6, 4)]),
    (Reshape((2, -1)), [(2, 3, 2, 2)]),
    (Reshape((6, 1, 2)), [(3, 4)]),
    (Reshape(()), [(1, 1)]),
    (Reshape((1, 1)), [()]),
    (Reshape((4, 0)), [(0, 2)]),
    (Chain((Parallel((Copy(), Transpose())), Concatenate(0))), [(2, 3), (3, 4)]),
    (Chain((Grouped(2, Concatenate(0)), Stack(0))), [(2, 3), (1, 3), (2, 3), (1, 3)]),
    (Chain((Reshape((2, 3, 4)), Permute((2, 0, 1)), Reshape((4, 6)))), [(6, 4)]),
    (ResizePositions((2, 2), (3, 4), 1, (0,)), [(1, 5, 2)]),
)


def tensors(shapes: list[Shape]) -> list[Tensor]:
    return [torch.arange(100.0 * k, 100.0 * k + prod(shape)).reshape(shape) for k, shape in enumerate(shapes)]


def regional(source: Tensor) -> Regional:
    return Regional(tuple(source.shape), source.dtype, lambda region: narrowed(source, region))


@pytest.mark.parametrize(("operation", "shapes"), CASES, ids=str)
@settings(max_examples=5)
@given(data=st.data())
def test_a_region_is_that_of_the_whole_result(operation: Operation, shapes: list[Shape], data: st.DataObject) -> None:
    sources = tensors(shapes)
    regionals = [regional(source) for source in sources]
    (expected,), (result,) = operation.apply(sources), evaluated(operation, regionals)
    assert result.shape == expected.shape
    region = []
    for size in expected.shape:
        start = data.draw(st.integers(0, size))
        region.append((start, data.draw(st.integers(0, size - start))))
    found = result.read(tuple(region))
    assert torch.equal(found, narrowed(expected, tuple(region)))
    assert torch.equal(result.whole(), expected)


def read_elements(operation: Operation, shapes: list[Shape], region: Region) -> list[int]:
    """Count the elements that are read of each source for a region of the result."""
    counts = [0] * len(shapes)

    def counted(place: int, source: Tensor) -> Regional:
        def read(region: Region) -> Tensor:
            counts[place] += prod(count for _, count in region)
            return narrowed(source, region)

        return Regional(tuple(source.shape), source.dtype, read)

    (result,) = evaluated(operation, [counted(place, source) for place, source in enumerate(tensors(shapes))])
    result.read(region)
    return counts


@pytest.mark.parametrize(
    ("operation", "shapes", "region", "expected"),
    [
        (Copy(), [(8, 4)], ((2, 2), (0, 4)), [8]),
        (Transpose(), [(4, 8)], ((2, 2), (0, 4)), [8]),
        (Chain((Permute((1, 2, 0)), Reshape((8, 4)))), [(4, 4, 2)], ((2, 2), (0, 4)), [8]),
        (Split(0, 4, 4), [(8, 4)], ((0, 2), (0, 4)), [8]),
        (Concatenate(0), [(4, 4), (4, 4)], ((2, 2), (0, 4)), [8, 0]),
        (Concatenate(0), [(4, 4), (4, 4)], ((2, 4), (0, 4)), [8, 8]),
        (Chain((Transpose(), Concatenate(0))), [(4, 4), (4, 4)], ((0, 8), (1, 1)), [4, 4]),
        (Stack(0), [(4, 4), (4, 4)], ((1, 1), (0, 4), (0, 1)), [0, 4]),
        (Reshape((2, 4, 4)), [(8, 4)], ((1, 1), (0, 4), (0, 4)), [16]),
        (Reshape((8, 4)), [(8, 4, 1, 1)], ((0, 2), (2, 2)), [4]),
        (Reshape((8, 4)), [(2, 4, 4)], ((3, 2), (0, 2)), [16]),  # rows 3 and 4 are in both of the first dimension
        (Reshape((4, 8)), [(8, 4)], ((0, 4), (0, 2)), [32]),  # a part of each row of what is merged is no run
    ],
    ids=str,
)
def test_only_what_a_region_is_made_from_is_read(
    operation: Operation, shapes: list[Shape], region: Region, expected: list[int]
) -> None:
    assert read_elements(operation, shapes, region) == expected
