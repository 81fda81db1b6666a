"""Preparing: what is decided and said before anything is loaded or written, and what a module has beside tensors.

Conflicts are what a checkpoint holds and the model has no place for, so that the model computes something else: two
tensors for one that the model ties, biases of layers that have none in the model, and classifiers whose background is
another one of their classes. Values are compared, which ``align`` does not do; a note on each says what was taken.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from autoalign.alignment import Alignment
from autoalign.checkpoints.checkpoint import Checkpoint, checkpoint_of, of_module, uninitialized
from autoalign.errors import ChoiceWarning, IncompatibleTensorsError, NothingLoadedError, PartialLoadWarning, listed
from autoalign.matching.architectures import resemblances
from autoalign.matching.assembly import tie_warning
from autoalign.matching.match import match_tensors
from autoalign.matching.names import kind
from autoalign.matching.relation import UNLIKE
from autoalign.plan.adapters import describe_adapters
from autoalign.plan.keys import LEVELS, split_key
from autoalign.plan.matches import FILLED, Caution, Match
from autoalign.plan.operations import Copy
from autoalign.plan.specs import TensorSpec, tied_groups

_REASONS = {
    "missing": "{} without a source",
    "mismatched": "{} of another shape",
    "ambiguous": "{} ambiguous",
    "excluded": "{} excluded",
}
_BOX_SIZE = 4  # numbers of a box
_MAX_NAMED = 4  # keys that a warning names


def aligned(model: nn.Module, source: Checkpoint, options: Mapping[str, Any]) -> Alignment:
    """Align a checkpoint with a model, of which lazy tensors get shapes and packed ones a place in the report."""
    lazy = uninitialized(model)
    if lazy:
        known = _named_sources(lazy, source)
        if len(known) < len(lazy):
            rest = Alignment.of(match_tensors(source, _shaped(model, lazy, known), **options))
            known |= _named_sources({key: lazy[key] for key in lazy if key not in known}, source, rest)
        target = _shaped(model, lazy, known)
    else:
        target = checkpoint_of(model)
    alignment = Alignment.of(match_tensors(source, target, **options))
    left_out = target.left_out
    notes = tuple(f"Of the model, {note[0].lower()}{note[1:]}" for note in target.notes if left_out)
    if lazy:
        unknown = len(lazy) - len(known)
        notes += (f"{len(known)} tensors of lazy modules have the shapes of those with their names in the checkpoint.",)
        notes += (f"{unknown} tensors of lazy modules stay without a shape.",) if unknown else ()
    specs = alignment.target_specs
    if left_out:
        order = {key: place for place, key in enumerate(model.state_dict(keep_vars=True))}
        specs = tuple(sorted((*specs, *left_out), key=lambda spec: order[spec.key]))
    return replace(alignment, target_specs=specs, notes=(*alignment.notes, *notes))


def _shaped(model: nn.Module, lazy: Mapping[str, Tensor], known: Mapping[str, TensorSpec]) -> Checkpoint:
    """Return a model as a checkpoint whose lazy tensors have the shapes of known ones; others are left out."""
    state_dict = {
        key: torch.empty(known[key].shape, dtype=lazy[key].dtype, device="meta") if key in known else value
        for key, value in model.state_dict(keep_vars=True).items()
        if key in known or key not in lazy
    }
    return of_module(model, state_dict)


def _named_sources(
    lazy: Mapping[str, Tensor], source: Checkpoint, alignment: Alignment | None = None
) -> dict[str, TensorSpec]:
    """Find the source of each lazy tensor by its name; those without one are left out.

    ``alignment`` is of the rest of the model, where it is known already.
    """
    used = {key for match in alignment.matches for key in match.sources} if alignment else set()
    free = {spec.key: spec for spec in source.specs if spec.key not in used}
    modules = source_modules(alignment) if alignment else {}
    added, taken = _prefixes(lazy, free)
    found = {}
    for key in lazy:
        names = (translated(key, modules), key, added + key.removeprefix(taken))
        name = next((name for name in names if name in free), None)
        if name is not None:
            found[key] = free.pop(name)
    return found


def _prefixes(keys: Mapping[str, Tensor], others: Mapping[str, TensorSpec]) -> tuple[str, str]:
    """Find what most of these keys lack before others, or have before others: the wrapper of one side."""
    counts: Counter[tuple[str, str]] = Counter()
    for key in keys:
        for other in others:
            if other.endswith(f".{key}"):
                counts[other.removesuffix(key), ""] += 1
            elif key.endswith(f".{other}"):
                counts["", key.removesuffix(other)] += 1
    return counts.most_common(1)[0][0] if counts else ("", "")


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is loaded or written, and from where."""

    source: Checkpoint
    alignment: Alignment
    modules: Mapping[str, str]  # of the model, and those of the checkpoint that correspond; see `source_modules`
    counters: frozenset[str]  # of the model's BatchNorm, which the checkpoint is too old to have
    summary: str  # how much of the target comes from where


def prepared(
    alignment: Alignment,
    module: nn.Module | None,
    target: str,
    *,
    strict: bool,
    undone: str,
    verb: str = "load",
    counters_fate: str = "keep what they had",
) -> Prepared:
    """Settle what an alignment leaves open, and refuse one that is empty, or incomplete if it is to be complete.

    Texts name the ``target``, as ``"ResNet"``, and say by a ``verb`` what is done, as ``"load"``, by a sentence what is
    ``undone`` if this fails, and what becomes of BatchNorm counters that a checkpoint is too old to have.
    """
    source = alignment.tensors  # perhaps of another container than was asked for
    assert isinstance(source, Checkpoint)
    alignment = settled(alignment)
    modules = source_modules(alignment)
    counters = frozenset[str]() if module is None else absent_counters(module, source, alignment, modules)
    if counters:
        kept = tuple(spec for spec in alignment.target_specs if spec.key not in counters)
        note = f"{len(counters)} num_batches_tracked {counters_fate}: the checkpoint is from before torch had them."
        alignment = replace(alignment, target_specs=kept, notes=(*alignment.notes, note))
    if not alignment.matches:
        raise _nothing_error(alignment, source, target, undone)
    if strict:
        try:
            alignment.raise_if_incomplete()
        except IncompatibleTensorsError as error:
            what, _, advice = str(error).partition("\n")
            looks = resemblances(source.specs, alignment.target_specs)
            loose = f"Pass strict=False to {verb} the {len(alignment.matches)} that match."
            text = f"{' '.join([what, *looks, undone])}\n{loose} {advice}"
            raise IncompatibleTensorsError(text, alignment, error.details) from None
    share = math.floor(1000 * alignment.coverage) / 10  # a part is never called 100 %
    summary = (
        f"{len(alignment.matches)} of {len(alignment.target_specs)} tensors ({share} % of the elements) "
        f"of {target} from {name_of(source)}"
    )
    return Prepared(source, alignment, modules, counters, summary)


def _nothing_error(alignment: Alignment, source: Checkpoint, target: str, undone: str) -> NothingLoadedError:
    """Explain why no tensor of a source could be aligned with those of a target."""
    left_out = alignment.unused_schemes
    numels = {spec.numel for spec in source.specs}
    unlike = sum(spec.numel not in numels for spec in alignment.target_specs)
    lines, reasons, notes = [], list[str](), [note for note in alignment.notes if note != UNLIKE]
    if unlike and not left_out:
        lines.append(f"{unlike} of the model's tensors have a size that no tensor of the checkpoint has.")
    if alignment.excluded:
        reasons.append(f"{len(alignment.excluded)} keys were left out by include and exclude.")
    if alignment.ambiguous:
        reasons.append(f"{len(alignment.ambiguous)} have proposals that were not sure enough.")
        lines += ["Not sure enough:"] + [
            f"  {match.target} from {', '.join(match.sources)} (confidence {match.confidence:.2f})"
            for match in alignment.ambiguous
        ]
    if alignment.mismatched:
        reasons.append(f"{len(alignment.mismatched)} have counterparts of another shape: {alignment.mismatched[0]}.")
        lines += ["Of another shape:", *(f"  {mismatch}" for mismatch in alignment.mismatched)]
    what = (
        f"No tensor of {name_of(source)} could be aligned with the {len(alignment.target_specs)} tensors of {target}."
    )
    is_explained = left_out or describe_adapters(source.specs)
    advice = [] if is_explained else ["Check that both are the same network, or pass what you know as rules=."]
    message = "\n".join([" ".join([what, undone, *reasons, *notes]), *advice])
    return NothingLoadedError(message, alignment, "\n".join([*lines, *(set(alignment.notes) - set(notes))]))


def name_of(source: Checkpoint) -> str:
    """Return what a message calls a checkpoint: its path, or what it holds."""
    return repr(source.path) if source.path else repr(source)


def source_modules(alignment: Alignment) -> dict[str, str]:
    """Map each of the model's modules to the checkpoint's, where all that was found for it comes from one.

    Modules correspond if the rest of the keys below them is the same.
    """
    found: dict[str, set[str]] = {}
    for source_key, key in alignment.mapping.items():
        theirs, ours = source_key.rsplit(".", LEVELS), key.rsplit(".", LEVELS)
        while theirs and ours and theirs[-1] == ours[-1]:
            del theirs[-1], ours[-1]
            found.setdefault(".".join(ours), set()).add(".".join(theirs))
    return {module: sources.pop() for module, sources in found.items() if len(sources) == 1}


def absent_counters(
    model: nn.Module, source: Checkpoint, alignment: Alignment, modules: Mapping[str, str]
) -> frozenset[str]:
    """List the BatchNorm counters that a checkpoint lacks because it is older than they are.

    As with torch, such a counter is not missing: BatchNorm's version is below 2 or unknown.
    """
    versions = source.state_metadata or {}
    own_modules = dict(model.named_modules(remove_duplicate=False))
    matched = {match.target.rpartition(".")[0] for match in alignment.matches}
    counters = set()
    for key, status in alignment.status.items():
        path, _, name = key.rpartition(".")
        if name != "num_batches_tracked" or status != "missing" or key in alignment.excluded or path not in matched:
            continue
        origin = modules.get(path)
        if not isinstance(own_modules.get(path), _NormBase):
            continue
        if origin is not None:
            version = versions.get(origin, {}).get("version")
            if f"{origin}.{name}".lstrip(".") in source or (isinstance(version, int) and version >= 2):
                continue
        counters.add(key)
    return frozenset(counters)


def extra_states(source: Checkpoint, targets: Mapping[str, object], modules: Mapping[str, str]) -> dict[str, object]:
    """Find the extra state of each module that has one in the checkpoint's module that corresponds to it."""
    own = {key: translated(key, modules) for key in targets if key.rpartition(".")[2] == "_extra_state"}
    return {key: source.extras[source_key] for key, source_key in own.items() if source_key in source.extras}


def translated(key: str, modules: Mapping[str, str]) -> str:
    """Translate a key by the nearest module above it that corresponds, since its own may hold no tensors."""
    parts = key.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        origin = modules.get(".".join(parts[:depth]))
        if origin is not None:
            return ".".join(filter(None, (origin, *parts[depth:])))
    return key


def state_metadata(
    source: Checkpoint,
    alignment: Alignment,
    targets: Mapping[str, Tensor],
    modules: Mapping[str, str],
    counters: frozenset[str],
) -> dict[str, dict[str, object]]:
    """Return the version that each module's tensors are of, for the upgrades that modules do on their own.

    A module whose tensors were all found as they are, under their own names, may be of the checkpoint's version. The
    rest was brought into the model's own layout already, so it is of the model's own version.
    """
    metadata = {path: dict(entry) for path, entry in getattr(targets, "_metadata", {}).items()}
    as_they_are = {
        match.target
        for match in alignment.matches
        if isinstance(match.operation, Copy) and match.target.rpartition(".")[2] == match.sources[0].rpartition(".")[2]
    }
    changed = {spec.key.rpartition(".")[0] for spec in alignment.target_specs if spec.key not in as_they_are}
    direct = {key.rpartition(".")[0] for key in as_they_are} - changed
    versions = source.state_metadata or {}
    for path, origin in modules.items():
        if path in direct and origin in versions:
            metadata[path] = dict(versions[origin])
    metadata.update((key.rpartition(".")[0], {}) for key in counters)  # so that torch makes them up
    return metadata


def warn_of_choices(doing: str, alignment: Alignment) -> None:
    """Warn of what could as well have been taken."""
    for note in alignment.notes:
        if isinstance(note, Caution):
            warn(f"{doing}. {note}", ChoiceWarning)


def warn_of_unfilled(doing: str, alignment: Alignment, fate: str, advice: str = "") -> None:
    """Warn of the target's tensors that get nothing, unless ``exclude`` and ``include`` left out all of them.

    ``doing`` is such as "Loading 3 of 4 tensors", and ``fate`` as "keep their values".
    """
    status = {key: status for key, status in alignment.status.items() if status not in FILLED}
    named = [key for key in status if key not in alignment.excluded]
    if not named:
        return
    counts = Counter("excluded" if key in alignment.excluded else status[key] for key in status)
    reasons = ", ".join(text.format(counts[reason]) for reason, text in _REASONS.items() if counts[reason])
    open_choices = dict.fromkeys(why for choice in alignment.choices for why in choice.why if why[0].islower())
    parts = [f"{doing}. {len(status)} {fate}: {listed(named, _MAX_NAMED)} ({reasons})."]
    parts += [f"Left out: {', '.join(alignment.unused_schemes)}."] if alignment.unused_schemes else []
    parts += [f"Ambiguous: {'; '.join(open_choices)}."] if open_choices else []
    unused = sum(key not in alignment.excluded for key in alignment.unexpected_keys)
    parts += [f"Of the checkpoint, {unused} {'is' if unused == 1 else 'are'} not used."] if unused else []
    to_choose = ", alignment.choices what to choose from" if open_choices else ""
    see = f"alignment.explain({named[0]!r}) says why and what to do{to_choose}; print(alignment) shows all."
    warn(f"{' '.join(parts)}\n{see}{advice}", PartialLoadWarning)


def warn(text: str, category: type[Warning]) -> None:
    """Warn at the line outside of this package that called it."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "autoalign":
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)


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
        notes.append(
            f"{len(biases)} biases have no place in the model, where their layers have none, and were dropped: "
            f"{listed(biases)}. Unless they are added elsewhere, it computes something else."
        )
    notes += _row_orders(found)
    return replace(found, notes=(*found.notes, *map(Caution, notes))) if notes else found


def _row_orders(alignment: Alignment) -> Iterator[str]:
    """Note the classifiers whose rows may have another order, as the boxes that belong to them show.

    Some code has a box of four numbers for each class and none for the background, which is its last class; other code
    has one for the background too, which is its first.
    """
    weights = [match for match in alignment.matches if kind(split_key(match.target)[1])[0] == "weight"]
    for item in alignment.mismatched:
        rows = sorted(shape[0] for shape in (item.shape, item.source_shape) if len(shape) > 1)
        if len(rows) < 2 or rows[1] % _BOX_SIZE or rows[1] - rows[0] != _BOX_SIZE:
            continue
        classes, around = rows[1] // _BOX_SIZE, _around(item.key)
        for match in weights:
            if alignment.targets[match.target].shape[:1] == (classes,) and _around(match.target) == around:
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
    specs, unused = alignment.sources, set(alignment.unexpected_keys) - alignment.excluded
    matches = [fills[key] for key in keys if key in fills]
    for match in matches:
        for own in match.sources if len(match.sources) == 1 else ():
            for prefix in ("", own.removesuffix(match.target)) if own.endswith(match.target) else ():
                for key in keys:
                    name = f"{prefix}{key}"
                    if name in unused and specs[name].shape != specs[own].shape:
                        unused.discard(name)
                        yield f"{name} {list(specs[name].shape)}"


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
