"""Are two networks related, and in what sizes do unlike ones differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from math import exp, log

import numpy as np

from autoalign.matching.assembly import SideParts
from autoalign.matching.assignment import Assignment
from autoalign.matching.candidates import paired_parts
from autoalign.matching.confidence import MIN_LIKELY, fitted_weights
from autoalign.matching.features import Floats, namesakes
from autoalign.matching.layers import Part, Units, counts_of, squeeze, units_of
from autoalign.matching.names import kind, words
from autoalign.matching.vocabulary import EMBEDDING_WORDS, NO_VOCABULARY
from autoalign.plan.operations import Shape

_MIN_SHARE_EXPLAINED = 0.9  # of both sides' matrices; what explains fewer is not said
_MIN_SHARE_SPLIT = 0.6  # of them that differ in one dimension; in a part of a model nearly all but embeddings do
_MAX_INPUT_CHANNELS = 4  # of images
_MIN_ROWS_PER_COLUMN = 4  # of a table of words
_UNMATCHED_OF_RELATED = 0.05  # share of layers; whether fewer have no counterpart tells little
_PART_COUNTS = (2, 4, 8)
_MAX_SIZES_TOLD = 3
_NAMES_AGREE = "Most layers of source and target have equal names, but unequal shapes: "
UNLIKE = (
    "Source and target look like different architectures: single layers have matching shapes, but no complete block "
    "does, and names do not agree. Nothing was matched. If they are related, name a pair of keys in rules=."
)

_Pairs = list[tuple[int, int]]  # of parts: source, target
_Side = tuple[Units, Sequence[Part]]


def relation(
    assignment: Assignment,
    confidence: Floats,
    source: _Side,
    target: _Side,
    whole: tuple[Sequence[Part], Sequence[Part]],
    *,
    ordered: bool,
) -> float:
    """Return the probability that two networks are related, so that what they have in common may be believed.

    The fitted weights tell. But they must not begin with layers of different kinds: one that starts with a table of
    words is not one that starts with a convolution. That is seen in the parts of the ``whole`` sides, in scope or not:
    by shapes, and in the order of keys if they are ``ordered``.
    """
    likely = confidence > MIN_LIKELY
    pairs = zip(assignment.source[likely].tolist(), assignment.target[likely].tolist(), strict=True)
    paired = [(source[1][a], target[1][b]) for i, j in pairs for a, b in paired_parts(source[0][i], target[0][j])]
    firsts = [(_input_layer(whole[0]), _input_layer(whole[1]))]
    if ordered:
        firsts.append((_first_layer(whole[0]), _first_layer(whole[1])))
    if not all(_begin_alike(own, other, paired) for own, other in firsts if own and other):
        return 0.0
    found, weights = common_ground(assignment, confidence, source, target), fitted_weights("relation")
    return 1 / (1 + exp(-sum(weights[name] * value for name, value in found.items())))


def common_ground(assignment: Assignment, confidence: Floats, source: _Side, target: _Side) -> dict[str, float]:
    """Measure what two networks have in common, by name: what ``python -m benchmarks.fit`` finds the weights of.

    Of one of two related networks, nearly all layers have a counterpart, with nearly all of their tensors: so what
    counts is how few have none, as a logarithm.
    """
    likely = confidence > MIN_LIKELY
    matched = []
    for (units, parts), index in ((source, assignment.source), (target, assignment.target)):
        counts = counts_of(units, parts)
        share = counts[np.unique(index[likely])].sum() / max(counts.sum(), 1)
        matched.append(-log(1 - share + _UNMATCHED_OF_RELATED))
    return {
        "bias": 1.0,
        "less matched side": min(matched),
        "more matched side": max(matched),
        "shapes": float(assignment.cues["shape"][likely].mean()) if likely.any() else 0.0,
    }


def _begin_alike(own: Part, other: Part, paired: Sequence[tuple[Part, Part]]) -> bool:
    """True if two first layers are of one kind, or matched to each other, or one of them to a layer of its sizes."""
    return _input_kind(own) == _input_kind(other) or any(
        (a.tensor, b.tensor) == (own.tensor, other.tensor)
        or (
            (a.tensor == own.tensor or b.tensor == other.tensor)
            and sorted(squeeze(a.shape)) == sorted(squeeze(b.shape))
        )
        for a, b in paired
    )


def _first_layer(parts: Sequence[Part]) -> Part | None:
    """Find the matrix or the kernel of the first layer that has one."""
    for unit in units_of(parts):
        for values, index in unit.parts:
            if values == parts[index].path[-1] == "weight" and len(parts[index].shape) > 1:
                return parts[index]
    return None


def _input_layer(parts: Sequence[Part]) -> Part | None:
    """Find the layer that takes images, sound or words, by its shape and its name."""
    kernels = [part for part in parts if len(part.shape) > 2 and part.path[-1] == "weight" and max(part.shape[2:]) > 1]
    few = [part for part in kernels if 1 < part.shape[1] <= _MAX_INPUT_CHANNELS]
    single = [part for part in kernels if part.shape[1] == 1 and part.count == 1]  # several are depthwise
    made = {part.shape[0] for part in parts if len(part.shape) > 1}
    found = few or (single if len(single) == 1 else []) or [part for part in kernels if part.shape[1] not in {1, *made}]
    taken = {size for part in parts if len(part.shape) > 1 for size in part.shape[1:]}
    biased = {part.path[:-1] for part in parts if kind(part.path[-1])[0] == "bias"}
    tables = [
        part
        for part in parts
        if len(part.shape) == 2 and part.shape[0] >= _MIN_ROWS_PER_COLUMN * part.shape[1]
        if _names_words(part) or not (part.shape[0] in taken or part.path[:-1] in biased)
    ]
    return next(iter(found or tables), None)


def _input_kind(part: Part) -> tuple[int, bool]:
    """Return how many dimensions a first layer has, and whether it takes a wave rather than a spectrogram."""
    return len(part.shape), len(part.shape) == 3 and part.shape[1] == 1


def _names_words(part: Part) -> bool:
    found = {word for name in part.path[-2:] for word in words(name)}
    return not found.isdisjoint(EMBEDDING_WORDS) and found.isdisjoint(NO_VOCABULARY)


def describe_unlike(source: SideParts, target: SideParts) -> str:
    """Describe in what two networks differ that are not related."""
    if told := _same_at_another_size(source.parts, target.parts):
        return f"{told} Nothing was matched."
    own, other = units_of(source.parts), units_of(target.parts)
    same = namesakes(own.paths, other.paths, (counts_of(own, source.parts), counts_of(other, target.parts)))
    pairs = [(source.parts[a], target.parts[b]) for i, j in same for a, b in paired_parts(own[i], other[j])]
    sizes = _size_changes(pairs)
    return f"{_NAMES_AGREE}{sizes}. Nothing was matched." if sizes else UNLIKE


def equal_layers(
    same: Iterable[tuple[int, int]], source: tuple[Units, Sequence[Part]], target: tuple[Units, Sequence[Part]]
) -> list[tuple[int, int]]:
    """List those of some pairs of layers that hold tensors of equal kinds and shapes, counters aside."""
    contents = [
        [[(of, parts[part].shape, parts[part].numeric) for of, part in unit.parts if of != "count"] for unit in units]
        for units, parts in (source, target)
    ]
    return [(i, j) for i, j in same if contents[0][i] == contents[1][j]]


def _size_changes(pairs: Sequence[tuple[Part, Part]]) -> str:
    """Name the sizes of layers of the same name that differ, the most common first."""
    changes = Counter(
        sizes
        for own, other in pairs
        if len(own.shape) == len(other.shape)
        for sizes in zip(own.shape, other.shape, strict=True)
        if sizes[0] != sizes[1]
    )
    told = [f"{a} in the source is {b} in the target" for (a, b), _ in changes.most_common(_MAX_SIZES_TOLD)]
    more = len(changes) - len(told)
    return ", ".join(told) + (f", and {more} more" if more > 0 else "")


def _same_at_another_size(source: Sequence[Part], target: Sequence[Part]) -> str:
    """Describe how one network would be the other if its matrices had other sizes; "" if they are unlike."""
    own, other = _matrices(source), _matrices(target)
    if not own or not other:
        return ""
    for count in _PART_COUNTS:
        for names, sides in (("source", "target"), (own, other)), (("target", "source"), (other, own)):
            is_explained, changed = _explained(*sides, partial(_joined, count=count))
            if is_explained and changed >= _MIN_SHARE_SPLIT:
                return f"The {names[0]} looks like 1 of {count} parts of the {names[1]}, split for parallel processes."
    widths = [Counter(size for shape in of.elements() for size in shape).most_common(1)[0][0] for of in (own, other)]
    if widths[0] != widths[1] and _explained(own, other, partial(_resized, own=widths[0], other=widths[1]))[0]:
        return f"The source looks like the same network at width {widths[0]}, not {widths[1]}."
    return ""


def _matrices(parts: Sequence[Part]) -> Counter[Shape]:
    return Counter(part.shape for part in parts for _ in range(part.count) if len(part.shape) > 1)


def _resized(shape: Shape, own: int, other: int) -> Iterator[Shape]:
    """Yield a shape with all, then some, of its sizes changed as one width is to the other."""
    ways = [[size * other // own, size] if own and size * other % own == 0 else [size] for size in shape]
    yield from product(*ways)


def _joined(shape: Shape, count: int) -> Iterator[Shape]:
    """Yield a shape with one of its sizes multiplied, then as it is."""
    yield from ((*shape[:dim], size * count, *shape[dim + 1 :]) for dim, size in enumerate(shape))
    yield shape


def _explained(
    own: Counter[Shape], other: Counter[Shape], images: Callable[[Shape], Iterator[Shape]]
) -> tuple[bool, float]:
    """Return True if shapes of one side become those of the other, and the share of them that must change for it."""
    left, found, changed = other.copy(), 0, 0
    for shape, count in own.items():
        for image in images(shape):
            taken = min(count, left[image])
            left[image] -= taken
            count -= taken
            found += taken
            changed += taken * (image != shape)
    return found >= _MIN_SHARE_EXPLAINED * max(own.total(), other.total()), changed / max(found, 1)
