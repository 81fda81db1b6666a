"""Candidates: pairs of layers that an operation reconciles, and the matrices that must be transposed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from autoalign.errors import InputError
from autoalign.matching.layers import Part, Unit, Units, layout_of, squeeze
from autoalign.matching.names import kind, words
from autoalign.matching.paths import Path
from autoalign.matching.vocabulary import KNOWN
from autoalign.plan.keys import numbers
from autoalign.plan.operations import Copy, Operation, Permute, Reshape, Shape, Transpose, chain

_Value = TypeVar("_Value")
_Label = TypeVar("_Label")
Signature = tuple[tuple[str, Shape, str, bool], ...]  # kind, shape, numeric and transposed of each part of a unit
_Kind = tuple[Signature, frozenset[str]]  # of a unit; with words that tell it apart
Entries = Mapping[str, object]  # kind of a part -> what must agree of parts that are exchanged

MAX_LAYER_PAIRS = 100_000_000  # of the one side times the other; the similarity of names takes four bytes for each
MAX_COST = 40_000_000  # of the pairs that are compared; each unit of it takes some 15 bytes
_COST_PER_PAIR = 32  # besides one for each two modules around it
_NEAREST = (64, 32, 16, 8, 4, 2, 1)  # pairs for each layer, the nearest in order, if there are too many for all
_MAX_SHARERS = 8  # layers of one shape on either side that share a word or numbers, so that these tell something
_USUAL_ADJACENCY = 0.25  # of layers that are no convolutions or batch norms; see ``Candidates``
_BARE_FIT = 0.25  # of a parameter outside any layer and the weight of a layer
_RESHAPED_FIT = 0.3  # of tensors that only a reshape reconciles
_UNFIT_FACTOR = 0.2  # of the fit of two units, for each of their parts that does not fit
_MISSING_KIND_FACTORS = {"count": 0.98, "mean": 0.6, "var": 0.6}  # of it, for each kind that only one of them has
_MISSING_FACTOR, _MISSING_FACTOR_OF_VECTORS = 0.25, 0.4  # for other kinds; a norm may have no bias


@dataclass(frozen=True, slots=True)
class Kinds:
    """The units of two sides by their shapes."""

    members: tuple[list[list[int]], list[list[int]]]  # of each side: the units of each kind, in order
    source: NDArray[np.int64]  # [source units]: equal for units with the same kinds and shapes of tensors
    target: NDArray[np.int64]  # [target units]: numbers of its own
    flat: tuple[NDArray[np.int64], NDArray[np.int64]]  # of each side's units: the same, whatever dimensions of size one
    entries: Sequence[Entries]  # of each number of ``flat``
    exact: tuple[NDArray[np.int64], NDArray[np.int64]]  # equal for units of both sides whose tensors have equal shapes
    source_class: NDArray[np.int64]  # [source units]: equal for units whose largest tensors have equal sizes
    target_class: NDArray[np.int64]  # [target units]: the same classes
    class_count: int
    fits: dict[tuple[int, int], float]  # kinds of a source and of a target that fit, and how well, in (0, 1]
    adjacent: Sequence[float]  # [kinds of the target]: see ``Candidates``
    transposed: frozenset[int]  # source parts whose matrix is transposed

    def fit(self, source: int, target: int) -> float:
        """Return how well the shapes of two units fit, 0 if they do not."""
        return self.fits.get((int(self.source[source]), int(self.target[target])), 0.0)


@dataclass(frozen=True, slots=True)
class Candidates:
    """The pairs of units that are compared, as parallel arrays."""

    source: NDArray[np.int64]  # unit of the source
    target: NDArray[np.int64]  # unit of the target
    fit: NDArray[np.float32]  # how well the shapes fit, in (0, 1]: 1 where all parts fit as they are
    adjacent: NDArray[np.float32]  # how much the order of neighbours says, in [0, 1]: a batch norm follows its layer
    crowded: frozenset[tuple[int, int]] = frozenset()  # kinds of which only pairs near in order or alike are listed
    same_numbers: frozenset[tuple[int, int]] = frozenset()  # pairs of these whose numbers few others have


@lru_cache(maxsize=4096)
@lru_cache(maxsize=4096)
def operation_between(source: Shape, target: Shape, *, transposed: bool = False) -> Operation | None:
    """Find the operation on one tensor that turns one shape into another, if the shapes admit one.

    Dimensions of size one may come and go, and trailing dimensions may be flattened: the elements keep their order,
    and the input and output channels of a kernel keep their places.
    Matrices, and those of a stack, are transposed if ``transposed``.

    >>> operation_between((64, 32), (64, 32, 1, 1)), operation_between((5,), (6,))
    (Reshape(shape=(64, 32, 1, 1)), None)
    >>> operation_between((1, 48, 1, 1, 1), (48, 1, 1, 1, 1)) is None
    True
    """
    if transposed and len(source) == len(squeeze(target)) == 2:
        fits = source[::-1] == squeeze(target)
        return chain(Transpose(), Copy() if len(target) == 2 else Reshape(target)) if fits else None
    if transposed and len(source) == len(target) == 3:
        return Permute((0, 2, 1)) if transposed_shape(source) == target else None
    if source == target:
        return Copy()
    if prod(source) != prod(target):
        return None
    if len(source) == len(target) >= 4 and source[:2] == target[1::-1]:
        return None  # a kernel's input channels are not its output channels
    short, long = sorted((squeeze(source), squeeze(target)), key=len)
    if short == long or (len(short) == 2 and short[0] == long[0]):
        return Reshape(target)
    return None


def transposed_shape(shape: Shape) -> Shape:
    """Return the shape of a transposed matrix, or of a stack of them.

    >>> transposed_shape((2, 3)), transposed_shape((8, 2, 3))
    ((3, 2), (8, 3, 2))
    """
    return (*shape[:-2], shape[-1], shape[-2])


def paired_parts(source: Unit, target: Unit) -> list[tuple[int, int]]:
    """Pair the parts of two units by kind; bare parameters pair whatever their kind."""
    return _paired(dict(source.parts), dict(target.parts))


def _paired(own: Mapping[str, _Value], other: Mapping[str, _Value]) -> list[tuple[_Value, _Value]]:
    shared = [(own[name], other[name]) for name in own if name in other]
    if not shared and own.keys() == {"other"} and other.keys() == {"weight", "bias"}:
        return [(own["other"], other["weight"])]
    if not shared and other.keys() == {"other"} and own.keys() == {"weight", "bias"}:
        return [(own["weight"], other["other"])]
    if shared or len(own) > 1 or len(other) > 1:
        return shared
    kinds = {*own, *other}
    are_bare = "other" in kinds and kinds <= {"other", "weight", "bias"}
    return list(zip(own.values(), other.values(), strict=True)) if are_bare else []


def transposed_parts(source: Sequence[Part], target: Sequence[Part]) -> frozenset[int]:
    """Find the source matrices that the target holds transposed.

    A layout is a property of a layer type in a checkpoint: where the biases, or the shapes alone, show that the
    matrices of most linear layers must be transposed, square ones and those whose shape fits either way are too.
    Matrices that fit only as they are (embeddings) or only transposed (a bare projection) decide for themselves.
    """
    matrices = [[part for part in parts if _is_matrix(part)] for parts in (source, target)]
    shapes = [Counter(part.shape for part in parts) for parts in matrices]
    layers = [Counter(part.shape for part in parts if _is_layer(part)) for parts in matrices]
    only_transposed = {
        s for s in shapes[0] if s not in shapes[1] and (t := transposed_shape(s)) in shapes[1] and t not in shapes[0]
    }
    only_as_is = {s for s in shapes[0] if s in shapes[1] and transposed_shape(s) not in shapes[1]}
    votes_to_transpose = sum(layers[0][shape] for shape in only_transposed if layers[1][transposed_shape(shape)])
    votes_to_copy = sum(part.shape in only_as_is and _is_layer(part) and not _is_turned(part) for part in matrices[0])
    split = [part.shape for parts in (source, target) for part in parts if part.is_transposed]
    votes_to_transpose += sum(len(shape) == 2 for shape in split)
    layouts = layout_of(source), layout_of(target)
    turned = {shape[0] for shape in split if len(shape) == 3}  # lengths of stacks whose parts show it
    most = (
        layouts[0] != layouts[1]
        if all(layouts) and not any(map(_is_turned, (*source, *target)))  # then what has a bias is as torch has it
        else votes_to_transpose > votes_to_copy and votes_to_transpose > 1
    )
    stacks = any(len(shape) == 3 for shape in only_transposed) and not any(len(shape) == 3 for shape in only_as_is)

    def is_transposed(part: Part) -> bool:
        if part.is_transposed or part.shape in only_transposed:
            return True
        if len(part.shape) == 3:
            return part.shape[0] in turned or (stacks and part.shape[1] == part.shape[2])
        return most and part.shape not in only_as_is and _is_layer(part) and not _is_turned(part)

    return frozenset(index for index, part in enumerate(source) if _is_matrix(part) and is_transposed(part))


def _is_turned(part: Part) -> bool:
    """True for a matrix that is viewed in torch's layout, which is not its own."""
    return isinstance(part.view, Transpose)


def _is_matrix(part: Part) -> bool:
    """True for a matrix or a stack of matrices."""
    return len(part.shape) in (2, 3) and min(part.shape) > 1


def _is_layer(part: Part) -> bool:
    """True for the matrix of a linear layer, not for a bare parameter or an embedding."""
    embeds = any(word == "embed" for component in part.path[-2:] for word in words(component))
    return len(part.shape) == 2 and kind(part.path[-1])[0] == "weight" and not embeds


def unit_fit(source: Signature, target: Signature) -> float:
    """Return how well a source unit fits a target unit by shape alone: 0 if it cannot, 1 if every part fits."""
    own, other = {entry[0]: entry for entry in source}, {entry[0]: entry for entry in target}
    pairs = _paired(own, other)
    bare = own.keys().isdisjoint(other)
    if bare and "bias" in {*own, *other} and any(len(squeeze(entry[1])) < 2 for entry in source if entry[0] != "bias"):
        return 0.0  # the bias of a layer is no parameter of its own; a table of biases is
    fits, fitting = 0.0, 0
    for (_, shape, numeric, transposed), (_, wanted, wanted_numeric, _) in pairs:
        if numeric == wanted_numeric and operation_between(shape, wanted, transposed=transposed) is not None:
            fitting += 1
            other_kernel = len(shape) == len(wanted) > 3 and shape != wanted  # as one of 1 x 11 for one of 11 x 1
            fits += 1.0 if transposed or (squeeze(shape) == squeeze(wanted) and not other_kernel) else _RESHAPED_FIT
        elif bare and operation_between(shape, wanted, transposed=True) is not None:
            fitting += 1
            fits += 1.0
        elif len(shape) != len(wanted) and len(squeeze(shape)) != len(squeeze(wanted)):
            return 0.0  # a norm is no matrix, a matrix no convolution
    if not fitting:
        return 0.0
    vector = max(len(squeeze(entry[1])) for entry in source) < 2  # a norm with a bias is hardly a scale without one
    fit = _UNFIT_FACTOR ** (len(pairs) - fits) * (_BARE_FIT if bare and own.keys() != other.keys() else 1.0)
    if bare and len(own) != len(other):
        fit *= _MISSING_FACTOR
    for name in () if bare else {*own} ^ {*other}:
        fit *= _MISSING_KIND_FACTORS.get(name, _MISSING_FACTOR_OF_VECTORS if vector else _MISSING_FACTOR)
    return float(fit)


def signature(unit: Unit, parts: Sequence[Part], transposed: frozenset[int] = frozenset()) -> Signature:
    """Return the kinds, shapes and numeric kinds of a unit's parts, and which of them are transposed."""
    return tuple((name, parts[index].shape, parts[index].numeric, index in transposed) for name, index in unit.parts)


def main_class(entry: Signature) -> tuple[str, Shape]:
    """Return the class of a unit: its largest tensor's shape, flattened and sorted so that a transposed one agrees."""
    _, shape, _, _ = max(entry, key=lambda part: (len(squeeze(part[1])), part[0] == "weight"))
    short = squeeze(shape)
    if len(short) > 2:
        short = (short[0], prod(short[1:]))
    return ("vector" if len(entry) == 1 and len(short) < 2 else "layer"), tuple(sorted(short))


def kinds_of(
    source_units: Sequence[Unit],
    source_parts: Sequence[Part],
    target_units: Sequence[Unit],
    target_parts: Sequence[Part],
) -> Kinds:
    """Sort the units of two sides by their shapes, and find which kinds fit."""
    transposed = transposed_parts(source_parts, target_parts)
    sides = ((source_units, source_parts, transposed), (target_units, target_parts, frozenset[int]()))
    entries = [[signature(unit, parts, of_side) for unit in units] for units, parts, of_side in sides]
    told = _told_words(
        *((units, parts, list(map(main_class, of))) for (units, parts, _), of in zip(sides, entries, strict=True))
    )
    members: tuple[dict[_Kind, list[int]], dict[_Kind, list[int]]] = ({}, {})
    for known, of_side, of_units in zip(members, entries, told, strict=True):
        for index, kind_of in enumerate(zip(of_side, of_units, strict=True)):
            known.setdefault(kind_of, []).append(index)
    classes: dict[tuple[tuple[str, Shape], frozenset[str]], int] = {}
    class_of = [
        [classes.setdefault((main_class(entry), words_of), len(classes)) for entry, words_of in known]
        for known in members
    ]
    by_size: dict[tuple[int, frozenset[str]], list[tuple[int, Signature]]] = {}  # elements -> the target's kinds
    for other, (wanted, words_of) in enumerate(members[1]):
        for size in {prod(shape) for _, shape, _, _ in wanted}:
            by_size.setdefault((size, words_of), []).append((other, wanted))
    fits: dict[tuple[int, int], float] = {}
    for own, (entry, words_of) in enumerate(members[0]):
        sizes = {prod(shape) for _, shape, _, _ in entry}
        for other, wanted in dict.fromkeys(known for size in sizes for known in by_size.get((size, words_of), ())):
            if fit := unit_fit(entry, wanted):
                fits[own, other] = fit
    kinds = _numbered(members[0]), _numbered(members[1])
    flat_ids, contents = _ids_of(members, _flat)
    exact_ids, _ = _ids_of(members, _exact)
    flat, exact = (
        [np.asarray(of_side, dtype=np.int64)[kind] for of_side, kind in zip(of_kinds, kinds, strict=True)]
        for of_kinds in (flat_ids, exact_ids)
    )
    return Kinds(
        (list(members[0].values()), list(members[1].values())),
        *kinds,
        (flat[0], flat[1]),
        list(map(dict, contents)),
        (exact[0], exact[1]),
        np.asarray(class_of[0], dtype=np.int64)[kinds[0]],
        np.asarray(class_of[1], dtype=np.int64)[kinds[1]],
        len(classes),
        fits,
        [
            1.0 if any(name == "mean" or len(shape) > 2 for name, shape, _, _ in entry) else _USUAL_ADJACENCY
            for entry, _ in members[1]
        ],
        transposed,
    )


def _ids_of(members: Sequence[Iterable[_Kind]], key: Callable[[_Kind], _Value]) -> tuple[list[list[int]], list[_Value]]:
    ids: dict[_Value, int] = {}
    return [[ids.setdefault(key(of), len(ids)) for of in known] for known in members], list(ids)


def _flat(of: _Kind) -> tuple[tuple[str, object], ...]:
    return tuple([(name, (squeeze(shape), *rest, of[1])) for name, shape, *rest in of[0]])


def _exact(of: _Kind) -> object:
    return frozenset([shape for _, shape, _, _ in of[0]])


def _told_words(
    *sides: tuple[Sequence[Unit], Sequence[Part], Sequence[tuple[str, Shape]]],
) -> list[list[frozenset[str]]]:
    """List, for each unit, its words without a known meaning that as many layers of each shape have on both sides.

    So does ``ip`` in the names of adapters, beside the layers that they adapt.
    """
    all_words = [
        [{word for name in unit.path for word in words(name)} - KNOWN for unit in units] for units, _, _ in sides
    ]
    contents = [_contents(of_side, side) for of_side, side in zip(all_words, sides, strict=True)]
    told = {word for word, content in contents[0].items() if content == contents[1].get(word)}
    everywhere = [set.intersection(*of_side) if of_side else set() for of_side in all_words]
    told -= everywhere[0] & everywhere[1]
    labels = [[frozenset(found & told) for found in of_side] for of_side in all_words]
    joint = [
        _contents([{of} - {frozenset()} for of in of_side], side) for of_side, side in zip(labels, sides, strict=True)
    ]
    return labels if joint[0] == joint[1] else [[frozenset()] * len(of_side) for of_side in labels]


def _contents(
    labels: Sequence[Collection[_Label]], side: tuple[Sequence[Unit], Sequence[Part], Sequence[tuple[str, Shape]]]
) -> dict[_Label, Counter[tuple[str, Shape]]]:
    """Count the layers of each shape that have a label."""
    contents: dict[_Label, Counter[tuple[str, Shape]]] = {}
    for found, unit, shapes in zip(labels, side[0], side[2], strict=True):
        for label in found:
            contents.setdefault(label, Counter())[shapes] += side[1][unit.parts[0][1]].count
    return contents


def candidates(kinds: Kinds, source: Units, target: Units, known: Sequence[tuple[int, int]] = ()) -> Candidates:
    """List the pairs of units of two sides that fit; known ones have no rivals.

    If these are more than memory and time allow, only those are listed that are near in order, among the layers of
    their shapes, or share a word or numbers that hardly any others have.

    Args:
        kinds: Of the units.
        source: The units of the source.
        target: Those of the target.
        known: Pairs of units.

    Raises:
        InputError: The pairs are too many even so.
    """
    partner, taken = np.full(len(source), -1), np.zeros(len(target), dtype=bool)
    for own, other in known:
        partner[own], taken[other] = other, True
    used = partner >= 0, taken
    free = [[np.asarray(units)[~out[units]] for units in of] for of, out in zip(kinds.members, used, strict=True)]
    nearest = _nearest([(len(free[0][own]), len(free[1][other])) for own, other in kinds.fits], source, target)
    crowded, all_same_numbers = set[tuple[int, int]](), set[tuple[int, int]]()
    listed = [np.zeros((2, 0), dtype=np.int64)]
    for own, other in kinds.fits:
        rows, columns = free[0][own], free[1][other]
        if len(rows) * len(columns) <= nearest * (len(rows) + len(columns)):
            pairs = np.stack([np.repeat(rows, len(columns)), np.tile(columns, len(rows))])
        else:
            same_word, same_numbers = _alike(rows.tolist(), columns.tolist(), source.paths, target.paths)
            in_order = (
                rows[np.argsort(source.ancestry.order[rows])],
                columns[np.argsort(target.ancestry.order[columns])],
            )
            alike = np.asarray([*same_word, *same_numbers], dtype=np.int64).reshape(-1, 2).T
            codes = np.concatenate([_near(*in_order, nearest), alike], axis=1)
            pairs = np.stack(np.divmod(np.unique(codes[0] * len(target) + codes[1]), len(target)))
            crowded.add((own, other))
            all_same_numbers |= same_numbers
        units = np.asarray(kinds.members[0][own])
        units = units[used[0][units]]
        units = units[kinds.target[partner[units]] == other]
        if len(units):
            pairs = np.concatenate([pairs, [units, partner[units]]], axis=1)
            pairs = pairs[:, np.lexsort(pairs[::-1])]
        listed.append(pairs)
    each = [pairs.shape[1] for pairs in listed[1:]]
    own_units, other_units = np.concatenate(listed, axis=1)
    return Candidates(
        own_units,
        other_units,
        np.repeat(np.asarray(list(kinds.fits.values()), dtype=np.float32), each),
        np.repeat(np.asarray([kinds.adjacent[other] for _, other in kinds.fits], dtype=np.float32), each),
        frozenset(crowded),
        frozenset(all_same_numbers),
    )


def _nearest(counts: Sequence[tuple[int, int]], source: Units, target: Units) -> int:
    """Return how many of the layers nearest in order each layer may be paired with.

    Args:
        counts: The numbers of units on either side whose shapes fit.
        source: The units of the source.
        target: Those of the target.
    """
    depths = [side.ancestry.ancestors.shape[1] for side in (source, target)]
    most = MAX_COST // (_COST_PER_PAIR + depths[0] * depths[1])
    if len(source) * len(target) <= MAX_LAYER_PAIRS:
        if sum(height * width for height, width in counts) <= most:
            return max(len(source), len(target))
        for nearest in _NEAREST:
            if 2 * sum(min(height * width, nearest * (height + width)) for height, width in counts) <= most:
                return nearest
    raise InputError(
        f"{len(source):,} layers of the source and {len(target):,} of the target are too many to be compared at once. "
        "Nothing was aligned; align them in parts, with include or exclude."
    )


def _near(rows: NDArray[np.int64], columns: NDArray[np.int64], nearest: int) -> NDArray[np.int64]:
    """List the pairs of each unit with those nearest to its relative place, in order: [2, pairs]."""
    pairs = []
    for own, other in ((rows, columns), (columns, rows)):
        width = min(nearest, len(other))
        middle = (np.arange(len(own)) + 0.5) * len(other) / len(own)
        first = np.clip(np.round(middle - width / 2), 0, len(other) - width).astype(np.int64)
        pairs.append(np.stack([np.repeat(own, width), other[first[:, None] + np.arange(width)].ravel()]))
    return np.concatenate([pairs[0], pairs[1][::-1]], axis=1)


def _alike(
    rows: Sequence[int], columns: Sequence[int], source: Sequence[Path], target: Sequence[Path]
) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """List the pairs of units that share a word that few others have, and those with the same rare numbers."""
    by_word: dict[str, tuple[list[int], list[int]]] = {}
    by_numbers: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}
    for side, (units, paths) in enumerate(((rows, source), (columns, target))):
        for unit in units:
            for word in {word for name in paths[unit] for word in words(name)}:
                by_word.setdefault(word, ([], []))[side].append(unit)
            found = [numbers(name) for name in paths[unit]]
            for place in {sum(found, ()), sum(found[:-1], ())} - {()}:  # those of its own name may be a role: "w1"
                by_numbers.setdefault(place, ([], []))[side].append(unit)
    same_word, same_numbers = (
        {pair for units in known.values() if max(map(len, units)) <= _MAX_SHARERS for pair in product(*units)}
        for known in (by_word, by_numbers)
    )
    return same_word, same_numbers


def _numbered(members: Mapping[_Kind, Sequence[int]]) -> NDArray[np.int64]:
    kinds = np.zeros(sum(map(len, members.values())), dtype=np.int64)
    for number, units in enumerate(members.values()):
        kinds[units] = number
    return kinds
