"""timm: a filter of state dicts and pretrained weights of ``create_model``, of any implementation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from torch import Tensor, nn

from autoalign.checkpoints.checkpoint import Side
from autoalign.checkpoints.named_models import build
from autoalign.integrations.state_dicts import aligned_state_dict
from autoalign.plan.options import AlignOptions


def checkpoint_filter_fn(
    state_dict: Mapping[str, Tensor], model: nn.Module, **align_options: Unpack[AlignOptions]
) -> dict[str, Any]:
    """Convert a state dict to a timm model's own names and shapes, as timm's functions of this name do for theirs.

    It goes where timm takes one, as in ``timm.models.load_checkpoint(model, path, filter_fn=checkpoint_filter_fn)``.
    What cannot be aligned is left out, with a warning; timm then raises, unless its own ``strict`` is False.

    Args:
        state_dict: Tensors by key, of any implementation of the network.
        model: The model that is to be loaded.
        **align_options: As for ``autoalign.align``; set them by ``functools.partial``.

    Raises:
        NothingLoadedError: No tensor of the state dict could be aligned with the model.
    """
    return aligned_state_dict(model, state_dict, **align_options)[0]


def pretrained_cfg_overlay(
    architecture: str, checkpoint: Side, **align_options: Unpack[AlignOptions]
) -> dict[str, Any]:
    """Convert a checkpoint to pretrained weights of an architecture, for ``create_model`` with ``pretrained=True``.

    timm then adapts them to other classes, input channels and image sizes as it does with weights of its own. They stay
    in the model's ``pretrained_cfg`` as ``"state_dict"``, as all that are given so.

    Args:
        architecture: As ``create_model`` takes it; arguments in parentheses describe the checkpoint where they are not
            those of the architecture, as in ``"resnet18(num_classes=10)"``.
        checkpoint: As ``autoalign.load`` takes it.
        **align_options: As for ``autoalign.align``.

    Raises:
        NothingLoadedError: No tensor of the checkpoint could be aligned with the architecture.
        InputError: timm has no such architecture.
    """
    model: Any = build(f"timm:{architecture}", values=False)
    state_dict, _ = aligned_state_dict(model, checkpoint, fate="get nothing from it", **align_options)
    return {"state_dict": dict(state_dict), "num_classes": model.num_classes}
