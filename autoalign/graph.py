"""The module graph of one side: a tree of modules with its tensors as leaves, in natural order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autoalign.names import numbers, stem

if TYPE_CHECKING:
    import networkx as nx

Path = tuple[str, ...]

_LEAF = "."  # stands before a tensor's own name; no component of a key contains it


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
    nodes: tuple[Path, ...]  # the path of each module


def module_graph(paths: Sequence[Path]) -> nx.DiGraph[Path]:
    """Build the tree of modules above the given tensor paths, each module pointing to its children in natural order.

    Natural order is the order of registration, but children whose names differ in their numbers alone and which are
    sorted as text are ordered by these numbers: files sorted by key put ``layers.10`` before ``layers.2``. A tensor's
    path ends with a component that no module has, so that a tensor and a module may share a name.

    >>> graph = module_graph([("h", "10", "w"), ("h", "2", "w")])
    >>> [path for path in graph[("h",)]]
    [('h', '2'), ('h', '10')]
    """
    import networkx as nx

    children: dict[Path, dict[Path, None]] = {(): {}}
    for path in paths:
        for depth in range(len(path)):
            parent, child = path[:depth], path[: depth + 1]
            if depth + 1 == len(path):
                child = (*path[:-1], _LEAF, path[-1])
            known = children.setdefault(parent, {})
            if child in known:
                continue
            known[child] = None
    graph: nx.DiGraph[Path] = nx.DiGraph()
    graph.add_node(())
    for parent, known in children.items():
        graph.add_edges_from((parent, child) for child in _by_number(list(known)))
    return graph


def _by_number(siblings: list[Path]) -> list[Path]:
    """Sort siblings of one stem that are sorted as text by their numbers, each stem within the places it holds."""
    places: dict[str, list[int]] = {}
    for place, path in enumerate(siblings):
        places.setdefault(stem(path[-1]), []).append(place)
    ordered = list(siblings)
    for same in places.values():
        names = [siblings[place][-1] for place in same]
        if len(same) > 1 and names == sorted(names):
            members = sorted((siblings[place] for place in same), key=lambda path: numbers(path[-1]))
            for place, path in zip(same, members, strict=True):
                ordered[place] = path
    return ordered


def ancestry(paths: Sequence[Path]) -> Ancestry:
    """Turn the module graph of tensor paths into arrays; a module with one child only counts as that child."""
    graph = module_graph(paths)
    leaf_of = {(*path[:-1], _LEAF, path[-1]): index for index, path in enumerate(paths)}
    order = np.zeros(len(paths), dtype=np.int64)
    chains: list[list[int]] = [[] for _ in paths]
    nodes: list[Path] = []
    seen = 0
    stack: list[tuple[Path, list[int]]] = [((), [])]
    while stack:
        path, above = stack.pop()
        if path in leaf_of:
            index = leaf_of[path]
            order[index] = seen
            chains[index] = above[::-1]
            seen += 1
            continue
        children = list(graph[path])
        if len(children) != 1 or not nodes:
            above = [*above, len(nodes)]
            nodes.append(path)
        stack.extend((child, above) for child in reversed(children))
    depth = max(map(len, chains), default=0) or 1
    ancestors = np.full((len(paths), depth), -1, dtype=np.int32)
    for index, above in enumerate(chains):
        ancestors[index, : len(above)] = above
    return Ancestry(len(nodes), ancestors, order, tuple(nodes))


def natural_order(paths: Sequence[Path]) -> list[int]:
    """List the indices of paths in natural order.

    >>> natural_order([("h", "10"), ("h", "2")])
    [1, 0]
    """
    return [int(index) for index in np.argsort(ancestry(paths).order, kind="stable")]
