"""Models and chance are left as they were, whatever happens while a model is called."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoalign.verification.run import preserved, seed_all


class Meddler(nn.Module):
    """A module whose call changes all that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("table", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.scale.data.copy_(torch.rand(2))
        with torch.no_grad():
            self.norm.weight.mul_(3)
        self.register_buffer("table", torch.rand(5), persistent=False)
        self.register_buffer("more", torch.rand(1))
        self.norm.train()
        result: Tensor = self.norm(x) * self.scale * random.random() * np.random.rand()
        return result


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_and_chance_are_left_as_they_were(fails: bool) -> None:
    model = Meddler()
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    tensors = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    fast = torch.backends.mha.get_fastpath_enabled()

    def meddle() -> None:
        with preserved(model):
            assert not model.training
            assert not torch.is_grad_enabled()
            seed_all(3)
            model(torch.randn(4, 2))
            if fails:
                raise ValueError("stopped")

    if fails:
        with pytest.raises(ValueError, match="stopped"):
            meddle()
    else:
        meddle()
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == tensors
    assert (model.training, model.norm.training) == (True, False)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # type: ignore[index]
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_what_autograd_saved_stays_valid() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    loss = model(torch.ones(1, 2)).sum()
    with preserved(model):
        model(torch.ones(1, 2))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_chance_is_the_same_after_the_same_seed() -> None:
    draws = []
    with preserved():
        for _ in range(2):
            seed_all(7)
            draws.append((float(torch.rand(1)), random.random(), np.random.rand()))
    assert draws[0] == draws[1]


@pytest.mark.cuda
def test_chance_and_arithmetic_on_cuda_are_left_as_they_were() -> None:
    torch.zeros(1, device="cuda")
    state = torch.cuda.get_rng_state_all()
    model = nn.Conv2d(3, 4, 3).cuda()
    with preserved(model):
        seed_all(1)
        torch.rand(1, device="cuda")
        model(torch.randn(1, 3, 8, 8, device="cuda"))
    assert all(torch.equal(own, other) for own, other in zip(torch.cuda.get_rng_state_all(), state, strict=True))
