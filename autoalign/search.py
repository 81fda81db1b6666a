"""Search: the filling of a target that makes two networks compute the same, one step at a time."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf

from torch import Tensor

from autoalign.counterparts import owners
from autoalign.matches import Match
from autoalign.subject import Outcome, Subject
from autoalign.trials import Option, exchanges, in_all_layers, listed_options, other_options

_NEAR = 12  # tensors used before a difference that are exchanged with one another


class Budget:
    """How many more trials may be made."""

    def __init__(self, trials: int, seconds: float | None) -> None:
        self.limit, self.made = trials, 0
        self.end = inf if seconds is None else time.monotonic() + seconds

    @property
    def is_spent(self) -> bool:
        """Whether no more may be made."""
        return self.made >= self.limit or time.monotonic() > self.end

    def take(self) -> bool:
        """Count one more trial, unless all were made."""
        if self.is_spent:
            return False
        self.made += 1
        return True


@dataclass(frozen=True, slots=True)
class State:
    """How the target is filled, and what comes of it."""

    matches: dict[str, Match]
    outcome: Outcome
    found: tuple[str, ...]  # the keys whose filling was changed for the better

    def changed(self, matches: Mapping[str, Match]) -> tuple[Match, ...]:
        """List the matches that are other than they were, or were not loaded."""
        return tuple(match for key, match in self.matches.items() if matches.get(key) != match)


def search(
    subject: Subject,
    matches: dict[str, Match],
    fills: Mapping[str, Tensor],
    base: Outcome,
    wrong: Collection[str],
    budget: Budget,
    *,
    listed_only: bool,
) -> State:
    """Try other ways to fill the target, one step at a time, for as long as both agree for longer.

    ``base`` is what came of a call with ``fills`` in place of the target's own values; with ``listed_only`` nothing is
    tried but what the alignment lists.
    """
    state = State(dict(matches), base, ())
    first = {key: subject.value(m) for key, m in subject.proposed.items() if key in subject.own}
    values = {**fills, **first}
    if first and budget.take():
        outcome = subject.call(state.matches, subject.tied(values), wrong)
        state = State(state.matches, outcome, tuple(first) if outcome.equal else ())
    while not state.outcome.equal:
        better = _step(subject, state, values, wrong, budget, listed_only=listed_only)
        if better is None:
            break
        state, values = better
    return state


def _step(
    subject: Subject,
    state: State,
    values: Mapping[str, Tensor],
    wrong: Collection[str],
    budget: Budget,
    *,
    listed_only: bool,
) -> tuple[State, dict[str, Tensor]] | None:
    """Find an option that makes the networks agree for longer, and for equal outputs if one does."""
    best: tuple[State, dict[str, Tensor]] | None = None

    def tried(option: Option) -> bool:
        nonlocal best
        changes = {key: m for key, m in option.items() if key in subject.own and m != state.matches.get(key)}
        if not changes or not budget.take():
            return False
        try:
            new = {key: subject.value(match) for key, match in changes.items()}
        except (RuntimeError, IndexError):  # an operation that does not fit these shapes
            return False
        if any(tensor.shape != subject.own[key].shape for key, tensor in new.items()):
            return False
        matches, filled = {**state.matches, **changes}, {**values, **new}
        outcome = subject.call(matches, subject.tied(filled), wrong)
        known = best[0].outcome.position if best else state.outcome.position
        if outcome.position <= known:
            return False
        best = State(matches, outcome, tuple(dict.fromkeys((*state.found, *changes)))), filled
        return True

    for option, listed in _options(subject, state):
        if budget.is_spent or (best is not None and not listed):
            break
        if listed_only and not listed:
            continue
        if tried(option) and best is not None and not best[0].outcome.equal and not listed:
            tried(in_all_layers(state.matches, option, subject.target_shapes))
        if best is not None and (best[0].outcome.equal or not listed):
            break  # listed ones are all tried, and the best is kept
    return best


def _options(subject: Subject, state: State) -> Iterator[tuple[Option, bool]]:
    """Give options for the first divergence, the likeliest first, and whether the alignment lists them."""
    used = state.outcome.compared.target.first_use
    finding = state.outcome.finding
    end = finding.time if finding is not None else 2**61
    before = sorted((k for k in state.matches if k in used and used[k] <= end), key=lambda key: -used[key])
    called = {call.module for call in state.outcome.compared.target.calls}
    owned = owners(subject.models[1], list(state.matches), called)
    own = [key for key in state.matches if finding and owned[key][0] == finding.call.module]
    at = own if finding is not None and finding.kind in ("own", "mispaired") else []
    suspects = list(dict.fromkeys((*at, *before)))
    if at:
        for option in _likely(subject, state, own):
            yield option, False
    for option in listed_options(state.matches, suspects):
        yield option, True
    near = suspects[: max(len(at), _NEAR)]
    for option in other_options(state.matches, near, subject.target_shapes, subject.shapes):
        yield option, False
    for mine, other in product(at, state.matches):
        if other not in own:
            for option in exchanges(state.matches, (mine, other), subject.target_shapes):
                yield option, False


def _likely(subject: Subject, state: State, own: Sequence[str]) -> Iterator[Option]:
    """Give what the recordings themselves say of a module that is given the right inputs and filled wrongly."""
    matches, finding = state.matches, state.outcome.finding
    module_of = {key: subject.source_owner[match.sources[0]][0] for key, match in matches.items()}
    assert finding is not None
    pairs: list[tuple[str, str]] = []
    if finding.kind == "mispaired":  # the module that is given the same
        pairs += [(mine, key) for key in matches if module_of[key] in finding.elsewhere for mine in own]
    for module in dict.fromkeys(module_of[key] for key in own):  # one that has a part of the tensors should have all
        others = [mine for mine in own if module_of[mine] != module]
        pairs += [(mine, key) for mine in others for key in matches if module_of[key] == module]
    for mine, other in pairs:
        if other not in own:
            yield from exchanges(matches, (mine, other), subject.target_shapes)
