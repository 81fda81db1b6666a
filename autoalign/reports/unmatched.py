"""Explain the keys that are left on either side of an alignment: why, and what comes nearest on the other side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from autoalign.plan.keys import stem
from autoalign.plan.matches import Plan
from autoalign.plan.quantised import Members
from autoalign.plan.specs import TensorSpec

_ALIKE = 40.0  # of 100; names less alike than that say nothing about each other

_Shape = tuple[int, ...]


@dataclass(slots=True)
class _Alike:
    """The tensors of one shape on one side."""

    free: int = 0
    quantised: int = 0
    used: int = 0
    first_used: str = ""


@dataclass(frozen=True, slots=True)
class Counterparts:
    """What one side of an alignment has for a key that is left on the other side."""

    side: Literal["source", "target"]
    excluded: frozenset[str]
    own_codes: Members  # the quantised tensors of the side that has the key
    codes: Members  # those of this side
    uses: dict[str, str]  # from each key that is used to what it is used for, in words
    by_shape: dict[_Shape, _Alike]  # by shape without dimensions of one
    by_template: dict[str, list[TensorSpec]]  # those that are free, by key without numbers


def counterparts(alignment: Plan, side: Literal["source", "target"]) -> Counterparts:
    """Collect what one side has for the keys that are left on the other side."""
    uses: dict[str, str] = {}
    for match in alignment.matches:
        if side == "target":
            how = "adapted" if match.operation.adapts else "filled"
            uses[match.target] = f"{how} from {' + '.join(match.sources)}"
        else:
            for key in match.sources:
                uses.setdefault(key, f"{'adapted' if match.operation.adapts else 'used'} for {match.target}")
    own_codes, codes = alignment.quantised if side == "target" else reversed(alignment.quantised)
    by_shape: dict[_Shape, _Alike] = {}
    by_template: dict[str, list[TensorSpec]] = {}
    for spec in alignment.source_specs if side == "source" else alignment.target_specs:
        alike = by_shape.setdefault(_essential(spec.shape), _Alike())
        if spec.key in uses:
            alike.used += 1
            alike.first_used = alike.first_used or spec.key
        elif spec.key in codes:
            alike.quantised += 1
        elif spec.key not in alignment.excluded:
            alike.free += 1
            by_template.setdefault(stem(spec.key), []).append(spec)
    return Counterparts(side, alignment.excluded, own_codes, codes, uses, by_shape, by_template)


def reason(spec: TensorSpec, others: Counterparts) -> str:
    """Say why a tensor is left, given the other side.

    Tensors of one shape that are not excluded are left for the same reason.
    """
    if spec.key in others.excluded:
        return "excluded"
    if member := others.own_codes.get(spec.key):
        return f"quantised as {member.group.scheme}, and its elements are no values"
    if member := others.codes.get(spec.key):
        return f"the {others.side}'s is quantised as {member.group.scheme}"
    alike = others.by_shape.get(_essential(spec.shape))
    if alike is None:
        return f"no {others.side} tensor of this shape"
    if alike.free:
        return f"not clearly any of the unused {others.side} tensors of this shape ({alike.free})"
    if alike.used == 1:
        return f"the only {others.side} tensor of this shape, {alike.first_used}, is {others.uses[alike.first_used]}"
    if alike.used:
        return f"all {alike.used} {others.side} tensors of this shape have other counterparts"
    return f"the {others.side} tensors of this shape are {'quantised' if alike.quantised else 'excluded'}"


def nearest(spec: TensorSpec, others: Counterparts) -> TensorSpec | None:
    """Find the free tensor of the other side with the likest name, if there is one with a like name.

    An excluded tensor and a quantised one have none.
    """
    if spec.key in others.excluded or spec.key in others.own_codes:
        return None
    from rapidfuzz import process
    from rapidfuzz.fuzz import ratio

    # First among kinds of blocks, then among the blocks: names are compared as often as there are templates.
    found = process.extractOne(stem(spec.key), list(others.by_template), scorer=ratio, score_cutoff=_ALIKE)
    if found is None:
        return None
    block = others.by_template[found[0]]
    _, _, position = process.extractOne(spec.key, [other.key for other in block], scorer=ratio)
    return block[position]


def difference(shape: _Shape, needed: _Shape) -> str:
    """Say in which dimension a shape differs from what is needed; empty unless it is one of several.

    >>> difference((1000, 512), (10, 512))
    ' (dim 0: 1000, needs 10)'
    """
    if len(shape) != len(needed):
        return ""
    differing = [dim for dim, (size, wanted) in enumerate(zip(shape, needed, strict=True)) if size != wanted]
    if len(shape) == 1 or len(differing) != 1:
        return ""
    (dim,) = differing
    return f" (dim {dim}: {shape[dim]}, needs {needed[dim]})"


def _essential(shape: _Shape) -> _Shape:
    return tuple(size for size in shape if size != 1)
