"""The module tree behind a list of keys, and which of its siblings only a name or the order can tell apart."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field

from autoalign.plan.specs import TensorSpec
from benchmarks.cases.words import words_of

Path = tuple[str, ...]


@dataclass(slots=True)
class Node:
    """A module, or a tensor where ``shape`` is set; children are in the order of registration."""

    children: dict[str, Node] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None


def tree_of(entries: Iterable[tuple[Path, tuple[int, ...]]]) -> Node:
    """Build the tree of some paths."""
    root = Node()
    for path, shape in entries:
        node = root
        for name in path:
            node = node.children.setdefault(name, Node())
        node.shape = shape
    return root


def path_of(spec: TensorSpec) -> Path:
    """Split a key into its components."""
    return tuple(spec.key.split("."))


def form(node: Node) -> Hashable:
    """What is left of a subtree without names, order, and the lengths of its lists: equal for all that may be twins.

    A list's length is left out so that lists stay twins when blocks are dropped from one of them.
    """
    listed: set[Hashable] = set()
    named: dict[Hashable, int] = defaultdict(int)
    for name, child in node.children.items():
        if name.isdecimal():
            listed.add(form(child))
        else:
            named[form(child)] += 1
    return node.shape, frozenset(listed), frozenset(named.items())


def twins(node: Node) -> Iterator[tuple[str, ...]]:
    """Yield the names of the siblings of one form, for every group of them at one node."""
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for name, child in node.children.items():
        groups[form(child)].append(name)
    return (tuple(names) for names in groups.values() if len(names) > 1)


def telling_words(root: Node) -> frozenset[str]:
    """Find the words by which twins differ: where order is lost, nothing else tells them apart."""
    found: set[str] = set()
    for node in _nodes(root):
        for names in twins(node):
            sets = [frozenset(words_of(name)) for name in names]
            found |= frozenset().union(*sets) - sets[0].intersection(*sets)
    return frozenset(found)


def template(path: Path) -> Path:
    """Write a path without its numbers.

    >>> template(("layer1", "0", "conv2"))
    ('layer#', '#', 'conv#')
    """
    return tuple(re.sub(r"\d+", "#", name) for name in path)


def paths(node: Node, prefix: Path = ()) -> Iterator[tuple[Path, Node]]:
    """Walk all nodes below one, in order, with their paths."""
    for name, child in node.children.items():
        yield (*prefix, name), child
        yield from paths(child, (*prefix, name))


def _nodes(root: Node) -> Iterator[Node]:
    yield root
    for _, node in paths(root):
        yield node
