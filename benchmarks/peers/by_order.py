"""Matchers that look at the order of tensors and not at names."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class _Model:
    """As much of a module as timm's remap asks for."""

    tensors: Mapping[str, Tensor]

    def state_dict(self) -> Mapping[str, Tensor]:
        return self.tensors


def timm_remap(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, str]:
    """Call what ``timm.models.load_checkpoint(..., remap=True)`` calls: the n-th tensor to the n-th.

    Raises:
        AssertionError: Two tensors in one place have different sizes.
    """
    from timm.models._helpers import remap_state_dict

    remapped = remap_state_dict(dict(source), cast(nn.Module, _Model(target)))
    return dict(zip(remapped, source, strict=False))


def within_shape(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, str]:
    """Give the n-th tensor of a shape to the n-th of that shape."""
    queues: dict[tuple[int, ...], deque[str]] = defaultdict(deque)
    for key, tensor in source.items():
        queues[tuple(tensor.shape)].append(key)
    return {key: queue.popleft() for key, tensor in target.items() if (queue := queues[tuple(tensor.shape)])}
