"""Loading: fill a model from a checkpoint by an alignment, all or nothing. The only part that moves data."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoalign.alignment import Alignment
from autoalign.checkpoints.atomic import interrupts_held
from autoalign.checkpoints.checkpoint import Checkpoint, Side, checkpoint_of, uninitialized
from autoalign.checkpoints.config import ROTARY_SETTINGS
from autoalign.checkpoints.stored import named_dtype
from autoalign.errors import (
    AlignmentError,
    CheckpointError,
    ChoiceWarning,
    InputError,
    NothingLoadedError,
    PartialLoadWarning,
    ValueWarning,
)
from autoalign.loading.conflicts import settled
from autoalign.loading.fill import CutError, MappedFiles, copy_all, mapped_files
from autoalign.loading.prepare import (
    Progress,
    absent_counters,
    caller_level,
    extra_states,
    named_sources,
    nothing_message,
    progress_of,
    require_complete,
    require_same_tensors,
    shaped,
    source_modules,
    state_metadata,
    summary,
    unfilled_statement,
)
from autoalign.loading.read import Findings, check_devices, fills_of, given_by, in_one, read_ahead, tensors_of
from autoalign.loading.rendezvous import announced_unsharded, wait_for_ranks
from autoalign.loading.sharded import (
    Ranks,
    ShardPlan,
    digests,
    fill_parts,
    fills_surely,
    plan_of,
    ranks_of,
    register,
    require_same,
)
from autoalign.loading.transaction import cannot_fail, converted, copies_surely, model_lock, takes_copies, transaction
from autoalign.matching.layouts import ROTARY
from autoalign.matching.match import match_tensors
from autoalign.plan.matches import Caution

logger = logging.getLogger(__name__)

_INTERVAL = 0.002  # seconds between two looks at a file that is being copied


def load_checkpoint(
    model: nn.Module,
    checkpoint: Side,
    align_options: Mapping[str, Any],
    *,
    strict: bool,
    assign: bool,
    progress: Progress | bool | None,
    dtype: torch.dtype | str | None,
    device: torch.device | str | int | None,
    alignment: Alignment | None,
) -> Alignment:
    """Fill a model from a checkpoint; see ``autoalign.load``. ``align_options`` are those of ``match_tensors``."""
    since = time.perf_counter()
    if not isinstance(model, nn.Module):
        raise InputError(f"Expected an nn.Module to load into, not {type(model).__name__}. Nothing was loaded.")
    dtype, device = _conversion(dtype, device)
    from_files = isinstance(checkpoint, str | os.PathLike)  # else, what is mapped may have been written to
    with ExitStack() as announced, model_lock(model):
        ranks = ranks_of(model)
        if ranks is not None:

            def prepare() -> _Prepared:
                if dtype is not None or device is not None:
                    raise InputError(
                        "A sharded model is given its dtype and device when it is sharded. Nothing was loaded."
                    )
                return _prepared(model, checkpoint, align_options, alignment, strict=strict)

            return _load_sharded(
                model, prepare, ranks, assign=assign, progress=progress, since=since, from_files=from_files
            )
        announced.enter_context(announced_unsharded(model))
        source, found, counters = _prepared(model, checkpoint, align_options, alignment, strict=strict)
        if dtype is not None:  # what it is about to be
            _refuse_codes(found)
            specs = found.target_specs
            converted_specs = (replace(s, dtype=dtype) if s.dtype.is_floating_point else s for s in specs)
            found = replace(found, target_specs=tuple(converted_specs))

        def fill() -> Alignment:
            return _fill(model, source, found, counters, options, progress, since, from_files=from_files)

        options = {"assign": True, "dtype": dtype, "device": device} if assign else {}
        if dtype is None and device is None:
            return fill()
        with transaction(model, keep_values=False, keep_memory=True):
            if not assign:
                converted(model, dtype, device)
            filled = fill()
            if assign:  # what is not new
                converted(model, dtype, device)
        return replace(filled, target_tensors=checkpoint_of(model))


def _refuse_codes(alignment: Alignment) -> None:
    """Refuse another dtype for a model some of whose floating-point tensors are codes.

    Raises:
        InputError: It is such a model.
    """
    members = alignment.quantised[1].values()
    if codes := [member for member in members if member.role == "codes" and member.spec.dtype.is_floating_point]:
        raise InputError(
            f"dtype= would change the codes of the model's quantised tensors, such as {codes[0].spec.key} "
            f"({codes[0].group.scheme}). Nothing was loaded. Leave it out."
        )


def _conversion(
    dtype: torch.dtype | str | None, device: torch.device | str | int | None
) -> tuple[torch.dtype | None, torch.device | None]:
    found = named_dtype(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and (found.is_floating_point or found.is_complex)):
        raise InputError(f"dtype={dtype!r} is no dtype of weights, such as 'bfloat16'. Nothing was loaded.")
    try:
        place = None if device is None else torch.device(device)
        torch.empty(0, device=place)  # torch says only here that a device is not there
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise InputError(f"device={device!r} cannot be used: {error}. Nothing was loaded.") from error
    return found, place


_Prepared = tuple[Checkpoint, Alignment, frozenset[str]]


def _prepared(
    model: nn.Module, checkpoint: Side, options: Mapping[str, Any], made: Alignment | None, *, strict: bool
) -> _Prepared:
    """Decide what is loaded from where, and which BatchNorm counters the checkpoint is too old to have."""
    if made is not None and not isinstance(made, Alignment):
        raise InputError(f"alignment= takes an Alignment, not {type(made).__name__}. Nothing was loaded.")
    container = options.get("container")
    source = checkpoint_of(checkpoint, container=container)
    rest = {name: value for name, value in options.items() if name != "container"}
    if made is not None and rest:
        changes = ", ".join(rest)
        raise InputError(f"An alignment is applied as it is, and {changes} would change it. Nothing was loaded.")
    alignment = _aligned(model, source, rest) if made is None else made.applied_to(source, model)
    source = alignment.tensors if isinstance(alignment.tensors, Checkpoint) else source  # another container, perhaps
    alignment = settled(alignment)
    counters = absent_counters(model, source, alignment, source_modules(alignment))
    if counters:
        kept = tuple(spec for spec in alignment.target_specs if spec.key not in counters)
        note = f"{len(counters)} num_batches_tracked keep what they had: the checkpoint is from before torch had them."
        alignment = replace(alignment, target_specs=kept, notes=(*alignment.notes, note))
    if not alignment.matches:
        undone = "Nothing was loaded and the model was not changed."
        raise NothingLoadedError(nothing_message(alignment, source, type(model).__name__, undone), alignment)
    if strict:
        advice = f"The model was not changed. Pass strict=False to load the {len(alignment.matches)} that match."
        require_complete(alignment, advice)
    return source, alignment, counters


def _aligned(model: nn.Module, source: Checkpoint, options: Mapping[str, Any]) -> Alignment:
    """Align, with shapes for what has none yet, and with a place in the report for what is left out."""
    lazy = uninitialized(model)
    if lazy:
        known = named_sources(lazy, source)
        if len(known) < len(lazy):
            rest = Alignment.of(match_tensors(source, shaped(model, lazy, known), **options))
            known |= named_sources({key: lazy[key] for key in lazy if key not in known}, source, rest)
        target = shaped(model, lazy, known)
    else:
        target = checkpoint_of(model)
    alignment = Alignment.of(match_tensors(source, target, **options))
    left_out = target.left_out
    notes = tuple(f"Of the model, {note[0].lower()}{note[1:]}" for note in target.notes if left_out)
    if lazy:
        unknown = len(lazy) - len(known)
        notes += (f"{len(known)} tensors of lazy modules have the shapes of those with their names in the checkpoint.",)
        notes += (f"{unknown} tensors of lazy modules stay without a shape.",) if unknown else ()
    if not left_out:
        return replace(alignment, notes=(*alignment.notes, *notes))
    order = {key: place for place, key in enumerate(model.state_dict(keep_vars=True))}
    return replace(
        alignment,
        target_specs=tuple(sorted((*alignment.target_specs, *left_out), key=lambda spec: order[spec.key])),
        notes=(*alignment.notes, *notes),
    )


def _fill(
    model: nn.Module,
    source: Checkpoint,
    alignment: Alignment,
    counters: frozenset[str],
    options: Mapping[str, Any],
    progress: Progress | bool | None,
    since: float,
    *,
    from_files: bool,
) -> Alignment:
    """Move what is matched into a model that is this process's own, and say what was done."""
    targets: dict[str, Tensor] = model.state_dict(keep_vars=True)
    check_devices(alignment, targets, assign="assign" in options)
    source.require_unchanged()
    findings = Findings()
    loaded = summary(alignment, source, type(model).__name__)
    opened = _mapped_paths(source, from_files=from_files)
    with (
        progress_of(progress, len(alignment.matches), _size(alignment), since) as step,
        mapped_files(opened) as files,
    ):
        fills, ahead, is_ahead = None, None, False
        if opened and "assign" not in options:
            with _cut_said():
                ahead, is_ahead = read_ahead(list(given_by(source, alignment)), files)
        if "assign" not in options and takes_copies(model, [match.target for match in alignment.matches]):
            findings = Findings(pieces=files.pieces)
            postpone = source.is_resident and not is_ahead and not _may_raise(ValueWarning)
            early = _no_step if source.is_resident else step
            given = given_by(source, alignment) if ahead is None else ahead
            with _cut_said():
                fills = fills_of(given, alignment, targets, findings, early, postpone=postpone, files=files)
            if not all(copies_surely(given, part) for fill in fills for part, given in fill.copies):
                fills, findings = None, Findings()
        if fills is None:
            given = given_by(source, alignment) if ahead is None else ahead
            tensors = tensors_of(given, alignment, targets, findings, step, **options)
        _warn_of_choices(loaded, alignment)
        _warn_of_keys(loaded, alignment, targets)  # before a change, since a warning may be turned into an error
        _warn_of_values(loaded, findings)
        if fills is None:
            _load_state_dict(model, source, alignment, counters, targets, tensors, options)
        else:
            # what is mapped is only read as it is copied, and then a function of the caller's may raise
            is_cancellable = callable(progress) and source.is_resident
            require_same_tensors(model, alignment, targets)
            source.require_unchanged(_changed_advice(is_kept=True))
            postponed = len(findings.postponed)
            checked = time.perf_counter()

            def stepped(done: int, size: int) -> None:
                nonlocal checked
                if not is_ahead and time.perf_counter() - checked > _INTERVAL:
                    source.require_unchanged("")
                    checked = time.perf_counter()
                findings.examine_postponed(done - postponed + len(findings.postponed))  # while others are copied
                if source.is_resident:
                    step(done, size)

            with transaction(model, keep_values=is_cancellable):
                try:
                    copy_all(fills, stepped, files)
                    if not is_ahead:
                        source.require_unchanged("")
                except CheckpointError as error:
                    raise CheckpointError(f"{str(error).strip()} {_changed_advice(is_cancellable)}") from error
                if is_cancellable:
                    require_same_tensors(model, alignment, targets)
            if postponed:
                _warn_of_values(loaded, findings)
    if "assign" in options:  # the tensors that the model had are not the ones it has now
        alignment = replace(alignment, target_tensors=checkpoint_of(model))
    logger.info("Loaded %s; %d keys missing, %d unexpected.", loaded, *map(len, alignment))
    return findings.noted(alignment)


def _load_state_dict(
    model: nn.Module,
    source: Checkpoint,
    alignment: Alignment,
    counters: frozenset[str],
    targets: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    options: Mapping[str, Any],
) -> None:
    """Load by torch's own function, with what it passes on to modules beside tensors."""
    modules = source_modules(alignment)
    state_dict: OrderedDict[str, object] = OrderedDict(tensors)
    state_dict.update(extra_states(source, targets, modules))
    state_dict._metadata = state_metadata(source, alignment, targets, modules, counters)  # type: ignore[attr-defined]
    is_kept = not cannot_fail(model, targets, tensors)
    with transaction(model, keep_values=is_kept):
        try:
            assign = {"assign": True} if "assign" in options else {}
            result = model.load_state_dict(state_dict, strict=False, **assign)
            source.require_unchanged(_changed_advice(is_kept or "assign" in options))
        except RuntimeError as error:
            if not str(error).startswith("Error(s) in loading state_dict"):  # it is of code of the model
                raise
            raise AlignmentError(f"{error}\nThe model was not changed.", alignment) from error
        untaken = [key for key in getattr(result, "unexpected_keys", ()) if key in tensors]
        if untaken:
            raise AlignmentError(
                f"load_state_dict of {type(model).__name__} does not take {len(untaken)} of the keys that its own "
                f"state_dict gives: {', '.join(untaken[:3])}. The model was not changed. Load into the inner module.",
                alignment,
            )


def _load_sharded(
    model: nn.Module,
    prepare: Callable[[], _Prepared],
    ranks: Ranks,
    *,
    assign: bool,
    progress: Progress | bool | None,
    since: float,
    from_files: bool,
) -> Alignment:
    """Load the parts of a model that this and other processes hold, on all or on none; the first of them reports."""
    findings = Findings()
    reported = progress if ranks.is_first else False

    def prepared() -> tuple[tuple[Checkpoint, Alignment, dict[str, Tensor], MappedFiles], tuple[str, str]]:
        source, alignment, _ = prepare()
        targets: dict[str, Tensor] = model.state_dict(keep_vars=True)
        check_devices(alignment, targets, assign=assign)
        read = reading.enter_context(mapped_files(_mapped_paths(source, from_files=from_files)))
        return (source, alignment, targets, read), digests(source, alignment, read)

    def planned() -> tuple[ShardPlan, tuple[bool, bool]]:
        with _cut_said():
            plan = plan_of(source, alignment, targets, files, assign=assign)
        if ranks.is_first:  # before a change, since a warning may be turned into an error
            _warn_of_choices(loaded, alignment)
            _warn_of_keys(loaded, alignment, targets)
        surely = fills_surely(model, source, alignment, targets, assign=assign) and not callable(reported)
        return plan, (surely, ranks.is_first and _may_raise(ValueWarning))

    def filled() -> tuple[None, Findings]:
        found = Findings(pieces=files.pieces)
        with _cut_said(is_kept=not is_changed):
            fill_parts(source, plan, found, step, files)
        source.require_unchanged(_changed_advice(is_kept=not is_changed))
        register(model, plan, targets, assign=assign)
        return None, replace(found, pieces=in_one)  # which other processes can be given

    def warned() -> tuple[None, None]:
        if ranks.is_first:
            _warn_of_values(loaded, findings)
        return None, None

    with ExitStack() as reading, ExitStack() as held:
        held.enter_context(interrupts_held())
        wait_for_ranks(model, ranks.group)
        (source, alignment, targets, files), given = ranks.each(prepared, held)
        require_same(given, alignment)
        loaded = summary(alignment, source, type(model).__name__)
        plan, votes = ranks.each(planned, held)
        may_raise_late = any(may_raise for _, may_raise in votes)
        is_kept = may_raise_late or not all(surely for surely, _ in votes)
        undone = "the model was not changed on any"
        if is_changed := not is_kept and not assign:
            undone = "the model may have changed in part: load it anew"
        with (
            progress_of(reported, len(alignment.matches), _size(alignment), since) as step,
            transaction(model, keep_values=is_kept),
        ):
            _, all_findings = ranks.each(filled, held, undone=undone, is_changed=is_changed, stops=is_kept)
            for found in all_findings:
                findings.merge(found)
            if may_raise_late:
                ranks.each(warned, held, undone=undone)
        if not may_raise_late:
            warned()
    if assign:
        alignment = replace(alignment, target_tensors=checkpoint_of(model))
    if ranks.is_first:
        logger.info("Loaded %s; %d keys missing, %d unexpected.", loaded, *map(len, alignment))
    return findings.noted(alignment)


def _mapped_paths(source: Checkpoint, *, from_files: bool) -> list[Path]:
    """List the files that can be read in place of what is mapped of them."""
    return [path for path, _ in source.opened] if from_files and source.is_resident else []


def _changed_advice(is_kept: bool) -> str:
    """Say what became of the model, and what to do, where a file was changed while it was loaded."""
    state = "was not changed" if is_kept else "was being filled and holds old and new values"
    return f"The model {state}. Load again when the file is complete."


@contextmanager
def _cut_said(*, is_kept: bool = True) -> Iterator[None]:
    """Say what became of the model where a file is cut while it is read; by default, before anything is changed."""
    try:
        yield
    except CutError as error:
        raise CheckpointError(f"{error} {_changed_advice(is_kept)}") from error


def _no_step(_done: int, _size: int) -> None:
    """Report nothing of what takes no time."""


def _size(alignment: Alignment) -> int:
    sizes = {spec.key: spec.numel * spec.dtype.itemsize for spec in alignment.target_specs}
    return sum(sizes[match.target] for match in alignment.matches)


def _may_raise(category: type[Warning]) -> bool:
    """Tell whether a warning of some category may be turned into an error."""
    for action, message, kind, module, line in warnings.filters:
        if issubclass(category, kind) and (action == "error" or not (message or module or line)):
            return action == "error"  # the first filter that fits counts; whether some do is not known yet
    return False


def _warn_of_keys(loaded: str, alignment: Alignment, targets: Mapping[str, Tensor]) -> None:
    """Warn of what is not filled, on behalf of the caller of ``load``."""
    on_meta = any(targets[key].is_meta for key in alignment.missing_keys)
    unfilled = unfilled_statement(alignment, "stay on meta, without values" if on_meta else "keep their values")
    if unfilled:
        warnings.warn(
            f"Loading {loaded}. {unfilled} print(alignment) shows all.{_rotary_note(alignment)}",
            PartialLoadWarning,
            stacklevel=caller_level(),
        )


def _warn_of_choices(loaded: str, alignment: Alignment) -> None:
    """Warn of what could as well have been taken, on behalf of the caller of ``load``."""
    for note in alignment.notes:
        if isinstance(note, Caution):
            warnings.warn(f"Loading {loaded}. {note}", ChoiceWarning, stacklevel=caller_level())


def _rotary_note(alignment: Alignment) -> str:
    """Repeat the note that says how to settle rotated queries and keys, if any are ambiguous."""
    if not any(ROTARY in match.warnings for match in alignment.ambiguous):
        return ""
    return "".join(f" {note}" for note in alignment.notes if ROTARY_SETTINGS[0] in note)


def _warn_of_values(loaded: str, findings: Findings) -> None:
    """Warn of values that a person should know of, on behalf of the caller of ``load``."""
    if statements := findings.statements():
        warnings.warn(
            f"Loading {loaded}. {' '.join(statements)} They are loaded as they are.",
            ValueWarning,
            stacklevel=caller_level(),
        )
