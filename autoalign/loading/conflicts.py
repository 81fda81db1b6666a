"""Conflicts: what a checkpoint holds and the model has no place for, so that the model computes something else.

Two tensors for one that the model ties, biases of layers that have none in the model, and classifiers whose background
is another one of their classes. Values are compared, which ``align`` does not do; a note on each conflict says what was
taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from autoalign.alignment import Alignment
from autoalign.matching.assembly import tie_warning
from autoalign.matching.names import kind
from autoalign.plan.keys import split_key
from autoalign.plan.matches import Caution, Match
from autoalign.plan.specs import tied_groups

_BOX_SIZE = 4  # numbers of a box
_MAX_LISTED = 3  # keys in a note


def settled(alignment: Alignment) -> Alignment:
    """Fill tied keys from one tensor, unless theirs have equal values, and note what is lost of the checkpoint."""
    fills = {match.target: match for match in alignment.matches}
    notes = []
    for keys in tied_groups(alignment.target_specs):
        claims = _claims([fills[key] for key in keys if key in fills], alignment)
        others = [match for match in claims[1:] if not _are_equal(alignment, claims[0], match)]
        if len(claims) > 1:
            given = claims[:1] if others else claims
            fills |= {
                key: replace(given[min(place, len(given) - 1)], target=key, alternatives=())
                for place, key in enumerate(keys)
                if key in fills
            }
        lost = [" + ".join(match.sources) for match in others] + list(_of_other_shapes(alignment, keys, fills))
        if lost:
            notes.append(
                f"{' and '.join(keys)} are one tensor in the model, and differ in the checkpoint: "
                f"{' + '.join(claims[0].sources)} was taken, not {', '.join(lost)}."
            )
    matches = tuple(fills[match.target] for match in alignment.matches)
    found = replace(alignment, matches=matches) if matches != alignment.matches else alignment
    if biases := _lost_biases(found):
        more = ", ..." if len(biases) > _MAX_LISTED else ""
        notes.append(
            f"{len(biases)} biases have no place in the model, where their layers have none, and were dropped: "
            f"{', '.join(biases[:_MAX_LISTED])}{more}. Unless they are added elsewhere, it computes something else."
        )
    notes += _row_orders(found)
    return replace(found, notes=(*found.notes, *map(Caution, notes))) if notes else found


def _row_orders(alignment: Alignment) -> Iterator[str]:
    """Note the classifiers whose rows may have another order, as the boxes that belong to them show.

    Some code has a box of four numbers for each class and none for the background, which is its last class; other code
    has one for the background too, which is its first.
    """
    weights = [match for match in alignment.matches if kind(split_key(match.target)[1])[0] == "weight"]
    shapes = {spec.key: spec.shape for spec in alignment.target_specs}
    for item in alignment.mismatched:
        rows = sorted(shape[0] for shape in (item.shape, item.source_shape) if len(shape) > 1)
        if len(rows) < 2 or rows[1] % _BOX_SIZE or rows[1] - rows[0] != _BOX_SIZE:
            continue
        classes, around = rows[1] // _BOX_SIZE, _around(item.key)
        for match in weights:
            if shapes[match.target][:1] == (classes,) and _around(match.target) == around:
                yield (
                    f"The rows of {match.target} may be in another order: of its {classes:,} classes one is the "
                    f"background, for which {item.key} {list(item.shape)} and {item.source_key} "
                    f"{list(item.source_shape)} do not both have a box; it may be first on one side and last on "
                    f"the other. If so, exclude {match.target!r}."
                )


def _around(key: str) -> str:
    """Return the module around the layer of a tensor."""
    return split_key(split_key(key)[0])[0]


def _claims(matches: Sequence[Match], alignment: Alignment) -> list[Match]:
    """List the fills of tied keys, the surest first, each tensor of the source once."""
    storages = {spec.key: spec.storage for spec in alignment.source_specs if spec.storage is not None}
    found: dict[object, Match] = {}
    for match in sorted(matches, key=lambda match: -match.confidence):
        rivals = match.alternatives
        count = next((n for n in range(1, len(rivals) + 1) if tie_warning(rivals[:n]) in match.warnings), 0)
        others = [replace(match, sources=rival.sources, operation=rival.operation) for rival in rivals[:count]]
        for claim in (match, *others):
            if not claim.operation.adapts:
                found.setdefault(tuple(storages.get(key, key) for key in claim.sources), claim)
    return list(found.values())


def _are_equal(alignment: Alignment, match: Match, other: Match) -> bool:
    first, second = alignment.tensor(match), alignment.tensor(other)
    if first.shape != second.shape:
        return False
    if first.is_meta or second.is_meta:
        return True  # without values, nothing differs
    return torch.equal(first, second.to(device=first.device, dtype=first.dtype))


def _of_other_shapes(alignment: Alignment, keys: Sequence[str], fills: Mapping[str, Match]) -> Iterator[str]:
    """Name the unused tensors of other shapes that are called as a tied key is, up to the prefix that its match has."""
    shapes = {spec.key: spec.shape for spec in alignment.source_specs}
    unused = set(alignment.unexpected_keys) - alignment.excluded
    matches = [fills[key] for key in keys if key in fills]
    for match in matches:
        for own in match.sources if len(match.sources) == 1 else ():
            for prefix in ("", own.removesuffix(match.target)) if own.endswith(match.target) else ():
                for key in keys:
                    name = f"{prefix}{key}"
                    if name in unused and shapes[name] != shapes[own]:
                        unused.discard(name)
                        yield f"{name} {list(shapes[name])}"


def _lost_biases(alignment: Alignment) -> list[str]:
    """List the unused biases that are not zero, of layers whose weights are used where the model has no bias."""
    unused = [key for key in alignment.unexpected_keys if key not in alignment.excluded and _is_bias(key)]
    if not unused:
        return []
    targets = {split_key(spec.key)[0] for spec in alignment.target_specs if _is_bias(spec.key)}
    layers = {
        split_key(key)[0]: split_key(match.target)[0]
        for match in alignment.matches
        for key in match.sources
        if len(match.sources) == 1 and kind(split_key(key)[1])[0] == "weight" and not match.operation.takes_part
    }
    found = []
    for key in unused:
        layer = split_key(key)[0]
        if layer not in layers or layers[layer] in targets:
            continue
        tensor = alignment.tensors[key]
        if not tensor.is_meta and bool(tensor.any()):
            found.append(key)
    return found


def _is_bias(key: str) -> bool:
    return kind(split_key(key)[1])[0] == "bias"
