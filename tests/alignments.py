"""Alignments whose keys have each of the statuses, for the tests of reports."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autoalign.alignment import Alignment
from autoalign.plan.matches import Candidate, Match, Mismatch
from autoalign.plan.operations import Concatenate, Copy, Reshape
from autoalign.plan.specs import TensorSpec


def spec(key: str, *shape: int, dtype: torch.dtype = torch.float32) -> TensorSpec:
    return TensorSpec(key, shape, dtype)


def mixed(matches: Sequence[Match], source: Sequence[TensorSpec], target: Sequence[TensorSpec]) -> Alignment:
    """Add to matches what is ambiguous, mismatched, missing, excluded and unexpected."""
    return Alignment(
        matches=tuple(matches),
        ambiguous=(
            Match(
                "one.weight",
                ("twin1.weight",),
                confidence=0.5,
                alternatives=(Candidate(("twin2.weight",), Copy(), 1.0),),
            ),
        ),
        mismatched=(
            Mismatch("head.weight", "fc.weight", (10, 16), (1000, 16)),
            Mismatch("head.bias", "fc.bias", (10,), (1000,)),
        ),
        source_specs=(
            *source,
            spec("twin1.weight", 7, 16),
            spec("twin2.weight", 7, 16),
            spec("fc.weight", 1000, 16),
            spec("fc.bias", 1000),
            spec("ema.decay"),
        ),
        target_specs=(
            *target,
            spec("one.weight", 7, 16),
            spec("head.weight", 10, 16),
            spec("head.bias", 10),
            spec("extra.weight", 16, 1),
            spec("pooler.weight", 9, 9),
        ),
        excluded=frozenset({"pooler.weight"}),
        notes=("The container 'ema' was taken.",),
    )


MIXED = mixed(
    (
        Match("patch.weight", ("stem.weight",), confidence=0.97),
        Match("position", ("stem.position",), Reshape((5, 16)), confidence=0.91),
        *(
            Match(f"layers.{i + 1}.ln.{leaf}", (f"blocks.{i}.norm.{leaf}",), confidence=0.99 - i / 100)
            for i in range(3)
            for leaf in ("weight", "bias")
        ),
        *(
            Match(
                f"layers.{i + 1}.qk.weight",
                (f"blocks.{i}.q.weight", f"blocks.{i}.k.weight"),
                Concatenate(0),
                warnings=("right shape, but rotary layouts differ",),
            )
            for i in range(3)
        ),
    ),
    (
        spec("stem.weight", 16, 3, 4, 4),
        spec("stem.position", 1, 5, 16),
        *(spec(f"blocks.{i}.{leaf}", 16) for i in range(3) for leaf in ("norm.weight", "norm.bias")),
        *(spec(f"blocks.{i}.{part}.weight", 16, 16, dtype=torch.float16) for i in range(3) for part in "qk"),
    ),
    (
        spec("patch.weight", 16, 3, 4, 4),
        spec("position", 5, 16),
        *(spec(f"layers.{i + 1}.ln.{leaf}", 16) for i in range(3) for leaf in ("weight", "bias")),
        *(spec(f"layers.{i + 1}.qk.weight", 32, 16) for i in range(3)),
    ),
)
