"""Tables of positions and of relative positions: how one is resized, or why it cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoalign.matching.positions import (
    AdaptableSide,
    Adaptation,
    _grid_dims,
    positions_plan,
    regridding_plan,
    relative_plan,
)
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


def test_grids_are_told_by_configurations_and_modules() -> None:
    tables = specs("pos_embed", (1, 21, 8), (1, 64, 8))
    kernel = (TensorSpec("proj.weight", (8, 3, 4, 4), torch.float32),)
    module = nn.Module()
    vars(module)["grid_size"] = 3, 7
    for side in (AdaptableSide(kernel, config={"vision": {"grid_size": [3, 7]}}), AdaptableSide(kernel, module)):
        plan = positions_plan(*tables, side, AdaptableSide(kernel))
        assert isinstance(plan, Adaptation), plan
        assert str(plan.operation) == "resize positions 3x7 -> 8x8 (bicubic)"


def test_a_layer_of_tokens_has_positions_of_a_sequence_if_it_has_no_bias() -> None:
    table = TensorSpec("embed.weight", (64, 8), torch.float32)
    bias = TensorSpec("embed.bias", (64,), torch.float32)
    assert _grid_dims(("embed", "weight"), table, {("embed", "weight"): table}) == 1
    assert _grid_dims(("embed", "weight"), table, {("embed", "weight"): table, ("embed", "bias"): bias}) == 0


def test_positions_of_a_sequence_are_not_put_on_a_grid() -> None:
    sides = [AdaptableSide((TensorSpec("proj.weight", (8, 3, *size), torch.float32),)) for size in ((4,), (4, 4))]
    plan = positions_plan(*specs("pos_embed", (1, 49, 8), (1, 64, 8)), *sides)
    assert plan == "one side has the positions of a sequence, the other those of a grid."


def test_tables_of_other_widths_are_not_put_on_another_grid() -> None:
    assert regridding_plan(*specs("pos_embed", (50, 8), (50, 4)), SIDE, SIDE) is None
