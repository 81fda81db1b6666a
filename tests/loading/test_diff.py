from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from autoalign.checkpoints.checkpoint import checkpoint_of
from autoalign.errors import InputError
from autoalign.loading.diff import Changed, differences

NAN, INF = math.nan, math.inf


def compared(one: Tensor, other: Tensor) -> Changed | None:
    found = differences(checkpoint_of({"a": one}), checkpoint_of({"a": other}))
    assert found.none == (found.equal == 1)
    return found.changed[0] if found.changed else None


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [
        ([1.0, -4.0], [1.0, -3.0], 1.0),
        ([1.0, NAN], [1.0, NAN], None),
        ([0.0], [-0.0], None),
        ([1.0, NAN], [1.0, 2.0], INF),
        ([INF], [INF], None),
        ([INF], [-INF], INF),
        ([], [], None),
    ],
)
def test_the_largest_difference_is_found(one: list[float], other: list[float], difference: float | None) -> None:
    found = compared(torch.tensor(one), torch.tensor(other))
    assert (found.difference if found else None) == difference


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.uint64, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]
)
def test_every_dtype_is_compared(dtype: torch.dtype) -> None:
    one, other = torch.tensor([0, 1, 1]).to(dtype), torch.tensor([0, 1, 0]).to(dtype)
    assert compared(one, one.clone()) is None
    changed = compared(one, other)
    assert changed is not None
    assert changed.difference == changed.magnitude == 1


def test_large_integers_differ_that_are_equal_when_rounded() -> None:
    changed = compared(torch.tensor([2**62]), torch.tensor([2**62 + 1]))
    assert changed is not None
    assert changed.difference == 1


def test_another_dtype_alone_is_a_difference() -> None:
    changed = compared(torch.tensor([1.5]), torch.tensor([1.5], dtype=torch.float64))
    assert changed is not None
    assert changed.difference == 0


def test_other_shapes_have_no_difference_of_values() -> None:
    changed = compared(torch.zeros(2), torch.zeros(1, 2))
    assert changed is not None
    assert (changed.key, changed.difference, changed.magnitude) == ("a", None, None)


def test_large_and_strided_tensors_are_compared_in_whole() -> None:
    one = torch.zeros(3, 2**21).T
    other = one.clone()
    other[-1, -1] = -2
    changed = compared(one, other)
    assert changed is not None
    assert (changed.difference, changed.magnitude) == (2.0, 0.0)


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(0, 2)),
    st.dictionaries(st.sampled_from("abcd"), st.integers(0, 2)),
)
def test_every_key_is_counted_once(one: dict[str, int], other: dict[str, int]) -> None:
    first, second = ({key: torch.tensor(value) for key, value in side.items()} for side in (one, other))
    seen: list[int] = []
    found = differences(checkpoint_of(first), checkpoint_of(second), lambda done, _: seen.append(done))
    assert {spec.key for spec in found.only_first} == one.keys() - other.keys()
    assert {spec.key for spec in found.only_second} == other.keys() - one.keys()
    assert {item.key for item in found.changed} == {key for key in one.keys() & other.keys() if one[key] != other[key]}
    assert found.equal + len(found.changed) == len(one.keys() & other.keys()) == len(seen)


def test_values_are_needed() -> None:
    with pytest.raises(InputError, match="a is on the meta device and has no values to compare"):
        compared(torch.zeros(1), torch.zeros(1, device="meta"))
