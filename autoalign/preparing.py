"""Preparing: what is checked and said before tensors are moved, and the checked reading of one."""

from __future__ import annotations

import math
from collections import Counter

from torch import Tensor

from autoalign.alignment import Alignment
from autoalign.checkpoint import Checkpoint
from autoalign.errors import CheckpointError, IncompatibleTensorsError, InputError
from autoalign.matches import FILLED, Match

_NAMED = 4  # keys that a warning names
_REASONS = {
    "missing": "{} without a source",
    "mismatched": "{} of another shape",
    "ambiguous": "{} ambiguous",
    "excluded": "{} excluded",
}


def read_match(alignment: Alignment, match: Match, shape: tuple[int, ...], undone: str) -> Tensor:
    """Read the tensor of a match; its values are there and it has the shape of the target.

    Args:
        alignment: Whose match it is.
        match: What to read.
        shape: The target's.
        undone: What an error says was not done, as a sentence.

    Raises:
        InputError: The source, or a target of which values are kept, is on the meta device.
        CheckpointError: The file holds another shape than it announced.
    """
    tensor = alignment.tensor(match)
    if tensor.is_meta:
        raise InputError(
            f"{', '.join(match.sources)} of the checkpoint is on the meta device and has no values. "
            f"{undone} Give a checkpoint with values."
        )
    if tensor.shape != shape:
        raise CheckpointError(
            f"size mismatch for {match.target}: {', '.join(match.sources)} was read with shape "
            f"{list(tensor.shape)} where {list(shape)} was announced. {undone}"
        )
    return tensor


def require_complete(alignment: Alignment, advice: str) -> None:
    """Raise as ``Alignment.raise_if_incomplete`` does, with advice as the last line."""
    try:
        alignment.raise_if_incomplete()
    except IncompatibleTensorsError as error:
        raise IncompatibleTensorsError(f"{error}\n{advice}", alignment) from None


def summary(alignment: Alignment, source: Checkpoint, target: str) -> str:
    """Say how much of a target, such as ``"ResNet"``, comes from where; a part is never called 100 %."""
    share = math.floor(1000 * alignment.coverage) / 10
    return (
        f"{len(alignment.matches)} of {len(alignment.target_specs)} tensors ({share} % of the elements) "
        f"of {target} from {source!r}"
    )


def unfilled_statement(alignment: Alignment, what: str) -> str:
    """Say how many of the target's tensors get nothing, for which reasons, and which of them nobody left out.

    Args:
        alignment: Whose target it is.
        what: Becomes of them, such as "keep their values".

    Returns:
        A sentence, and one on what is quantised; empty if ``exclude`` and ``include`` left out all that is unfilled.
    """
    status = {key: status for key, status in alignment.status.items() if status not in FILLED}
    named = [key for key in status if key not in alignment.excluded]
    if not named:
        return ""
    counts = Counter("excluded" if key in alignment.excluded else status[key] for key in status)
    reasons = ", ".join(text.format(counts[reason]) for reason, text in _REASONS.items() if counts[reason])
    more = ", ..." if len(named) > _NAMED else ""
    left_out = f" Left out: {', '.join(alignment.left_out)}." if alignment.left_out else ""
    return f"{len(status)} {what}: {', '.join(named[:_NAMED])}{more} ({reasons}).{left_out}"


def nothing_message(alignment: Alignment, source: Checkpoint, target: str, undone: str) -> str:
    """Explain why no tensor of a source could be aligned with those of a target."""
    lines = [
        f"No tensor of {source!r} could be aligned with the {len(alignment.target_specs)} tensors of {target}. {undone}"
    ]
    left_out = alignment.left_out
    numels = {spec.numel for spec in source.specs}
    unlike = sum(spec.numel not in numels for spec in alignment.target_specs)
    if unlike and not left_out:
        lines.append(f"  {unlike} of the model's tensors have a size that no tensor of the checkpoint has.")
    if alignment.excluded:
        lines.append(f"  {len(alignment.excluded)} keys were left out by include and exclude.")
    if alignment.ambiguous:
        lines.append(f"  {len(alignment.ambiguous)} have proposals that were not sure enough:")
        lines += [
            f"    {match.target} from {', '.join(match.sources)} (confidence {match.confidence:.2f})"
            for match in alignment.ambiguous[:3]
        ]
    if alignment.mismatched:
        lines.append(f"  {len(alignment.mismatched)} have counterparts of another shape:")
        lines += [f"    {mismatch}" for mismatch in alignment.mismatched[:3]]
    lines += [f"  {note}" for note in alignment.notes]
    if not left_out:
        lines.append("Check that both are the same network, or pass what you know as rules=.")
    return "\n".join(lines)
