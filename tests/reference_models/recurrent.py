"""Recurrent networks: torch's own, with a matrix for each gate, and in Keras' layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference_models.kernels import Kernel
from tests.reference_models.parts import CLASSES, VOCABULARY

RNN_INPUT, RNN_WIDTH, RNN_LAYERS = 12, 20, 2
Step = Callable[[Tensor, Any], tuple[Tensor, Any]]  # input and state -> output and state


def _unroll(step: Step, x: Tensor, state: Any) -> Tensor:
    outputs = []
    for position in range(x.shape[1]):
        output, state = step(x[:, position], state)
        outputs.append(output)
    return torch.stack(outputs, 1)


class TorchTagger(nn.Module):
    """A recurrent network of torch between an embedding and a linear layer."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU], layers: int = RNN_LAYERS, *, silent: str = "") -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, RNN_INPUT)
        self.rnn = kind(RNN_INPUT, RNN_WIDTH, layers, batch_first=True)
        self.fc = nn.Linear(RNN_WIDTH, CLASSES)
        if silent:
            nn.init.zeros_(self.rnn.get_parameter(silent))

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.fc(self.rnn(self.embedding(tokens))[0])
        return result


class _GateCell(nn.Module):
    """A cell with a matrix and a bias for each gate, ``W_ii`` and ``b_ii`` in the notation of torch's documentation."""

    def __init__(self, inputs: int, gates: str) -> None:
        super().__init__()
        self.gates = gates
        for source, columns in (("i", inputs), ("h", RNN_WIDTH)):
            for gate in gates:
                self.register_parameter(f"W_{source}{gate}", nn.Parameter(torch.zeros(RNN_WIDTH, columns)))
                self.register_parameter(f"b_{source}{gate}", nn.Parameter(torch.zeros(RNN_WIDTH)))

    def _sum(self, source: str, gate: str, x: Tensor) -> Tensor:
        return F.linear(x, self.get_parameter(f"W_{source}{gate}"), self.get_parameter(f"b_{source}{gate}"))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        hidden, cell = state
        if self.gates == "ifgo":
            i, f, g, o = (self._sum("i", gate, x) + self._sum("h", gate, hidden) for gate in "ifgo")
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
        else:
            r, z = ((self._sum("i", gate, x) + self._sum("h", gate, hidden)).sigmoid() for gate in "rz")
            n = (self._sum("i", "n", x) + r * self._sum("h", "n", hidden)).tanh()
            hidden = (1 - z) * n + z * hidden
        return hidden, (hidden, cell)


class GateTagger(nn.Module):
    """A recurrent network written out: one matrix for each gate, ``ifgo`` for an LSTM and ``rzn`` for a GRU."""

    def __init__(self, gates: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, RNN_INPUT)
        self.cells = nn.ModuleList(_GateCell(RNN_WIDTH if index else RNN_INPUT, gates) for index in range(RNN_LAYERS))
        self.out = nn.Linear(RNN_WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        zeros = x.new_zeros(len(x), RNN_WIDTH)
        for cell in self.cells:
            x = _unroll(cell, x, (zeros, zeros))
        result: Tensor = self.out(x)
        return result


class _KerasCell(nn.Module):
    """Keras' LSTM (gates i, f, c, o; one bias) or GRU (gates z, r, h; a row of the bias for each side)."""

    def __init__(self, gates: int) -> None:
        super().__init__()
        self.gates = gates
        self.kernel = nn.Parameter(torch.zeros(RNN_INPUT, gates * RNN_WIDTH))
        self.recurrent_kernel = nn.Parameter(torch.zeros(RNN_WIDTH, gates * RNN_WIDTH))
        self.bias = nn.Parameter(torch.zeros((4 * RNN_WIDTH,) if gates == 4 else (2, 3 * RNN_WIDTH)))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        hidden, cell = state
        if self.gates == 4:
            i, f, g, o = (x @ self.kernel + hidden @ self.recurrent_kernel + self.bias).chunk(4, -1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
        else:
            z, r, n = (x @ self.kernel + self.bias[0]).chunk(3, -1)
            hidden_z, hidden_r, hidden_n = (hidden @ self.recurrent_kernel + self.bias[1]).chunk(3, -1)
            update = (z + hidden_z).sigmoid()
            hidden = update * hidden + (1 - update) * (n + (r + hidden_r).sigmoid() * hidden_n).tanh()
        return hidden, (hidden, cell)


class KerasTagger(nn.Module):
    """A recurrent network in Keras' layout, of one layer: ``lstm`` or ``gru``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.ParameterDict({"embeddings": torch.zeros(VOCABULARY, RNN_INPUT)})
        cell = nn.ModuleDict({f"{kind}_cell": _KerasCell(4 if kind == "lstm" else 3)})
        self.add_module(kind, cell)
        self.dense = Kernel(RNN_WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding["embeddings"][tokens]
        zeros = x.new_zeros(len(x), RNN_WIDTH)
        result: Tensor = self.dense(_unroll(self.get_submodule(f"{self.kind}.{self.kind}_cell"), x, (zeros, zeros)))
        return result
