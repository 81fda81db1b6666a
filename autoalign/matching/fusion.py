"""Fused tensors: split those that the other side holds as several.

A fused tensor (``qkv``) is a group of siblings on the other side (``query``, ``key``, ``value``). It is split into
virtual parts that carry the roles' names, so that the matcher pairs one part with one tensor. Stacks of such tensors,
as of experts, are split likewise; and layers of joined inputs, along these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, permutations, product
from math import prod

from autoalign.matching.layers import Part, Unit, squeeze, units_of
from autoalign.matching.names import kind, words
from autoalign.matching.paths import Path
from autoalign.matching.vocabulary import FUSED, GATE_FIRST, LAYER_TYPES
from autoalign.plan.keys import numbers
from autoalign.plan.operations import Operation, Permute, Reshape, Split, chain

Sizes = tuple[int, ...]

_ROLE_LISTS = [roles for lists in FUSED.values() for roles in lists]
_ROLES = frozenset(role for roles in _ROLE_LISTS for role in roles)
_QKV = FUSED["qkv"][0]
_BESIDE_ROLES = frozenset({"proj", "linear", "to"})  # words in names of projections to a role, unlike `pool_q`
_MIN_INITIALS = 3  # of the name of a fused tensor that is made of them
_MAX_JOINED = 6  # neighbours that make up one tensor and have no words for roles
_NO_INPUT = _ROLES | {"o", "down"}  # words of layers that are not parts of one, each of another input
BY_ORDER = "the parts are distinguished by their order alone"
ALTERNATING = "right shape, but the rows of gate and up may alternate, as those of other experts with biases do"
UNCERTAIN_ORDER = "only their order distinguishes the parts, and other code has another order"


@dataclass(frozen=True, slots=True)
class Fusion:
    """How a tensor was split into parts."""

    tensor: int
    parts: tuple[int, ...]  # in the order in which the tensor holds them
    base: Operation  # lays the tensor out as torch does, before it is split
    shape: tuple[int, ...]  # of the tensor in that layout
    plan: SplitPlan
    absent: frozenset[int] = frozenset()  # those of the parts that the other side does not have at all


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """A split that the other side calls for."""

    dim: int
    sizes: Sizes
    roles: tuple[str, ...]
    doubt: str = ""  # why the parts might be laid out otherwise
    unnamed: bool = False  # only the sizes of its parts show that it is fused
    biased: str | None = None  # of a layer that is split along its input: the part with the bias, empty for none
    turned: bool = False  # the tensor is transposed
    absent: frozenset[str] = frozenset()  # roles for which the other side has no tensor of this kind


_Pieces = tuple[list[Part], list[Fusion]]


def with_joined_roles(parts: Sequence[Part], others: Mapping[Sizes, int]) -> Sequence[Part]:
    """View tensors that have a dimension for the roles they hold as one matrix, the roles one after another.

    >>> (part,) = with_joined_roles([Part(0, ("kv", "w"), (2, 4, 8, 16), "float")], {(64, 8): 2})
    >>> part.shape, part.view
    ((128, 8), Chain(steps=(Permute(dims=(0, 1, 3, 2)), Reshape(shape=(128, 8)))))

    ``others`` counts the tensors of each shape of the other side. Without a fused name, a gate and what it gates are
    read so, unless most tensors have a first dimension of two, as those of a stack of layers.
    """
    held = {tuple(sorted(squeeze(shape))) for shape in others if len(shape) > 2}
    lacking = {part.shape for part in parts if 3 <= len(part.shape) <= 4} - set(others)
    if held.issuperset(tuple(sorted(squeeze(shape))) for shape in lacking):
        return parts
    result = list(parts)
    are_stacked = 2 * sum(part.shape[:1] == (2,) for part in parts) > len(parts)
    for unit in units_of(parts):
        kinds = dict(unit.parts)
        index = kinds.get("weight", kinds.get("other", -1))
        shape, bias = parts[index].shape, parts[kinds["bias"]].shape if "bias" in kinds else ()
        if index < 0 or not 3 <= len(shape) <= 4 or tuple(sorted(squeeze(shape))) in held:
            continue
        fused = [word for word in words(_own_name(unit.path)) if word in FUSED]
        lengths = {len(roles) for word in fused[:1] for roles in FUSED[word]}
        if not fused and len(shape) == 3 and shape[0] == 2 and not are_stacked:
            lengths = {2}
        ways = [
            (axis, -others[rows, shape[width]], width, rows)
            for axis, width in permutations(range(len(shape)), 2)
            if shape[axis] in lengths and (fused or not axis)
            for rows in [prod(size for dim, size in enumerate(shape) if dim not in (axis, width))]
            if others.get((rows, shape[width]), 0) >= (1 if fused else 2) and prod(bias) in (1, shape[axis] * rows)
        ]
        if not ways or [way[:2] for way in ways].count(min(ways)[:2]) > 1:
            continue  # of a square, no shape tells which dimension is the input
        axis, _, width, rows = min(ways)
        rest = [dim for dim in range(len(shape)) if dim not in (axis, width)]
        apart, joined = Permute((axis, *rest, width)), Reshape((shape[axis] * rows, shape[width]))
        result[index] = replace(parts[index], shape=joined.shape, view=chain(parts[index].view, apart, joined))
        if bias:
            flat = Reshape((prod(bias),))
            place = kinds["bias"]
            result[place] = replace(parts[place], shape=flat.shape, view=chain(parts[place].view, flat))
    return result


def split_both(source: Sequence[Part], target: Sequence[Part]) -> tuple[_Pieces, _Pieces]:
    """Split the fused tensors of two sides; what is split on one may show what else is to be split on the other."""
    own = split_fused(source, target)
    other = split_fused(target, own[0])
    return split_fused(source, other[0]) if other[1] else own, other


def split_fused(parts: Sequence[Part], others: Sequence[Part]) -> _Pieces:
    """Split the tensors of one side that the other side holds as several.

    Words for roles, and order, tell which part is which. Tensors that the other side holds in the same shape and under
    a fused name too stay whole.
    """
    held = Counter(squeeze(part.shape) for part in others)
    unit_of = _possibly_fused(parts, held)
    counts = Counter(squeeze(part.shape) for part in parts)
    surplus = {shape for shape in counts - held if len(shape) == 2 and shape in held}
    in_surplus = [unit for unit in units_of(parts) if _matrix(unit, parts) in surplus] if surplus else []
    if not unit_of and not in_surplus:
        return list(parts), []
    siblings = _Siblings(others, held, held - counts, parts)
    completed = [unit for unit in in_surplus if siblings.completes(unit, parts)]
    unit_of |= {index: unit for unit in completed for _, index in unit.parts}
    result: list[Part] = []
    fusions: list[Fusion] = []
    called = {  # what this side itself calls a role in a module, as in ``q_bias`` beside ``qkv.weight``
        (unit.path[:-1], word): unit.path[-1]
        for unit in units_of(parts)
        for word in words(unit.path[-1])
        if word in _ROLES and _BESIDE_ROLES.issuperset({*words(unit.path[-1])} - {word})
    }
    fused = Counter(unit.path[:-1] for unit in set(unit_of.values()) if _has_fused_name(unit))
    plans = {index: _plan(index, unit, parts, siblings) for index, unit in unit_of.items()}
    alike = Counter(  # layers of one module whose parts would have the same names
        (unit.path[:-1], role)
        for unit, roles in {unit_of[index]: plan.roles for index, plan in plans.items() if plan}.items()
        for role in roles
    )
    moved = {  # where the bias of a layer goes that is split along its input
        dict(unit.parts).get("bias", -1): (*unit.path[:-1], plan.biased, "bias")
        for unit, plan in ((unit_of[index], plan) for index, plan in plans.items() if plan)
        if plan.biased
    }
    for index, part in enumerate(parts):
        pieces = [replace(part, path=moved[index])] if index in moved else [part]
        if plan := plans.get(index):
            unit = unit_of[index]
            leaf = (
                part.path[-1] if len(part.path) > len(unit.path) else kind(part.path[-1])[0].replace("other", "weight")
            )
            own = {role: called.get((unit.path[:-1], role), role) for role in plan.roles}
            module = unit.path[:-1]
            several = fused[module] > 1 or any(alike[module, role] > 1 for role in plan.roles)
            is_apart = several or (numbers(unit.path[-1]) and unit not in completed)
            above = unit.path if is_apart else module
            pieces = _split(part, plan, [(*above, own[role], leaf) for role in plan.roles])
            members = tuple(range(len(result), len(result) + len(pieces)))
            absent = frozenset(m for m, role in zip(members, plan.roles, strict=True) if role in plan.absent)
            fusions.append(Fusion(part.tensor, members, part.view, part.shape, plan, absent))
        result += pieces
    return result, fusions


def _possibly_fused(parts: Sequence[Part], held: Mapping[Sizes, int]) -> dict[int, Unit]:
    """Find the parts of layers with a fused name or a shape that the other side lacks: part -> its layer.

    Left out are those of which the other side has as many layers of this shape.
    """
    units = units_of(parts)

    def is_lacking(shape: Sizes) -> bool:
        flat = squeeze(shape)
        return len(flat) > 1 and flat not in held and flat[::-1] not in held

    lacking = set(filter(is_lacking, {part.shape for part in parts}))
    fused = [
        unit
        for unit in units
        if _has_fused_name(unit) or (lacking and any(parts[index].shape in lacking for _, index in unit.parts))
    ]
    counts = Counter(_matrix(unit, parts) for unit in units) if fused else {}

    def stays(unit: Unit, index: int) -> bool:
        matrix = _matrix(unit, parts)
        return bool(matrix) and counts[matrix] <= held.get(matrix, 0) and squeeze(parts[index].shape) in held

    return {index: unit for unit in fused for _, index in unit.parts if not stays(unit, index)}


def _has_fused_name(unit: Unit) -> bool:
    return not FUSED.keys().isdisjoint(words(_own_name(unit.path)))


def _own_name(path: Path) -> str:
    """Return the name that says what a layer is for: not its number in a list, as in ``in_projs.0``."""
    return next((name for name in reversed(path) if not name.isdigit()), path[-1])


def _role_path(path: Path) -> Path:
    """Leave out the name of a layer of which the module has the role, as in ``q_proj.linear``.

    Of layers that have one as a sequence, each is among those of its number: ``to_q.1`` is the ``to_q`` of the ``1``.
    """
    if len(path) < 2 or _ROLES.isdisjoint(words(path[-2])):
        return path
    if path[-1].isdigit():
        return (*path[:-2], path[-1], path[-2])
    return path[:-1] if LAYER_TYPES.issuperset(words(path[-1])) else path


def _matrix(unit: Unit, parts: Sequence[Part]) -> Sizes:
    """Return the shape of a layer's matrix, empty for a layer without one."""
    weight = dict(unit.parts).get("weight")
    shape = () if weight is None else squeeze(parts[weight].shape)
    return shape if len(shape) > 1 else ()


def _plan(index: int, unit: Unit, parts: Sequence[Part], siblings: _Siblings) -> SplitPlan | None:
    """Plan the split of a tensor; a bias follows its weight."""
    part, fused, kinds = parts[index], words(_own_name(unit.path)), dict(unit.parts)
    weight = kinds.get("weight")
    is_bias = weight is not None and kinds.get("bias") == index
    is_stack = is_bias and len(part.shape) == 2  # of biases
    plan = None if is_stack else siblings.plan(part, fused)
    if plan is None and weight is not None and is_bias:
        plan = siblings.plan(parts[weight], fused)
        if plan is None or (plan.dim > 0) != is_stack or part.shape[-1:] != (sum(plan.sizes),):
            return None
        plan = replace(plan, dim=len(part.shape) - 1, turned=False)
    alternates = plan and plan.dim > 0 and plan.roles == FUSED["gateup"][0] and "bias" in kinds
    return replace(plan, doubt=ALTERNATING) if plan and alternates and len(part.shape) + is_bias == 3 else plan


def _split(part: Part, plan: SplitPlan, paths: Sequence[Path]) -> list[Part]:
    pieces, start = [], 0
    for path, size in zip(paths, plan.sizes, strict=True):
        shape = (*part.shape[: plan.dim], size, *part.shape[plan.dim + 1 :])
        view = chain(part.view, Split(plan.dim, start, size))
        pieces.append(replace(part, path=path, shape=shape, view=view, is_transposed=plan.turned))
        start += size
    return pieces


def _whole(parts: Sequence[Part]) -> Counter[tuple[str, Sizes]]:
    """Count the tensors of layers with a fused name, by the word for it and their shape."""
    counts: Counter[tuple[str, Sizes]] = Counter()
    for unit in units_of(parts):
        for word in words(_own_name(unit.path)):
            for _, index in unit.parts if word in FUSED else ():
                counts[word, squeeze(parts[index].shape)] += parts[index].count
    return counts


_Member = tuple[str, dict[str, Sizes]]  # the name of a layer, and the shapes of its tensors


def _children(parts: Sequence[Part]) -> dict[Path, list[_Member]]:
    """List the layers of each module, in order."""
    children: dict[Path, list[_Member]] = {}
    units = units_of(parts)
    for unit in (units[position] for position in units.ancestry.in_order):
        path = _role_path(unit.path)
        shapes = {values: squeeze(parts[index].shape) for values, index in unit.parts}
        children.setdefault(path[:-1], []).append((path[-1], shapes))
    return children


def _matrices(members: Sequence[_Member]) -> tuple[Sizes, ...]:
    return tuple(sorted(of["weight"] for _, of in members if len(of.get("weight", ())) > 1))


class _Siblings:
    """What one side holds separately: groups of sibling tensors by role."""

    def __init__(
        self,
        parts: Sequence[Part],
        held: Mapping[Sizes, int],
        lacking: Mapping[Sizes, int],
        fused: Sequence[Part],
    ) -> None:
        self.whole = _whole(parts)
        self.fused = _whole(fused) - self.whole  # those that only the other side has
        self.counts = Counter(squeeze(part.shape) for part in fused)
        self.shapes = held
        self.lacking = lacking  # those that only this side has
        self.inputs: dict[int, set[tuple[Sizes, tuple[str, ...], str]]] = {}  # rows -> columns and names of neighbours
        # roles, rest of the shape and dimension -> sizes in that dimension
        self.by_role: dict[tuple[tuple[str, ...], Sizes, int], set[Sizes]] = {}
        self.in_order: dict[Sizes, set[Sizes]] = {}  # rest of the shape -> sizes of neighbours of one shape
        # shape that neighbours would have together, which only they have -> their sizes and names, in every module
        self.joined: dict[Sizes, list[tuple[Sizes, tuple[str, ...]]]] = {}
        self.beside: dict[Sizes, set[Sizes]] = {}  # rest -> sizes of q, k and v, and of the one such layer beside them
        self.initials: dict[tuple[tuple[str, Sizes], ...], dict[str, tuple[str, Sizes]]] = {}  # of neighbours' names
        self.modules = set[tuple[Sizes, ...]]()  # the shapes of all matrices in each
        self.modules_joined: dict[tuple[Sizes, ...], tuple[Sizes, SplitPlan]] = {}  # as above, with q, k and v joined
        self.known: dict[Path, SplitPlan] = {}  # of tensors with which a module holds what one of the other side does
        self.own = _children(fused)
        children = _children(parts)
        for members in children.values():
            matrices = tuple((name, of["weight"]) for name, of in members if len(of.get("weight", ())) > 1)
            self.initials[matrices] = {(*words(name), "-")[0][0]: (name, shape) for name, shape in reversed(matrices)}
            self._add_roles(members)
            self._add_neighbours(members)
            self._add_joined(members)
        self._add_beside(children)

    def _add_roles(self, members: list[tuple[str, dict[str, Sizes]]]) -> None:
        for values in ("weight", "bias"):
            alike: dict[tuple[str, ...], dict[str, Sizes]] = {}  # words beside the role, and all -> role -> shape
            for name, shapes in sorted(members, key=lambda member: -len(words(member[0]))):  # `q` before `pool_q`
                shape, told = shapes.get(values, ()), words(name)
                for word in told if shape and "norm" not in told and (values == "weight" or len(shape) == 1) else ():
                    if word in _ROLES:
                        for of in ((), tuple(other for other in told if other != word)):
                            alike.setdefault(of, {})[word] = shape
            for sizes in alike.values():
                self._add_role_sizes(sizes)

    def _add_role_sizes(self, sizes: Mapping[str, Sizes]) -> None:
        for roles in _ROLE_LISTS if len(sizes) > 1 else ():
            present = tuple(role for role in roles if role in sizes)
            for dim in range(min(len(sizes[role]) for role in present) - 1 or 1) if len(present) > 1 else ():
                rests = {(*sizes[role][:dim], *sizes[role][dim + 1 :]) for role in present}
                if len(rests) == 1:  # of a stack, the rows are in the second dimension
                    found = self.by_role.setdefault((present, rests.pop(), dim), set())
                    found.add(tuple(sizes[role][dim] for role in present))

    def _add_neighbours(self, members: list[tuple[str, dict[str, Sizes]]]) -> None:
        matrices = [shapes["weight"] for _, shapes in members if len(shapes.get("weight", ())) > 1]
        for first, second in pairwise(matrices):
            if first == second:
                self.in_order.setdefault(first[1:], set()).add((first[0], second[0]))
        for first, second, third in zip(matrices, matrices[1:], matrices[2:], strict=False):
            if first == second == third:
                self.in_order.setdefault(first[1:], set()).add((first[0],) * 3)
        for start, count in product(range(len(members)), range(2, _MAX_JOINED + 1)):
            run = [(name, of.get("weight", ())) for name, of in members[start : start + count]]
            rests = {shape[1:] for _, shape in run}
            if len(run) == count and len(rests) == 1 and all(shape and self.lacking.get(shape, 0) for _, shape in run):
                sizes = tuple(shape[0] for _, shape in run)
                found = self.joined.setdefault((sum(sizes), *rests.pop()), [])
                found.append((sizes, tuple(name for name, _ in run)))
        layers = [
            (name, of) for name, of in members if len(of.get("weight", ())) == 2 and _NO_INPUT.isdisjoint(words(name))
        ]
        for count in (2, 3):
            for start in range(len(layers) - count + 1):
                names, shapes = zip(*layers[start : start + count], strict=True)
                biased = [name for name, of in zip(names, shapes, strict=True) if "bias" in of]
                if len({of["weight"][0] for of in shapes}) == 1 and len(biased) < 2:
                    sizes = tuple(of["weight"][1] for of in shapes)
                    self.inputs.setdefault(shapes[0]["weight"][0], set()).add((sizes, names, (*biased, "")[0]))

    def _add_joined(self, members: Sequence[_Member]) -> None:
        self.modules.add(_matrices(members))
        for roles in (_QKV, _QKV[1:]):
            named = [(words(name), shapes.get("weight", ())) for name, shapes in members if "norm" not in words(name)]
            of = {word: shape for told, shape in named for word in told if word in roles}
            if len(of) == len(roles) and len({shape[1:] for shape in of.values()}) == 1 and all(of.values()):
                sizes = tuple(of[role][0] for role in roles)
                shape = (sum(sizes), *of[roles[0]][1:])
                rest = Counter(_matrices(members)) - Counter(of.values())
                plan = SplitPlan(0, sizes, roles, BY_ORDER if len(set(sizes)) == 1 else "", unnamed=True)
                self.modules_joined[tuple(sorted([*rest.elements(), shape]))] = shape, plan

    def completes(self, unit: Unit, parts: Sequence[Part]) -> bool:
        """True if the module of a layer would hold what one of this side does if the layer were split."""
        members = self.own[_role_path(unit.path)[:-1]]
        shape, plan = self.modules_joined.get(of := _matrices(members), ((), None))
        index = dict(unit.parts)["weight"]
        if plan is None or of in self.modules or of.count(shape) > 1 or squeeze(parts[index].shape) != shape:
            return False
        self.known[parts[index].path] = plan
        return True

    def _add_beside(self, children: Mapping[Path, list[tuple[str, dict[str, Sizes]]]]) -> None:
        for path, members in children.items():
            by_word = {word: shapes.get("weight", ()) for name, shapes in members for word in words(name)}
            shapes = [by_word.get(role, ()) for role in _QKV]
            if len(rests := {shape[1:] for shape in shapes}) > 1 or not all(rests):
                continue
            (rest,) = rests
            others = [of.get("weight", ()) for _, of in children.get(path[:-1], ())] if path else []
            if len(alike := [shape for shape in others if shape[1:] == rest]) == 1:
                self.beside.setdefault(rest, set()).add(tuple(shape[0] for shape in [*shapes, *alike]))

    def plan(self, part: Part, named: Sequence[str]) -> SplitPlan | None:
        """Return the split that this side calls for in a tensor of the other, or None."""
        shape = squeeze(part.shape)
        if not shape or shape[0] != part.shape[0]:
            return None
        if part.path in self.known:
            return self.known[part.path]
        plan = self._plan(shape, named)
        return plan if plan is None or plan.dim == 0 or shape == part.shape else None

    def _plan(self, shape: Sizes, named: Sequence[str]) -> SplitPlan | None:
        fused = [word for word in named if word in FUSED]
        for word in fused:
            if (self.whole[word, shape] or self.whole[word, shape[::-1]]) and not self.fused[word, shape]:
                return None
            if plan := next(self._splits(word, shape), None):
                return plan
        if shape in self.shapes or shape[::-1] in self.shapes or len(shape) < 2:
            return None
        for word in named if not fused else ():
            if plan := self._spelled(word, shape):
                return plan
        if not fused:
            for roles in (_QKV, _QKV[1:]):
                for sizes in sorted(self.by_role.get((roles, shape[1:], 0), ())):
                    if sum(sizes) == shape[0]:
                        return SplitPlan(0, sizes, roles, BY_ORDER if len(set(sizes)) == 1 else "", unnamed=True)
            for sizes in sorted(self.beside.get(shape[1:], ())):
                if sum(sizes) == shape[0]:
                    return SplitPlan(0, sizes, (*_QKV, "mlp"), BY_ORDER)
        for sizes in sorted(self.in_order.get(shape[1:], ())):
            if sum(sizes) == shape[0] and (not fused or len(sizes) == len(FUSED[fused[0]][0])):
                (roles, *_) = FUSED[fused[0] if fused else "qkv" if len(sizes) == 3 else "gateup"]
                is_usual = len(sizes) == 2 and (fused or tuple(named) in GATE_FIRST)
                return SplitPlan(0, sizes, roles, BY_ORDER if is_usual else UNCERTAIN_ORDER)
        for sizes, names, biased in sorted(self.inputs.get(shape[0], ())) if len(shape) == 2 else ():
            if sum(sizes) == shape[1] and all(
                self.lacking.get((shape[0], size), 0) >= sizes.count(size) for size in sizes
            ):
                return SplitPlan(1, sizes, names, UNCERTAIN_ORDER, biased=biased)
        joined = self.joined.get(shape, [])
        if len(set(joined)) == 1 and len(joined) == self.counts[shape]:
            sizes, names = joined[0]
            return SplitPlan(0, sizes, names, UNCERTAIN_ORDER)
        return None

    def _spelled(self, word: str, shape: Sizes) -> SplitPlan | None:
        """Split a tensor whose name has the initials of its parts, in their order, as ``gqkv``."""
        if not _MIN_INITIALS <= len(set(word)) == len(word):
            return None
        for initials in self.initials.values():
            parts = [initials[letter] for letter in word if letter in initials]
            sizes = tuple(part[0] for _, part in parts)
            if len(parts) == len(word) and sum(sizes) == shape[0] and {part[1:] for _, part in parts} == {shape[1:]}:
                return SplitPlan(0, sizes, tuple(name for name, _ in parts))
        return None

    def _splits(self, word: str, shape: Sizes) -> Iterator[SplitPlan]:
        for roles, dim in product(FUSED[word], range(min(len(shape), 3))):
            rest = (*shape[:dim], *shape[dim + 1 :])
            turned = dim == len(shape) - 1 > 0
            for (present, other, rows), found in self.by_role.items():
                if other != rest or rows != dim - turned or not set(present) <= set(roles):
                    continue
                for sizes in sorted(found):
                    if present == roles and sum(sizes) == shape[dim]:
                        yield SplitPlan(dim, sizes, roles, turned=turned)
                    elif len(set(sizes)) == 1 and sizes[0] * len(roles) == shape[dim]:
                        absent = frozenset(roles) - set(present)
                        yield SplitPlan(dim, sizes[:1] * len(roles), roles, absent=absent, turned=turned)
