"""Operations that change values make what timm makes."""

from __future__ import annotations

import pytest
import torch
from timm.layers.pos_embed import resample_abs_pos_embed, resample_abs_pos_embed_nhwc
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table, resize_rel_pos_bias_table_simple
from timm.models._manipulate import adapt_input_conv
from torch import Tensor
from torch.nn import functional as F

from autoalign.plan.adaptations import (
    RepeatChannels,
    ResizeBiases,
    ResizeGrid,
    ResizePositions,
    SumChannels,
    TakeRows,
    needs_target,
)
from autoalign.plan.operations import Chain, Copy, Grouped, Operation, Parallel, Transpose

# timm's own interpolation of tables warns about the way in which it indexes
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:timm")


def applied(operation: Operation, *tensors: Tensor) -> Tensor:
    (result,) = operation.apply(tensors)
    return result


@pytest.mark.parametrize("tokens", [0, 1, 2, 5])
@pytest.mark.parametrize(
    ("old", "new"), [((14, 14), (24, 24)), ((14, 14), (7, 10)), ((6, 4), (4, 6)), ((3, 3), (3, 3))]
)
def test_positions_are_resized_as_by_timm(tokens: int, old: tuple[int, int], new: tuple[int, int]) -> None:
    table = torch.randn(1, tokens + old[0] * old[1], 8)
    resize = ResizePositions(old, new, tokens, tuple(range(tokens)))
    expected = resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=tokens)
    torch.testing.assert_close(applied(resize, table), expected)
    assert torch.equal(applied(resize, table[0]), applied(resize, table)[0])  # without a dimension for the batch


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_are_computed_in_single_precision_at_least_and_keep_their_dtype(dtype: torch.dtype) -> None:
    table = torch.randn(1, 197, 8, dtype=dtype)
    result = applied(ResizePositions((14, 14), (16, 16), 1, (0,)), table)
    assert result.dtype == dtype
    exact = applied(ResizePositions((14, 14), (16, 16), 1, (0,)), table.double())
    torch.testing.assert_close(result, exact.to(dtype))


@pytest.mark.parametrize("new", [(16, 16), (10, 24)])
def test_grids_are_resized_as_by_timm(new: tuple[int, int]) -> None:
    grid = torch.randn(1, 14, 12, 5)
    expected = resample_abs_pos_embed_nhwc(grid, list(new))
    torch.testing.assert_close(applied(ResizeGrid((14, 12), new, channels_last=True), grid), expected)
    turned = applied(ResizeGrid((14, 12), new), grid.permute(0, 3, 1, 2))
    torch.testing.assert_close(turned, expected.permute(0, 3, 1, 2))


def test_positions_of_a_sequence_are_interpolated_linearly() -> None:
    table = torch.randn(12, 4)
    expected = F.interpolate(table.T[None], size=20, mode="linear", align_corners=False)[0].T
    torch.testing.assert_close(applied(ResizePositions((12,), (20,)), table), expected)
    reserved = applied(ResizePositions((10,), (18,), 2, (0, 1)), table)
    assert reserved.shape == (20, 4)
    assert torch.equal(reserved[:2], table[:2])


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize(
    ("old", "new"), [(7, (8, 8)), (7, (12, 12)), (14, (24, 24)), (12, (7, 7)), (8, (4, 16)), (2, (3, 3))]
)
def test_relative_positions_are_resized_as_by_timm(old: int, new: tuple[int, int], extra: int) -> None:
    table = torch.randn((2 * old - 1) ** 2 + extra, 3)
    shape = (2 * new[0] - 1) * (2 * new[1] - 1) + extra, 3
    result = applied(ResizeBiases((old, old), new, extra), table)
    torch.testing.assert_close(result, resize_rel_pos_bias_table(table, new, shape))
    assert not torch.allclose(result, resize_rel_pos_bias_table_simple(table, new, shape))


def test_relative_positions_by_head_are_resized_as_by_timm() -> None:
    table = torch.randn(3, 13, 13)
    # older versions of timm give the values of three dimensions in another shape
    expected = resize_rel_pos_bias_table(table.flatten(1).T, (8, 10), (15 * 19, 3)).T.reshape(3, 15, 19)
    torch.testing.assert_close(applied(ResizeBiases((7, 7), (8, 10)), table), expected)


@pytest.mark.parametrize("channels", [1, 2, 4, 6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_channels_are_summed_and_repeated_as_by_timm(channels: int, dtype: torch.dtype) -> None:
    kernel = torch.randn(5, 3, 7, 7, dtype=dtype)
    operation = SumChannels(3) if channels == 1 else RepeatChannels(channels)
    torch.testing.assert_close(applied(operation, kernel), adapt_input_conv(channels, kernel))


def test_channels_of_a_stem_that_folds_pixels_are_summed_by_pixel_as_by_timm() -> None:
    kernel = torch.randn(5, 48, 3, 3)
    torch.testing.assert_close(applied(SumChannels(3), kernel), adapt_input_conv(1, kernel))


@pytest.mark.parametrize(
    ("operation", "shape", "expected"),
    [
        (ResizePositions((14, 14), (24, 24), 1, (0,)), (1, 197, 8), (1, 577, 8)),
        (ResizePositions((7,), (9,)), (7, 8), (9, 8)),
        (ResizeGrid((4, 4), (6, 5)), (1, 8, 4, 4), (1, 8, 6, 5)),
        (ResizeBiases((7, 7), (8, 8), 3), (172, 2), (228, 2)),
        (SumChannels(3), (4, 3, 2), (4, 1, 2)),
        (RepeatChannels(5), (4, 3, 2, 2, 2), (4, 5, 2, 2, 2)),
        (TakeRows(1, 3), (2, 5), (2, 3)),
    ],
)
def test_shapes_are_known_without_values(
    operation: Operation, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert applied(operation, torch.empty(shape, device="meta")).shape == expected
    before = torch.randn(shape)
    copy = before.clone()
    assert applied(operation, before).shape == expected
    assert torch.equal(before, copy)


def test_rows_that_are_kept_do_not_lose_precision() -> None:
    source, own = torch.randn(2, 3, dtype=torch.bfloat16), torch.randn(4, 3)
    result = applied(TakeRows(0, 2, 2), source, own)
    assert torch.equal(result[:2], source.float())
    assert torch.equal(result[2:], own[2:])
    columns = applied(TakeRows(1, 2, 2), source.T, own.T)
    assert torch.equal(columns, result.T)


def test_an_operation_adapts_if_any_part_of_it_does() -> None:
    take = TakeRows(0, 1, 1)
    nested = [Chain((Parallel((Transpose(), Copy())), take)), Grouped(2, take), Parallel((Copy(), take))]
    assert all(operation.adapts for operation in [take, *nested])
    assert not Chain((Transpose(), Copy())).adapts
    assert needs_target(nested[0])
    assert not needs_target(TakeRows(0, 1))
    assert [str(operation) for operation in (take, SumChannels(3), RepeatChannels(4))] == [
        "take 1 rows, keep 1",
        "sum 3 channels",
        "repeat to 4 channels, rescaled",
    ]


def test_what_keeps_its_size_says_so() -> None:
    assert str(ResizePositions((2, 2), (2, 2), 1, (0,))) == "keep positions 2x2"
    table = torch.rand(1, 3)
    assert torch.equal(ResizeBiases((1, 1), (3, 3)).apply([table])[0], table.expand(25, 3))
