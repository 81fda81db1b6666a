"""Verification: what a call of two networks shows of an alignment."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from autoalign.alignment import Alignment
from autoalign.checkpoints.checkpoint import Side
from autoalign.errors import InputError, UnequalModelsError
from autoalign.loading.load import load_checkpoint
from autoalign.matching.match import match_tensors
from autoalign.plan.matches import Match, Verified
from autoalign.plan.options import MatchOptions, check_options
from autoalign.verification.causes import Divergence, Scene, diverged
from autoalign.verification.compare import Finding, grown_finding, last_agreement
from autoalign.verification.differences import OutputDifference
from autoalign.verification.run import NEVER, flat_tensors, preserved
from autoalign.verification.search import Budget, State, search
from autoalign.verification.session import Outcome, Session, fresh_values, is_countable, is_decisive, noticed

_MAX_LISTED = 6  # matches or keys
_COVERAGE_SECONDS = 60.0  # for which it is measured, at least


@dataclass(frozen=True, slots=True)
class Verification:
    """What a call of two networks shows of an alignment."""

    equal: bool  # the outputs are, and all that was compared on the way, with `alignment`
    max_difference: float  # the largest relative difference of the outputs, with `alignment`; inf if none compare
    first_divergence: Divergence | None  # where the models, as they were given, first differ
    alignment: Alignment  # the one that was verified, with any alternative that had to be taken
    taken: tuple[Match, ...] = ()  # what in `alignment` is other than it was, or was only proposed
    as_it_is: bool = True  # whether the target was called with its own values, not with the alignment's
    outputs: tuple[OutputDifference, ...] = ()
    tolerance: float = 0.0  # of `max_difference`
    compared: int = 0  # modules' inputs and outputs that were compared
    trials: int = 0  # calls of the target that were made to try alternatives
    notes: tuple[str, ...] = ()
    coverage: float = 0.0  # share of the tensors of which a change would have been noticed; 0 if not all agrees
    uncovered: tuple[str, ...] = ()  # the target's keys of the others
    unproven: tuple[str, ...] = ()  # those of them that the call uses, and that have an effect

    def __str__(self) -> str:
        how = "as it is" if self.as_it_is else "with the alignment's values"
        verdict = "NOT equal" if self.max_difference > self.tolerance else "equal"
        if verdict == "equal" and not self.equal:
            verdict += ", but NOT proven to be" if self.unproven else ", but NOT what modules compute on the way"
        lines = [
            f"The outputs are {verdict}: largest relative difference {self.max_difference:.1e}, "
            f"tolerance {self.tolerance:.0e}; {self.compared} inputs and outputs of modules compared, "
            f"the target called {how}."
        ]
        if self.coverage and self.alignment.verified is not None:
            found = self.alignment.verified.describe(match.target for match in self.alignment.matches)
            lines.append(f"Verified: {found}.")
        if self.unproven:
            lines.append(f"A change in {', '.join(self.unproven[:_MAX_LISTED])} would not have been noticed.")
        if self.first_divergence is not None:
            lines.append(f"First divergence: {self.first_divergence}")
        if self.taken:
            lines.append(f"{len(self.taken)} matches had to be taken otherwise, found in {self.trials} trials:")
            lines += [
                f"  {match.target} = {' + '.join(match.sources)}: {match.operation}"
                for match in self.taken[:_MAX_LISTED]
            ]
            if len(self.taken) > _MAX_LISTED:
                lines.append(f"  ... and {len(self.taken) - _MAX_LISTED} more: verification.taken")
            lines.append("Load them: model.load_state_dict(verification.alignment.state_dict(), strict=False)")
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        from autoalign.reports.html import short_html

        title = "Proven equal" if self.equal else "NOT equal" if self.max_difference > self.tolerance else "NOT proven"
        outputs = [(each.source, each.target, f"{each.difference:.1e}") for each in self.outputs]
        tables = {"Output of the source, of the target, difference": outputs}
        return short_html(title, str(self).splitlines(), tables)


def verify(
    source_model: nn.Module,
    target_model: nn.Module,
    example_inputs: object,
    *,
    target_inputs: object = None,
    alignment: Alignment | None = None,
    tolerance: float | None = None,
    trials: int = 200,
    seconds: float | None = None,
    **align_options: Unpack[MatchOptions],
) -> Verification:
    """Call both models on equal inputs, compare all that they compute, and name where they first differ.

    Equal means that the outputs are, and all that paired modules compute on the way, each channel by its own size, and
    that twice: with the models' own values, and with fresh ones of the source that the alignment carries into the
    target. On these no signal fades and no two tensors are alike, as with initial values they may be. Then single
    tensors are changed, to measure ``coverage``: the share of the loaded ones of which a change would have been
    noticed. Two models are not called equal if the call uses a parameter and a change of it would not have been;
    what the call does not use, such as a head for training, is listed as not covered, and so is what has no effect,
    unless the inputs are all alike or the outputs not finite. ``alignment.verified`` of the returned alignment has all
    that, and is saved with it.

    Modules are paired by the tensors that the alignment pairs, and compared in the order in which the target calls
    them: the first whose output differs although its inputs agree, or the place between two modules where a difference
    arises, is the first divergence. Its cause is one of ``weights`` (other values than the source's, or in another
    layout), ``missing`` (tensors that got nothing), ``configuration`` (the same weights and another setting, which is
    named), ``code`` and ``precision``.

    The target is called with its own values if these show that it was loaded; else with those of the alignment, in
    place of its own and without changing it. If the alignment does not make the models equal, other ways to fill the
    target are tried where they first differ: what is ambiguous and all ``alternatives``, tensors of equal shape
    exchanged, square matrices transposed, parts of fused tensors in another order; first in all layers at once. The
    alignment that makes them equal is returned; nothing is loaded:

        verification = autoalign.verify(source, target, inputs)
        if verification.equal:
            target.load_state_dict(verification.alignment.state_dict(), strict=False)

    Both models are left as they were: the mode of each submodule, hooks, parameters, buffers, random states. Their
    values are kept meanwhile in a copy, on the CPU.

    >>> from collections import OrderedDict
    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> source = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 3))
    >>> target = nn.Sequential(OrderedDict(fc1=nn.Linear(3, 3), act=nn.GELU(), fc2=nn.Linear(3, 3)))
    >>> target.load_state_dict(dict(zip(target.state_dict(), source.state_dict().values())))
    <All keys matched successfully>
    >>> verify(source, target, torch.randn(2, 3)).equal
    True
    >>> target.act = nn.ReLU()
    >>> print(verify(source, target, torch.randn(2, 3)).first_divergence.cause)
    configuration

    Args:
        source_model: The model whose outputs are right.
        target_model: The model to check.
        example_inputs: What the models are called with: a tensor or a list, as the only argument; a tuple of the
            arguments, whose last may be a dict of keyword arguments; or a dict of keyword arguments. Give real or
            random values, not zeros: where inputs are alike, differences do not show.
        target_inputs: The same for the target, where it is called in another way.
        alignment: What to check; by default that of the two models.
        tolerance: The largest difference that is called equal, of an output or of what a module computes, as a share of
            the largest value of each channel; by default 1e-4 for float32, 1e-2 for float16, 5e-2 for bfloat16 and 1e-6
            for float64.
        trials: How many calls of the target may be made to try alternatives; 0 for none.
        seconds: For how long alternatives may be tried; no limit by default.
        **align_options: As for ``align``, where no alignment is given.

    Raises:
        InputError: A model cannot be called on the inputs, or the alignment is not one of these models.
    """
    check_options(verify, align_options, "Nothing was verified.")
    for model in (source_model, target_model):
        if not isinstance(model, nn.Module):
            raise InputError(f"verify calls two nn.Modules, not a {type(model).__name__}. Nothing was verified.")
        if any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers())):
            raise InputError(
                f"{type(model).__name__} has tensors on the meta device, which have no values. Nothing was verified. "
                "Load it first, with assign=True."
            )
    _check_options(tolerance, trials, seconds)
    given = alignment is not None
    if alignment is None:
        alignment = Alignment.of(match_tensors(source_model, target_model, **align_options))
    elif not isinstance(alignment, Alignment):
        raise InputError(f"alignment= takes an Alignment, not {type(alignment).__name__}. Nothing was verified.")
    elif align_options:
        changes = ", ".join(align_options)
        raise InputError(f"An alignment is checked as it is, and {changes} would change it. Nothing was verified.")
    _check(alignment, source_model, target_model)
    inputs = (example_inputs, example_inputs if target_inputs is None else target_inputs)
    with preserved(source_model, target_model):
        own = Session(source_model, target_model, inputs, alignment, tolerance)
        sources = [match.sources for match in own.known.values()]
        sources += [candidate.sources for match in own.known.values() for candidate in match.alternatives]
        values = fresh_values(source_model, inputs[0], {key for keys in sources for key in keys})
        fresh = own if values is None else Session(source_model, target_model, inputs, alignment, tolerance, values)
        return _verified(own, fresh, Budget(trials, seconds), given=given)


def load_proved(
    model: nn.Module,
    checkpoint: Side,
    align_options: Mapping[str, Any],
    example_inputs: object,
    source_model: nn.Module | None,
    *,
    alignment: Alignment | None,
    **load_options: Any,
) -> Alignment:
    """Prove an alignment, corrected where that helps, and load by it; see ``autoalign.load``."""
    if not isinstance(model, nn.Module):
        raise InputError(f"Expected an nn.Module to load into, not {type(model).__name__}. Nothing was loaded.")
    if any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers())):
        raise InputError(
            f"{type(model).__name__} has tensors on the meta device, and verify= calls it. Nothing was loaded. Load it "
            "with assign=True and without verify=, and call autoalign.verify then."
        )
    options = {name: value for name, value in align_options.items() if name in ("container", "dequantise")}
    source = _source_of(checkpoint, source_model, options)
    planned = alignment or Alignment.of(match_tensors(checkpoint, model, **align_options))
    is_same = source.state_dict(keep_vars=True).keys() >= planned.sources.keys()
    found = verify(source, model, example_inputs, alignment=planned if is_same else None)
    if not found.equal:
        verdict = "is not proven to" if found.unproven else "would not"
        raise UnequalModelsError(
            f"{type(model).__name__} {verdict} compute what {type(source).__name__} does, however it were filled "
            f"({found.trials} ways were tried). {found}\nNothing was loaded.",
            found,
        )
    filler, options = (checkpoint, options) if is_same else (source, {})
    loaded = load_checkpoint(model, filler, options, alignment=found.alignment, **load_options)
    return replace(loaded, verified=found.alignment.verified)


def _source_of(checkpoint: Side, source_model: nn.Module | None, options: Mapping[str, Any]) -> nn.Module:
    """Return a model with the values of a checkpoint: itself, or a copy of the model of its code that is filled."""
    if source_model is None and isinstance(checkpoint, nn.Module):
        return checkpoint
    if not isinstance(source_model, nn.Module):
        raise InputError(
            "verify= needs the checkpoint's own code to compare with: source_model=, an nn.Module, which may be on the "
            f"meta device, not {type(source_model).__name__}. Nothing was loaded."
        )
    source = copy.deepcopy(source_model)
    alignment = Alignment.of(match_tensors(checkpoint, source, **options))
    if missing := [key for key in alignment.missing_keys if is_countable(key)]:
        raise InputError(
            f"source_model= is not the code of this checkpoint: {len(missing)} tensors of {type(source).__name__} are "
            f"not in it, such as {missing[0]}. Nothing was loaded."
        )
    load_checkpoint(source, checkpoint, options, assign=True, progress=False, alignment=alignment)
    return source


def _verified(own: Session, fresh: Session, budget: Budget, *, given: bool) -> Verification:
    """Verify the models on their own values, and the alignment, which is corrected if that helps, on fresh ones."""
    wrong, as_it_is = own.compared_values()
    wrong = wrong if as_it_is else {}
    base = own.call(own.known, {} if as_it_is else own.fills(own.matches.values()), wrong)
    fills = fresh.fills(own.matches.values())
    proof = fresh.call(own.known, fills, ())
    divergence, of_alignment = _divergence(own, base, wrong), _divergence(fresh, proof, {})
    state = State(own.known, fills, proof)
    notes = [] if base.differences else [_incomparable(own, base)]
    if own is fresh:
        notes.append("The source gives no finite outputs on fresh values, so that only its own were compared.")
    if not proof.equal and proof.differences:
        state = search(fresh, state, budget, listed_only=_is_explained(of_alignment))
        if state.outcome.position > proof.position and not state.outcome.equal:
            moved = ", ".join(match.target for match in state.changed(own.known)[:3])
            notes.append(f"With {moved} filled otherwise, both agree for longer, and then differ too.")
        elif base.equal and not state.outcome.equal:
            notes.append("With the models' own values they are equal, but not with others, which show more.")
    blames_values = divergence is not None and any(key in wrong for key in divergence.keys)
    if of_alignment is not None and (not blames_values or (given and base.largest <= base.tolerance)):
        divergence = _located(fresh, of_alignment, state, proof)
    taken = state.changed(own.matches) if state.outcome.equal and not proof.equal else ()
    if taken:
        proved = [replace(m, confidence=1.0, evidence={**m.evidence, "outputs": 1.0}) for m in taken]
        own.take(own.alignment.revised(proved))
        wrong, holds_most = own.compared_values()
        if holds_most and not given and not any(map(is_countable, wrong)):
            as_it_is, divergence, base = True, None, own.call(own.known, {}, ())
            notes.append(
                "The target is right as it is. The alignment of the two models alone is not: "
                f"{len(taken)} of its matches had to be taken otherwise."
            )
        else:
            as_it_is = as_it_is and base.largest > base.tolerance
            wrong = {key: wrong[key] for key in wrong if as_it_is and key not in {match.target for match in taken}}
            base = own.call(own.known, own.fills(taken if as_it_is else own.matches.values()), wrong)
    agrees = base.equal and state.outcome.equal and not any(map(is_countable, wrong))
    covered, idle = noticed(fresh, state.outcome, state.values, _COVERAGE_SECONDS) if agrees else (set(), set())
    loaded = [key for key in state.values if is_countable(key)] if agrees else []
    uncovered = tuple(key for key in loaded if key not in covered)
    used = state.outcome.compared.target.first_use
    is_blind = bool(idle) and _is_blind(own)
    excused = () if is_blind else idle
    unproven = tuple(key for key in uncovered if key in used and is_decisive(key, own.own[key]) and key not in excused)
    if idle:
        notes.append(f"No value of {', '.join(sorted(idle)[:_MAX_LISTED])} has any effect on what this call computes.")
    if is_blind:
        notes.append("The inputs are all alike, or the outputs not finite: give others, such as random ones.")
    coverage = len(covered) / max(len(loaded), 1)
    equal = agrees and bool(coverage) and not unproven
    return Verification(
        equal,
        base.largest,
        divergence,
        replace(own.alignment, verified=Verified(equal, base.largest, coverage, uncovered)),
        taken,
        as_it_is,
        base.differences,
        base.tolerance,
        sum(event.difference is not None for event in base.compared.events),
        budget.made,
        tuple(notes),
        coverage,
        uncovered,
        unproven,
    )


def _is_blind(session: Session) -> bool:
    """Return True for a call that tells nothing of what has no effect: on values all alike, or without finite ones."""
    inputs, outputs = flat_tensors(session.inputs).values(), session.source.outputs.values()
    given = [tensor for tensor in inputs if tensor.dtype != torch.bool and tensor.numel() > 1]
    gave = [tensor for tensor in outputs if tensor.is_floating_point() and tensor.numel() > 1]
    are_alike = bool(given) and all(bool((tensor == tensor.flatten()[0]).all()) for tensor in given)
    return are_alike or (bool(gave) and not any(bool(tensor.isfinite().any()) for tensor in gave))


def _incomparable(session: Session, outcome: Outcome) -> str:
    source, target = (
        {name: list(tensor.shape) for name, tensor in recording.outputs.items()}
        for recording in (session.source, outcome.compared.target)
    )
    return (
        f"No outputs have the same size: {source} of the source, {target} of the target. "
        "Wrap one of them, so that both give the same."
    )


def _check(alignment: Alignment, source: nn.Module, target: nn.Module) -> None:
    """Refuse an alignment of other models."""
    for model, specs, side in ((source, alignment.source_specs, "source"), (target, alignment.target_specs, "target")):
        shapes = {k: tuple(t.shape) for k, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
        unknown = [spec.key for spec in specs if shapes.get(spec.key) != spec.shape]
        if unknown:
            raise InputError(
                f"The alignment is not one of these models: {len(unknown)} keys of its {side} are not in "
                f"{type(model).__name__}, or of another shape: {', '.join(unknown[:3])}. Nothing was verified."
            )


def _check_options(tolerance: object, trials: object, seconds: object) -> None:
    for name, value in (("tolerance", tolerance), ("seconds", seconds)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
            raise InputError(f"{name}= takes a number that is not negative, not {value!r}. Nothing was verified.")
    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 0:
        raise InputError(f"trials= takes a whole number that is not negative, not {trials!r}. Nothing was verified.")


def _divergence(session: Session, outcome: Outcome, wrong: Mapping[str, str]) -> Divergence | None:
    unfilled = [key for key in session.target_shapes if key not in session.matches]
    scene = Scene(session.models, outcome.compared, session.known, wrong, unfilled)
    if outcome.equal:
        return _unseen(session, scene)
    if (finding := outcome.finding or grown_finding(outcome.compared, outcome.largest)) is not None:
        return diverged(scene, finding)
    # it shows in no module that could be compared
    root = next(call for call in outcome.compared.target.calls if call.module == "")
    since = last_agreement(outcome.compared)
    ending = diverged(scene, Finding(0, "before", root, "", outcome.largest, since, (NEVER, NEVER)))
    return ending if outcome.differences or ending.cause == "missing" else None  # nothing is known to differ


def _unseen(session: Session, scene: Scene) -> Divergence | None:
    """Find tensors that are wrong although nothing in this call shows it, such as counters."""
    used = scene.compared.target.first_use
    for key in sorted(session.matches, key=lambda key: used.get(key, NEVER)):
        module, sources = scene.owner(key), session.matches[key].sources
        pair = scene.compared.pairs.get(module)
        source = pair.source if pair else session.source_owner[sources[0]][0]
        if key in scene.wrong:
            text = f"{key} {scene.wrong[key]}"
        elif pair and key in pair.mixed and not is_countable(key):
            text = f"{key} comes from {' + '.join(sources)}, the rest of the module from {source}"
        else:
            continue
        text += ". It does not show in the outputs of this call."
        return Divergence(source, module, 0.0, "weights", text, (key,))
    return None


def _located(session: Session, divergence: Divergence, state: State, base: Outcome) -> Divergence:
    """Name the layer at fault, if trials found it: only equal outputs prove that what was tried is right."""
    if not state.found or not state.outcome.equal:
        return divergence
    used = base.compared.target.first_use
    keys = sorted(state.found, key=lambda key: used.get(key, NEVER))
    module = base.compared.owners[keys[0]][0]
    if divergence.cause == "missing" and module == divergence.target_module:
        return divergence
    match = state.matches[keys[0]]
    pair = base.compared.pairs.get(module)
    text = f"{match.target} = {' + '.join(match.sources)}: {match.operation} makes the outputs equal."
    source = session.source_owner[match.sources[0]][0] if pair is None else pair.source
    return Divergence(source, module, divergence.difference, "weights", text, tuple(keys), divergence.between)


def _is_explained(divergence: Divergence | None) -> bool:
    """Return True if a setting, or the lack of a source, accounts for a difference, so that no exchange would help."""
    if divergence is None or divergence.between is not None:
        return False
    return divergence.cause in ("configuration", "missing", "precision")
