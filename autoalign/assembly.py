"""Assembly: from matched parts back to whole tensors, each with its operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from autoalign.alignment import Candidate, Match
from autoalign.doubts import DOUBTED, Style, doubt_about, style_of
from autoalign.fusion import BY_ORDER, UNTOLD, Fusion
from autoalign.operations import Copy, Operation, Parallel, chain
from autoalign.specs import TensorSpec, tied_groups
from autoalign.units import Part, parts_of

_BY_ORDER = 0.85  # how far a match is believed whose parts were told apart by their order


@dataclass(frozen=True, slots=True)
class SideParts:
    """What takes part of one side in matching."""

    specs: tuple[TensorSpec, ...]
    parts: tuple[Part, ...]
    fusions: tuple[Fusion, ...] = ()

    @staticmethod
    def of(specs: Sequence[TensorSpec]) -> SideParts:
        return SideParts(tuple(specs), tuple(parts_of(specs)))

    def key(self, part: Part) -> str:
        return self.specs[part.tensor].key


@dataclass(frozen=True, slots=True)
class Found:
    """The source part of one target part."""

    source: int
    operation: Operation  # from the source part to the target part
    confidence: float
    evidence: Mapping[str, float]
    rival: int | None  # the next best source part


def assembled(source: SideParts, target: SideParts, found: Mapping[int, Found]) -> list[Match]:
    """Put the parts of each target tensor together; a tensor with a part that nothing fills gets no match."""
    styles = style_of(source.specs, source.parts), style_of(target.specs, target.parts)
    fused = {part for fusion in target.fusions for part in fusion.parts}
    by_order = {part: fusion.doubt for fusion in source.fusions for part in fusion.parts}
    whole = [((part,), Copy(), "") for part in found if part not in fused]
    joined = [
        (fusion.parts, fusion.join, fusion.doubt) for fusion in target.fusions if found.keys() >= set(fusion.parts)
    ]
    return [
        _match(source, target, [(part, found[part]) for part in parts], join, styles, {doubt}, by_order)
        for parts, join, doubt in (*whole, *joined)
    ]


def _match(
    source: SideParts,
    target: SideParts,
    pieces: Sequence[tuple[int, Found]],
    join: Operation,
    styles: tuple[Style, Style],
    warnings: set[str],
    by_order: Mapping[int, str],
) -> Match:
    least = min((piece for _, piece in pieces), key=lambda piece: piece.confidence)
    confidence = least.confidence
    sources = tuple(source.key(source.parts[piece.source]) for _, piece in pieces)
    steps = [chain(source.parts[piece.source].view, piece.operation) for _, piece in pieces]
    warnings = {text for text in (*warnings, *(by_order.get(piece.source, "") for _, piece in pieces)) if text}
    if BY_ORDER in warnings:
        confidence *= _BY_ORDER
    if UNTOLD in warnings:
        confidence = min(confidence, DOUBTED)
    alternatives = []
    for part, piece in pieces:
        if doubt := doubt_about(source.parts[piece.source], target.parts[part], styles):
            confidence = min(confidence, DOUBTED)
            warnings.add(doubt.reason)
            if doubt.otherwise:
                alternatives.append(Candidate(sources, doubt.otherwise, 0.0))
    if len(pieces) == 1 and least.rival is not None and not alternatives:
        rival = source.parts[least.rival]
        alternatives.append(Candidate((source.key(rival),), rival.view, 0.0))
    return Match(
        target=target.key(target.parts[pieces[0][0]]),
        sources=sources,
        operation=chain(steps[0] if len(set(steps)) == 1 else Parallel(tuple(steps)), join),
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
