from __future__ import annotations

from itertools import permutations

import pytest
import torch

from autoalign.loading.values import loss_of_kind, loss_of_range, nan_count

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, *FLOAT8])
@pytest.mark.parametrize("shape", [(), (3,), (100, 100), (3, 5000, 2)])
def test_tensors_full_of_nan_are_seen_in_every_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.full(shape, torch.nan).to(dtype)
    assert nan_count(tensor) == tensor.numel()
    assert nan_count(torch.zeros(shape, dtype=dtype)) == 0


def test_a_single_nan_is_seen_in_small_tensors_and_at_the_ends_of_large_ones() -> None:
    for place in (0, 17, -1):
        small, large = torch.zeros(40, 40), torch.zeros(200, 200)
        small.view(-1)[place] = torch.nan
        large.view(-1)[place] = torch.nan
        assert nan_count(small) == nan_count(large) == 1
    assert nan_count(torch.full((2, 2), complex(0, torch.nan))) == 4


def test_what_has_no_nan_or_no_values() -> None:
    assert nan_count(torch.ones(3, dtype=torch.int64)) == 0
    assert nan_count(torch.empty(0)) == 0
    assert nan_count(torch.empty(3, device="meta")) == 0
    assert nan_count(torch.full((2, 2), torch.inf)) == 0
    assert nan_count(torch.full((2, 2), torch.nan).to_sparse()) == 4
    assert nan_count(torch.full((300, 300), torch.nan).t()[::2]) == 45000


@pytest.mark.parametrize(
    ("source", "target", "loss"),
    [
        (torch.float32, torch.float8_e4m3fn, "rounded to 8 bits"),
        (torch.int64, torch.float8_e5m2, "rounded to 8 bits"),
        (torch.float32, torch.int64, "fractions"),
        (torch.bfloat16, torch.uint8, "fractions"),
        (torch.complex64, torch.float32, "imaginary"),
        (torch.complex64, torch.int8, "imaginary"),
        (torch.float32, torch.bool, "becomes True"),
        (torch.int8, torch.bool, "becomes True"),
    ],
)
def test_casts_that_lose_by_their_kind(source: torch.dtype, target: torch.dtype, loss: str) -> None:
    assert loss in (loss_of_kind(source, target) or "")


def test_casts_that_only_round_lose_nothing_to_warn_of() -> None:
    floats = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    assert not any(loss_of_kind(*pair) for pair in permutations(floats, 2))
    assert loss_of_kind(torch.float32, torch.complex64) is None
    assert loss_of_kind(torch.bool, torch.float32) is None
    assert loss_of_kind(torch.float8_e4m3fn, torch.float32) is None


@pytest.mark.parametrize(
    ("values", "source", "target", "loss"),
    [
        ([65504.0, -1], torch.float32, torch.float16, None),
        ([65519.0, -1], torch.float32, torch.float16, None),  # rounds to the largest number
        ([65520.0, -1], torch.float32, torch.float16, "become infinite"),
        ([-7e4], torch.bfloat16, torch.float16, "become infinite"),
        ([torch.inf, torch.nan], torch.float32, torch.float16, None),  # are kept
        ([1e300], torch.float64, torch.float32, "become infinite"),
        ([1e300], torch.float64, torch.bfloat16, "become infinite"),
        ([1e38], torch.float32, torch.bfloat16, None),
        ([127, -128], torch.int64, torch.int8, None),
        ([128], torch.int64, torch.int8, "do not fit"),
        ([-1], torch.int8, torch.uint8, "do not fit"),
        ([2**24], torch.int64, torch.float32, None),
        ([2**24 + 1], torch.int64, torch.float32, "do not fit"),
        ([257], torch.int32, torch.bfloat16, "do not fit"),
        ([1], torch.bool, torch.int8, None),
        ([5], torch.int32, torch.int64, None),
    ],
)
def test_casts_that_lose_by_their_values(
    values: list[float], source: torch.dtype, target: torch.dtype, loss: str | None
) -> None:
    found = loss_of_range(torch.tensor(values, dtype=source), target)
    assert (found is None) if loss is None else (loss in (found or ""))


def test_nothing_is_read_of_a_dtype_with_no_wider_range(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(torch, "aminmax", read)
    tensor = torch.ones(2)
    assert all(loss_of_range(tensor, dtype) is None for dtype in (torch.float32, torch.bfloat16, torch.float64))
    assert loss_of_range(torch.ones(2, dtype=torch.int8), torch.int64) is None
