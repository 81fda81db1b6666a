"""diffusers: ``from_single_file`` of classes and files that diffusers has no conversion for."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Unpack

import torch

from autoalign.api import align, load
from autoalign.checkpoints.checkpoint import Side, checkpoint_of
from autoalign.plan.options import AlignOptions


def from_single_file(
    model_class: Any,
    checkpoint: Side,
    *,
    config: Any,
    subfolder: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    strict: bool = False,
    **align_options: Unpack[AlignOptions],
) -> Any:
    """Load a model of diffusers from a file of the original code or of any other, of any of diffusers' classes.

    Args:
        model_class: Such as ``AutoencoderKL``; one that diffusers' own ``from_single_file`` does not know as well.
        checkpoint: As ``autoalign.load`` takes it; it may hold other models too.
        config: Of the model: a mapping, or a folder or name that its ``load_config`` takes.
        subfolder: Of that folder.
        dtype: What floating-point tensors are converted to.
        device: Where the model's tensors are moved.
        strict: Raise unless every key of the model gets a tensor and every tensor of the checkpoint is used.
        **align_options: As for ``autoalign.align``.

    Returns:
        The model, in evaluation mode. What the checkpoint lacks has initial values, of which a warning tells.

    Raises:
        NothingLoadedError: No tensor of the checkpoint could be aligned with the model.
    """
    settings = config if isinstance(config, Mapping) else model_class.load_config(config, subfolder=subfolder)
    source = checkpoint_of(checkpoint, container=align_options.get("container"))
    try:  # without it, as diffusers does, at the cost of initial values
        from accelerate import init_empty_weights as empty
    except ImportError:
        empty = nullcontext
    with empty():
        model = model_class.from_config(settings)
    alignment = align(source, model, **align_options)
    if alignment.missing_keys:
        model = model_class.from_config(settings)
    load(model, source, alignment=alignment, assign=True, strict=strict, dtype=dtype, device=device)
    return model.eval()
