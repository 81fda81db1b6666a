"""Composition: layers whose input is put together of several tensors or places, in an order that no shape shows.

An image is flattened with its channels first or last, patches are merged by rows, by columns or with their channels
first, and dense layers are given what all before them gave (Huang et al., "Densely connected convolutional networks",
CVPR 2017), the newest last or first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt

from autoalign.matching.layers import Part, lists_of, squeeze
from autoalign.matching.names import kind, words
from autoalign.matching.paths import Path
from autoalign.matching.vocabulary import UNFOLDING
from autoalign.plan.keys import numbers

_MIN_MEMBERS = 4  # of a list whose layers grow


@dataclass(frozen=True, slots=True)
class Composition:
    """How a side's layers may be given what they are given; each with the name by which another side may know it."""

    channels_last: bool  # whether its code holds images with the channels last, as its kernels show
    unfolds: bool  # whether its code merges patches by unfolding images
    flattened: Mapping[Path, tuple[Sequence[int], str]]  # layers of a flattened image -> its channels, likelier first
    merging: Mapping[Path, tuple[int, str]]  # layers of merged patches -> their width
    dense: Mapping[Path, tuple[Sequence[int], str]]  # layers -> the sizes of what is concatenated for them


def composition_of(parts: Sequence[Part], *, channels_last: bool) -> Composition:
    """Read off a side's shapes which of its layers are given something that is put together."""
    return Composition(
        channels_last=channels_last,
        unfolds=any(not UNFOLDING.isdisjoint(part.path) for part in parts),
        flattened=_flattened(parts),
        merging=_merging(parts),
        dense=_dense(parts),
    )


def layer_name(path: Path) -> str:
    """Return the name of the layer that holds a tensor or its adapters; a tensor at the top is its own layer."""
    names = [name for name in path[:-1] if "lora" not in words(name)]
    return names[-1] if names else path[-1]


def _flattened(parts: Sequence[Part]) -> dict[Path, tuple[list[int], str]]:
    """Find the one or two layers with other columns than any layer has outputs, a multiple of some channels.

    Where convolutions have such inputs too, channels are concatenated.
    """
    kernels = [part.shape for part in parts if len(part.shape) == 4]
    channels = {shape[0] for shape in kernels} - {0, 1}
    known = {shape[0] for part in parts if (shape := squeeze(part.shape))}
    joins = sum(shape[1] not in known | {1} for shape in kernels) > 1  # the first has those of images
    matrices = [part for part in (parts if channels and not joins else ()) if len(part.shape) == 2]
    found = {}
    for part in matrices:
        columns = part.shape[1]
        fits = [size for size in channels if columns % size == 0]
        if fits and columns not in known and kind(part.path[-1])[0] == "weight":
            fits.sort(key=lambda size: (isqrt(columns // size) ** 2 < columns // size, -size))
            found[part.path[:-1]] = fits, layer_name(part.path)
    return found if len(found) < 3 else {}


def _merging(parts: Sequence[Part]) -> dict[Path, tuple[int, str]]:
    """Find the layers that halve the features of four places, and what is beside them of the same width."""
    given = {part.path[:-1]: part.shape[1] for part in parts if len(part.shape) == 2}
    reducing = {
        part.path[:-2]: (part.shape[1], layer_name(part.path))
        for part in parts
        if len(part.shape) == 2
        and part.shape[1] == 2 * part.shape[0]
        and part.shape[1] % 4 == 0
        and "reduce" in words(layer_name(part.path))
    }
    return {
        part.path[:-1]: reducing[part.path[:-2]]
        for part in parts
        if part.path[:-2] in reducing
        and part.shape[-1:] == reducing[part.path[:-2]][:1]
        and given.get(part.path[:-1], part.shape[-1]) == part.shape[-1]
    }


def _dense(parts: Sequence[Part]) -> dict[Path, tuple[list[int], str]]:
    """Find the layers of lists in which each member adds its outputs to what it is given, and the layers after those.

    >>> shapes = {f"layers.{k}.conv.weight": (8, 16 + 8 * k, 3, 3) for k in range(4)} | {"head.weight": (5, 48)}
    >>> keys = [key.split(".") for key in shapes]
    >>> parts = [Part(k, tuple(key), shape, "float") for k, (key, shape) in enumerate(zip(keys, shapes.values()))]
    >>> _dense(parts)[("head",)], len(_dense(parts))
    (([16, 8, 8, 8, 8], 'layers'), 4)
    """
    matrices = [part for part in parts if len(part.shape) > 1 and kind(part.path[-1])[0] == "weight"]
    inside: dict[Path, tuple[list[int], str]] = {}
    after: dict[int, tuple[list[int], str]] = {}  # by width
    for (above, name), places in lists_of([part.path for part in matrices]).items():
        members = sorted(places, key=lambda member: numbers(member[-1]))
        shapes = [[matrices[place].shape for place in places[member]] for member in members]
        columns, rows = ([{shape[dim] for shape in of} for of in shapes] for dim in (1, 0))
        count = Counter(width for of in columns for width in of)
        own = [{width for width in of if count[width] in (1, len(members))} for of in columns]  # one's, or a bottleneck
        growths = (
            (first, step)
            for first in own[0]
            for step in set.intersection(*rows)
            if all(first + step * k in of for k, of in enumerate(own))
            if 2 * sum(count[first + step * k] == 1 for k in range(len(members))) > len(members)
        )
        first, step = max(growths if len(members) >= _MIN_MEMBERS else (), default=(0, 0))
        if not step:
            continue
        told = next((each for each in (name, *reversed(above)) if each.strip("#0123456789")), "")
        widths = [first + step * k for k in range(len(members) + 1)]
        given = {width: ([first, *[step] * k], told) for k, width in enumerate(widths)}
        after.setdefault(widths[-1], given[widths[-1]])
        of_member = dict(zip(members, widths, strict=False))
        for part in parts:
            width = next((of_member[part.path[:n]] for n in range(len(part.path)) if part.path[:n] in of_member), 0)
            if width > first and _width(part) == width:
                inside[part.path[:-1]] = given[width]
    ends = [part for part in matrices if _width(part) in after and part.path[:-1] not in inside]
    around = {(part.path[:-2], _width(part)) for part in ends}
    ends += [part for part in parts if len(part.shape) == 1 and (part.path[:-2], _width(part)) in around]
    return {part.path[:-1]: after[_width(part)] for part in ends} | inside


def _width(part: Part) -> int:
    return part.shape[min(len(part.shape), 2) - 1] if part.shape else 0
