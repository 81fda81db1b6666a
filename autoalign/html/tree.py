"""The module tree of one side of an alignment, with the runs of siblings that say the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoalign.indices import NUMBER, NUMBERED

DEPTH = 40  # of a tree; what follows in a key is one name


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor of a side: what is said of it, and the numbers in that."""

    key: str
    said: Hashable  # equal for tensors that a row may stand for together, such as the counterpart without its numbers
    numbers: tuple[int, ...] = ()  # as many for all leaves of which the same is said


@dataclass(frozen=True, slots=True)
class Tree:
    """Modules and tensors, parents before children and siblings in the order in which they first come.

    Where adjacent siblings differ in a number and nothing else, they are a run, of which a person need see one.
    """

    names: tuple[str, ...]  # the last component of each node
    depths: tuple[int, ...]
    tensors: tuple[int, ...]  # for each node the position of its leaf; -1 for a module
    ends: tuple[int, ...]  # for each node the first node after it that is not below it
    runs: dict[int, int]  # from the first node of a run to the number of siblings in it; two at least

    def representatives(self) -> list[int]:
        """Tell for each node which node stands for it where all runs are folded."""
        shown = list(range(len(self.names)))
        for node in range(len(self.names)):
            if shown[node] != node:
                shown[node] = shown[shown[node]]
            elif node in self.runs:
                size = self.ends[node] - node
                for other in range(node + size, node + size * self.runs[node]):
                    shown[other] = node + (other - node) % size
        return shown


def template(key: str) -> tuple[str, list[int]]:
    """Split a text into itself without its numbers, and its numbers.

    >>> template("layers.3.mlp.fc1")
    ('layers.#.mlp.fc#', [3, 1])
    """
    return NUMBER.sub("#", key), [int(number) for number in NUMBER.findall(key)]


def tree(leaves: Sequence[Leaf]) -> Tree:
    """Arrange the tensors of a side as a tree.

    >>> leaves = [Leaf(f"h.{i}.{name}", name, (i,)) for i in range(12) for name in ("weight", "bias")]
    >>> found = tree([*leaves, Leaf("norm", None)])
    >>> found.names[:5], found.runs
    (('h', '0', 'weight', 'bias', '1'), {1: 12})
    """
    names, depths, tensors = [], [], []
    for name, depth, position in _walk(leaves):
        names.append(name)
        depths.append(depth)
        tensors.append(position)
    children, ends = _children(depths)
    return Tree(tuple(names), tuple(depths), tuple(tensors), tuple(ends), _runs(leaves, names, tensors, children, ends))


def _walk(leaves: Sequence[Leaf]) -> Iterator[tuple[str, int, int]]:
    """Yield the name, depth and leaf of each node, parents first."""
    root: dict[tuple[str, bool], object] = {}  # a tensor and a module may have one name
    for position, leaf in enumerate(leaves):
        *path, last = leaf.key.split(".", DEPTH)
        level = root
        for name in path:
            level = level.setdefault((name, False), {})  # type: ignore[assignment]
        level[last, True] = position
    stack = [iter(root.items())]
    while stack:
        for (name, is_tensor), below in stack[-1]:
            yield name, len(stack) - 1, below if is_tensor else -1  # type: ignore[misc]
            if not is_tensor:
                stack.append(iter(below.items()))  # type: ignore[attr-defined]
                break
        else:
            stack.pop()


def _children(depths: Sequence[int]) -> tuple[dict[int, list[int]], list[int]]:
    """Find the children of each module, those of the root under -1, and where what is below each node ends."""
    children: dict[int, list[int]] = {-1: []}
    ends = [len(depths)] * len(depths)
    path = [-1]
    for node, depth in enumerate(depths):
        for closed in path[depth + 1 :]:
            ends[closed] = node
        del path[depth + 1 :]
        children.setdefault(path[-1], []).append(node)
        path.append(node)
    return children, ends


def _runs(
    leaves: Sequence[Leaf],
    names: Sequence[str],
    tensors: Sequence[int],
    children: Mapping[int, Sequence[int]],
    ends: Sequence[int],
) -> dict[int, int]:
    """Find the runs: siblings that differ in a number, of which the same is said, with numbers that grow alike."""
    shown = [leaves[position] if position >= 0 else None for position in tensors]
    numbers = [leaf.numbers if leaf else () for leaf in shown]
    starts = np.concatenate([[0], np.cumsum([len(part) for part in numbers])])
    flat = np.asarray([number for part in numbers for number in part], dtype=np.int64)
    known: dict[Hashable, int] = {}
    kinds = [0] * len(names)
    runs: dict[int, int] = {}
    for node in range(len(names) - 1, -2, -1):  # children before their parents; the root is last
        leaf = shown[node] if node >= 0 else None
        if leaf:
            kinds[node] = known.setdefault(("tensor", leaf.said), len(known))
            continue
        below = children[node]
        found = _runs_of(below, names, kinds, lambda child: flat[starts[child] : starts[ends[child]]])
        runs |= {below[place]: length for place, length in found.items()}
        kind = tuple((names[child], kinds[child], found.get(place, 0)) for place, child in enumerate(below))
        if node >= 0:
            kinds[node] = known.setdefault(kind, len(known))
    return runs


def _runs_of(
    siblings: Sequence[int], names: Sequence[str], kinds: Sequence[int], numbers: Callable[[int], NDArray[np.int64]]
) -> dict[int, int]:
    runs: dict[int, int] = {}
    first, growth = 0, np.zeros(0, dtype=np.bool_)  # of the run so far
    for place in range(1, len(siblings)):
        before, node = siblings[place - 1], siblings[place]
        growing = _growing(numbers(before), numbers(node)) if _follows(names, kinds, before, node) else None
        if growing is None or (first in runs and not np.array_equal(growing, growth)):
            first = place
            continue
        growth = growing
        runs[first] = place - first + 1
    return runs


def _follows(names: Sequence[str], kinds: Sequence[int], before: int, node: int) -> bool:
    """Tell whether a sibling is the one before it with a greater number in its name."""
    if kinds[before] != kinds[node]:
        return False
    parts, others = NUMBERED.fullmatch(names[before]), NUMBERED.fullmatch(names[node])
    if not parts or not others or (parts[1], parts[3]) != (others[1], others[3]) or parts[1][-1:].isdigit():
        return False
    return int(parts[2]) < int(others[2])


def _growing(before: NDArray[np.int64], after: NDArray[np.int64]) -> NDArray[np.bool_] | None:
    """Tell which numbers grow from one sibling to the next; None if one falls."""
    change = after - before
    return None if (change < 0).any() else change > 0
