"""Lightning: a callback that fills a module when a fit begins, and a hook for checkpoints of other names."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any, Unpack

from autoalign.alignment import Alignment
from autoalign.api import load
from autoalign.checkpoints.checkpoint import Side
from autoalign.errors import DependencyError
from autoalign.integrations.state_dicts import aligned_state_dict
from autoalign.plan.options import AlignOptions

if TYPE_CHECKING:
    from torch import nn

Callback: Any = object
for name in ("lightning.pytorch", "pytorch_lightning"):
    with suppress(ImportError):
        Callback = import_module(name).Callback
        break


class AlignedWeights(Callback):  # type: ignore[misc]
    """Fill a module from any checkpoint when ``fit`` begins; values of one that it resumes from come after that.

    Args:
        checkpoint: As ``autoalign.load`` takes it.
        submodule: The dotted path of the part to fill, such as ``"backbone"``; all of the module by default.
        strict: Raise unless every key gets a tensor and every tensor of the checkpoint is used.
        **align_options: As for ``autoalign.align``.

    Attributes:
        alignment: What was loaded; None before.
    """

    def __init__(
        self, checkpoint: Side, *, submodule: str = "", strict: bool = False, **align_options: Unpack[AlignOptions]
    ) -> None:
        if Callback is object:
            raise DependencyError.of("Lightning", "Nothing was made.")
        self.checkpoint = checkpoint
        self.submodule = submodule
        self.strict = strict
        self.align_options = align_options
        self.alignment: Alignment | None = None

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:  # noqa: ARG002, as Lightning calls it
        if stage == "fit":
            part = pl_module.get_submodule(self.submodule)
            self.alignment = load(part, self.checkpoint, strict=self.strict, **self.align_options)


def on_load_checkpoint(module: nn.Module, checkpoint: dict[str, Any], **align_options: Unpack[AlignOptions]) -> None:
    """Convert the ``state_dict`` of a checkpoint of Lightning, in place, to the names and shapes of a module.

    As a method, ``on_load_checkpoint = autoalign.integrations.lightning.on_load_checkpoint`` in the class, it makes
    ``load_from_checkpoint`` and ``fit(ckpt_path=...)`` take checkpoints of other code; or call it in one of your own.
    States of optimizers stay as they are, in the order of the parameters.

    >>> import torch
    >>> checkpoint = {"state_dict": {"fc.weight": torch.ones(1, 2), "fc.bias": torch.ones(1)}}
    >>> on_load_checkpoint(torch.nn.Linear(2, 1), checkpoint)
    >>> list(checkpoint["state_dict"])
    ['weight', 'bias']

    Raises:
        NothingLoadedError: No tensor of the checkpoint could be aligned with the module.
    """
    checkpoint["state_dict"] = aligned_state_dict(module, checkpoint["state_dict"], **align_options)[0]
