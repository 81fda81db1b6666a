"""Steps of a perturbation that change the order of siblings, or what there is: dropped and inserted layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random

import torch

from benchmarks.cases.module_trees import Node, Path, paths, template, tree_of, twins
from benchmarks.cases.naming import Entry
from benchmarks.cases.words import ADAPTERS, LEAVES, words_of


def shuffled(entries: Sequence[Entry], random: Random, *, names_tell: bool) -> list[Entry]:
    """Register siblings in another order, modules of one kind all alike.

    Lists and siblings that are numbered (``norm1``, ``norm2``) stay in order among themselves, and so do a layer's own
    tensors. Where names tell nothing, siblings of one form do too, since only their order tells them apart.
    """
    tree = tree_of((entry.path, entry.shape) for entry in entries)
    seed = random.getrandbits(32)
    ranks: dict[Path, dict[str, int]] = {}
    for path, node in [((), tree), *paths(tree)]:
        own = Random(f"{seed}:{template(path)}")
        tensors = [name for name, child in node.children.items() if child.shape is not None]
        modules = [name for name, child in node.children.items() if child.shape is None]
        order = tensors if LEAVES & set(tensors) else _shuffled(tensors, node, own, names_tell=names_tell)
        if not any(name.isdecimal() for name in modules):
            modules = _shuffled(modules, node, own, names_tell=names_tell)
        ranks[path] = {name: rank for rank, name in enumerate([*order, *modules])}
    return sorted(entries, key=lambda entry: [ranks[entry.path[:depth]][name] for depth, name in enumerate(entry.path)])


def _shuffled(names: Sequence[str], node: Node, random: Random, *, names_tell: bool) -> list[str]:
    bound: list[set[str]] = [] if names_tell else [set(group) for group in twins(node)]
    stems: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for name in names:
        stems[tuple(words_of(name))].add(name)
    for group in stems.values():
        touched = [other for other in bound if other & group]
        bound = [other for other in bound if not other & group] + [set.union(group, *touched)]
    result = random.sample(names, len(names))
    for group in bound:
        slots = [slot for slot, name in enumerate(result) if name in group]
        for slot, name in zip(slots, [name for name in names if name in group], strict=True):
            result[slot] = name
    return result


def dropped(entries: Sequence[Entry], random: Random) -> list[Entry]:
    """Leave out one or two of: the last blocks of a list, a small module at the top, all counters of batches.

    Numbers stay as they are, so that it is never in question which block is gone.
    """
    ways = [_last_blocks(entries, random), _top_modules(entries, random)]
    ways.append({entry.path for entry in entries if entry.path[-1] == "num_batches_tracked"})
    gone: set[Path] = set()
    for way in random.sample([way for way in ways if way], min(random.choice((1, 2)), sum(map(bool, ways)))):
        if len(gone | way) <= len(entries) / 2:
            gone |= way
    return [entry for entry in entries if entry.path not in gone]


def inserted(entries: Sequence[Entry], random: Random, *, blocks: bool) -> list[Entry]:
    """Add tensors that the other side lacks: further blocks at the end of a list, or adapters of another width.

    Further blocks only with ``blocks``: they would stand in the place of blocks that were dropped.
    """
    lists = _lists_of_blocks(entries)
    if lists and blocks and random.random() < 0.5:
        place = random.choice(lists)
        return _with_more_blocks(entries, place, random.choice((1, 2)))
    return _with_adapters(entries, random, random.choice(lists) if lists else ())


def _lists_of_blocks(entries: Sequence[Entry]) -> list[Path]:
    """Find the lists whose last two items hold the same names and shapes, and modules in them.

    A list holds a twentieth of all tensors at least, so that it is one of blocks and not of branches within a block.
    """
    tree = tree_of((entry.path, entry.shape) for entry in entries)
    return [
        path
        for path, node in [((), tree), *paths(tree)]
        for names in [list(node.children)]
        if len(names) > 1 and all(name.isdecimal() for name in names)
        for first, last in [[_content(node.children[name]) for name in names[-2:]]]
        if first == last and any(len(below) > 1 for below, _ in last)
        if len(_content(node)) * 20 >= len(entries)
    ]


def _content(node: Node) -> list[tuple[Path, tuple[int, ...]]]:
    return [(path, child.shape) for path, child in paths(node) if child.shape is not None]


def _last_blocks(entries: Sequence[Entry], random: Random) -> set[Path]:
    lists = _lists_of_blocks(entries)
    if not lists:
        return set()
    place = random.choice(lists)
    depth = len(place)
    numbers = list(dict.fromkeys(entry.path[depth] for entry in entries if entry.path[:depth] == place))
    gone = set(numbers[-random.randint(1, max(1, len(numbers) // 3)) :])
    return {entry.path for entry in entries if entry.path[:depth] == place and entry.path[depth] in gone}


def _top_modules(entries: Sequence[Entry], random: Random) -> set[Path]:
    """Choose a module at the top that holds at most an eighth of the tensors, such as a head or a stem.

    One of two of a form is none to choose, since without names it would be open which of them is gone.
    """
    parts: dict[str, set[Path]] = defaultdict(set)
    for entry in entries:
        parts[entry.path[0]].add(entry.path)
    double = {name for names in twins(tree_of((entry.path, entry.shape) for entry in entries)) for name in names}
    small = [
        name
        for name, members in parts.items()
        if len(members) <= len(entries) / 8 and not name.isdecimal() and name not in double
    ]
    return parts[random.choice(small)] if small else set()


def _with_more_blocks(entries: Sequence[Entry], place: Path, count: int) -> list[Entry]:
    depth = len(place)
    members = [index for index, entry in enumerate(entries) if entry.path[:depth] == place]
    last = entries[members[-1]].path[depth]
    block = [entries[index] for index in members if entries[index].path[depth] == last]
    more = [
        replace(entry, path=(*place, str(int(last) + further), *entry.path[depth + 1 :]), origin=None)
        for further in range(1, count + 1)
        for entry in block
    ]
    return [*entries[: members[-1] + 1], *more, *entries[members[-1] + 1 :]]


def _with_adapters(entries: Sequence[Entry], random: Random, place: Path) -> list[Entry]:
    """Add a bottleneck to each item of a list, or one beside the top modules where no list is given."""
    name, depth = random.choice(ADAPTERS), len(place) + 1 if place else 0
    sizes = {size for entry in entries for size in entry.shape}
    width = random.choice([size for size in range(5, 200) if size not in sizes])
    outer = max(sizes, default=8)
    shapes: dict[Path, tuple[int, ...]] = {
        ("down", "weight"): (width, outer),
        ("down", "bias"): (width,),
        ("up", "weight"): (outer, width),
    }
    result: list[Entry] = []
    for entry, following in pairwise([*entries, None]):
        assert entry is not None
        result.append(entry)
        is_last = following is None or following.path[:depth] != entry.path[:depth]
        if (
            is_last
            and entry.path[: len(place)] == place
            and entry.path[:depth] != entry.path
            and entry.path[depth] != name
        ):
            result += [
                Entry((*entry.path[:depth], name, *path), shape, torch.float32, None) for path, shape in shapes.items()
            ]
    return result
