"""GPT-2 with linear layers in place of (in, out) matrices."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference_models.parts import CONTEXT, DEPTH, HEADS, VOCABULARY, WIDTH, SeparateAttention, attend, linear


class _NanoAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)
        self.n_head = HEADS

    def forward(self, x: Tensor, *, causal: bool) -> Tensor:
        result: Tensor = self.c_proj(attend(*self.c_attn(x).chunk(3, -1), causal=causal))
        return result


class GPTBlock(nn.Module):
    """A block with its norms first, of submodules with the given names."""

    def __init__(self, names: str, attention: nn.Module, mlp: tuple[str, str]) -> None:
        super().__init__()
        self.names = norm1, attn, norm2, last = names.split()
        self.mlp_names = mlp
        layers = {mlp[0]: nn.Linear(WIDTH, 4 * WIDTH), mlp[1]: nn.Linear(4 * WIDTH, WIDTH)}
        modules = {norm1: nn.LayerNorm(WIDTH), attn: attention, norm2: nn.LayerNorm(WIDTH), last: nn.ModuleDict(layers)}
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        norm1, attention, norm2, mlp = (self.get_submodule(name) for name in self.names)
        x = x + attention(norm1(x), causal=True)
        up, down = (mlp.get_submodule(name) for name in self.mlp_names)
        result: Tensor = x + down(F.gelu(up(norm2(x))))
        return result


class NanoGPT(nn.Module):
    """nanoGPT: Hugging Face's names for GPT-2, with ``nn.Linear`` where that has (in, out) matrices."""

    def __init__(self) -> None:
        super().__init__()
        blocks = (GPTBlock("ln_1 attn ln_2 mlp", _NanoAttention(), ("c_fc", "c_proj")) for _ in range(DEPTH))
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, WIDTH),
                "wpe": nn.Embedding(CONTEXT, WIDTH),
                "h": nn.ModuleList(blocks),
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )
        self.lm_head = linear(WIDTH, VOCABULARY)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        transformer: Any = self.transformer
        x = transformer.wte(tokens) + transformer.wpe(torch.arange(tokens.shape[1]))
        for block in transformer.h:
            x = block(x)
        result: Tensor = self.lm_head(transformer.ln_f(x))
        return result


class SeparateGPT(nn.Module):
    """GPT-2 with a linear layer each for query, key and value, as in textbooks."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position_embedding = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(
            GPTBlock("norm1 attention norm2 feed_forward", SeparateAttention("query key value out"), ("up", "down"))
            for _ in range(DEPTH)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = linear(WIDTH, VOCABULARY)
        self.head.weight = self.token_embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.position_embedding(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(self.norm(x))
        return result
