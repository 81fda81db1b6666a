"""Units: the tensors that one layer owns together, which are matched as one.

A bias follows its weight, and running statistics follow their norm: they are never matched apart. A unit is a module's
weight, bias and statistics, or a parameter that stands alone (``cls_token``). ``in_proj_weight`` and ``in_proj_bias``
of one module are a unit of their own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import repeat, takewhile

import numpy as np
import torch
from numpy.typing import NDArray

from autoalign.graph import Ancestry, Path, ancestry, block_around
from autoalign.names import components, kind, numbers, words
from autoalign.operations import Copy, Operation
from autoalign.specs import TensorSpec
from autoalign.vocabulary import COLLECTIONS

_WHOLE = Copy()
_JOINT = re.compile(r"_(?=\d)|(?<=\d)_")  # in "features_5_conv_2"


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor, or a part of one, that is matched with one of the other side."""

    tensor: int  # index among the side's tensors
    path: Path  # the names of its modules and its own
    shape: tuple[int, ...]
    numeric: str  # "float", "int" or "bool": tensors of one kind of number only match their like
    view: Operation = _WHOLE  # takes the part out of its tensor
    turned: bool = False  # whether the split shows that the matrix is laid out the other way round
    count: int = 1  # how many tensors of equal blocks it stands for
    by_order: bool = False  # whether its place among the tensors of its layer is all that tells what it is


def parts_of(specs: Sequence[TensorSpec], counts: Sequence[int] | None = None) -> list[Part]:
    """Make one part of each tensor, which may stand for several (see ``repeats``).

    Integers of eight bits are quantised floats; wider ones are indices and counters. A layer's statistics that stand
    in a collection of their own, as those of Flax do, are taken back to the layer, and the names of a flat list of
    layers are taken apart at their numbers.

    >>> spec = TensorSpec("conv2_block1_bn/gamma:0", (8,), torch.float32)
    >>> parts_of([spec])[0].path
    ('conv2', 'block1', 'bn', 'gamma')
    """
    paths = [components(spec.key) for spec in specs]
    if len(tops := {path[0] for path in paths if len(path) > 1}) > 1 and tops <= COLLECTIONS:
        paths = [path[1:] if len(path) > 1 else path for path in paths]
    top = len(_around(paths))
    if not any(numbers(name) for path in paths for name in path[top + 1 : -1]):  # the module tree is in one name
        paths = [
            (*path[:top], *_JOINT.split(path[top]), *path[top + 1 :]) if len(path) > top + 1 else path for path in paths
        ]
    return [
        Part(index, path, spec.shape, _numeric(spec.dtype), count=count)
        for index, (path, spec, count) in enumerate(zip(paths, specs, counts or repeat(1, len(specs)), strict=True))
    ]


def under_one_root(parts: Sequence[Part]) -> list[Part]:
    """Put all parts into one module without a name, instead of the modules that all of them are in.

    >>> [part.path for part in under_one_root(parts_of([TensorSpec("module.net.fc.weight", (8,), torch.float32)]))]
    [('', 'fc', 'weight')]
    """
    top = len(_around([part.path for part in parts]))
    return [replace(part, path=("", *part.path[top:])) for part in parts]


def _around(paths: Sequence[Path]) -> Path:
    """Name the module that everything is in; the one around it if everything is of one layer."""
    if not paths:
        return ()
    first, last = min(paths), max(paths)  # what these share, all share
    depth = min(len(path) for path in paths) - 1
    shared = [own for own, other in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))][:depth]
    is_layer = all(len(path) == len(shared) + 1 for path in paths)
    return tuple(shared[:-1] if is_layer else shared)


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
    """The units of one side, in order of their first part, and what their paths tell, which is found once."""

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
    """The parts of one side, and the units that they make, which are found once."""

    @cached_property
    def units(self) -> Units:
        """The parts of each layer."""
        return _grouped(self)

    def changed(self, parts: Sequence[Part]) -> Parts:
        """Put other parts in their place; where they are the same, what is known of them is kept."""
        return self if self == tuple(parts) else Parts(parts)


def counts_of(units: Sequence[Unit], parts: Sequence[Part]) -> NDArray[np.int64]:
    """Tell how many layers of equal blocks each unit stands for."""
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
    """Give a bias that stands beside its layer (``q_bias`` beside ``query.weight``), or in it, to that layer.

    One that stands in it has a name of its own (``gate.weight`` with ``gate.e_score_correction_bias``), and is the only
    one that does.
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
