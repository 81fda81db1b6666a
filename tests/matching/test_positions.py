"""Tables of positions and of relative positions: how one is resized, or why it cannot be."""

from __future__ import annotations

import pytest
import torch

from autoalign.matching.positions import AdaptableSide, Adaptation, positions_plan, regridding_plan, relative_plan
from autoalign.plan.specs import TensorSpec

Shape = tuple[int, ...]


def specs(key: str, *shapes: Shape) -> tuple[TensorSpec, TensorSpec]:
    source, target = (TensorSpec(key, shape, torch.float32) for shape in shapes)
    return source, target


SIDE = AdaptableSide(())


@pytest.mark.parametrize(
    ("key", "source", "target", "expected"),
    [
        ("attn.rel_pos_h", (27, 8), (13, 8), "resize positions 27 -> 13"),
        ("attn.rel_pos_h", (28, 8), (13, 8), "an even length has no centre"),
        ("attn.rel_pos_h", (27, 8), (13, 4), "they differ in more than the window"),
        ("rel_pos_bias", (2, 27, 27), (2, 13, 13), "resize relative positions 14x14 -> 7x7"),
        ("rel_pos_bias", (2, 28, 28), (2, 13, 13), "an even length has no centre"),
        ("rel_pos_bias_table", (731, 2), (170, 2), "their windows are unknown"),
    ],
)
def test_tables_of_relative_positions(key: str, source: Shape, target: Shape, expected: str) -> None:
    plan = relative_plan(*specs(key, source, target), SIDE, SIDE)
    assert expected in (str(plan.operation) if isinstance(plan, Adaptation) else plan)


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ((1, 5, 5, 8), (1, 7, 7, 8), "resize positions 5x5 -> 7x7"),
        ((1, 5, 5, 5), (1, 7, 7, 7), "unknown which of its dimensions"),
        ((1, 50, 8), (1, 51, 8), "unknown"),
    ],
)
def test_tables_of_positions(source: Shape, target: Shape, expected: str) -> None:
    plan = positions_plan(*specs("pos_embed", source, target), SIDE, SIDE)
    assert expected in (str(plan.operation) if isinstance(plan, Adaptation) else plan)


def test_positions_of_a_sequence_are_not_put_on_a_grid() -> None:
    sides = [AdaptableSide((TensorSpec("proj.weight", (8, 3, *size), torch.float32),)) for size in ((4,), (4, 4))]
    plan = positions_plan(*specs("pos_embed", (1, 49, 8), (1, 64, 8)), *sides)
    assert plan == "one side has the positions of a sequence, the other those of a grid."


def test_tables_of_other_widths_are_not_put_on_another_grid() -> None:
    assert regridding_plan(*specs("pos_embed", (50, 8), (50, 4)), SIDE, SIDE) is None
