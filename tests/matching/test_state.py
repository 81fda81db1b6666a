"""The state of an assignment: how far order is believed, from what shapes alone match."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch

import autoalign
from autoalign.matching.state import Exchange, State

SHAPES = {"up": (8, 4), "a": (8, 8), "down": (4, 8), "b": (8, 8), "out": (4, 4)}
NAMES = dict(zip(SHAPES, ("kelx", "foon", "lomy", "barn", "dupe"), strict=True))


@pytest.mark.parametrize(("order", "is_open"), [("up a down b out", False), ("out b up down a", True)])
def test_siblings_of_other_names_are_told_by_their_order_if_shapes_show_it_kept(order: str, *, is_open: bool) -> None:
    source = {f"h.{NAMES[name]}.weight": torch.empty(SHAPES[name]) for name in order.split()}
    target = {f"net.{name}.weight": torch.empty(shape) for name, shape in SHAPES.items()}
    found = {match.target for match in autoalign.align(source, target).ambiguous}
    assert found == ({"net.a.weight", "net.b.weight"} if is_open else set())


@pytest.mark.parametrize("seed", range(3))
def test_what_stands_at_random_has_no_order(seed: int) -> None:
    """Modules with a number for a name, in an order at random: only shapes tell, and all else is ambiguous."""
    with torch.device("meta"):
        state_dict = timm.create_model("vit_tiny_patch16_224", depth=4).state_dict()
    modules = list(dict.fromkeys(key.rpartition(".")[0] for key in state_dict))
    numbers = {module: place for place, module in enumerate(random.Random(seed).sample(modules, len(modules)))}
    names = {f"m{numbers[module]}.{name}": key for key in state_dict for module, _, name in [key.rpartition(".")]}
    source = {name: state_dict[names[name]] for name in sorted(names, key=lambda name: int(name.partition(".")[0][1:]))}
    alignment = autoalign.align(source, state_dict)
    assert alignment.mapping.items() <= names.items()
    assert len(alignment.matches) < len(alignment.ambiguous)


@pytest.mark.parametrize(
    ("paths", "ends", "inner"),
    [
        ("t.encoder.layers.0 t.encoder.layers.1 encoder.layers.0 encoder.layers.1", "t encoder", "t.encoder encoder"),
        ("a.layers.0 a.layers.1 b.layers.0 b.layers.1", "a b", "a b"),  # both hold what moves alike
        ("bn.scale bn.scale.u bn.offset bn.offset.u", "bn.scale bn.offset", "bn.scale bn.offset"),  # layers themselves
        ("head body.layers.0", "head body", "head body"),  # one layer of each
    ],
)
def test_a_module_is_read_with_what_it_alone_has_around_all_that_moves(paths: str, ends: str, inner: str) -> None:
    source, modules = (
        [tuple(path.split(".")) for path in paths.split()],
        [tuple(end.split(".")) for end in ends.split()],
    )
    units = tuple((unit, unit) for unit in range(len(source)))
    one = Exchange((("x",), ("y",)), (modules[0], modules[1]), (1, 0), units, units[::-1])
    state: Any = SimpleNamespace(source=SimpleNamespace(paths=source), target=SimpleNamespace(paths=source))
    assert [".".join(path) for path in State.innermost(state, one, of_target=False)] == inner.split()
