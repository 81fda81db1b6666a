"""State dicts: what ``load`` would load, for code of others that calls ``load_state_dict`` itself."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Unpack

from torch import nn

from autoalign.alignment import Alignment
from autoalign.api import align
from autoalign.checkpoints.checkpoint import Side
from autoalign.loading.load import state_dict_for
from autoalign.plan.options import AlignOptions


def aligned_state_dict(
    model: nn.Module,
    checkpoint: Side,
    *,
    strict: bool = False,
    fate: str = "keep their values",
    **align_options: Unpack[AlignOptions],
) -> tuple[OrderedDict[str, Any], Alignment]:
    """Convert a checkpoint to a state dict with a model's own keys and shapes, which ``load_state_dict`` takes.

    >>> import torch
    >>> model = nn.Linear(2, 1)
    >>> state_dict, alignment = aligned_state_dict(model, {"fc.weight": torch.ones(1, 2), "fc.bias": torch.ones(1)})
    >>> model.load_state_dict(state_dict)
    <All keys matched successfully>

    Args:
        model: It is not changed; it may be on the meta device.
        checkpoint: As ``load`` takes it.
        strict: Raise unless every key of the model gets a tensor and every tensor of the checkpoint is used.
        fate: What becomes of keys that get nothing, for the warning.
        **align_options: As for ``align``.

    Returns:
        The tensors, in the checkpoint's dtypes and without the keys that get nothing, and the alignment.

    Raises:
        NothingLoadedError: No tensor of the checkpoint could be aligned with the model.
        IncompatibleTensorsError: With ``strict``, some key is missing or unexpected.

    Warns:
        PartialLoadWarning, ChoiceWarning, ValueWarning: As of ``load``.
    """
    alignment = align(checkpoint, model, **align_options)
    return state_dict_for(model, alignment, strict=strict, undone="Nothing was loaded.", fate=fate)


def taken_from(options: dict[str, Any]) -> AlignOptions:
    """Remove the options of ``align`` from those of another function, and return them.

    >>> options = {"exclude": "fc", "revision": "main"}
    >>> taken_from(options), options
    ({'exclude': 'fc'}, {'revision': 'main'})
    """
    known = AlignOptions.__annotations__.keys()
    taken: Any = {name: options.pop(name) for name in list(options) if name in known}
    return taken  # type: ignore[no-any-return]
