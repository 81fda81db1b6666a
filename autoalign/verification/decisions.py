"""Decisions: a plan with what the code of both sides decides and without what it contradicts.

Graphs say which tensors correspond (``refinement``), and calls what graphs do not show (``probe``).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from math import prod
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from autoalign.errors import InputError, TraceError
from autoalign.matching.cues import LEFT_OVER, MAY_BE_EXCHANGED, NOTHING_TELLS
from autoalign.matching.layers import squeeze
from autoalign.matching.list_order import REVERSIBLE
from autoalign.matching.match import match_tensors
from autoalign.matching.pipeline import CROWDED, ONLY_SHAPES
from autoalign.plan.keys import split_key
from autoalign.plan.matches import Candidate, Match, Plan
from autoalign.plan.operations import (
    Concatenate,
    Copy,
    Operation,
    Permute,
    Reshape,
    Shape,
    Split,
    Transpose,
    in_parallel,
)
from autoalign.plan.operations import chain as chained
from autoalign.plan.specs import tied_groups
from autoalign.verification.dataflow import traced
from autoalign.verification.probe import PROBE, Inputs, probed
from autoalign.verification.refinement import PART, pairs_of
from autoalign.verification.roles import (
    CODE,
    MAX_DOUBTED,
    decided_by_target,
    in_doubt,
    with_doubts,
    with_roles,
    with_sources,
)

_SURE = 0.9  # of matches that the refinement starts from
_DECIDED = 0.97  # the confidence in what code decides
_MIN_SHARE = 0.9  # of the target's tensors that code alone has to tell apart to overrule what keys say
_WHOLE = (Copy, Permute, Reshape, Transpose)  # operations of one whole tensor

_UNTOLD = "neither its name nor what the model does with it tells which it is"
_BY_PARTS = "the parts are told by code, and where they begin is assumed"

# the doubts of a match that are about which tensor it is, and not about its layout
_OTHER_TENSOR = re.compile(
    "|".join(
        re.escape(text).replace(re.escape("{}"), ".*")
        for text in (CROWDED, LEFT_OVER, MAY_BE_EXCHANGED, NOTHING_TELLS, ONLY_SHAPES, REVERSIBLE)
    )
)


_Way = tuple[tuple[str, ...], Operation]  # sources, and what is done to them


def decided_by_code(
    source_model: nn.Module, example_inputs: object, plan: Plan, min_confidence: float, *, is_asked: bool = True
) -> Plan:
    """Return a plan in which the code of both sides decides what keys left open, and what contradicts it is ambiguous.

    The keys of ``source_model``, the code of the source, may be other than the source's. Where it ``is_asked`` for,
    ways are tried that the alignment does not list, and what cannot be compared is a note. Where the code of one side
    alone can be called, it is asked.

    Raises:
        InputError: The source model has other tensors than the source.
    """
    target_model = getattr(plan.target_tensors, "module", None)
    keys = _keys_in(source_model, plan)
    if not isinstance(target_model, nn.Module):
        try:
            graph = nx.relabel_nodes(traced(source_model, example_inputs)[0], keys)
        except TraceError as error:
            note = f"The code of the checkpoint was not called. {error}"
            return replace(plan, notes=(*plan.notes, note)) if is_asked else plan
        return with_roles(plan, [*plan.targets], source=graph)
    try:
        traces = [_traced(model, example_inputs) for model in (source_model, target_model)]
    except TraceError as error:
        plan = decided_by_target(plan, target_model, example_inputs)
        note = f"The code of both models was not compared. {error}"
        return replace(plan, notes=(*plan.notes, note)) if is_asked else plan
    source, target = nx.relabel_nodes(traces[0][0], keys), traces[1][0]
    found = pairs_of(source, target, {})
    told = {key.partition(PART)[0] for key in found}
    is_proof = len(told) >= _MIN_SHARE * sum(bool(target.degree(spec.key)) for spec in plan.target_specs)
    alone = {key: own for key, own in found.items() if PART not in key + own}
    alone |= _unused_pairs(plan, alone)
    users = {own: other for other, own in alone.items()}
    settled = {m.target: m.sources[0] for m in plan.matches if len(m.sources) == 1 and isinstance(m.operation, _WHOLE)}
    contradicted = {
        match.target
        for match in plan.matches
        if "rule" not in match.evidence
        if match.sources != (alone.get(match.target, match.sources[0]),)[: len(match.sources)]
        or users.get(settled.get(match.target, ""), match.target) != match.target
    }
    anchors = {
        match.target: match.sources[0]
        for match in plan.matches
        if match.target in settled.keys() - contradicted and match.confidence >= _SURE
        if match.target in target and match.sources[0] in source
    }
    anchors = {key: own for key, own in anchors.items() if Counter(anchors.values())[own] == 1}
    pairs = {key: own for key, own in pairs_of(source, target, anchors).items() if key not in anchors} | alone
    parts = {key: own for key, own in (pairs | found).items() if PART in key + own}
    pairs = {key: own for key, own in pairs.items() if key not in parts}
    if is_proof:
        pairs |= _last_pairs(plan, pairs)
    refined = _with_pairs(
        plan,
        pairs | _unused_pairs(plan, pairs),
        contradicted,
        ({keys[key] for key in _plain_keys(source_model) & keys.keys()}, _plain_keys(target_model)),
        overrules=is_proof,
        min_confidence=min_confidence,
    )
    refined = _with_parts(refined, parts)
    inputs = _common_inputs(traces[0][1], traces[1][1])
    known = with_sources(refined, {old: new for new, old in keys.items()})
    decided, is_equal = probed(known, source_model, target_model, inputs, is_search=is_asked)
    decided = with_sources(decided, keys) if decided is not known else refined
    return _without_guesses(decided, {key for key, count in target.degree() if count} if is_equal else set())


def _without_guesses(plan: Plan, confirmed: Collection[object]) -> Plan:
    """Return a plan in which what neither names nor code distinguish from others of its shape is ambiguous."""
    doubted = [
        match
        for match in plan.matches
        if match.target not in confirmed and match.evidence.keys().isdisjoint((CODE, PROBE, "rule"))
        if match.confidence < _SURE or not match.evidence.get("name", 1.0)
    ]
    alike = Counter(plan.targets[key].shape for key in (*(match.target for match in doubted), *plan.missing_keys))
    return with_doubts(plan, {m.target: _UNTOLD for m in doubted if alike[plan.targets[m.target].shape] > 1})


def _common_inputs(source: object, target: object) -> list[Inputs]:
    """List what two networks may be called with alike, of what each can be called with, in full precision."""
    own, form = _float_tensors(source)
    other, other_form = _float_tensors(target)
    found = [(tree_unflatten(own, form), tuple(own)), (tuple(other), tree_unflatten(other, other_form))]
    if [*map(_form, own)] == [*map(_form, other)]:
        found.insert(0, (tree_unflatten(own, form), tree_unflatten(own, other_form)))
    return found


def _form(value: object) -> object:
    return (value.shape, value.dtype) if isinstance(value, Tensor) else value


def _float_tensors(inputs: object) -> tuple[list[Any], TreeSpec]:
    leaves, form = tree_flatten(inputs)
    return [each.float() if isinstance(each, Tensor) and each.is_floating_point() else each for each in leaves], form


def _traced(module: nn.Module, example_inputs: object) -> tuple[nx.DiGraph, object]:
    """Return the dataflow of a module, on guessed inputs where it does not take those given: two codes may differ."""
    if example_inputs is not None:
        with suppress(TraceError):
            return traced(module, example_inputs)
    return traced(module)


def _keys_in(source_model: nn.Module, plan: Plan) -> dict[str, str]:
    """Return the source's keys of the source model's tensors."""
    own = list(source_model.state_dict(keep_vars=True))
    if plan.sources.keys() >= set(own):
        return {key: key for key in own}
    keys = {new: old for old, new in match_tensors(plan.tensors, source_model).mapping.items()}
    if 2 * len(keys) < len(own):
        raise InputError(
            f"source_model= is not the code of this checkpoint: of {len(own)} tensors of {type(source_model).__name__} "
            f"{len(keys)} are in it. Nothing was aligned."
        )
    return keys


def _unused_pairs(plan: Plan, pairs: Mapping[str, str]) -> dict[str, str]:
    """Pair tensors that no call uses, such as counters, if all else of their modules is in one module of the source."""
    modules: dict[str, set[str]] = defaultdict(set)
    for key, own in pairs.items():
        modules[split_key(key)[0]].add(split_key(own)[0])
    found = {}
    for spec in plan.target_specs:
        module, name = split_key(spec.key)
        if spec.key not in pairs and len(modules.get(module, ())) == 1:
            own = f"{next(iter(modules[module]))}.{name}".removeprefix(".")
            if own in plan.sources and plan.sources[own].shape == spec.shape:
                found[spec.key] = own
    return found


def _last_pairs(plan: Plan, pairs: Mapping[str, str]) -> dict[str, str]:
    """Pair the tensors of modules that nothing else of their kind is left of, on both sides."""
    left: dict[frozenset[tuple[str, tuple[int, ...]]], tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    taken = {*pairs.values()}, pairs.keys()
    for side, specs in enumerate((plan.source_specs, plan.target_specs)):
        modules: dict[str, list[tuple[str, tuple[int, ...]]]] = defaultdict(list)
        for spec in specs:
            if spec.key not in taken[side] | plan.excluded:
                module, name = split_key(spec.key)
                modules[module].append((name, spec.shape))
        for module, tensors in modules.items():
            left[frozenset(tensors)][side].add(module)
    return {
        f"{other}.{name}".removeprefix("."): f"{own}.{name}".removeprefix(".")
        for tensors, (sources, targets) in left.items()
        if len(sources) == len(targets) == 1
        for own, other in zip(sources, targets, strict=True)
        for name, _ in tensors
    }


def _with_pairs(
    plan: Plan,
    pairs: Mapping[str, str],
    contradicted: Collection[str],
    plain: Sequence[Collection[str]],
    *,
    overrules: bool,
    min_confidence: float,
) -> Plan:
    """Return a plan with what code decides; what it contradicts is ambiguous, or decided by it if it ``overrules``.

    ``plain`` are the keys of either side that layers of torch hold, whose layouts are alike.
    """
    shapes = {spec.key: spec.shape for spec in plan.source_specs if spec.key not in plan.excluded}
    known = {match.target: match for match in chain(plan.matches, plan.ambiguous)}
    was_open = {match.target for match in plan.ambiguous} | set(plan.missing_keys)
    found: dict[str, Match] = {}
    for spec in plan.target_specs:
        own, match = pairs.get(spec.key), known.get(spec.key)
        if own not in shapes or spec.key in plan.excluded:
            continue
        is_of_tensor = match is not None and all(map(_OTHER_TENSOR.fullmatch, match.warnings))
        if match and match.sources == (own,) and not is_of_tensor:
            continue
        operation = _operation(match, own, shapes) if match else None
        is_plain = own in plain[0] and spec.key in plain[1] and squeeze(spec.shape) == squeeze(shapes[own])
        if operation is None and (is_plain or (match is None and _is_plain(spec.shape, shapes[own]))):
            operation = Copy() if spec.shape == shapes[own] else Reshape(spec.shape)
        if operation is None:
            continue
        is_same = match is not None and match.sources == (own,)
        evidence = {**(match.evidence if match and is_same else {}), CODE: 1.0}
        if match and spec.key not in was_open and is_same:
            found[spec.key] = replace(match, evidence=evidence)
        elif match and spec.key in contradicted and not overrules:
            others = [other for other in match.alternatives if other.sources != (own,)]
            match = replace(match, alternatives=(Candidate((own,), operation, 1.0), *others))
            found[spec.key] = in_doubt(match, f"by its code, the model uses it as the source uses {own}")
        elif spec.key in was_open or spec.key in contradicted:
            found[spec.key] = Match(spec.key, (own,), operation, _DECIDED, evidence)
    for keys in tied_groups(plan.target_specs):
        for first in [key for key in keys if key in found][:1]:
            found |= {key: replace(found[first], target=key) for key in keys}
    users = {match.sources[0]: key for key, match in found.items() if match.confidence > MAX_DOUBTED}
    for key, match in known.items():
        if key not in found and key not in was_open and any(users.get(own, key) != key for own in match.sources):
            found[key] = in_doubt(match, "by its code, the model uses its source for another tensor")
    sure = {key for key, match in found.items() if match.confidence >= min_confidence}
    changed = [key for key, match in found.items() if key not in known or match.sources != known[key].sources]
    doubted = found.keys() - sure - was_open
    count = len((found.keys() & was_open & sure) | set(changed))
    note = f"The code of both models decided {count} tensors; {len(doubted)} that were matched otherwise are ambiguous."
    return plan.revised(
        [match for key, match in found.items() if key in sure],
        [match for key, match in found.items() if key not in sure],
        [note] if count or doubted else (),
    )


def _plain_keys(model: nn.Module) -> set[str]:
    """Return the keys of layers of torch that have one output a row, or no rows."""
    kinds = (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.Embedding,
        nn.LayerNorm,
        nn.GroupNorm,
        nn.modules.batchnorm._NormBase,
    )
    layers = ((name, layer) for name, layer in model.named_modules(remove_duplicate=False) if isinstance(layer, kinds))
    return {f"{name}.{key}".removeprefix(".") for name, layer in layers for key in layer.state_dict(keep_vars=True)}


def _with_parts(plan: Plan, parts: Mapping[str, str]) -> Plan:
    """Return a plan that proposes what code tells of parts of tensors, in place of what takes others."""
    shapes = {spec.key: spec.shape for spec in plan.source_specs if spec.key not in plan.excluded}
    places: dict[str, list[tuple[float, str, str]]] = defaultdict(list)  # of parts of the target: begin, source, begin
    for key, own in parts.items():
        target, _, begin = key.partition(PART)
        source, _, start = own.partition(PART)
        places[target].append((float(begin or 0), source, start))
    known = {match.target: match for match in (*plan.matches, *plan.ambiguous)}
    made: dict[str, Match] = {}
    for spec in plan.target_specs:
        joined = _joined(spec.shape, sorted(places[spec.key]), shapes) if spec.key in places else None
        before = known.get(spec.key)
        if joined is None or spec.key in plan.excluded or (before and "rule" in before.evidence):
            continue
        ways = (Candidate(before.sources, before.operation, before.confidence), *before.alternatives) if before else ()
        if before and {*joined[0]} == {*before.sources}:  # it is a layout that is in doubt, if anything
            is_known = any(_is_same(joined, (way.sources, way.operation), shapes) for way in ways)
            if is_known or not isinstance(before.operation, Copy):
                continue
        made[spec.key] = Match(spec.key, *joined, MAX_DOUBTED, {CODE: 1.0}, ways, (_BY_PARTS,))
    return plan.revised((), made.values())


def _joined(shape: Shape, places: Sequence[tuple[float, str, str]], shapes: Mapping[str, Shape]) -> _Way | None:
    """Return what joins rows of source tensors to a target tensor, None if their sizes do not fit."""
    begins = [round(begin * shape[0]) for begin, _, _ in places]
    steps: list[Operation] = []
    firsts: list[int] = []  # where the parts begin in the source
    for (_, own, start), begin, end in zip(places, begins, [*begins[1:], shape[0]], strict=True):
        rows = shapes[own][0] if own in shapes and shapes[own][1:] == shape[1:] else 0
        first = round(float(start or 0) * rows)
        if first + end - begin > rows or (not start and rows != end - begin):
            return None
        steps.append(Split(0, first, end - begin) if start else Copy())
        firsts.append(first)
    sources = tuple(own for _, own, _ in places)
    if len({*sources}) == 1 and shapes[sources[0]] == shape and firsts == begins:
        return sources[:1], Copy()
    return sources, steps[0] if len(steps) == 1 else chained(in_parallel(steps), Concatenate(0))


def _is_same(first: _Way, second: _Way, shapes: Mapping[str, Shape]) -> bool:
    """Return True if two ways to fill a tensor take the same elements to the same places."""
    if first == second or {*first[0]} != {*second[0]}:
        return first == second
    numbered: dict[str, Tensor] = {}
    for key in first[0]:
        numbered.setdefault(key, torch.arange(prod(shapes[key])).reshape(shapes[key]) * 97 + len(numbered))
    results = [operation.apply([numbered[key] for key in keys])[0] for keys, operation in (first, second)]
    return torch.equal(*results)


def _is_plain(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Return True for equal shapes of which no layer type has two layouts."""
    return shape == other and (len(shape) < 2 or len({*shape[:2]}) == 2 < len(shape))


def _operation(match: Match, own: str, shapes: Mapping[str, tuple[int, ...]]) -> Operation | None:
    """Return the operation that fills the target of a match from one tensor; None if a layout is in doubt."""
    ways = [(match.sources, match.operation)]
    ways += [(candidate.sources, candidate.operation) for candidate in match.alternatives]
    known = list(dict.fromkeys(operation for sources, operation in ways if sources == (own,)))
    if not known and len(match.sources) == 1 and shapes[own] == shapes[match.sources[0]]:
        known = [match.operation]
    return known[0] if len(known) == 1 and isinstance(known[0], _WHOLE) else None
