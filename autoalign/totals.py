"""The totals of an alignment, as every report shows them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from autoalign.matches import FILLED, Plan, Status

STATUSES: tuple[Status, ...] = ("matched", "adapted", "ambiguous", "mismatched", "missing")


@dataclass(frozen=True, slots=True)
class Share:
    """The tensors of one status, of one side."""

    status: str
    tensors: int
    elements: int


@dataclass(frozen=True, slots=True)
class Totals:
    """How many tensors and elements of either side have which status; those without any are left out."""

    target: tuple[Share, ...]
    source: tuple[Share, ...]  # used and unexpected
    excluded: int

    @property
    def filled(self) -> str:
        """Say in a sentence what is filled from what."""
        filled = sum(share.tensors for share in self.target if share.status in FILLED)
        used = sum(share.tensors for share in self.source if share.status == "used")
        return (
            f"{filled:,} of {tensors(self.target):,} target tensors are filled from "
            f"{used:,} of {tensors(self.source):,} source tensors."
        )

    @property
    def lead(self) -> str:
        """Say in a sentence or two what is filled from what, and what was excluded."""
        return self.filled + (f" {self.excluded:,} of the others were excluded." if self.excluded else "")


def totals_of(alignment: Plan) -> Totals:
    """Count what each status has."""
    status, unexpected = alignment.status, set(alignment.unexpected_keys)
    target: dict[str, list[int]] = {}
    for spec in alignment.target_specs:
        target.setdefault(status[spec.key], []).append(spec.numel)
    source: dict[str, list[int]] = {}
    for spec in alignment.source_specs:
        source.setdefault("unexpected" if spec.key in unexpected else "used", []).append(spec.numel)
    return Totals(_shares(STATUSES, target), _shares(("used", "unexpected"), source), len(alignment.excluded))


def tensors(shares: Iterable[Share]) -> int:
    """Count the tensors of all statuses together."""
    return sum(share.tensors for share in shares)


def elements(shares: Iterable[Share]) -> int:
    """Count the elements of all statuses together."""
    return sum(share.elements for share in shares)


def _shares(statuses: Iterable[str], sizes: dict[str, list[int]]) -> tuple[Share, ...]:
    return tuple(Share(status, len(sizes[status]), sum(sizes[status])) for status in statuses if status in sizes)
