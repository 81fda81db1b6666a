"""CLIP as OpenAI stores it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference_models.parts import CONTEXT, DEPTH, HEADS, PATCH, SEQUENCE, VOCABULARY, WIDTH

TEXT_WIDTH, TEXT_HEADS, SHARED_WIDTH = 24, 3, 20


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class _ResidualAttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        result: Tensor = x + self.mlp["c_proj"](quick_gelu(self.mlp["c_fc"](self.ln_2(x))))
        return result


class _ResidualTower(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_ResidualAttentionBlock(width, heads) for _ in range(DEPTH))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class _VisionTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(WIDTH))
        self.positional_embedding = nn.Parameter(torch.zeros(SEQUENCE, WIDTH))
        self.ln_pre = nn.LayerNorm(WIDTH)
        self.transformer = _ResidualTower(WIDTH, HEADS)
        self.ln_post = nn.LayerNorm(WIDTH)
        self.proj = nn.Parameter(torch.zeros(WIDTH, SHARED_WIDTH))

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        result: Tensor = self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj
        return result


class OpenAIClip(nn.Module):
    """CLIP as OpenAI publishes it: fused attention, and bare projections that are multiplied from the right."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = _VisionTower()
        self.transformer = _ResidualTower(TEXT_WIDTH, TEXT_HEADS)
        self.token_embedding = nn.Embedding(VOCABULARY, TEXT_WIDTH)
        self.positional_embedding = nn.Parameter(torch.zeros(CONTEXT, TEXT_WIDTH))
        self.ln_final = nn.LayerNorm(TEXT_WIDTH)
        self.text_projection = nn.Parameter(torch.zeros(TEXT_WIDTH, SHARED_WIDTH))
        self.logit_scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens: Tensor, images: Tensor) -> Tensor:
        mask = torch.full((CONTEXT, CONTEXT), -torch.inf).triu(1)
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding, mask)
        x = self.ln_final(x)[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection
        text, image = F.normalize(x, dim=-1), F.normalize(self.visual(images), dim=-1)
        return torch.cat([text.flatten(), image.flatten(), (self.logit_scale.exp() * text @ image.T).flatten()])
