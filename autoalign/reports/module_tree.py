"""The module tree of a checkpoint, with repeated blocks and siblings of one shape folded, as text."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autoalign.plan.keys import LEVELS, NUMBER, NUMBERED
from autoalign.plan.specs import TensorSpec
from autoalign.reports.rows import escaped, write_range

_NAMES = 4  # of siblings that are written out, before the rest is left to an ellipsis
_IN_LINE = 3  # kinds of tensors of a layer that are written in its line
_NEARLY = 0.9  # of the tensors
_LARGE = 0.2
_DEEPEST = 3  # modules in each other, in which copies are looked for


@dataclass(frozen=True, slots=True)
class Leaf:
    """Tensors of one module with the same shape and dtype."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        if not self.names:
            return ""
        if len(self.names) == 1:
            return escaped(self.names[0])
        more = ["..."] if len(self.names) > _NAMES else []
        return "{" + ",".join([*map(escaped, self.names[:_NAMES]), *more]) + "}"


@dataclass(frozen=True, slots=True)
class Branch:
    """A module, or several with the same tensors below them."""

    name: str  # printable; with a list of numbers in braces where there are several
    times: int  # how many modules this is
    leaves: tuple[Leaf, ...]
    branches: tuple[Branch, ...]
    tensors: int  # of one of the modules, as the rest
    elements: int
    bytes: int

    @property
    def shape(self) -> Hashable:
        """What two modules must agree in to be folded."""
        return self.leaves, self.branches


def tree_of(specs: Iterable[TensorSpec]) -> Branch:
    """Fold a list of tensors into a tree of modules.

    >>> import torch
    >>> keys = [f"h.{i}.fc.{leaf}" for i in range(3) for leaf in ("weight", "bias")]
    >>> (blocks,) = tree_of([TensorSpec(key, (4,), torch.float32) for key in keys]).branches
    >>> blocks.name, blocks.times, blocks.leaves
    ('h.{0...2}.fc', 3, (Leaf(names=('weight', 'bias'), shape=(4,), dtype='float32'),))
    """
    root: _Tree = {}
    for spec in specs:
        *path, name = spec.key.split(".", LEVELS)
        node = root
        for part in path:
            node = node.setdefault((part, "module"), {})  # type: ignore[assignment]
        node[name, "tensor"] = spec
    return _branch("", root)


_Tree = dict[tuple[str, str], "TensorSpec | _Tree"]


def _branch(name: str, node: _Tree) -> Branch:
    specs = [(part, spec) for (part, _), spec in node.items() if isinstance(spec, TensorSpec)]
    grouped: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for part, spec in specs:
        grouped.setdefault((spec.shape, spec.dtype_name), []).append(part)
    leaves = tuple(Leaf(tuple(names), shape, dtype) for (shape, dtype), names in grouped.items())
    inner = _folded([_branch(part, tree) for (part, _), tree in node.items() if not isinstance(tree, TensorSpec)])
    return Branch(
        name,
        1,
        leaves,
        tuple(_joined(child) for child in inner),
        len(specs) + sum(child.times * child.tensors for child in inner),
        sum(spec.numel for _, spec in specs) + sum(child.times * child.elements for child in inner),
        sum(spec.numel * spec.dtype.itemsize for _, spec in specs) + sum(child.times * child.bytes for child in inner),
    )


def _folded(branches: Sequence[Branch]) -> list[Branch]:
    """Fold siblings that differ in the last number of their names only."""
    groups: dict[Hashable, list[tuple[Branch, int]]] = {}
    for branch in branches:
        found = NUMBERED.fullmatch(branch.name)
        key = (found[1], found[3], branch.shape) if found else branch.name
        groups.setdefault(key, []).append((branch, int(found[2]) if found else 0))
    folded = []
    for members in groups.values():
        first, found = members[0][0], NUMBERED.fullmatch(members[0][0].name)
        if len(members) == 1 or found is None:
            folded.append(replace(first, name=escaped(first.name)))
        else:
            numbers = write_range(sorted(number for _, number in members))
            name = f"{escaped(found[1])}{numbers}{escaped(found[3])}"
            folded.append(replace(first, name=name, times=len(members)))
    return folded


def _joined(branch: Branch) -> Branch:
    """Join a module that holds nothing but one other with it, as ``encoder.layers``."""
    while len(branch.branches) == 1 and not branch.leaves and 1 in (branch.times, branch.branches[0].times):
        (inner,) = branch.branches
        branch = replace(inner, name=f"{branch.name}.{inner.name}", times=branch.times * inner.times)
    return branch


def render_tree(root: Branch, *, dtype: str = "", depth: int | None = None) -> list[str]:
    """Write a tree as lines: modules with their numbers of tensors, elements and bytes; layers with their shapes.

    Args:
        root: The tree; its own name is not written.
        dtype: The usual one, which is not written.
        depth: Levels of modules to write; None for all.
    """
    rows = list(_rows(root, "", dtype, depth))
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    return [
        f"{name:<{widths[0]}}  {times:>{widths[1]}}  {size:>{widths[2]}}  {what}".rstrip()
        for name, times, size, what in rows
    ]


def _rows(branch: Branch, indent: str, dtype: str, depth: int | None) -> Iterator[tuple[str, str, str, str]]:
    for leaf in branch.leaves:
        yield f"{indent}{leaf}", "", "", _described((replace(leaf, names=()),), dtype)
    for inner in branch.branches:
        times = f"{inner.times:,} x" if inner.times > 1 else ""
        name, size = f"{indent}{inner.name}", size_text(inner.bytes)
        if not inner.branches and len(inner.leaves) <= _IN_LINE:
            yield name, times, size, _described(inner.leaves, dtype)
            continue
        yield name, times, size, f"{inner.tensors:,} tensor{'s' if inner.tensors > 1 else ''}"
        if depth is None or depth > 1:
            yield from _rows(inner, f"{indent}  ", dtype, depth and depth - 1)


def _described(leaves: Sequence[Leaf], dtype: str) -> str:
    parts = [f"{leaf} {list(leaf.shape)}{f' {leaf.dtype}' if leaf.dtype != dtype else ''}".strip() for leaf in leaves]
    return ", ".join(parts)


def size_text(count: int) -> str:
    """Write a number of bytes for people.

    >>> size_text(999), size_text(1_250_000)
    ('999 B', '1.2 MB')
    """
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{count} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def prefix_of(specs: Sequence[TensorSpec]) -> tuple[str, int]:
    """Guess the prefix that a wrapper has put before the names.

    It is the module at the top that nearly all tensors are in, and what is between it and the first branching.

    >>> import torch
    >>> prefix_of([TensorSpec(f"module.net.{name}.weight", (), torch.float32) for name in "abc"])
    ('module.net.', 3)

    Returns:
        The prefix, '' if there is none, and how many tensors have it.
    """
    counts: dict[str, int] = {}
    for spec in specs:
        end = spec.key.find(".") + 1
        for _ in range(LEVELS):
            if not end:
                break
            counts[spec.key[:end]] = counts.get(spec.key[:end], 0) + 1
            end = spec.key.find(".", end) + 1
    prefix, count = "", len(specs)
    for name, inner in sorted(counts.items(), key=lambda item: item[0].count(".")):
        enough = inner == count if prefix else inner >= _NEARLY * count
        if name.startswith(prefix) and enough and inner > 1 and not any(char.isdecimal() for char in name):
            prefix, count = name, inner
    return prefix, count if prefix else 0


def copies_of(specs: Sequence[TensorSpec]) -> tuple[str, ...]:
    """Name the modules that hold large parts of a checkpoint and the same keys and shapes, as student and teacher.

    >>> import torch
    >>> keys = [f"{side}.{name}.weight" for side in ("student", "teacher") for name in ("a", "b")]
    >>> copies_of([TensorSpec(key, (), torch.float32) for key in keys])
    ('student', 'teacher')
    """
    below: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
    for spec in specs:
        parts = spec.key.split(".")
        for depth in range(1, min(len(parts) - 1, _DEEPEST) + 1):
            below.setdefault(".".join(parts[:depth]), set()).add((".".join(parts[depth:]), spec.shape))
    groups: dict[Hashable, list[str]] = {}
    for path, tensors in below.items():
        if len(tensors) > 1 and len(tensors) >= _LARGE * len(specs) and not path.rpartition(".")[2].isdecimal():
            groups.setdefault(frozenset(tensors), []).append(path)
    for paths in groups.values():  # outer modules come first
        outer = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
        if len(outer) > 1:
            return tuple(outer)
    return ()


DEPTH = 40  # of a tree; what follows in a key is one name


@dataclass(frozen=True, slots=True)
class TensorRow:
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


def tree(leaves: Sequence[TensorRow]) -> Tree:
    """Arrange the tensors of a side as a tree.

    >>> leaves = [TensorRow(f"h.{i}.{name}", name, (i,)) for i in range(12) for name in ("weight", "bias")]
    >>> found = tree([*leaves, TensorRow("norm", None)])
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


def _walk(leaves: Sequence[TensorRow]) -> Iterator[tuple[str, int, int]]:
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
    leaves: Sequence[TensorRow],
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
