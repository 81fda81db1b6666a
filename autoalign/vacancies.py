"""Vacancies: modules that nothing is matched to, and that would fit where another one of the same content is.

Of two towers of one shape, a network may have both and a checkpoint one. The votes of its layers agree on either; what
tells which one it is are the names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from itertools import product

from autoalign.crossings import common
from autoalign.evidence import Ints
from autoalign.graph import Path
from autoalign.matching import Assignment
from autoalign.names import likeness, numbers, stem, words

_CLEAR = 0.05  # how much better the names of the one that was taken must fit
_LEAST = 3  # layers of a module; rivals of a single layer show in its margin

_Module = tuple[Path, list[int]]  # its path and the units in it
_Side = tuple[Sequence[Path], Ints]  # paths of the units, and their kinds: equal where all tensors have the same shapes


def rivalled(assignment: Assignment, source: _Side, target: _Side, fixed: Collection[int] = ()) -> list[int]:
    """Find the pairs of modules that a vacant one of the same content could take part in as well.

    Args:
        assignment: The chosen pairs of units.
        source: The units of the source.
        target: Those of the target.
        fixed: Places that are known.

    Returns:
        The places of these pairs.
    """
    result = set[int]()
    ways = (
        (assignment.source, source, assignment.target, target, assignment.names),
        (assignment.target, target, assignment.source, source, assignment.names.T),
    )
    for chosen, own, others, other, names in ways:
        place_of = {unit: place for place, unit in enumerate(chosen.tolist())}
        for (module, taken), (rival, vacant) in _alike(own, place_of):
            places = [place_of[unit] for unit in taken]
            ends = others[places]
            gain = float((names[taken, ends] - names[vacant, ends]).mean())
            counterpart = common([other[0][unit] for unit in ends.tolist()])
            called = words(counterpart[-1]) if counterpart else ()
            gain += likeness(words(module[-1]), called) - likeness(words(rival[-1]), called)
            if gain < _CLEAR and set(fixed).isdisjoint(places):
                result.update(places)
    return sorted(result)


def _alike(side: _Side, matched: Collection[int]) -> Iterator[tuple[_Module, _Module]]:
    """List siblings of the same content of which one is matched as a whole, and the other not at all."""
    paths, kinds = side
    if len(paths) - len(matched) < _LEAST:
        return
    below: dict[Path, list[int]] = defaultdict(list)
    for unit, path in enumerate(paths):
        for depth in range(1, len(path)):
            below[path[:depth]].append(unit)
    siblings: dict[Path, tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
    for module, units in below.items():
        if len(units) >= _LEAST and len({unit in matched for unit in units}) == 1:
            siblings[module[:-1]][units[0] in matched].append(module)
    content = cache(lambda module: frozenset((paths[unit][len(module) :], int(kinds[unit])) for unit in below[module]))
    for vacant, taken in siblings.values():
        for first, second in product(taken, vacant):
            told = numbers(first[-1]) and stem(first[-1]) == stem(second[-1])  # by numbers
            if not told and content(first) == content(second):
                in_order = [sorted(below[module], key=paths.__getitem__) for module in (first, second)]
                yield (first, in_order[0]), (second, in_order[1])
