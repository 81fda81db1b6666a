"""What the reference models are made of, and their sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 32
HEADS = 4
KV_HEADS = 2  # of grouped-query attention
HEAD_DIM = WIDTH // HEADS
HIDDEN = 56
DEPTH = 3
VOCABULARY = 97
CONTEXT = 24  # longest sequence of the models with a table of positions
EXPERTS = 4
CLASSES = 10
IMAGE, PATCH = 32, 8
SEQUENCE = (IMAGE // PATCH) ** 2 + 1  # patches and a class token

Rotation = Callable[[Tensor], Tensor]
linear = partial(nn.Linear, bias=False)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int = HEADS,
    kv_heads: int | None = None,
    *,
    causal: bool = False,
    rotate: Rotation | None = None,
) -> Tensor:
    """Attention over [batch, length, heads * head_dim], whose rows are ordered head by head."""

    def apart(x: Tensor, count: int) -> Tensor:
        return x.view(*x.shape[:-1], count, -1).transpose(1, 2)

    queries, keys, values = apart(q, heads), apart(k, kv_heads or heads), apart(v, kv_heads or heads)
    if rotate is not None:
        queries, keys = rotate(queries), rotate(keys)
    repeats = heads // (kv_heads or heads)
    keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
    mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal)
    return mixed.transpose(1, 2).flatten(2)


def _turn(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Turn pairs of coordinates [..., length, pairs] by angles that grow with the position."""
    length, count = first.shape[-2:]
    angles = torch.outer(torch.arange(length), 10000.0 ** (-torch.arange(count) / count))
    return first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()


def rotate_halves(x: Tensor, size: int = HEAD_DIM) -> Tensor:
    """Rotate coordinate k of each head with k + size / 2, and leave those from ``size`` on: Hugging Face's Llama."""
    first, second = _turn(*x[..., :size].chunk(2, -1))
    return torch.cat([first, second, x[..., size:]], -1)


def rotate_pairs(x: Tensor, size: int = HEAD_DIM) -> Tensor:
    """Rotate each even coordinate of each head with its neighbour: Meta's Llama, torchtune, GLM."""
    turned = torch.stack(_turn(x[..., 0:size:2], x[..., 1:size:2]), -1).flatten(-2)
    return torch.cat([turned, x[..., size:]], -1)


class RMSNorm(nn.Module):
    """A norm whose gain is called ``weight`` or otherwise."""

    def __init__(self, eps: float = 1e-6, name: str = "weight") -> None:
        super().__init__()
        self.eps = eps
        self.name = name
        self.register_parameter(name, nn.Parameter(torch.ones(WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_parameter(self.name) * F.rms_norm(x, (WIDTH,), eps=self.eps)


class SwiGLU(nn.Module):
    """A gated layer whose three matrices have the names that are given, in this order: gate, up, down."""

    def __init__(self, gate: str, up: str, down: str) -> None:
        super().__init__()
        self.names = gate, up, down
        shapes = {gate: (WIDTH, HIDDEN), down: (HIDDEN, WIDTH), up: (WIDTH, HIDDEN)}
        for name in sorted(shapes):
            self.add_module(name, linear(*shapes[name]))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in self.names)
        result: Tensor = down(F.silu(gate(x)) * up(x))
        return result


class SeparateAttention(nn.Module):
    """Attention of four linear layers."""

    def __init__(self, names: str = "q_proj k_proj v_proj out_proj", *, bias: bool = True) -> None:
        super().__init__()
        self.names = names.split()
        for name in self.names:
            self.add_module(name, nn.Linear(WIDTH, WIDTH, bias=bias))

    def forward(self, x: Tensor, *, causal: bool = False) -> Tensor:
        q, k, v, out = (self.get_submodule(name) for name in self.names)
        result: Tensor = out(attend(q(x), k(x), v(x), causal=causal))
        return result


class DecoderBlock(nn.Module):
    """A block with its norms first; the names are those of norm, attention, norm and feed-forward layer."""

    def __init__(self, modules: Mapping[str, nn.Module], names: str) -> None:
        super().__init__()
        self.names = names.split()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        norm1, attention, norm2, mlp = (self.get_submodule(name) for name in self.names)
        x = x + attention(norm1(x))
        result: Tensor = x + mlp(norm2(x))
        return result


def decode(embed: nn.Module, blocks: nn.ModuleList, norm: nn.Module, head: nn.Module, tokens: Tensor) -> Tensor:
    x = embed(tokens)
    for block in blocks:
        x = block(x)
    result: Tensor = head(norm(x))
    return result
