"""The state of an assignment: how far order is believed, from what shapes alone match."""

from __future__ import annotations

import pytest
import torch

import autoalign

SHAPES = {"up": (8, 4), "a": (8, 8), "down": (4, 8), "b": (8, 8), "out": (4, 4)}
NAMES = dict(zip(SHAPES, ("kelx", "foon", "lomy", "barn", "dupe"), strict=True))


@pytest.mark.parametrize(("order", "is_open"), [("up a down b out", False), ("out b up down a", True)])
def test_siblings_of_other_names_are_told_by_their_order_if_shapes_show_it_kept(order: str, *, is_open: bool) -> None:
    source = {f"h.{NAMES[name]}.weight": torch.empty(SHAPES[name]) for name in order.split()}
    target = {f"net.{name}.weight": torch.empty(shape) for name, shape in SHAPES.items()}
    found = {match.target for match in autoalign.align(source, target).ambiguous}
    assert found == ({"net.a.weight", "net.b.weight"} if is_open else set())
