"""Comparison: which modules and outputs of two networks belong together, and where they first differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf, prod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoalign.matching.names import kind
from autoalign.plan.matches import Match
from autoalign.plan.operations import Copy, Reshape, Shape
from autoalign.verification.differences import Sums, relative_difference
from autoalign.verification.run import Call, Recording

_MAX_TRACED_ELEMENTS = 2**26  # of a tensor whose rows are followed through an operation
_MODULE_STRICTNESS = 30  # the tolerance of modules is that many times smaller than of outputs, since errors grow
_ROUNDINGS = 16  # that a module's output may be off by
_JUMP = 10  # how many times what came before a difference must be, to be no mere rounding that grew
_NAMES = ("relu", "relu6", "gelu", "silu", "elu", "leaky_relu", "tanh", "sigmoid", "hardswish", "mish")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {name: getattr(functional, name) for name in _NAMES}
ACTIVATIONS["gelu (tanh)"] = partial(functional.gelu, approximate="tanh")

Kind = Literal["own", "mispaired", "before", "inside", "grown"]


@dataclass(frozen=True, slots=True)
class Pair:
    """A module of the target and the one of the source that does the same."""

    target: str
    source: str
    match: Match  # the tensor by which they were paired
    sources: tuple[str, ...]  # the modules that hold its sources
    whole: bool  # whether the tensors are those of one layer, so that outputs are a function of inputs and them
    mixed: tuple[str, ...] = ()  # the target's keys in this module that come from other modules than ``source``

    @property
    def is_mixed(self) -> bool:
        """True if the tensors of one layer come from several."""
        return self.whole and bool(self.mixed)


def owners(model: nn.Module, keys: Collection[str], called: Collection[str]) -> dict[str, tuple[str, bool]]:
    """Find, for each key, the module that uses it: its own, or the innermost around it that is called.

    Returns:
        The name of the module as ``named_modules`` gives it, and whether the tensor is the module's own.
    """
    first_name: dict[int, str] = {}
    name_of = {name: first_name.setdefault(id(m), name) for name, m in model.named_modules(remove_duplicate=False)}
    found = {}
    for key in keys:
        parts = key.split(".")[:-1]
        depth = len(parts)
        while depth and name_of.get(".".join(parts[:depth])) not in called:
            depth -= 1
        found[key] = name_of.get(".".join(parts[:depth]), ""), depth == len(parts)
    return found


def paired_modules(
    matches: Sequence[Match],
    source_owner: Mapping[str, tuple[str, bool]],
    target_owner: Mapping[str, tuple[str, bool]],
    sizes: Mapping[str, int],
) -> dict[str, Pair]:
    """Pair the modules of the target with those of the source: by most of their tensors, and the largest in doubt."""
    groups: dict[str, list[Match]] = {}
    for match in matches:
        if match.target in target_owner and all(key in source_owner for key in match.sources):
            groups.setdefault(target_owner[match.target][0], []).append(match)
    result = {}
    for module, members in groups.items():
        kinds = [_is_of_layers(match, source_owner, target_owner) for match in members]
        layer = [match for match, is_layers in zip(members, kinds, strict=True) if is_layers]
        chosen = layer or [match for match, is_layers in zip(members, kinds, strict=True) if is_layers is False]
        if not chosen:
            continue
        votes = Counter(owner for match in chosen for owner in {source_owner[key][0] for key in match.sources})
        best = max(
            chosen, key=lambda m: (max(votes[source_owner[key][0]] for key in m.sources), sizes.get(m.target, 0))
        )
        source = max((source_owner[key][0] for key in best.sources), key=lambda owner: votes[owner])
        if not layer and 2 * votes[source] <= len(chosen):
            continue  # parameters that stand alone in different modules are no evidence for any of them
        known = {source_owner[key][0] for key in best.sources}
        mixed = tuple(m.target for m in chosen if not known & {source_owner[key][0] for key in m.sources})
        sources = tuple(source_owner[key][0] for key in best.sources)
        result[module] = Pair(module, source, best, sources, bool(layer), mixed)
    return result


def _is_of_layers(
    match: Match, source_owner: Mapping[str, tuple[str, bool]], target_owner: Mapping[str, tuple[str, bool]]
) -> bool | None:
    """Return True if a match fills a weight or the like of a layer from such of layers; None where that is unknown.

    False is for a parameter that stands alone and is filled from one such.
    """
    if not target_owner[match.target][1] or not all(source_owner[key][1] for key in match.sources):
        return None
    kinds = (kind(key.rpartition(".")[2]) for key in (match.target, *match.sources))
    found = {values != "other" and not rest for values, rest in kinds}
    return None if len(found) > 1 or (found == {False} and len(match.sources) > 1) else found.pop()


def _followed_features(
    match: Match, shapes: Mapping[str, Shape], target: Shape, count: int
) -> tuple[Tensor, int] | None:
    """Follow the ``count`` output features of a layer through the operation that made its weight from others.

    >>> from autoalign.plan.operations import Split
    >>> _followed_features(Match("a", ("b",), Split(0, 2, 2)), {"b": (6, 3)}, (2, 3), 2)
    (tensor([2, 3]), 0)

    Returns:
        For each feature, its place among those of all source layers together, each of them once; and which dimension of
        the source's weights counts them. None where every feature is its namesake, or nothing is known.
    """
    operation, keys = match.operation, list(dict.fromkeys(match.sources))
    source = [shapes[key] for key in keys]
    if isinstance(operation, Copy | Reshape) or operation.adapts or sum(map(prod, source)) > _MAX_TRACED_ELEMENTS:
        return None
    offsets = [sum(map(prod, source[:place])) for place in range(len(source))]
    numbered = {
        key: torch.arange(1, prod(shape) + 1).reshape(shape) + start
        for key, shape, start in zip(keys, source, offsets, strict=True)
    }
    (elements,) = operation.apply([numbered[key] for key in match.sources])
    dims = [dim for dim, size in enumerate(target) if size == count]
    for dim in dims:
        rows = elements.movedim(dim, 0).reshape(count, -1) - 1
        for counted in range(min(map(len, source))):
            found = _followed(rows, source, offsets, counted)
            if found is not None:
                return found, counted
    return None


def _followed(rows: Tensor, source: Sequence[Shape], offsets: Sequence[int], counted: int) -> Tensor | None:
    """Find the one feature of the source that each row consists of; None where a row has several or made-up values."""
    if bool((rows < 0).any()):
        return None
    place, before = torch.full_like(rows, -1), 0
    for shape, start in zip(source, offsets, strict=True):
        inside = (rows >= start) & (rows < start + prod(shape))
        step = prod(shape[counted + 1 :])
        place = torch.where(inside, (rows - start) // step % shape[counted] + before, place)
        before += shape[counted]
    return place[:, 0] if bool((place == place[:, :1]).all()) else None


def feature_rows(outputs: Sequence[Tensor], count: int, last: bool) -> Tensor | None:
    """Rearrange the first output of a layer as [features, all else]; ``last`` if these are in the last dimension."""
    if outputs:
        output = outputs[0]
        for dim in [output.dim() - 1, 1] if last else [1, output.dim() - 1]:
            if 0 <= dim < output.dim() and output.shape[dim] == count:
                return output.movedim(dim, 0).reshape(count, -1)
    return None


def _joined(parts: Sequence[Tensor | None], count: int, places: Tensor) -> Tensor | None:
    """Join the features of all parts and take those at the given places; None if a part is missing."""
    known = [part for part in parts if part is not None]
    return torch.cat(known)[places.to(known[0].device)] if len(known) == count else None


@dataclass(frozen=True, slots=True)
class Event:
    """The begin or the end of a call, on both sides."""

    ending: bool
    call: Call  # of the target
    partner: Call  # of the source
    pair: Pair
    difference: float | None

    @property
    def times(self) -> tuple[int, int]:
        """When it is by the clocks of the source and of the target."""
        return (self.partner.end, self.call.end) if self.ending else (self.partner.start, self.call.start)


@dataclass(frozen=True, slots=True)
class Compared:
    """Two recordings and what belongs together in them."""

    source: Recording
    target: Recording
    pairs: Mapping[str, Pair]  # by module of the target
    owners: Mapping[str, tuple[str, bool]]  # of the target's keys, as the function `owners` returns them
    shapes: Mapping[str, Shape]  # of the source's keys
    target_shapes: Mapping[str, Shape]
    last: Collection[str]  # modules of either side, as "source:name", whose features are in the last dimension
    tolerance: float  # of modules
    loose_tolerance: float  # of modules where the outputs are equal
    events: tuple[Event, ...] = ()  # in the target's order; filled by `compare`


@dataclass(frozen=True, slots=True)
class Finding:
    """The first real difference."""

    position: int  # number of the event among all; later is better
    kind: Kind
    call: Call  # of the target's module
    source: str  # the source's module
    difference: float
    since: tuple[int, int]  # of the last event before at which both agreed, by the clocks of source and target
    until: tuple[int, int]  # of this event
    elsewhere: tuple[str, ...] = ()  # the source's modules that are given what this one is given


def module_tolerance(tolerance: float, recordings: Sequence[Recording]) -> float:
    """Choose the tolerance of modules by that of outputs and by the types that occur."""
    dtypes = {t.dtype for recording in recordings for c in recording.calls for t in c.gave if t.is_floating_point()}
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    return max(tolerance / _MODULE_STRICTNESS, _ROUNDINGS * eps)


def features_last(model: nn.Module) -> set[str]:
    """List the modules whose outputs have their features in the last dimension, judged by their classes."""
    return {
        name
        for name, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._NormBase | nn.GroupNorm)
    }


def compare(compared: Compared) -> Compared:
    """Compare what paired modules are given and give, call by call."""
    partners = {(call.module, call.index): call for call in compared.source.calls}
    events = []
    for call in compared.target.calls:
        pair = compared.pairs.get(call.module)
        partner = partners.get((pair.source, call.index)) if pair else None
        if pair is None or partner is None:
            continue
        given = None
        if call.given and partner.given:
            given = relative_difference(call.given[0], partner.given[0], _first(partner.given_sizes))
        events.append(Event(False, call, partner, pair, given))
        if call.end >= 0 and partner.end >= 0:
            gave = _output_difference(compared, pair, call, partner, alike=given is not None and pair.whole)
            has_all = all((call.given, partner.given, call.gave, partner.gave))
            if gave is None and given is None and pair.whole and has_all:
                # two layers of other sizes: no partners, if another layer of the source is given the same
                gave = inf if pair.is_mixed or _given_the_same(compared, call) else None
            events.append(Event(True, call, partner, pair, gave))
    return replace(compared, events=tuple(sorted(events, key=lambda event: event.times[1])))


def _first(tensors: Sequence[Tensor]) -> Tensor | None:
    return tensors[0] if tensors else None


def first_finding(compared: Compared, wrong: Collection[str]) -> Finding | None:
    """Find the first module, in the target's order of execution, that does not do what its partner does.

    Where modules have other borders (a norm with its activation), a difference is none if the other network computes
    the same value at another place, or would by an activation. That does not excuse the ``wrong`` modules, which hold
    other tensors than they should.
    """
    events = compared.events
    inner = _containers(compared.target)
    by_size: dict[int, list[Sums]] = {}
    for call in compared.source.calls:
        for sums in (call.given_sums, call.gave_sums):
            if sums is not None:
                by_size.setdefault(sums.numel, []).append(sums)

    def computed(sums: Sums | None) -> bool:
        if sums is None or not any(sums.absolute):  # zeros are no evidence
            return False
        return any(sums.like(other) for other in by_size.get(sums.numel, ()))

    noise, since = 0.0, (-1, -1)
    begun: dict[int, Event] = {}  # calls whose inputs differ, and that are judged when they end
    endings = {id(event.call): event for event in events if event.ending}
    for position, event in enumerate(events):
        if event.difference is None:
            continue
        limit = max(compared.tolerance, _JUMP * noise)
        if event.difference <= limit:
            if event.difference > compared.loose_tolerance:
                return _grown(position, event)
            noise = max(noise, event.difference)
            since = event.times
            continue
        kind: Kind
        if not event.ending:
            end = endings.get(id(event.call))
            if end is not None and end.difference is not None and end.difference <= limit:
                continue
            if id(event.call) in inner or not event.pair.whole:
                begun[id(event.call)] = event
                continue
            kind = "mispaired" if _given_the_same(compared, event.call) else "before"
        else:
            excusable = event.call.module not in wrong and not event.pair.is_mixed
            if excusable and (computed(event.call.gave_sums) or _holds_activation(event, limit)):
                continue
            given = _given_the_same(compared, event.call)
            if id(event.call) in begun:
                kind = "mispaired" if given else "before"
            elif event.difference == inf and given and event.call.given[0].numel() != event.partner.given[0].numel():
                kind = "mispaired"
            else:
                kind = "inside" if id(event.call) in inner else "own"
        if kind == "before":  # the innermost call around it that has a wrong partner, if there is one
            time = event.times[1]
            around = [e for e in begun.values() if e.call.start < time and _given_the_same(compared, e.call)]
            around = [e for e in around if e.call.end < 0 or e.call.end >= time]
            if around:
                event, kind = max(around, key=lambda e: e.call.start), "mispaired"
        return Finding(
            position,
            kind,
            event.call,
            event.pair.source,
            float(event.difference or 0.0),
            since,
            event.times,
            _given_the_same(compared, event.call) if kind == "mispaired" else (),
        )
    return None


def grown_finding(compared: Compared, difference: float) -> Finding | None:
    """Find the first module that differs about as much as the outputs do, where no module does so at once."""
    events = enumerate(compared.events)
    return next((_grown(place, e) for place, e in events if _JUMP * (e.difference or 0.0) >= difference), None)


def _grown(position: int, event: Event) -> Finding:
    return Finding(position, "grown", event.call, event.pair.source, event.difference or 0.0, (-1, -1), event.times)


def last_agreement(compared: Compared) -> tuple[int, int]:
    """Return the times, by both clocks, of the last event at which both agree."""
    agreed = [e for e in compared.events if e.difference is not None and e.difference <= compared.tolerance]
    return agreed[-1].times if agreed else (-1, -1)


def _holds_activation(event: Event, limit: float) -> bool:
    """Return True if one of two layers gives what the other gives after an activation, which it contains."""
    got, want = event.call.gave, event.partner.gave
    if not (got and want and got[0].is_floating_point() and want[0].is_floating_point()):
        return False
    apart = (
        relative_difference(activation(first.float()), second.float())
        for first, second in ((want[0], got[0]), (got[0], want[0]))
        for activation in ACTIVATIONS.values()
    )
    return any(difference is not None and difference <= limit for difference in apart)


def _output_difference(compared: Compared, pair: Pair, call: Call, partner: Call, *, alike: bool) -> float | None:
    """Compare what two modules give; ``alike`` if what they are given has one size."""
    if not call.gave or not partner.gave:
        return None
    match = pair.match
    if not pair.whole or (len(match.sources) == 1 and isinstance(match.operation, Copy)):
        apart = relative_difference(call.gave[0], partner.gave[0], _first(partner.gave_sizes))
        return inf if apart is None and alike else apart
    output = call.gave[0]
    last = f"target:{call.module}" in compared.last
    modules = dict(zip(match.sources, pair.sources, strict=True))
    for count in {output.shape[-1 if last else min(1, output.dim() - 1)]: None, output.shape[-1]: None}:
        followed = _followed_features(match, compared.shapes, compared.target_shapes[match.target], count)
        if followed is None:
            continue
        places, counted = followed
        calls = {source.module: source for source in compared.source.calls if source.index == call.index}
        gave: list[Tensor | None] = []
        sizes: list[Tensor | None] = []
        for key, name in modules.items():
            if name in calls:
                is_last, size = f"source:{name}" in compared.last, compared.shapes[key][counted]
                gave.append(feature_rows(calls[name].gave, size, is_last))
                sizes.append(feature_rows(calls[name].gave_sizes, size, is_last))
        rows, wanted = feature_rows(call.gave, count, last), _joined(gave, len(modules), places)
        if rows is None or wanted is None:
            return None
        return relative_difference(rows, wanted, _joined(sizes, len(modules), places))
    if len(modules) > 1:
        return None
    return relative_difference(output, partner.gave[0], _first(partner.gave_sizes))


def _containers(recording: Recording) -> set[int]:
    """Collect the ids of the calls during which others took place whose tensors were kept."""
    found: set[int] = set()
    open_calls: list[Call] = []
    for call in recording.calls:
        while open_calls and 0 <= open_calls[-1].end < call.start:
            open_calls.pop()
        if call.given or call.gave:
            found.update(map(id, open_calls))
        open_calls.append(call)
    return found


def _given_the_same(compared: Compared, call: Call) -> tuple[str, ...]:
    """List the source's modules with tensors that are given what a module of the target is given.

    Not every place at which the source computes the same: a ReLU changes nothing where all is positive.
    """
    sums = call.given_sums
    if sums is None:
        return ()
    names = (
        other.module
        for other in compared.source.calls
        if other.given and other.given_sums is not None and other.given_sums.like(sums)
    )
    return tuple(dict.fromkeys(names))
