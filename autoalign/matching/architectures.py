"""Known architectures: fingerprints of networks by shapes, blocks and names, and the index of those of many libraries.

A fingerprint depends neither on the order of tensors nor on what anything is called, but for the dots and numbers in
keys: shapes are without their dimensions of size 1 and sorted, so that a kernel is the same in any library's layout.
Names are compared apart. The index is ``architectures.npz``, which ``python -m benchmarks.index`` writes; it is read
when it is first needed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from hashlib import blake2b
from math import log
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoalign.plan.keys import numbers, split_key, stem
from autoalign.plan.operations import Shape
from autoalign.plan.specs import TensorSpec

INDEX_FILE = Path(__file__).with_name("architectures.npz")
_BLOCK_TENSORS = range(8, 65)  # of a block: fewer are a layer, and more are a stage
_MAX_LITERAL = 16  # a dimension up to which it is a size of a kernel, not a width

_MAX_COMPARED = 24  # groups whose heads and names are looked at
_WORTH_OF_NAMES = 0.1  # of the same names, in shares of tensors: they decide between equals
_MIN_SHARE_OF_BLOCKS = 0.6  # of the tensors in blocks
_MIN_SHARE_OF_KINDS = 0.5  # of the kinds of blocks of both
_MAX_TENSORS_TO_MENTION, _MIN_TENSORS_TO_MENTION = 5_000, 8  # of a side that a message says more of
_MIN_SCORE_TO_MENTION = 0.9
_MIN_SHARE_WITH_PREFIX = 0.9  # of the tensors

_Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Fingerprint:
    """What a network is known by."""

    shapes: Counter[Shape]  # of its floating-point tensors; scalars are left out
    blocks: Mapping[int, int]  # the hash of each kind of block, with all sizes in it relative -> tensors in such blocks
    depth: int  # members of its longest list

    @property
    def width(self) -> int:
        """The most frequent size of a vector."""
        return _width(self.shapes)


def _width(shapes: Mapping[Shape, int]) -> int:
    vectors = {shape[0]: count for shape, count in shapes.items() if len(shape) == 1}
    return max(vectors, key=lambda size: (vectors[size], size), default=0)


def numeric(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """List the tensors that count: no integers, such as counters and tables of positions, and no scalars."""
    return [spec for spec in specs if (spec.dtype.is_floating_point or spec.encoding) and spec.numel not in (0, 1)]


@lru_cache(maxsize=4096)  # shapes of a network, which are few
def essential(shape: Shape) -> Shape:
    """Return a shape without its dimensions of size 1, sorted.

    >>> essential((64, 3, 7, 7)), essential((1, 197, 768))
    ((3, 7, 7, 64), (197, 768))
    """
    return tuple(sorted(size for size in shape if size != 1))


def shapes_by_name(specs: Iterable[TensorSpec], prefix: str = "") -> dict[str, set[Shape]]:
    """Collect the shapes under each name: a key without its numbers and a prefix.

    >>> import torch
    >>> shapes_by_name([TensorSpec(f"net.h.{n}.weight", (2, 3), torch.float32) for n in range(3)], "net.")
    {'h.#.weight': {(2, 3)}}
    """
    found: dict[str, set[Shape]] = {}
    for spec in specs:
        found.setdefault(stem(spec.key.removeprefix(prefix)), set()).add(essential(spec.shape))
    return found


def fingerprint(specs: Iterable[TensorSpec]) -> Fingerprint:
    """Return the fingerprint of a network.

    >>> import torch
    >>> keys = [f"{n}.{name}" for n in range(3) for name in ("weight", "bias")]
    >>> print(fingerprint(TensorSpec(key, (2, 3), torch.float32) for key in keys))
    Fingerprint(shapes=Counter({(2, 3): 6}), blocks={}, depth=3)
    """
    counted = numeric(specs)
    below: dict[str, list[Shape]] = {}
    for spec in counted:
        shape, module = essential(spec.shape), split_key(spec.key)[0]
        while module:
            below.setdefault(module, []).append(shape)
            module = split_key(module)[0]
    lists = Counter((parent, stem(name)) for parent, name in map(split_key, below) if numbers(name))
    outer = {parent for (parent, name), members in lists.items() if name == "#" and members > 1}  # lists are no blocks
    blocks = _blocks(shapes for name, shapes in below.items() if name not in outer and len(shapes) < len(counted))
    return Fingerprint(Counter(essential(spec.shape) for spec in counted), blocks, max(lists.values(), default=0))


def _hashed(value: object) -> int:
    return int.from_bytes(blake2b(repr(value).encode(), digest_size=4).digest(), "big")


def _blocks(modules: Iterable[list[Shape]]) -> dict[int, int]:
    """Hash the modules that are blocks, and count the tensors in each kind."""
    contents = Counter(tuple(sorted(shapes)) for shapes in modules if len(shapes) in _BLOCK_TENSORS)
    found: dict[int, int] = {}
    for content, count in contents.items():
        pattern = _pattern(content)
        found[pattern] = found.get(pattern, 0) + count * len(content)
    return found


def _pattern(shapes: Sequence[Shape]) -> int:
    """Hash some shapes so that the result is the same if all widths are exchanged for others."""
    sizes = {size for shape in shapes for size in shape}
    colours: dict[int, int] = {size: size if size <= _MAX_LITERAL else 0 for size in sizes}
    for _ in range(2):  # as Weisfeiler and Leman: a size is what it occurs with
        seen: dict[int, list[tuple[int, ...]]] = {size: [] for size in sizes}
        for shape in shapes:
            for size in set(shape):
                others = sorted(-1 if other == size else colours[other] for other in shape)
                seen[size].append(tuple(others))
        colours = {size: _hashed((colours[size], sorted(seen[size]))) for size in sizes}
    return _hashed(sorted(tuple(sorted(colours[size] for size in shape)) for shape in shapes))


@dataclass(frozen=True, slots=True)
class Architecture:
    """One entry of the index."""

    library: str
    name: str
    group: int  # of those with the same shapes but for heads
    heads: tuple[Shape, ...]  # of tensors that depend on the number of classes: -n is n times that
    names: int  # the number of its set of names
    builder: str = ""  # of transformers, as in "BertModel(num_hidden_layers=24)"; of mmpretrain a name; else options
    config: str = ""  # of transformers, the class of its configuration

    def __str__(self) -> str:
        return f"{self.library}:{self.name}"


class Index:
    """The fingerprints of all known architectures, as arrays."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._arrays = dict(arrays)
        about = json.loads(self._arrays["about"].tobytes())
        self.versions: dict[str, str] = about["versions"]  # of the libraries that it was made of
        self._entries: list[tuple[str, str, int, int, int, str, str]] = about["entries"]  # fields of Architecture
        self._depths = self._arrays["depths"]
        self.totals = self._sums(self._arrays["shape_counts"], "shape_starts")

    def __len__(self) -> int:
        return len(self._entries)

    @cached_property
    def shapes(self) -> list[Shape]:
        """All shapes that occur, in the order of their numbers."""
        ends = np.cumsum(self._arrays["ranks"])
        dims = self._arrays["dims"].tolist()
        return [
            tuple(dims[end - rank : end])
            for rank, end in zip(self._arrays["ranks"].tolist(), ends.tolist(), strict=True)
        ]

    @cached_property
    def _number_of(self) -> dict[Shape, int]:
        return {shape: number for number, shape in enumerate(self.shapes)}

    @cached_property
    def architectures(self) -> list[list[Architecture]]:
        """The architectures of each group, the best known name first."""
        groups: list[list[Architecture]] = [[] for _ in self.totals]
        for library, name, group, head, names, *built in self._entries:
            groups[group].append(Architecture(library, name, group, self._heads[head], names, *built))
        return groups

    @cached_property
    def _heads(self) -> list[tuple[Shape, ...]]:
        parts = np.split(self._arrays["head_shapes"], self._arrays["head_starts"][1:-1])
        return [tuple(self.shapes[number] for number in part.tolist()) for part in parts]

    @cached_property
    def _all_names(self) -> list[str]:
        return self._arrays["names"].tobytes().decode().split("\n")

    def shapes_by_name(self, architecture: Architecture) -> dict[str, set[Shape]]:
        """Return the shapes under each name of an architecture, those of heads with a negative size."""
        part = slice(*self._arrays["name_starts"][architecture.names :][:2].tolist())
        found: dict[str, set[Shape]] = {}
        for name, shape in zip(
            *(self._arrays[each][part].tolist() for each in ("name_numbers", "name_shapes")), strict=True
        ):
            found.setdefault(self._all_names[name], set()).add(self.shapes[shape])
        return found

    def _sums(self, values: NDArray[Any], starts: str) -> _Ints:
        total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        sums: _Ints = np.diff(total[self._arrays[starts]])
        return sums

    def shapes_of(self, group: int) -> Counter[Shape]:
        """Return the shapes of a group, without those of heads."""
        part = slice(*self._arrays["shape_starts"][group : group + 2].tolist())
        pairs = zip(
            self._arrays["shape_numbers"][part].tolist(), self._arrays["shape_counts"][part].tolist(), strict=True
        )
        return Counter({self.shapes[number]: count for number, count in pairs})

    def width_of(self, group: int) -> int:
        return _width(self.shapes_of(group))

    def depth_of(self, group: int) -> int:
        return int(self._depths[group])

    def common_shapes(self, own: Fingerprint) -> _Ints:
        """Count the tensors of each group that have a counterpart of their shape."""
        counts = np.zeros(len(self._arrays["ranks"]), dtype=np.int64)
        for shape, count in own.shapes.items():
            if (number := self._number_of.get(shape)) is not None:
                counts[number] = count
        return self._sums(
            np.minimum(self._arrays["shape_counts"], counts[self._arrays["shape_numbers"]]), "shape_starts"
        )

    def common_blocks(self, own: Fingerprint) -> tuple[_Ints, NDArray[np.float64]]:
        """Compare the blocks of a network with those of each group.

        Returns:
            The tensors of the network that are in blocks of a kind that the group has, and the share of the kinds of
            either that both have.
        """
        hashes, known = self._arrays["block_hashes"], np.array(sorted(own.blocks), dtype=np.uint32)
        weights = np.array([own.blocks[value] for value in known.tolist()], dtype=np.int64)
        places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        is_common = known[places] == hashes
        kinds = self._sums(is_common, "block_starts")
        all_kinds = self._sums(np.ones_like(hashes), "block_starts")
        shares = kinds / (all_kinds + len(known) - kinds)
        return self._sums(np.where(is_common, weights[places], 0), "block_starts"), shares


@cache
def index() -> Index:
    """Read the index; it stays in memory."""
    with np.load(INDEX_FILE, allow_pickle=False) as arrays:
        return Index(arrays)


@dataclass(frozen=True, slots=True)
class Likeness:
    """How a network compares with the architectures of one group."""

    architectures: tuple[Architecture, ...]  # those whose names and heads agree best first
    common: int  # tensors with a counterpart, heads of another number of classes included
    own: int  # tensors of the network
    total: int  # of the architecture, without heads that the network does not have
    names: float  # the share of the names of either that both have, of the first architecture
    prefix: str  # what is before these names
    classes: int | None  # of the network's head; None where it has none
    missing: Counter[Shape]  # of the architecture
    extra: Counter[Shape]  # of the network

    @property
    def score(self) -> float:
        """The share of the tensors of either that both have."""
        return self.common / max(self.own + self.total - self.common, 1)

    @property
    def is_exact(self) -> bool:
        """True if all shapes are equal."""
        return self.common == self.own == self.total


def likenesses(specs: Sequence[TensorSpec], own: Fingerprint, known: Index, limit: int = 3) -> list[Likeness]:
    """List the groups of architectures that a network is most like, the nearest first."""
    common, count = known.common_shapes(own), own.shapes.total()
    rough = common / np.maximum(count + known.totals - common, 1)
    nearest = np.argsort(-rough, kind="stable")[:_MAX_COMPARED].tolist()
    stems = {stem(spec.key) for spec in numeric(specs)}
    names = {prefix: frozenset(one.removeprefix(stem(prefix)) for one in stems) for prefix in _prefixes(specs)}
    found = [_likeness(own, group, known, names) for group in nearest if common[group]]
    found.sort(key=lambda one: (not one.is_exact, -one.score - _WORTH_OF_NAMES * one.names))
    return found[:limit]


def _likeness(own: Fingerprint, group: int, known: Index, names: Mapping[str, frozenset[str]]) -> Likeness:
    shapes = known.shapes_of(group)
    missing, extra = shapes - own.shapes, own.shapes - shapes
    heads = {each.heads: _headed(each.heads, extra) for each in known.architectures[group]}
    shares: dict[tuple[int, bool], tuple[float, str]] = {}  # many architectures have the same names

    def rank(each: Architecture) -> tuple[float, int]:
        taken, _ = heads[each.heads]
        if (each.names, bool(taken)) not in shares:
            theirs = {name for name, found in known.shapes_by_name(each).items() if taken or min(map(min, found)) > 0}
            shared = ((len(mine & theirs) / max(len(mine | theirs), 1), prefix) for prefix, mine in names.items())
            shares[each.names, bool(taken)] = max(shared, key=lambda share: share[0])
        return -shares[each.names, bool(taken)][0], -len(taken)

    ranked = sorted(known.architectures[group], key=rank)
    taken, classes = heads[ranked[0].heads]
    common, total = (shapes & own.shapes).total() + len(taken), shapes.total() + len(taken)
    share, prefix = shares[ranked[0].names, bool(taken)]
    left = extra - Counter(taken)
    return Likeness(tuple(ranked), common, own.shapes.total(), total, share, prefix, classes, missing, left)


def _headed(heads: Sequence[Shape], extra: Counter[Shape]) -> tuple[list[Shape], int | None]:
    """Find the tensors of heads among those that are left, and the number of classes that most of them have."""
    sizes = {size for shape in extra for size in shape}
    multiples = {-size for head in heads for size in head if size < 0}
    best: list[Shape] = []
    classes: int | None = None
    for count in sorted({1, *(size // multiple for size in sizes for multiple in multiples if size % multiple == 0)}):
        wanted = Counter(essential(tuple(size if size > 0 else -size * count for size in head)) for head in heads)
        found = list((wanted & extra).elements())
        worth = len(found), -sum(extra[shape] for shape in found)  # a head is rarely many tensors of one shape
        if found and (not best or worth > (len(best), -sum(extra[shape] for shape in best))):
            best, classes = found, count
    return best, classes


def of_equal_blocks(own: Fingerprint, known: Index) -> Architecture | None:
    """Find an architecture with the blocks that a network has, in whatever sizes; of several the one of the nearest."""
    if not own.blocks:
        return None
    tensors, shares = known.common_blocks(own)
    alike = np.flatnonzero(tensors >= _MIN_SHARE_OF_BLOCKS * sum(own.blocks.values())).tolist()

    def rank(group: int) -> tuple[float, float]:
        sizes = (known.width_of(group), own.width), (known.depth_of(group), own.depth)
        return -shares[group], sum(abs(log((one + 1) / (other + 1))) for one, other in sizes)

    best = min(alike, key=rank, default=None)
    return None if best is None or shares[best] < _MIN_SHARE_OF_KINDS else known.architectures[best][0]


def _prefixes(specs: Sequence[TensorSpec]) -> Iterator[str]:
    """Yield what wrappers may have put before the names: modules in each other that nearly all tensors are in."""
    prefix, keys = "", [spec.key for spec in specs]
    while True:
        yield prefix
        names = Counter(key[len(prefix) :].partition(".")[0] for key in keys if key.count(".", len(prefix)))
        name, count = names.most_common(1)[0] if names else ("", 0)
        if count < max(_MIN_SHARE_WITH_PREFIX * len(keys), 2) or prefix.count(".") > 8:
            return
        prefix += f"{name}."
        keys = [key for key in keys if key.startswith(prefix)]


def resemblances(source: Sequence[TensorSpec], target: Sequence[TensorSpec]) -> list[str]:
    """Return what two sides look like, for a message; nothing of what is not known, or if it is the same."""
    found = {side: _best_known(specs) for side, specs in (("source", source), ("target", target))}
    if found["source"] and found["target"] and found["source"].architectures[0] == found["target"].architectures[0]:
        return []
    return [
        f"The {side} looks like {one.architectures[0].library}'s {one.architectures[0].name} "
        f"({one.common:,} of {one.total:,} shapes)."
        for side, one in found.items()
        if one
    ]


def _best_known(specs: Sequence[TensorSpec]) -> Likeness | None:
    """Return what some tensors are most like; None if that is not known, or would take long."""
    if len(specs) > _MAX_TENSORS_TO_MENTION:
        return None
    found = likenesses(specs, fingerprint(specs), index(), 1)
    is_known = found and found[0].score >= _MIN_SCORE_TO_MENTION and found[0].own >= _MIN_TENSORS_TO_MENTION
    return found[0] if is_known else None
