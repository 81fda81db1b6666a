"""Fused tensors: finding those that hold what the other side keeps apart, and splitting them into parts.

A fused tensor (``qkv``) is a group of siblings on the other side (``query``, ``key``, ``value``). It is split into
virtual parts that carry the roles' names, so that the matcher pairs one part with one tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from autoalign.candidates import squeeze
from autoalign.graph import Path, natural_order
from autoalign.names import kind, words
from autoalign.operations import Concatenate, Copy, Grouped, Operation, Split, Stack, Unstack, chain
from autoalign.units import Part, Unit, units_of
from autoalign.vocabulary import FUSED

Sizes = tuple[int, ...]

BY_ORDER = "the parts were told apart by their order alone"
UNTOLD = "nothing but their order tells query, key and value apart"


@dataclass(frozen=True, slots=True)
class Fusion:
    """How a tensor was split into parts, and so how it is put together again."""

    tensor: int
    parts: tuple[int, ...]  # in the order in which ``join`` takes them
    join: Operation
    doubt: str = ""  # why the parts might be laid out otherwise


@dataclass(frozen=True, slots=True)
class _Plan:
    """A split that the other side calls for."""

    dim: int
    sizes: Sizes
    roles: tuple[str, ...]
    doubt: str


def split_fused(parts: Sequence[Part], others: Sequence[Part]) -> tuple[list[Part], list[Fusion]]:
    """Split the tensors of one side that the other side holds as several.

    Which part is which is decided by role words and order. Tensors that the other side holds in the same shape and
    under a fused name too stay whole.
    """
    siblings = _Siblings(others)
    result: list[Part] = []
    fusions: list[Fusion] = []
    units = units_of(parts)
    unit_of = {index: unit for unit in units for _, index in unit.parts}
    names = _role_names(units)
    for index, part in enumerate(parts):
        unit = unit_of[index]
        values = next(name for name, member in unit.parts if member == index)
        pieces, join, doubt = _pieces(part, unit, values, parts, siblings, names)
        if len(pieces) > 1:
            fusions.append(Fusion(part.tensor, tuple(range(len(result), len(result) + len(pieces))), join, doubt))
        result += pieces
    return result, fusions


def _pieces(
    part: Part, unit: Unit, values: str, parts: Sequence[Part], siblings: _Siblings, names: dict[tuple[Path, str], str]
) -> tuple[list[Part], Operation, str]:
    if len(part.shape) == 3 and (stacked := siblings.stacked(part)):
        pieces = [replace(part, path=path, shape=part.shape[1:], view=Unstack(0, e)) for e, path in enumerate(stacked)]
        split = [_split(piece, unit.path, siblings.plan(piece, words(piece.path[-2])), {}) for piece in pieces]
        size = len(split[0][0])
        join: Operation = Grouped(size, split[0][1]) if size > 1 else Copy()
        return [piece for group, _ in split for piece in group], chain(join, Stack(0)), ""
    plan = siblings.plan(part, words(unit.path[-1]))
    if plan is None and values == "bias" and "weight" in (kinds := dict(unit.parts)):
        weight = siblings.plan(parts[kinds["weight"]], words(unit.path[-1]))
        if weight is not None and weight.dim == 0 and part.shape == (sum(weight.sizes),):
            plan = weight
    pieces, join = _split(part, unit.path, plan, names)
    return pieces, join, plan.doubt if plan else ""


def _split(
    part: Part, path: Path, plan: _Plan | None, names: dict[tuple[Path, str], str]
) -> tuple[list[Part], Operation]:
    if plan is None:
        return [part], Copy()
    if not isinstance(part.view, Copy):  # a slice of a stacked tensor
        parent, leaf = part.path[:-2], part.path[-1]
    else:
        parent, leaf = path[:-1], part.path[-1] if len(part.path) > len(path) else kind(part.path[-1])[0]
    pieces, start = [], 0
    for role, size in zip(plan.roles, plan.sizes, strict=True):
        shape = (*part.shape[: plan.dim], size, *part.shape[plan.dim + 1 :])
        view = chain(part.view, Split(plan.dim, start, size))
        path = (*parent, names.get((parent, role), role), leaf)
        pieces.append(replace(part, path=path, shape=shape, view=view, turned=plan.dim == 1))
        start += size
    return pieces, Concatenate(plan.dim)


def _role_names(units: Sequence[Unit]) -> dict[tuple[Path, str], str]:
    """Find what a side itself calls a role below a module, as in ``q_bias`` beside ``qkv.weight``."""
    roles = {role for known in FUSED.values() for role in known}
    return {(unit.path[:-1], word): unit.path[-1] for unit in units for word in words(unit.path[-1]) if word in roles}


class _Siblings:
    """What one side keeps apart: groups of sibling tensors by role, and lists of equal modules."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.whole: Counter[tuple[str, Sizes]] = Counter()  # fused word and shape of tensors held whole
        self.shapes = {squeeze(part.shape) for part in parts}
        self.by_role: dict[tuple[tuple[str, ...], Sizes], set[Sizes]] = {}
        self.in_order: dict[Sizes, set[Sizes]] = {}  # rest of the shape -> sizes of neighbours of one shape
        self.lists: dict[int, set[Sizes]] = {}  # length of a list -> shapes of the matrices in each of its modules
        children: dict[Path, list[tuple[str, dict[str, Sizes]]]] = {}
        units = units_of(parts)
        for position in natural_order([unit.path for unit in units]):
            unit = units[position]
            shapes = {values: squeeze(parts[index].shape) for values, index in unit.parts}
            children.setdefault(unit.path[:-1], []).append((unit.path[-1], shapes))
            for word in words(unit.path[-1]):
                if word in FUSED:
                    self.whole.update((word, shape) for shape in shapes.values())
        for members in children.values():
            self._add_roles(members)
            self._add_neighbours(members)
        self._add_lists(children)

    def _add_roles(self, members: list[tuple[str, dict[str, Sizes]]]) -> None:
        for values in ("weight", "bias"):
            sizes = {
                word: shapes[values]
                for name, shapes in members
                for word in words(name)
                if shapes.get(values) and "norm" not in words(name)
            }
            for roles in FUSED.values():
                present = tuple(role for role in roles if role in sizes)
                rests = {sizes[role][1:] for role in present}
                if len(present) > 1 and len(rests) == 1:
                    found = self.by_role.setdefault((present, rests.pop()), set())
                    found.add(tuple(sizes[role][0] for role in present))

    def _add_neighbours(self, members: list[tuple[str, dict[str, Sizes]]]) -> None:
        matrices = [shapes["weight"] for _, shapes in members if len(shapes.get("weight", ())) > 1]
        for first, second in pairwise(matrices):
            if first == second:
                self.in_order.setdefault(first[1:], set()).add((first[0], second[0]))
        for first, second, third in zip(matrices, matrices[1:], matrices[2:], strict=False):
            if first == second == third:
                self.in_order.setdefault(first[1:], set()).add((first[0],) * 3)

    def _add_lists(self, children: dict[Path, list[tuple[str, dict[str, Sizes]]]]) -> None:
        lengths = Counter(path[:-1] for path in children if path and path[-1].isdigit())
        for path, members in children.items():
            if path and path[-1].isdigit():
                shapes = {shape for _, of in members for shape in of.values() if len(shape) == 2}
                self.lists.setdefault(lengths[path[:-1]], set()).update(shapes)

    def stacked(self, part: Part) -> list[Path]:
        """Name the slices of a stacked tensor, where the other side has a list of modules instead."""
        count, *rest = part.shape
        shapes = self.lists.get(count, set())
        if part.shape in self.shapes or not shapes:
            return []
        fits = tuple(rest) in shapes or any(shape[0] * 2 == rest[0] and shape[1] == rest[1] for shape in shapes)
        name = part.path[-1]
        above, role = (
            (part.path[:-2], part.path[-2]) if name == "weight" and len(part.path) > 1 else (part.path[:-1], name)
        )
        return [(*above, str(index), role, "weight") for index in range(count)] if fits else []

    def plan(self, part: Part, named: Sequence[str]) -> _Plan | None:
        """Decide whether the other side calls for a split of this tensor, and which."""
        shape = squeeze(part.shape)
        if len(shape) != len(part.shape) or not shape:
            return None
        fused = [word for word in named if word in FUSED]
        for word in fused:
            if (word, shape) in self.whole or (word, shape[::-1]) in self.whole:
                return None
            for dim, roles, sizes in self._splits(word, shape):
                return _Plan(dim, sizes, roles, "")
        if shape in self.shapes or shape[::-1] in self.shapes or len(shape) < 2:
            return None
        for sizes in sorted(self.in_order.get(shape[1:], ())):
            if sum(sizes) == shape[0] and (not fused or len(sizes) == len(FUSED[fused[0]])):
                roles = FUSED[fused[0]] if fused else FUSED["qkv"] if len(sizes) == 3 else FUSED["gateup"]
                return _Plan(0, sizes, roles, BY_ORDER if len(sizes) == 2 else UNTOLD)
        return None

    def _splits(self, word: str, shape: Sizes) -> Iterator[tuple[int, tuple[str, ...], Sizes]]:
        roles = FUSED[word]
        for dim in range(len(shape) if len(shape) < 3 else 1):
            rest = (*shape[:dim], *shape[dim + 1 :])
            for present, sides in ((known, sizes) for (known, other), sizes in self.by_role.items() if other == rest):
                if not set(present) <= set(roles):
                    continue
                for sizes in sorted(sides):
                    if present == roles and sum(sizes) == shape[dim]:
                        yield dim, roles, sizes
                    elif len(set(sizes)) == 1 and sizes[0] * len(roles) == shape[dim]:
                        yield dim, roles, sizes[:1] * len(roles)
