"""A vision transformer whose patches go through a linear layer, and diffusion transformers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference_models.parts import CLASSES, DEPTH, HIDDEN, PATCH, SEQUENCE, WIDTH, attend, linear


class _PreNorm(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.fn(self.norm(x))
        return result


class _FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = linear(WIDTH, 3 * WIDTH)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.to_out(attend(*self.to_qkv(x).chunk(3, -1)))
        return result


class _FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Dropout(0.0), nn.Linear(HIDDEN, WIDTH)
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)
        return result


class PatchViT(nn.Module):
    """The vision transformer of vit-pytorch, whose patches are flattened with the channels last; first on request."""

    def __init__(self, *, channels_first: bool = False) -> None:
        super().__init__()
        self.channels_first = channels_first
        self.pos_embedding = nn.Parameter(torch.zeros(1, SEQUENCE, WIDTH))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.to_patch_embedding = nn.Sequential(nn.Identity(), nn.Linear(3 * PATCH * PATCH, WIDTH))
        self.transformer = nn.Module()
        pairs = (nn.ModuleList([_PreNorm(_FusedAttention()), _PreNorm(_FeedForward())]) for _ in range(DEPTH))
        self.transformer.add_module("layers", nn.ModuleList(pairs))
        self.mlp_head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # batch, channels, rows, columns, h, w
        order = (0, 2, 3, 1, 4, 5) if self.channels_first else (0, 2, 3, 4, 5, 1)
        x = self.to_patch_embedding(patches.permute(order).flatten(3).flatten(1, 2))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embedding
        body: Any = self.transformer
        for attention, feed_forward in body.layers:
            x = feed_forward(attention(x))
        result: Tensor = self.mlp_head(x[:, 0])
        return result


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def _waves(times: Tensor) -> Tensor:
    angles = times[:, None] * 10000.0 ** (-torch.arange(WIDTH // 2) / (WIDTH // 2))
    return torch.cat([angles.cos(), angles.sin()], -1)


class _DiTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "proj": nn.Linear(WIDTH, WIDTH)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 4 * WIDTH), "fc2": nn.Linear(4 * WIDTH, WIDTH)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, -1)
        mixed = attend(*self.attn["qkv"](_modulate(x, shift, scale)).chunk(3, -1))
        x = x + gate[:, None] * self.attn["proj"](mixed)
        inner = F.gelu(self.mlp["fc1"](_modulate(x, shift2, scale2)), approximate="tanh")
        result: Tensor = x + gate2[:, None] * self.mlp["fc2"](inner)
        return result


class _FinalLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 3 * PATCH * PATCH)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, -1)
        result: Tensor = self.linear(_modulate(x, shift, scale))
        return result


class DiT(nn.Module):
    """A diffusion transformer with its authors' names; every modulation gives the shift before the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, PATCH, PATCH)})
        times = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.t_embedder = nn.ModuleDict({"mlp": times})
        self.blocks = nn.ModuleList(_DiTBlock() for _ in range(DEPTH))
        self.final_layer = _FinalLayer()

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        x = self.x_embedder["proj"](images).flatten(2).transpose(1, 2)
        condition = self.t_embedder["mlp"](_waves(times))
        for block in self.blocks:
            x = block(x, condition)
        result: Tensor = self.final_layer(x, condition)
        return result


class _DiffusersBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.ModuleDict({"linear": nn.Linear(WIDTH, 6 * WIDTH)})
        heads: dict[str, nn.Module] = {name: nn.Linear(WIDTH, WIDTH) for name in ("to_q", "to_k", "to_v")}
        self.attn = nn.ModuleDict(heads | {"to_out": nn.Sequential(nn.Linear(WIDTH, WIDTH))})
        first = nn.ModuleDict({"proj": nn.Linear(WIDTH, 4 * WIDTH)})
        self.ff = nn.ModuleDict({"net": nn.ModuleList([first, nn.Identity(), nn.Linear(4 * WIDTH, WIDTH)])})

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.norm1["linear"](F.silu(condition)).chunk(6, -1)
        normed = _modulate(x, shift, scale)
        mixed = attend(*(self.attn[name](normed) for name in ("to_q", "to_k", "to_v")))
        x = x + gate[:, None] * self.attn["to_out"](mixed)
        net: Any = self.ff["net"]
        inner = F.gelu(net[0]["proj"](_modulate(x, shift2, scale2)), approximate="tanh")
        result: Tensor = x + gate2[:, None] * net[2](inner)
        return result


class DiffusersDiT(nn.Module):
    """What ``DiT`` computes, with the names of diffusers; the last modulation gives the scale before the shift."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, PATCH, PATCH)})
        times = {"linear_1": nn.Linear(WIDTH, WIDTH), "linear_2": nn.Linear(WIDTH, WIDTH)}
        self.time_text_embed = nn.ModuleDict({"timestep_embedder": nn.ModuleDict(times)})
        self.transformer_blocks = nn.ModuleList(_DiffusersBlock() for _ in range(DEPTH))
        self.norm_out = nn.ModuleDict({"linear": nn.Linear(WIDTH, 2 * WIDTH)})
        self.proj_out = nn.Linear(WIDTH, 3 * PATCH * PATCH)

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        x = self.pos_embed["proj"](images).flatten(2).transpose(1, 2)
        embedder: Any = self.time_text_embed["timestep_embedder"]
        condition = embedder.linear_2(F.silu(embedder.linear_1(_waves(times))))
        for block in self.transformer_blocks:
            x = block(x, condition)
        scale, shift = self.norm_out["linear"](F.silu(condition)).chunk(2, -1)
        result: Tensor = self.proj_out(_modulate(x, shift, scale))
        return result
