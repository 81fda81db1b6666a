"""The sides that arguments name: paths, and models such as ``timm:resnet50(num_classes=10)``, which are built."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

from autoalign.cli.terminal import stop_display
from autoalign.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from autoalign.checkpoints.checkpoint import Side


def side_of(given: str | Sequence[str], *, values: bool = False) -> Side:
    """Return an argument, or several that are one checkpoint, as one side of an alignment.

    It is a path if there is such a file or folder, or one that such a pattern takes, else a model. With ``values``, a
    model is built with its initial values, and not on the meta device.
    """
    from autoalign.checkpoints.paths import is_file
    from autoalign.checkpoints.remote import is_remote

    texts = [given] if isinstance(given, str) else given
    if any(map(is_remote, texts)):
        stop_display()  # a download shows its own
    if len(texts) > 1:
        return texts
    return texts[0] if is_file(texts[0]) else _built(texts[0], values=values)


def model_of(text: str, *, values: bool = True, hint: str = "") -> nn.Module:
    """Build a model, with its initial values or on the meta device; the ``hint`` is for what is none."""
    from torch import nn

    from autoalign.checkpoints.paths import is_file
    from autoalign.checkpoints.remote import is_remote

    model = None if is_file(text) and not is_remote(text) else _built(text, values=values)
    if not isinstance(model, nn.Module):
        what = "a path" if model is None else f"a {type(model).__name__}"
        raise InputError(f"{text!r} is {what}, not a model such as timm:resnet50. Nothing was done.{hint}")
    return model


def _built(text: str, *, values: bool) -> nn.Module | Mapping[str, object]:
    from autoalign.checkpoints.named_models import build

    with redirect_stdout(sys.stderr), warnings.catch_warnings():  # what its code prints is not a result
        warnings.simplefilter("ignore")  # of how a library will initialise weights in future
        return build(text, values=values)
