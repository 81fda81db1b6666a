"""What a file of any format holds, before any tensor of it is read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

Region: TypeAlias = tuple[tuple[int, int], ...]  # of a tensor: where it starts and how long it is, in each dimension


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that is still in its file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor] = field(repr=False)
    mapped: bool = False  # whether reading it takes no memory and cannot fail, as where the file is mapped into memory
    read_region: Callable[[Region], Tensor] | None = field(default=None, repr=False)  # where that reads less


@dataclass(frozen=True, slots=True)
class Contents:
    """What a format makes of a file: names to stored tensors, tensors, mappings of such and whatever else it holds."""

    root: Mapping[str, object]
    flat: str = ""  # what to call a file whose format has no containers; '' for one that may have them
    metadata: Mapping[str, str] = field(default_factory=dict)  # statements of the file about itself
    config: Mapping[str, object] = field(default_factory=dict)  # as of ``Checkpoint``
    notes: tuple[str, ...] = ()  # statements for the report
    opened: tuple[tuple[Path, os.stat_result], ...] = ()  # as of ``Checkpoint``, where there are several files


def as_opened(path: Path) -> tuple[tuple[Path, os.stat_result], ...]:
    """Note how a file is that is about to be opened."""
    return ((path.absolute(), path.stat()),)


def narrowed(tensor: Tensor, region: Region) -> Tensor:
    """Take a region of a tensor, as a view.

    >>> narrowed(torch.arange(6).reshape(2, 3), ((1, 1), (0, 2)))
    tensor([[3, 4]])
    """
    for dim, (start, length) in enumerate(region):
        if (start, length) != (0, tensor.shape[dim]):
            tensor = tensor.narrow(dim, start, length)
    return tensor


def natural(key: str) -> list[tuple[int, str]]:
    """Split a key for sorting, so that ``layers.10`` comes after ``layers.9``, however long numbers are.

    >>> sorted(["layers.10", "layers.9", "layers.a"], key=natural)
    ['layers.9', 'layers.10', 'layers.a']
    """
    parts = re.split(r"([0-9]+)", key)
    parts[1::2] = [number.lstrip("0") for number in parts[1::2]]
    return [(len(part), part) if place % 2 else (-1, part) for place, part in enumerate(parts)]
