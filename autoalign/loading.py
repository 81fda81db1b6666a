"""Loading: fill a model from a checkpoint by an alignment, all or nothing. The only part that moves data."""

from __future__ import annotations

import logging
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from autoalign.aligning import align
from autoalign.alignment import Alignment
from autoalign.checkpoint import Checkpoint, Side, checkpoint_of
from autoalign.errors import (
    AlignmentError,
    CheckpointError,
    IncompatibleTensorsError,
    InputError,
    NothingLoadedError,
    PartialLoadWarning,
)
from autoalign.module_state import absent_counters, extra_states, source_modules, state_metadata
from autoalign.transaction import cannot_fail, transaction

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], object]


def load(
    model: nn.Module,
    checkpoint: Side,
    *,
    strict: bool = False,
    assign: bool = False,
    progress: Progress | bool | None = None,
    alignment: Alignment | None = None,
    **align_options: Any,
) -> Alignment:
    """Load every tensor of a checkpoint that can be aligned with the model, whatever it is called.

    Values go into the model's own tensors, whose dtype and device stay, through torch's ``load_state_dict``, so that
    load hooks, versions of modules and extra states work as they do there. It is all or nothing: if this raises, the
    model holds what it held before. There is one thing that cannot be taken back: a Ctrl-C while values are copied
    into a model without load hooks of its own takes effect when the copy is complete.

    >>> model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    >>> load(model, {"module.fc.weight": other.weight, "module.fc.bias": other.bias})
    <All keys matched successfully>
    >>> bool((model.weight == other.weight).all())
    True

    Args:
        model: The module to fill.
        checkpoint: A path, a mapping of tensors, a module, or an open ``Checkpoint``.
        strict: Raise unless every key of the model gets a tensor and every tensor of the checkpoint is used.
        assign: Give the model new tensors instead of copying into those it has, as the meta device needs. They have
            the dtype, the ``requires_grad`` and, unless that was meta, the device of the old ones, and tied
            parameters stay tied; an optimizer made before keeps the old ones. A tensor of a mapping may come to be
            shared with the model, as with torch; tensors of a file are copied.
        progress: Called with the number of tensors read and of all, while they are read.
        alignment: One that was made before for the same keys and shapes, such as ``Alignment.read`` gives. It is
            applied as it is, and nothing is matched.
        **align_options: As for ``align``: ``rules``, ``include``, ``exclude``, ``container``, ``min_confidence``, and
            ``adapt``, by which values are changed where a counterpart has another shape.

    Returns:
        The alignment. It unpacks, as in ``missing_keys, unexpected_keys = load(...)``, and ``print`` shows all of it.

    Raises:
        NothingLoadedError: No tensor of the checkpoint could be aligned with the model.
        IncompatibleTensorsError: With ``strict``, some key is missing or unexpected.
        InputError: The model or the checkpoint is of a kind that cannot be used, or one of them has no values on meta.
        CheckpointError: The checkpoint's file cannot be read.
        PairMismatchError: Keys or shapes are not those that ``alignment`` was made for.

    Warns:
        PartialLoadWarning: Keys of the model that ``exclude`` and ``include`` did not leave out keep their values.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"Expected an nn.Module to load into, not {type(model).__name__}. Nothing was loaded.")
    source = checkpoint_of(checkpoint, container=align_options.pop("container", None))
    if alignment is not None and align_options:
        names = ", ".join(align_options)
        raise InputError(f"An alignment is applied as it is, and {names} would change it. Nothing was loaded.")
    alignment = align(source, model, **align_options) if alignment is None else alignment.applied_to(source, model)
    modules = source_modules(alignment)
    counters = absent_counters(model, source, alignment, modules)
    if counters:
        kept = tuple(spec for spec in alignment.target_specs if spec.key not in counters)
        note = f"{len(counters)} num_batches_tracked keep what they had: the checkpoint is from before torch had them."
        alignment = replace(alignment, target_specs=kept, notes=(*alignment.notes, note))
    if not alignment.matches:
        raise NothingLoadedError(_nothing_message(model, source, alignment), alignment)
    if strict:
        try:
            alignment.raise_if_incomplete()
        except IncompatibleTensorsError as error:
            advice = f"The model was not changed. Pass strict=False to load the {len(alignment.matches)} that match."
            raise IncompatibleTensorsError(f"{error}\n{advice}", alignment) from None

    targets = model.state_dict(keep_vars=True)
    tensors = _read(source, alignment, targets, assign=assign, progress=progress)
    state_dict: OrderedDict[str, object] = OrderedDict(tensors)
    state_dict.update(extra_states(source, targets, modules))
    state_dict._metadata = state_metadata(source, alignment, targets, modules, counters)  # type: ignore[attr-defined]

    share = math.floor(1000 * alignment.coverage) / 10  # rounded down, so that a part is never called 100 %
    summary = (
        f"{len(alignment.matches)} of {len(alignment.target_specs)} tensors ({share} % of the elements) "
        f"of {type(model).__name__} from {source!r}"
    )
    unfilled = [key for key in alignment.missing_keys if key not in alignment.excluded]
    if unfilled:  # before anything is changed, since a warning may be turned into an error
        named = ", ".join(unfilled[:4]) + (", ..." if len(unfilled) > 4 else "")
        left = "stay on meta, without values" if any(targets[key].is_meta for key in unfilled) else "keep their values"
        warnings.warn(
            f"Loading {summary}. {len(unfilled)} {left}: {named}. print(alignment) shows all.",
            PartialLoadWarning,
            stacklevel=2,
        )
    with transaction(model, keep_values=not cannot_fail(model, targets, tensors)):
        result = model.load_state_dict(state_dict, strict=False, **({"assign": True} if assign else {}))
        untaken = [key for key in getattr(result, "unexpected_keys", ()) if key in tensors]
        if untaken:
            raise AlignmentError(
                f"load_state_dict of {type(model).__name__} does not take {len(untaken)} of the keys that its own "
                f"state_dict gives: {', '.join(untaken[:3])}. The model was not changed. Load into the inner module.",
                alignment,
            )
    if assign:  # the tensors that the model had are not the ones it has now
        alignment = replace(alignment, target_tensors=checkpoint_of(model))
    logger.info("Loaded %s; %d keys missing, %d unexpected.", summary, *map(len, alignment))
    return alignment


def _read(
    source: Checkpoint,
    alignment: Alignment,
    targets: Mapping[str, Tensor],
    *,
    assign: bool,
    progress: Progress | bool | None,
) -> dict[str, Tensor]:
    """Read what is loaded, and find out beforehand whatever would make the load fail halfway or do nothing."""
    on_meta = [match.target for match in alignment.matches if targets[match.target].is_meta]
    if on_meta and not assign:
        raise InputError(
            f"{len(on_meta)} tensors of the model are on the meta device, where a copy does nothing: "
            f"{', '.join(on_meta[:3])}. The model was not changed. Pass assign=True to give it new tensors."
        )
    memories = {_memory(target) for target in targets.values() if isinstance(target, Tensor)} - {None}
    assigned: dict[int, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for done, match in enumerate(alignment.matches, start=1):
        target, tensor = targets[match.target], alignment.tensor(match)
        if tensor.is_meta:
            raise InputError(
                f"{', '.join(match.sources)} of the checkpoint is on the meta device and has no values. "
                "The model was not changed. Give a checkpoint with values."
            )
        if tensor.shape != target.shape:
            raise CheckpointError(
                f"size mismatch for {match.target}: {', '.join(match.sources)} was read with shape "
                f"{list(tensor.shape)} where {list(target.shape)} was announced. The model was not changed."
            )
        if assign:
            tensor = assigned.setdefault(id(target), _assignable(tensor, target, copy=source.path is not None))
        elif _memory(tensor) in memories:  # the model's own values may change before they are copied
            tensor = tensor.clone()
        tensors[match.target] = tensor
        if callable(progress):
            progress(done, len(alignment.matches))
    ties = {key: assigned[id(target)] for key, target in targets.items() if id(target) in assigned}
    return tensors | ties  # a tied key that no match fills would keep the old tensor


def _assignable(tensor: Tensor, target: Tensor, *, copy: bool) -> Tensor:
    device = tensor.device if target.is_meta else target.device
    # a copy of a tensor that is mapped from a file, since overwriting the file would take the model's values away
    tensor = tensor.to(device=device, dtype=target.dtype, copy=copy)
    return nn.Parameter(tensor, requires_grad=target.requires_grad) if isinstance(target, nn.Parameter) else tensor


def _memory(tensor: Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a tensor subclass without a storage of its own
        return None


def _nothing_message(model: nn.Module, source: Checkpoint, alignment: Alignment) -> str:
    lines = [
        f"No tensor of {source!r} could be aligned with the {len(alignment.target_specs)} tensors of "
        f"{type(model).__name__}. Nothing was loaded and the model was not changed."
    ]
    numels = {spec.numel for spec in source.specs}
    unlike = sum(spec.numel not in numels for spec in alignment.target_specs)
    if unlike:
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
    lines.append("Check that both are the same network, or pass what you know as rules=.")
    return "\n".join(lines)
