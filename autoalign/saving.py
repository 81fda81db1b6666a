"""Saved alignments: JSON that holds what was decided, to apply it later without matching.

A saved alignment belongs to the keys and shapes of both sides. Another pair is refused, with the difference.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from autoalign.alignment import Alignment, Candidate, Match, Mismatch
from autoalign.checkpoint import Side, checkpoint_of
from autoalign.errors import InputError, PairMismatchError
from autoalign.operations import Copy
from autoalign.replacing import replace_text
from autoalign.serial import Plain, from_plain, to_plain
from autoalign.specs import TensorSpec, tied_groups

FORMAT = "autoalign.alignment"
VERSION = 1
_SHOWN = 10  # differences that an error lists
_COUNTER = "num_batches_tracked"  # an alignment that ``load`` returns leaves out those that a model alone has


def alignment_to_plain(alignment: Alignment) -> Plain:
    """Write an alignment as plain data, without tensors."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "source": _side_to_plain(alignment.source_specs),
        "target": _side_to_plain(alignment.target_specs),
        "matches": [_match_to_plain(match) for match in alignment.matches],
        "ambiguous": [_match_to_plain(match) for match in alignment.ambiguous],
        "mismatched": [[mismatch.key, mismatch.source_key] for mismatch in alignment.mismatched],
        "excluded": sorted(alignment.excluded),
        "notes": list(alignment.notes),
    }


def alignment_from_plain(data: Mapping[str, Any]) -> Alignment:
    """Read an alignment from plain data.

    Raises:
        InputError: The data is no alignment, or one of another version.
    """
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise InputError("This is no saved alignment. Nothing was read.")
    if data.get("version") != VERSION:
        raise InputError(
            f"This alignment was saved in version {data.get('version')!r}; this autoalign reads {VERSION}. "
            "Nothing was read. Align and save again."
        )
    try:
        source, target = _side_from_plain(data["source"]), _side_from_plain(data["target"])
        shapes = [{spec.key: spec.shape for spec in side} for side in (source, target)]
        alignment = Alignment(
            matches=tuple(map(_match_from_plain, data["matches"])),
            ambiguous=tuple(map(_match_from_plain, data["ambiguous"])),
            mismatched=tuple(Mismatch(key, own, shapes[1][key], shapes[0][own]) for key, own in data["mismatched"]),
            source_specs=source,
            target_specs=target,
            excluded=frozenset(data["excluded"]),
            notes=tuple(data["notes"]),
        )
        proposed = (*alignment.matches, *alignment.ambiguous)
        unknown = {key for match in proposed for key in match.sources} - shapes[0].keys()
        unknown |= {match.target for match in proposed} - shapes[1].keys()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"This saved alignment is damaged: {error!r}. Nothing was read.") from error
    if unknown:
        raise InputError(f"This saved alignment is damaged: it lists no tensor {min(unknown)!r}. Nothing was read.")
    return alignment


def save(alignment: Alignment, path: str | os.PathLike[str]) -> None:
    """Write an alignment to a file; see ``Alignment.save``."""
    replace_text(Path(path), json.dumps(alignment_to_plain(alignment), indent=1))


def read(path: str | os.PathLike[str]) -> Alignment:
    """Read an alignment from a file; see ``Alignment.read``."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{os.fspath(path)!r} cannot be read as a saved alignment: {error}") from error
    return alignment_from_plain(data)


def applied(alignment: Alignment, source: Side, target: Side, *, container: str | None) -> Alignment:
    """Take an alignment to a pair of the same keys and shapes; see ``Alignment.applied_to``."""
    own, other = checkpoint_of(source, container=container), checkpoint_of(target)
    known = {spec.key for spec in alignment.target_specs}
    counted = [spec for spec in other.specs if spec.key in known or not spec.key.endswith(_COUNTER)]
    lines = [
        *_differences("source", alignment.source_specs, own.specs),
        *_differences("target", alignment.target_specs, counted),
    ]
    if lines:
        more = [f"  ... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        listed = "\n".join([*lines[:_SHOWN], *more])
        raise PairMismatchError(
            f"The alignment was made for another pair; {len(lines)} tensors differ.\n{listed}\n"
            "Nothing was loaded. Align this pair itself, or use alignment.rules(), which may hold for it.",
            alignment,
        )
    order = {spec.key: place for place, spec in enumerate(other.specs)}
    return replace(
        alignment,
        matches=tuple(sorted(alignment.matches, key=lambda match: order[match.target])),
        ambiguous=tuple(sorted(alignment.ambiguous, key=lambda match: order[match.target])),
        source_specs=own.specs,
        target_specs=tuple(spec for spec in other.specs if spec.key in known),
        tensors=own,
        target_tensors=other,
    )


def _differences(side: str, saved: Sequence[TensorSpec], given: Sequence[TensorSpec]) -> Iterable[str]:
    """Say how a side differs from what an alignment was made for, a line for each tensor."""
    shapes = {spec.key: spec.shape for spec in given}
    for spec in saved:
        if spec.key not in shapes:
            yield f"  {side} lacks {spec.key} {list(spec.shape)}"
        elif shapes[spec.key] != spec.shape:
            yield f"  {side} has {spec.key} {list(shapes[spec.key])} instead of {list(spec.shape)}"
    known = {spec.key for spec in saved}
    for spec in given:
        if spec.key not in known:
            yield f"  {side} has {spec.key} {list(spec.shape)} too"


def _side_to_plain(specs: Sequence[TensorSpec]) -> Plain:
    tensors = [[spec.key, list(spec.shape), spec.dtype_name] for spec in specs]
    return {"tensors": tensors, "tied": [list(keys) for keys in tied_groups(specs)]}


def _side_from_plain(data: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    group = {key: number for number, keys in enumerate(data["tied"]) for key in keys}
    specs = []
    for key, shape, name in data["tensors"]:
        dtype = getattr(torch, name, None)
        if not isinstance(key, str) or not isinstance(dtype, torch.dtype):
            raise TypeError(f"{key!r} has no dtype {name!r}")
        specs.append(TensorSpec(key, tuple(map(int, shape)), dtype, group.get(key)))
    return tuple(specs)


def _match_to_plain(match: Match) -> Plain:
    data: Plain = {"target": match.target, "sources": list(match.sources), "confidence": match.confidence}
    if match.operation != Copy():
        data["operation"] = to_plain(match.operation)
    if match.evidence:
        data["evidence"] = dict(match.evidence)
    if match.alternatives:
        data["alternatives"] = [
            {"sources": list(other.sources), "operation": to_plain(other.operation), "score": other.score}
            for other in match.alternatives
        ]
    return data | ({"warnings": list(match.warnings)} if match.warnings else {})


def _match_from_plain(data: Mapping[str, Any]) -> Match:
    return Match(
        data["target"],
        tuple(data["sources"]),
        from_plain(data["operation"]) if "operation" in data else Copy(),
        float(data["confidence"]),
        {str(cue): float(value) for cue, value in data.get("evidence", {}).items()},
        tuple(
            Candidate(tuple(other["sources"]), from_plain(other["operation"]), float(other["score"]))
            for other in data.get("alternatives", ())
        ),
        tuple(data.get("warnings", ())),
    )
