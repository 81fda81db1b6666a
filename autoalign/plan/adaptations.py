"""Operations that change values, used only where ``adapt`` asks for them.

A head with other classes, positions for another image size, a first layer for other channels: the checkpoint lacks the
tensor that the model needs, but has one from which it is usually computed. Values agree with those of timm for the same
tensors. The interpolation of tables of relative positions is that of BEiT (Bao, Dong, Piao and Wei, "BEiT: BERT
pre-training of image transformers", 2022), which timm uses for Swin as well.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from autoalign.plan.operations import Operation, steps_of

_GROWTH_RANGE = (1.01, 1.5)  # of the ratio of neighbouring spacings of relative positions
_GROWTH_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Adaptation(Operation, ABC):
    """Base of the operations that change values; computed in float32 or wider.

    Results have the source's dtype, or a wider one where they keep values of a target of that dtype.
    """

    @property
    def adapts(self) -> bool:
        return True

    @property
    def needs_target(self) -> bool:
        """True if the operation takes the target's own tensor after those of the source, to keep a part of it."""
        return False


def needs_target(operation: Operation) -> bool:
    """True if an operation takes the target's own tensor after those of the source."""
    return any(isinstance(step, Adaptation) and step.needs_target for step in steps_of(operation))


@dataclass(frozen=True, slots=True)
class TakeRows(Adaptation):
    """The first ``rows`` rows of the source, followed by the target's own from there on.

    >>> TakeRows(0, 2, 1).apply([torch.tensor([1, 2]), torch.tensor([7, 8, 9])])
    [tensor([1, 2, 9])]
    """

    dim: int  # along which the rows stand, one for each class or token
    rows: int
    kept: int = 0  # rows that the target has beyond those

    @property
    def needs_target(self) -> bool:
        return self.kept > 0

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        taken = tensors[0].narrow(self.dim, 0, self.rows)
        if not self.kept:
            return [taken]
        return [_concatenated([taken, tensors[1].narrow(self.dim, self.rows, self.kept)], self.dim, taken.device)]

    def __str__(self) -> str:
        return f"take {self.rows} rows" + (f", keep {self.kept}" if self.kept else "")


@dataclass(frozen=True, slots=True)
class ResizePositions(Adaptation):
    """A table of positions, [..., tokens, width], for a grid of another size.

    The rows of a grid (h, w) are interpolated bicubically with antialiasing, those of a sequence (n,) linearly; corners
    are not aligned. Rows before the grid, which belong to tokens such as a class token, are taken as they are.

    >>> print(ResizePositions((14, 14), (24, 24), 1, (0,)))
    resize positions 14x14 -> 24x24 (bicubic)
    >>> ResizePositions((2,), (4,)).apply([torch.tensor([[0.0], [4.0]])])[0].flatten()
    tensor([0., 1., 3., 4.])
    """

    old: tuple[int, ...]
    new: tuple[int, ...]
    before: int = 0  # rows before the grid in the source
    tokens: tuple[int, ...] = ()  # for each row before the grid in the target, that of the source; -1: its own

    @property
    def needs_target(self) -> bool:
        return -1 in self.tokens

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        width = tensors[0].shape[-1]
        rows = tensors[0].reshape(-1, width)
        grid = rows[self.before :]
        if self.old != self.new:
            planes = grid.T.reshape(1, width, *self.old)
            grid = _interpolated(planes, self.new).reshape(width, -1).T
        own = tensors[1].reshape(-1, width) if self.needs_target else rows
        first = [own[place, None] if row < 0 else rows[row, None] for place, row in enumerate(self.tokens)]
        table = _concatenated([*first, grid], 0, grid.device)
        return [table.reshape(*tensors[0].shape[:-2], *table.shape)]

    def __str__(self) -> str:
        way = "linear" if len(self.old) == 1 else "bicubic"
        text = "keep positions " + _size_text(self.old)
        if self.old != self.new:
            text = f"resize positions {_size_text(self.old)} -> {_size_text(self.new)} ({way})"
        if dropped := self.before - sum(row >= 0 for row in self.tokens):
            text += f", drop {dropped}"
        return text + (f", keep {self.tokens.count(-1)}" if self.needs_target else "")


@dataclass(frozen=True, slots=True)
class ResizeGrid(Adaptation):
    """A grid of positions, [1, channels, h, w] or [..., h, w, channels], of another size: bicubic with antialiasing."""

    old: tuple[int, int]
    new: tuple[int, int]
    channels_last: bool = False

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        (tensor,) = tensors
        planes = tensor.movedim(-1, -3) if self.channels_last else tensor
        resized = _interpolated(planes.reshape(1, *planes.shape[-3:]), self.new).reshape(*planes.shape[:-2], *self.new)
        return [resized.movedim(-3, -1) if self.channels_last else resized]

    def __str__(self) -> str:
        return f"resize positions {_size_text(self.old)} -> {_size_text(self.new)} (bicubic)"


@dataclass(frozen=True, slots=True)
class ResizeBiases(Adaptation):
    """A table of the biases of relative positions for a window of another size.

    Tables are [(2h - 1)(2w - 1) + extra, heads], or [heads, 2h - 1, 2w - 1] without extra rows, which are taken as
    they are. The old offsets are spread over the new window with spacings that grow geometrically from the centre, and
    the values between them are interpolated linearly.

    >>> print(ResizeBiases((14, 14), (24, 24), 3))
    resize relative positions 14x14 -> 24x24
    """

    old: tuple[int, int]  # windows, not tables
    new: tuple[int, int]
    extra: int = 0  # rows behind the table, such as those of a class token

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        (tensor,) = tensors
        end = tensor.shape[0] - self.extra
        old = [2 * size - 1 for size in self.old]
        planes = tensor if tensor.dim() == 3 else tensor[:end].T.reshape(-1, *old)
        down, across = (_resampling_weights(*sizes).to(tensor.device) for sizes in zip(self.old, self.new, strict=True))
        resized = (down @ planes.float() @ across.T).to(tensor.dtype)
        if tensor.dim() == 3:
            return [resized]
        return [torch.cat([resized.flatten(1).T, tensor[end:]])]

    def __str__(self) -> str:
        return f"resize relative positions {_size_text(self.old)} -> {_size_text(self.new)}"


@dataclass(frozen=True, slots=True)
class SumChannels(Adaptation):
    """A kernel [out, in, ...] for a grey image: the sum over every ``size`` neighbouring input channels."""

    size: int

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        (tensor,) = tensors
        out, _, *kernel = tensor.shape
        return [_wide(tensor).reshape(out, -1, self.size, *kernel).sum(dim=2).to(tensor.dtype)]

    def __str__(self) -> str:
        return f"sum {self.size} channels"


@dataclass(frozen=True, slots=True)
class RepeatChannels(Adaptation):
    """A kernel [out, in, ...] for ``channels`` inputs: its own repeated, scaled so that the outputs stay as large.

    >>> RepeatChannels(4).apply([torch.tensor([[[1.0], [2.0]]])])[0].flatten()
    tensor([0.5000, 1.0000, 0.5000, 1.0000])
    """

    channels: int

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        (tensor,) = tensors
        index = torch.arange(self.channels, device=tensor.device) % tensor.shape[1]
        scaled = _wide(tensor).index_select(1, index) * (tensor.shape[1] / self.channels)
        return [scaled.to(tensor.dtype)]

    def __str__(self) -> str:
        return f"repeat to {self.channels} channels, rescaled"


def _concatenated(tensors: Sequence[Tensor], dim: int, device: torch.device) -> Tensor:
    """Join tensors of the source and of the target in a dtype that holds the values of both."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return torch.cat([tensor.to(device, dtype) for tensor in tensors], dim)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _interpolated(planes: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize [1, channels, n] or [1, channels, h, w]."""
    if len(size) == 1:
        return F.interpolate(_wide(planes), size=size, mode="linear", align_corners=False).to(planes.dtype)
    return F.interpolate(_wide(planes), size=size, mode="bicubic", align_corners=False, antialias=True).to(planes.dtype)


def _resampling_weights(old: int, new: int) -> Tensor:
    """Compute the weights of an old window's offsets for those of a new one: [2 new - 1, 2 old - 1]."""
    low, high = _GROWTH_RANGE
    while high - low > _GROWTH_TOLERANCE:
        growth = (low + high) / 2
        reach = (1 - growth ** (old - 1)) / (1 - growth)
        low, high = (low, growth) if reach > new - 1 else (growth, high)
    distances = [0.0]
    for step in range(old - 1):
        distances.append(distances[-1] + growth**step)
    places = torch.tensor([-distance for distance in distances[:0:-1]] + distances)
    offsets = torch.arange(1 - new, new, dtype=places.dtype).clamp(places[0], places[-1])
    if len(places) == 1:
        return torch.ones(len(offsets), 1)
    right = torch.bucketize(offsets, places).clamp(1, len(places) - 1)
    share = (offsets - places[right - 1]) / (places[right] - places[right - 1])
    weights = torch.zeros(len(offsets), len(places))
    weights.scatter_(1, (right - 1)[:, None], (1 - share)[:, None])
    return weights.scatter_(1, right[:, None], share[:, None])


def _size_text(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
