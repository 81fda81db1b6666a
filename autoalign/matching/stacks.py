"""Stacks: tensors that hold what the other side lists, as all layers of a scan, or experts, along one dimension.

Such a tensor is matched as the list that it stands for: its slices take part under keys of their own, with the number
of each, and what is found for them is put back together.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, product
from math import prod

from autoalign.matching.confidence import AMBIGUOUS
from autoalign.matching.features import is_alphabetical
from autoalign.matching.layers import layout_of, parts_of, squeeze, units_of
from autoalign.matching.names import kind, words
from autoalign.matching.paths import Path
from autoalign.matching.vocabulary import FUSED, KERNELS, ROLES
from autoalign.plan.keys import components, natural, numbers, stem, template
from autoalign.plan.matches import Candidate, Match, Mismatch
from autoalign.plan.operations import Copy, Grouped, Operation, Shape, Split, Transpose, Unstack, chain, in_parallel
from autoalign.plan.regions import joined, place_of
from autoalign.plan.specs import TensorSpec

_DIMS = (0, 1, -1, 2, -2)  # along which code stacks, the most frequent first
_MIN_SHARE, _MAX_SHARE = 0.5, 1.5  # of the elements in a member of the list, that the slices of one number hold
_MAX_FUSED = 4  # tensors of the list that one of the stack may hold, or the other way round
_MIN_EXACT = 0.5  # share of the tensors of a stack whose slices are in the list as they are
_HEAD = re.compile(r"heads?[._]?\d")  # a member of a list of heads
_OTHER_DIM = "right shape, but the layers may be stacked along another dimension of this size"

Specs = Sequence[TensorSpec]
_Ways = tuple[tuple[str, ...], Operation]  # sources, and what makes a tensor of them


@dataclass(frozen=True, slots=True)
class Slice:
    """Where a slice is in its tensor."""

    key: str  # of the tensor
    view: Operation
    otherwise: Operation | None = None  # the slice along another dimension that would do as well


Slices = Mapping[str, Slice]  # by the keys under which they take part


@dataclass(frozen=True, slots=True)
class _List:
    """Modules or tensors of one name, with numbers, that hold the same."""

    count: int
    shapes: frozenset[Shape]  # that the other side lacks
    numel: int  # of the tensors of these shapes in one member
    bare: bool  # whether its matrices have names of their own, not those of a layer's
    is_heads: bool  # whether its name says that its members are heads of attention


@dataclass(frozen=True, slots=True)
class _Stack:
    """Tensors that are stacked along one dimension."""

    members: tuple[int, ...]  # their places among the specs
    like: _List
    dim: int
    other_dim: int | None  # that would do as well
    depth: int  # of the module in their paths whose tensors they are in each member
    around: Path  # the module that the members are in
    turned: bool = False  # whether its matrices are those of the list transposed
    roles: tuple[str, ...] = ()  # that each tensor holds, one after the other, where the list has a layer for each


def unstacked(specs: Specs, others: Specs, pinned: Collection[str] = ()) -> tuple[Specs, Slices]:
    """Slice the tensors that hold what the other side lists; pinned ones stay whole.

    >>> import torch
    >>> shapes = {"up": (8, 4), "down": (4, 8)}
    >>> listed = [TensorSpec(f"h.{n}.{k}", shape, torch.float32) for n in range(3) for k, shape in shapes.items()]
    >>> stacked = [TensorSpec(f"h.{k}", (shape[0], 3, shape[1]), torch.float32) for k, shape in shapes.items()]
    >>> specs, slices = unstacked(stacked, listed)
    >>> [spec.key for spec in specs] == [spec.key for spec in listed], slices["h.2.up"].view
    (True, Unstack(dim=1, index=2))
    """
    slices: dict[str, Slice] = {}
    is_turned = False
    while found := list(_stacks(specs, others, pinned)):  # once more for the experts in layers
        taken = {place: stack for stack in found for place in stack.members}
        ordered = not is_alphabetical([spec.key for spec in specs])
        kept: list[TensorSpec] = []
        for place, spec in enumerate(specs):
            if place not in taken:
                kept.append(spec)
            elif place == taken[place].members[0]:
                kept += _sliced(specs, taken[place], slices)
        specs = kept if ordered else sorted(kept, key=lambda spec: natural(spec.key))
        is_turned |= any(stack.turned for stack in found)
    return _with_layers_turned(specs, slices) if is_turned else specs, slices


def _with_layers_turned(specs: Specs, slices: dict[str, Slice]) -> Specs:
    """Turn the other matrices of layers as those of a stack were, if their biases show that they are (in, out) too."""
    others = [spec for spec in specs if spec.key not in slices]
    parts = parts_of(others)
    turned = set[str]()
    for kinds in (dict(unit.parts) for unit in (units_of(parts) if layout_of(parts) < 0 else ())):
        if kinds.keys() == {"weight", "bias"}:
            weight, bias = parts[kinds["weight"]], parts[kinds["bias"]]
            is_kernel = weight.path[-1].endswith(KERNELS)  # those are turned anyway
            if len(weight.shape) == 2 and bias.shape == weight.shape[1:] and not is_kernel:
                turned.add(others[weight.tensor].key)
    slices |= {key: Slice(key, Transpose()) for key in turned}
    return [replace(spec, shape=spec.shape[::-1]) if spec.key in turned else spec for spec in specs]


def _sliced(specs: Specs, stack: _Stack, slices: dict[str, Slice]) -> Iterator[TensorSpec]:
    """Yield the slices of a stack, number by number, and add where they are."""
    members = [specs[place] for place in stack.members]
    wholes = [slices.pop(spec.key, Slice(spec.key, Copy())) for spec in members]
    weight = "kernel" if any(spec.key.endswith(KERNELS) for spec in specs) else "weight"
    for index in range(stack.like.count):
        for (spec, whole), (number, role) in product(
            zip(members, wholes, strict=True), enumerate(stack.roles or ("",))
        ):
            path, rows = components(spec.key), spec.shape[stack.dim] // stack.like.count // max(len(stack.roles), 1)
            is_split = spec.shape[stack.dim] > stack.like.count  # along its rows, into heads
            shape = (rows, *spec.shape[1:]) if is_split else _without(spec.shape, stack.dim)
            values, _ = kind(path[-1])
            is_turned = stack.turned and len(shape) == 2 and values != "bias" and weight != "kernel"  # turned anyway
            is_bare = len(squeeze(shape)) > 1 and values == "other"
            inner = (*path[stack.depth :], weight) if is_bare and not stack.like.bare else path[stack.depth :]
            inner = (role, values) if role else inner
            name = ".".join((*stack.around, str(index), *inner))
            start = (number * stack.like.count + index) * rows
            ways = (
                Split(dim, start, rows) if is_split else Unstack(dim % len(spec.shape), index)
                for dim in (stack.dim, stack.other_dim)
                if dim is not None
            )
            view, *otherwise = (chain(whole.view, way, Transpose() if is_turned else Copy()) for way in ways)
            slices[name] = Slice(whole.key, view, *otherwise)
            yield TensorSpec(name, shape[::-1] if is_turned else shape, spec.dtype)


def _without(shape: Shape, dim: int) -> Shape:
    dim %= len(shape)
    return (*shape[:dim], *shape[dim + 1 :])


@lru_cache(maxsize=4096)
def _size(shape: Shape) -> Shape:
    """Return what tensors have in common in whatever order their dimensions are."""
    return tuple(sorted(squeeze(shape)))


@lru_cache(maxsize=4096)
def _sizes(shape: Shape) -> frozenset[Shape]:
    """Return what tensors have in common with one whose heads are kept apart, and with itself."""
    short = squeeze(shape)
    pairs = combinations(range(len(short)), 2) if len(short) in (2, 3) else ()
    merged = ((short[a] * short[b], *(size for k, size in enumerate(short) if k not in (a, b))) for a, b in pairs)
    return frozenset(map(_size, (shape, *merged)))


def _is_fused(own: Shape, other: Shape) -> bool:
    """True if one of two tensors may hold several like the other, or a part of one."""
    own, other = _size(own), _size(other)
    several = prod(own) <= _MAX_FUSED * prod(other) and prod(other) <= _MAX_FUSED * prod(own)
    return several and len(own) == len(other) < 3 and (len(own) == 1 or not set(own).isdisjoint(other))


def _stacks(specs: Specs, others: Specs, pinned: Collection[str]) -> Iterator[_Stack]:
    """Find the tensors to slice: those of shapes that the other side lacks, where this side lacks its lists."""
    sizes = [Counter[Shape](), Counter[Shape]()]
    for known, side in zip(sizes, (specs, others), strict=True):
        for shape, number in Counter(spec.shape for spec in side).items():
            known[_size(shape)] += number
    surplus = {size for size, number in sizes[0].items() if number > 2 * sizes[1][size]}
    lacking = {size for size, number in sizes[1].items() if number > sizes[0][size]}
    if lacking and any("head" in spec.key and _HEAD.search(spec.key) for spec in others):
        yield from _split_by_head(specs, [of for of in _lists(others, lacking) if of.is_heads], pinned)
    if not surplus or not lacking:
        return
    left = {k for k, spec in enumerate(specs) if _size(spec.shape) in surplus and spec.key not in pinned}
    numels = {prod(size) for size in lacking}
    lengths = {  # that lists may have by the sizes of what they hold
        length
        for shape in {specs[place].shape for place in left}
        for length in shape
        if any(1 / _MAX_FUSED <= prod(shape) / max(length * numel, 1) <= _MAX_FUSED for numel in numels)
    }
    if not lengths:
        return
    lists: dict[int, list[_List]] = {}
    for known_list in _lists(others, lacking):
        if known_list.count in lengths:
            lists.setdefault(known_list.count, []).append(known_list)
    for count, alike in lists.items():
        by_dim = {dim: _held(specs, left, dim, alike) for dim in _DIMS}
        dim = max(_DIMS, key=lambda dim: sum(by_dim[dim].values()))
        held = by_dim[dim]
        others_dims = (d for d in _DIMS if by_dim[d] == held and any((d - dim) % len(specs[k].shape) for k in held))
        other_dim = next(others_dims, None)
        most = max(of.numel for of in alike)
        for members, depth in _grouped(specs, list(held), count, most):
            numel = sum(specs[place].numel // count for place in members)
            near = [of for of in alike if numel >= _MIN_SHARE * of.numel]
            is_exact = sum(held[place] for place in members) >= _MIN_EXACT * len(members)
            if near and is_exact:
                around = _around(specs, members[0], depth, count)
                turned = _is_turned([_without(specs[place].shape, dim) for place in members], near[0].shapes)
                yield _Stack(tuple(members), near[0], dim, other_dim, depth, around, turned)
                left.difference_update(members)


def _split_by_head(specs: Specs, lists: Iterable[_List], pinned: Collection[str]) -> Iterator[_Stack]:
    """Find the projections to queries, keys and values of all heads, which the other side lists head by head."""
    modules: dict[Path, dict[str, list[int]]] = {}
    for place, spec in enumerate(specs):
        path = components(spec.key)
        rest = kind(path[-1])[1]
        layer = (*path[:-1], rest) if rest else path[:-1]
        for role in (ROLES | {"qkv"}).intersection(words(layer[-1])) if layer and spec.key not in pinned else ():
            modules.setdefault(layer[:-1], {}).setdefault(role, []).append(place)
    for module, found in modules.items():
        members = tuple(sorted(place for places in found.values() for place in places))
        roles = FUSED["qkv"][0] if found.keys() == {"qkv"} else ()
        for of in lists if roles or found.keys() == ROLES else ():
            shapes = {(shape[0] * of.count * max(len(roles), 1), *shape[1:]) for shape in of.shapes if shape}
            if shapes.issuperset(specs[place].shape for place in members):
                yield _Stack(members, of, 0, None, len(module), module, roles=roles)
                break


def _is_turned(slices: Iterable[Shape], listed: Collection[Shape]) -> bool:
    """True if more matrices fit the listed ones transposed only than as they are only; some hold several of these."""

    def fits(shape: Shape) -> bool:
        return any(len(of) == 2 and of[1] == shape[1] and _is_fused(of, shape) for of in listed)

    votes = [fits(shape[::-1]) - fits(shape) for shape in slices if len(shape) == 2]
    return sum(votes) > 0


def _around(specs: Specs, member: int, depth: int, count: int) -> Path:
    """Return the module that gets the members: if it holds such a list in one place, that is where they belong."""
    path = components(specs[member].key)
    lists: dict[Path, set[str]] = {}
    for other in (components(spec.key) for spec in specs) if len(path) == depth + 1 else ():
        for place, name in enumerate(other[depth:], depth) if other[:depth] == path[:depth] else ():
            if name.isdigit():
                lists.setdefault(other[:place], set()).add(name)
    found = [module for module, names in lists.items() if names == set(map(str, range(count)))]
    return found[0] if len(found) == 1 else path[:depth]


def _held(specs: Specs, places: Iterable[int], dim: int, lists: Sequence[_List]) -> dict[int, bool]:
    """Return the tensors whose slices along a dimension the lists hold, in order; True for those held as they are."""
    held = {}
    for place in sorted(places):
        shape = specs[place].shape
        if not -len(shape) <= dim < len(shape) or shape[dim] != lists[0].count:
            continue
        inner = _without(shape, dim)
        shapes = {other for of in lists for other in of.shapes}
        is_exact = any(not _sizes(inner).isdisjoint(_sizes(other)) for other in shapes)
        if is_exact or any(_is_fused(inner, other) for other in shapes):
            held[place] = is_exact
    return held


def _lists(specs: Specs, lacking: Collection[Shape]) -> Iterator[_List]:
    """Yield the lists with tensors of these sizes; of several alike, such as the experts of each layer, one."""
    first: dict[tuple[Path, str], Path] = {}
    lists: dict[tuple[Path, str], dict[str, list[TensorSpec]]] = {}
    for spec in specs:
        if _size(spec.shape) not in lacking:
            continue
        path = components(spec.key)
        for depth, name in enumerate(path):
            if numbers(name):
                place = template(path[:depth]), stem(name)
                if first.setdefault(place, path[:depth]) == path[:depth]:
                    lists.setdefault(place, {}).setdefault(name, []).append(spec)
    for (above, name), members in lists.items():
        contents = {tuple(sorted(spec.shape for spec in listed)) for listed in members.values()}
        if len(members) > 1 and len(contents) == 1:
            listed = next(iter(members.values()))
            shapes = {spec.shape for spec in listed}
            for spec in listed:  # a list in this one may be stacked too
                path = components(spec.key)
                for depth, inner in enumerate(path[len(above) + 1 :], len(above) + 1):
                    known = lists.get((template(path[:depth]), stem(inner)), {})
                    shapes |= {(len(known), *spec.shape)} if len(known) > 1 else set()
            is_bare = any(
                len(squeeze(spec.shape)) > 1 and kind(components(spec.key)[-1])[0] == "other" for spec in listed
            )
            is_heads = "head" in {*words(name), *(words(above[-1]) if above else ())}
            numel = sum(spec.numel for spec in listed)
            yield _List(len(members), frozenset(shapes), numel, is_bare, is_heads)


def _grouped(specs: Specs, chosen: Sequence[int], count: int, most: int) -> Iterator[tuple[list[int], int]]:
    """Group tensors by the modules that hold nothing else, or by that which holds them; yield these modules' depths."""
    paths = {place: components(specs[place].key) for place in chosen}
    inside = Counter(path[:depth] for path in paths.values() for depth in range(len(path)))
    below = Counter(
        path[:depth]
        for path in (components(spec.key) for spec in (specs if chosen else ()))
        for depth in range(len(path))
        if path[:depth] in inside
    )

    def placed(depth: int, members: list[int]) -> Iterator[tuple[list[int], int]]:
        children: dict[Path, list[int]] = {}  # the tensors right in the module are as one, under an empty path
        for place in members:
            is_inner = len(paths[place]) > depth + 1
            children.setdefault(paths[place][: depth + 1] if is_inner else (), []).append(place)
        is_more = sum(specs[place].numel // count for place in members) > _MAX_SHARE * most
        if () not in children if len(children) == 1 else is_more:
            for child, of in children.items():
                yield from placed(depth + 1, of) if child else [(of, depth)]
        else:
            yield members, depth

    tops: dict[Path, list[int]] = {}  # by the module around the outermost one that holds nothing else
    for place, path in paths.items():
        depth = next((depth for depth in range(len(path)) if inside[path[:depth]] == below[path[:depth]]), len(path))
        tops.setdefault(path[: max(depth - 1, 0)], []).append(place)
    for module, members in tops.items():
        yield from placed(len(module), members)


def restacked(matches: Iterable[Match], own: Slices, other: Slices, targets: Specs) -> list[Match]:
    """Put what was found for slices back together; a tensor with a slice that nothing fills gets no match."""
    shapes = {spec.key: spec.shape for spec in targets}
    members: dict[str, list[Match]] = {}
    slices: dict[str, list[Slice]] = {}
    turns = (False, True) if any(known.otherwise for known in own.values()) else (False,)
    result = []
    for match in matches:
        if match.target not in other and own.keys().isdisjoint(
            key for sources, _ in _proposals(match) for key in sources
        ):
            result.append(match)
            continue
        known = other.get(match.target, Slice(match.target, Copy()))
        members.setdefault(known.key, []).append(match)
        slices.setdefault(known.key, []).append(known)
    for key, parts in members.items():
        views = [[known.view for known in slices[key]]]
        if all(known.otherwise for known in slices[key]):
            views.append([known.otherwise or known.view for known in slices[key]])
        proposals = list(zip(*map(_proposals, parts), strict=False))
        ways = [_whole(proposals[0], of, own, shapes[key], turned=turned) for of in views for turned in turns]
        ways += [_whole(each, views[0], own, shapes[key]) for each in proposals[1:]]
        (first, *rest) = dict.fromkeys(ways)
        if first is None:
            continue
        least = min(parts, key=lambda match: match.confidence)
        warnings = [text for match in parts for text in match.warnings]
        is_open = len({*ways[: len(turns) * len(views)]} - {None}) > 1
        result.append(
            replace(
                least,
                target=key,
                sources=first[0],
                operation=first[1],
                confidence=min(least.confidence, AMBIGUOUS) if is_open else least.confidence,
                alternatives=tuple(Candidate(*way, 0.0) for way in rest if way),
                warnings=tuple(dict.fromkeys([*warnings, *[_OTHER_DIM] * is_open])),
            )
        )
    return result


def _proposals(match: Match) -> list[_Ways]:
    return [(match.sources, match.operation), *((way.sources, way.operation) for way in match.alternatives)]


def _whole(
    parts: Sequence[_Ways], views: Sequence[Operation], own: Slices, shape: Shape, *, turned: bool = False
) -> _Ways | None:
    """Return what makes a tensor of this shape, of which ``views`` are the slices, each made in its way; or None."""
    order = sorted(range(len(parts)), key=lambda place: place_of(views[place]))
    join = joined(shape, [views[place] for place in order])
    known = [[own.get(key, Slice(key, Copy())) for key in parts[place][0]] for place in order]
    sources = tuple(each.key for of in known for each in of)
    views = [(turned and each.otherwise) or each.view for of in known for each in of]
    taken, made = in_parallel(views), [parts[place][1] for place in order]
    if join is None or len(set(zip(sources, views, strict=True))) < len(sources):
        return None
    if len(sources) == len(parts):
        return sources, chain(taken, in_parallel(made), join)
    if len(set(made)) > 1 or len(set(map(len, known))) > 1:
        return None
    return sources, chain(taken, Grouped(len(known[0]), made[0]) if len(parts) > 1 else made[0], join)


def whole_mismatches(
    mismatched: Iterable[Mismatch], own: Slices, other: Slices, sides: tuple[Specs, Specs]
) -> list[Mismatch]:
    """Return the mismatches of the tensors that slices are of, once each."""
    shapes = [{spec.key: spec.shape for spec in specs} for specs in sides]
    keys = [
        (other.get(item.key, item).key, own[item.source_key].key if item.source_key in own else item.source_key)
        for item in mismatched
    ]
    return [Mismatch(key, source, shapes[1][key], shapes[0][source]) for key, source in dict.fromkeys(keys)]
