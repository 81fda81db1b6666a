"""Refinement: which tensors correspond by what two networks compute with them, where their keys leave it open.

Both dataflow graphs are coloured together by colour refinement (Weisfeiler and Leman, "The reduction of a graph to
canonical form", 1968): a node's new colour is its old one with those of its neighbours. It departs from the paper where
the graphs differ, as those of two implementations do: a colour is split only into what both graphs have, and the rest
keeps it for good, so that a difference does not spread. Tensors of one size are paired only if none of them are left
over: networks of unlike depths would be paired from both ends.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from typing import Any

import networkx as nx
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from autoalign.errors import InputError, TraceError
from autoalign.matching.cues import LEFT_OVER, MAY_BE_EXCHANGED, NOTHING_TELLS
from autoalign.matching.list_order import REVERSIBLE
from autoalign.matching.match import match_tensors
from autoalign.matching.pipeline import CROWDED, ONLY_SHAPES
from autoalign.plan.keys import split_key
from autoalign.plan.matches import Candidate, Match, Plan
from autoalign.plan.operations import Copy, Operation, Permute, Reshape, Transpose
from autoalign.plan.specs import tied_groups
from autoalign.verification.dataflow import traced
from autoalign.verification.probe import Inputs, probed

CODE = "code"  # the cue
_SURE = 0.9  # of matches that the refinement starts from
_DECIDED = 0.97  # the confidence in what code decides
_CONTRADICTED = 0.4  # the most in what it contradicts
_MIN_SHARE = 0.9  # of the target's tensors that code alone has to tell apart to overrule what keys say
_MAX_ROUNDS = 500
_WHOLE = (Copy, Permute, Reshape, Transpose)  # operations of one whole tensor

# the doubts of a match that are about which tensor it is, and not about its layout
_OTHER_TENSOR = re.compile(
    "|".join(
        re.escape(text).replace(re.escape("{}"), ".*")
        for text in (CROWDED, LEFT_OVER, MAY_BE_EXCHANGED, NOTHING_TELLS, ONLY_SHAPES, REVERSIBLE)
    )
)

_PASSING = frozenset(  # operations that change no value
    "_to_copy _unsafe_view as_strided clone contiguous expand flatten permute reshape squeeze t transpose unsqueeze "  # noqa: SIM905
    "view".split()
)
_CANONICAL = {
    **dict.fromkeys(("addmm", "baddbmm", "bmm", "mm", "mv"), "matmul"),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"), "batch_norm"),
}
_PARTS = frozenset({"select", "slice", "split", "split_with_sizes", "unbind"})
_COMMUTATIVE = frozenset({"add", "mul", "maximum", "minimum"})
_FILLING = frozenset(  # operations that take the shape of a tensor, and none of its values
    "empty_like full_like new_empty new_full new_ones new_zeros ones_like zeros_like".split()  # noqa: SIM905
)

_Edge = tuple[object, object, object]  # from, to, and as what


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What of a dataflow graph two implementations have alike."""

    labels: dict[object, object]  # of its nodes: operations by name, tensors by how many elements they have
    tensors: frozenset[object]  # the nodes that are tensors of the state dict
    neighbours: dict[object, list[tuple[object, object]]]  # of each node, with the role that an edge has, both ways


def skeleton_of(graph: nx.DiGraph, *, unary: bool) -> Skeleton:
    """Reduce a dataflow graph: no operations that change no value, and without ``unary`` none of one operand alone.

    Attention is two products, and what is added to a product as a bias is an operand of it.
    """
    kinds = dict(graph.nodes(data="kind"))
    outputs = [node for node, kind in kinds.items() if kind == "output"]
    live = set(outputs).union(*(nx.ancestors(graph, node) for node in outputs))
    nodes = graph.nodes
    tensors = {n for n in nodes if kinds[n] in ("parameter", "buffer") and nodes[n]["dtype"].is_floating_point}
    labels: dict[object, object] = {node: prod(nodes[node]["shape"]) for node in tensors}
    labels |= {node: "input" for node, kind in kinds.items() if kind == "input"}
    # what computes the values of a node, and which part of them it has; nothing computes those of constants
    stands_for: dict[object, tuple[object, tuple[float, ...]]] = {node: (node, ()) for node in labels}
    edges: list[_Edge] = []
    role: object
    for node in (node for node in nx.topological_sort(graph) if node in live and node not in labels):
        operands = [
            (stands_for[before][0], argument, (*stands_for[before][1], *_part(graph, before, result)))
            for before, _, edge in graph.in_edges(node, data=True)
            for argument, result in zip(edge["arguments"], edge["results"], strict=True)
            if before in stands_for
        ]
        given = [before for before, _, _ in operands if before in tensors]
        data = [before for before, _, _ in operands if before not in tensors]
        name = str(nodes[node].get("operation", kinds[node])).rstrip("_")
        is_bias = name == "add" and len(given) == len(data) == 1 and labels[data[0]] == "matmul"
        if not operands or name in _FILLING:  # such as masks, which every implementation makes in its own way
            continue
        is_alone = len(operands) == 1 and kinds[node] != "output"
        if is_bias or (is_alone and (name in _PASSING or name in _PARTS or not (unary or given))):
            stands_for[node] = next(each[::2] for each in operands if not (is_bias and each[0] in tensors))
            edges += [(given[0], data[0], "bias")] if is_bias else []
            continue
        stands_for[node] = node, ()
        labels[node] = _CANONICAL.get(name, name)
        if name == "convolution" and _is_product(graph, node):
            labels[node] = "matmul"
        if name.startswith("_scaled_dot_product"):
            labels[node] = labels[(node, "scores")] = "matmul"
            edges.append(((node, "scores"), node, (0, ())))
            for before, argument, part in operands:
                role = {"query": (0, part), "key": (1, part), "value": (1, part)}.get(argument, "bias")
                edges.append((before, node if argument == "value" else (node, "scores"), role))
            continue
        for place, (before, argument, part) in enumerate(operands):
            role = argument
            if labels[node] == "matmul" and given:
                is_bias = argument == "bias" or (argument == "self" and len(operands) == 3)
                role = "" if before not in tensors else "bias" if is_bias else "weight"
            elif labels[node] == "matmul":
                role = place
            elif name in _COMMUTATIVE:
                role = ""
            edges.append((before, node, (role, part)))
    neighbours: dict[object, list[tuple[object, object]]] = defaultdict(list)
    for first, second, role in edges:
        neighbours[first].append((second, ("to", role)))
        neighbours[second].append((first, ("from", role)))
    return Skeleton(labels, frozenset(tensors), neighbours)


def _is_product(graph: nx.DiGraph, node: object) -> bool:
    """Return True for a convolution that multiplies each position with one matrix."""
    weights = [before for before, _, edge in graph.in_edges(node, data=True) if "weight" in edge["arguments"]]
    return bool(graph.nodes[node]["settings"].get("groups") == 1 and prod(graph.nodes[weights[0]]["shape"][2:]) == 1)


def _part(graph: nx.DiGraph, node: object, result: int) -> tuple[float, ...]:
    """Return where the part of a tensor that a node cuts out begins, as a share of the size; () if it cuts none."""
    name, settings = graph.nodes[node].get("operation"), graph.nodes[node].get("settings", {})
    if name not in _PARTS:
        return ()
    shape = next(graph.nodes[before]["shape"] for before in graph.predecessors(node))
    size = max(shape[settings.get("dim", 0)], 1)
    match name:
        case "select" | "slice":
            begin = settings.get("index", settings.get("start")) or 0
        case "split_with_sizes":
            begin = sum(settings["split_sizes"][:result])
        case _:
            begin = result * settings.get("split_size", 1)
    return (round(begin % size / size, 6),)


def paired_tensors(source: Skeleton, target: Skeleton, anchors: Mapping[str, str]) -> dict[str, str]:
    """Return the target's tensors that code alone tells apart, with those of the source; ``anchors`` are such pairs."""
    sides = source, target
    numbers: dict[object, int] = {}
    colours: list[dict[object, int]] = [{}, {}]
    for side, skeleton in enumerate(sides):
        named = {key: ("anchor", pair) for pair in anchors.items() for key in (pair[1 - side],)}
        for node, label in skeleton.labels.items():
            if node in skeleton.neighbours:
                colours[side][node] = numbers.setdefault(named.get(str(node), label), len(numbers))
    final: set[int] = set()  # colours that are not split any more
    for _ in range(_MAX_ROUNDS):
        found = [_next_colours(skeleton, own, final) for skeleton, own in zip(sides, colours, strict=True)]
        values = [set(side.values()) for side in found]
        shared, every = values[0] & values[1], values[0] | values[1]
        final |= {colour[0] for colour in every - shared}
        for side, new in enumerate(found):
            for node, colour in new.items():
                if colour in shared:
                    colours[side][node] = numbers.setdefault(("refined", colour), len(numbers))
        if len({colour[0] for colour in every}) == len(every):  # no colour was split
            break
    members: dict[int, tuple[list[object], list[object]]] = defaultdict(lambda: ([], []))
    for side, own in enumerate(colours):
        for node, number in own.items():
            if node in sides[side].tensors:
                members[number][side].append(node)
    anchored = {*anchors.values()}, anchors.keys()
    doubted = {
        skeleton.labels[node]
        for skeleton, own, known in zip(sides, colours, anchored, strict=True)
        for node in (skeleton.tensors & own.keys()) - known
        if own[node] in final or len(members[own[node]][0]) != len(members[own[node]][1])
    }
    pairs = (both for both in members.values() if len(both[0]) == len(both[1]) == 1)
    return {str(b[0]): str(a[0]) for a, b in pairs if target.labels[b[0]] not in doubted}


def _next_colours(
    skeleton: Skeleton, colours: Mapping[object, int], final: Collection[int]
) -> dict[object, tuple[int, tuple[object, ...]]]:
    """Return the colour that each node would have next: its own, with those of its neighbours and their roles."""
    return {
        node: (own, tuple(sorted([(str(role), colours[other]) for other, role in skeleton.neighbours[node]])))
        for node, own in colours.items()
        if own not in final
    }


def decided_if_open(source_model: nn.Module, example_inputs: object, plan: Plan, min_confidence: float) -> Plan:
    """Return a plan with what code decides, as ``decided_by_code``, if keys leave anything open."""
    if not plan.ambiguous or not isinstance(getattr(plan.target_tensors, "module", None), nn.Module):
        return plan
    found = decided_by_code(source_model, example_inputs, plan, min_confidence)
    return plan if (found.matches, found.ambiguous) == (plan.matches, plan.ambiguous) else found


def decided_by_code(source_model: nn.Module, example_inputs: object, plan: Plan, min_confidence: float) -> Plan:
    """Return a plan in which the code of both sides decides what keys left open, and what contradicts it is ambiguous.

    Its target has to be a module; the keys of ``source_model``, the code of its source, may be other than the source's.

    Raises:
        InputError: The target is not a module, or the source model has other tensors than the source.
    """
    target_model = getattr(plan.target_tensors, "module", None)
    if not isinstance(target_model, nn.Module):
        raise InputError("source_model= is compared with the target, which has to be a module. Nothing was aligned.")
    keys = _keys_in(source_model, plan)
    try:
        traces = [_traced(model, example_inputs) for model in (source_model, target_model)]
    except TraceError as error:
        return replace(plan, notes=(*plan.notes, f"The code of both models was not compared. {error}"))
    source, target = nx.relabel_nodes(traces[0][0], keys), traces[1][0]
    alone = _pairs(source, target, {})
    is_proof = len(alone) >= _MIN_SHARE * sum(bool(target.degree(spec.key)) for spec in plan.target_specs)
    alone |= _unused_pairs(plan, alone)
    users = {own: other for other, own in alone.items()}
    settled = {m.target: m.sources[0] for m in plan.matches if len(m.sources) == 1 and isinstance(m.operation, _WHOLE)}
    contradicted = {
        match.target
        for match in plan.matches
        if (own := settled.get(match.target)) and "rule" not in match.evidence
        if (alone.get(match.target, own), users.get(own, match.target)) != (own, match.target)
    }
    anchors = {
        match.target: match.sources[0]
        for match in plan.matches
        if match.target in settled.keys() - contradicted and match.confidence >= _SURE
        if match.target in target and match.sources[0] in source
    }
    anchors = {key: own for key, own in anchors.items() if Counter(anchors.values())[own] == 1}
    pairs = {key: own for key, own in _pairs(source, target, anchors).items() if key not in anchors} | alone
    refined = _with_pairs(
        plan, pairs | _unused_pairs(plan, pairs), contradicted, overrules=is_proof, min_confidence=min_confidence
    )
    inputs = _common_inputs(traces[0][1], traces[1][1])
    found = probed(_renamed(refined, {old: new for new, old in keys.items()}), source_model, target_model, inputs)
    return _renamed(found, keys) if found.matches != refined.matches else refined


def _renamed(plan: Plan, keys: Mapping[str, str]) -> Plan:
    """Return a plan with other keys of its source; what takes tensors without one is left as it is, and not decided."""
    if all(old == new for old, new in keys.items()):
        return plan

    def renamed(match: Match) -> Match:
        rivals = tuple(
            replace(each, sources=tuple(keys.get(k, k) for k in each.sources)) for each in match.alternatives
        )
        return replace(match, sources=tuple(keys.get(key, key) for key in match.sources), alternatives=rivals)

    return replace(
        plan,
        matches=tuple(map(renamed, plan.matches)),
        ambiguous=tuple(map(renamed, plan.ambiguous)),
        source_specs=tuple(replace(spec, key=keys.get(spec.key, spec.key)) for spec in plan.source_specs),
    )


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
    known, own = {spec.key for spec in plan.source_specs}, list(source_model.state_dict(keep_vars=True))
    if known >= set(own):
        return {key: key for key in own}
    keys = {new: old for old, new in match_tensors(plan.tensors, source_model).mapping.items()}
    if 2 * len(keys) < len(own):
        raise InputError(
            f"source_model= is not the code of this checkpoint: of {len(own)} tensors of {type(source_model).__name__} "
            f"{len(keys)} are in it. Nothing was aligned."
        )
    return keys


def _pairs(source: nx.DiGraph, target: nx.DiGraph, anchors: Mapping[str, str]) -> dict[str, str]:
    """Return the pairs that code decides: from whole skeletons, and of the rest from those without activations."""
    found: dict[str, str] = {}
    for unary in (True, False):
        skeletons = [skeleton_of(graph, unary=unary) for graph in (source, target)]
        new = paired_tensors(skeletons[0], skeletons[1], anchors)
        taken = set(found.values())
        found |= {key: own for key, own in new.items() if key not in found and own not in taken}
    return found


def _unused_pairs(plan: Plan, pairs: Mapping[str, str]) -> dict[str, str]:
    """Pair tensors that no call uses, such as counters, if all else of their modules is in one module of the source."""
    modules: dict[str, set[str]] = defaultdict(set)
    for key, own in pairs.items():
        modules[split_key(key)[0]].add(split_key(own)[0])
    shapes = {spec.key: spec.shape for spec in plan.source_specs}
    found = {}
    for spec in plan.target_specs:
        module, name = split_key(spec.key)
        if spec.key not in pairs and len(modules.get(module, ())) == 1:
            own = f"{next(iter(modules[module]))}.{name}".removeprefix(".")
            if shapes.get(own) == spec.shape:
                found[spec.key] = own
    return found


def _with_pairs(
    plan: Plan, pairs: Mapping[str, str], contradicted: Collection[str], *, overrules: bool, min_confidence: float
) -> Plan:
    """Return a plan with what code decides; what it contradicts is ambiguous, or decided by it if it ``overrules``."""
    shapes = {spec.key: spec.shape for spec in plan.source_specs if spec.key not in plan.excluded}
    known = {match.target: match for match in chain(plan.matches, plan.ambiguous)}
    was_open = {match.target for match in plan.ambiguous} | set(plan.missing_keys)
    found: dict[str, Match] = {}
    for spec in plan.target_specs:
        own, match = pairs.get(spec.key), known.get(spec.key)
        if own not in shapes or spec.key in plan.excluded:
            continue
        operation = Copy() if match is None and _is_plain(spec.shape, shapes[own]) else _operation(match, own, shapes)
        if operation is None:
            continue
        is_same = match is not None and match.sources == (own,)
        evidence = {**(match.evidence if match and is_same else {}), CODE: 1.0}
        if match and spec.key not in was_open and is_same:
            found[spec.key] = replace(match, evidence=evidence)
        elif match and spec.key in contradicted and not overrules:
            others = [other for other in match.alternatives if other.sources != (own,)]
            match = replace(match, alternatives=(Candidate((own,), operation, 1.0), *others))
            found[spec.key] = _doubted(match, f"by its code, the model uses it as the source uses {own}")
        elif spec.key in was_open or spec.key in contradicted:
            found[spec.key] = Match(spec.key, (own,), operation, _DECIDED, evidence)
    for keys in tied_groups(plan.target_specs):
        for first in [key for key in keys if key in found][:1]:
            found |= {key: replace(found[first], target=key) for key in keys}
    users = {match.sources[0]: key for key, match in found.items() if match.confidence > _CONTRADICTED}
    for key, match in known.items():
        if key not in found and key not in was_open and any(users.get(own, key) != key for own in match.sources):
            found[key] = _doubted(match, "by its code, the model uses its source for another tensor")
    merged = {key: match for spec in plan.target_specs if (match := (known | found).get(key := spec.key))}
    sure = {match.target for match in plan.matches if match.target not in found}
    sure |= {key for key, match in found.items() if match.confidence >= min_confidence}
    changed = [key for key, match in found.items() if key not in known or match.sources != known[key].sources]
    doubted = found.keys() - sure - was_open
    count = len((found.keys() & was_open & sure) | set(changed))
    note = f"The code of both models decided {count} tensors; {len(doubted)} that were matched otherwise are ambiguous."
    return replace(
        plan,
        matches=tuple(match for key, match in merged.items() if key in sure),
        ambiguous=tuple(match for key, match in merged.items() if key not in sure),
        mismatched=tuple(mismatch for mismatch in plan.mismatched if mismatch.key not in found),
        notes=(*plan.notes, note) if count or doubted else plan.notes,
    )


def _is_plain(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Return True for equal shapes of which no layer type has two layouts."""
    return shape == other and (len(shape) < 2 or len({*shape[:2]}) == 2 < len(shape))


def _operation(match: Match | None, own: str, shapes: Mapping[str, tuple[int, ...]]) -> Operation | None:
    """Return the operation that fills the target of a match from one tensor; None if a layout is in doubt."""
    if match is None or not _is_other_tensor(match):
        return None
    ways = [(match.sources, match.operation)]
    ways += [(candidate.sources, candidate.operation) for candidate in match.alternatives]
    known = list(dict.fromkeys(operation for sources, operation in ways if sources == (own,)))
    if not known and len(match.sources) == 1 and shapes[own] == shapes[match.sources[0]]:
        known = [match.operation]
    return known[0] if len(known) == 1 and isinstance(known[0], _WHOLE) else None


def _is_other_tensor(match: Match) -> bool:
    """Return True if nothing but the choice of the tensor is in doubt."""
    return all(map(_OTHER_TENSOR.fullmatch, match.warnings))


def _doubted(match: Match, reason: str) -> Match:
    confidence = min(match.confidence, _CONTRADICTED)
    return replace(match, confidence=confidence, warnings=(*match.warnings, reason))
