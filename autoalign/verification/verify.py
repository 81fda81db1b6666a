"""Verification: what a call of two networks shows of an alignment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from torch import Tensor, nn

from autoalign.alignment import Alignment
from autoalign.errors import InputError
from autoalign.matching.match import match_tensors
from autoalign.matching.names import kind
from autoalign.plan.matches import Match
from autoalign.verification.causes import Divergence, Scene, diverged
from autoalign.verification.compare import Finding, OutputDifference, last_agreement, worst_finding
from autoalign.verification.run import NEVER, preserved
from autoalign.verification.search import Budget, State, search
from autoalign.verification.session import Outcome, Session

_MAX_LISTED = 6  # matches


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

    def __str__(self) -> str:
        how = "as it is" if self.as_it_is else "with the alignment's values"
        verdict = "NOT equal" if self.max_difference > self.tolerance else "equal"
        if verdict == "equal" and not self.equal:
            verdict = "equal, but NOT what modules compute on the way"
        lines = [
            f"The outputs are {verdict}: largest relative difference {self.max_difference:.1e}, "
            f"tolerance {self.tolerance:.0e}; {self.compared} inputs and outputs of modules compared, "
            f"the target called {how}."
        ]
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


def verify_models(
    source_model: nn.Module,
    target_model: nn.Module,
    example_inputs: object,
    align_options: Mapping[str, Any],
    *,
    target_inputs: object,
    alignment: Alignment | None,
    tolerance: float | None,
    trials: int,
    seconds: float | None,
) -> Verification:
    """Call both models and compare; see ``autoalign.verify``."""
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
    if alignment is not None and not isinstance(alignment, Alignment):
        raise InputError(f"alignment= takes an Alignment, not {type(alignment).__name__}. Nothing was verified.")
    if alignment is not None and align_options:
        changes = ", ".join(align_options)
        raise InputError(f"An alignment is checked as it is, and {changes} would change it. Nothing was verified.")
    if alignment is None:
        alignment = Alignment.of(match_tensors(source_model, target_model, **align_options))
    _check(alignment, source_model, target_model)
    inputs = (example_inputs, example_inputs if target_inputs is None else target_inputs)
    with preserved(source_model, target_model):
        session = Session(source_model, target_model, inputs, alignment, tolerance)
        budget = Budget(trials, seconds)
        if not session.is_loaded:
            return _verified(session, as_it_is=False, budget=budget)
        found = _verified(session, as_it_is=True, budget=budget)
        if found.max_difference > found.tolerance or found.taken or not (given or found.first_divergence):
            return found
        by_alignment = _verified(session, as_it_is=False, budget=budget)
        if by_alignment.equal and by_alignment.first_divergence is None:
            return found
        if given:
            return by_alignment
        if by_alignment.equal and by_alignment.taken and not found.equal:  # the alignment paired its modules wrongly
            session = Session(source_model, target_model, inputs, by_alignment.alignment, tolerance)
            found = _verified(session, as_it_is=True, budget=Budget(0, None))
        return _otherwise_right(found, by_alignment) if found.equal else found


def _otherwise_right(found: Verification, by_alignment: Verification) -> Verification:
    """Note that a target is right as it is, and that the alignment would fill it otherwise."""
    better = by_alignment if by_alignment.equal else found
    note = "The target is right as it is. The alignment of the two models alone is not: " + (
        f"{len(better.taken)} of its matches had to be taken otherwise."
        if by_alignment.equal
        else f"{by_alignment.first_divergence}"
    )
    return replace(
        found,
        first_divergence=None,
        alignment=better.alignment,
        taken=better.taken,
        trials=by_alignment.trials,
        notes=(*found.notes, note),
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


def _verified(session: Session, *, as_it_is: bool, budget: Budget) -> Verification:
    """Verify the target by its own values or by the alignment's."""
    wrong = session.wrong if as_it_is else {}
    fills = {} if as_it_is else {key: session.value(m) for key, m in session.matches.items() if key in session.own}
    known = {**session.proposed, **session.matches}
    base = session.call(known, session.tied(fills) or None, wrong)
    unfilled = [key for key in session.target_shapes if key not in session.matches]
    scene = Scene(session.models, base.compared, known, wrong, unfilled)
    divergence = _divergence(session, base, scene)
    notes = []
    if not base.differences:
        sides = [{name: list(t.shape) for name, t in r.outputs.items()} for r in (session.source, base.compared.target)]
        notes.append(
            f"No outputs have the same size: {sides[0]} of the source, {sides[1]} of the target. "
            "Wrap one of them, so that both give the same."
        )
    state = State(known, fills, base)
    explained = divergence is not None and any(key in wrong for key in divergence.keys)
    if not base.equal and not explained and base.differences:
        state = search(session, state, wrong, budget, listed_only=_is_explained(divergence))
        divergence = _located(session, divergence, state, base)
    elif base.equal and wrong and divergence is None:
        notes.append(f"{len(wrong)} tensors hold other values than the alignment gives: {', '.join(list(wrong)[:3])}.")
    best = state.outcome if state.outcome.equal else base
    taken = state.changed(session.matches) if best.equal and not base.equal else ()
    if state.outcome.position > base.position and not best.equal:
        moved = ", ".join(match.target for match in state.changed(session.matches)[:3])
        notes.append(f"With {moved} filled otherwise, both agree for longer, and then differ too.")
    return Verification(
        best.equal,
        best.largest,
        divergence,
        _with(session.alignment, taken),
        taken,
        as_it_is,
        best.differences,
        base.tolerance,
        sum(event.difference is not None for event in best.compared.events),
        budget.made,
        tuple(notes),
    )


def _divergence(session: Session, outcome: Outcome, scene: Scene) -> Divergence | None:
    if outcome.equal:
        return _unseen(session, scene)
    if (finding := outcome.finding or worst_finding(outcome.compared)) is not None:
        return diverged(scene, finding)
    # it shows in no module that could be compared
    root = next(call for call in outcome.compared.target.calls if call.module == "")
    since = last_agreement(outcome.compared)
    ending = diverged(scene, Finding(0, "before", root, "", outcome.largest, since, (NEVER, NEVER)))
    return ending if outcome.differences or ending.cause == "missing" else None  # nothing is known to differ


def _unseen(session: Session, scene: Scene) -> Divergence | None:
    """Find tensors that are wrong although nothing in this call shows it, such as counters."""
    used = scene.compared.target.first_use
    wrong = sorted(scene.wrong, key=lambda key: used.get(key, NEVER))
    if wrong:
        module = scene.owner(wrong[0])
        text = f"{wrong[0]} {scene.wrong[wrong[0]]}. It does not show in the outputs of this call."
        source = session.source_owner[session.matches[wrong[0]].sources[0]][0]
        return Divergence(source, module, 0.0, "weights", text, (wrong[0],))
    for key in sorted(session.matches, key=lambda key: used.get(key, NEVER)):
        pair = scene.compared.pairs.get(scene.owner(key))
        if pair and key in pair.mixed and kind(key.rpartition(".")[2])[0] in ("mean", "var", "count"):
            text = (
                f"{key} comes from {' + '.join(session.matches[key].sources)}, the rest of the module from "
                f"{pair.source}. It does not show in the outputs of this call."
            )
            return Divergence(pair.source, pair.target, 0.0, "weights", text, (key,))
    return None


def _located(session: Session, divergence: Divergence | None, state: State, base: Outcome) -> Divergence | None:
    """Name the layer at fault, if trials found it: only equal outputs prove that what was tried is right."""
    if divergence is None or not state.found or not state.outcome.equal:
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


def _with(alignment: Alignment, taken: Sequence[Match]) -> Alignment:
    """Replace matches by those that proved right."""
    if not taken:
        return alignment
    proved = {m.target: replace(m, confidence=1.0, evidence={**m.evidence, "outputs": 1.0}) for m in taken}
    fills = {match.target: match for match in alignment.matches} | proved
    return replace(
        alignment,
        matches=tuple(fills[spec.key] for spec in alignment.target_specs if spec.key in fills),
        ambiguous=tuple(match for match in alignment.ambiguous if match.target not in proved),
    )
