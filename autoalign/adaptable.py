"""What is known of the two sides where tensors are to be adapted, and what is planned for one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from autoalign.candidates import squeeze
from autoalign.names import components, kind, role_words
from autoalign.operations import Operation
from autoalign.specs import TensorSpec


@dataclass(frozen=True)
class AdaptableSide:
    """One side of an alignment, as far as adapting needs it."""

    specs: tuple[TensorSpec, ...]
    module: nn.Module | None = None  # the side itself, where it is a module
    config: Mapping[str, object] = field(default_factory=dict)  # its makers' own

    @cached_property
    def by_key(self) -> dict[str, TensorSpec]:
        """The spec of each key."""
        return {spec.key: spec for spec in self.specs}

    @cached_property
    def kernels(self) -> list[TensorSpec]:
        """The weights of convolutions, in order."""
        return [spec for spec in self.specs if len(spec.shape) > 2 and kind(components(spec.key)[-1])[0] == "weight"]

    @cached_property
    def last(self) -> str:
        """The key of the last matrix."""
        return next((spec.key for spec in reversed(self.specs) if len(squeeze(spec.shape)) > 1), "")

    def is_lone(self, key: str) -> bool:
        """Tell whether a weight has no bias."""
        return f"{key.rpartition('.')[0]}.bias".lstrip(".") not in self.by_key


@dataclass(frozen=True, slots=True)
class Plan:
    """How a tensor is adapted, in the operation and in words."""

    operation: Operation
    warning: str


def named(*keys: str) -> set[str]:
    """Collect the words in the last components of keys.

    >>> sorted(named("encoder.embed_positions.weight"))
    ['embed', 'encoder', 'pos', 'weight']
    """
    return {word for key in keys for word in role_words(components(key))}
