"""What a file of any format holds, before any tensor of it is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that is still in its file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Contents:
    """What a format makes of a file: names to stored tensors, tensors, mappings of such and whatever else it holds."""

    root: Mapping[str, object]
    flat: str = ""  # what to call a file whose format has no containers; '' for one that may have them
    metadata: Mapping[str, str] = field(default_factory=dict)  # statements of the file about itself
    config: Mapping[str, object] = field(default_factory=dict)  # as of ``Checkpoint``
    notes: tuple[str, ...] = ()  # statements for the report


def natural(key: str) -> list[tuple[int, str]]:
    """Split a key for sorting, so that ``layers.10`` comes after ``layers.9``.

    >>> sorted(["layers.10", "layers.9", "layers.a"], key=natural)
    ['layers.9', 'layers.10', 'layers.a']
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", key)]
