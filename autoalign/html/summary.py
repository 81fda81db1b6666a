"""The totals of an alignment as the page and the notebook show them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from autoalign.alignment import FILLED, Alignment, Status

STATUSES: tuple[Status, ...] = ("matched", "adapted", "ambiguous", "mismatched", "missing")


@dataclass(frozen=True, slots=True)
class Share:
    """The tensors of one status, of one side."""

    status: str
    tensors: int
    elements: int


@dataclass(frozen=True, slots=True)
class Summary:
    """How many tensors and elements of either side have which status; those without any are left out."""

    target: tuple[Share, ...]
    source: tuple[Share, ...]  # used and unexpected
    excluded: int

    @property
    def lead(self) -> str:
        """Say in a sentence what is filled from what."""
        filled = sum(share.tensors for share in self.target if share.status in FILLED)
        used = sum(share.tensors for share in self.source if share.status == "used")
        excluded = f" {self.excluded:,} of the others were excluded." if self.excluded else ""
        return (
            f"{filled:,} of {tensors(self.target):,} target tensors are filled from "
            f"{used:,} of {tensors(self.source):,} source tensors.{excluded}"
        )


def summary(alignment: Alignment) -> Summary:
    """Count what each status has."""
    sizes = {spec.key: spec.numel for spec in alignment.target_specs}
    by_status: dict[str, list[int]] = {}
    for key, status in alignment.status.items():
        by_status.setdefault(status, []).append(sizes[key])
    unexpected = set(alignment.unexpected_keys)
    used: dict[str, list[int]] = {}
    for spec in alignment.source_specs:
        used.setdefault("unexpected" if spec.key in unexpected else "used", []).append(spec.numel)
    return Summary(_shares(STATUSES, by_status), _shares(("used", "unexpected"), used), len(alignment.excluded))


def tensors(shares: Iterable[Share]) -> int:
    """Count the tensors of all statuses together."""
    return sum(share.tensors for share in shares)


def elements(shares: Iterable[Share]) -> int:
    """Count the elements of all statuses together."""
    return sum(share.elements for share in shares)


def _shares(statuses: Iterable[str], sizes: dict[str, list[int]]) -> tuple[Share, ...]:
    return tuple(Share(status, len(sizes[status]), sum(sizes[status])) for status in statuses if status in sizes)
