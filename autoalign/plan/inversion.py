"""Inversion: from an alignment to the one that saves the target back in the source's own names and layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autoalign.errors import NotInvertibleError
from autoalign.plan.matches import Match, PlanT
from autoalign.plan.operations import Operation, Parallel, Shape, chain
from autoalign.plan.regions import joined, place_of


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a source tensor and where it went."""

    view: Operation  # takes the part out of the source tensor
    match: Match
    restore: Operation  # takes the part out of the target tensor


def inverted(alignment: PlanT) -> PlanT:
    """Turn an alignment round; see ``Alignment.inverse``."""
    shapes = {spec.key: spec.shape for spec in alignment.source_specs}
    pieces: dict[str, dict[Operation, _Piece]] = {}
    changed: list[str] = []
    for match in alignment.matches:
        if match.operation.adapts:
            changed.append(match.target)
            continue
        try:
            traces = match.operation.trace([shapes[key] for key in match.sources])
        except NotInvertibleError:
            changed.append(match.target)
            continue
        for key, trace in zip(match.sources, traces, strict=True):
            pieces.setdefault(key, {}).setdefault(trace.view, _Piece(trace.view, match, trace.restore))
    first_of = {spec.storage: spec.key for spec in reversed(alignment.source_specs) if spec.key in pieces}
    restored = []
    for spec in alignment.source_specs:
        tied = first_of.get(spec.storage, "") if spec.storage is not None else ""
        known = pieces.get(spec.key) or pieces.get(tied) or {}
        restored.append(_restored(spec.key, spec.shape, list(known.values())))
    names = ", ".join(changed[:3])
    notes = (f"{len(changed)} tensors were adapted and cannot be restored: {names}.",) if changed else ()
    return replace(
        alignment,
        matches=tuple(match for match in restored if match is not None),
        ambiguous=(),
        mismatched=(),
        source_specs=alignment.target_specs,
        target_specs=alignment.source_specs,
        excluded=alignment.excluded,
        notes=notes,
        tensors=alignment.target_tensors,
        target_tensors=alignment.tensors,
    )


def _restored(key: str, shape: Shape, pieces: Sequence[_Piece]) -> Match | None:
    """Put a source tensor together from its parts; None where some of them went nowhere."""
    ordered = sorted(pieces, key=lambda piece: place_of(piece.view))
    join = joined(shape, [piece.view for piece in ordered]) if ordered else None
    if join is None:
        return None
    restore = [piece.restore for piece in ordered]
    return Match(
        target=key,
        sources=tuple(piece.match.target for piece in ordered),
        operation=chain(restore[0] if len(set(restore)) == 1 else Parallel(tuple(restore)), join),
        confidence=min(piece.match.confidence for piece in ordered),
        evidence=ordered[0].match.evidence,
        warnings=tuple(dict.fromkeys(warning for piece in ordered for warning in piece.match.warnings)),
    )
