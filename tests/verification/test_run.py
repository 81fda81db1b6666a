"""Models and chance are left as they were, whatever happens while a model is called; tensors are listed by use."""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from autoalign.errors import InputError
from autoalign.verification.run import execution_order, preserved, seed_all


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


class Shuffled(nn.Module):
    """Layers, a bare parameter and a tied one, registered in another order than they are used in."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 9, bias=False)
        self.unused = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(4))
        self.norm = nn.BatchNorm1d(4)
        self.offset = nn.Parameter(torch.zeros(4))
        self.embed = nn.Embedding(9, 4)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, *, shifted: bool = True) -> Tensor:
        assert self.scale.dtype == torch.float32  # looking at a parameter is no use of it
        assert self.offset.shape == (4,)
        x = self.norm(self.embed(tokens).flatten(0, 1))
        if shifted:
            x = x + self.offset
        result: Tensor = self.head(x * self.scale)
        return result


TOKENS = torch.tensor([[1, 2, 3]])


def test_tensors_come_in_the_order_of_their_use() -> None:
    order = execution_order(Shuffled(), TOKENS)
    assert order == [
        *("head.weight", "embed.weight"),  # one tensor
        *("norm.running_mean", "norm.running_var", "norm.weight", "norm.bias", "norm.num_batches_tracked"),
        *("offset", "scale"),
        *("unused.weight", "unused.bias"),
    ]


def test_what_a_module_does_not_use_comes_when_it_is_through() -> None:
    order = execution_order(Shuffled(), (TOKENS, {"shifted": False}))
    assert order[-4:] == ["scale", "offset", "unused.weight", "unused.bias"]


@pytest.mark.parametrize("inputs", [TOKENS, (TOKENS,), {"tokens": TOKENS}, (TOKENS, {"shifted": True})])
def test_inputs_are_given_in_any_form(inputs: Any) -> None:
    assert execution_order(Shuffled(), inputs)[0] == "head.weight"


def test_a_downsampling_branch_comes_where_it_is_called() -> None:
    resnet = torchvision.models.resnet18()
    order = execution_order(resnet, torch.randn(1, 3, 32, 32))
    assert sorted(order) == sorted(resnet.state_dict())
    assert order.index("layer2.0.bn2.weight") < order.index("layer2.0.downsample.0.weight")
    assert resnet.training


def test_bare_parameters_come_where_they_are_used() -> None:
    vit = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=2, num_heads=2)
    order = execution_order(vit, torch.randn(1, 3, 16, 16))
    assert order[:4] == ["patch_embed.proj.weight", "patch_embed.proj.bias", "cls_token", "pos_embed"]


def test_recurrent_layers_and_attention_of_torch_are_seen() -> None:
    lstm = nn.LSTM(2, 3, num_layers=2)
    assert execution_order(lstm, torch.randn(4, 1, 2)) == list(lstm.state_dict())
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    order = execution_order(encoder, torch.randn(1, 4, 8))
    assert order[0] == "self_attn.in_proj_weight"
    assert order.index("norm1.weight") < order.index("linear1.weight") < order.index("norm2.weight")


def test_a_call_that_fails_leaves_no_hooks() -> None:
    model = Shuffled()
    with pytest.raises(InputError, match=re.escape("Shuffled cannot be called on the example inputs: IndexError")):
        execution_order(model, torch.tensor([[10]]))
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training
