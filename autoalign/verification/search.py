"""Search: other ways to fill a target that may be right, where two networks stop computing the same.

An option changes some matches. What the alignment lists as alternatives comes first, in all layers at once; then what
often goes wrong: features that a layer takes in another order, tensors of equal shape exchanged, square matrices
transposed, parts of a fused tensor in another order or by turns, gates in another order. Options are tried against the
networks' outputs, and only what makes them equal is believed.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations, product
from math import inf, prod

import torch
from torch import Tensor

from autoalign.errors import InputError
from autoalign.plan.keys import common_module, components, stem
from autoalign.plan.matches import Candidate, Match
from autoalign.plan.operations import (
    Chain,
    Concatenate,
    Operation,
    Parallel,
    Permute,
    Reshape,
    Shape,
    Split,
    Transpose,
    chain,
)
from autoalign.verification.compare import Finding, feature_rows
from autoalign.verification.run import NEVER
from autoalign.verification.session import Outcome, Session

Option = dict[str, Match]  # target key -> the match that takes the place of its present one

_MAX_REARRANGED_FIRST = 4  # suspects whose layout is changed before any are exchanged
_GATE_COUNTS = (3, 4)  # of recurrent layers
_PART_COUNTS = (2, 3)  # that a tensor which is fused on both sides may have
_MAX_PERMUTED_PARTS = 4  # whose orders are all tried
_SAME_SIGNS = 1e-5  # how far signs of the same values may be apart, as a share of the largest
_MAX_RUNS = 64  # of features that come one after the other in both networks
_MAX_NEAR = 12  # tensors used before a difference that are exchanged with one another


@dataclass(frozen=True, slots=True)
class Options:
    """Other ways to fill a target; suspects are its keys, the likeliest to be filled wrongly first."""

    matches: Mapping[str, Match]  # what fills it, by key
    shapes: Mapping[str, Shape]  # of its keys
    source_shapes: Mapping[str, Shape]

    def listed(self, suspects: Sequence[str]) -> Iterator[Option]:
        """Yield the other layouts of suspects that are in doubt; those of one doubt together, in all layers."""
        done = set()
        for key in suspects:
            match = self.matches[key]
            if not match.warnings or match.warnings in done:
                continue
            done.add(match.warnings)
            group = [m for m in self.matches.values() if m.alternatives and m.warnings == match.warnings]
            for turn in range(max((len(m.alternatives) for m in group), default=0)):
                option: Option = {}
                for member in group:
                    if turn < len(member.alternatives):
                        option |= self._with_rival(member, member.alternatives[turn])
                yield option

    def likely(self, suspects: Sequence[str]) -> Iterator[Option]:
        """Yield what often goes wrong around the suspects, the likeliest first."""
        nearest, others = suspects[:_MAX_REARRANGED_FIRST], suspects[_MAX_REARRANGED_FIRST:]
        yield from self._rearranged(nearest)
        for key in suspects:
            if not self.matches[key].warnings:
                for rival in self.matches[key].alternatives:
                    yield self._with_rival(self.matches[key], rival)
        yield from self.exchanges(suspects)
        yield from self._rearranged(others)

    def exchanges(self, suspects: Sequence[str]) -> Iterator[Option]:
        """Exchange what fills suspects of equal shape: whole layers, then single tensors, then three in a circle."""
        modules: dict[str, list[str]] = {}
        for key in suspects:
            modules.setdefault(key.rpartition(".")[0], []).append(key)
        for first, second in _nearest_pairs(list(modules)):
            option: Option = {}
            for key in modules[first]:
                partner = f"{second}.{key.rpartition('.')[2]}".lstrip(".")
                if partner in modules[second] and self.shapes[partner] == self.shapes[key]:
                    option |= self._exchanged(key, partner)
            if len(option) > 2:
                yield option
        for first, second in _nearest_pairs(suspects):
            if self.shapes[first] == self.shapes[second]:
                yield self._exchanged(first, second)
        groups: dict[tuple[Shape, str], list[str]] = {}
        for key in suspects:
            groups.setdefault((self.shapes[key], key.rpartition(".")[2]), []).append(key)
        for group in groups.values():
            if len(group) > 2:
                first, second, third = group[:3]
                for order in ((second, third, first), (third, first, second)):
                    members = zip((first, second, third), order, strict=True)
                    yield {key: _refilled(self.matches[key], self.matches[other]) for key, other in members}

    def in_all_layers(self, option: Option) -> Option:
        """Extend an option to the other layers of the same names; the option itself where there are none."""
        matches, shapes, keys, result = self.matches, self.shapes, list(option), dict(option)
        if len(keys) == 1:
            (key,) = keys
            old, new = matches[key], option[key]
            for other, match in matches.items():
                same = stem(other) == stem(key) and shapes[other] == shapes[key]
                if not same or other == key or match.operation != old.operation:
                    continue
                if new.sources == old.sources:
                    result[other] = replace(match, operation=new.operation)
                elif set(new.sources) == set(old.sources) and len(match.sources) == len(old.sources):
                    sources = tuple(match.sources[old.sources.index(source)] for source in new.sources)
                    result[other] = replace(match, sources=sources, operation=new.operation)
            return result
        prefix = ".".join(common_module([components(key) for key in keys]))
        suffix = {key: key[len(prefix) :] for key in keys}
        moved = {key: next((k for k in keys if _has_same_fill(matches[k], option[key])), key) for key in keys}
        for other in matches:
            start = other[: -len(suffix[keys[0]])]
            if not other.endswith(suffix[keys[0]]) or start == prefix or stem(start) != stem(prefix):
                continue
            there = {key: start + suffix[key] for key in keys}
            if all(name in matches and shapes[name] == shapes[key] for key, name in there.items()):
                for key in keys:
                    result[there[key]] = _refilled(matches[there[key]], matches[there[moved[key]]])
        return result

    def _with_rival(self, match: Match, rival: Candidate) -> Option:
        """Fill a key from other sources; the key that had them gets this one's."""
        option = {match.target: _refilled(match, rival)}
        if sorted(rival.sources) != sorted(match.sources):
            for other in self.matches.values():
                if other.sources == rival.sources and other.target != match.target:
                    option[other.target] = _refilled(other, match)
        return option

    def _exchanged(self, first: str, second: str) -> Option:
        one, other = self.matches[first], self.matches[second]
        return {first: _refilled(one, other), second: _refilled(other, one)}

    def _rearranged(self, keys: Sequence[str]) -> Iterator[Option]:
        """Change the layout of tensors: square matrices transposed, parts in another order."""
        for key in keys:
            match = self.matches[key]
            if not match.operation.adapts and len(self.shapes[key]) == 2 and self.shapes[key][0] == self.shapes[key][1]:
                yield {key: replace(match, operation=_transposed(match.operation))}
            alike = len({self.source_shapes.get(source) for source in match.sources}) == 1
            if 1 < len(match.sources) <= _MAX_PERMUTED_PARTS and alike:
                for sources in list(permutations(match.sources))[1:]:
                    yield {key: replace(match, sources=sources)}
            yield from self._parts_reordered(key)

    def _parts_reordered(self, key: str) -> Iterator[Option]:
        """Yield other orders of halves or thirds, or rows by turns, of what is fused on both sides, and of its bias."""
        if len(self.shapes[key]) < 2:
            return
        bias = f"{key.rpartition('.')[0]}.bias".lstrip(".")
        for count, dim in product(_PART_COUNTS, (0, len(self.shapes[key]) - 1)):
            size = self.shapes[key][dim]
            if size % count or size == count or (count == 3 and size not in {3 * other for other in self.shapes[key]}):
                continue
            members = {key: dim}
            if bias in self.matches and self.shapes.get(bias) == (size,):
                members[bias] = 0
            if any(len(self.matches[k].sources) > 1 or self.matches[k].operation.adapts for k in members):
                continue
            for order in list(permutations(range(count)))[1:]:
                length = size // count
                parts = [(place * length, length) for place in order]
                yield {k: _in_parts(self.matches[k], along, parts) for k, along in members.items()}
            if (count, dim) == (2, 0):
                for sizes, is_flipped in product(((2, size // 2), (size // 2, 2)), (False, True)):
                    yield {k: _interleaved(self.matches[k], self.shapes[k], sizes, is_flipped) for k in members}
        yield from self._gates_reordered(key)

    def _gates_reordered(self, key: str) -> Iterator[Option]:
        """Yield the other orders of the gates of a recurrent layer, whose tensors have their rows in common."""
        size, module = self.shapes[key][0], key.rpartition(".")[0]
        members = [k for k in self.matches if k.rpartition(".")[0] == module and self.shapes[k][:1] == (size,)]
        matrices = [k for k in members if len(self.shapes[k]) == 2]
        is_plain = all(len(self.matches[k].sources) == 1 and not self.matches[k].operation.adapts for k in members)
        if matrices[:1] != [key] or len(matrices) == 1 or not is_plain:
            return
        for count in _GATE_COUNTS:
            length = size // count
            if any(self.shapes[k] == (count * length, length) for k in matrices):
                for order in list(permutations(range(count)))[1:]:
                    parts = [(place * length, length) for place in order]
                    yield {k: _in_parts(self.matches[k], 0, parts) for k in members}


def _refilled(match: Match, fill: Match | Candidate) -> Match:
    """Fill the target of a match as another match or a candidate does."""
    return replace(match, sources=fill.sources, operation=fill.operation)


def _has_same_fill(match: Match, other: Match) -> bool:
    return match.sources == other.sources and match.operation == other.operation


def _nearest_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [(i + j, i, j) for i, j in combinations(range(len(names)), 2)]
    return [(names[i], names[j]) for _, i, j in sorted(pairs)]


def _transposed(operation: Operation) -> Operation:
    steps = operation.steps if isinstance(operation, Chain) else (operation,)
    return chain(*steps[:-1]) if steps[-1] == Transpose() else chain(operation, Transpose())


def _in_parts(match: Match, dim: int, parts: Sequence[tuple[int, int]]) -> Match:
    """Join parts of what a match gives, each from a place on and of a length."""
    steps = tuple(chain(match.operation, Split(dim, start, length)) for start, length in parts)
    return replace(match, sources=match.sources * len(parts), operation=chain(Parallel(steps), Concatenate(dim)))


def _interleaved(match: Match, shape: Shape, sizes: tuple[int, int], is_flipped: bool) -> Match:
    """Return a match whose halves of rows come by turns, sizes [2, n], or the reverse, [n, 2]; flipped, last first."""
    half = shape[0] // 2
    flipped = [(half, half), (0, half)]
    if is_flipped and sizes[0] == 2:
        match = _in_parts(match, 0, flipped)
    turned = Reshape((*sizes, *shape[1:])), Permute((1, 0, *range(2, len(shape) + 1))), Reshape(shape)
    match = replace(match, operation=chain(match.operation, *turned))
    return _in_parts(match, 0, flipped) if is_flipped and sizes[0] != 2 else match


class Budget:
    """How many more trials may be made."""

    def __init__(self, trials: int, seconds: float | None) -> None:
        self.limit, self.made = trials, 0
        self.end = inf if seconds is None else time.monotonic() + seconds

    @property
    def is_spent(self) -> bool:
        """True if no more may be made."""
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
    values: Mapping[str, Tensor]  # in place of the target's own, by key
    outcome: Outcome
    found: tuple[str, ...] = ()  # the keys whose filling was changed for the better

    def changed(self, matches: Mapping[str, Match]) -> tuple[Match, ...]:
        """List the matches that differ from those given, or are not among them."""
        return tuple(match for key, match in self.matches.items() if matches.get(key) != match)

    def fills_as(self, match: Match) -> bool:
        """Return True if the target of a match is filled as it says."""
        return _has_same_fill(self.matches[match.target], match)


def search(session: Session, base: State, budget: Budget, *, listed_only: bool) -> State:
    """Try other ways to fill the target, one step at a time, for as long as both agree for longer.

    Nothing but what the alignment lists is tried with ``listed_only``.
    """
    state = base
    first = {key: session.value(m) for key, m in session.proposed.items() if key in session.own}
    if first and budget.take():
        values = {**state.values, **first}
        outcome = session.call(state.matches, values)
        state = State(state.matches, values, outcome, tuple(first) if outcome.equal else ())
    while not state.outcome.equal:
        better = _step(session, state, budget, listed_only=listed_only)
        if better is None:
            break
        state = better
    return state


def refilled(session: Session, state: State, changes: Collection[Match]) -> State | None:
    """Call the target with some of it filled otherwise; None where that does not fit its shapes."""
    try:
        new = session.fills(changes)
        if any(tensor.shape != session.own[key].shape for key, tensor in new.items()):
            return None
        matches, values = {**state.matches, **{match.target: match for match in changes}}, {**state.values, **new}
        found = tuple(dict.fromkeys((*state.found, *new)))
        return State(matches, values, session.call(matches, values), found)
    except (RuntimeError, LookupError, InputError):
        return None


def _step(session: Session, state: State, budget: Budget, *, listed_only: bool) -> State | None:
    """Find an option that makes the networks agree for longer, and for equal outputs if one does."""
    best: State | None = None
    options = Options(state.matches, session.target_shapes, session.shapes)

    def tried(option: Option) -> bool:
        nonlocal best
        changes = {key: m for key, m in option.items() if key in session.own and m != state.matches.get(key)}
        if not changes or not budget.take():
            return False
        new = refilled(session, state, changes.values())
        if new is None or new.outcome.position <= (best or state).outcome.position:
            return False
        best = new
        return True

    for option, listed in _suggested(session, state, options):
        if budget.is_spent or (best is not None and not listed):
            break
        if listed_only and not listed:
            continue
        if tried(option) and best is not None and not best.outcome.equal and not listed:
            tried(options.in_all_layers(option))
        if best is not None and (best.outcome.equal or not listed):
            break  # listed ones are all tried, and the best is kept
    return best


def _suggested(session: Session, state: State, options: Options) -> Iterator[tuple[Option, bool]]:
    """Yield options for the first divergence, the likeliest first, and whether the alignment lists them."""
    used = state.outcome.compared.target.first_use
    finding = state.outcome.finding
    end = finding.until[1] if finding is not None else NEVER
    before = sorted((k for k in state.matches if k in used and used[k] <= end), key=lambda key: -used[key])
    owners = state.outcome.compared.owners
    own = [key for key in state.matches if finding and owners[key][0] == finding.call.module]
    if finding is not None and own:
        yield _in_given_order(session, state, finding, own), False
    at = own if finding is not None and finding.kind in ("own", "mispaired") else []
    suspects = list(dict.fromkeys((*at, *before)))
    if finding is not None and at:
        for mine, other in _recorded_pairs(session, state.matches, finding, own):
            yield from ((option, False) for option in options.exchanges((mine, other)))
    yield from ((option, True) for option in options.listed(suspects))
    yield from ((option, False) for option in options.likely(suspects[: max(len(at), _MAX_NEAR)]))
    for mine, other in product(at, state.matches):
        if other not in own:
            yield from ((option, False) for option in options.exchanges((mine, other)))


def _in_given_order(session: Session, state: State, finding: Finding, own: Sequence[str]) -> Option:
    """Fill a layer in the order in which the target gives it the features that the source gives to its partner."""
    compared, call = state.outcome.compared, finding.call
    partners = (each for each in compared.source.calls if (each.module, each.index) == (finding.source, call.index))
    shapes = {key: session.target_shapes[key] for key in own}
    widths = {shape[1] if len(shape) > 1 else shape[0] for shape in shapes.values() if shape}
    widths = {shape[1] for shape in shapes.values() if len(shape) > 1} or widths
    partner = next(partners, None)
    if partner is None or len(widths) != 1:
        return {}
    (count,) = widths
    given, wanted = (
        feature_rows(each.given, count, f"{side}:{each.module}" in compared.last)
        for side, each in (("target", call), ("source", partner))
    )
    if given is None or wanted is None or given.shape != wanted.shape:
        return {}
    signs = _signs(given), _signs(wanted)
    if torch.allclose(*signs, atol=_SAME_SIGNS):
        return {}
    option: Option = {}
    for key, shape in shapes.items():
        if len(shape) > 1 or (shape == (count,) and all(len(other) < 2 for other in shapes.values())):
            new = _reordered(state.matches[key], shape, min(len(shape) - 1, 1), *signs)
            option |= {} if new is None else {key: new}
    return option


def _signs(rows: Tensor) -> Tensor:
    """Return what each row has in common with one of the same values in any order, [rows, signs]."""
    rows = rows.double()
    signs = torch.stack([rows.mean(1), rows.abs().mean(1), rows.square().mean(1), (rows**3).mean(1)], 1)
    return signs / signs.abs().amax(0).clamp(min=torch.finfo(torch.double).tiny)


def _reordered(match: Match, shape: Shape, dim: int, given: Tensor, wanted: Tensor) -> Match | None:
    """Put a dimension whose features have the signs ``wanted`` into the order of ``given``, if some steps do."""
    count = len(given)
    divisors = [size for size in range(1, count) if count % size == 0]
    for second, first in product(divisors, divisors[1:]):  # two factors before three
        sizes = tuple(size for size in (first, second, count // first // second) if size > 1)
        for order in list(permutations(range(len(sizes))))[1:] if prod(sizes) == count else ():
            places = torch.arange(count).reshape(sizes).permute(order).flatten()
            if torch.allclose(given, wanted[places], atol=_SAME_SIGNS):
                rest = range(dim + len(sizes), len(shape) + len(sizes) - 1)
                apart = Permute((*range(dim), *(dim + place for place in order), *rest))
                steps = Reshape((*shape[:dim], *sizes, *shape[dim + 1 :])), apart, Reshape(shape)
                return replace(match, operation=chain(match.operation, *steps))
    runs: list[tuple[int, int]] = []  # where they start, and how long they are
    for row in given:
        fits = (wanted - row).abs().amax(1) <= _SAME_SIGNS
        start, length = runs[-1] if runs else (count, 0)
        if start + length < count and fits[start + length]:
            runs[-1] = start, length + 1
        elif bool(fits.any()):
            runs.append((int(fits.int().argmax()), 1))
        else:
            return None
    is_whole = sorted(place for start, length in runs for place in range(start, start + length)) == [*range(count)]
    return _in_parts(match, dim, runs) if is_whole and len(runs) <= _MAX_RUNS and len(match.sources) == 1 else None


def _recorded_pairs(
    session: Session, matches: Mapping[str, Match], finding: Finding, own: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Yield the keys of a module that is given the right inputs and filled wrongly, each with what it may need."""
    module_of = {key: session.source_owner[match.sources[0]][0] for key, match in matches.items()}
    pairs: list[tuple[str, str]] = []
    if finding.kind == "mispaired":  # the module that is given the same
        pairs += [(mine, key) for key in matches if module_of[key] in finding.elsewhere for mine in own]
    for module in dict.fromkeys(module_of[key] for key in own):  # one that has a part of the tensors should have all
        others = [mine for mine in own if module_of[mine] != module]
        pairs += [(mine, key) for mine in others for key in matches if module_of[key] == module]
    return ((mine, other) for mine, other in pairs if other not in own)
