"""torchtitan: a state-dict adapter, made from the names of both sides."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Unpack

import torch

from autoalign.api import align
from autoalign.errors import DependencyError
from autoalign.loading.prepare import warn_of_choices, warn_of_unfilled
from autoalign.plan.options import AlignOptions
from autoalign.rules.rules import Rules


def state_dict_adapter(**align_options: Unpack[AlignOptions]) -> type:
    """Make a class of state-dict adapters for any model of torchtitan, for ``ModelSpec.state_dict_adapter``.

    An adapter aligns the checkpoint in torchtitan's ``hf_assets_path`` with the model, built on the meta device, when
    it is first used; no values are read. Then it applies rules, to all tensors or to those of one rank.

    Args:
        **align_options: As for ``autoalign.align``.

    Raises:
        DependencyError: torchtitan is not installed.
    """
    try:
        from torchtitan.models.common.rope import ComplexRoPE, RoPE
        from torchtitan.protocols.state_dict_adapter import StateDictAdapter
    except ImportError as error:
        raise DependencyError.of("torchtitan", "Nothing was made.") from error

    class AlignedStateDictAdapter(StateDictAdapter):  # type: ignore[misc]
        """Converts between a model of torchtitan and the checkpoint in ``hf_assets_path``."""

        @cached_property
        def rules(self) -> tuple[Rules, Rules]:
            """From the checkpoint to the model, and back."""
            with torch.device("meta"):
                model = self.model_config.build()
            if ropes := [module for module in model.modules() if isinstance(module, RoPE)]:
                model.rotary_interleaved = isinstance(ropes[0], ComplexRoPE)
            alignment = align(self.hf_assets_path, model, **align_options)
            alignment.raise_if_nothing_matched()
            doing = f"Aligning {self.hf_assets_path} with {type(model).__name__}"
            warn_of_choices(doing, alignment)
            warn_of_unfilled(doing, alignment, "get nothing from it")
            return alignment.rules(), alignment.inverse().rules()

        def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
            return self.rules[0].apply(hf_state_dict)

        def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
            return self.rules[1].apply(state_dict)

    return AlignedStateDictAdapter
