"""Namesakes: layers that both sides call the same, up to one prefix on either side."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import starmap

import numpy as np
from numpy.typing import NDArray

from autoalign.matching.layers import Path
from autoalign.plan.keys import numbers, stem

_ALIKE = 0.5  # share of the children of two modules that must have common names
_FITTING = 0.9  # of namesakes below different prefixes that must be of reconcilable shapes
_SHARE = 0.5  # of the smaller side's layers that must be namesakes before the shared names are believed


def namesakes(
    source: Sequence[Path],
    target: Sequence[Path],
    counts: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
    fits: Callable[[int, int], bool] | None = None,
) -> list[tuple[int, int]]:
    """Pair the layers of equal name, if most of one side has them and their surroundings are the same too.

    A name is believed only where the modules around it have most children in common, lists of another length aside:
    ``layers.0`` beside ``proj_in`` and ``proj_out`` need not be the ``layers.0`` of a module that has neither.

    Wrappers are seen through wherever they stand: a module that is its parent's only child has no name of its own.

    >>> namesakes([("a", "module", "0"), ("b", "module")], [("a", "0"), ("b",), ("head",)])
    [(0, 0), (1, 1)]

    Args:
        source: The layers of the source.
        target: Those of the target.
        counts: How many layers each of them stands for; one where it is left out.
        fits: Tells whether the shapes of two layers can be reconciled; where a prefix was taken off, those of most
            namesakes must be.
    """
    each = counts or (np.ones(len(source), dtype=np.int64), np.ones(len(target), dtype=np.int64))
    source, target = _unwrapped(source), _unwrapped(target)
    prefixes = _prefixes(source, target, _fewest(each))
    if prefixes is None:
        return []
    own, other = prefixes
    place = {path[len(own) :]: index for index, path in enumerate(source) if path[: len(own)] == own}
    pairs = [
        (place[path[len(other) :]], index)
        for index, path in enumerate(target)
        if path[: len(other)] == other and path[len(other) :] in place
    ]
    if share_of(pairs, each) < _SHARE:
        return []
    if fits and own != other and sum(fits(*pair) for pair in pairs) < _FITTING * len(pairs):
        return []
    children = _children(source, own), _children(target, other)
    trusted: dict[Path, bool] = {(): True}

    def trust(path: Path) -> bool:
        if path not in trusted:
            own, other = ({stem(name) for name in known.get(path, ())} for known in children)
            trusted[path] = trust(path[:-1]) and len(own & other) >= _ALIKE * len(own | other)
        return trusted[path]

    shifted = _shifted(source, own, target, other)

    def renumbered(path: Path) -> bool:
        return any((path[:depth], stem(path[depth])) in shifted for depth in range(len(path)))

    found = [(i, j) for i, j in pairs if trust(source[i][len(own) : -1])]
    found = [(i, j) for i, j in found if not renumbered(source[i][len(own) :])] if shifted else found
    return _without_moved(found, source, fits) if fits else found


def _without_moved(
    pairs: Sequence[tuple[int, int]], source: Sequence[Path], fits: Callable[[int, int], bool]
) -> list[tuple[int, int]]:
    """Leave out the layers that moved to another module of a list, as a downsampling from the end of each stage.

    None of these fits its namesake, and some fit that of another.
    """
    alike: dict[Path, list[tuple[int, int]]] = defaultdict(list)
    for i, j in pairs:
        alike[tuple(map(stem, source[i]))].append((i, j))
    unfit = {name for name, same in alike.items() if not any(starmap(fits, same)) and any("#" in own for own in name)}
    if not unfit:
        return list(pairs)
    members: dict[Path, list[int]] = defaultdict(list)
    for i, path in enumerate(source):
        members[tuple(map(stem, path))].append(i)
    moved = {name for name in unfit if any(fits(i, j) for i in members[name] for _, j in alike[name])}
    return [pair for name, same in alike.items() if name not in moved for pair in same]


def _shifted(source: Sequence[Path], own: Path, target: Sequence[Path], other: Path) -> set[tuple[Path, str]]:
    """Find the lists whose numbers begin elsewhere on one side than on the other, so that no number means the same."""
    lists: tuple[dict[tuple[Path, str], set[tuple[int, ...]]], ...] = ({}, {})
    for known, paths, prefix in zip(lists, (source, target), (own, other), strict=True):
        for path in paths:
            for depth in range(len(prefix), len(path)):
                if place := numbers(path[depth]):
                    known.setdefault((path[len(prefix) : depth], stem(path[depth])), set()).add(place)
    return {
        name
        for name, places in lists[0].items()
        if len(places) > 1
        and (there := lists[1].get(name, places)) != places
        and min(there) != min(places)
        and not (there <= places or places <= there)
    }


def share_of(pairs: Sequence[tuple[int, int]], counts: tuple[NDArray[np.int64], NDArray[np.int64]]) -> float:
    """Tell what share of the smaller side's layers is paired; each counts as the number that it stands for."""
    side = int(counts[1].sum() < counts[0].sum())
    return sum(int(counts[side][pair[side]]) for pair in pairs) / max(int(counts[side].sum()), 1)


def _unwrapped(paths: Sequence[Path]) -> Sequence[Path]:
    """Leave out the names of modules that are only children, those that are numbered or hold tensors aside."""
    children = _children(paths, ())
    alone = {path for path, names in children.items() if len(names) == 1 and not numbers(*names)}.difference(paths)
    if not alone:
        return paths
    return [tuple(name for depth, name in enumerate(path) if path[:depth] not in alone) or path for path in paths]


def _fewest(counts: tuple[NDArray[np.int64], NDArray[np.int64]]) -> int:
    """Count the fewest pairs of layers that may be enough; see ``share_of``."""
    smaller = counts[int(counts[1].sum() < counts[0].sum())]
    return int(np.searchsorted(np.cumsum(np.sort(smaller)[::-1]), _SHARE * smaller.sum())) + 1


def _prefixes(source: Sequence[Path], target: Sequence[Path], fewest: int) -> tuple[Path, Path] | None:
    """Find the prefixes whose removal leaves the most names in common; the first of equals.

    Only those that stand before so many names count.
    """
    often = [
        {prefix for prefix, count in below.items() if count >= fewest}
        for below in (Counter(path[:cut] for path in side for cut in range(len(path))) for side in (source, target))
    ]
    above: dict[Path, list[Path]] = defaultdict(list)
    for path in source:
        for cut in range(len(path)):
            above[path[cut:]] += [path[:cut]] if path[:cut] in often[0] else []
    votes = Counter[tuple[Path, Path]]()
    for path in target:
        cut = next((cut for cut in range(len(path)) if path[cut:] in above), 0)
        if path[:cut] in often[1]:
            votes.update((prefix, path[:cut]) for prefix in above.get(path[cut:], ()))
    return votes.most_common(1)[0][0] if votes else None


def _children(paths: Sequence[Path], prefix: Path) -> dict[Path, set[str]]:
    children: dict[Path, set[str]] = defaultdict(set)
    for path in paths:
        if path[: len(prefix)] == prefix:
            short = path[len(prefix) :]
            for depth, name in enumerate(short):
                children[short[:depth]].add(name)
    return children
