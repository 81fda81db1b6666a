"""Models for the command line to build."""

from __future__ import annotations

import torch
from torch import Tensor, nn

RENAMED = "tests.cli.factories:Network(renamed=True)"


class Network(nn.Module):
    def __init__(self, classes: int = 3, widths: tuple[int, ...] = (4, 5, 6, 7), renamed: bool = False) -> None:
        super().__init__()
        stem, last = ("fc", "head") if renamed else ("layer", "out")
        names = [*(f"{stem}{number}" for number in range(1, len(widths) + 1)), last]
        for name, (first, second) in zip(names, zip((2, *widths), (*widths, classes), strict=True), strict=True):
            self.add_module(name, nn.Linear(first, second))

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


class Nested:
    renamed = Network(renamed=True)


def computing() -> nn.Module:
    """Cannot be built with parameters on the meta device."""
    layer = nn.Linear(2, 2)
    return nn.Linear(2, 3 + int(layer.weight.isnan().sum().item()))


class Buffered(nn.Module):
    """Computes a table when it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.tied = self.weight
        self.register_buffer("table", torch.arange(3))


def talking() -> nn.Module:
    print("not a result")  # noqa: T201
    return Network()


def failing() -> nn.Module:
    raise KeyError("width")


state_dict = {"layer1.weight": torch.ones(4, 2)}
number = 3
