"""Scope: the module of one side that alone holds what the other side can use.

A checkpoint may hold more networks than the one that is wanted (a whole diffusion pipeline, a model beside its moving
average), and a model may be more than its checkpoint (a detector around a backbone). What is matched outside the
right module is matched by coincidence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from autoalign.checkpoints.containers import COPY_WORDS, name_words
from autoalign.matching.candidates import squeeze
from autoalign.matching.layers import Part, Path, units_of

_MOMENTUM = (frozenset({"k"}), frozenset({"q"}))  # the encoder of keys is the moving average of that of queries
_LEAST = 4  # layers that the other side must have for a scope to be told from a coincidence
_NEARLY = 0.8  # of the usable layers that each of several copies must hold
_WORTH = 0.8  # a scope is worth choosing if it leaves out more than a fifth of its side


@dataclass(frozen=True, slots=True)
class Scope:
    """The module to match, and the modules that are copies of it under other names."""

    path: Path = ()  # what lies outside is left out
    taken: Path = ()  # the copy that is used
    copies: tuple[Path, ...] = ()  # the others, which are left out
    decided: bool = True  # whether anything speaks for this copy and against the others
    told: bool = True  # whether a rule or the other side's own name does


def scope_of(parts: Sequence[Part], others: Sequence[Part], pinned: Sequence[Path] = ()) -> Scope:
    """Find the smallest module that holds as many layers of the other side's shapes as the whole side does.

    Among several copies one is taken as a whole, never mixed: the one with a pinned tensor, else the one that the other
    side calls by its name, else the one that is no moving average.
    """
    units = units_of(parts)
    wanted = Counter(shapes for unit in units_of(others) if (shapes := _shapes(unit.parts, others)))
    usable = (Counter(_shapes(unit.parts, parts) for unit in units) & wanted).total()
    modules = (unit.path[:depth] for unit in units for depth in range(1, len(unit.path)))
    sizes = Counter(modules if _LEAST <= usable < len(units) else ())
    if not any(_NEARLY * usable <= size < _WORTH * len(units) for size in sizes.values()):
        return Scope()
    tree = units.ancestry
    held: list[Counter[tuple[tuple[str, tuple[int, ...]], ...]]] = [Counter() for _ in tree.nodes]
    for unit, above in zip(units, tree.ancestors, strict=True):
        shapes = _shapes(unit.parts, parts)
        for module in above:
            if module >= 0:
                held[module][shapes] += 1

    def names_below(module: int) -> frozenset[Path]:
        above = tree.nodes[module]
        return frozenset(unit.path[len(above) :] for unit in units if unit.path[: len(above)] == above)

    called = frozenset(word for component in _shared_prefix(others) for word in name_words(component))

    def rank(path: Path, rivals: Sequence[Path]) -> tuple[bool, bool, bool]:
        own = frozenset(word for component in path for word in name_words(component))
        theirs = frozenset(
            word for rival in rivals if rival != path for component in rival for word in name_words(component)
        )
        own, theirs = own - theirs, theirs - own
        is_average = _is_average(path) or (own, theirs) == _MOMENTUM
        return not any(name[: len(path)] == path for name in pinned), not own & called, is_average

    inner = [module for module in range(1, len(held)) if held[module].total() < _WORTH * held[0].total()]
    enough = [module for module in inner if (held[module] & wanted).total() >= _NEARLY * usable]
    copies: dict[frozenset[Path], list[Path]] = {}
    for module in enough:
        copies.setdefault(names_below(module), []).append(tree.nodes[module])
    for paths in copies.values():  # outer modules come before inner ones
        if len(paths) > 1:
            ranks = {path: rank(path, paths) for path in paths}
            first, second, *_ = ordered = sorted(paths, key=ranks.__getitem__)
            told = ranks[first][:2] < ranks[second][:2]
            return Scope((), first, tuple(ordered[1:]), ranks[first] < ranks[second], told)
    whole = [module for module in enough if (held[module] & wanted).total() == usable]
    least = min((held[module].total() for module in whole), default=0)
    smallest = [tree.nodes[module] for module in whole if held[module].total() == least]
    # Several different networks of the same shapes: their names must decide.
    return Scope(smallest[0], smallest[0]) if len(smallest) == 1 else Scope()


def within(parts: Sequence[Part], scope: Scope) -> list[Part]:
    """List the parts in scope."""
    if not (scope.path or scope.copies):
        return list(parts)

    def below(part: Part, path: Path) -> bool:
        return part.path[: len(path)] == path

    return [part for part in parts if below(part, scope.path) and not any(below(part, copy) for copy in scope.copies)]


def _shapes(members: Sequence[tuple[str, int]], parts: Sequence[Part]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((values, squeeze(parts[index].shape)) for values, index in members if values in ("weight", "other"))


def _shared_prefix(parts: Sequence[Part]) -> Path:
    first, last = min(part.path for part in parts), max(part.path for part in parts)  # what these share, all share
    return tuple(own for own, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first[:-1], last, strict=False)))


def _is_average(path: Path) -> bool:
    return any(name_words(component) & COPY_WORDS for component in path)
