"""autoalign, in the form of its peers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

import autoalign


def tensors(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take all that would be loaded, operations included."""
    return autoalign.align(source, target).state_dict()


def match(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, str]:
    """Take the matches that would be loaded and that take one whole tensor each."""
    return {
        match.target: match.sources[0]
        for match in autoalign.align(source, target).matches
        if len(match.sources) == 1 and not match.operation.takes_part
    }
