"""Renaming: the easy case, in which both sides list the same tensors in the same order under consistently other names.

It is taken only where it proves itself: the two module trees are one tree, names aside, with equal shapes throughout,
and wherever siblings could be exchanged without a change of shape, their names tell that they are not.
"""

from __future__ import annotations

from collections.abc import Sequence

from autoalign.graph import Path
from autoalign.names import kind, numbers, stem, words
from autoalign.units import Part
from autoalign.vocabulary import RIVAL_PAIRS

_LEAST = 8  # tensors that two sides must have to be told from a coincidence
_LONG = 6  # members from which on a list runs from the input to the output, wherever its numbers begin


def is_renamed(source: Sequence[Part], target: Sequence[Part]) -> bool:
    """Tell whether the n-th part of one side is certainly the n-th of the other.

    >>> shapes = [(3, 2), (3,), (4, 3), (4,)] * 2
    >>> names = [f"{n}.{layer}.{leaf}" for n in range(2) for layer in "ab" for leaf in ("weight", "bias")]
    >>> sides = [
    ...     [
    ...         Part(place, tuple(f"{top}.{name}".split(".")), shape, "float")
    ...         for place, (name, shape) in enumerate(zip(names, shapes))
    ...     ]
    ...     for top in ("blocks", "model.layers")
    ... ]
    >>> is_renamed(*sides), is_renamed(sides[0], sides[1][::-1])
    (True, False)
    """
    if len(source) != len(target) or len(source) < _LEAST:
        return False
    if any(_values(a) != _values(b) for a, b in zip(source, target, strict=True)):
        return False
    partner: dict[Path, Path] = {(): ()}
    content: dict[Path, int] = {}  # sums of hashes, which tell multisets of tensors apart
    for (own, other), part in zip(zip(_inner(source), _inner(target), strict=True), source, strict=True):
        if len(own) != len(other):
            return False
        values = hash(_values(part))
        for depth in range(len(own) + 1):
            if partner.setdefault(own[:depth], other[:depth]) != other[:depth]:
                return False
            content[own[:depth]] = content.get(own[:depth], 0) + values
    if len(set(partner.values())) < len(partner):
        return False
    siblings: dict[tuple[Path, int], list[tuple[str, str]]] = {}
    for own, other in partner.items():
        if own:
            siblings.setdefault((own[:-1], content[own]), []).append((own[-1], other[-1]))
    return all(map(_told_apart, siblings.values()))


def _values(part: Part) -> tuple[tuple[int, ...], str, str]:
    return part.shape, part.numeric, kind(part.path[-1])[0]


def _inner(parts: Sequence[Part]) -> list[Path]:
    """Leave out the modules that hold everything."""
    paths = [part.path for part in parts]
    first, last = min(paths), max(paths)  # what these share, all share
    shared = next((depth for depth, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    shared = min(shared, min(map(len, paths)) - 1)
    return [path[shared:] for path in paths]


def _told_apart(names: Sequence[tuple[str, str]]) -> bool:
    """Tell whether the names of equal siblings tell which is which, and none of them speaks against its partner."""
    if any((a, b) in RIVAL_PAIRS for own, other in names for a in words(own) for b in words(other)):
        return False
    if len(names) == 1:
        return True
    lists = [{stem(name) for name in side} for side in zip(*names, strict=True)]
    places = [[numbers(name) for name in side] for side in zip(*names, strict=True)]
    if len(lists[0]) == len(lists[1]) == 1:
        in_order = all(side == sorted(side) for side in places)
        return places[0] == places[1] or (in_order and len(names) > _LONG)
    return all(
        own == other or (words(own) == words(other) != () and numbers(own) == numbers(other)) for own, other in names
    )
