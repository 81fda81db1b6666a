"""The module tree of one side with repeated blocks folded, as ``inspect`` prints and the HTML page draws it."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoalign.plan.keys import LEVELS, NUMBERED
from autoalign.plan.specs import TensorSpec
from autoalign.reports.rows import escaped, in_braces, write_range

MAX_DEPTH = 40  # of a tree; what follows in a key is one name
_MIN_COLUMN = 24  # characters of the last column of a narrow tree
_MAX_NAMES = 4  # of tensors that are listed together, before the rest is left to an ellipsis
_MAX_KINDS_IN_LINE = 3  # of the tensors of a layer that are written in its line
_MIN_SHARE_WITH_PREFIX = 0.9  # of the tensors
_MIN_SHARE_OF_COPY = 0.2  # of the tensors
_MAX_DEPTH_OF_COPIES = 3


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor of a side, with what must agree for it to be folded with others."""

    key: str
    signature: Hashable  # equal for tensors that one row may stand for; texts in it are without their numbers
    numbers: tuple[int, ...] = ()  # those of the texts; as many for all leaves of one signature


@dataclass(frozen=True, slots=True)
class Tree:
    """Modules and tensors, parents before children and siblings in the order in which they first come.

    Siblings that differ in nothing but a number are a run, of which one is shown.
    """

    names: list[str] = field(default_factory=list)  # the last component of each node
    depths: list[int] = field(default_factory=list)
    tensors: list[int] = field(default_factory=list)  # for each node the position of its leaf; -1 for a module
    ends: list[int] = field(default_factory=list)  # for each node the first node after it that is not below it
    runs: dict[int, list[int]] = field(default_factory=dict)  # from the first node of a run to all; two at least

    def children(self, node: int) -> Iterator[int]:
        """Yield the nodes directly below a module, those at the top for -1."""
        child, end = node + 1, len(self.names) if node < 0 else self.ends[node]
        while child < end:
            yield child
            child = self.ends[child]

    def representatives(self) -> list[int]:
        """Return for each node the node that stands for it where all runs are folded."""
        shown = list(range(len(self.names)))
        for node in range(len(self.names)):
            if shown[node] != node:
                shown[node] = shown[shown[node]]
            else:
                for other in self.runs.get(node, [])[1:]:
                    shown[other : self.ends[other]] = range(node, self.ends[node])
        return shown


def build_tree(leaves: Sequence[Leaf], *, apart: bool = False) -> Tree:
    """Arrange the tensors of a side as a tree.

    By default the siblings of a run are adjacent, no number falls from one to the next, and the same numbers grow at
    each step. If they may stand ``apart``, they may be in any order and have others between them.

    >>> leaves = [Leaf(f"h.{i}.{name}", name, (i,)) for i in range(12) for name in ("weight", "bias")]
    >>> tree = build_tree([*leaves, Leaf("norm", None)])
    >>> tree.names[:5], [len(run) for run in tree.runs.values()]
    (['h', '0', 'weight', 'bias', '1'], [12])
    """
    root: dict[tuple[str, bool], Any] = {}  # a tensor and a module may have one name
    for position, leaf in enumerate(leaves):
        *path, last = leaf.key.split(".", MAX_DEPTH)
        level = root
        for name in path:
            level = level.setdefault((name, False), {})
        level[last, True] = position
    tree = Tree()
    _add_nodes(tree, root, 0)
    _add_runs(tree, leaves, apart=apart)
    return tree


def _add_nodes(tree: Tree, level: dict[tuple[str, bool], Any], depth: int) -> None:
    for (name, is_tensor), below in level.items():
        node = len(tree.names)
        tree.names.append(name)
        tree.depths.append(depth)
        tree.tensors.append(below if is_tensor else -1)
        tree.ends.append(node + 1)
        if not is_tensor:
            _add_nodes(tree, below, depth + 1)
            tree.ends[node] = len(tree.names)


def _add_runs(tree: Tree, leaves: Sequence[Leaf], *, apart: bool) -> None:
    numbers = [leaves[position].numbers if position >= 0 else () for position in tree.tensors]
    starts = [0, *accumulate(map(len, numbers))]
    flat = np.asarray([number for part in numbers for number in part], dtype=np.int64)
    known: dict[Hashable, int] = {}
    kinds = [0] * len(tree.names)  # equal for nodes with the same below them
    for node in range(len(tree.names) - 1, -2, -1):  # children before their parents; the root is last
        if node >= 0 and tree.tensors[node] >= 0:
            kinds[node] = known.setdefault(("tensor", leaves[tree.tensors[node]].signature), len(known))
            continue
        below = list(tree.children(node))
        values = {} if apart else {child: flat[starts[child] : starts[tree.ends[child]]] for child in below}
        runs = _runs_of(below, tree.names, kinds, values, apart=apart)
        tree.runs.update(runs)
        if node >= 0:
            kind = tuple((tree.names[child], kinds[child], len(runs.get(child, ()))) for child in below)
            kinds[node] = known.setdefault(kind, len(known))


def _runs_of(
    siblings: Sequence[int],
    names: Sequence[str],
    kinds: Sequence[int],
    values: Mapping[int, NDArray[np.int64]],
    *,
    apart: bool,
) -> dict[int, list[int]]:
    """Find the runs among siblings, given the numbers of all leaves below each."""
    groups: dict[Hashable, list[int]] = {}  # the last run of each kind
    numbers: dict[int, int] = {}
    runs = {}
    for place, node in enumerate(siblings):
        name = NUMBERED.fullmatch(names[node])
        if not name or name[1][-1:].isdigit():  # the number of "block01" could not be written back from its value
            continue
        numbers[node] = int(name[2])
        kind = name[1], name[3], kinds[node]
        group = groups.get(kind, [])
        if group and not apart:
            last = group[-1]
            growth = values[node] - values[last]
            follows = last == siblings[place - 1] and numbers[last] < numbers[node] and not (growth < 0).any()
            if not follows or (len(group) > 1 and not np.array_equal(growth > 0, values[last] > values[group[-2]])):
                group = []
        groups[kind] = group
        group.append(node)
        if len(group) > 1:
            runs[group[0]] = group
    return runs


def render_tree(
    specs: Sequence[TensorSpec], *, dtype: str = "", depth: int | None = None, width: int | None = None
) -> list[str]:
    """Write tensors as the lines of their tree: modules with the number and size of their tensors, layers with shapes.

    The usual ``dtype`` is not written, and no more levels of modules than ``depth``. What a line of some ``width`` does
    not hold is wrapped between words, in its column.

    >>> import torch
    >>> keys = [f"h.{i}.fc.{leaf}" for i in range(3) for leaf in ("weight", "bias")]
    >>> print(*render_tree([TensorSpec(key, (4,), torch.float32) for key in keys], dtype="float32"))
    h.{0...2}.fc  3 x  32 B  {weight,bias} [4]
    """
    leaves = [Leaf(escaped(spec.key), spec.kind.removesuffix(f" {dtype}")) for spec in specs]
    tree = build_tree(leaves, apart=True)
    sizes = [
        specs[position].numel * specs[position].dtype.itemsize if position >= 0 else 0 for position in tree.tensors
    ]

    def rows_below(node: int, indent: str, depth: int | None) -> Iterator[tuple[str, str, str, str]]:
        tensors, runs = _content(tree, leaves, node)
        for kind, names in tensors.items():
            yield f"{indent}{in_braces(names, _MAX_NAMES)}", "", "", str(kind)
        for run in runs:
            name, times, inner = _joined(tree, run)
            below = slice(inner, tree.ends[inner])
            start = f"{indent}{name}", f"{times:,} x" if times > 1 else "", size_text(sum(sizes[below]))
            tensors, deeper = _content(tree, leaves, inner)
            if not deeper and len(tensors) <= _MAX_KINDS_IN_LINE:
                yield *start, ", ".join(f"{in_braces(names, _MAX_NAMES)} {kind}" for kind, names in tensors.items())
                continue
            count = sum(position >= 0 for position in tree.tensors[below])
            yield *start, f"{count:,} tensor{'s' if count > 1 else ''}"
            if depth is None or depth > 1:
                yield from rows_below(inner, f"{indent}  ", depth and depth - 1)

    rows = list(rows_below(-1, "", depth))
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    if width is not None and sum(widths) + 6 + max((len(row[3]) for row in rows), default=0) > width:
        return _wrapped(rows, width)
    return [
        f"{name:<{widths[0]}}  {times:>{widths[1]}}  {size:>{widths[2]}}  {what}".rstrip()
        for name, times, size, what in rows
    ]


def _wrapped(rows: Sequence[tuple[str, str, str, str]], width: int) -> list[str]:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [(*row[:3], row[3].replace(",", ", ").replace(",  ", ", ")) for row in rows]
    used = sum(max(len(row[column]) for row in rows) + 2 for column in range(3))
    if used + _MIN_COLUMN > width:  # below the names then
        starts = ["  ".join(filter(None, row[:3])) for row in cells]
        below = [" " * (len(name) - len(name.lstrip()) + 4) for name, *_ in cells]
        return [
            line
            for start, indent, (*_, what) in zip(starts, below, cells, strict=True)
            for line in (
                [f"{start}  {what}"]
                if len(start) + 2 + len(what) <= width
                else [start, *textwrap.wrap(what, width, initial_indent=indent, subsequent_indent=indent)]
            )
        ]
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for _ in range(2):
        table.add_column(justify="right", no_wrap=True)
    table.add_column(min_width=_MIN_COLUMN)
    for row in cells:
        table.add_row(*map(Text, row))
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return list(map(str.rstrip, captured.get().splitlines()))


def _content(tree: Tree, leaves: Sequence[Leaf], module: int) -> tuple[dict[Hashable, list[str]], list[list[int]]]:
    """Return the names of a module's own tensors by signature, and the modules in it by runs."""
    tensors: dict[Hashable, list[str]] = {}
    runs: list[list[int]] = []
    seen: set[int] = set()
    for child in tree.children(module):
        if (position := tree.tensors[child]) >= 0:
            tensors.setdefault(leaves[position].signature, []).append(tree.names[child])
        elif child not in seen:
            runs.append(tree.runs.get(child, [child]))
            seen.update(runs[-1])
    return tensors, runs


def _joined(tree: Tree, run: Sequence[int]) -> tuple[str, int, int]:
    """Join modules that hold nothing but others with these, as ``encoder.layers``.

    Returned are the name, with the numbers of runs; how many modules it stands for; and the first innermost one.
    """
    name = _run_name([tree.names[node] for node in run])
    children = list(tree.children(run[0]))
    inner = tree.runs.get(children[0], children[:1])
    if len(inner) == len(children) and tree.tensors[inner[0]] < 0:
        below, times, innermost = _joined(tree, inner)
        if 1 in (len(run), times):
            return f"{name}.{below}", len(run) * times, innermost
    return name, len(run), run[0]


def _run_name(names: Sequence[str]) -> str:
    """Write the names of a run as one.

    >>> _run_name(["conv1_a", "conv3_a", "conv2_a"])
    'conv{1...3}_a'
    """
    found = [match for name in names if (match := NUMBERED.fullmatch(name))]
    if len(names) == 1 or not found:
        return names[0]
    return f"{found[0][1]}{write_range(sorted(int(match[2]) for match in found))}{found[0][3]}"


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
    """Guess the prefix that a wrapper has put before the names, '' for none, and count the tensors that have it.

    It is the module at the top that nearly all tensors are in, and what is between it and the first branching.

    >>> import torch
    >>> prefix_of([TensorSpec(f"module.net.{name}.weight", (), torch.float32) for name in "abc"])
    ('module.net.', 3)
    """
    paths = (accumulate(f"{name}." for name in spec.key.split(".", LEVELS)[:-1]) for spec in specs)
    counts = Counter(chain.from_iterable(paths))
    prefix, count = "", len(specs)
    for name, inner in sorted(counts.items(), key=lambda item: item[0].count(".")):
        enough = inner == count if prefix else inner >= _MIN_SHARE_WITH_PREFIX * count
        if name.startswith(prefix) and enough and inner > 1 and not any(char.isdecimal() for char in name):
            prefix, count = name, inner
    return prefix, count if prefix else 0


def copies_of(specs: Sequence[TensorSpec]) -> tuple[str, ...]:
    """List the modules that hold large parts of a checkpoint and the same keys and shapes, as student and teacher.

    >>> import torch
    >>> keys = [f"{side}.{name}.weight" for side in ("student", "teacher") for name in ("a", "b")]
    >>> copies_of([TensorSpec(key, (), torch.float32) for key in keys])
    ('student', 'teacher')
    """
    below: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        for path in accumulate(spec.key.split(".", _MAX_DEPTH_OF_COPIES)[:-1], "{}.{}".format):
            below.setdefault(path, []).append(spec)
    groups: dict[Hashable, list[str]] = {}
    for path, inner in below.items():
        is_large = len(inner) > 1 and len(inner) >= _MIN_SHARE_OF_COPY * len(specs)
        if is_large and not path.rpartition(".")[2].isdecimal():
            groups.setdefault(frozenset((spec.key[len(path) :], spec.shape) for spec in inner), []).append(path)
    for paths in groups.values():  # outer modules come first
        outer = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
        if len(outer) > 1:
            return tuple(outer)
    return ()
