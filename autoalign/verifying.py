"""``verify``: proof by a call of both networks, and where they first differ if it fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Unpack

from torch import Tensor, nn

from autoalign.align_options import MatchOptions, check_options
from autoalign.aligning import match_tensors
from autoalign.alignment import Alignment
from autoalign.causes import Divergence, Scene, diverged
from autoalign.counterparts import owners
from autoalign.divergence import Finding, last_agreement, worst_finding
from autoalign.errors import InputError
from autoalign.matches import Match
from autoalign.names import kind
from autoalign.preservation import preserved
from autoalign.search import Budget, State, search
from autoalign.subject import Outcome, Subject
from autoalign.verification import Verification


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

    Equal means that the outputs are, and all that paired modules compute on the way, each by its own size: a signal
    may fade, and hardly show in the outputs. Modules are paired by the tensors that the alignment pairs, and compared
    in the order in which the target calls them: the first whose output differs although its inputs agree, or the place
    between two modules where a difference arises, is the first divergence. Its cause is one of ``weights`` (other
    values than the source's, or in another layout), ``missing`` (tensors that got nothing), ``configuration`` (the same
    weights and another setting, which is named), ``code`` and ``precision``.

    Which values the target is called with: its own if it was loaded, which its values tell; else those of the
    alignment, in place of its own and without changing it. An ``alignment`` that is given is checked by its values,
    and the target by its own too, if it was loaded. If they differ, other ways to fill the target are tried
    where they first do: what is ambiguous and all ``alternatives``, tensors of equal shape exchanged, square matrices
    transposed, parts of fused tensors in another order; first all layers at once. The alignment that makes
    them equal is returned; nothing is loaded:

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
            the largest value of each; by default 1e-4 for float32, 1e-2 for float16, 5e-2 for bfloat16 and 1e-6 for
            float64.
        trials: How many calls of the target may be made to try alternatives; 0 for none.
        seconds: For how long alternatives may be tried; no limit by default.
        **align_options: As for ``align``, where no alignment is given.

    Raises:
        InputError: A model cannot be called on the inputs, or the alignment is not one of these models.
    """
    check_options(verify, align_options, "Nothing was verified.")
    for model in (source_model, target_model):
        if not isinstance(model, nn.Module):
            raise InputError(f"verify calls two nn.Modules, and {type(model).__name__} is none. Nothing was verified.")
        if any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers())):
            raise InputError(
                f"{type(model).__name__} has tensors on the meta device, which have no values. Nothing was verified. "
                "Load it first, with assign=True."
            )
    _check_options(tolerance, trials, seconds)
    given = alignment is not None
    if alignment is not None and not isinstance(alignment, Alignment):
        raise InputError(f"alignment= takes an Alignment, not {type(alignment).__name__}. Nothing was verified.")
    if alignment is None:
        alignment = Alignment.of(match_tensors(source_model, target_model, **align_options))
    _check(alignment, source_model, target_model)
    inputs = (example_inputs, example_inputs if target_inputs is None else target_inputs)
    with preserved(source_model, target_model):
        subject = Subject(source_model, target_model, inputs, alignment, tolerance)
        budget = Budget(trials, seconds)
        if not subject.loaded:
            return _verified(subject, as_it_is=False, budget=budget)
        found = _verified(subject, as_it_is=True, budget=budget)
        if found.max_difference > found.tolerance or found.taken or not (given or found.first_divergence):
            return found
        by_alignment = _verified(subject, as_it_is=False, budget=budget)
        if by_alignment.equal and by_alignment.first_divergence is None:
            return found
        if given:
            return by_alignment
        if by_alignment.equal and by_alignment.taken and not found.equal:  # the alignment paired its modules wrongly
            subject = Subject(source_model, target_model, inputs, by_alignment.alignment, tolerance)
            found = _verified(subject, as_it_is=True, budget=Budget(0, None))
        return _otherwise_right(found, by_alignment) if found.equal else found


def _otherwise_right(found: Verification, by_alignment: Verification) -> Verification:
    """Say that a target is right as it is, and that the alignment would fill it otherwise."""
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
    for name, value, kinds in (("tolerance", tolerance, (int, float)), ("seconds", seconds, (int, float))):
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds) or not value >= 0):
            raise InputError(f"{name}= takes a number that is not negative, not {value!r}. Nothing was verified.")
    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 0:
        raise InputError(f"trials= takes a whole number that is not negative, not {trials!r}. Nothing was verified.")


def _verified(subject: Subject, *, as_it_is: bool, budget: Budget) -> Verification:
    """Verify the target by its own values or by the alignment's."""
    wrong = subject.wrong if as_it_is else {}
    fills = {} if as_it_is else {key: subject.value(m) for key, m in subject.matches.items() if key in subject.own}
    known = {**subject.proposed, **subject.matches}
    base = subject.call(known, subject.tied(fills) or None, wrong)
    scene = subject.scene(base, known, wrong, subject.matches)
    divergence = _divergence(subject, base, scene)
    notes = []
    if not base.differences:
        sides = [{name: list(t.shape) for name, t in r.outputs.items()} for r in (subject.source, base.compared.target)]
        notes.append(
            f"No outputs have the same size: {sides[0]} of the source, {sides[1]} of the target. "
            "Wrap one of them, so that both give the same."
        )
    state = State(known, base, ())
    explained = divergence is not None and any(key in wrong for key in divergence.keys)
    if not base.equal and not explained and base.differences:
        state = search(subject, known, fills, base, wrong, budget, listed_only=_is_told(divergence))
        divergence = _located(subject, divergence, state, base)
    elif base.equal and wrong and divergence is None:
        notes.append(f"{len(wrong)} tensors hold other values than the alignment gives: {', '.join(list(wrong)[:3])}.")
    best = state.outcome if state.outcome.equal else base
    taken = state.changed(subject.matches) if best.equal and not base.equal else ()
    if state.outcome.position > base.position and not best.equal:
        moved = ", ".join(match.target for match in state.changed(subject.matches)[:3])
        notes.append(f"With {moved} filled otherwise, both agree for longer, and then differ too.")
    return Verification(
        best.equal,
        best.largest,
        divergence,
        _with(subject.alignment, taken),
        taken,
        as_it_is,
        best.differences,
        subject.tolerance(base),
        best.events,
        budget.made,
        tuple(notes),
    )


def _divergence(subject: Subject, outcome: Outcome, scene: Scene) -> Divergence | None:
    finding = outcome.finding
    if outcome.equal:
        return _unseen(subject, scene)
    if (finding := finding or worst_finding(outcome.compared)) is not None:
        return diverged(scene, finding)
    ending = _at_the_end(outcome, scene)
    return ending if outcome.differences or ending.cause == "missing" else None  # nothing is known to differ


def _at_the_end(outcome: Outcome, scene: Scene) -> Divergence:
    """Tell of a difference that shows in no module that could be compared."""
    since, source_since = last_agreement(outcome.compared)
    root = next(call for call in scene.recordings[1].calls if call.module == "")
    finding = Finding(0, "before", root, "", outcome.largest, since, source_since, 2**61, 2**61)
    return diverged(scene, finding)


def _unseen(subject: Subject, scene: Scene) -> Divergence | None:
    """Find tensors that are wrong although nothing in this call shows it, such as counters."""
    used = scene.recordings[1].first_use
    wrong = sorted(scene.wrong, key=lambda key: used.get(key, 2**61))
    if wrong:
        module = scene.owner[wrong[0]]
        text = f"{wrong[0]} {scene.wrong[wrong[0]]}. It does not show in the outputs of this call."
        source = subject.source_owner[subject.matches[wrong[0]].sources[0]][0]
        return Divergence(source, module, 0.0, "weights", text, (wrong[0],))
    for key in sorted(subject.matches, key=lambda key: used.get(key, 2**61)):
        pair = scene.pairs.get(scene.owner[key])
        if pair and key in pair.mixed and kind(key.rpartition(".")[2])[0] in ("mean", "var", "count"):
            text = (
                f"{key} comes from {' + '.join(subject.matches[key].sources)}, the rest of the module from "
                f"{pair.source}. It does not show in the outputs of this call."
            )
            return Divergence(pair.source, pair.target, 0.0, "weights", text, (key,))
    return None


def _located(subject: Subject, divergence: Divergence | None, state: State, base: Outcome) -> Divergence | None:
    """Say which layer is at fault, if trials told: only equal outputs prove that what was tried is right."""
    if divergence is None or not state.found or not state.outcome.equal:
        return divergence
    used = base.compared.target.first_use
    keys = sorted(state.found, key=lambda key: used.get(key, 2**61))
    called = {call.module for call in base.compared.target.calls}
    owner = owners(subject.models[1], keys, called)
    module = owner[keys[0]][0]
    if divergence.cause == "missing" and module == divergence.target_module:
        return divergence
    match = state.matches[keys[0]]
    pair = base.compared.pairs.get(module)
    text = f"{match.target} = {' + '.join(match.sources)}: {match.operation} makes the outputs equal."
    source = subject.source_owner[match.sources[0]][0] if pair is None else pair.source
    return Divergence(source, module, divergence.difference, "weights", text, tuple(keys), divergence.between)


def _is_told(divergence: Divergence | None) -> bool:
    """Tell whether a setting, or the want of a source, accounts for a difference, so that no exchange would help."""
    if divergence is None or divergence.between is not None:
        return False
    return divergence.cause in ("configuration", "missing", "precision")


def _with(alignment: Alignment, taken: Sequence[Match]) -> Alignment:
    """Put matches that proved right in the place of what was there."""
    if not taken:
        return alignment
    proved = {m.target: replace(m, confidence=1.0, evidence={**m.evidence, "outputs": 1.0}) for m in taken}
    fills = {match.target: match for match in alignment.matches} | proved
    return replace(
        alignment,
        matches=tuple(fills[spec.key] for spec in alignment.target_specs if spec.key in fills),
        ambiguous=tuple(match for match in alignment.ambiguous if match.target not in proved),
    )
