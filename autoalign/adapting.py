"""Adapting: which of the counterparts of another shape ``adapt`` may fill, and by what operation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isqrt

from autoalign.adaptable import AdaptableSide, Plan
from autoalign.adaptations import ADAPTS, RepeatChannels, SumChannels
from autoalign.errors import InputError
from autoalign.matches import Match, Mismatch
from autoalign.positions import are_positions, are_relative, positions_plan, regridding_plan, relative_plan
from autoalign.shared_rows import rows_plan, shared_rows
from autoalign.specs import TensorSpec

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
