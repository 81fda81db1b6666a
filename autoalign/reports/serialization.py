"""Alignments as data: JSON, and graphs of networkx.

JSON has one form, for ``to_dict``, saved files and ``--format json``; what is read is checked. In graphs, nodes are
texts and all attributes plain, so that the functions of ``networkx.readwrite`` write them as they are.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import inf, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autoalign.checkpoints.atomic import replace_text
from autoalign.checkpoints.checkpoint import Side, checkpoint_of, module_graph
from autoalign.errors import InputError, OutputError, PairMismatchError
from autoalign.plan import serialization as plain
from autoalign.plan.matches import Candidate, Match, Mismatch, Plan, PlanT, Verified
from autoalign.plan.operations import Copy, Operation, Shape, output_shapes
from autoalign.plan.quantised import ADVICE, can_fill
from autoalign.plan.serialization import MAX_INTEGER, MAX_NUMBER, Plain, from_plain, to_plain
from autoalign.plan.specs import TensorSpec, tied_groups
from autoalign.reports.choices import Choice, choices_of, next_actions

if TYPE_CHECKING:
    import networkx as nx


FORMAT = "autoalign.alignment"
VERSION = 1  # fields may be added without a new version: unknown ones are ignored
_MAX_DIFFERENCES = 10  # lines of an error
_MAX_QUOTED_CHARACTERS = 200  # of what is damaged
_DTYPES = {str(kind).removeprefix("torch."): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}
_COUNTER = "num_batches_tracked"  # an alignment that ``load`` returns leaves out those that a model alone has


def alignment_to_plain(alignment: Plan) -> Plain:
    """Return an alignment as plain data, without tensors; see ``Alignment.to_dict``."""
    return {
        "format": FORMAT,
        "version": VERSION,
        # These follow from the rest and are not read again, and so do the choices.
        "coverage": alignment.coverage,
        "missing_keys": alignment.missing_keys,
        "unexpected_keys": alignment.unexpected_keys,
        "source": _side_to_plain(alignment.source_specs),
        "target": _side_to_plain(alignment.target_specs),
        "matches": [_match_to_plain(match) for match in alignment.matches],
        "ambiguous": [_match_to_plain(match) for match in alignment.ambiguous],
        "choices": [choice_to_plain(choice, place) for place, choice in enumerate(choices_of(alignment))],
        "mismatched": [[mismatch.key, mismatch.source_key] for mismatch in alignment.mismatched],
        "excluded": sorted(alignment.excluded),
        "notes": list(alignment.notes),
        **({} if alignment.verified is None else {"verified": _verified_to_plain(alignment.verified)}),
    }


def _verified_to_plain(verified: Verified) -> Plain:
    largest = verified.max_difference
    return {
        "equal": verified.equal,
        "max_difference": largest if largest < MAX_NUMBER else None,
        "coverage": verified.coverage,
        "uncovered": list(verified.uncovered),
    }


def _verified_from_plain(data: Mapping[str, Any] | None) -> Verified | None:
    if data is None:
        return None
    if not isinstance(data["equal"], bool):
        raise TypeError(f"{data['equal']!r} says neither that it is equal nor that it is not")
    largest = data["max_difference"]
    return Verified(
        data["equal"],
        inf if largest is None else plain.number(largest, 0),
        plain.number(data["coverage"], 0, 1),
        plain.texts(data["uncovered"]),
    )


def _side_to_plain(specs: Sequence[TensorSpec]) -> Plain:
    tensors = [
        [
            spec.key,
            list(spec.shape),
            str(spec.dtype).removeprefix("torch."),
            *([spec.encoding] if spec.encoding else []),
        ]
        for spec in specs
    ]
    return {"tensors": tensors, "tied": [list(keys) for keys in tied_groups(specs)]}


def way_to_plain(way: Match | Candidate) -> Plain:
    """Return what a target is filled from, and by which operation, as plain data."""
    return {"sources": list(way.sources), "operation": to_plain(way.operation)}


def _match_to_plain(match: Match) -> Plain:
    data: Plain = {"target": match.target, "sources": list(match.sources), "confidence": match.confidence}
    if match.operation != Copy():
        data["operation"] = to_plain(match.operation)
    if match.evidence:
        data["evidence"] = dict(match.evidence)
    if match.alternatives:
        data["alternatives"] = [way_to_plain(other) | {"score": other.score} for other in match.alternatives]
    return data | ({"warnings": list(match.warnings)} if match.warnings else {})


def choice_to_plain(choice: Choice, place: int) -> Plain:
    """Return a choice as plain data, with what to do next; ``place`` is its place among the choices."""
    options = [
        {
            "fills": [{"target": match.target} | way_to_plain(match) for match in option.matches],
            "rules": [list(pair) for pair in option.rules],
        }
        for option in choice.options
    ]
    lists = {"targets": choice.targets, "why": choice.why, "options": options, "settled_by": choice.settled_by}
    return {name: list(values) for name, values in lists.items()} | {"next_actions": next_actions(choice, place)}


def alignment_from_plain(data: Mapping[str, Any]) -> Plan:
    """Read an alignment from plain data."""
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise InputError("This is not a saved alignment. Nothing was read.")
    version = data.get("version")
    if version != VERSION or type(version) is not int:
        raise InputError(
            f"This alignment was saved in version {repr(version)[:_MAX_QUOTED_CHARACTERS]}; this autoalign reads "
            f"{VERSION}. Nothing was read. Align and save again."
        )
    try:
        return _plan_from_plain(data)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        damage = f"{'it lacks ' if isinstance(error, KeyError) else ''}{str(error)[:_MAX_QUOTED_CHARACTERS]}"
        raise InputError(f"This saved alignment is damaged: {damage}. Nothing was read.") from error


def _plan_from_plain(data: Mapping[str, Any]) -> Plan:
    source, target = _side_from_plain(data["source"]), _side_from_plain(data["target"])
    shapes = {spec.key: spec.shape for spec in source}, {spec.key: spec.shape for spec in target}
    plan = Plan(
        matches=tuple(_match_from_plain(match, *shapes) for match in plain.items(data["matches"])),
        ambiguous=tuple(_match_from_plain(match, *shapes) for match in plain.items(data["ambiguous"])),
        mismatched=tuple(
            Mismatch(key, own, shapes[1][key], shapes[0][own])
            for key, own in map(plain.texts, plain.items(data["mismatched"]))
        ),
        source_specs=source,
        target_specs=target,
        excluded=frozenset(plain.texts(data["excluded"])),
        notes=plain.texts(data["notes"]),
        verified=_verified_from_plain(data.get("verified")),
    )
    targets = Counter(match.target for match in (*plan.matches, *plan.ambiguous))
    if repeated := [key for key, count in targets.items() if count > 1]:
        raise ValueError(f"{repeated[0]!r} is filled twice")
    return plan


def _side_from_plain(data: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    group = {key: number for number, keys in enumerate(plain.items(data["tied"])) for key in plain.texts(keys)}
    specs: dict[str, TensorSpec] = {}
    for tensor in plain.items(data["tensors"]):
        key, shape, name, *encoding = plain.items(tensor)
        sizes = tuple(plain.integer(size) for size in plain.items(shape))
        if plain.text(name) not in _DTYPES:
            raise TypeError(f"{plain.text(key)!r} has the unknown dtype {name!r}")
        if key in specs or prod(sizes) > MAX_INTEGER:
            raise ValueError(f"{plain.text(key)!r} is listed twice, or larger than a tensor can be")
        specs[key] = TensorSpec(plain.text(key), sizes, _DTYPES[name], group.get(key), *plain.texts(encoding[:1]))
    if unknown := group.keys() - specs.keys():
        raise KeyError(min(unknown))
    return tuple(specs.values())


def _match_from_plain(data: Mapping[str, Any], source: Mapping[str, Shape], target: Mapping[str, Shape]) -> Match:
    key = plain.text(data["target"])
    shape = target[key]
    sources = plain.texts(data["sources"])
    operation = _operation_from_plain(data.get("operation"), sources, source, shape)
    evidence = data.get("evidence", {})
    if not isinstance(evidence, Mapping):
        raise TypeError(f"the evidence of {key!r} is not a mapping")
    alternatives = []
    for other in plain.items(data.get("alternatives", [])):
        others = plain.texts(other["sources"])
        alternative = _operation_from_plain(other["operation"], others, source, shape)
        alternatives.append(Candidate(others, alternative, plain.number(other["score"])))
    return Match(
        key,
        sources,
        operation,
        plain.number(data["confidence"], 0, 1),
        {cue: plain.number(value) for cue, value in evidence.items()},
        tuple(alternatives),
        plain.texts(data.get("warnings", [])),
    )


def _operation_from_plain(data: object, sources: Sequence[str], source: Mapping[str, Shape], shape: Shape) -> Operation:
    """Read an operation, a copy if there is none; it has to make a tensor of a shape of the given sources."""
    operation = Copy() if data is None else from_plain(data)
    given = tuple(source[key] for key in sources)
    if not given or not (operation.adapts or _makes(operation, given, shape)):
        raise ValueError(f"'{operation}' does not make {list(shape)} of {', '.join(sources)}"[:_MAX_QUOTED_CHARACTERS])
    return operation


def _makes(operation: Operation, given: tuple[Shape, ...], shape: Shape) -> bool:
    if isinstance(operation, Copy):
        return given == (shape,)
    try:
        return output_shapes(operation, given) == [shape]
    except (RuntimeError, IndexError, TypeError, ValueError, OverflowError):  # by torch, for sizes that do not fit
        return False


def save(alignment: Plan, path: str | os.PathLike[str]) -> None:
    """Write an alignment to a file; see ``Alignment.save``."""
    text = json.dumps(alignment_to_plain(alignment), indent=1)
    try:
        replace_text(Path(path), text)
    except (OSError, ValueError, TypeError) as error:
        reason = str(getattr(error, "strerror", None) or error)
        shown = str(path)[:_MAX_QUOTED_CHARACTERS]
        raise OutputError(
            f"The alignment cannot be saved to {shown!r}: {reason}. What was there is unchanged."
        ) from error


def read(path: str | os.PathLike[str]) -> Plan:
    """Read an alignment from a file; see ``Alignment.read``."""
    try:
        data = plain.parsed(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{str(path)!r} cannot be read as a saved alignment: {error}") from error
    return alignment_from_plain(data)


def applied(alignment: PlanT, source: Side, target: Side, *, container: str | None) -> PlanT:
    """Apply an alignment to a pair of the same keys and shapes; see ``Alignment.applied_to``."""
    own, other = checkpoint_of(source, container=container), checkpoint_of(target)
    known = alignment.targets
    counted = [spec for spec in other.specs if spec.key in known or not spec.key.endswith(_COUNTER)]
    lines = [
        *_differences("source", alignment.source_specs, own.all_specs),
        *_differences("target", alignment.target_specs, counted),
    ]
    if lines:
        more = [f"  ... and {len(lines) - _MAX_DIFFERENCES} more"] if len(lines) > _MAX_DIFFERENCES else []
        listed = "\n".join([*lines[:_MAX_DIFFERENCES], *more])
        raise PairMismatchError(
            f"The alignment was made for another pair; {len(lines)} tensors differ.\n{listed}\n"
            "Nothing was loaded. Align this pair itself, or use alignment.rules(), which may hold for it.",
            alignment,
        )
    codes = own.quantised, other.quantised
    raw = [m.target for m in alignment.matches if not can_fill(m.sources, m.target, m.operation, *codes)]
    if raw:
        raise PairMismatchError(
            f"The alignment takes codes for values: one side of {len(raw)} tensors is quantised, such as {raw[0]}. "
            f"Nothing was loaded. {ADVICE}",
            alignment,
        )
    targets = tuple(spec for spec in other.specs if spec.key in known)
    pair = replace(
        alignment, source_specs=own.all_specs, target_specs=targets, tensors=own, target_tensors=other, ambiguous=()
    )
    return pair.revised(alignment.matches, alignment.ambiguous)  # in the order of this target


def _differences(side: str, saved: Sequence[TensorSpec], given: Sequence[TensorSpec]) -> Iterable[str]:
    """Yield a line for each tensor in which a side differs from that which an alignment was made for."""
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


def correspondence_graph(plan: Plan, *, proposals: bool = False) -> nx.DiGraph:
    """Build the graph of both module trees and of the matches between them; see ``Alignment.to_networkx``."""
    import networkx as nx

    unexpected = set(plan.unexpected_keys)
    used = {spec.key: "unexpected" if spec.key in unexpected else "used" for spec in plan.source_specs}
    trees = module_graph(plan.source_specs, used), module_graph(plan.target_specs, plan.status)
    for side, tree in zip(("source", "target"), trees, strict=True):
        nx.set_node_attributes(tree, side, "side")
    graph = nx.union(*trees, rename=("source:", "target:"))
    for relation, matches in (("fills", plan.matches), ("proposed", plan.ambiguous if proposals else ())):
        for match in matches:
            for key in dict.fromkeys(match.sources):
                graph.add_edge(
                    f"source:tensor:{key}",
                    f"target:tensor:{match.target}",
                    relation=relation,
                    operation=str(match.operation),
                    confidence=float(match.confidence),
                    inputs=", ".join(str(place) for place, other in enumerate(match.sources) if other == key),
                )
    return graph
