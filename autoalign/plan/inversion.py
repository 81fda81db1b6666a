"""The inverse of a plan: tensors are put together again from the parts that went into the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autoalign.errors import NotInvertibleError
from autoalign.plan.matches import Match, PlanT
from autoalign.plan.operations import (
    Concatenate,
    Copy,
    Grouped,
    Operation,
    Shape,
    Split,
    Stack,
    Unstack,
    chain,
    in_parallel,
    output_shapes,
    steps_of,
)

_Part = tuple[Operation, Match, Operation]  # takes it out of the source tensor; of what; takes it out of the target's


def inverted(plan: PlanT) -> PlanT:
    """Return the plan from the target to the source; see ``Alignment.inverse``."""
    shapes = {spec.key: spec.shape for spec in plan.source_specs}
    parts: dict[str, dict[Operation, _Part]] = {}
    changed: list[str] = []
    for match in plan.matches:
        if match.operation.adapts:
            changed.append(match.target)
            continue
        try:
            traces = match.operation.trace([shapes[key] for key in match.sources])
        except NotInvertibleError:
            changed.append(match.target)
            continue
        for key, trace in zip(match.sources, traces, strict=True):
            parts.setdefault(key, {}).setdefault(trace.view, (trace.view, match, trace.restore))
    first_of = {spec.storage: spec.key for spec in reversed(plan.source_specs) if spec.key in parts}
    restored = []
    for spec in plan.source_specs:
        tied = first_of.get(spec.storage, "") if spec.storage is not None else ""
        known = parts.get(spec.key) or parts.get(tied) or {}
        restored.append(_restored(spec.key, spec.shape, list(known.values())))
    names = ", ".join(changed[:3])
    notes = (f"{len(changed)} tensors were adapted and cannot be restored: {names}.",) if changed else ()
    return replace(
        plan,
        matches=tuple(match for match in restored if match is not None),
        ambiguous=(),
        mismatched=(),
        source_specs=plan.target_specs,
        target_specs=plan.source_specs,
        notes=notes,
        tensors=plan.target_tensors,
        target_tensors=plan.tensors,
    )


def _restored(key: str, shape: Shape, parts: Sequence[_Part]) -> Match | None:
    """Put a source tensor together from its parts; None where some of them went nowhere."""
    ordered = sorted(parts, key=lambda part: place_of(part[0]))
    join = joined(shape, [view for view, _, _ in ordered]) if ordered else None
    if join is None:
        return None
    matches = [match for _, match, _ in ordered]
    return Match(
        target=key,
        sources=tuple(match.target for match in matches),
        operation=chain(in_parallel([restore for _, _, restore in ordered]), join),
        confidence=min(match.confidence for match in matches),
        evidence=matches[0].evidence,
        warnings=tuple(dict.fromkeys(warning for match in matches for warning in match.warnings)),
    )


def joined(shape: Shape, views: Sequence[Operation]) -> Operation | None:
    """Find the operation that puts the parts of a tensor together again.

    >>> from autoalign.plan.operations import Transpose
    >>> print(joined((6, 2), [Split(0, 0, 4), Split(0, 4, 2)]))
    concatenate(dim 0)
    >>> print(joined((6, 2), [chain(Transpose(), Split(0, 0, 1)), chain(Transpose(), Split(0, 1, 1))]))
    concatenate(dim 0) + transpose
    >>> joined((6, 2), [Split(0, 0, 4)]) is None
    True

    Args:
        shape: Of the whole tensor.
        views: What took each part out of it, in the order of ``place_of``.

    Returns:
        From the parts, in this order, to the tensor; None if they overlap or leave something out.
    """
    steps = [steps_of(view) for view in views]
    if len(views) == 1 and not steps[0]:
        return Copy()
    if not all(steps):
        return None
    first = steps[0][0]
    if not first.takes_part:
        if any(own[0] != first for own in steps):
            return None
        inner = joined(output_shapes(first, [shape])[0], [chain(*rest) for _, *rest in steps])
        return None if inner is None else chain(inner, first.trace([shape])[0].restore)
    groups: dict[Operation, list[Operation]] = {}
    for step, *rest in steps:
        groups.setdefault(step, []).append(chain(*rest))
    join = _join(shape, list(groups))
    inner_joins = [joined(output_shapes(step, [shape])[0], members) for step, members in groups.items()]
    known = [inner for inner in inner_joins if inner is not None]
    if join is None or len(known) < len(groups):
        return None
    if len(groups) == len(views):
        return chain(in_parallel(known), join)
    if len({(inner, len(members)) for inner, members in zip(known, groups.values(), strict=True)}) > 1:
        return None
    return chain(Grouped(len(views) // len(groups), known[0]), join)


def place_of(view: Operation) -> tuple[int, ...]:
    """Return the place of a part in the tensor that it was taken from, to order parts by.

    >>> place_of(Split(0, 4, 2)) > place_of(Split(0, 0, 4))
    True
    """
    return tuple(
        step.start if isinstance(step, Split) else step.index
        for step in steps_of(view)
        if isinstance(step, Split | Unstack)
    )


def _join(shape: Shape, parts: Sequence[Operation]) -> Operation | None:
    """Find what joins slices or ranges, in order, if they make up the whole tensor."""
    dims = {part.dim for part in parts if isinstance(part, Split | Unstack)}
    if len(dims) != 1:
        return None
    dim = dims.pop()
    if list(parts) == [Unstack(dim, index) for index in range(shape[dim])]:
        return Stack(dim)
    end = 0
    for part in parts:
        if not isinstance(part, Split) or part.start != end:
            return None
        end += part.length
    return Concatenate(dim) if end == shape[dim] else None
