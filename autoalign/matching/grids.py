"""Grids: lists of lists, such as blocks in stages, or pairs of layers that the other side has as two lists.

Each place where the paths of a grid's layers differ is an axis of it. Two sides may nest their axes otherwise, but what
differs on one axis alone differs on one alone there, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations, product
from operator import ne

from autoalign.matching.features import SideFeatures
from autoalign.matching.state import Exchange, State, numbered_part
from autoalign.plan.keys import numbers

_MAX_AXES, _MAX_LAYERS = 3, 256  # of a grid that is filled anew
_MAX_MOVED, _MAX_COMPARED = 8, 16  # layers of a grid that are compared with others of it

_Places = dict[int, tuple[int, ...]]  # of units, on each axis


def grid_gain(state: State, exchanges: Sequence[Exchange]) -> float:
    """Compare how many pairs of layers differ in as many names on both sides: as it is, and after some exchanges.

    Returns:
        1 if they are more as it is, -1 if after the exchanges, 0 if neither, or if no layer that moves is in a grid.
    """
    new = {unit: own for one in exchanges for own, unit in one.after}
    moved = [unit for one in exchanges for _, unit in one.before if unit in new and unit in state.grid_of]
    own_paths, paths = state.source.paths, state.target.paths
    gain = 0
    for unit in moved[:: max(len(moved) // _MAX_MOVED, 1)]:
        own, others = state.own_of[unit], state.grid_of[unit]
        for other in others[:: max(len(others) // _MAX_COMPARED, 1)]:
            if other != unit:
                end = state.own_of[other]
                steps = sum(map(ne, paths[unit], paths[other]))
                gain += sum(map(ne, own_paths[own], own_paths[end])) == steps
                gain -= sum(map(ne, own_paths[new[unit]], own_paths[new.get(other, end)])) == steps
    return float((gain > 0) - (gain < 0))


def filled_by_axes(state: State) -> Iterator[dict[int, int | None]]:
    """Find the ways to fill grids axis by axis that are not: by target unit, the source unit that it would take."""
    own, kinds = state.own_of, state.kinds[0]
    found: dict[tuple[object, ...], dict[int, int | None]] = {}  # way and modules -> what target units would take
    for units in state.grids:
        given = _places_on_axes(state.source, [own[unit] for unit in units])
        wanted = _places_on_axes(state.target, units)
        (first, *_), (size, *_) = wanted.values(), map(len, given.values())
        if len(first) != size or size > _MAX_AXES or len(units) > _MAX_LAYERS:
            continue
        if _is_by_axes([(given[own[unit]], wanted[unit]) for unit in units]):
            continue
        end_at = {place: end for end, place in given.items()}
        last = [max(axis) for axis in zip(*given.values(), strict=True)]
        modules = frozenset([numbered_part(state.target.paths[unit]) for unit in units])
        for way, turned in product(permutations(range(size)), (None, *range(size))):
            takes: dict[int, int | None] = {}
            for unit, place in wanted.items():
                steps = [place[axis] for axis in way]
                takes[unit] = end_at.get(tuple([last[k] - n if k == turned else n for k, n in enumerate(steps)]))
            if all(end is not None and kinds[end] == kinds[own[unit]] for unit, end in takes.items()):
                found.setdefault((way, turned, modules), {}).update(takes)
    yield from found.values()


def _places_on_axes(side: SideFeatures, units: Sequence[int]) -> _Places:
    """Return the place of each unit on each axis: the rank of its name there."""
    line = sorted(units, key=side.places_in_order.__getitem__)
    axes = [names for names in zip(*[side.paths[unit] for unit in line], strict=True) if len(set(names)) > 1]
    ranks = []
    for names in axes:
        in_order = sorted(set(names), key=numbers) if all(map(numbers, names)) else dict.fromkeys(names)
        ranks.append({name: rank for rank, name in enumerate(in_order)})
    places = zip(*[[rank[name] for name in names] for rank, names in zip(ranks, axes, strict=True)], strict=True)
    return dict(zip(line, places, strict=True))


def _is_by_axes(pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """True if each place on an axis of one side goes with one place on an axis of the other."""
    sides = [list(zip(*side, strict=True)) for side in zip(*pairs, strict=True)]
    return all(
        any(len(set(zip(own, other, strict=True))) == len(set(own)) == len(set(other)) for own in sides[0])
        for other in sides[1]
    )
