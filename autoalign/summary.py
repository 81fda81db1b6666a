"""Summaries of an alignment for programs: plain data, as JSON knows it."""

from __future__ import annotations

from dataclasses import asdict

from autoalign.matches import Match, Plan
from autoalign.specs import TensorSpec


def as_dict(alignment: Plan) -> dict[str, object]:
    """Put all that an alignment says into plain data; operations are given as text.

    >>> import torch, autoalign
    >>> summary = as_dict(autoalign.align({"fc.weight": torch.ones(1)}, {"head.weight": torch.ones(1)}))
    >>> summary["matches"][0]["sources"], summary["missing_keys"]
    (['fc.weight'], [])
    """
    specs = {spec.key: spec for spec in alignment.target_specs}
    return {
        "coverage": alignment.coverage,
        "tensors": {"source": len(alignment.source_specs), "target": len(alignment.target_specs)},
        "matches": [_match(match, specs[match.target]) for match in alignment.matches],
        "ambiguous": [_match(match, specs[match.target]) for match in alignment.ambiguous],
        "mismatched_keys": [asdict(item) for item in alignment.mismatched],
        "missing_keys": alignment.missing_keys,
        "unexpected_keys": alignment.unexpected_keys,
        "excluded": sorted(alignment.excluded),
        "notes": list(alignment.notes),
    }


def _match(match: Match, spec: TensorSpec) -> dict[str, object]:
    return {
        "target": match.target,
        "sources": list(match.sources),
        "operation": str(match.operation),
        "shape": list(spec.shape),
        "dtype": spec.dtype_name,
        "confidence": match.confidence,
        "evidence": dict(match.evidence),
        "adapted": match.operation.adapts,
        "alternatives": [
            {"sources": list(other.sources), "operation": str(other.operation), "score": other.score}
            for other in match.alternatives
        ],
        "warnings": list(match.warnings),
    }
