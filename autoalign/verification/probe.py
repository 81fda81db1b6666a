"""Probe: what keys and graphs leave open is decided by calling both networks on the same random values.

Only copies of the networks are called, in which every parameter is new: the source has values that carry its signal,
and the target what an alignment makes of them. Of networks that are too large the smallest modules are called that hold
the tensors, on what a call of the whole gives them, as far as that is known without data, and else on random values.
Each way to settle a choice is tried in all layers at once; it is taken if both networks agree further with it than with
any other.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor, nn

from autoalign.alignment import Alignment
from autoalign.errors import InputError
from autoalign.plan.keys import common_module, components, numbers, split_key
from autoalign.plan.matches import Candidate, Match, Plan
from autoalign.reports.choices import Choice, Option
from autoalign.verification.dataflow import inputs_within
from autoalign.verification.differences import relative_difference
from autoalign.verification.run import NEVER, call, flat_tensors, preserved
from autoalign.verification.search import Budget, State, refilled, search
from autoalign.verification.session import Session, fresh_values, is_decisive, tensors_of

PROBE = "probe"  # the cue
_CONFIDENCE = 0.99  # in what a probe decides
_MAX_ELEMENTS = 2**28  # of a network that is called
_MAX_CLIMBED = 3  # modules around a layer that are called in place of a network
_TRIALS = 200  # of ways that the alignment does not list
_SECONDS, _DEFAULT_SECONDS = 60.0, 10.0  # for which calls are made, and where nobody asked for them

_UNEQUAL = (
    "With these matches both models were called, and do not compute the same; autoalign.verify says where the first "
    "difference is."
)

Inputs = tuple[object, object]  # what source and target are called with


def probed(
    plan: Plan, source_model: nn.Module, target_model: nn.Module, inputs: Iterable[Inputs], *, is_search: bool
) -> tuple[Plan, bool]:
    """Return a plan in which calls decide what they can, and whether both networks then compute the same.

    Its source has the keys of the source model; either model may be on the meta device but for what it computes itself.
    The first of the inputs that both take is used. With ``is_search``, ways are tried that the alignment does not list,
    which are believed only if all is equal then.
    """
    names = {*source_model.state_dict(keep_vars=True)}
    end = time.monotonic() + (_SECONDS if is_search else _DEFAULT_SECONDS)
    held = [tuple(m for m in of if names.issuperset(m.sources)) for of in (plan.matches, plan.ambiguous)]
    alignment = Alignment.of(replace(plan, matches=held[0], ambiguous=held[1]))
    sizes = [sum(tensor.numel() for tensor in model.parameters()) for model in (source_model, target_model)]
    if not (alignment.choices or is_search):
        return plan, False
    if max(sizes) > _MAX_ELEMENTS:
        plan, is_decided = _probed_within(plan, alignment, (source_model, target_model), list(inputs), end)
        text = (
            f"The models have too many elements to be called in passing ({max(sizes):,}); autoalign.verify calls them."
        )
        if empty := [name for model in (source_model, target_model) for name in _empty_buffers(model)]:
            text += (
                f" {empty[0]} is on the meta device, and has no values by which modules inside could be called: build "
                "the model with its parameters alone there."
            )
        return plan if is_decided else replace(plan, notes=(*plan.notes, text)), False
    try:
        source, target = (_with_own_values(model) for model in (source_model, target_model))
    except Exception:  # any, since the code is not ours, and some cannot be copied
        return plan, False
    with preserved(source, target):
        begun = _begun(source, target, alignment, inputs)
        if begun is None:
            return plan, False
        session, state = begun
        state, taken = _decided(session, state, alignment.choices, end)
        if is_search and not state.outcome.equal:
            found = search(session, state, Budget(_TRIALS, max(end - time.monotonic(), 0.0)), listed_only=False)
            is_ruled = any("rule" in session.known[match.target].evidence for match in found.changed(session.known))
            if found.outcome.equal and not is_ruled:
                state, more = _decided(session, found, [c for c in alignment.choices if c not in taken], end)
                taken += more
    if is_search and not state.outcome.equal:
        plan = replace(plan, notes=(*plan.notes, _UNEQUAL))
    keys = {key for choice in taken for key in choice.targets}
    keys |= {match.target for match in state.changed(session.known)}
    return _with_matches(plan, {key: state.matches[key] for key in keys}, taken), state.outcome.equal


def _probed_within(
    plan: Plan, alignment: Alignment, models: Sequence[nn.Module], inputs: Sequence[Inputs], end: float
) -> tuple[Plan, bool]:
    """Return a plan in which calls of the smallest modules that hold the tensors decide, and whether all is decided."""
    found: dict[str, Match] = {}
    taken: list[Choice] = []
    for choice in alignment.choices:
        for paths in _paths_around(choice):
            inner = _Inner(alignment, paths)
            options = tuple(map(inner.option, choice.options))
            part = replace(choice, targets=inner.targets(choice.targets), options=options)
            called = _called_within(models, inputs, paths) if part.targets and time.monotonic() < end else None
            if called is None:
                continue
            parts, given = called
            with preserved(*parts):
                begun = _begun(parts[0], parts[1], inner.alignment, [given])
                if begun is None:
                    continue
                state, decided = _decided(*begun, [part], end)
            if decided:
                number = next(n for n, option in enumerate(options) if all(map(state.fills_as, option.matches)))
                found |= {match.target: match for match in choice.options[number].matches}
                taken.append(choice)
                break
    return _with_matches(plan, found, taken), len(taken) == len(alignment.choices)


def _empty_buffers(model: nn.Module) -> list[str]:
    """List buffers without values that no checkpoint gives, such as the frequencies of rotary embeddings."""
    stored = model.state_dict(keep_vars=True).keys()
    return [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in stored]


def _paths_around(choice: Choice) -> Iterator[tuple[str, str]]:
    """Yield the paths of modules of source and target that hold the first block's tensors, from the inside out."""
    block = numbers(choice.targets[0])
    first = [match for match in choice.options[0].matches if numbers(match.target) == block]
    keys = [key for match in first for key in match.sources], [match.target for match in first]
    paths = [common_module([components(split_key(key)[0]) for key in side]) for side in keys]
    around = [[".".join(path[: len(path) - up]) for up in range(min(len(path), _MAX_CLIMBED))] for path in paths]
    for own, other in sorted(product(*map(enumerate, around)), key=lambda pair: pair[0][0] + pair[1][0]):
        yield own[1], other[1]


def _called_within(
    models: Sequence[nn.Module], inputs: Sequence[Inputs], paths: Sequence[str]
) -> tuple[list[nn.Module], Inputs] | None:
    """Return copies of modules inside with values of their own, and what they are called with; None if they are not."""
    parts = [model.get_submodule(path) for model, path in zip(models, paths, strict=True)]
    if max(sum(tensor.numel() for tensor in part.parameters()) for part in parts) > _MAX_ELEMENTS:
        return None
    for given in inputs:
        with suppress(Exception):  # any, since the code is not ours, and some cannot be copied
            own, other = (inputs_within(*each) for each in zip(models, given, paths, strict=True))
            if own is not None and other is not None:
                return [_with_own_values(part) for part in parts], (own, other)
    return None


class _Inner:
    """What an alignment says of two modules inside, by the keys that they have themselves."""

    def __init__(self, alignment: Alignment, paths: Sequence[str]) -> None:
        own, other = self.starts = [f"{path}." for path in paths]
        specs = [
            tuple(replace(spec, key=spec.key[len(start) :]) for spec in side if spec.key.startswith(start))
            for side, start in ((alignment.source_specs, own), (alignment.target_specs, other))
        ]
        matches, ambiguous = (
            tuple(filter(None, map(self.match, of))) for of in (alignment.matches, alignment.ambiguous)
        )
        self.alignment = replace(
            alignment, matches=matches, ambiguous=ambiguous, mismatched=(), source_specs=specs[0], target_specs=specs[1]
        )

    def match(self, match: Match) -> Match | None:
        """Return a match of tensors inside by their keys there, without alternatives."""
        (own, other), sources = self.starts, match.sources
        if not match.target.startswith(other) or not all(key.startswith(own) for key in sources):
            return None
        inner = tuple(key[len(own) :] for key in sources)
        return replace(match, target=match.target[len(other) :], sources=inner, alternatives=())

    def targets(self, keys: Sequence[str]) -> tuple[str, ...]:
        """Return those of the target's keys that are inside, as they are there."""
        return tuple(key[len(self.starts[1]) :] for key in keys if key.startswith(self.starts[1]))

    def option(self, option: Option) -> Option:
        """Return the part of an option that is inside."""
        return Option(tuple(filter(None, map(self.match, option.matches))))


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


def _begun(
    source: nn.Module, target: nn.Module, alignment: Alignment, inputs: Iterable[Inputs]
) -> tuple[Session, State] | None:
    """Call both, the source on values that carry its signal; None if one takes no inputs, or gives nothing finite."""
    for given in inputs:
        try:
            values = fresh_values(source, given[0], alignment.sources.keys())
            if values is not None:
                session = Session(source, target, given, alignment, None, values)
                fills = session.fills(session.known.values())
                return session, State(session.known, fills, session.call(session.known, fills))
        except InputError:  # not these
            continue
    return None


def _decided(session: Session, state: State, choices: Iterable[Choice], end: float) -> tuple[State, list[Choice]]:
    """Return what comes of the choices that calls decide, and these."""
    used = state.outcome.compared.target.first_use
    first_use = {choice: min(used.get(key, NEVER) for key in choice.targets) for choice in choices}
    waiting, taken = sorted(first_use, key=lambda choice: first_use[choice]), list[Choice]()
    while waiting and time.monotonic() < end:
        finding = state.outcome.finding
        since = NEVER - 1 if finding is None else finding.until[1]
        tried = (choice for choice in waiting if first_use[choice] <= since)
        found = next(((choice, new) for choice in tried if (new := _best(session, state, choice, end))), None)
        if found is None:
            break
        choice, state = found
        taken.append(choice)
        waiting.remove(choice)
    return state, taken


def _best(session: Session, state: State, choice: Choice, end: float) -> State | None:
    """Return what comes of the option with which both networks agree further than with any other."""
    states = [state]
    for option in choice.options[1:]:
        if time.monotonic() > end:
            return None
        if (new := refilled(session, state, option.matches)) is not None:
            states.append(new)
    states.sort(key=lambda each: -each.outcome.position)
    if len(states) == 1:
        return state if state.outcome.equal else None
    return states[0] if states[0].outcome.position > states[1].outcome.position else None


def _with_matches(plan: Plan, found: Mapping[str, Match], choices: Iterable[Choice]) -> Plan:
    """Return a plan with what is found among its matches, and notes on the choices that are decided by it."""
    known = {match.target: match for match in (*plan.matches, *plan.ambiguous)}
    made: dict[str, Match] = {}
    for key, match in found.items():
        before = known[key]
        ways = (Candidate(before.sources, before.operation, before.confidence), *before.alternatives)
        others = tuple(way for way in ways if (way.sources, way.operation) != (match.sources, match.operation))
        evidence = {**(before.evidence if others == before.alternatives else {}), PROBE: 1.0}
        made[key] = Match(key, match.sources, match.operation, _CONFIDENCE, evidence, others)
    decided = {key: choice.why[0] for choice in choices for key in choice.targets[:1]}
    lone = [key for key in made if all(key not in choice.targets for choice in choices)]
    notes = [
        f"Probed: {key} is '{made[key].operation}' of {' + '.join(dict.fromkeys(made[key].sources))}, and others are "
        f"the like; with that both models compute the same{f' ({why})' if why else ''}."
        for key, why in (*decided.items(), *((key, "") for key in lone[:1]))
    ]
    return plan.revised(made.values(), notes=notes)


def with_prices(plan: Plan, target_model: nn.Module, inputs: object) -> Plan:
    """Return a plan with notes on how much depends on the layouts that are open, measured on random values."""
    choices = [choice for choice in Alignment.of(plan).choices if len(choice.options) > 1]
    if not choices or sum(tensor.numel() for tensor in target_model.parameters()) > _MAX_ELEMENTS:
        return plan
    notes = []
    try:
        target = _with_own_values(target_model)
        with preserved(target):
            values = fresh_values(target, inputs, tensors_of(target).keys()) or {}
            for choice in choices if values else ():
                keys = {key for match in choice.options[0].matches for key in match.sources}
                sources = {key: _drawn(plan.sources[key].shape) for key in keys}
                results = []
                for option in choice.options[:2]:
                    if {key for match in option.matches for key in match.sources} != sources.keys():
                        break  # it is another tensor that is in doubt
                    filled = {m.target: plan.tensor(m, [sources[key] for key in m.sources]) for m in option.matches}
                    results.append([*flat_tensors(call(target, inputs, values | filled)).values()])
                if len(results) == 2:
                    pairs = zip(*results, strict=True)
                    price = max((relative_difference(other, own) or 0.0 for own, other in pairs), default=0.0)
                    more = f" and {len(choice.targets) - 1} more" if len(choice.targets) > 1 else ""
                    notes.append(
                        f"Open: the layout of {choice.targets[0]}{more}; the outputs depend on it by {price:.0%}."
                    )
    except Exception:  # any, since the code is not ours
        return plan
    return replace(plan, notes=(*plan.notes, *notes))


def _drawn(shape: Sequence[int]) -> Tensor:
    values = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(1))
    return values / max(values[0].numel(), 1) ** 0.5 if values.dim() > 1 else values
