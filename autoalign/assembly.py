"""Assembly: from matched parts back to whole tensors, each with its operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from autoalign.alignment import Candidate, Match
from autoalign.doubts import DOUBTED, Style, doubt_about, style_of
from autoalign.fusion import BY_ORDER, UNTOLD, Fusion
from autoalign.joining import joined
from autoalign.kernels import as_in_torch
from autoalign.operations import InsertZeros, Operation, Parallel, chain
from autoalign.specs import TensorSpec, tied_groups
from autoalign.units import Part, parts_of

_BY_ORDER = 0.85  # how far a match is believed whose parts were told apart by their order


@dataclass(frozen=True)
class SideParts:
    """What takes part of one side in matching."""

    specs: tuple[TensorSpec, ...]
    parts: tuple[Part, ...]
    fusions: tuple[Fusion, ...] = ()

    @staticmethod
    def of(specs: Sequence[TensorSpec]) -> SideParts:
        return SideParts(tuple(specs), tuple(as_in_torch(parts_of(specs))))

    def key(self, part: Part) -> str:
        return self.specs[part.tensor].key

    @cached_property
    def doubt_of(self) -> dict[int, str]:
        """Why the parts of fused tensors might be laid out otherwise."""
        return {part: fusion.plan.doubt for fusion in self.fusions if fusion.plan for part in fusion.parts}


@dataclass(frozen=True, slots=True)
class Found:
    """The source part of one target part."""

    source: int
    operation: Operation  # from the source part to the target part
    confidence: float
    evidence: Mapping[str, float]
    rival: int | None  # the next best source part


def assembled(source: SideParts, target: SideParts, found: Mapping[int, Found]) -> list[Match]:
    """Put the parts of each target tensor together; a tensor with a part that nothing fills gets no match.

    A bias that the source does not have beside those that it has (that of the key, often) is zero.
    """
    styles = style_of(source.specs, source.parts), style_of(target.specs, target.parts)
    wholes: dict[int, list[int]] = {}
    for part, piece in enumerate(target.parts):
        wholes.setdefault(piece.tensor, []).append(part)
    absent = {
        part
        for fusion in target.fusions
        for part in fusion.absent
        if len(target.parts[part].shape) == 1 and part not in found
    }
    return [
        _match(source, target, parts, found, styles)
        for parts in wholes.values()
        if any(part in found for part in parts) and all(part in found or part in absent for part in parts)
    ]


def _match(
    source: SideParts, target: SideParts, parts: Sequence[int], found: Mapping[int, Found], styles: tuple[Style, Style]
) -> Match:
    pieces = [found[part] for part in parts if part in found]
    least = min(pieces, key=lambda piece: piece.confidence)
    confidence = least.confidence
    warnings = {
        text
        for text in (
            *(target.doubt_of.get(part, "") for part in parts),
            *(source.doubt_of.get(piece.source, "") for piece in pieces),
        )
        if text
    }
    if BY_ORDER in warnings:
        confidence *= _BY_ORDER
    if UNTOLD in warnings:
        confidence = min(confidence, DOUBTED)
    sources = tuple(source.key(source.parts[piece.source]) for piece in pieces)
    alternatives = []
    for part in parts:
        if part not in found:
            warnings.add("the source has no bias here, which is one of zeros")
        elif doubt := doubt_about(source.parts[found[part].source], target.parts[part], styles):
            confidence = min(confidence, DOUBTED)
            warnings.add(doubt.reason)
            if doubt.otherwise:
                alternatives.append(Candidate(sources, doubt.otherwise, 0.0))
    if len(pieces) == 1 and least.rival is not None and not alternatives:
        rival = source.parts[least.rival]
        alternatives.append(Candidate((source.key(rival),), rival.view, 0.0))
    views = [chain(source.parts[piece.source].view, piece.operation) for piece in pieces]
    zeros = [InsertZeros(place, target.parts[part].shape) for place, part in enumerate(parts) if part not in found]
    join = joined(target.specs[target.parts[parts[0]].tensor].shape, [target.parts[part].view for part in parts])
    assert join is not None, "the parts of a tensor make it up"
    return Match(
        target=target.key(target.parts[parts[0]]),
        sources=sources,
        operation=chain(views[0] if len(set(views)) == 1 else Parallel(tuple(views)), *zeros, join),
        confidence=confidence,
        evidence=least.evidence,
        alternatives=tuple(alternatives),
        warnings=tuple(sorted(warnings)),
    )


def with_ties(source: SideParts, target: SideParts, matches: Sequence[Match]) -> list[Match]:
    """Fill all keys of each tied target tensor from one source: that of the surest match among them."""
    by_key = {match.target: match for match in matches}
    storage = {spec.key: spec.storage for spec in source.specs if spec.storage is not None}
    for keys in tied_groups(target.specs):
        known = [by_key[key] for key in keys if key in by_key]
        if not known:
            continue
        best = max(known, key=lambda match: match.confidence)
        tensors = {tuple(storage.get(key, key) for key in match.sources): match.sources for match in known}
        if len(tensors) > 1:  # one storage cannot hold them all
            others = ", ".join(" + ".join(sources) for sources in tensors.values() if sources != best.sources)
            best = replace(best, warnings=(*best.warnings, f"tied in the target; {others} would fit as well"))
        for key in keys:
            if len(tensors) > 1 or key not in by_key or by_key[key].confidence < best.confidence:
                by_key[key] = replace(best, target=key)
    return list(by_key.values())
