"""``verify``: proof by a call of both networks, and where they first differ if it fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from autoalign.aligning import align
from autoalign.alignment import Alignment, Match
from autoalign.causes import Cause, Divergence, Scene, diverged
from autoalign.comparing import OutputDifference, output_differences, relative_difference, tolerance_of
from autoalign.divergence import (
    Compared,
    Finding,
    event_count,
    features_last,
    first_finding,
    last_agreement,
    module_tolerance,
    worst_finding,
)
from autoalign.errors import InputError
from autoalign.names import kind
from autoalign.pairing import owners, paired_modules
from autoalign.preservation import preserved
from autoalign.recording import Recording, record
from autoalign.trials import Option, exchanges, in_all_layers, listed_options, other_options

_HELD = 0.5  # of the tensors with values of their own that a target must hold to count as loaded
_NEAR = 12  # tensors used before a difference that are exchanged with one another
_EXACT = 1e-6  # relative difference of values that are called the same


@dataclass(frozen=True, slots=True)
class Verification:
    """What a call of two networks shows of an alignment."""

    equal: bool  # the outputs are, with `alignment`
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
        verdict = "equal" if self.equal else "NOT equal"
        lines = [
            f"The outputs are {verdict}: largest relative difference {self.max_difference:.1e}, "
            f"tolerance {self.tolerance:.0e}; {self.compared} inputs and outputs of modules compared, "
            f"the target called {how}."
        ]
        if self.first_divergence is not None:
            lines.append(f"First divergence: {self.first_divergence}")
        if self.taken:
            lines.append(f"{len(self.taken)} matches had to be taken otherwise, found in {self.trials} trials:")
            lines += [f"  {match.target} = {' + '.join(match.sources)}: {match.operation}" for match in self.taken[:6]]
            if len(self.taken) > 6:
                lines.append(f"  ... and {len(self.taken) - 6} more: verification.taken")
            lines.append("Load them: model.load_state_dict(verification.alignment.state_dict(), strict=False)")
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])


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
    **align_options: Any,
) -> Verification:
    """Call both models on equal inputs, compare all that they compute, and name where they first differ.

    The outputs decide. Modules are paired by the tensors that the alignment pairs, and compared in the order in which
    the target calls them: the first whose output differs although its inputs agree, or the place between two modules
    where a difference arises, is the first divergence. Its cause is one of ``weights`` (other values than the source's,
    or in another layout), ``missing`` (tensors that got nothing), ``configuration`` (the same weights and another
    setting, which is named), ``code`` and ``precision``.

    Which values the target is called with: its own if it was loaded, which its values tell; else those of the
    alignment, in place of its own and without changing it. An ``alignment`` that is given is checked by its values,
    and the target by its own too, if it was loaded. If outputs differ, other ways to fill the target are tried
    where they first do: what is ambiguous and all ``alternatives``, tensors of equal shape exchanged, square matrices
    transposed, parts of fused tensors in another order; first all layers at once. The alignment that makes the
    outputs equal is returned; nothing is loaded:

        verification = autoalign.verify(source, target, inputs)
        if verification.equal:
            target.load_state_dict(verification.alignment.state_dict(), strict=False)

    Both models are left as they were: the mode of each submodule, hooks, parameters, buffers, random states. Their
    values are kept meanwhile in a copy, on the CPU.

    >>> from collections import OrderedDict
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
        tolerance: The largest difference of outputs that are called equal, as a share of the largest value of each;
            by default 1e-3 for float32, 1e-2 for float16, 5e-2 for bfloat16 and 1e-6 for float64.
        trials: How many calls of the target may be made to try alternatives; 0 for none.
        seconds: For how long alternatives may be tried; no limit by default.
        **align_options: As for ``align``, where no alignment is given.

    Raises:
        InputError: A model cannot be called on the inputs, or the alignment is not one of these models.
    """
    for model in (source_model, target_model):
        if not isinstance(model, nn.Module):
            raise InputError(f"verify calls two nn.Modules, and {type(model).__name__} is none. Nothing was verified.")
    given = alignment is not None
    if alignment is None:
        alignment = align(source_model, target_model, **align_options)
    _check(alignment, source_model, target_model)
    inputs = (example_inputs, example_inputs if target_inputs is None else target_inputs)
    with preserved(source_model, target_model):
        subject = _Subject(source_model, target_model, inputs, alignment, tolerance)
        budget = _Budget(trials, seconds)
        if not subject.loaded:
            return subject.verified(as_it_is=False, budget=budget)
        found = subject.verified(as_it_is=True, budget=budget)
        if not given or not found.equal:
            return found
        by_alignment = subject.verified(as_it_is=False, budget=budget)
        return found if by_alignment.equal and by_alignment.first_divergence is None else by_alignment


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


class _Budget:
    """How many more trials may be made."""

    def __init__(self, trials: int, seconds: float | None) -> None:
        self.left, self.made = trials, 0
        self.end = inf if seconds is None else time.monotonic() + seconds

    def take(self) -> bool:
        if self.left <= self.made or time.monotonic() > self.end:
            return False
        self.made += 1
        return True


@dataclass(frozen=True, slots=True)
class _Outcome:
    """One call of the target."""

    differences: tuple[OutputDifference, ...]
    largest: float
    equal: bool
    finding: Finding | None
    position: float  # how far both agree; inf where the outputs are equal
    compared: Compared
    events: int
    right: frozenset[str] = field(default_factory=frozenset)


class _Subject:
    """Two models, a call of the source, and what is known of the target's values."""

    def __init__(
        self,
        source: nn.Module,
        target: nn.Module,
        inputs: tuple[object, object],
        alignment: Alignment,
        tolerance: float | None,
    ) -> None:
        self.models = (source, target)
        self.inputs, self.alignment, self.wanted_tolerance = inputs[1], alignment, tolerance
        self.shapes = {spec.key: spec.shape for spec in alignment.source_specs}
        self.target_shapes = {spec.key: spec.shape for spec in alignment.target_specs}
        self.sizes = {spec.key: spec.numel for spec in alignment.target_specs}
        self.keep = [{key.rpartition(".")[0] for key in shapes} for shapes in (self.shapes, self.target_shapes)]
        names = [dict(model.named_modules(remove_duplicate=False)) for model in self.models]
        for keep, modules in zip(self.keep, names, strict=True):  # of a module with several names, the first is used
            shared = {id(modules[name]) for name in keep if name in modules}
            keep |= {name for name, module in modules.items() if id(module) in shared}
        self.source = record(source, inputs[0], self.keep[0])
        self.last = {
            f"{side}:{name}"
            for side, model in zip(("source", "target"), self.models, strict=True)
            for name in features_last(model)
        }
        called = {call.module for call in self.source.calls}
        self.source_owner = owners(source, list(self.shapes), called)
        self.own = {
            name: tensor
            for name, tensor in chain(
                target.named_parameters(remove_duplicate=False), target.named_buffers(remove_duplicate=False)
            )
        }
        self.matches = {match.target: match for match in alignment.matches}
        self.proposed = {match.target: match for match in alignment.ambiguous}
        self.wrong, self.loaded = self._held()

    def _held(self) -> tuple[dict[str, str], bool]:
        """Find the target's tensors that are not what the alignment gives, and whether it was loaded at all."""
        tensors = {key: self._value(match) for key, match in self.matches.items() if key in self.own}
        sums: dict[tuple[int, float], list[str]] = {}
        wrong: dict[str, str] = {}
        told = held = 0
        for key, tensor in tensors.items():
            if tensor.numel() > 1:
                sums.setdefault(_print_of(tensor), []).append(key)
        for key, tensor in tensors.items():
            own = self.own[key].detach()
            agrees = torch.equal(own, tensor) or (relative_difference(own, tensor) or 0.0) <= _EXACT
            other = () if agrees or own.numel() <= 1 else sums.get(_print_of(own), ())
            if not agrees:
                wrong[key] = self._describe(key, own, tensor, [k for k in other if torch.equal(tensors[k], own)])
            is_free = isinstance(self.own[key], nn.Parameter) and own.numel() > 1
            if is_free and not bool((tensor == tensor.flatten()[0]).all()):
                told += 1
                held += agrees or bool(other)
        return wrong, held >= _HELD * told

    def _describe(self, key: str, own: Tensor, tensor: Tensor, like: Sequence[str]) -> str:
        sources = " + ".join(self.matches[key].sources)
        if own.dim() == 2 and own.shape[0] == own.shape[1] and torch.equal(own.T, tensor):
            return f"holds {sources} transposed"
        if like:
            return f"holds what {like[0]} should: {' + '.join(self.matches[like[0]].sources)}, not {sources}"
        apart = relative_difference(own, tensor)
        return f"differs from what {sources} gives" + ("" if apart is None else f" by {apart:.1e}")

    def _value(self, match: Match) -> Tensor:
        """Make the tensor of a match, as a load would give it to the target."""
        tensor, own = self.alignment.tensor(match).detach(), self.own[match.target]
        return tensor.to(device=own.device, dtype=own.dtype)

    def call(self, matches: Mapping[str, Match], values: Mapping[str, Tensor] | None, wrong: Collection[str]) -> _Outcome:
        """Call the target and compare; ``matches`` tell which modules belong together."""
        target = record(self.models[1], self.inputs, self.keep[1], values)
        called = {call.module for call in target.calls}
        target_owner = owners(self.models[1], list(self.target_shapes), called)
        pairs = paired_modules(list(matches.values()), self.source_owner, target_owner, self.sizes)
        tolerance = self.wanted_tolerance or tolerance_of(self.source.outputs, target.outputs)
        compared = Compared(
            self.source,
            target,
            pairs,
            self.shapes,
            self.target_shapes,
            self.last,
            module_tolerance(tolerance, (self.source, target)),
        )
        differences = output_differences(target.outputs, self.source.outputs)
        largest = max((item.difference for item in differences), default=inf)
        equal = largest <= tolerance
        guilty = {target_owner[key][0] for key in wrong if key in target_owner}
        finding = first_finding(compared, guilty, ())
        position: float = inf if equal else finding.position if finding is not None else 2**31
        return _Outcome(tuple(differences), largest, equal, finding, position, compared, event_count(compared))

    def scene(self, outcome: _Outcome, matches: Mapping[str, Match], wrong: Mapping[str, str], filled: Collection[str]) -> Scene:
        called = {call.module for call in outcome.compared.target.calls}
        owned = owners(self.models[1], list(self.target_shapes), called)
        return Scene(
            self.models,
            (self.source, outcome.compared.target),
            outcome.compared.pairs,
            {key: owner for key, (owner, _) in owned.items()},
            self.alignment,
            matches,
            wrong,
            [key for key in self.target_shapes if key not in filled],
        )

    def verified(self, *, as_it_is: bool, budget: _Budget) -> Verification:
        """Verify the target by its own values or by the alignment's."""
        wrong = self.wrong if as_it_is else {}
        fills = {} if as_it_is else {key: self._value(m) for key, m in self.matches.items() if key in self.own}
        known = {**self.proposed, **self.matches}
        base = self.call(known, self._tied(fills) or None, wrong)
        scene = self.scene(base, known, wrong, self.matches)
        divergence = self._divergence(base, scene)
        notes = []
        if not base.differences:
            sides = [{name: list(t.shape) for name, t in r.outputs.items()} for r in (self.source, base.compared.target)]
            notes.append(f"No outputs have the same size: {sides[0]} of the source, {sides[1]} of the target.")
        state = _State(known, base, ())
        explained = divergence is not None and any(key in wrong for key in divergence.keys)
        if not base.equal and not explained and base.differences:
            state = self._search(known, fills, base, scene, wrong, budget)
            divergence = self._located(divergence, state, base)
        elif base.equal and wrong and divergence is None:
            notes.append(f"{len(wrong)} tensors hold other values than the alignment gives: {', '.join(list(wrong)[:3])}.")
        best = state.outcome if state.outcome.equal else base
        taken = state.changed(self.matches) if best.equal and not base.equal else ()
        if state.outcome.position > base.position and not best.equal:
            moved = ", ".join(match.target for match in state.changed(self.matches)[:3])
            notes.append(f"With {moved} filled otherwise, both agree for longer, and then differ too.")
        return Verification(
            best.equal,
            best.largest,
            divergence,
            _with(self.alignment, taken),
            taken,
            as_it_is,
            best.differences,
            self.wanted_tolerance or tolerance_of(self.source.outputs, base.compared.target.outputs),
            best.events,
            budget.made,
            tuple(notes),
        )

    def _tied(self, fills: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give tied parameters one tensor, and parameters' places to parameters."""
        first: dict[int, Tensor] = {}
        for key, tensor in fills.items():
            if id(self.own[key]) not in first:
                is_parameter = isinstance(self.own[key], nn.Parameter)
                first[id(self.own[key])] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        return {key: first[id(self.own[key])] for key in fills}

    def _divergence(self, outcome: _Outcome, scene: Scene) -> Divergence | None:
        finding = outcome.finding
        if outcome.equal:
            pair = scene.pairs.get(finding.call.module) if finding else None
            shown = finding is not None and (
                any(scene.owner[key] == finding.call.module for key in scene.wrong) or (pair is not None and pair.mixed)
            )
            if shown and finding is not None:
                return diverged(scene, finding)
            return self._unseen(scene)
        if finding is not None:
            return diverged(scene, finding)
        if (finding := worst_finding(outcome.compared)) is not None:
            return diverged(scene, finding)
        return self._at_the_end(outcome, scene)

    def _at_the_end(self, outcome: _Outcome, scene: Scene) -> Divergence:
        """Tell of a difference that shows in no module that could be compared."""
        since, source_since = last_agreement(outcome.compared)
        root = [next((c for c in r.calls if c.module == ""), None) for r in scene.recordings]
        assert root[0] is not None
        assert root[1] is not None
        finding = Finding(
            0, "before", root[1], "", outcome.largest, since, source_since, 2**61, 2**61
        )
        return diverged(scene, finding)

    def _unseen(self, scene: Scene) -> Divergence | None:
        """Find tensors that are wrong although nothing in this call shows it, such as counters."""
        used = scene.recordings[1].first_use
        wrong = sorted(scene.wrong, key=lambda key: used.get(key, 2**61))
        if wrong:
            module = scene.owner[wrong[0]]
            text = f"{wrong[0]} {scene.wrong[wrong[0]]}. It does not show in the outputs of this call."
            source = self.source_owner[self.matches[wrong[0]].sources[0]][0]
            return Divergence(source, module, 0.0, "weights", text, (wrong[0],))
        for key in sorted(self.matches, key=lambda key: used.get(key, 2**61)):
            pair = scene.pairs.get(scene.owner[key])
            if pair and key in pair.mixed and kind(key.rpartition(".")[2])[0] in ("mean", "var", "count"):
                text = (
                    f"{key} comes from {' + '.join(self.matches[key].sources)}, the rest of the module from "
                    f"{pair.source}. It does not show in the outputs of this call."
                )
                return Divergence(pair.source, pair.target, 0.0, "weights", text, (key,))
        return None

    def _located(self, divergence: Divergence | None, state: _State, base: _Outcome) -> Divergence | None:
        """Say which layer is at fault, if trials told."""
        if divergence is None or not state.found:
            return divergence
        used = base.compared.target.first_use
        keys = sorted(state.found, key=lambda key: used.get(key, 2**61))
        called = {call.module for call in base.compared.target.calls}
        owner = owners(self.models[1], keys, called)
        module = owner[keys[0]][0]
        if divergence.cause == "missing" and module == divergence.target_module:
            return divergence
        match = state.matches[keys[0]]
        pair = base.compared.pairs.get(module)
        verb = "makes the outputs equal" if state.outcome.equal else "makes both agree for longer"
        text = f"{match.target} = {' + '.join(match.sources)}: {match.operation} {verb}."
        source = self.source_owner[match.sources[0]][0] if pair is None else pair.source
        return Divergence(source, module, divergence.difference, "weights", text, tuple(keys), divergence.between)

    def _search(
        self,
        matches: dict[str, Match],
        fills: Mapping[str, Tensor],
        base: _Outcome,
        scene: Scene,
        wrong: Collection[str],
        budget: _Budget,
    ) -> _State:
        """Try other ways to fill the target, one step at a time, for as long as both agree for longer."""
        state = _State(dict(matches), base, ())
        first = {key: self._value(m) for key, m in self.proposed.items() if key in self.own}
        values = {**fills, **first}
        if first and budget.take():
            outcome = self.call(state.matches, self._tied(values), wrong)
            state = _State(state.matches, outcome, tuple(first) if outcome.equal else ())
        while not state.outcome.equal:
            better = self._step(state, values, wrong, budget)
            if better is None:
                break
            state, values = better
        return state

    def _step(
        self, state: _State, values: Mapping[str, Tensor], wrong: Collection[str], budget: _Budget
    ) -> tuple[_State, dict[str, Tensor]] | None:
        """Find an option that makes the networks agree for longer, and for equal outputs if one does."""
        best: tuple[_State, dict[str, Tensor]] | None = None

        def tried(option: Option) -> bool:
            nonlocal best
            changes = {key: m for key, m in option.items() if key in self.own and m != state.matches.get(key)}
            if not changes or not budget.take():
                return False
            try:
                new = {key: self._value(match) for key, match in changes.items()}
            except (RuntimeError, IndexError):  # an operation that does not fit these shapes
                return False
            if any(tensor.shape != self.own[key].shape for key, tensor in new.items()):
                return False
            matches, filled = {**state.matches, **changes}, {**values, **new}
            outcome = self.call(matches, self._tied(filled), wrong)
            known = best[0].outcome.position if best else state.outcome.position
            if outcome.position <= known:
                return False
            best = _State(matches, outcome, tuple(dict.fromkeys((*state.found, *changes)))), filled
            return True

        for option, listed in self._options(state):
            if budget.left <= budget.made:
                break
            if tried(option) and best is not None and not best[0].outcome.equal and not listed:
                tried(in_all_layers(state.matches, option, self.target_shapes))
            if best is not None and (best[0].outcome.equal or not listed):
                break
        return best

    def _options(self, state: _State) -> Iterator[tuple[Option, bool]]:
        """Give options for the first divergence, the likeliest first, and whether the alignment lists them."""
        used = state.outcome.compared.target.first_use
        finding = state.outcome.finding
        end = finding.time if finding is not None else 2**61
        before = sorted((k for k in state.matches if used.get(k, 2**61) <= end), key=lambda key: -used[key])
        called = {call.module for call in state.outcome.compared.target.calls}
        owned = owners(self.models[1], list(state.matches), called)
        own = [key for key in state.matches if finding and owned[key][0] == finding.call.module]
        at = own if finding is not None and finding.kind in ("own", "mispaired") else []
        suspects = list(dict.fromkeys((*at, *before)))
        yield from ((option, True) for option in listed_options(state.matches, suspects))
        if finding is not None and finding.kind == "mispaired":
            right = [k for k, m in state.matches.items() if self.source_owner[m.sources[0]][0] in finding.elsewhere]
            for key in right:  # the tensors of the module that is given the same
                yield from ((o, False) for o in exchanges(state.matches, [*own, key], self.target_shapes) if set(o) & set(own))
        pair = state.outcome.compared.pairs.get(finding.call.module) if finding else None
        if at and pair is not None and pair.mixed:
            theirs = [k for k, m in state.matches.items() if self.source_owner[m.sources[0]][0] == pair.source]
            for key in pair.mixed:
                yield from (
                    (option, False)
                    for other in theirs
                    if other not in own
                    for option in exchanges(state.matches, [key, other], self.target_shapes)
                )
        near = suspects[: max(len(at), _NEAR)]
        yield from ((o, False) for o in other_options(state.matches, near, self.target_shapes, self.shapes))
        if at:
            for key in state.matches:
                if key not in own:
                    for mine in at:
                        yield from ((o, False) for o in exchanges(state.matches, [mine, key], self.target_shapes))


@dataclass(frozen=True, slots=True)
class _State:
    """How the target is filled, and what comes of it."""

    matches: dict[str, Match]
    outcome: _Outcome
    found: tuple[str, ...]  # the keys whose filling was changed for the better

    def changed(self, matches: Mapping[str, Match]) -> tuple[Match, ...]:
        """List the matches that are other than they were, or were not loaded."""
        return tuple(match for key, match in self.matches.items() if matches.get(key) != match)


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


def _print_of(tensor: Tensor) -> tuple[int, float]:
    """Give what all tensors of the same values in any order have in common."""
    return tensor.numel(), float(f"{float(tensor.detach().double().abs().sum()):.9e}")
