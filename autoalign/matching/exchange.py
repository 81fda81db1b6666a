"""Exchanges: what would be as good if two alike modules took each other's place, and what tells that they must not.

A score measures a pair against its rivals one at a time. Where two modules have the same shapes below them, all of
their layers could be exchanged at once, and where they stand in every block, in every block at once: then structure and
pooled evidence would say the same as before. What is left to tell them apart is what does not depend on the matching:
names, numbers, order, and other places where one of them stands without the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from operator import add, sub

import numpy as np

from autoalign.matching.assignment import Assignment
from autoalign.matching.branch_order import Blocks, Repair, blocks_of, crossings, ordinals_agree, shared
from autoalign.matching.features import Floats, Ints, SideEvidence
from autoalign.matching.layers import Path
from autoalign.matching.list_order import disordered, misnumbered, out_of_step, sign, unparallel
from autoalign.matching.names import likeness, words
from autoalign.matching.unused_modules import Instance, Pairs, instances_of, places_below, rivalled
from autoalign.matching.vocabulary import ROLES
from autoalign.plan.keys import numbers, stem

UNTOLD = 0.45  # the confidence where nothing tells two modules apart, or something speaks for their exchange
BY_ORDER = 0.85  # the confidence where their order alone does
_NOTHING_TELLS = "right shape, but nothing tells {} from {}"
_OUT_OF_STEP = "right shape, but its list would be matched in no order, or across its members"
_LEFT_OVER = "right shape, but a module of the same content is left over, and nothing tells which of them it is"
_CLEAR = 0.05  # how much better names must fit one way than the other to tell anything
_ROLE = 0.5  # what it tells that only one way matches a query, a key or a value to one
_OWN = 0.5  # weight of the own names of two modules beside those of the layers in them
_ROUNDS = 3
_REPAIRS = 6  # rounds in which blocks that were crossed are straightened
_FEW = 3  # siblings that differ in a number and are no list of blocks

_Key = tuple[Path, ...]  # of two modules and of what they are matched to, without numbers


@dataclass(frozen=True, slots=True)
class Exchange:
    """All exchanges of one kind: the same two modules in every block that has them."""

    pairs: Pairs
    anchors: int  # layers that only one of the two has: how many more are matched to the same place as these than not
    is_list: bool  # whether the two are members of one numbered list, on both sides
    names: float  # how much better the names fit as they are, in about [-2, 2]
    numbers: int  # whether the numbers of the two agree as they are: 1, when exchanged: -1, or neither: 0
    order: int  # whether their order is the same on both sides: 1, the other way round: -1, or says nothing: 0
    elsewhere: int  # pairs of layers of the same names that cannot be exchanged and are matched likewise
    ordinals: int = 0  # whether ordinals in their names agree: 1, speak for the exchange: -1, or say nothing: 0
    mirrored: int = 0  # how many more of the same modules are matched the other way round than this way
    is_led: bool = False  # whether the other members of the list tell that it runs the other way round
    is_shifted: bool = False  # whether they tell by how much its numbers differ from the source's

    @property
    def is_better(self) -> bool:
        """Whether what tells the two apart says that they should exchange places."""
        if self.is_shifted:
            return self.order < 0
        if self.is_led:
            return self.order < 0 and self.names < _CLEAR
        if self.numbers > 0:
            return False
        if self.anchors < 0:
            return self.names < _CLEAR
        told = self.names < -_CLEAR
        if self.names < _CLEAR:
            told |= self.mirrored > 0 and self.order <= 0 and not self.is_list
            told |= self.order == 0 and min(self.numbers, self.ordinals) < 0
            told |= self.is_list and self.numbers == 0 and self.order < 0
        return told and self.elsewhere <= 0 and self.anchors == 0

    @property
    def sureness(self) -> float:
        """How far the matches as they are may be believed, in [0, 1]."""
        if self.is_shifted and self.order > 0:
            return 1.0
        if self.names < -_CLEAR and min(self.numbers, self.anchors) >= 0 < max(self.numbers, self.anchors):
            return BY_ORDER  # names speak for the exchange, and what they stand in against it
        if self.numbers < 0 or self.anchors < 0 or self.names < -_CLEAR:
            return UNTOLD
        if self.names >= _CLEAR or self.elsewhere > 0 or self.anchors > 0 or self.numbers > 0:
            return 1.0
        if self.order + self.ordinals > 0:
            return 1.0 if self.order > 0 and (self.is_list or self.ordinals > 0) else BY_ORDER
        return UNTOLD


@dataclass(frozen=True, slots=True)
class Settled:
    """An assignment whose exchanges are carried out."""

    assignment: Assignment
    sureness: Floats  # the confidence that each of its pairs cannot exceed
    doubts: Mapping[int, str]  # place of a pair that is as good the other way -> why; its runner-up is that way


def settled(
    assignment: Assignment,
    source: SideEvidence,
    target: SideEvidence,
    kinds: tuple[Ints, Ints],
    held: Collection[int] = (),
) -> Settled:
    """Carry out the exchanges that are better, and tell how far what is left may be believed.

    Args:
        assignment: The chosen pairs of units.
        source: Evidence of the source.
        target: Evidence of the target.
        kinds: [units] of each side: equal where all tensors of a unit have the same kinds and shapes.
        held: Units of the target that keep what they have.
    """
    fixed = {place for place, unit in enumerate(assignment.target.tolist()) if unit in held}
    unit_at = {path: unit for unit, path in enumerate(source.paths)}
    alike = _alike(assignment, kinds)  # no exchange changes it

    def repaired(
        assignment: Assignment, blocks: Blocks, repairs: Callable[[Blocks], Iterable[Repair]], least: float
    ) -> tuple[Assignment, Blocks]:
        before = assignment
        for repair in filter(None, repairs(blocks)):
            wanted = {place: unit_at.get(path, -1) for place, path in repair.items()}
            assignment = _with_wanted(assignment, wanted, kinds[0], fixed, least)
        if assignment is not before:
            blocks = blocks_of(assignment, source.paths, target.paths, alike)
        return assignment, blocks

    blocks = blocks_of(assignment, source.paths, target.paths, alike)
    for _ in range(_REPAIRS):
        before, (assignment, blocks) = assignment, repaired(assignment, blocks, crossings, -np.inf)
        if assignment is before:
            break
    for repairs in (
        partial(misnumbered, source=source.paths),
        disordered,
        partial(unparallel, paths=(source.paths, target.paths)),
    ):
        assignment, blocks = repaired(assignment, blocks, repairs, -_CLEAR / 2)
    slots = _slots(source.paths), _slots(target.paths)
    for _ in range(_ROUNDS):
        found = exchanges(assignment, source, target, alike, slots)
        better = [exchange for exchange in found if exchange.is_better and fixed.isdisjoint(_places(exchange.pairs))]
        if not better:
            break
        assignment = exchanged(assignment, better)
    else:
        found = exchanges(assignment, source, target, alike, slots)
    sureness = np.ones(len(assignment.source), dtype=np.float32)
    rival, doubts = assignment.runner_up.copy(), dict[int, str]()
    for exchange in found:
        pairs = [pair for pair in exchange.pairs if fixed.isdisjoint(pair)]  # what is held has no rival
        places = list(_places(pairs))
        sureness[places] = np.minimum(sureness[places], exchange.sureness)
        if exchange.sureness > UNTOLD:
            continue
        for p, q in pairs:
            if doubts.keys().isdisjoint((p, q)):
                names = [slots[1][unit] for unit in assignment.target[[p, q]].tolist()]
                doubts[p] = doubts[q] = _NOTHING_TELLS.format(*names)
                rival[[p, q]] = assignment.source[[q, p]]
    sides = (source.paths, kinds[0]), (target.paths, kinds[1])
    crossed = out_of_step(
        blocks_of(assignment, source.paths, target.paths, alike),
        dict(zip(source.paths, kinds[0].tolist(), strict=True)),
        target.paths,
        ordered=target.ordered,
    )
    crossed -= fixed
    sureness[list(crossed)] = np.minimum(sureness[list(crossed)], UNTOLD)
    doubts |= dict.fromkeys(crossed - doubts.keys(), _OUT_OF_STEP)
    left_over = rivalled(assignment, *sides, fixed)
    sureness[left_over] = UNTOLD
    doubts |= dict.fromkeys(left_over, _LEFT_OVER)
    return Settled(replace(assignment, runner_up=rival), sureness, doubts)


def _slots(paths: Sequence[Path]) -> list[str]:
    """Write the names of layers without the numbers of the lists that they are in; those of a few siblings stay.

    >>> _slots([("h", str(n), f"norm{k}") for n in range(2) for k in (1, 2)])
    ['h.#.norm1', 'h.#.norm2', 'h.#.norm1', 'h.#.norm2']
    """
    members: dict[tuple[Path, str], set[str]] = {}
    for path in paths:
        for depth, name in enumerate(path):
            if not name.isdecimal() and numbers(name):
                members.setdefault((path[:depth], stem(name)), set()).add(name)
    many = {(around, name) for (around, _), names in members.items() if len(names) > _FEW for name in names}
    return [
        ".".join(
            [
                stem(name) if name.isdecimal() or (many and (path[:depth], name) in many) else name
                for depth, name in enumerate(path)
                if name  # the root has none
            ]
        )
        for path in paths
    ]


def _with_wanted(
    assignment: Assignment, wanted: Mapping[int, int], kinds: Ints, fixed: set[int], least: float
) -> Assignment:
    """Give places other sources of the same kinds, which no other places have, unless names speak against it.

    Args:
        assignment: The chosen pairs of units.
        wanted: Place -> the source unit that it should have; -1 for one that there is not.
        kinds: [source units]: equal where all tensors of a unit have the same kinds and shapes.
        fixed: Places that keep what they have.
        least: How much better the names must fit on average; negative where they may fit less well.
    """
    places, units = list(wanted), list(wanted.values())
    chosen = assignment.source.copy()
    chosen[places] = units
    others = set(np.delete(assignment.source, places).tolist())
    if len({-1, *units}) <= len(units) or not others.isdisjoint(units):
        return assignment  # there is no such unit, or more than one place should have it
    if (kinds[chosen] != kinds[assignment.source]).any():
        return assignment
    moved = np.flatnonzero(chosen != assignment.source)
    names = assignment.names[chosen, assignment.target] - assignment.names[assignment.source, assignment.target]
    if not len(moved) or names[moved].mean() < least or not fixed.isdisjoint(moved.tolist()):
        return assignment
    return _with_sources(assignment, chosen)


def exchanges(
    assignment: Assignment,
    source: SideEvidence,
    target: SideEvidence,
    alike: Sequence[int],
    slots: tuple[Sequence[str], Sequence[str]],
) -> list[Exchange]:
    """Find what could be exchanged, by the numbers of ``_alike`` and the ``_slots`` of both sides."""
    chosen = assignment.source.tolist(), assignment.target.tolist()
    own, other = [source.paths[i] for i in chosen[0]], [target.paths[j] for j in chosen[1]]
    below = places_below(other)
    listed = list(instances_of(own, other, alike, below))
    if not listed:
        return []
    gains, orders = _gains(assignment, source, target, listed)
    names = [slots[0][i] for i in chosen[0]], [slots[1][j] for j in chosen[1]]
    together = Counter(zip(*names, strict=True))

    def mirrored(pairs: Pairs) -> int:
        """Count how many more of the same layers are matched the other way round than this way."""
        ways = (
            {(names[0][p], names[1][q]) for pair in pairs for p, q in (pair, pair[::-1])},
            {(names[0][place], names[1][place]) for pair in pairs for place in pair},
        )
        return min(together[both] for both in ways[0]) - min(together[both] for both in ways[1])

    found: dict[tuple[_Key, bool, bool], list[int]] = {}
    for index, one in enumerate(listed):
        gains[index] += _OWN * _own_gain(one)
        key = tuple([tuple(map(stem, path)) for path in (*one.modules, *one.ends)])
        found.setdefault((key, gains[index] < 0, mirrored(one.pairs) > 0), []).append(index)
    runs: dict[tuple[tuple[Path, Path], tuple[str, str]], _Run] = {}

    def run_of(one: Instance) -> _Run:
        lists, stems = (one.ends[0][:-1], one.modules[0][:-1]), (stem(one.ends[0][-1]), stem(one.modules[0][-1]))
        if (lists, stems) not in runs:
            runs[lists, stems] = _run_of(own, other, below.get(lists[1], range(len(other))), lists, stems)
        return runs[lists, stems]

    result = []
    for (key, *_), indices in found.items():
        instances = [listed[index] for index in indices]
        pairs = tuple([pair for one in instances for pair in one.pairs])
        is_list = key[0] == key[1] and key[2] == key[3]
        lists = [run_of(one) for one in instances] if is_list else []
        shifted = is_list and all(map(_is_shifted, lists, instances))
        leads = [0] * len(instances) if shifted or not is_list else list(map(_direction, lists, instances))
        order = sum(orders[index] * (lead or 1) for index, lead in zip(indices, leads, strict=True))
        inside = Counter([(names[0][place], names[1][place]) for pair in pairs for place in pair])
        in_row = sum(orders[index] for index in indices)
        result.append(
            Exchange(
                pairs,
                sum(one.anchors for one in instances),
                is_list,
                float(np.mean([gains[index] for index in indices])),
                sign(sum(_numbers_agree(one.ends, one.modules) for one in instances)),
                sign(order) if is_list or (source.ordered and target.ordered) else 0,
                min(together[both] - count for both, count in inside.items()),
                sign(sum(ordinals_agree(one.ends, one.modules) for one in instances)),
                mirrored(pairs) + (in_row < 0),
                is_list and all(lead < 0 for lead in leads),
                shifted,
            )
        )
    return result


def _alike(assignment: Assignment, kinds: tuple[Ints, Ints]) -> list[int]:
    """Number the pairs so that those whose layers have the same shapes on both sides have the same number."""
    own, other = kinds
    alike: Ints = own[assignment.source] * (int(other.max(initial=0)) + 1) + other[assignment.target]
    return list(alike.tolist())


def _gains(
    assignment: Assignment, source: SideEvidence, target: SideEvidence, instances: Sequence[Instance]
) -> tuple[list[float], list[int]]:
    """Tell for each instance how much better the names of its layers fit as they are, and how many more are in order.

    A role that only one of two layers has tells most.
    """
    pairs = [pair for one in instances for pair in one.pairs]
    (i, k), (j, m) = (chosen[np.asarray(pairs).T] for chosen in (assignment.source, assignment.target))
    roles = [
        [ROLES.intersection(words(side.paths[unit][-1])) for unit in chosen.tolist()]
        for side, chosen in ((source, assignment.source), (target, assignment.target))
    ]
    told = np.zeros(len(pairs))
    for index, (p, q) in enumerate(pairs):
        if roles[0][p] or roles[0][q]:
            as_is = roles[0][p] & roles[1][p] or roles[0][q] & roles[1][q]
            exchanged = roles[0][p] & roles[1][q] or roles[0][q] & roles[1][p]
            told[index] = _ROLE * (bool(as_is) - bool(exchanged))
    names, own, other = assignment.names, source.ancestry.order, target.ancestry.order
    gain = told + (names[i, j] + names[k, m] - names[i, m] - names[k, j])
    order = np.where((own[i] < own[k]) == (other[j] < other[m]), 1, -1)
    sizes = np.asarray([len(one.pairs) for one in instances])
    starts = np.cumsum(sizes) - sizes
    return (np.add.reduceat(gain, starts) / sizes).tolist(), np.add.reduceat(order, starts).tolist()


def _own_gain(one: Instance) -> float:
    """Tell how much better the own names of two modules fit as they are, whatever the layers in them are called."""
    (a, b), (x, y) = (
        [tuple([word for name in path[shared(*pair) :] for word in words(name)]) for path in pair]
        for pair in (one.modules, one.ends)
    )
    return likeness(x, a) + likeness(y, b) - likeness(x, b) - likeness(y, a)


@dataclass(frozen=True, slots=True)
class _Run:
    """The members of a list of the target, in order of their numbers, and those of the source's that they have."""

    members: Sequence[tuple[int, ...]]  # their numbers
    partners: Sequence[tuple[int, ...]]  # those of what they are matched to
    place_of: Mapping[tuple[int, ...], int]
    steps: Counter[int]  # of ``step``, from each member to the next
    shifts: Counter[tuple[int, ...]]  # of ``shift``

    @classmethod
    def of(cls, partners: Mapping[tuple[int, ...], tuple[int, ...]]) -> _Run:
        members = sorted(partners)
        own = [partners[member] for member in members]
        steps = Counter((a < b) - (a > b) for a, b in pairwise(own))
        place_of = {member: place for place, member in enumerate(members)}
        return cls(members, own, place_of, steps, Counter(map(_shift, members, own)))

    def places(self, one: Instance) -> set[int]:
        """Give the places of the two members that an instance would exchange."""
        parent = one.modules[0][:-1]
        places = [self.place_of.get(numbers(path[-1])) for path in one.modules if path[:-1] == parent]
        return {place for place in places if place is not None}


def _run_of(
    own: Sequence[Path], other: Sequence[Path], places: Iterable[int], lists: tuple[Path, Path], stems: tuple[str, str]
) -> _Run:
    """Tell to which numbers of the source's list the members of a list are matched.

    Args:
        own: The paths of the source's units in the assignment.
        other: Those of the target's.
        places: Those below the target's list.
        lists: The parents of the lists of the source and the target.
        stems: Of their members.
    """
    source, target = lists
    votes: dict[tuple[int, ...], Counter[tuple[int, ...]]] = {}
    for place in places:
        path, wanted = own[place][len(source) :], other[place][: len(target) + 1]
        if not path or own[place][: len(source)] != source or wanted == target:
            continue
        if (stem(path[0]), stem(wanted[-1])) == stems:
            votes.setdefault(numbers(wanted[-1]), Counter())[numbers(path[0])] += 1
    return _Run.of({place: found.most_common(1)[0][0] for place, found in votes.items()})


def _direction(run: _Run, one: Instance) -> int:
    """Tell whether the other members of a list are matched in order: 1, in reverse order: -1, or neither: 0."""
    out, last = run.places(one), len(run.members) - 1
    count, steps = last - len(out), run.steps.copy()
    if count < 1:
        return 0
    for place in {place for at in out for place in (at - 1, at)}:
        if 0 <= place < last:
            steps[_step(run, place, place + 1)] -= 1
    for at in out:
        after = at + 1 + (at + 1 in out)
        if at > 0 and at - 1 not in out and after <= last:
            steps[_step(run, at - 1, after)] += 1
    return (steps[1] == count) - (steps[-1] == count)


def _step(run: _Run, place: int, other: int) -> int:
    """Tell whether the partner of one member comes before that of another: 1, after it: -1, or is the same: 0."""
    first, second = run.partners[place], run.partners[other]
    return (first < second) - (first > second)


def _shift(member: tuple[int, ...], partner: tuple[int, ...]) -> tuple[int, ...]:
    """Tell by how much the numbers of a member and of its partner differ; nothing where they are not as many."""
    return tuple(map(sub, member, partner)) if len(member) == len(partner) else ()


def _is_shifted(run: _Run, one: Instance) -> bool:
    """Tell whether all other members of a list have other numbers by as much as the two taken together."""
    out = run.places(one)
    if len(run.shifts) > 1 + len(out):
        return False
    shifts = run.shifts - Counter([_shift(run.members[place], run.partners[place]) for place in out])
    (shift, *rest) = shifts or [()]
    ends, modules = ([numbers(path[-1]) for path in pair] for pair in (one.ends, one.modules))
    if rest or not any(shift) or any(len(end) != len(shift) for end in ends):
        return False
    return sorted(tuple(map(add, end, shift)) for end in ends) == sorted(modules)


def exchanged(assignment: Assignment, chosen: Sequence[Exchange]) -> Assignment:
    """Carry exchanges out, each layer at most once."""
    source, moved = assignment.source.copy(), set[int]()
    for exchange in sorted(chosen, key=lambda one: one.names * len(one.pairs)):
        places = _places(exchange.pairs)
        if moved.isdisjoint(places):
            moved |= places
            for p, q in exchange.pairs:
                source[[p, q]] = source[[q, p]]
    return _with_sources(assignment, source)


def _places(pairs: Iterable[tuple[int, int]]) -> set[int]:
    return {place for pair in pairs for place in pair}


def _with_sources(assignment: Assignment, source: Ints) -> Assignment:
    """Give the places other sources; what they had is the next best."""
    rival = np.where(source != assignment.source, assignment.source, assignment.runner_up)
    cues = {**assignment.cues, "name": assignment.names[source, assignment.target]}
    return replace(assignment, source=source, runner_up=rival, cues=cues)


def _numbers_agree(source: tuple[Path, Path], target: tuple[Path, Path]) -> int:
    """Tell whether two pairs of modules have the same numbers in this order: 1, in the other: -1, or not: 0.

    Those of their own names, else all that stand in their paths, as where one side writes a path as one name.
    """
    for own, other in (
        ([numbers(path[-1]) for path in side] for side in (source, target)),
        ([tuple([n for name in path for n in numbers(name)]) for path in side] for side in (source, target)),
    ):
        if all(own) and all(other) and own[0] != own[1] and own in (other, other[::-1]):
            return 1 if own == other else -1
    return 0
