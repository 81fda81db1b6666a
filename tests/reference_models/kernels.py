"""Layers as JAX and TensorFlow store them: kernels of (in, out), convolutions of (height, width, in, out)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.reference_models.parts import WIDTH

Flat = dict[str, NDArray[np.float32]]


class Kernel(nn.Module):
    """A linear layer with a kernel of input and output dimensions, over which a sum is taken as einsum's."""

    def __init__(self, *shape: int, contracted: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(shape))
        self.bias = nn.Parameter(torch.zeros(shape[contracted:])) if bias else None
        self.contracted = contracted

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.tensordot(x, self.kernel, self.contracted)
        return result if self.bias is None else result + self.bias


class KernelConv(nn.Module):
    """A convolution with a kernel of (height, width, in, out), or (height, width, channels, 1) for a depthwise one."""

    def __init__(self, *shape: int, stride: int = 1, padding: int = 0, bias: bool = False, depthwise: bool = False):
        super().__init__()
        self.name = "depthwise_kernel" if depthwise else "kernel"
        self.register_parameter(self.name, nn.Parameter(torch.zeros(shape)))
        self.bias = nn.Parameter(torch.zeros(shape[-1])) if bias else None
        self.stride, self.padding, self.groups = stride, padding, shape[2] if depthwise else 1

    def forward(self, x: Tensor) -> Tensor:
        order = (2, 3, 0, 1) if self.name == "depthwise_kernel" else (3, 2, 0, 1)
        kernel = self.get_parameter(self.name).permute(order)
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding, groups=self.groups)


class KernelNorm(nn.Module):
    """A layer norm with other names for its gain and offset."""

    def __init__(self, gain: str, offset: str, eps: float) -> None:
        super().__init__()
        self.names, self.eps = (gain, offset), eps
        self.register_parameter(gain, nn.Parameter(torch.ones(WIDTH)))
        self.register_parameter(offset, nn.Parameter(torch.zeros(WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        gain, offset = (self.get_parameter(name) for name in self.names)
        return F.layer_norm(x, (WIDTH,), gain, offset, self.eps)


class KernelBatchNorm(nn.Module):
    """A batch norm with other names; in training mode it takes the statistics of the batch as its own."""

    def __init__(self, width: int, gain: str, offset: str, mean: str, variance: str) -> None:
        super().__init__()
        self.names, self.statistics = (gain, offset), (mean, variance)
        self.register_parameter(gain, nn.Parameter(torch.ones(width)))
        self.register_parameter(offset, nn.Parameter(torch.zeros(width)))
        self.register_buffer(mean, torch.zeros(width))
        self.register_buffer(variance, torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        gain, offset = (self.get_parameter(name) for name in self.names)
        mean, variance = (self.get_buffer(name) for name in self.statistics)
        return F.batch_norm(x, mean, variance, gain, offset, training=self.training, momentum=1.0)


def flat_arrays(model: nn.Module, *, separator: str = "/", suffix: str = "", ordered: bool = True) -> Flat:
    """The tensors of a model under one dictionary, as ``.npz`` files and TensorFlow checkpoints hold them."""
    items = [(key.replace(".", separator) + suffix, value.numpy()) for key, value in model.state_dict().items()]
    return dict(sorted(items) if ordered else items)


def flax_collections(model: nn.Module) -> dict[str, Any]:
    """The tensors of a model as nested dictionaries, with running statistics in a collection of their own."""
    statistics = {key for key, _ in model.named_buffers()}
    result: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for key, value in sorted(flat_arrays(model, separator=".").items()):
        node = result["batch_stats" if key in statistics else "params"]
        *above, last = key.split(".")
        for name in above:
            node = node.setdefault(name, {})
        node[last] = value
    return result
