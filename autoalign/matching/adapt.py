"""Shared rows: classifiers, embeddings and output layers that differ in how many classes or tokens they have.

What a layer is shows in its name, its shape and its place, never in the name of a network: a table of embeddings has
no bias, a classifier is called so or stands last, and what has as many rows as either belongs to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt, prod

from autoalign.errors import InputError
from autoalign.matching.candidates import operation_between
from autoalign.matching.layers import Path
from autoalign.matching.names import kind, words
from autoalign.matching.positions import (
    AdaptableSide,
    Plan,
    are_positions,
    are_relative,
    named,
    positions_plan,
    regridding_plan,
    relative_plan,
)
from autoalign.plan.adaptations import ADAPTS, Adapt, RepeatChannels, SumChannels, TakeRows
from autoalign.plan.keys import components, numbers, stem
from autoalign.plan.matches import Match, Mismatch
from autoalign.plan.operations import Copy, Operation, Parallel, chain
from autoalign.plan.specs import TensorSpec

_HEAD = frozenset({"head", "fc", "logits"})
_VOCAB = frozenset({"tok", "embed", "vocab"})
_NO_VOCAB = frozenset({"pos", "rel", "patch"})


@dataclass(frozen=True, slots=True)
class Rows:
    """Counterparts that differ in the number of their rows alone, of which there is one for each class or token."""

    dim: int  # along which they stand in the target
    have: int
    need: int
    before: Operation  # brings the source to the target's layout

    @property
    def counts(self) -> tuple[int, int]:
        """The number of rows on both sides."""
        return self.have, self.need


def shared_rows(
    mismatched: Sequence[Mismatch], source: AdaptableSide, target: AdaptableSide
) -> dict[str, tuple[Rows, frozenset[Adapt]]]:
    """Find the counterparts that differ in rows, and tell whether these are classes, tokens, or neither.

    What has as many rows as a layer of one kind is of its kind, but what has as many as a vocabulary is no classifier.
    """
    biases = {item.key: item.shape for item in mismatched if len(item.shape) == 1}
    found = {item.key: (item, rows) for item in mismatched if (rows := _rows_of(item, biases))}
    templates = Counter(_template(item.key) for item, _ in found.values())
    tokens, classes, outputs = set(), set(), set()
    for item, rows in found.values():
        both = named(item.source_key, item.key)
        if _is_vocabulary(item, source, target):
            tokens.add(rows.counts)
        if "lm" in both:
            outputs.add(rows.counts)
        last = templates[_template(item.key)] == 1 and (item.key == target.last or item.source_key == source.last)
        if len(item.shape) > 1 and "embed" not in both and (last or _is_called_head(item)):
            classes.add(rows.counts)
    kinds: dict[tuple[int, int], frozenset[Adapt]] = dict.fromkeys(classes, frozenset({"head"}))
    kinds |= {counts: kinds.get(counts, frozenset()) | {"vocab"} for counts in outputs}
    kinds |= dict.fromkeys(tokens, frozenset({"vocab"}))
    return {key: (rows, kinds.get(rows.counts, frozenset())) for key, (_, rows) in found.items()}


def rows_plan(rows: Rows) -> Plan:
    """Plan to take the rows that both sides have from the source, and to keep the target's others."""
    take = TakeRows(rows.dim, min(rows.have, rows.need), max(rows.need - rows.have, 0))
    before = rows.before
    text = f"the first {rows.need} of the source's {rows.have} rows were taken"
    if take.kept:
        text = f"the first {rows.have} rows are the source's, the last {take.kept} keep the model's own values"
        before = before if isinstance(before, Copy) else Parallel((before, Copy()))
    return Plan(chain(before, take), text)


def _rows_of(item: Mismatch, biases: Mapping[str, tuple[int, ...]]) -> Rows | None:
    """Read counterparts as the same layer or bias with another number of rows, if their shapes admit it."""
    shapes = item.source_shape, item.shape
    if len(item.source_shape) == len(item.shape) == 1:
        is_bias = kind(components(item.key)[-1])[0] == "bias"
        return Rows(0, *item.source_shape, *item.shape, Copy()) if is_bias else None
    if min(map(len, shapes)) < 2 or 0 in item.shape or any(size != 1 for shape in shapes for size in shape[2:]):
        return None  # the outputs of a larger kernel stand for places as well as for classes
    dim = _standing(item, biases)
    have = prod(item.source_shape) * item.shape[dim] // prod(item.shape)
    wanted = (*item.shape[:dim], have, *item.shape[dim + 1 :])
    ways = (operation_between(item.source_shape, wanted, flipped=way) for way in (False, True))
    before = next(filter(None, ways), None)
    return None if before is None else Rows(dim, have, item.shape[dim], before)


def _standing(item: Mismatch, biases: Mapping[str, tuple[int, ...]]) -> int:
    """Find the dimension of a target matrix along which its rows stand: its bias tells, where it is not the first."""
    bias = biases.get(f"{item.key.rpartition('.')[0]}.bias")
    return int(len(item.shape) == 2 and bias == item.shape[1:] and bias != item.shape[:1])


def _is_vocabulary(item: Mismatch, source: AdaptableSide, target: AdaptableSide) -> bool:
    """Tell a table of embeddings: called so on both sides, without a bias."""
    own, other = named(item.source_key), named(item.key)
    lone = source.is_lone(item.source_key) and target.is_lone(item.key)
    return lone and bool(own & _VOCAB and other & _VOCAB) and not (own | other) & _NO_VOCAB and len(item.shape) > 1


def _is_called_head(item: Mismatch) -> bool:
    """Tell a classifier that is called so on both sides, outside all blocks."""
    return all(_names_head(components(key)) for key in (item.source_key, item.key))


def _names_head(path: Path) -> bool:
    for place, component in enumerate(path):
        if _HEAD & set(words(component)):
            return not any(map(numbers, path[:place]))
    return False


def _template(key: str) -> Path:
    return tuple(map(stem, components(key)))


_CONFIDENCE = 0.8  # in a counterpart of another shape: name or place and the other dimensions agree
_PINNED = 0.95  # in one that a rule names
_COLOURS = 3


def checked_adapt(adapt: Iterable[str]) -> frozenset[str]:
    """Take ``adapt`` as a set of names.

    >>> sorted(checked_adapt("head")), sorted(checked_adapt(("vocab", "head")))
    (['head'], ['head', 'vocab'])

    Raises:
        InputError: Some name is unknown.
    """
    names = (adapt,) if isinstance(adapt, str) else tuple(adapt) if isinstance(adapt, Iterable) else (adapt,)
    unknown = [name for name in names if name not in ADAPTS]
    if unknown:
        raise InputError(
            f"adapt={', '.join(map(repr, unknown))} is no change of values that can be made. "
            f"Nothing was aligned; choose from {', '.join(map(repr, ADAPTS))}."
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
        matches: All others. One that copies a table of positions is replaced where both sides tell different grids.
        mismatched: The counterparts that may be adapted.
        source: The source.
        target: The target.
        allowed: Of ``ADAPTS``.
        pins: What the rules fix, target key -> source key.

    Returns:
        The matches that change values, and statements about what could not be adapted for want of evidence.
    """
    surest = max((match.confidence for match in matches), default=1.0)  # a side in doubt as a whole stays so
    rows = shared_rows(mismatched, source, target)
    made: list[Match] = []
    unable: dict[str, list[Mismatch]] = {}  # by reason
    for item in mismatched:
        pair = source.by_key[item.source_key], target.by_key[item.key]
        plan: Plan | str | None = None
        if not all(spec.dtype.is_floating_point for spec in pair):
            continue
        if item.key in rows and rows[item.key][1] & allowed:
            plan = rows_plan(rows[item.key][0])
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
            confidence = _PINNED if pinned else min(_CONFIDENCE, surest)
            made.append(_match(item.key, item.source_key, plan, confidence, {"rule": 1.0} if pinned else {}))
    for match in matches if "pos_embed" in allowed else ():
        pair = source.by_key[match.sources[0]], target.by_key[match.target]
        if len(match.sources) == 1 and are_positions(*pair) and (regrid := regridding_plan(*pair, source, target)):
            confidence = min(_CONFIDENCE, match.confidence)
            made.append(_match(match.target, match.sources[0], regrid, confidence, match.evidence))
    notes = []
    for reason, (first, *others) in unable.items():
        which = f"{first.key} {list(first.shape)}" + (f" and {len(others)} like it" if others else "")
        notes.append(f"{which} {'were' if others else 'was'} not adapted: {reason}")
    return made, notes


def _match(key: str, source_key: str, plan: Plan, confidence: float, evidence: Mapping[str, float]) -> Match:
    warnings = (f"adapted: {plan.warning}",)
    return Match(key, (source_key,), plan.operation, confidence, evidence, warnings=warnings)


def _is_first_kernel(source: TensorSpec, target: TensorSpec, own: AdaptableSide, other: AdaptableSide) -> bool:
    if len(source.shape) < 3 or len(source.shape) != len(target.shape):
        return False
    alike = source.shape[:1] + source.shape[2:] == target.shape[:1] + target.shape[2:]
    first = [side.kernels[0].shape[1] if side.kernels else 0 for side in (own, other)]
    return alike and (source.shape[1] == first[0] or target.shape[1] == first[1])


def _channels_plan(source: TensorSpec, target: TensorSpec) -> Plan:
    have, need = source.shape[1], target.shape[1]
    blocks = have // _COLOURS  # of pixels, where a stem folds blocks of them into channels
    if need == 1:
        return Plan(SumChannels(have), f"the sum of {have} input channels")
    if have == _COLOURS * need and isqrt(blocks) ** 2 == blocks:
        return Plan(SumChannels(_COLOURS), f"the sum of each {_COLOURS} of {have} input channels")
    return Plan(RepeatChannels(need), f"the {have} input channels are repeated for {need}, rescaled by {have}/{need}")
