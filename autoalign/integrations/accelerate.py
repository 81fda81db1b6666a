"""Accelerate: ``load_checkpoint_and_dispatch`` of weights under any names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autoalign.api import load
from autoalign.checkpoints.checkpoint import Side
from autoalign.errors import DependencyError
from autoalign.integrations.state_dicts import taken_from

_MAP_OPTIONS = ("max_memory", "no_split_module_classes")
_STRATEGIES = ("auto", "balanced", "balanced_low_0")  # which use all devices evenly


def load_checkpoint_and_dispatch(
    model: nn.Module,
    checkpoint: Side,
    device_map: str | Mapping[str, int | str | torch.device] | None = None,
    *,
    offload_folder: Any = None,
    dtype: torch.dtype | str | None = None,
    strict: bool = False,
    **options: Any,
) -> nn.Module:
    """Load any checkpoint into a model and spread it over devices, as Accelerate's function of this name does.

    Args:
        model: It may be on the meta device, as ``init_empty_weights`` makes it; its tensors are replaced by new ones.
        checkpoint: As ``autoalign.load`` takes it. What is mapped of a file is not copied before it is moved.
        device_map: The device of each module, or how Accelerate is to choose them, such as ``"auto"``; None for
            loading alone.
        offload_folder: Where what is on ``"disk"`` is written.
        dtype: What floating-point tensors are converted to.
        strict: Raise unless every key of the model gets a tensor and every tensor of the checkpoint is used.
        **options: Those of ``align``; ``max_memory`` and ``no_split_module_classes``, for choosing devices; all others
            are those of Accelerate's ``dispatch_model``.

    Returns:
        The model, with Accelerate's hooks.

    Raises:
        NothingLoadedError: No tensor of the checkpoint could be aligned with the model.
        DependencyError: Accelerate is not installed.
    """
    try:
        import accelerate
        from accelerate.utils import get_balanced_memory
    except ImportError as error:
        raise DependencyError.of("Accelerate", "Nothing was loaded.") from error
    align_options = taken_from(options)
    limits = {name: options.pop(name) for name in _MAP_OPTIONS if name in options}
    load(model, checkpoint, assign=True, strict=strict, dtype=dtype, **align_options)
    if device_map is None:
        return model
    if isinstance(device_map, str):
        if device_map in _STRATEGIES:
            low_zero = device_map == "balanced_low_0"
            limits["max_memory"] = get_balanced_memory(model, **limits, low_zero=low_zero)
        device_map = accelerate.infer_auto_device_map(model, **limits)
    return accelerate.dispatch_model(model, device_map, offload_dir=offload_folder, **options)  # type: ignore[no-any-return]
