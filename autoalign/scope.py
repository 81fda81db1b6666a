"""Scope: the module of one side that alone holds what the other side can use.

A checkpoint may hold more networks than the one that is wanted (a whole diffusion pipeline, a model beside its moving
average), and a model may be more than its checkpoint (a detector around a backbone). What is matched outside the
right module is matched by coincidence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from autoalign.candidates import squeeze
from autoalign.containers import COPY_WORDS, name_words
from autoalign.graph import Path, ancestry
from autoalign.units import Part, units_of

_LEAST = 4  # layers that the other side must have for a scope to be told from a coincidence
_WORTH = 0.8  # a scope is worth choosing if it leaves out more than a fifth of its side


@dataclass(frozen=True, slots=True)
class Scope:
    """The module to match, and the modules that are copies of it under other names."""

    path: Path = ()
    copies: tuple[Path, ...] = ()
    decided: bool = True  # whether anything speaks for this copy and against the others


def scope_of(parts: Sequence[Part], others: Sequence[Part], pinned: Sequence[Path] = ()) -> Scope:
    """Find the smallest module that holds as many layers of the other side's shapes as the whole side does.

    Among several copies one is taken as a whole, never mixed: the one with a pinned tensor, else the one that is no
    moving average.
    """
    units = units_of(parts)
    wanted = Counter(shapes for unit in units_of(others) if (shapes := _shapes(unit.parts, others)))
    if len(units) < 2 or sum(wanted.values()) < _LEAST:
        return Scope()
    tree = ancestry([unit.path for unit in units])
    held: list[Counter[tuple[tuple[str, tuple[int, ...]], ...]]] = [Counter() for _ in tree.nodes]
    for unit, above in zip(units, tree.ancestors, strict=True):
        shapes = _shapes(unit.parts, parts)
        for module in above:
            if module >= 0:
                held[module][shapes] += 1
    usable = sum((held[0] & wanted).values())
    enough = [
        module
        for module in range(1, len(held))
        if (held[module] & wanted).total() == usable and held[module].total() < _WORTH * held[0].total()
    ]
    if usable < _LEAST or not enough:
        return Scope()
    least = min(held[module].total() for module in enough)
    smallest = [module for module in enough if held[module].total() == least]
    below = [
        {
            unit.path[len(tree.nodes[module]) :]
            for unit in units
            if unit.path[: len(tree.nodes[module])] == tree.nodes[module]
        }
        for module in smallest
    ]
    if any(names != below[0] for names in below):
        return Scope()  # different networks of the same shapes: their names must decide

    def rank(path: Path) -> tuple[bool, bool]:
        return not any(name[: len(path)] == path for name in pinned), _is_average(path)

    paths = sorted((tree.nodes[module] for module in smallest), key=rank)
    return Scope(paths[0], tuple(paths[1:]), len(paths) == 1 or rank(paths[0]) < rank(paths[1]))


def within(parts: Sequence[Part], path: Path) -> list[Part]:
    """List the parts below a module."""
    return [part for part in parts if part.path[: len(path)] == path]


def _shapes(members: Sequence[tuple[str, int]], parts: Sequence[Part]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((values, squeeze(parts[index].shape)) for values, index in members if values in ("weight", "other"))


def _is_average(path: Path) -> bool:
    return any(name_words(component) & COPY_WORDS for component in path)
