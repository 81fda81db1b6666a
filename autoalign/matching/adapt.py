"""Adapt: matches that change values, where ``adapt=`` allows it: heads, vocabularies, positions, input channels.

What a layer is shows in its name, its shape and its place, never in the name of a network: a table of embeddings has
no bias, a classifier is called so or stands last, and what has as many rows as either belongs to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt, prod

from autoalign.errors import InputError, did_you_mean
from autoalign.matching.candidates import operation_between
from autoalign.matching.confidence import ADAPTED, ADAPTED_BY_RULE
from autoalign.matching.names import kind, words
from autoalign.matching.paths import Path
from autoalign.matching.positions import (
    AdaptableSide,
    Adaptation,
    are_positions,
    are_relative,
    key_words,
    positions_plan,
    regridding_plan,
    relative_plan,
)
from autoalign.matching.vocabulary import CLASSIFIER_WORDS, EMBEDDING_WORDS, NO_VOCABULARY
from autoalign.plan.adaptations import RepeatChannels, SumChannels, TakeRows
from autoalign.plan.keys import components, numbers, template
from autoalign.plan.matches import Match, Mismatch
from autoalign.plan.operations import Copy, Operation, Parallel, Shape, chain
from autoalign.plan.options import ADAPTS, Adapt
from autoalign.plan.specs import TensorSpec

_COLOURS = 3


@dataclass(frozen=True, slots=True)
class _Rows:
    """Counterparts that differ only in their number of rows, one for each class or token."""

    dim: int  # of the target, along which the rows stand
    counts: tuple[int, int]  # of the source and of the target
    before: Operation  # brings the source to the target's layout


def _rows_that_differ(
    mismatched: Sequence[Mismatch], source: AdaptableSide, target: AdaptableSide
) -> dict[str, tuple[_Rows, frozenset[Adapt]]]:
    """Find the counterparts that differ in rows, and what these are: classes ("head"), tokens ("vocab"), or neither.

    What has as many rows as a layer of one kind is of its kind, but what has as many as a vocabulary is no classifier.
    """
    biases = {item.key: item.shape for item in mismatched if len(item.shape) == 1}
    found = {item.key: (item, rows) for item in mismatched if (rows := _rows_of(item, biases))}
    templates = Counter(template(components(key)) for key in found)
    tokens, classes, outputs = set(), set(), set()
    for item, rows in found.values():
        both = key_words(item.source_key, item.key)
        if _is_vocabulary(item, source, target):
            tokens.add(rows.counts)
        if "lm" in both:
            outputs.add(rows.counts)
        is_only = templates[template(components(item.key))] == 1
        last = is_only and (item.key == target.last or item.source_key == source.last)
        is_head = last or all(_is_classifier(components(key)) for key in (item.source_key, item.key))
        if len(item.shape) > 1 and "embed" not in both and is_head:
            classes.add(rows.counts)
    kinds: dict[tuple[int, int], frozenset[Adapt]] = dict.fromkeys(classes, frozenset({"head"}))
    kinds |= {counts: kinds.get(counts, frozenset()) | {"vocab"} for counts in outputs}
    kinds |= dict.fromkeys(tokens, frozenset({"vocab"}))
    return {key: (rows, kinds.get(rows.counts, frozenset())) for key, (_, rows) in found.items()}


def _rows_plan(rows: _Rows) -> Adaptation:
    """Plan to take the rows that both sides have from the source, and to keep the target's others."""
    (have, need), before = rows.counts, rows.before
    take = TakeRows(rows.dim, min(have, need), max(need - have, 0))
    text = f"the first {need} of the source's {have} rows were taken"
    if take.kept:
        text = f"the first {have} rows are the source's, the last {take.kept} keep the model's own values"
        before = before if isinstance(before, Copy) else Parallel((before, Copy()))
    return Adaptation(chain(before, take), text)


def _rows_of(item: Mismatch, biases: Mapping[str, Shape]) -> _Rows | None:
    """Read counterparts as one layer or bias with different numbers of rows, if their shapes admit it."""
    shapes = item.source_shape, item.shape
    if len(item.source_shape) == len(item.shape) == 1:
        is_bias = kind(components(item.key)[-1])[0] == "bias"
        return _Rows(0, (*item.source_shape, *item.shape), Copy()) if is_bias else None
    if min(map(len, shapes)) < 2 or 0 in item.shape or any(size != 1 for shape in shapes for size in shape[2:]):
        return None  # the outputs of a larger kernel stand for places as well as for classes
    bias = biases.get(f"{item.key.rpartition('.')[0]}.bias")  # shows if the rows are not along the first dimension
    dim = int(len(item.shape) == 2 and bias == item.shape[1:] and bias != item.shape[:1])
    have = prod(item.source_shape) * item.shape[dim] // prod(item.shape)
    wanted = (*item.shape[:dim], have, *item.shape[dim + 1 :])
    ways = (operation_between(item.source_shape, wanted, transposed=way) for way in (False, True))
    before = next(filter(None, ways), None)
    return None if before is None else _Rows(dim, (have, item.shape[dim]), before)


def _is_vocabulary(item: Mismatch, source: AdaptableSide, target: AdaptableSide) -> bool:
    """True for a table of embeddings: it has such a name on both sides, and no bias."""
    own, other = key_words(item.source_key), key_words(item.key)
    has_name = own & EMBEDDING_WORDS and other & EMBEDDING_WORDS and not (own | other) & NO_VOCABULARY
    has_no_bias = source.has_no_bias(item.source_key) and target.has_no_bias(item.key)
    return bool(has_name) and has_no_bias and len(item.shape) > 1


def _is_classifier(path: Path) -> bool:
    """True if a name outside all blocks is that of a classifier."""
    for place, component in enumerate(path):
        if not CLASSIFIER_WORDS.isdisjoint(words(component)):
            return not any(map(numbers, path[:place]))
    return False


def checked_adapt(adapt: Iterable[str]) -> frozenset[str]:
    """Return ``adapt`` as a set of names.

    >>> sorted(checked_adapt("head")), sorted(checked_adapt(("vocab", "head")))
    (['head'], ['head', 'vocab'])

    Raises:
        InputError: Some name is unknown.
    """
    names = (adapt,) if isinstance(adapt, str) else tuple(adapt) if isinstance(adapt, Iterable) else (adapt,)
    unknown = [name for name in names if name not in ADAPTS]
    if unknown:
        raise InputError(
            f"adapt={', '.join(map(repr, unknown))} is not a known change of values. Nothing was aligned; choose from "
            f"{', '.join(map(repr, ADAPTS))}.{did_you_mean(str(unknown[0]), ADAPTS)}"
        )
    return frozenset(names)


def adapted(
    matches: Sequence[Match],
    mismatched: Sequence[Mismatch],
    source: AdaptableSide,
    target: AdaptableSide,
    allowed: frozenset[str],
    pins: Mapping[str, str],
) -> tuple[list[Match], list[str]]:
    """Make the matches that change values.

    Args:
        matches: All others. A copied table of positions is resized if both sides tell that their grids differ.
        mismatched: The counterparts that may be adapted.
        source: The source.
        target: The target.
        allowed: Names of ``ADAPTS``.
        pins: Pairs that the rules fix, target key -> source key.

    Returns:
        The matches that change values, and notes on what could not be adapted for lack of evidence.
    """
    surest = max((match.confidence for match in matches), default=1.0)  # a side in doubt as a whole stays so
    rows = _rows_that_differ(mismatched, source, target)
    made: list[Match] = []
    unable: dict[str, list[Mismatch]] = {}  # by reason
    for item in mismatched:
        pair = source.by_key[item.source_key], target.by_key[item.key]
        plan: Adaptation | str | None = None
        if not all(spec.dtype.is_floating_point for spec in pair):
            continue
        if item.key in rows and rows[item.key][1] & allowed:
            plan = _rows_plan(rows[item.key][0])
        elif "in_channels" in allowed and _is_first_kernel(*pair, source, target):
            plan = _channels_plan(*pair)
        elif "rel_pos" in allowed and are_relative(*pair):
            plan = relative_plan(*pair, source, target)
        elif "pos_embed" in allowed and are_positions(*pair):
            plan = positions_plan(*pair, source, target)
        if isinstance(plan, str):
            unable.setdefault(plan, []).append(item)
        elif plan is not None:
            pinned = pins.get(item.key) == item.source_key
            confidence = ADAPTED_BY_RULE if pinned else min(ADAPTED, surest)
            made.append(_match(item.key, item.source_key, plan, confidence, {"rule": 1.0} if pinned else {}))
    for match in matches if "pos_embed" in allowed else ():
        pair = source.by_key[match.sources[0]], target.by_key[match.target]
        if len(match.sources) == 1 and are_positions(*pair) and (regrid := regridding_plan(*pair, source, target)):
            confidence = min(ADAPTED, match.confidence)
            made.append(_match(match.target, match.sources[0], regrid, confidence, match.evidence))
    notes = []
    for reason, (first, *others) in unable.items():
        which = f"{first.key} {list(first.shape)}" + (f" and {len(others)} like it" if others else "")
        notes.append(f"{which} {'were' if others else 'was'} not adapted: {reason}")
    return made, notes


def _match(key: str, source_key: str, plan: Adaptation, confidence: float, evidence: Mapping[str, float]) -> Match:
    warnings = (f"adapted: {plan.warning}",)
    return Match(key, (source_key,), plan.operation, confidence, evidence, warnings=warnings)


def _is_first_kernel(source: TensorSpec, target: TensorSpec, own: AdaptableSide, other: AdaptableSide) -> bool:
    if len(source.shape) < 3 or len(source.shape) != len(target.shape):
        return False
    alike = source.shape[:1] + source.shape[2:] == target.shape[:1] + target.shape[2:]
    first = [side.kernels[0].shape[1] if side.kernels else 0 for side in (own, other)]
    return alike and (source.shape[1] == first[0] or target.shape[1] == first[1])


def _channels_plan(source: TensorSpec, target: TensorSpec) -> Adaptation:
    have, need = source.shape[1], target.shape[1]
    blocks = have // _COLOURS  # of pixels, where a stem folds blocks of them into channels
    if need == 1:
        return Adaptation(SumChannels(have), f"the sum of {have} input channels")
    if have == _COLOURS * need and isqrt(blocks) ** 2 == blocks:
        return Adaptation(SumChannels(_COLOURS), f"the sum of each {_COLOURS} of {have} input channels")
    return Adaptation(
        RepeatChannels(need), f"the {have} input channels are repeated for {need}, rescaled by {have}/{need}"
    )
