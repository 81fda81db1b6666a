"""Steps of a perturbation that change the nesting: wrappers, merged levels, lists cut into groups or joined."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

from benchmarks.cases.module_trees import Path, template
from benchmarks.cases.naming import Entry
from benchmarks.cases.words import LEVELS, WRAPPERS

Paths = dict[Path, Path]  # from each path to its new one


def nested(entries: Sequence[Entry], random: Random, times: int) -> list[Entry]:
    """Apply some changes of the nesting, each at all places of one kind; what would make two keys one is left out."""
    result = list(entries)
    for change in random.sample(_CHANGES, times):
        changed = change([entry.path for entry in result], random)
        moved = [replace(entry, path=changed.get(entry.path, entry.path)) for entry in result]
        if are_paths_of_a_tree([entry.path for entry in moved]):
            result = in_tree_order(moved)
    return result


def are_paths_of_a_tree(found: Sequence[Path]) -> bool:
    """Tell whether the paths differ and none is a module that holds another."""
    whole = set(found)
    return len(whole) == len(found) and not any(
        path[:depth] in whole for path in found for depth in range(1, len(path))
    )


def in_tree_order(entries: Sequence[Entry]) -> list[Entry]:
    """Bring the entries of each module together, as state dicts have them, modules in the order of their first."""
    places: dict[Path, dict[str, int]] = defaultdict(dict)
    for entry in entries:
        for depth, name in enumerate(entry.path):
            siblings = places[entry.path[:depth]]
            siblings.setdefault(name, len(siblings))
    return sorted(
        entries, key=lambda entry: [places[entry.path[:depth]][name] for depth, name in enumerate(entry.path)]
    )


def wrapped(entries: Sequence[Entry], random: Random) -> list[Entry]:
    """Put all keys under one wrapper, or two."""
    prefix = tuple(".".join(random.sample(WRAPPERS, random.choice((1, 1, 2)))).split("."))
    return [replace(entry, path=(*prefix, *entry.path)) for entry in entries]


def _wrap_all(found: Sequence[Path], random: Random) -> Paths:
    """Put all keys under one wrapper."""
    prefix = random.choice(WRAPPERS).split(".")
    return {path: (*prefix, *path) for path in found}


def _wrap_one(found: Sequence[Path], random: Random) -> Paths:
    """Put a level between a kind of module and its children."""
    kinds = _kinds_of_modules(found)
    if not kinds:
        return {}
    kind, level = random.choice(kinds), random.choice(LEVELS)
    return {
        path: (*path[: len(kind)], level, *path[len(kind) :])
        for path in found
        if len(path) > len(kind) and template(path[: len(kind)]) == kind
    }


def _merge(found: Sequence[Path], random: Random) -> Paths:
    """Write a kind of module and its children as one level: ``attn.qkv`` as ``attn_qkv``."""
    kinds = [kind for kind in _kinds_of_modules(found) if kind[-1] != "#"]
    if not kinds:
        return {}
    kind, joint = random.choice(kinds), random.choice(("_", "", "-"))
    depth = len(kind)
    return {
        path: (*path[: depth - 1], joint.join(path[depth - 1 : depth + 1]), *path[depth + 1 :])
        for path in found
        if len(path) > depth + 1 and template(path[:depth]) == kind and not path[depth].isdecimal()
    }


def _unwrap(found: Sequence[Path], random: Random) -> Paths:
    """Leave out a kind of module that is the only child of its parent everywhere."""
    children: dict[Path, set[str]] = defaultdict(set)
    for path in found:
        for depth in range(len(path)):
            children[path[:depth]].add(path[depth])
    only: dict[Path, bool] = defaultdict(lambda: True)
    for path in found:
        for depth in range(len(path) - 1):
            only[template(path[: depth + 1])] &= len(children[path[:depth]]) == 1 and not path[depth].isdecimal()
    kinds = sorted(kind for kind, is_only in only.items() if is_only)
    if not kinds:
        return {}
    kind = random.choice(kinds)
    return {
        path: (*path[: len(kind) - 1], *path[len(kind) :])
        for path in found
        if len(path) > len(kind) and template(path[: len(kind)]) == kind
    }


def _group(found: Sequence[Path], random: Random) -> Paths:
    """Cut a list into groups of equal length: ``blocks.7`` is ``groups.2.1``, where a group has three."""
    lists = [
        path for path, numbers in _lists(found).items() if numbers == list(range(len(numbers))) and len(numbers) > 5
    ]
    if not lists:
        return {}
    place, size, level = random.choice(lists), random.choice((2, 3, 4)), random.choice(("sub", "chunk", "items"))
    depth = len(place)
    return {
        path: (*place, str(int(path[depth]) // size), level, str(int(path[depth]) % size), *path[depth + 1 :])
        for path in found
        if len(path) > depth and path[:depth] == place and path[depth].isdecimal()
    }


def _join(found: Sequence[Path], random: Random) -> Paths:
    """Count the blocks of all stages in one list: ``stages.2.blocks.1`` is ``blocks.7``, where there are six before."""
    kinds = sorted(
        {
            template(path[: depth + 1])
            for path in found
            for depth in range(3, len(path) - 2)
            if path[depth].isdecimal() and path[depth - 2].isdecimal() and not path[depth - 1].isdecimal()
        }
    )
    if not kinds:
        return {}
    kind = random.choice(kinds)
    depth = len(kind)
    running: dict[Path, int] = {}
    for path in found:
        if len(path) > depth and template(path[:depth]) == kind:
            running.setdefault(path[:depth], len(running))
    return {
        path: (*path[: depth - 3], path[depth - 2], str(number), *path[depth:])
        for path in found
        if (number := running.get(path[:depth])) is not None
    }


_CHANGES: tuple[Callable[[Sequence[Path], Random], Paths], ...] = (_wrap_all, _wrap_one, _merge, _unwrap, _group, _join)


def _kinds_of_modules(found: Sequence[Path]) -> list[Path]:
    """List the templates of the modules that hold modules, lists' items included and lists left out."""
    kinds: dict[Path, None] = {}
    for path in found:
        for depth in range(1, len(path) - 1):
            if not path[depth].isdecimal():
                kinds.setdefault(template(path[:depth]))
    return list(kinds)


def _lists(found: Sequence[Path]) -> dict[Path, list[int]]:
    """Find the modules with numbered children that hold more than one tensor, and their numbers in order."""
    numbers: dict[Path, dict[int, None]] = defaultdict(dict)
    for path in found:
        for depth in range(len(path) - 1):
            if path[depth].isdecimal():
                numbers[path[:depth]].setdefault(int(path[depth]))
    return {path: list(present) for path, present in numbers.items()}
