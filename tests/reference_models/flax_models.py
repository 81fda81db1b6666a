"""A vision transformer and a residual network as Flax stores them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference_models.kernels import Kernel, KernelBatchNorm, KernelConv, KernelNorm
from tests.reference_models.parts import CLASSES, HEAD_DIM, HEADS, HIDDEN, PATCH, SEQUENCE, WIDTH

FLAX_DEPTH = 11  # so that encoderblock_10 comes before encoderblock_2 in a file sorted by name


class _FlaxAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = Kernel(WIDTH, HEADS, HEAD_DIM)
        self.key = Kernel(WIDTH, HEADS, HEAD_DIM)
        self.value = Kernel(WIDTH, HEADS, HEAD_DIM)
        self.out = Kernel(HEADS, HEAD_DIM, WIDTH, contracted=2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).transpose(1, 2) for layer in (self.query, self.key, self.value))
        result: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2))
        return result


def _chain(modules: Mapping[str, nn.Module]) -> nn.Sequential:
    chain = nn.Sequential()
    for name, module in modules.items():
        chain.add_module(name, module)
    return chain


class _FlaxBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        norm = partial(KernelNorm, "scale", "bias", 1e-6)
        self.LayerNorm_0 = norm()
        self.MultiHeadDotProductAttention_1 = _FlaxAttention()
        self.LayerNorm_2 = norm()
        layers = {"Dense_0": Kernel(WIDTH, HIDDEN), "act": nn.GELU(), "Dense_1": Kernel(HIDDEN, WIDTH)}
        self.MlpBlock_3 = _chain(layers)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.MultiHeadDotProductAttention_1(self.LayerNorm_0(x))
        result: Tensor = x + self.MlpBlock_3(self.LayerNorm_2(x))
        return result


class FlaxViT(nn.Module):
    """The vision transformer as its authors publish it, from Flax: attention kernels with a dimension of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.embedding = KernelConv(PATCH, PATCH, 3, WIDTH, stride=PATCH, bias=True)
        self.Transformer = nn.Module()
        table = nn.Module()
        table.pos_embedding = nn.Parameter(torch.zeros(1, SEQUENCE, WIDTH))
        self.Transformer.add_module("posembed_input", table)
        for index in range(FLAX_DEPTH):
            self.Transformer.add_module(f"encoderblock_{index}", _FlaxBlock())
        self.Transformer.add_module("encoder_norm", KernelNorm("scale", "bias", 1e-6))
        self.head = Kernel(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        body: Any = self.Transformer
        x = self.embedding(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + body.posembed_input.pos_embedding
        for index in range(FLAX_DEPTH):
            x = body.get_submodule(f"encoderblock_{index}")(x)
        result: Tensor = self.head(body.encoder_norm(x)[:, 0])
        return result


class _FlaxResNetBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        norm = partial(KernelBatchNorm, outputs, "scale", "bias", "mean", "var")
        self.Conv_0 = KernelConv(3, 3, inputs, outputs, stride=stride, padding=1)
        self.BatchNorm_0 = norm()
        self.Conv_1 = KernelConv(3, 3, outputs, outputs, padding=1)
        self.BatchNorm_1 = norm()
        self.conv_proj = KernelConv(1, 1, inputs, outputs, stride=stride) if inputs != outputs else None
        self.norm_proj = norm() if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        inner = self.BatchNorm_1(self.Conv_1(self.BatchNorm_0(self.Conv_0(x)).relu()))
        shortcut = x if self.conv_proj is None or self.norm_proj is None else self.norm_proj(self.conv_proj(x))
        result: Tensor = (inner + shortcut).relu()
        return result


RESNET_STAGES = ((64, 2), (128, 1), (256, 1), (512, 1))  # width and blocks


class FlaxResNet(nn.Module):
    """The residual network of Flax's own example, whose blocks are numbered through all stages.

    The first convolution and the pooling pad as torchvision's do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv_init = KernelConv(7, 7, 3, 64, stride=2, padding=3)
        self.bn_init = KernelBatchNorm(64, "scale", "bias", "mean", "var")
        inputs, self.blocks = 64, 0
        for stage, (width, count) in enumerate(RESNET_STAGES):
            for index in range(count):
                block = _FlaxResNetBlock(inputs, width, 2 if stage and not index else 1)
                self.add_module(f"ResNetBlock_{self.blocks}", block)
                inputs, self.blocks = width, self.blocks + 1
        self.Dense_0 = Kernel(512, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(self.bn_init(self.conv_init(images)).relu(), 3, 2, 1)
        for index in range(self.blocks):
            x = self.get_submodule(f"ResNetBlock_{index}")(x)
        result: Tensor = self.Dense_0(x.mean((2, 3)))
        return result
