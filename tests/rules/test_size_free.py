"""Operations without absolute sizes: what one does for all samples, or none."""

from __future__ import annotations

import pytest
import torch

from autoalign import InputError
from autoalign.plan.adaptations import ResizeGrid
from autoalign.plan.operations import Flip, Grouped, InsertZeros, Operation, Permute, Reshape, Shape, Split, chain
from autoalign.rules.size_free import Each, Portion, Regroup, Sized, ZerosLike, _fits, exact, size_free

Samples = list[tuple[Operation, tuple[Shape, ...]]]
GRID = ResizeGrid((2, 2), (4, 4))


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([(InsertZeros(1, (2,)), ((2,), (3,)))], ZerosLike(1, 0)),
        ([(InsertZeros(1, (7,)), ((2,), (3,)))], Sized(((2,), (3,)), InsertZeros(1, (7,)))),
        ([(GRID, ((1, 2, 2, 3),))], Sized(((1, 2, 2, 3),), GRID)),
        ([(Flip(0), ((2,),)), (Permute((1, 0)), ((2, 3),))], None),
        ([(chain(Split(0, n, 2), Flip(0)), ((5,),)) for n in range(2)], None),
        ([(Reshape((4,)), ((2, 2), (4, 1))), (Reshape((8,)), ((4, 2), (8, 1)))], None),
        ([(Reshape((4,)), ((2, 2),)), (Reshape((2, 2)), ((4,),))], None),
        ([(Split(0, 1, 2), ((5,),)), (Split(0, 2, 4), ((10,),))], None),
    ],
)
def test_one_operation_for_all_samples_or_none(samples: Samples, expected: Operation | None) -> None:
    assert size_free(samples, even=True) == expected


def test_they_are_what_they_are_for_the_sizes_at_hand() -> None:
    assert Portion(0, 1, 1, 2).trace([(4, 2)])[0].view == Split(0, 2, 2)
    assert str(ZerosLike(1, 0)) == "zeros at 1, shaped like 0"
    assert [tuple(part.shape) for part in Each(0).apply([torch.ones(2, 3)])] == [(3,), (3,)]
    assert not _fits(Regroup(((0,), -1, 7)), (2, 6), (2, 6))
    with pytest.raises(InputError, match="does not fit tensors of unequal shapes"):
        exact(Grouped(1, Portion(0, 0, 1, 2)), ((4,), (6,)))
