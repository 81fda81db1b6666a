"""What nothing but order tells is believed as far as shapes, to the matcher, and the target's code bear it out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import autoalign
from benchmarks.cases.twins import ActorCritic, Anonymous
from tests.pairs import tv
from tests.reference_models.parts import WIDTH


def test_an_order_that_shapes_show_to_be_at_random_tells_nothing() -> None:
    model = tv("squeezenet1_1")()
    source = Anonymous(tv("squeezenet1_1")())
    right = {own: key for key, own in source.keys.items()}
    found = autoalign.align(source.state_dict(), model)
    assert all(match.sources == (right[match.target],) for match in found.matches)
    assert len(found.ambiguous) > 20


def test_an_order_that_shapes_bear_out_is_believed() -> None:
    model = tv("squeezenet1_1")()
    source = {f"m{place // 2}.{'wb'[place % 2]}": tensor for place, tensor in enumerate(model.state_dict().values())}
    found = autoalign.align(source, model)
    assert [*found.mapping] == [*source]
    assert [*found.mapping.values()] == [*model.state_dict()]


@pytest.mark.parametrize("is_called", [False, True])
def test_towers_that_never_meet_have_no_order(is_called: bool) -> None:
    source, target = ActorCritic("a", "b", is_actor_first=True), ActorCritic("x", "y", is_actor_first=False)
    inputs = torch.randn(3, 8) if is_called else None
    found = autoalign.align(source.state_dict(), target, example_inputs=inputs)
    assert not found.matches
    assert len(found.ambiguous) == len(target.state_dict())
    assert all("never meets" in match.warnings[-1] for match in found.ambiguous)


class Symmetric(nn.Module):
    """Two branches that are used alike."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        for name in names:
            self.add_module(name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.get_submodule(name) for name in self.names)
        return torch.relu(first(x)) + torch.relu(second(x))


def test_branches_that_are_used_alike_have_no_order() -> None:
    found = autoalign.align(Symmetric("a", "b").state_dict(), Symmetric("x", "y"))
    assert not found.matches
    assert all("another one of its shape alike" in match.warnings[-1] for match in found.ambiguous)
