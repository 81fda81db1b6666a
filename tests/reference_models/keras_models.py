"""MobileNetV2 as Keras stores it, and BERT as TensorFlow does."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference_models.kernels import Kernel, KernelBatchNorm, KernelConv, KernelNorm
from tests.reference_models.parts import CLASSES, CONTEXT, DEPTH, HIDDEN, VOCABULARY, WIDTH, attend

MOBILE_STAGES = ((1, 8, 1, 1), (6, 16, 2, 2), (6, 24, 1, 2))  # expansion, width, blocks, stride
MOBILE_LAST = 1280


class KerasMobileNet(nn.Module):
    """MobileNetV2 with the layer names of keras.applications, which pads otherwise where it strides."""

    def __init__(self) -> None:
        super().__init__()
        norm = partial(KernelBatchNorm, gain="gamma", offset="beta", mean="moving_mean", variance="moving_variance")
        self.residual: dict[str, bool] = {}
        self.add_module("Conv1", KernelConv(3, 3, 3, 32, stride=2, padding=1))
        self.add_module("bn_Conv1", norm(32))
        inputs, number = 32, 0
        for expansion, width, count, stride in MOBILE_STAGES:
            for index in range(count):
                name = f"block_{number}_" if number else "expanded_conv_"
                hidden, step = inputs * expansion, 1 if index else stride
                if expansion > 1:
                    self.add_module(f"{name}expand", KernelConv(1, 1, inputs, hidden))
                    self.add_module(f"{name}expand_BN", norm(hidden))
                depthwise = KernelConv(3, 3, hidden, 1, stride=step, padding=1, depthwise=True)
                self.add_module(f"{name}depthwise", depthwise)
                self.add_module(f"{name}depthwise_BN", norm(hidden))
                self.add_module(f"{name}project", KernelConv(1, 1, hidden, width))
                self.add_module(f"{name}project_BN", norm(width))
                self.residual[name] = step == 1 and inputs == width
                inputs, number = width, number + 1
        self.add_module("Conv_1", KernelConv(1, 1, inputs, MOBILE_LAST))
        self.add_module("Conv_1_bn", norm(MOBILE_LAST))
        self.add_module("predictions", Kernel(MOBILE_LAST, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        layer: Any = self._modules
        x = F.relu6(layer["bn_Conv1"](layer["Conv1"](images)))
        for name, residual in self.residual.items():
            inner = x
            if f"{name}expand" in layer:
                inner = F.relu6(layer[f"{name}expand_BN"](layer[f"{name}expand"](inner)))
            inner = F.relu6(layer[f"{name}depthwise_BN"](layer[f"{name}depthwise"](inner)))
            inner = layer[f"{name}project_BN"](layer[f"{name}project"](inner))
            x = x + inner if residual else inner
        x = F.relu6(layer["Conv_1_bn"](layer["Conv_1"](x)))
        result: Tensor = layer["predictions"](x.mean((2, 3)))
        return result


class _BertLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        norm = partial(KernelNorm, "gamma", "beta", 1e-12)
        heads = nn.ModuleDict({name: Kernel(WIDTH, WIDTH) for name in ("query", "key", "value")})
        output = nn.ModuleDict({"dense": Kernel(WIDTH, WIDTH), "LayerNorm": norm()})
        self.attention = nn.ModuleDict({"self": heads, "output": output})
        self.intermediate = nn.ModuleDict({"dense": Kernel(WIDTH, HIDDEN)})
        self.output = nn.ModuleDict({"dense": Kernel(HIDDEN, WIDTH), "LayerNorm": norm()})

    def forward(self, x: Tensor) -> Tensor:
        heads, after, output = (dict(m.items()) for m in (*self.attention.values(), self.output))  # type: ignore[operator]
        mixed = attend(heads["query"](x), heads["key"](x), heads["value"](x))
        x = after["LayerNorm"](x + after["dense"](mixed))
        inner = output["dense"](F.gelu(self.intermediate["dense"](x)))
        result: Tensor = output["LayerNorm"](x + inner)
        return result


class TensorFlowBert(nn.Module):
    """BERT as its authors publish it, from TensorFlow: (in, out) kernels, square ones too."""

    def __init__(self) -> None:
        super().__init__()
        embeddings = nn.Module()
        for name, rows in (("position", CONTEXT), ("token_type", 2), ("word", VOCABULARY)):
            embeddings.register_parameter(f"{name}_embeddings", nn.Parameter(torch.zeros(rows, WIDTH)))
        embeddings.add_module("LayerNorm", KernelNorm("gamma", "beta", 1e-12))
        encoder = nn.ModuleDict({f"layer_{index}": _BertLayer() for index in range(DEPTH)})
        pooler = nn.ModuleDict({"dense": Kernel(WIDTH, WIDTH)})
        self.bert = nn.ModuleDict({"embeddings": embeddings, "encoder": encoder, "pooler": pooler})

    def forward(self, tokens: Tensor) -> Tensor:
        bert: Any = self.bert
        tables = bert.embeddings
        length = tokens.shape[1]
        x = tables.word_embeddings[tokens] + tables.position_embeddings[:length] + tables.token_type_embeddings[0]
        x = tables.LayerNorm(x)
        for layer in bert.encoder.values():
            x = layer(x)
        pooled = bert.pooler.dense(x[:, 0]).tanh()
        return torch.cat([x.flatten(), pooled.flatten()])
