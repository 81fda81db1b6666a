"""Encoders: torch's own, one with separate projections, and those with gated layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference_models.parts import (
    CLASSES,
    DEPTH,
    HEADS,
    HIDDEN,
    VOCABULARY,
    WIDTH,
    DecoderBlock,
    SeparateAttention,
    decode,
)


class TorchEncoder(nn.Module):
    """``nn.TransformerEncoder``, norms after the additions, below a projection."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(self.encoder(self.embedding(tokens)))
        return result


class _SeparateLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = SeparateAttention()
        self.linear1 = nn.Linear(WIDTH, HIDDEN)
        self.linear2 = nn.Linear(HIDDEN, WIDTH)
        self.norm1 = nn.LayerNorm(WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.self_attn(x))
        result: Tensor = self.norm2(x + self.linear2(self.linear1(x).relu()))
        return result


class SeparateEncoder(nn.Module):
    """What ``TorchEncoder`` computes, with a projection each for query, key and value, as fairseq has them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(_SeparateLayer() for _ in range(DEPTH))
        self.output_projection = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.output_projection(x)
        return result


class _Gated(nn.Module):
    """A gated layer with fused halves; ``gate_first`` tells which of them goes through the activation."""

    def __init__(self, names: tuple[str, str], *, gate_first: bool) -> None:
        super().__init__()
        self.names = names
        self.gate_first = gate_first
        for name, layer in zip(names, (nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH)), strict=True):
            *above, last = name.split(".")
            parent: nn.Module = self
            for part in above:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, layer)

    def forward(self, x: Tensor) -> Tensor:
        fused, down = (self.get_submodule(name) for name in self.names)
        first, second = fused(x).chunk(2, -1)
        result: Tensor = down(F.gelu(first) * second if self.gate_first else first * F.gelu(second))
        return result


class _SeparateGated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, HIDDEN)
        self.up_proj = nn.Linear(WIDTH, HIDDEN)
        self.down_proj = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))
        return result


class GatedEncoder(nn.Module):
    """Blocks with gated layers: ``separate``, ``w12`` (gate first, as DINOv2) or ``net`` (gate last, as diffusers)."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        fused = {"w12": (("w12", "w3"), True), "net": (("net.0.proj", "net.2"), False)}
        names = {"separate": "norm1 self_attn norm2 mlp", "w12": "norm1 attn norm2 mlp", "net": "norm1 attn1 norm3 ff"}
        attention = {"separate": "q_proj k_proj v_proj o_proj", "w12": "q k v proj", "net": "to_q to_k to_v to_out"}

        def block() -> nn.Module:
            norm1, attn, norm2, mlp = names[layout].split()
            gated = _SeparateGated() if layout == "separate" else _Gated(fused[layout][0], gate_first=fused[layout][1])
            modules = {
                norm1: nn.LayerNorm(WIDTH),
                attn: SeparateAttention(attention[layout]),
                norm2: nn.LayerNorm(WIDTH),
                mlp: gated,
            }
            return DecoderBlock(modules, names[layout])

        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return decode(self.embed, self.blocks, self.norm, self.head, tokens)
