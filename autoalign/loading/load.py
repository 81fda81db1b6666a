"""Loading: fill a model from a checkpoint by an alignment, all or nothing."""

from __future__ import annotations

import logging
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoalign.alignment import Alignment
from autoalign.checkpoints.atomic import interrupts_held
from autoalign.checkpoints.checkpoint import Checkpoint, Side, checkpoint_of
from autoalign.checkpoints.config import ROTARY_SETTINGS
from autoalign.checkpoints.paths import is_given
from autoalign.checkpoints.stored import named_dtype
from autoalign.errors import AlignmentError, CheckpointError, InputError, ValueWarning, did_you_mean, kind_of, listed
from autoalign.loading import fill, prepare, sharded
from autoalign.loading.mapped import CutError, MappedFiles, mapped_files
from autoalign.loading.transaction import (
    can_copy_in_place,
    cannot_fail,
    converted,
    model_lock,
    supports_plain_copy,
    transaction,
)
from autoalign.loading.values import Findings, in_one
from autoalign.matching.layouts import ROTARY

logger = logging.getLogger(__name__)

_DTYPES = ("float16", "bfloat16", "float32", "float64", "half", "float", "double")  # the usual ones
_DEVICES = ("cpu", "cuda", "mps", "xpu", "meta", "hpu", "mtia", "xla", "hip", "ipu", "vulkan")
_CHECK_INTERVAL = 0.002  # seconds between two looks at a file that is being copied


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of ``load``."""

    model: nn.Module
    assign: bool
    progress: fill.Progress | bool | None
    dtype: torch.dtype | None  # that the model is to get, or None
    device: torch.device | None  # as well
    since: float  # when it began, by `time.perf_counter`
    from_files: bool  # else, what is mapped may have been written to


def load_checkpoint(
    model: nn.Module,
    checkpoint: Side,
    align_options: Mapping[str, Any],
    *,
    strict: bool = False,
    assign: bool = False,
    progress: fill.Progress | bool | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    alignment: Alignment | None = None,
) -> Alignment:
    """Fill a model from a checkpoint; see ``autoalign.load``. ``align_options`` are those of ``match_tensors``."""
    since = time.perf_counter()
    if not isinstance(model, nn.Module):
        raise InputError(
            f"Expected an nn.Module to load into, not {kind_of(model)}. Nothing was loaded."
            + (" Did you mean load(model, checkpoint)? The model comes first." * isinstance(checkpoint, nn.Module))
        )
    call = _Call(model, assign, progress, *_conversion(dtype, device), since, is_given(checkpoint))
    is_converted = not (call.dtype is None and call.device is None)
    with ExitStack() as announced, model_lock(model):
        ranks = None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = sharded.ranks_of(model)
            if ranks is None:
                announced.enter_context(sharded.announced_unsharded(model))

        def get_ready() -> prepare.Prepared:
            if ranks is not None and is_converted:
                raise InputError(
                    "A sharded model is given its dtype and device when it is sharded. Nothing was loaded."
                )
            return _prepared(model, checkpoint, align_options, alignment, strict=strict)

        if ranks is not None:
            return _load_sharded(call, get_ready, ranks)
        ready = get_ready()
        if call.dtype is not None:
            ready = replace(ready, alignment=_with_dtype(ready.alignment, call.dtype))
        if not is_converted:
            return _fill(call, ready)
        with transaction(model, keep_values=False, keep_memory=True):
            if not assign:
                converted(model, call.dtype, call.device)
            filled = _fill(call, ready)
            if assign:  # what is not new
                converted(model, call.dtype, call.device)
        return replace(filled, target_tensors=checkpoint_of(model))


def _with_dtype(alignment: Alignment, dtype: torch.dtype) -> Alignment:
    """Return an alignment with the specs that the target is about to have."""
    members = alignment.quantised[1].values()
    if codes := [member for member in members if member.role == "codes" and member.spec.dtype.is_floating_point]:
        raise InputError(
            f"dtype= would change the codes of the model's quantised tensors, such as {codes[0].spec.key} "
            f"({codes[0].group.scheme}). Nothing was loaded. Leave it out."
        )
    specs = (replace(spec, dtype=dtype) if spec.dtype.is_floating_point else spec for spec in alignment.target_specs)
    return replace(alignment, target_specs=tuple(specs))


def _conversion(
    dtype: torch.dtype | str | None, device: torch.device | str | int | None
) -> tuple[torch.dtype | None, torch.device | None]:
    found = named_dtype(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and (found.is_floating_point or found.is_complex)):
        hint = did_you_mean(dtype, _DTYPES) if isinstance(dtype, str) else ""
        raise InputError(f"dtype={dtype!r} is not a dtype of weights, such as 'bfloat16'. Nothing was loaded.{hint}")
    try:
        place = None if device is None else torch.device(device)
        torch.empty(0, device=place)  # torch says only here that a device is not there
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise InputError(f"device={device!r} {_device_problem(device)}") from error
    return found, place


def _device_problem(device: torch.device | str | int | None) -> str:
    """Return why a device cannot be used, and which one can."""
    kind = str(device).partition(":")[0]
    if isinstance(device, str) and kind not in _DEVICES:
        return f"is not the name of a device. Nothing was loaded.{did_you_mean(kind, _DEVICES) or ' Use cpu.'}"
    count = torch.cuda.device_count()
    if kind == "cuda" and count == 0:
        return "needs CUDA, and torch finds no CUDA device here. Nothing was loaded. Did you mean 'cpu'?"
    here = f"there are {count} CUDA devices, counted from 0" if count else "torch cannot use it here"
    return f"cannot be used: {here}. Nothing was loaded. Did you mean '{'cuda:0' if count else 'cpu'}'?"


def _prepared(
    model: nn.Module, checkpoint: Side, options: Mapping[str, Any], made: Alignment | None, *, strict: bool
) -> prepare.Prepared:
    if made is not None and not isinstance(made, Alignment):
        raise InputError(f"alignment= takes an Alignment, not {type(made).__name__}. Nothing was loaded.")
    source = checkpoint_of(checkpoint, container=options.get("container"))
    rest = {name: value for name, value in options.items() if name != "container"}
    if made is not None and rest:
        changes = ", ".join(
            {"order_of_use": "example_inputs", "decide": "source_model"}.get(name, name) for name in rest
        )
        raise InputError(f"An alignment is applied as it is, and {changes} would change it. Nothing was loaded.")
    return prepare.prepared(
        prepare.aligned(model, source, rest) if made is None else made.applied_to(source, model),
        model,
        type(model).__name__,
        strict=strict,
        undone="Nothing was loaded and the model was not changed.",
    )


def _fill(call: _Call, ready: prepare.Prepared) -> Alignment:
    """Move what is matched into a model that is this process's own, and report what was done."""
    model, source, alignment = call.model, ready.source, ready.alignment
    targets: dict[str, Tensor] = model.state_dict(keep_vars=True)
    fill.check_devices(alignment, targets, assign=call.assign)
    source.require_unchanged()
    findings = Findings()
    opened = _mapped_paths(call, source)
    with (
        fill.progress_of(call.progress, len(alignment.matches), _size(alignment), call.since) as step,
        mapped_files(opened) as files,
    ):
        fills, ahead, is_ahead = None, None, False
        if opened and not call.assign:
            with _cut_explained():
                ahead, is_ahead = fill.read_ahead(list(fill.read_sources(source, alignment)), files)
        if not call.assign and supports_plain_copy(model, [match.target for match in alignment.matches]):
            findings = Findings(pieces=files.pieces)
            postpone = source.is_resident and not is_ahead and not _may_raise(ValueWarning)
            given = fill.read_sources(source, alignment) if ahead is None else ahead
            early: fill.Step = (lambda _done, _size: None) if source.is_resident else step  # what takes no time
            with _cut_explained():
                fills = fill.fills_of(given, alignment, targets, findings, early, postpone=postpone, files=files)
            if not all(can_copy_in_place(given, part) for each in fills for part, given in each.copies):
                fills, findings = None, Findings()
        if fills is None:
            given = fill.read_sources(source, alignment) if ahead is None else ahead
            dtype, device = (call.dtype, call.device) if call.assign else (None, None)  # else as they are
            tensors = fill.tensors_of(
                given, alignment, targets, findings, step, assign=call.assign, dtype=dtype, device=device
            )
        prepare.warn_of_choices(f"Loading {ready.summary}", alignment)
        _warn_of_keys(ready, targets)  # before a change, since a warning may be turned into an error
        _warn_of_values(ready, findings)
        if fills is None:
            _load_state_dict(call, ready, targets, tensors)
        else:
            # what is mapped is only read as it is copied, and then a function of the caller's may raise
            is_cancellable = callable(call.progress) and source.is_resident
            _require_same_tensors(model, alignment, targets)
            source.require_unchanged(_changed_advice(is_kept=True))
            postponed = len(findings.postponed)
            checked = time.perf_counter()

            def stepped(done: int, size: int) -> None:
                nonlocal checked
                if not is_ahead and time.perf_counter() - checked > _CHECK_INTERVAL:
                    source.require_unchanged("")
                    checked = time.perf_counter()
                findings.examine_postponed(done - postponed + len(findings.postponed))  # while others are copied
                if source.is_resident:
                    step(done, size)

            with transaction(model, keep_values=is_cancellable):
                try:
                    fill.copy_all(fills, stepped, files)
                    if not is_ahead:
                        source.require_unchanged("")
                except CheckpointError as error:
                    raise CheckpointError(f"{str(error).strip()} {_changed_advice(is_cancellable)}") from error
                if is_cancellable:
                    _require_same_tensors(model, alignment, targets)
            if postponed:
                _warn_of_values(ready, findings)
    return _reported(call, ready, findings)


def _require_same_tensors(model: nn.Module, alignment: Alignment, targets: Mapping[str, Tensor]) -> None:
    """Raise AlignmentError if the model does not have the tensors any more that are to be filled."""
    now: Mapping[str, object] = model.state_dict(keep_vars=True)
    gone = [match.target for match in alignment.matches if now.get(match.target) is not targets[match.target]]
    if gone:
        raise AlignmentError(
            f"The model changed while it was loaded: it has other tensors now for {listed(gone)}. Nothing was loaded. "
            "Load when nothing else changes the model.",
            alignment,
        )


def state_dict_for(
    model: nn.Module, alignment: Alignment, *, strict: bool, undone: str, fate: str
) -> tuple[OrderedDict[str, Any], Alignment]:
    """Compute the state dict, in the source's dtypes, by which ``load_state_dict`` loads what ``load`` would.

    What ``load`` refuses or warns of, this does; texts say what is ``undone``, and the ``fate`` of keys left out.
    """
    ready = prepare.prepared(alignment, model, type(model).__name__, strict=strict, undone=undone)
    targets: dict[str, Tensor] = model.state_dict(keep_vars=True)
    findings = Findings()
    sources = fill.read_sources(ready.source, ready.alignment)
    tensors = fill.tensors_of(sources, ready.alignment, targets, findings, lambda *_: None)
    prepare.warn_of_choices(f"Loading {ready.summary}", ready.alignment)
    prepare.warn_of_unfilled(f"Loading {ready.summary}", ready.alignment, fate, _rotary_advice(ready.alignment))
    _warn_of_values(ready, findings)
    return _state_dict(ready, targets, tensors), findings.noted(ready.alignment)


def _state_dict(
    ready: prepare.Prepared, targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> OrderedDict[str, Any]:
    """Return tensors with what ``load_state_dict`` passes on to modules beside them."""
    state_dict: OrderedDict[str, Any] = OrderedDict(tensors)
    state_dict.update(prepare.extra_states(ready.source, targets, ready.modules))
    metadata = prepare.state_metadata(ready.source, ready.alignment, targets, ready.modules, ready.counters)
    state_dict._metadata = metadata  # type: ignore[attr-defined]
    return state_dict


def _load_state_dict(
    call: _Call, ready: prepare.Prepared, targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Load by torch's own function."""
    model, source, alignment = call.model, ready.source, ready.alignment
    state_dict = _state_dict(ready, targets, tensors)
    is_kept = not cannot_fail(model, targets, tensors)
    with transaction(model, keep_values=is_kept):
        try:
            result = model.load_state_dict(state_dict, strict=False, **({"assign": True} if call.assign else {}))
            source.require_unchanged(_changed_advice(is_kept or call.assign))
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


def _load_sharded(call: _Call, get_ready: Callable[[], prepare.Prepared], ranks: sharded.Ranks) -> Alignment:
    """Load the parts of a model that this and other processes hold, on all or on none; the first of them reports."""
    model, assign, findings = call.model, call.assign, Findings()
    reported = call.progress if ranks.is_first else False

    def prepare_part() -> tuple[tuple[prepare.Prepared, dict[str, Tensor], MappedFiles], tuple[str, str]]:
        ready = get_ready()
        targets: dict[str, Tensor] = model.state_dict(keep_vars=True)
        fill.check_devices(ready.alignment, targets, assign=assign)
        files = reading.enter_context(mapped_files(_mapped_paths(call, ready.source)))
        return (ready, targets, files), sharded.digests(ready.source, ready.alignment, files)

    def plan() -> tuple[sharded.ShardPlan, tuple[bool, bool]]:
        with _cut_explained():
            parts = sharded.plan_of(source, alignment, targets, files, assign=assign)
        if ranks.is_first:  # before a change, since a warning may be turned into an error
            prepare.warn_of_choices(f"Loading {ready.summary}", alignment)
            _warn_of_keys(ready, targets)
        surely = sharded.needs_no_rollback(model, source, alignment, targets, assign=assign) and not callable(reported)
        return parts, (surely, ranks.is_first and _may_raise(ValueWarning))

    def fill_part() -> tuple[None, Findings]:
        found = Findings(pieces=files.pieces)
        with _cut_explained(is_kept=not is_changed):
            sharded.fill_parts(parts, found, step)
        source.require_unchanged(_changed_advice(is_kept=not is_changed))
        sharded.register(model, parts, targets, assign=assign)
        return None, replace(found, pieces=in_one)  # which other processes can be given

    def warn_of_values() -> tuple[None, None]:
        if ranks.is_first:
            _warn_of_values(ready, findings)
        return None, None

    with ExitStack() as reading, ExitStack() as held:
        held.enter_context(interrupts_held())
        sharded.wait_for_ranks(model, ranks.group)
        (ready, targets, files), given = ranks.each(prepare_part, held)
        source, alignment = ready.source, ready.alignment
        sharded.require_same(given, alignment)
        parts, votes = ranks.each(plan, held)
        may_raise_late = any(may_raise for _, may_raise in votes)
        is_kept = may_raise_late or not all(surely for surely, _ in votes)
        undone = "the model was not changed on any"
        if is_changed := not is_kept and not assign:
            undone = "the model may have changed in part: load it anew"
        with (
            fill.progress_of(reported, len(alignment.matches), _size(alignment), call.since) as step,
            transaction(model, keep_values=is_kept),
        ):
            _, all_findings = ranks.each(fill_part, held, undone=undone, is_changed=is_changed, stops=is_kept)
            for found in all_findings:
                findings.merge(found)
            if may_raise_late:
                ranks.each(warn_of_values, held, undone=undone)
        if not may_raise_late:
            warn_of_values()
    return _reported(call, ready, findings, is_logged=ranks.is_first)


def _reported(call: _Call, ready: prepare.Prepared, findings: Findings, *, is_logged: bool = True) -> Alignment:
    """Log what was loaded, and return the alignment with what was found of the values."""
    alignment = ready.alignment
    if call.assign:  # the tensors that the model had are not the ones it has now
        alignment = replace(alignment, target_tensors=checkpoint_of(call.model))
    if is_logged:
        logger.info("Loaded %s; %d keys missing, %d unexpected.", ready.summary, *map(len, alignment))
    return findings.noted(alignment)


def _mapped_paths(call: _Call, source: Checkpoint) -> list[Path]:
    """List the files that can be read in place of what is mapped of them."""
    return [path for path, _ in source.opened] if call.from_files and source.is_resident else []


def _changed_advice(is_kept: bool) -> str:
    """Explain what became of the model, and what to do, where a file was changed while it was loaded."""
    state = "was not changed" if is_kept else "was being filled and holds old and new values"
    return f"The model {state}. Load again when the file is complete."


@contextmanager
def _cut_explained(*, is_kept: bool = True) -> Iterator[None]:
    """Explain what became of the model where a file is cut while it is read; by default, before it is changed."""
    try:
        yield
    except CutError as error:
        raise CheckpointError(f"{error} {_changed_advice(is_kept)}") from error


def _size(alignment: Alignment) -> int:
    specs = (alignment.targets[match.target] for match in alignment.matches)
    return sum(spec.numel * spec.dtype.itemsize for spec in specs)


def _may_raise(category: type[Warning]) -> bool:
    """Return True if a warning of some category may be turned into an error."""
    for action, message, kind, module, line in warnings.filters:
        if issubclass(category, kind) and (action == "error" or not (message or module or line)):
            return action == "error"  # the first filter that fits counts; whether some do is not known yet
    return False


def _warn_of_keys(ready: prepare.Prepared, targets: Mapping[str, Tensor]) -> None:
    on_meta = any(key in targets and targets[key].is_meta for key in ready.alignment.missing_keys)
    fate = "stay on meta, without values" if on_meta else "keep their values"
    prepare.warn_of_unfilled(f"Loading {ready.summary}", ready.alignment, fate, _rotary_advice(ready.alignment))


def _rotary_advice(alignment: Alignment) -> str:
    if not any(ROTARY in match.warnings for match in alignment.ambiguous):
        return ""
    return "".join(f" {note}" for note in alignment.notes if ROTARY_SETTINGS[0] in note)


def _warn_of_values(ready: prepare.Prepared, findings: Findings) -> None:
    if statements := findings.statements():
        prepare.warn(f"Loading {ready.summary}. {' '.join(statements)} They are loaded as they are.", ValueWarning)
