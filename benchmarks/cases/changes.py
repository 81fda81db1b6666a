"""Changes of a checkpoint against its architecture, one at a time; where each tensor came from is known."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random

from autoalign.plan.specs import TensorSpec
from benchmarks.cases.content import shuffled
from benchmarks.cases.module_trees import Path, path_of
from benchmarks.cases.naming import Entry, renamed, with_leaf_names
from benchmarks.cases.nesting import wrapped
from benchmarks.cases.words import LEAVES

Entries = Sequence[Entry]

CLASSES, CHANNELS = 7, 1  # of the checkpoint with another head and another input
_USUAL_CLASSES = {1000: CLASSES, 91: CLASSES, 364: 4 * CLASSES, 400: CLASSES, 21: CLASSES, 11221: CLASSES}


def changed(specs: Sequence[TensorSpec], change: str, random: Random) -> list[Entry]:
    """Return the tensors of a checkpoint of an architecture, after one of ``CHANGES``."""
    return CHANGES[change]([Entry(path_of(spec), spec.shape, spec.dtype, spec.key) for spec in specs], random)


def _unchanged(entries: Entries, _: Random) -> list[Entry]:
    return list(entries)


def _renamed(entries: Entries, random: Random) -> list[Entry]:
    """Give every word another one that means nothing, and the tensors of layers names of another scheme."""
    return with_leaf_names(renamed(entries, random, synonyms=0.0, made=1.0), random)


def _reordered(entries: Entries, random: Random) -> list[Entry]:
    return shuffled(entries, random, names_tell=True)


def _resized(entries: Entries, _: Random) -> list[Entry]:
    """Give the head other classes and the first convolution other channels.

    What has another shape has no origin, nor has the bias of such a weight: it is not to be taken alone.
    """
    kernel = next((entry for entry in entries if len(entry.shape) > 2 and entry.shape[1] == 3), None)
    result, lost = [], set()
    for entry in entries:
        shape = (_USUAL_CLASSES.get(entry.shape[0], entry.shape[0]), *entry.shape[1:]) if entry.shape else ()
        if entry is kernel:
            shape = (shape[0], CHANNELS, *shape[2:])
        if shape != entry.shape:
            lost.add((*entry.path[:-1], "bias"))
        result.append(replace(entry, shape=shape))
    are_kept = (new.shape == old.shape and new.path not in lost for new, old in zip(result, entries, strict=True))
    return [entry if kept else replace(entry, origin=None) for entry, kept in zip(result, are_kept, strict=True)]


def _without_last_stage(entries: Entries, _: Random) -> list[Entry]:
    """Leave out the last member of the longest chain of numbered siblings nearest to the root that holds modules."""
    lists: dict[tuple[int, Path, str], dict[int, None]] = defaultdict(dict)
    for entry in entries:
        for depth, name in enumerate(entry.path[:-2]):
            stem = name.rstrip("0123456789")
            if stem != name:
                lists[depth, entry.path[:depth], stem].setdefault(int(name[len(stem) :]))
    chains = {place: members for place, members in lists.items() if len(members) > 2}
    if not chains:
        return list(entries)
    first = min(depth for depth, *_ in chains)
    depth, parent, stem = max((place for place in chains if place[0] == first), key=lambda place: len(chains[place]))
    last = f"{stem}{max(chains[depth, parent, stem])}"
    return [entry for entry in entries if entry.path[:depth] != parent or entry.path[depth] != last]


def _wrapped(entries: Entries, random: Random) -> list[Entry]:
    return wrapped(entries, random)


def _numbered(entries: Entries, _: Random) -> list[Entry]:
    """Name every module by its place among its siblings."""
    places: dict[Path, dict[str, str]] = defaultdict(dict)
    result = []
    for entry in entries:
        path = []
        for depth, name in enumerate(entry.path):
            siblings = places[entry.path[:depth]]
            is_leaf = depth == len(entry.path) - 1 and name in LEAVES
            path.append(name if is_leaf else siblings.setdefault(name, str(len(siblings))))
        result.append(replace(entry, path=tuple(path)))
    return result


def _half_renamed(entries: Entries, random: Random) -> list[Entry]:
    """Give half of the words others that mean nothing, and register siblings of any name in another order."""
    return shuffled(renamed(entries, random, synonyms=0.0, made=0.5), random, names_tell=True)


def _sorted(entries: Entries, _: Random) -> list[Entry]:
    return sorted(entries, key=lambda entry: entry.key)


def _anonymous(entries: Entries, random: Random) -> list[Entry]:
    """Number all modules that hold tensors in a random order, in which they are registered, too."""
    modules = list(dict.fromkeys(entry.path[:-1] for entry in entries))
    random.shuffle(modules)
    place = {module: number for number, module in enumerate(modules)}
    moved = [replace(entry, path=(f"m{place[entry.path[:-1]]}", entry.path[-1])) for entry in entries]
    return sorted(moved, key=lambda entry: int(entry.path[0][1:]))


CHANGES: Mapping[str, Callable[[Entries, Random], list[Entry]]] = {
    "unchanged": _unchanged,
    "renamed": _renamed,
    "reordered": _reordered,
    "resized": _resized,
    "without last stage": _without_last_stage,
    "wrapped": _wrapped,
    "numbered": _numbered,
    "half renamed": _half_renamed,
    "sorted": _sorted,
    "anonymous": _anonymous,
}
