"""One side as it is matched: its tensors as parts, grouped into units (layers), and the tree of modules above them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import repeat
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray

from autoalign.matching.names import kind, role_words, words
from autoalign.matching.paths import MAX_NAMED_SIBLINGS, Path, paths_of, top_module
from autoalign.matching.vocabulary import EMBEDDING_WORDS, TORCH_NAMES
from autoalign.plan.keys import common_prefix, numbers, stem
from autoalign.plan.operations import Copy, Operation, Permute, Shape
from autoalign.plan.specs import TensorSpec

_Tree = dict[tuple[str, bool], "_Tree | int"]  # name, True for a tensor -> the content of the module, or the leaf


def squeeze(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Leave out the dimensions of size one.

    >>> squeeze((1, 1, 768))
    (768,)
    """
    return tuple(size for size in shape if size != 1)


def block_around(path: Path) -> Path:
    """Find the innermost numbered module around a layer, or the root.

    >>> block_around(("layer1", "0", "conv2"))
    ('layer1', '0')
    """
    depth = len(path) - 1
    while depth > 0 and not numbers(path[depth - 1]):
        depth -= 1
    return path[: max(depth, 0)]


@dataclass(frozen=True, slots=True)
class Ancestry:
    """The module graph as arrays. Leaf ``i`` is the tensor that was ``i``-th in the input."""

    node_count: int  # of modules; module 0 is the root
    ancestors: NDArray[np.int32]  # [leaves, depth]: module ids from the nearest up to the root, padded with -1
    order: NDArray[np.int64]  # [leaves]: position in natural order
    in_order: NDArray[np.int64]  # [leaves]: the leaves in natural order
    nodes: tuple[Path, ...]  # the path of each module


def ancestry(paths: Sequence[Path]) -> Ancestry:
    """Build the tree of modules above the given tensor paths; a module with a single child counts as that child.

    Natural order is the order of registration, but children whose names differ in their numbers alone and which are
    sorted as text are ordered by these numbers: files sorted by key put ``layers.10`` before ``layers.2``. A tensor and
    a module may share a name.

    >>> ancestry([("h", "10", "w"), ("h", "2", "w"), ("w",)]).in_order.tolist()
    [1, 0, 2]
    """
    tree: _Tree = {}
    for index, path in enumerate(paths):
        module = tree
        for name in path[:-1]:
            module = module.setdefault((name, False), {})  # type: ignore[assignment]
        module[path[-1], True] = index
    in_order: list[int] = []
    chains: list[list[int]] = [[] for _ in paths]  # of each leaf: the modules above it, from the nearest
    nodes: list[Path] = []
    stack: list[tuple[Path, _Tree | int, list[int]]] = [((), tree, [])]
    while stack:
        path, found, above = stack.pop()
        if isinstance(found, int):
            in_order.append(found)
            chains[found] = above
            continue
        if len(found) != 1 or not nodes:
            above = [len(nodes), *above]
            nodes.append(path)
        stack += [((*path, child[0]), found[child], above) for child in reversed(_by_number(list(found)))]
    depth = max(map(len, chains), default=0) or 1
    padded = [above + [-1] * (depth - len(above)) for above in chains]
    ancestors = np.asarray(padded, dtype=np.int32).reshape(len(paths), depth)
    order = np.zeros(len(paths), dtype=np.int64)
    order[in_order] = np.arange(len(paths))
    return Ancestry(len(nodes), ancestors, order, np.asarray(in_order, dtype=np.int64), tuple(nodes))


def _by_number(siblings: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Sort siblings of one stem that are sorted as text by their numbers, each stem within the places it holds."""
    places: dict[str, list[int]] = {}
    for place, (name, _) in enumerate(siblings):
        places.setdefault(stem(name), []).append(place)
    if len(places) == len(siblings):
        return siblings
    ordered = list(siblings)
    for same in places.values():
        names = [siblings[place][0] for place in same]
        if len(same) > 1 and names == sorted(names):
            members = sorted((siblings[place] for place in same), key=lambda child: numbers(child[0]))
            for place, child in zip(same, members, strict=True):
                ordered[place] = child
    return ordered


_WHOLE = Copy()
_STEP = re.compile(r"(?<=\d)_(?=\d)")  # in "branch2_0": a branch, and a step of it


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor, or a part of one, that is matched with one of the other side."""

    tensor: int  # index among the side's tensors
    path: Path  # the names of its modules and its own
    shape: tuple[int, ...]
    numeric: str  # "float", "int" or "bool": tensors of one kind of number only match their like
    view: Operation = _WHOLE  # takes the part out of its tensor
    is_transposed: bool = False  # the split shows that the matrix is transposed
    count: int = 1  # how many tensors of equal blocks it stands for
    by_order: bool = False  # its kind is inferred from its place among the tensors of its layer


def parts_of(specs: Sequence[TensorSpec], counts: Sequence[int] | None = None) -> list[Part]:
    """Make one part of each tensor, which may stand for several (see ``repeats``).

    Integers of eight bits are quantised floats; wider ones are indices and counters.

    >>> spec = TensorSpec("conv2_block1_bn/gamma:0", (8,), torch.float32)
    >>> parts_of([spec])[0].path
    ('conv2', 'block1', 'bn', 'gamma')
    """
    paths = paths_of([spec.key for spec in specs], [spec.shape for spec in specs])
    return [
        Part(index, path, spec.shape, _numeric(spec.dtype), count=count)
        for index, (path, spec, count) in enumerate(zip(paths, specs, counts or repeat(1, len(specs)), strict=True))
    ]


def lists_of(paths: Sequence[Path]) -> dict[tuple[Path, str], dict[Path, list[int]]]:
    """Group the members of each list, of modules and of layers, and the places of the layers in each.

    >>> lists_of([("h", "0", "fc"), ("h", "1", "fc")])
    {(('h',), '#'): {('h', '0'): [0], ('h', '1'): [1]}}
    """
    lists: dict[tuple[Path, str], dict[Path, list[int]]] = {}
    for place, path in enumerate(paths):
        for depth, name in enumerate(path):
            if numbers(name):
                members = lists.setdefault((path[:depth], stem(name)), {})
                members.setdefault(path[: depth + 1], []).append(place)
    return lists


def slots_of(paths: Sequence[Path]) -> list[Path]:
    """Return the paths of layers without the numbers of their lists; numbers of a few siblings stay.

    >>> slots_of([("h", str(n), f"norm{k}") for n in range(2) for k in (1, 2)])[:2]
    [('h', '#', 'norm1'), ('h', '#', 'norm2')]
    """
    long = {
        member
        for (_, name), members in lists_of(paths).items()
        if name == "#" or len(members) > MAX_NAMED_SIBLINGS
        for member in members
    }
    return [
        tuple([stem(name) if path[: depth + 1] in long else name for depth, name in enumerate(path)]) for path in paths
    ]


def under_one_root(parts: Sequence[Part], others: Sequence[Part] = ()) -> list[Part]:
    """Put all parts into one module without a name, instead of the modules that all of them are in.

    The last of these stays if the other side has most of its parts in one of that name, beside others.

    >>> [part.path for part in under_one_root(parts_of([TensorSpec("module.net.fc.weight", (8,), torch.float32)]))]
    [('', 'fc', 'weight')]
    """
    top = len(top_module([part.path for part in parts]))
    if parts and top and others:
        start = len(top_module([part.path for part in others]))
        held = sum(part.path[start : start + 1] == parts[0].path[top - 1 : top] for part in others)
        top -= 2 * held > len(others)
    return [replace(part, path=("", *part.path[top:])) for part in parts]


@lru_cache
def _numeric(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    if dtype.is_floating_point or dtype.is_complex or dtype.itemsize == 1:
        return "float"
    return "int"


@dataclass(frozen=True, slots=True)
class Unit:
    """Parts that belong to one layer, at most one of each kind."""

    path: Path  # of the layer; unique within a side
    parts: tuple[tuple[str, int], ...]  # kind of values -> index of the part, sorted by kind

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of values that the layer holds."""
        return tuple(name for name, _ in self.parts)


class Units(tuple[Unit, ...]):
    """The units of one side, in order of their first part, with values computed once from their paths."""

    @cached_property
    def paths(self) -> list[Path]:
        """The path of each."""
        return [unit.path for unit in self]

    @cached_property
    def ancestry(self) -> Ancestry:
        """The modules above them."""
        return ancestry(self.paths)

    @cached_property
    def blocks(self) -> list[Path]:
        """The innermost numbered module around each."""
        return list(map(block_around, self.paths))


class Parts(tuple[Part, ...]):
    """The parts of one side, and their units, grouped once."""

    @cached_property
    def units(self) -> Units:
        """The parts of each layer."""
        return _grouped(self)

    def changed(self, parts: Sequence[Part]) -> Parts:
        """Return these parts as ``Parts``: this object, with the units it has, if they are the same."""
        return self if self == tuple(parts) else Parts(parts)


def counts_of(units: Sequence[Unit], parts: Sequence[Part]) -> NDArray[np.int64]:
    """Return how many layers of equal blocks each unit stands for."""
    return np.asarray([parts[unit.parts[0][1]].count for unit in units], dtype=np.int64)


def units_of(parts: Sequence[Part]) -> Units:
    """Group the parts of one side into units, in order of their first part.

    >>> parts = [Part(k, tuple(key.split(".")), (8,), "float") for k, key in enumerate(["bn.weight", "bn.bias", "cls"])]
    >>> [(unit.path, unit.parts) for unit in units_of(parts)]
    [(('bn',), (('bias', 1), ('weight', 0))), (('cls',), (('other', 2),))]
    """
    return parts.units if isinstance(parts, Parts) else _grouped(parts)


def _grouped(parts: Sequence[Part]) -> Units:
    places: list[tuple[Path, str]] = []
    for part in parts:
        values, rest = kind(part.path[-1])
        if values == "bias" and rest and sum(size > 1 for size in part.shape) > 1:
            values, rest = "other", part.path[-1]  # a table of biases is no bias of a layer
        places.append(((*part.path[:-1], rest) if rest else part.path[:-1] or ("",), values))  # a bare one has no name
    often = Counter(place for place, _ in {(place, part.path[-1]) for place, part in zip(places, parts, strict=True)})
    groups: dict[Path, dict[str, int]] = {}
    for index, (part, (path, values)) in enumerate(zip(parts, places, strict=True)):
        if often[path, values] > 1 and part.path[-1] != TORCH_NAMES.get(values):  # of one kind: tensors of their own
            path = (*path, part.path[-1])
        while values in (members := groups.setdefault(path, {})):
            path = (*path, part.path[-1])
        members[values] = index
    _take_in_biases(groups)
    return Units(Unit(path, tuple(sorted(members.items()))) for path, members in groups.items())


def _take_in_biases(groups: dict[Path, dict[str, int]]) -> None:
    """Add a bias beside its layer (``q_bias`` beside ``query.weight``), or in it under another name, to that layer.

    One in its layer, as ``gate.e_score_correction_bias`` with ``gate.weight``, must be the only one there, and one
    around it, as ``conv.bias`` with ``conv.depthwise_kernel``, must have nothing else in it.
    """
    alone = [path for path, members in groups.items() if members.keys() == {"bias"}]
    if not alone:
        return
    layers = {(path[:-1], words(path[-1])): path for path, members in groups.items() if members.keys() == {"weight"}}
    inside = Counter(path[:-1] for path in alone)
    within = Counter(path[:depth] for path in groups for depth in range(len(path)))
    only = {path[:-1]: path for path in layers.values() if within[path[:-1]] == 1}
    for path in alone:
        layer = layers.get((path[:-1], words(path[-1]))) or only.get(path)
        if layer is not None and words(path[-1]):
            groups[layer] |= groups.pop(path)
        elif inside[path[:-1]] == 1 and groups.get(path[:-1], {}).keys() == {"weight"}:
            groups[path[:-1]] |= groups.pop(path)


def layout_of(parts: Sequence[Part]) -> int:
    """Return 1 if the biases show that matrices are stored as (out, in), -1 if as (in, out), else 0."""
    votes = 0
    for kinds in (dict(unit.parts) for unit in units_of(parts)):
        if "bias" in kinds and "weight" in kinds:
            weight, bias = squeeze(parts[kinds["weight"]].shape), squeeze(parts[kinds["bias"]].shape)
            votes += (bias == weight[:1]) - (bias == weight[1:]) if len(weight) == 2 else 0
    return (votes > 0) - (votes < 0)


def inputs_come_first(parts: Sequence[Part], others: Mapping[tuple[int, ...], int]) -> bool:
    """True if names, and the shapes of the other side, say that matrices without biases are stored as (in, out).

    >>> inputs_come_first([Part(0, ("mlp", "up", "weight"), (4, 16), "float")], {(4, 16): 1, (16, 4): 1})
    True
    """
    votes = 0
    for kinds in (dict(unit.parts) for unit in units_of(parts)):
        part = parts[kinds["weight"]] if "weight" in kinds and "bias" not in kinds else None
        if part is None or not is_plain(part) or part.shape[0] == part.shape[1]:
            continue
        found = role_words(part.path)
        widens = bool(found & {"in", "up", "gate"}) - bool(found & {"out", "down"})
        same, turned = others.get(part.shape, 0), others.get(part.shape[::-1], 0)
        votes += widens * (1 if part.shape[0] < part.shape[1] else -1) + (turned > same) - (turned < same)
    return votes > 0


def convolution_in_torch(weight: Shape, bias: Shape | None) -> Operation:
    """Return the view of a kernel ``(*spatial, in, out)`` as torch's ``(out, in, *spatial)``.

    A kernel of several inputs and one output is depthwise, ``(*spatial, channels, 1)``, unless its bias or a spatial
    size of one shows that it sums its inputs.
    """
    last = len(weight) - 1
    *spatial, channels, outputs = weight
    is_depthwise = outputs == 1 < channels and (bias == (channels,) or (bias is None and prod(spatial) > 1))
    ends = (last - 1, last) if is_depthwise else (last, last - 1)
    return Permute((*ends, *range(last - 1)))


def spatial_first(shapes: Mapping[str, Shape]) -> int:
    """Vote on where the weight of a convolution has its spatial dimensions: 1 first, -1 last, 0 unclear."""
    weight, bias = shapes["weight"], shapes.get("bias")
    if len(weight) < 4:
        return 0
    if bias is not None and bias in (weight[:1], weight[-1:]) and weight[0] != weight[-1]:
        return 1 if bias == weight[-1:] else -1
    first, last = weight[0] == weight[1], weight[-1] == weight[-2]
    return first - last or first * ((weight[0] < weight[-1]) - (weight[0] > weight[-1]))


def views_of_last_inputs(shapes: Sequence[Mapping[str, Shape]], others: Mapping[Shape, int]) -> list[Operation]:
    """Return the views of the weights of layers in torch's layout if their kernels are ``(out, *spatial, in)``.

    So are those of MLX and of TensorFlow Lite; the latter has depthwise ones as ``(1, *spatial, channels)``. It shows
    where ``others``, the shapes of the other side, hold most kernels only as torch has them; else none is returned.
    """
    views = list[Operation]()
    votes = Counter[int]()  # by the number of dimensions
    ranks = [len(of["weight"]) for of in shapes]
    for weight, rank in zip((of["weight"] for of in shapes), ranks, strict=True):
        ways = [(0, rank - 1, *range(1, rank - 1)), (rank - 1, 0, *range(1, rank - 1))] if rank > 2 else []
        usual = ways[weight[:1] == (1,) :][:1]
        found = [dims for dims in (*usual, *ways) if tuple(weight[dim] for dim in dims) in others]
        is_usual = found[:1] == usual and weight not in others
        if rank > 3 and not found and (*weight[1:], weight[0]) in others:  # which has them as (*spatial, in, out)
            found, is_usual = usual, 1 < weight[1] < min(weight[0], weight[-1])
        if rank > 3 and prod(weight[1:-1]) > 1:  # else it may be a stack of matrices, or one of any layout
            votes[rank] += is_usual - (not found)
        views.append(Permute(found[0]) if found else Copy())
    if max(votes.values(), default=0) <= 0:
        return []
    # of a kind that shows nothing, what fits as it is may be a stack of matrices, unless it has the bias of one kernel
    open_ranks = {rank for rank in ranks if votes[rank] == 0 < votes.total()}
    are_kernels = (of["weight"] not in others or of.get("bias") == of["weight"][:1] for of in shapes)
    return [
        view if votes[rank] > 0 or (rank in open_ranks and is_kernel) else Copy()
        for view, rank, is_kernel in zip(views, ranks, are_kernels, strict=True)
    ]


def is_plain(part: Part) -> bool:
    """True for a matrix that is viewed as it is stored, and is no table of embeddings."""
    return len(part.shape) == 2 and isinstance(part.view, Copy) and EMBEDDING_WORDS.isdisjoint(role_words(part.path))


def cut_apart(first: Path, second: Path) -> tuple[Path, Path] | None:
    """Cut two paths after the first component in which they differ."""
    depth = len(common_prefix((first, second)))
    return None if depth == min(len(first), len(second)) else (first[: depth + 1], second[: depth + 1])


def steps_inside(path: Path, ends: tuple[Path, Path]) -> tuple[bool, bool]:
    """For each of two siblings, True if a layer is in it or in another step of the branch that it is a step of.

    >>> steps_inside(("mixed", "branch2_1", "conv"), (("mixed", "branch1_0"), ("mixed", "branch2_0")))
    (False, True)
    """
    *around, _ = ends[0]
    depth = len(around)
    if path[:depth] != tuple(around) or len(path) == depth:
        return False, False
    name, first, second = path[depth], ends[0][-1], ends[1][-1]
    branch, own, other = (_STEP.split(each)[0] for each in (name, first, second))
    return (branch == own, branch == other) if own != other else (name == first, name == second)
