"""A tensor in blocks, so that what is done to its values needs little memory beyond its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2**20  # elements: few megabytes, and enough for a strided view to be read in whole cache lines


def blocks(tensor: Tensor, size: int = BLOCK) -> Iterator[Tensor]:
    """Yield the elements of a tensor in row-major order, as flat tensors of at most ``size`` elements.

    A block is a view where the memory of its elements is in this order, else a copy.

    >>> [block.tolist() for block in blocks(torch.arange(6).reshape(2, 3).T, 2)]
    [[0, 3], [1, 4], [2, 5]]
    """
    if tensor.numel() <= size:
        yield tensor.reshape(-1)
    elif tensor.is_contiguous():
        yield from torch.split(tensor.view(-1), size)
    elif len(tensor) == 1:
        yield from blocks(tensor[0], size)
    else:
        for part in torch.split(tensor, max(size * len(tensor) // tensor.numel(), 1)):
            yield from blocks(part, size)
