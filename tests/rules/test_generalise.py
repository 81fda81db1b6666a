"""Moves of single tensors as those of families of keys."""

from __future__ import annotations

import pytest

from autoalign.plan.operations import Unstack
from autoalign.rules.generalise import _spread


@pytest.mark.parametrize(
    ("names", "slices"),
    [
        (["layers.1.w", "layers.2.w"], [1, 2]),  # the first slice goes nowhere
        (["layers.1.w", "layers.0.w"], [1, 0]),
        (["first.w", "second.w"], [0, 1]),
    ],
)
def test_slices_that_no_list_takes_in_order_are_no_list(names: list[str], slices: list[int]) -> None:
    assert _spread(names, [Unstack(0, index) for index in slices]) is None
