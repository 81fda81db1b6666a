"""torch_liberator: the largest common subtree of the two sets of key paths."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn


@dataclass(slots=True)
class _Model:
    """As much of a module as ``load_partial_state`` asks for; keeps what it is given."""

    tensors: Mapping[str, Tensor]
    loaded: Mapping[str, Tensor] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        self.loaded = tensors


def match(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, str]:
    """Call ``load_partial_state`` with its defaults, but for the cropping of tensors of another shape."""
    from torch_liberator.initializer import load_partial_state

    model = _Model(target)
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_partial_state(cast(nn.Module, model), dict(source), mangle=False, verbose=0)
    keys = {id(tensor): key for key, tensor in source.items()}
    return {key: keys[id(tensor)] for key, tensor in model.loaded.items() if id(tensor) in keys}
