"""Operations say what they do, and what they made of each input is undone."""

from __future__ import annotations

import pytest
import torch

from autoalign.errors import NotInvertibleError
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
)

TEXTS: dict[Operation, str] = {
    Copy(): "copy",
    Reshape((2, 3)): "reshape[2, 3]",
    Permute((1, 0)): "permute[1, 0]",
    Flip(1): "flip(dim 1)",
    Split(0, 4, 2): "split(dim 0, 4:6)",
    Unstack(0, 3): "unstack(dim 0, 3)",
    Stack(1): "stack(dim 1)",
    InsertZeros(1, (2, 3)): "zeros[2, 3] at 1",
    Grouped(2, Concatenate(0)): "concatenate(dim 0) by 2",
    Parallel((Transpose(), Copy())): "(transpose, copy)",
    Chain((Flip(0), Stack(0))): "flip(dim 0) + stack(dim 0)",
}


@pytest.mark.parametrize(("operation", "text"), TEXTS.items(), ids=TEXTS.values())
def test_an_operation_says_what_it_does(operation: Operation, text: str) -> None:
    assert str(operation) == text


@pytest.mark.parametrize(
    ("operation", "shapes"),
    [
        (InsertZeros(1, (2, 3)), [(2, 3)]),
        (Chain((InsertZeros(1, (1, 3)), Concatenate(0))), [(2, 3), (4, 3)]),
        (Chain((Grouped(2, Concatenate(1)), Stack(0))), [(2, 3), (2, 1), (2, 2), (2, 2)]),
        (Grouped(3, Stack(0)), [(2,), (2,), (2,), (5,), (5,)]),
        (Chain((Parallel((Transpose(), Permute((1, 0)))), Concatenate(1), Flip(0))), [(2, 3), (4, 3)]),
        (Chain((Split(0, 1, 2), Transpose())), [(4, 3)]),
        (Parallel((Stack(0), Grouped(1, Concatenate(0)))), [(2,), (3,)]),
    ],
    ids=lambda value: str(value) if isinstance(value, Operation) else "",
)
def test_what_an_operation_made_of_each_input_is_undone(operation: Operation, shapes: list[Shape]) -> None:
    inputs = [torch.rand(shape) for shape in shapes]
    results = operation.apply(inputs)
    traces = operation.trace(shapes)
    assert len(traces) == len(inputs)
    for tensor, trace in zip(inputs, traces, strict=True):
        restored, viewed = trace.restore.apply([results[trace.output]]), trace.view.apply([tensor])
        assert torch.equal(*restored, *viewed)


def test_operations_that_undo_each_other_are_left_out() -> None:
    assert chain(Transpose(), Transpose()) == Copy()
    assert chain(Permute((2, 0, 1)), Permute((2, 0, 1))) == Chain((Permute((2, 0, 1)),) * 2)
    assert chain(Flip(0), Permute((1, 0)), Permute((1, 0)), Flip(1)) == Chain((Flip(0), Flip(1)))
    assert chain(Permute((1, 0)), Permute((1, 0, 2))) == Chain((Permute((1, 0)), Permute((1, 0, 2))))


def test_one_operation_does_for_all_inputs_alike() -> None:
    assert in_parallel([Flip(0), Flip(0)]) == Flip(0)
    assert in_parallel([Flip(0), Flip(1)]) == Parallel((Flip(0), Flip(1)))
    with pytest.raises(ValueError, match=r"'\(flip\(dim 0\), copy, copy\)' takes 3 inputs, not 1"):
        Parallel((Flip(0), Copy(), Copy())).apply([torch.ones(1)])


def test_a_part_of_what_is_joined_restores_nothing() -> None:
    with pytest.raises(NotInvertibleError, match=r"'concatenate\(dim 0\) \+ split\(dim 0, 0:1\)' takes a part of what"):
        Chain((Concatenate(0), Split(0, 0, 1))).trace([(1,), (1,)])
