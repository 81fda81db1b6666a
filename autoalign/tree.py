"""The module tree of a checkpoint, with repeated blocks and siblings of one shape folded, as text."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from autoalign.folding import write_range
from autoalign.indices import NUMBERED
from autoalign.layout import escaped
from autoalign.names import LEVELS
from autoalign.specs import TensorSpec

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
