"""Divergence: the first place, in the order of execution, at which two networks stop computing the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoalign.plan.operations import Copy, Shape
from autoalign.verification.compare import Pair, feature_rows, features, relative_difference
from autoalign.verification.recording import Call, Recording, Sums

_FINER = 30  # modules are held to a tolerance that many times smaller than outputs, since errors grow
_ROUNDINGS = 16  # that a module's output may be off by
_JUMP = 10  # how many times what came before a difference must be, to be no mere rounding that grew
_GRADUAL = 2**30  # added to the positions of differences that grew, which come after all others
_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    functional.relu,
    functional.gelu,
    partial(functional.gelu, approximate="tanh"),
    functional.silu,
    functional.relu6,
    functional.hardswish,
    functional.leaky_relu,
    functional.elu,
    functional.mish,
    torch.tanh,
    torch.sigmoid,
)

Kind = Literal["own", "mispaired", "before", "inside", "gradual"]


@dataclass(frozen=True, slots=True)
class Event:
    """The begin or the end of a call, on both sides."""

    time: int
    ending: bool
    call: Call
    partner: Call
    pair: Pair
    difference: float | None

    @property
    def source_time(self) -> int:
        """When it is by the source's clock."""
        return self.partner.end if self.ending else self.partner.start


@dataclass(frozen=True, slots=True)
class Compared:
    """Two recordings and what belongs together in them."""

    source: Recording
    target: Recording
    pairs: Mapping[str, Pair]  # by module of the target
    shapes: Mapping[str, Shape]  # of the source's keys
    target_shapes: Mapping[str, Shape]
    last: Collection[str]  # modules of either side, as "source:name", whose features are in the last dimension
    tolerance: float  # of modules
    most: float  # what modules may differ by where all is called equal
    events: tuple[Event, ...] = ()  # in the target's order; filled by `compare`


@dataclass(frozen=True, slots=True)
class Finding:
    """The first real difference."""

    position: int  # number of the event among all; later is better
    kind: Kind
    call: Call  # of the target's module
    source: str  # the source's module
    difference: float
    since: int  # the target's time of the last event before at which both agreed
    source_since: int
    time: int  # the target's time
    source_time: int
    elsewhere: tuple[str, ...] = ()  # the source's modules that are given what this one is given


def module_tolerance(tolerance: float, recordings: Sequence[Recording]) -> float:
    """Choose the tolerance of modules by that of outputs and by the types that occur."""
    dtypes = {t.dtype for recording in recordings for c in recording.calls for t in c.gave if t.is_floating_point()}
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    return max(tolerance / _FINER, _ROUNDINGS * eps)


def features_last(model: nn.Module) -> set[str]:
    """List the modules whose features are in the last dimension of what they give, as far as their kind tells."""
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
        given = relative_difference(call.given[0], partner.given[0]) if call.given and partner.given else None
        events.append(Event(call.start, False, call, partner, pair, given))
        if call.end >= 0 and partner.end >= 0:
            gave = _output_difference(compared, pair, call, partner, alike=given is not None and pair.whole)
            if (
                gave is None
                and given is None
                and pair.whole
                and all((call.given, partner.given, call.gave, partner.gave))
            ):
                # two layers of other sizes: no partners, if another layer of the source is given the same
                gave = inf if pair.is_mixed or _given_the_same(compared, call) else None
            events.append(Event(call.end, True, call, partner, pair, gave))
    return replace(compared, events=tuple(sorted(events, key=lambda event: event.time)))


def first_finding(compared: Compared, wrong: Collection[str]) -> Finding | None:
    """Find the first module, in the target's order of execution, that does not do what its partner does.

    Differences at the borders of modules that are drawn elsewhere (a norm with its activation) are told from real ones
    by whether the other network computes the same value at another place, or would by an activation.

    Args:
        compared: The recordings.
        wrong: Modules of the target that hold other tensors than they should: what they compute is not excused.

    Returns:
        The finding; None if there is none.
    """
    events = compared.events
    inner = _containers(compared.target)
    known = [sums for call in compared.source.calls for sums in (call.given_sums, call.gave_sums) if sums is not None]
    by_size: dict[int, list[Sums]] = {}
    for sums in known:
        by_size.setdefault(sums.numel, []).append(sums)

    def computed(sums: Sums | None) -> bool:
        return sums is not None and any(sums.like(other) for other in by_size.get(sums.numel, ()))

    noise, since, source_since = 0.0, -1, -1
    gradual: Finding | None = None
    begun: dict[int, Event] = {}  # calls whose inputs differ, and that are judged when they end
    endings = {id(event.call): event for event in events if event.ending}
    for position, event in enumerate(events):
        if event.difference is None:
            continue
        limit = max(compared.tolerance, _JUMP * noise)
        if event.difference <= limit:
            if event.difference > compared.most and gradual is None:
                gradual = _gradual(position, event)
            noise = max(noise, event.difference)
            since, source_since = event.time, event.source_time
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
            elif event.difference == inf and given and not _is_comparable(event):
                kind = "mispaired"
            else:
                kind = "inside" if id(event.call) in inner else "own"
        if kind == "before":  # the innermost call around it that has a wrong partner, if there is one
            around = [e for e in begun.values() if e.call.start < event.time and _given_the_same(compared, e.call)]
            around = [e for e in around if e.call.end < 0 or e.call.end >= event.time]
            if around:
                event, kind = max(around, key=lambda e: e.call.start), "mispaired"
        return Finding(
            position,
            kind,
            event.call,
            event.pair.source,
            float(event.difference or 0.0),
            since,
            source_since,
            event.time,
            event.source_time,
            _given_the_same(compared, event.call) if kind == "mispaired" else (),
        )
    return gradual


def worst_finding(compared: Compared) -> Finding | None:
    """Find the first module whose difference is too large although it grew little by little."""
    events = [event for event in compared.events if event.difference is not None]
    for position, event in enumerate(events):
        if (event.difference or 0.0) > compared.tolerance:
            return _gradual(position, event)
    return None


def _gradual(position: int, event: Event) -> Finding:
    times = -1, -1, event.time, event.source_time
    return Finding(_GRADUAL + position, "gradual", event.call, event.pair.source, event.difference or 0.0, *times)


def last_agreement(compared: Compared) -> tuple[int, int]:
    """Tell the times, on both sides, of the last event at which both agree."""
    agreed = [e for e in compared.events if e.difference is not None and e.difference <= compared.tolerance]
    return (agreed[-1].time, agreed[-1].source_time) if agreed else (-1, -1)


def event_count(compared: Compared) -> int:
    """Count the events at which both sides can be compared."""
    return sum(event.difference is not None for event in compared.events)


def _holds_activation(event: Event, limit: float) -> bool:
    """True if one of two layers gives what the other gives, after an activation: it contains the one that follows."""
    got, want = event.call.gave, event.partner.gave
    if not (got and want and got[0].is_floating_point() and want[0].is_floating_point()):
        return False
    apart = (
        relative_difference(activation(first.float()), second.float())
        for first, second in ((want[0], got[0]), (got[0], want[0]))
        for activation in _ACTIVATIONS
    )
    return any(difference is not None and difference <= limit for difference in apart)


def _is_comparable(event: Event) -> bool:
    return event.call.given[0].numel() == event.partner.given[0].numel()


def _output_difference(compared: Compared, pair: Pair, call: Call, partner: Call, *, alike: bool) -> float | None:
    """Compare what two modules give; ``alike`` tells that what they are given has one size."""
    if not call.gave or not partner.gave:
        return None
    match = pair.match
    if not pair.whole or (len(match.sources) == 1 and isinstance(match.operation, Copy)):
        apart = relative_difference(call.gave[0], partner.gave[0])
        return inf if apart is None and alike else apart
    output = call.gave[0]
    last = f"target:{call.module}" in compared.last
    shapes = [compared.shapes[key] for key in match.sources]
    for count in {output.shape[-1 if last else min(1, output.dim() - 1)]: None, output.shape[-1]: None}:
        followed = features(match.operation, shapes, compared.target_shapes[match.target], count)
        if followed is None:
            continue
        places, counted = followed
        rows = feature_rows(call, count, last)
        others = [
            feature_rows(source, shape[counted], f"source:{source.module}" in compared.last)
            for source, shape in zip(_source_calls(compared, pair, call.index), shapes, strict=True)
            if source is not None
        ]
        if rows is None or len(others) != len(shapes) or any(other is None for other in others):
            return None
        joined = torch.cat([other for other in others if other is not None])
        return relative_difference(rows, joined[places.to(joined.device)])
    return relative_difference(output, partner.gave[0]) if len(match.sources) == 1 else None


def _source_calls(compared: Compared, pair: Pair, index: int) -> list[Call | None]:
    by_name = {call.module: call for call in compared.source.calls if call.index == index}
    return [by_name.get(name) for name in pair.sources]


def _containers(recording: Recording) -> set[int]:
    """List the calls in which others whose tensors were kept took place."""
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
