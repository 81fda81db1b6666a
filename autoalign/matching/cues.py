"""Cues: what speaks for an assignment against a move, weighed together; and the assignment that they leave.

Every cue is a row of ``CUES``: how much more it speaks for what is than for an exchange. Their weighted sum is the
logit of the probability that what is is right and not the move, as in a comparison of pairs (Bradley and Terry, "Rank
analysis of incomplete block designs", 1952). ``python -m benchmarks.fit`` fits the weights, in ``weights.json``, to
cases of known truth. A move that is more probable than what is is made; the most probable one that is left limits the
confidence of the pairs that it concerns.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain, pairwise
from math import copysign, exp, log1p

import numpy as np

from autoalign.matching.assignment import Assignment
from autoalign.matching.candidates import Entries
from autoalign.matching.confidence import AMBIGUOUS, INFERRED, fitted_weights
from autoalign.matching.features import Floats, Ints, SideFeatures
from autoalign.matching.grids import grid_gain
from autoalign.matching.layers import cut_apart, slots_of
from autoalign.matching.list_order import Renumbering
from autoalign.matching.moves import exchanges_of
from autoalign.matching.names import all_counts, counts, likeness, ordinal, words
from autoalign.matching.paths import Path, shared_depth
from autoalign.matching.state import MIN_TRUST_IN_ORDER, Decided, Exchange, State, exchanged
from autoalign.matching.vocabulary import LAYER_TYPES
from autoalign.plan.keys import common_prefix, numbers, stem, template

CERTAIN = 0.999  # the probability from which a move limits nothing
SURE = 0.97  # from which the confidence is the probability
_MAX_ROUNDS = 8  # of moves; each may make others better
_MAX_JUDGED = 12_000  # exchanges in all rounds; the largest real pairs have hundreds in each
_NAMES_SCALE, _MODULES_SCALE = 0.1, 0.2  # of a difference of similarities that counts half
_STEPS_SCALE = 0.5  # of steps in the tree of modules, the same
_ROLE_GAIN = 0.5  # what it tells that only one way matches a query, a key or a value to one
_MODULE_NAME_WEIGHT = 0.5  # of the own names of modules beside those of their layers, to tell exchanges apart
_EARLY, _LATE = (4,), (16,)  # ordinals up to and from which a layer comes before or after those without any
# They speak alike in the exchanges of a move.
_CUES_OF_ONE_KIND = ("numbers", "ordinals", "list order", "run", "shapes", "whole")
_LETTERS = frozenset("abcdefg")  # that count members; q, k and v are roles

_Neighbours = Mapping[int, Sequence[int]]  # of units of one side
_Numbers = tuple[int, ...]  # of the name of a member of a list
_Pairs = Iterable[tuple[int, int]]  # of a unit of the source and one of the target


@dataclass(frozen=True, slots=True)
class Cue:
    """A row of the table of cues."""

    name: str
    why: str  # in words, of what it speaks for
    of: Callable[[State, Exchange], float]  # positive if it speaks for what is, negative if for the exchange
    pooled: Callable[[Sequence[float]], float]  # over all exchanges of a move


@dataclass(frozen=True, slots=True)
class Move:
    """All exchanges of one kind, as in every block, with the value of each cue."""

    exchanges: tuple[Exchange, ...]
    cues: Mapping[str, float]

    @property
    def before(self) -> Iterator[tuple[int, int]]:
        """The pairs of units that would be given up."""
        return chain.from_iterable(one.before for one in self.exchanges)

    @property
    def after(self) -> Iterator[tuple[int, int]]:
        """Those that would be made instead, in the same order."""
        return chain.from_iterable(one.after for one in self.exchanges)

    @property
    def probability(self) -> float:
        """How probable it is that what is is right, and not the move."""
        weight = weights()
        logit = weight["bias"] + sum(weight[name] * value for name, value in self.cues.items())
        return 1 / (1 + exp(-logit))


@dataclass(frozen=True, slots=True)
class Settled:
    """An assignment in which all moves that are better are made."""

    assignment: Assignment
    caps: Floats  # the confidence that each of its pairs cannot exceed
    doubts: Mapping[int, str]  # place of a pair that is about as good another way -> why; its runner-up is that way


def settled(
    assignment: Assignment,
    source: SideFeatures,
    target: SideFeatures,
    kinds: tuple[Ints, Ints],
    shapes: tuple[Ints, Ints],
    entries: Sequence[Entries],
    fixed: Collection[int] = (),
) -> Settled:
    """Make the moves that are better, and cap the confidence of pairs by the best one that is left.

    ``kinds`` and ``shapes`` are those of a ``State``; the matches of the ``fixed`` target units do not change.
    """
    held, slots = set(fixed), (slots_of(source.paths), slots_of(target.paths))

    def moves(assignment: Assignment) -> list[Move]:
        state = State(assignment, source, target, kinds, shapes, entries, slots)
        found = [move for move in moves_of(state) if held.isdisjoint(j for _, j in chain(move.before, move.after))]
        return sorted(found, key=lambda move: move.probability)

    first = set(zip(assignment.source.tolist(), assignment.target.tolist(), strict=True))
    found = moves(assignment)
    rounds = min(_MAX_ROUNDS, 1 + _MAX_JUDGED // (1 + sum([len(move.exchanges) for move in found])))
    for _ in range(rounds):
        better = [move for move in found if move.probability < 0.5]
        before, assignment = (
            assignment,
            exchanged(assignment, chain.from_iterable(move.exchanges for move in better), target.companions),
        )
        if assignment is before:
            break
        earlier, found = found, moves(assignment)
    else:
        found += earlier  # each change made others better: what was doubtful before the last one still is
    caps = np.ones(len(assignment.target), dtype=np.float32)
    rival, doubts = assignment.runner_up.copy(), dict[int, str]()
    place_of = {unit: place for place, unit in enumerate(assignment.target.tolist())}
    for move in found:
        if move.probability >= 0.5 and move.exchanges[0].is_of_one_layer and first.issuperset(move.before):
            continue  # its rivals show in its margin
        cap = cap_of(move.probability)
        doubt = _doubt(move, slots[1], target.paths) if cap <= AMBIGUOUS else ""
        for (_, other), (own, new) in zip(move.before, move.after, strict=True):
            if (place := place_of.get(other, -1)) < 0:
                continue  # it is left empty now
            caps[place] = min(caps[place], cap)
            if doubt and place not in doubts:
                doubts[place] = doubt
                rival[place] = own if new == other and own != assignment.source[place] else rival[place]
    return Settled(replace(assignment, runner_up=rival), caps, doubts)


def moves_of(state: State) -> list[Move]:
    """Find all moves: exchanges of the same modules, in every block, are one if their cues speak for the same."""
    found = exchanges_of(state)
    if not found:
        return []
    values = {cue.name: [cue.of(state, one) for one in found] for cue in CUES}
    open_units = {other for one in found for _, other in one.before}
    decided = Decided(state, [(own, other) for other, own in state.own_of.items() if other not in open_units])
    groups: dict[object, list[int]] = {}
    for index, one in enumerate(found):
        key: object = one.modules if one.is_alone else tuple([template(p) for p in (*one.modules[:2], *one.ends[:2])])
        names = values["names"][index] + _MODULE_NAME_WEIGHT * values["modules"][index]
        others = [_sign(values[name][index]) for name in _CUES_OF_ONE_KIND]
        groups.setdefault((key, names < 0, *others, len(one.modules) > 2), []).append(index)
    result = []
    for indices in groups.values():
        exchanges = tuple([found[index] for index in indices])
        cues = {cue.name: cue.pooled([values[cue.name][index] for index in indices]) for cue in CUES}
        result.append(Move(exchanges, {**cues, GRID: grid_gain(state, exchanges), ELSEWHERE: decided(exchanges)}))
    return result


def weights() -> Mapping[str, float]:
    """Return the fitted weight of each cue, and the bias towards what is."""
    return fitted_weights("cues")


def likely() -> float:
    """Return the probability from which a match is loaded: what an order tells that may mostly be believed."""
    return 1 / (1 + exp(-weights()["bias"] - MIN_TRUST_IN_ORDER * weights()["order"]))


def cap_of(probability: float) -> float:
    """Return the most that a match is believed that is right with this probability, as far as one thing tells."""
    if probability >= SURE:
        return 1.0 if probability >= CERTAIN else probability
    return INFERRED if probability >= likely() else AMBIGUOUS


def _doubt(move: Move, slots: Sequence[Path], paths: Sequence[Path]) -> str:
    """Describe what could be exchanged, and what speaks for and against it."""
    sides: tuple[list[str], list[str]] = ([], [])
    for name, why in WHYS.items():
        value = move.cues[name] * weights()[name]
        if abs(value) > _MIN_TOLD:
            sides[value > 0].append(why)
    one = move.exchanges[0]
    _, first = one.before[0]
    second = next((other for source, other in one.before if source == one.after[0][0]), None)
    if second is None or one.takes == (-1,):
        return LEFT_OVER
    names = [".".join(filter(None, slots[unit])) for unit in (first, second)]  # the root has no name
    if not any(sides):
        ways = zip(paths[first], paths[second], strict=False) if names[0] == names[1] else ()
        apart = [(a, b) if a != b else (stem(a), stem(b)) for a, b in ways if a or b]
        return NOTHING_TELLS.format(*(map(".".join, zip(*apart, strict=True)) if apart else names))
    what = f"{names[0]} and {names[1]}" if names[0] != names[1] else f"members of the list of {names[0]}"
    told = "; ".join(f"{for_what}: {', '.join(cues)}" for for_what, cues in zip(_SIDES, sides, strict=True) if cues)
    return MAY_BE_EXCHANGED.format(what, told)


def _gains(one: Exchange) -> Iterator[tuple[int, int, int, int]]:
    """Yield, for each module, the places of it and its end as it is, and of both after the exchange."""
    if one.takes == (-1,):  # its end goes to an unused module
        yield 0, 0, 1, 0
        return
    for place, new in enumerate(one.takes):
        yield place, place, place, new


def _shapes(state: State, one: Exchange) -> float:
    own, other = state.shapes
    before, after = (sum([own[a] == other[b] for a, b in way]) for way in (one.before, one.after))
    return float(before - after) / len(one.before)


def _names(state: State, one: Exchange) -> float:
    similar = state.assignment.names
    before, after = (np.asarray(pairs).T for pairs in (one.before, one.after))
    gain = 2 * float((similar[before[0], before[1]] - similar[after[0], after[1]]).mean())
    own, other = state.source.roles, state.target.roles
    roles, after_roles = (sum(not own[a].isdisjoint(other[b]) for a, b in way) for way in (one.before, one.after))
    return gain + _ROLE_GAIN * (roles - after_roles) / len(one.before)


def _modules(state: State, one: Exchange) -> float:
    if _is_list(state, one):
        return 0  # numbers are cues of their own
    modules, ends = (_read(state.innermost(one, of_target=of_target)) for of_target in (True, False))

    def alike(module: int, end: int) -> float:
        return max([likeness(b, a) for a in modules[module] for b in ends[end]])

    gains = [alike(a, b) - alike(c, d) for a, b, c, d in _gains(one)]
    return 2 * sum(gains) / len(gains)


def _read(paths: Sequence[Path]) -> list[list[tuple[str, ...]]]:
    """List the words of what paths do not share; one alone is read by its last name, and with that before it."""
    if len(paths) > 1:
        return [[_own_words(path)] for path in _apart(paths)]
    return [[_own_words(path[-1:]), _own_words(path[-2:])] for path in paths]


def _apart(paths: Sequence[Path]) -> list[Path]:
    """Return what paths do not share."""
    depth = len(common_prefix(paths))
    return [path[depth:] for path in paths]


def _own_words(path: Path) -> tuple[str, ...]:
    """List words that tell a module apart: those for types of layers only if there are no others."""
    found = [word for name in path for word in words(name)]
    return tuple([word for word in found if word not in LAYER_TYPES] or found)


def _numbers(state: State, one: Exchange) -> float:
    for read in () if one.is_of_one_layer else (_own_numbers, all_counts):  # an unused one may stand anywhere
        modules, ends = list(map(read, one.modules)), list(map(read, one.ends))
        are_apart = min(len(set(modules)), len(set(ends))) == min(len(modules), len(ends))
        if not all(modules) or not all(ends) or not are_apart:
            continue
        first = len(all_counts(one.modules[0])) - len(modules[0])
        if ways := state.renumbered(*one.before[0])[first:]:
            modules = [_renumbered(names, ways) for names in modules]
        sets = set(modules), set(ends)
        if all(modules) and (sets[0] <= sets[1] or sets[1] <= sets[0]):
            return sum((ends[b] == modules[a]) - (ends[d] == modules[c]) for a, b, c, d in _gains(one))
    return 0


def _renumbered(names: _Numbers, ways: Renumbering) -> _Numbers:
    """Return the numbers that a module's would be on the other side; none where no rule gives them."""
    changed = [n if way is None else way.get(n, -1) for n, way in zip(names, ways, strict=False)]
    return () if -1 in changed else tuple(changed)


def _own_numbers(path: Path) -> _Numbers:
    return counts(path[-1]) if path else ()


def _ordinals(_: State, one: Exchange) -> float:
    """Compare ordinal words on one side with words, numbers or letters on the other."""
    if len(one.modules) != 2 or len(one.ends) != 2:
        return 0
    names = [[path[-1] for path in cut_apart(*paths) or paths] for paths in (one.ends, one.modules)]
    if all(map(counts, chain(*names))):
        return 0
    sides = []
    for both in names:
        places = list(map(ordinal, both))
        known = max(places)
        beside = (0,) if known >= _LATE else _LATE if known and known <= _EARLY else ()
        places = [place or beside for place in places]
        sides.append(places if _differ(places) else list(map(_counted, both)))
    own, other = sides
    if not (_differ(own) and _differ(other)):
        return 0
    return 1 if (own[0] < own[1]) == (other[0] < other[1]) else -1


def _counted(name: str) -> _Numbers:
    """Read a place off the numbers of a name, or off a letter at its end, as in ``norm_a``."""
    *_, last = words(name) or ("",)
    return counts(name) or ((ord(last),) if last in _LETTERS else ())


def _differ(places: Sequence[_Numbers]) -> bool:
    return all(places) and places[0] != places[1]


def _order(state: State, one: Exchange) -> float:
    """Compare the steps that go the same way on both sides: by registration, or where a side is sorted, by numbers."""
    if _is_list(state, one):
        return 0
    by_number = not (state.source.ordered and state.target.ordered)
    own, other = (partial(side.precedes, by_number=by_number) for side in (state.source, state.target))
    gain = 0
    for p, q in one.ordered:
        (a, x), (b, y), (c, _), (d, _) = one.before[p], one.before[q], one.after[p], one.after[q]
        ways = own(a, b), own(c, d), other(x, y)
        if None not in ways:
            gain += int(ways[0] == ways[2]) - int(ways[1] == ways[2])
    return state.trust_in_order(one, of_list=by_number) * gain / max(len(one.ordered), 1)


def _beside(state: State, one: Exchange) -> float:
    """Compare how near layers that belong together, or else that follow one another, stand on the other side."""
    gain = sum(_nearness(state, one, (state.source.companions, state.target.companions)))
    if gain or min(len(one.modules), len(one.ends)) < 2:
        return gain  # what is unused has no place in the line
    return _nearness(state, one, state.neighbours)[0] if state.have_common_order(None) else 0


def _next(state: State, one: Exchange) -> float:
    is_in_line = min(len(one.modules), len(one.ends)) > 1 and state.have_common_order(None)
    return _nearness(state, one, state.neighbours)[1] if is_in_line else 0


def _nearness(state: State, one: Exchange, besides: tuple[_Neighbours, _Neighbours]) -> tuple[float, float]:
    """Return in how many more modules layers are with what is beside them, and how much more is so on both sides."""
    steps = kept = 0
    for sign, changed, pairs in ((1, (), one.before), (-1, one.after, one.after)):
        fills = ChainMap({other: own for own, other in changed}, state.own_of)
        filled = ChainMap(dict(changed), state.other_of)
        for own, other in pairs:
            near = besides[0].get(own, ()), besides[1].get(other, ())
            ends = (
                [fills[unit] for unit in near[1] if unit in fills],
                [filled[unit] for unit in near[0] if unit in filled],
            )
            for paths, unit, of, beside in (
                (state.source.paths, own, ends[0], near[0]),
                (state.target.paths, other, ends[1], near[1]),
            ):
                steps += sign * sum([shared_depth(paths[unit], paths[end]) for end in of])
                kept += sign * sum([end in beside for end in of])
    return steps / len(one.before), kept / len(one.before)


def _list_order(state: State, one: Exchange) -> float:
    if not _is_list(state, one):
        return 0
    members = sorted(range(len(one.modules)), key=lambda place: numbers(one.modules[place][-1]))
    ranks = [tuple(chain.from_iterable(map(numbers, end))) for end in _apart(one.ends)]
    rising, after = (_steps([ranks[k] for k in way]) for way in (members, [one.takes[place] for place in members]))
    return state.trust_in_order(one, of_list=True) * (rising - after) / max(2 * (len(members) - 1), 1)


def _is_list(state: State, one: Exchange) -> bool:
    """True if modules and ends differ in their numbers only, which no side in order registers otherwise.

    Names that are nothing but numbers are those of a list, whose order they are however it is registered.
    """
    sides = (state.source, one.ends), (state.target, one.modules)
    for (side, paths), units in zip(sides, zip(*one.before, strict=True), strict=True):
        if len(paths) < 2 or not all(numbers(path[-1]) for path in paths) or len(set(map(template, paths))) > 1:
            return False
        if side.ordered and not paths[0][-1].isdecimal():
            line = sorted(units, key=side.ancestry.order.__getitem__)
            members = dict.fromkeys(path for unit in line for path in paths if side.paths[unit][: len(path)] == path)
            places = [numbers(path[-1]) for path in members]
            if places != sorted(places):
                return False
    return True


def _steps(places: Sequence[_Numbers]) -> int:
    return sum((a < b) - (a > b) for a, b in pairwise(places))


def _run(state: State, one: Exchange) -> float:
    own, other = one.before[0]
    after = {unit: own for own, unit in one.after}
    gain = 0
    for is_target, paths, path in (
        (False, one.ends, state.source.paths[own]),
        (True, one.modules, state.target.paths[other]),
    ):
        depth = len(common_prefix(paths))
        if len(paths) > 1 and depth < len(path) and all(len(each) > depth and numbers(each[depth]) for each in paths):
            key = is_target, path[:depth], stem(path[depth]), path[depth + 1 :]
            units = state.sequences.get(key, [])
            fills = [state.own_of[unit] for unit in units]
            changed = [after.get(unit, own) for unit, own in zip(units, fills, strict=True)]
            rank = state.source.places_in_order.__getitem__
            gain += _directed(tuple(map(rank, fills))) - _directed(tuple(map(rank, changed)))
    return state.trust_in_order(one, of_list=_is_list(state, one)) * _sign(gain)


@lru_cache(maxsize=64)  # many exchanges change one list
def _directed(places: tuple[int, ...]) -> int:
    """Count how many more pairs of places rise than fall, or fall than rise."""
    seen: list[int] = []
    rising = 0
    for place in places:
        rising += bisect_left(seen, place) + bisect_right(seen, place) - len(seen)
        insort(seen, place)
    return abs(rising)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values))


def _sign_of_sum(values: Sequence[float]) -> float:
    return float(_sign(sum(values)))


def _more_of_many(values: Sequence[float]) -> float:
    """Return the mean of values and a 0: of a single one half, of many nearly their mean."""
    return sum(values) / (1 + len(values))


def _log_of_sum(values: Sequence[float]) -> float:
    return copysign(log1p(abs(sum(values))), sum(values))


def _half_at(scale: float) -> Callable[[Sequence[float]], float]:
    """Return the mean of values on a scale from -1 to 1 on which this one is a half."""
    return lambda values: _mean(values) / (scale + abs(_mean(values)))


CUES = (
    Cue("names", "the names in them", _names, _half_at(_NAMES_SCALE)),
    Cue("modules", "their own names", _modules, _half_at(_MODULES_SCALE)),
    Cue("numbers", "their numbers", _numbers, _sign_of_sum),
    Cue("ordinals", "words for a place", _ordinals, _sign_of_sum),
    Cue("order", "their order", _order, _mean),
    Cue("beside", "the layers beside them", _beside, _half_at(_STEPS_SCALE)),
    Cue("next", "what follows them", _next, _half_at(_STEPS_SCALE)),
    Cue("list order", "the numbers of the list", _list_order, _more_of_many),
    Cue("run", "the direction of the list", _run, _mean),
    Cue("shapes", "the dimensions of size one", _shapes, _mean),
    Cue("whole", "what stands beside them", lambda _, one: one.anchors, _log_of_sum),
)
GRID, ELSEWHERE = "grid", "elsewhere"  # the names of the cues of a whole move
WHYS = {
    **{cue.name: cue.why for cue in CUES},
    GRID: "the lists of lists they are in",
    ELSEWHERE: "how their like are matched where shapes decide",
}
LEFT_OVER = "right shape, but a module of the same content is left over, and nothing tells which of them it is"
MAY_BE_EXCHANGED = "right shape, but {} may be exchanged ({})"
_SIDES = "for that", "for what is proposed"
NOTHING_TELLS = "right shape, but nothing tells {} from {}"
_MIN_TOLD = 0.3  # of a cue's part of the logit that is told
