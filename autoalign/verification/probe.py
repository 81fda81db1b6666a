"""Probe: what keys and graphs leave open is decided by calling both networks on the same random values.

Only copies of the networks are called, in which every parameter is new: the source has values that carry its signal,
and the target what an alignment makes of them. Each way to settle a choice is tried in all layers at once; it is taken
if both networks agree further with it than with any other.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from autoalign.alignment import Alignment
from autoalign.errors import InputError
from autoalign.plan.matches import Candidate, Match, Plan
from autoalign.reports.choices import Choice, Option
from autoalign.verification.proof import fresh_values, is_decisive
from autoalign.verification.run import NEVER, preserved
from autoalign.verification.session import Outcome, Session, tensors_of

PROBE = "probe"  # the cue
_CONFIDENCE = 0.99  # in what a probe decides
_MAX_ELEMENTS = 2**28  # of a network that is called
_SECONDS = 60.0  # for which calls are made

Inputs = tuple[object, object]  # what source and target are called with
Matches = Mapping[str, Match]  # by target key


def probed(plan: Plan, source_model: nn.Module, target_model: nn.Module, inputs: Iterable[Inputs]) -> Plan:
    """Return a plan in which calls decide what they can; its source has the keys of the source model.

    Args:
        plan: What is aligned.
        source_model: The code of its source, which may be on the meta device but for what it computes itself.
        target_model: That of its target, the same.
        inputs: What both may be called with; the first that both take is used.
    """
    alignment = Alignment.of(plan)
    sizes = [sum(tensor.numel() for tensor in model.parameters()) for model in (source_model, target_model)]
    if not alignment.choices or max(sizes) > _MAX_ELEMENTS:
        return plan
    source, target = (_with_own_values(model) for model in (source_model, target_model))
    with preserved(source, target):
        session = _session(source, target, alignment, inputs)
        taken = {} if session is None else _decided(session, alignment.choices, time.monotonic() + _SECONDS)
    return _with_options(plan, taken) if taken else plan


def _with_own_values(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the CPU whose parameters are random, and share nothing with the model's."""
    generator, made = torch.Generator().manual_seed(0), dict[int, Tensor]()
    for key, tensor in tensors_of(model).items():
        if id(tensor) not in made:
            if is_decisive(key, tensor) or tensor.is_meta:
                new = torch.rand(tensor.shape, generator=generator)
                new = new if tensor.is_floating_point() else new.to(tensor.dtype)
            else:
                new = tensor.detach().to("cpu", copy=True)
            made[id(tensor)] = nn.Parameter(new, False) if isinstance(tensor, nn.Parameter) else new
    return copy.deepcopy(model, made)


def _session(source: nn.Module, target: nn.Module, alignment: Alignment, inputs: Iterable[Inputs]) -> Session | None:
    """Call the source on values that carry its signal; None if it takes no inputs, or gives nothing finite."""
    keys = {spec.key for spec in alignment.source_specs}
    for given in inputs:
        try:
            values = fresh_values(source, given[0], keys)
            if values is not None:
                session = Session(source, target, given, alignment, None, values)
                session.call(session.known, session.fills(session.known.values()))
                return session
        except InputError:  # not these
            continue
    return None


def _decided(session: Session, choices: Iterable[Choice], end: float) -> dict[str, Option]:
    """Return what is taken of choices, by their first targets."""
    matches: Matches = session.known
    values: Mapping[str, Tensor] = session.fills(matches.values())
    now = session.call(matches, values)
    used = now.compared.target.first_use
    first_use = {choice.targets[0]: min(used.get(key, NEVER) for key in choice.targets) for choice in choices}
    waiting = sorted(choices, key=lambda choice: first_use[choice.targets[0]])
    taken: dict[str, Option] = {}
    while waiting and time.monotonic() < end:
        since = now.finding.until[1] if now.finding is not None else NEVER - 1
        found = None
        for choice in (choice for choice in waiting if first_use[choice.targets[0]] <= since):
            found = _best(session, matches, values, choice, now, end)
            if found is not None:
                break
        if found is None:
            break
        option, now = found
        taken[choice.targets[0]] = option
        waiting.remove(choice)
        matches = {**matches, **{match.target: match for match in option.matches}}
        values = {**values, **session.fills(option.matches)}
    return taken


def _best(
    session: Session, matches: Matches, values: Mapping[str, Tensor], choice: Choice, now: Outcome, end: float
) -> tuple[Option, Outcome] | None:
    """Return the option with which both networks agree further than with any other, and what comes of it."""
    outcomes = [(choice.options[0], now)]
    for option in choice.options[1:]:
        if time.monotonic() > end:
            return None
        try:
            new = {**values, **session.fills(option.matches)}
            if any(new[match.target].shape != session.own[match.target].shape for match in option.matches):
                continue
            found = session.call({**matches, **{match.target: match for match in option.matches}}, new)
        except (RuntimeError, IndexError, InputError):  # an operation that does not fit these shapes
            continue
        outcomes.append((option, found))
    outcomes.sort(key=lambda each: -each[1].position)
    is_first = len(outcomes) == 1 or outcomes[0][1].position > outcomes[1][1].position
    return outcomes[0] if is_first and (len(outcomes) > 1 or now.equal) else None


def _with_options(plan: Plan, taken: Mapping[str, Option]) -> Plan:
    """Return a plan with what is taken of its choices among its matches."""
    known = {match.target: match for match in plan.ambiguous}
    made: dict[str, Match] = {}
    notes = []
    for key, option in taken.items():
        for match in option.matches:
            before = known[match.target]
            ways = (Candidate(before.sources, before.operation, before.confidence), *before.alternatives)
            others = [way for way in ways if (way.sources, way.operation) != (match.sources, match.operation)]
            evidence = {**(before.evidence if others == [*before.alternatives] else {}), PROBE: 1.0}
            made[match.target] = replace(match, confidence=_CONFIDENCE, evidence=evidence, alternatives=tuple(others))
        why = f" ({known[key].warnings[0]})" if known[key].warnings else ""
        how = f"'{made[key].operation}' of {' + '.join(made[key].sources)}"
        notes.append(f"Probed: {key} and {len(option.matches) - 1} more are {how} and so on{why}.")
    order = {spec.key: place for place, spec in enumerate(plan.target_specs)}
    return replace(
        plan,
        matches=tuple(sorted((*plan.matches, *made.values()), key=lambda match: order[match.target])),
        ambiguous=tuple(match for match in plan.ambiguous if match.target not in made),
        notes=(*plan.notes, *notes),
    )
