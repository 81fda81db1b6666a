"""One side as it is matched: its tensors as parts, grouped into units (layers), and the tree of modules above them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import combinations, pairwise, repeat

import numpy as np
import torch
from numpy.typing import NDArray

from autoalign.matching.names import kind, words
from autoalign.matching.vocabulary import COLLECTIONS, LAYER_TYPES
from autoalign.plan.keys import common_module, common_prefix, components, numbers, stem
from autoalign.plan.operations import Copy, Operation
from autoalign.plan.specs import TensorSpec

Path = tuple[str, ...]

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
_LEAF = re.compile(r"(.+?)_((?:moving|running)_[a-z]+|num_batches_tracked|[^_]+)")  # in "stage1_unit1_bn1_moving_mean"
_GLUED = re.compile(r"(?<=[^_])(?:weight|bias|running_(?:mean|var)|num_batches_tracked)$")
_PIECES = re.compile(rf"{_GLUED.pattern}|\d+|\D+?(?=\d|$|{_GLUED.pattern})")
_MAX_SHARE_OF_LEAVES = 0.2  # of distinct names of tensors among all tensors; a norm has five tensors
_MAX_NAMED_SIBLINGS = 3  # siblings that differ in a number and are no list of blocks
_LETTERED = re.compile(r"(.*\d)([a-g])")  # not q, k and v
_STEP = re.compile(r"(?<=\d)_(?=\d)")  # in "branch2_0": a branch, and a step of it
_INIT = "~"  # that modules of Haiku were made in ``__init__``
_TYPED = re.compile(r"(.+?)_?(\d+)")  # in "conv2d_4"
_JOINT = re.compile(r"_(?=\d)|(?<=\d)_|(?<=\d[a-z])_")  # in "features_5_conv_2" and "block2a_expand"


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

    Integers of eight bits are quantised floats; wider ones are indices and counters. A layer's statistics that stand
    in a collection of their own, as those of Flax do, are taken back to the layer, and the names of a flat list of
    layers are taken apart at their numbers.

    >>> spec = TensorSpec("conv2_block1_bn/gamma:0", (8,), torch.float32)
    >>> parts_of([spec])[0].path
    ('conv2', 'block1', 'bn', 'gamma')
    """
    paths = [tuple([name for name in components(spec.key) if name != _INIT]) for spec in specs]
    paths = _with_leaves(_without_endings(paths))
    if len(tops := {path[0] for path in paths if len(path) > 1}) > 1 and tops <= COLLECTIONS:
        paths = [path[1:] if len(path) > 1 else path for path in paths]
    top = len(_top_module(paths))
    is_flat = not any(numbers(name) for path in paths for name in path[top + 1 : -1])
    paths = _counted(paths)
    if is_flat:  # the module tree is in one name
        apart = [(*path[:top], *_JOINT.split(path[top]), *path[top + 1 :]) for path in paths]
        modules = {path[:depth] for path in apart for depth in range(len(path))}
        is_flat = not modules.intersection(apart)  # no tensor is a module
        paths = apart if is_flat else paths
    paths = _in_steps(paths, [spec.shape for spec in specs], top, is_flat=is_flat)
    paths = _with_numbers_for_letters(paths)
    return [
        Part(index, path, spec.shape, _numeric(spec.dtype), count=count)
        for index, (path, spec, count) in enumerate(zip(paths, specs, counts or repeat(1, len(specs)), strict=True))
    ]


def _counted(paths: list[Path]) -> list[Path]:
    """Count a name as the first of those with a number after it, as Haiku and Keras name what they make.

    >>> _counted([("linear", "w"), ("linear_1", "w")])
    [('linear_0', 'w'), ('linear_1', 'w')]
    """
    modules = {path[:depth] for path in paths for depth in range(1, len(path))}
    ways = {path: [(*path[:-1], f"{path[-1]}_{number}") for number in (0, 1)] for path in modules}
    first = {path: zeroth[-1] for path, (zeroth, other) in ways.items() if other in modules and zeroth not in modules}
    if not first:
        return paths
    return [tuple(first.get(path[: k + 1], name) for k, name in enumerate(path)) for path in paths]


def _in_steps(paths: list[Path], shapes: Sequence[tuple[int, ...]], top: int, *, is_flat: bool) -> list[Path]:
    """Read lists with the same numbers as one list of steps, each with one member of all.

    They are lists of layers named by their types that have the same widths, as TensorFlow and Keras count the layers of
    each type, or lists in one flat name of which members of one number follow one another.

    >>> names = [f"{name}_{k}" for k in range(4) for name in ("conv2d", "batch_norm")]
    >>> _in_steps([(name, "w") for name in names], [(8,)] * 8, 0, is_flat=False)[:2]
    [('0', 'conv2d', 'w'), ('0', 'batch_norm', 'w')]
    """
    inner = {path[:depth] for path in paths for depth in range(len(path) - 1)}

    def member(path: Path) -> tuple[Path, str, str, Path] | None:
        """Split a path around the name of a list and the number in it."""
        if is_flat:
            is_one = len(path) > top + 2 and path[top + 1].isdecimal()
            return (path[:top], path[top], path[top + 1], path[top + 2 :]) if is_one else None
        found = _TYPED.fullmatch(path[-2]) if len(path) > 1 and path[:-1] not in inner else None
        return (path[:-2], found[1], found[2], path[-1:]) if found else None

    sizes: dict[tuple[Path, str], dict[str, set[int]]] = {}  # list -> number -> sizes of its tensors
    places: dict[tuple[Path, str], dict[str, int]] = {}
    for place, (path, shape) in enumerate(zip(paths, shapes, strict=True)):
        if found := member(path):
            sizes.setdefault(found[:2], {}).setdefault(found[2], set()).update(shape)
            places.setdefault(found[:2], {}).setdefault(found[2], place)
    long = {of: members for of, members in sizes.items() if len(members) > _MAX_NAMED_SIBLINGS}
    steps: set[tuple[Path, str]] = set()
    for (first, own), (second, other) in combinations(long.items(), 2):
        if first[0] != second[0] or own.keys() != other.keys():
            continue
        of_types = LAYER_TYPES.issuperset((*words(first[1]), *words(second[1])))
        line = sorted((place, int(number)) for of in (first, second) for number, place in places[of].items())
        in_turn = [number for _, number in line]
        if all(own[number] & other[number] for number in own) if of_types else is_flat and in_turn == sorted(in_turn):
            steps |= {first, second}
    if not steps:
        return paths
    return [
        (*found[0], found[2], found[1], *found[3]) if (found := member(path)) and found[:2] in steps else path
        for path in paths
    ]


def _with_numbers_for_letters(paths: list[Path]) -> list[Path]:
    """Read letters after a number as those of a list's members, as in ``block2a`` and ``block2b``.

    >>> _with_numbers_for_letters([("res2a", "w"), ("res2b", "w"), ("res3a", "w"), ("fc6a", "w")])
    [('res2', '0', 'w'), ('res2', '1', 'w'), ('res3', '0', 'w'), ('fc6a', 'w')]
    """
    lists: dict[tuple[Path, str], set[tuple[str, str]]] = {}
    for path in paths:
        for depth, name in enumerate(path):
            if found := _LETTERED.fullmatch(name):
                lists.setdefault((path[:depth], stem(found[1])), set()).add((found[1], found[2]))
    read = {of for of, members in lists.items() if len(members) > len({name for name, _ in members})}

    def names(path: Path) -> Iterator[str]:
        for depth, name in enumerate(path):
            found = _LETTERED.fullmatch(name) if read else None
            if found and (path[:depth], stem(found[1])) in read:
                yield from (found[1], str(ord(found[2]) - ord("a")))
            else:
                yield name

    apart = [tuple(names(path)) for path in paths]
    return paths if {path[:depth] for path in apart for depth in range(len(path))}.intersection(apart) else apart


def _without_endings(paths: list[Path]) -> list[Path]:
    """Leave out what follows the names of the tensors: as in TensorFlow's ``bias/.ATTRIBUTES/VARIABLE_VALUE``.

    Most end with it, and have names before it that say what values they are.

    >>> _without_endings([("fc", "w", "ema"), ("fc", "b", "ema"), ("fc", "u")])
    [('fc', 'w'), ('fc', 'b'), ('fc', 'u')]
    """
    last, _ = Counter(path[-1] for path in paths).most_common(1)[0] if paths else ("weight", 0)
    named = [path for path in paths if path[-1] == last]
    ending = common_prefix([path[::-1] for path in named])[::-1] if kind(last)[0] == "other" else ()
    if not ending or min(map(len, named)) == len(ending):
        return paths
    shorter = [path[: -len(ending)] if path[-1] == last else path for path in paths]
    known = sum(kind(path[-len(ending) - 1])[0] != "other" for path in named)
    modules = {path[:depth] for path in shorter for depth in range(len(path))}
    is_one = 2 * known > len(paths) and len(set(shorter)) == len(paths) and modules.isdisjoint(shorter)
    return shorter if is_one else paths


def _with_leaves(paths: list[Path]) -> list[Path]:
    """Split names of layers and of their tensors where all are joined, as in ``arg:bn1_gamma``.

    They are few beside the layers, and most say what they are.
    """
    if len({path[:-1] for path in paths}) != 1:
        return paths
    *above, _ = paths[0]
    names = [name.partition(":")[2] if name.partition(":")[0] in COLLECTIONS else name for *_, name in paths]
    if 2 * sum(bool(_GLUED.search(name)) for name in names) > len(names):
        return [(*above, *path) for path in _pulled_apart(names)]
    found = [match.groups() if (match := _LEAF.fullmatch(name)) else (name,) for name in names]
    are_known = [len(name) > 1 and kind(name[-1])[0] != "other" for name in found]
    if 2 * sum(are_known) < len(paths) or len({name[-1] for name in found}) > len(paths) * _MAX_SHARE_OF_LEAVES:
        return [(*above, name) for name in names]
    return [(*above, *name) for name in found]


def _pulled_apart(names: Sequence[str]) -> Iterator[Path]:
    """Yield the paths of names whose dots were left out, as ``blocks00conv1weight``.

    Numbers of which one begins with zero are those of a module and of one of its children.

    >>> list(_pulled_apart(["blocks00conv1weight", "blocks110bias", "decay"]))
    [('blocks', '0', '0', 'conv', '1', 'weight'), ('blocks', '11', '0', 'bias'), ('decay',)]
    """
    pieces = [_PIECES.findall(name) for name in names]
    pairs = {text for of in pieces for text, number in pairwise(of) if number[0] == "0" != number}
    for of in pieces:
        path = of[:1]
        for text, piece in pairwise(of):
            path += [piece[:-1], piece[-1]] if text in pairs and piece[:-1].isdigit() else [piece]
        yield tuple(path)


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
        if name == "#" or len(members) > _MAX_NAMED_SIBLINGS
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
    top = len(_top_module([part.path for part in parts]))
    beside = len(_top_module([part.path for part in others])) if top else 0
    top -= 2 * sum(part.path[beside : beside + 1] == parts[0].path[top - 1 : top] for part in others) > len(others) > 0
    return [replace(part, path=("", *part.path[top:])) for part in parts]


def _top_module(paths: Sequence[Path]) -> Path:
    """Return the module that everything is in; the one around it if everything is of one layer."""
    shared = common_module(paths)
    is_layer = all(len(path) == len(shared) + 1 for path in paths)
    return shared[:-1] if is_layer else shared


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
    groups: dict[Path, dict[str, int]] = {}
    for index, part in enumerate(parts):
        values, rest = kind(part.path[-1])
        if values == "bias" and rest and sum(size > 1 for size in part.shape) > 1:
            values, rest = "other", part.path[-1]  # a table of biases is no bias of a layer
        path = (*part.path[:-1], rest) if rest else part.path[:-1] or ("",)  # a bare layer has no name
        while values in (members := groups.setdefault(path, {})):  # the same kind twice: tensors of their own
            path = (*path, part.path[-1])
        members[values] = index
    _take_in_biases(groups)
    return Units(Unit(path, tuple(sorted(members.items()))) for path, members in groups.items())


def _take_in_biases(groups: dict[Path, dict[str, int]]) -> None:
    """Add a bias beside its layer (``q_bias`` beside ``query.weight``), or in it under another name, to that layer.

    One in its layer, as ``gate.e_score_correction_bias`` with ``gate.weight``, must be the only one there.
    """
    alone = [path for path, members in groups.items() if members.keys() == {"bias"}]
    if not alone:
        return
    layers = {(path[:-1], words(path[-1])): path for path, members in groups.items() if members.keys() == {"weight"}}
    inside = Counter(path[:-1] for path in alone)
    for path in alone:
        layer = layers.get((path[:-1], words(path[-1])))
        if layer is not None and words(path[-1]):
            groups[layer] |= groups.pop(path)
        elif inside[path[:-1]] == 1 and groups.get(path[:-1], {}).keys() == {"weight"}:
            groups[path[:-1]] |= groups.pop(path)


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
