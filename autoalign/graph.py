"""The module graph of one side: a tree of modules with its tensors as leaves, in natural order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoalign.names import numbers, stem

Path = tuple[str, ...]

_Tree = dict[tuple[str, bool], "_Tree | int"]  # name, and whether of a tensor -> what is in the module, or the leaf


def block_around(path: Path) -> Path:
    """Find the innermost numbered module around a layer, or the root.

    >>> block_around(("layer1", "0", "conv2"))
    ('layer1', '0')
    """
    depth = len(path) - 1
    while depth > 0 and not numbers(path[depth - 1]):
        depth -= 1
    return path[: max(depth, 0)]


@dataclass(frozen=True, slots=True)
class Ancestry:
    """The module graph as arrays. Leaf ``i`` is the tensor that was ``i``-th in the input."""

    node_count: int  # of modules; module 0 is the root
    ancestors: NDArray[np.int32]  # [leaves, depth]: module ids from the nearest up to the root, padded with -1
    order: NDArray[np.int64]  # [leaves]: position in natural order
    in_order: NDArray[np.int64]  # [leaves]: the leaves in natural order
    nodes: tuple[Path, ...]  # the path of each module


def ancestry(paths: Sequence[Path]) -> Ancestry:
    """Build the tree of modules above the given tensor paths; a module with one child only counts as that child.

    Natural order is the order of registration, but children whose names differ in their numbers alone and which are
    sorted as text are ordered by these numbers: files sorted by key put ``layers.10`` before ``layers.2``. A tensor and
    a module may share a name.

    >>> ancestry([("h", "10", "w"), ("h", "2", "w"), ("w",)]).in_order.tolist()
    [1, 0, 2]
    """
    tree: _Tree = {}
    for index, path in enumerate(paths):
        module = tree
        for name in path[:-1]:
            module = module.setdefault((name, False), {})  # type: ignore[assignment]
        module[path[-1], True] = index
    in_order: list[int] = []
    chains: list[list[int]] = [[] for _ in paths]  # of each leaf: the modules above it, from the nearest
    nodes: list[Path] = []
    stack: list[tuple[Path, _Tree | int, list[int]]] = [((), tree, [])]
    while stack:
        path, found, above = stack.pop()
        if isinstance(found, int):
            in_order.append(found)
            chains[found] = above
            continue
        if len(found) != 1 or not nodes:
            above = [len(nodes), *above]
            nodes.append(path)
        stack += [((*path, child[0]), found[child], above) for child in reversed(_by_number(list(found)))]
    depth = max(map(len, chains), default=0) or 1
    padded = [above + [-1] * (depth - len(above)) for above in chains]
    ancestors = np.asarray(padded, dtype=np.int32).reshape(len(paths), depth)
    order = np.zeros(len(paths), dtype=np.int64)
    order[in_order] = np.arange(len(paths))
    return Ancestry(len(nodes), ancestors, order, np.asarray(in_order, dtype=np.int64), tuple(nodes))


def _by_number(siblings: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Sort siblings of one stem that are sorted as text by their numbers, each stem within the places it holds."""
    places: dict[str, list[int]] = {}
    for place, (name, _) in enumerate(siblings):
        places.setdefault(stem(name), []).append(place)
    if len(places) == len(siblings):
        return siblings
    ordered = list(siblings)
    for same in places.values():
        names = [siblings[place][0] for place in same]
        if len(same) > 1 and names == sorted(names):
            members = sorted((siblings[place] for place in same), key=lambda child: numbers(child[0]))
            for place, child in zip(same, members, strict=True):
                ordered[place] = child
    return ordered
