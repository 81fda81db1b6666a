"""Roles: what the code of one side tells of its tensors, and how far it bears out what nothing but order tells.

Names that tell nothing are replaced by what the call does with a layer, and the sides are matched again: queries and
keys meet in a softmax and values do not, a gate is activated and what it multiplies is not, a shortcut is the shorter
of two branches.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import networkx as nx
from torch import nn

from autoalign.checkpoints.checkpoint import Checkpoint
from autoalign.errors import TraceError
from autoalign.matching.features import is_alphabetical
from autoalign.matching.layouts import OTHERWISE
from autoalign.matching.match import match_tensors
from autoalign.matching.names import words
from autoalign.matching.vocabulary import KNOWN, RIVAL_PAIRS
from autoalign.plan.keys import numbers, split_key
from autoalign.plan.matches import Match, Plan
from autoalign.plan.operations import Shape
from autoalign.verification.dataflow import traced
from autoalign.verification.refinement import MOVING, RESHAPING, pairs_of, skeleton_of

CODE = "code"  # the cue
MAX_DOUBTED = 0.4  # confidence in what is doubted

_ORDERED = 0.9  # confidence below which a match without a name is told by order alone
_MIN_LAYERS = 4  # without names whose order can be compared
_MIN_IN_ORDER = 0.75  # share of the layers without names that stand in one order on both sides
_MAX_CLIMBED = 8  # products of a branch beside a shortcut
_PRODUCTS = frozenset({"matmul", "convolution", "embedding"})
_SIDES: dict[object, str] = {0: "q", 1: "k"}  # of the product of both
_ATTENDING, _FEEDING = frozenset({"q", "k", "v", "kv", "qkv"}), frozenset({"gate", "up", "in"})

_TOLD = "Told by what the code of the model does with them"
_OUT_OF_ORDER = "only order tells which it is, and the model uses it in another order than it registers it"
_SYMMETRIC = "only order tells which it is, and the model uses another one of its shape alike"
_APART = "only order tells which it is, and what the model computes with it never meets what another one gives"
_COMPOSED = "the model is given here what it puts together, in an order that only both codes tell"
_NO_ORDER = "only order tells which it is, and what has no names stands in another order on either side"


class _Uses:
    """What a call does with tensors: the skeleton of its graph, and what stands before and after each node of it."""

    def __init__(self, graph: nx.DiGraph) -> None:
        skeleton = skeleton_of(graph, unary=True)
        self.graph, self.labels, self.tensors = graph, skeleton.labels, skeleton.tensors
        self.before: dict[object, list[object]] = defaultdict(list)  # what it is given
        self.arguments: dict[object, list[object]] = defaultdict(list)  # as what it is given each of them
        self.after: dict[object, list[object]] = defaultdict(list)
        self.weights: dict[object, str] = {}  # of products
        for node, edges in skeleton.neighbours.items():
            for other, edge in edges:
                role: Any = edge
                if role[0] == "to":
                    self.after[node].append(other)
                elif other not in skeleton.tensors:
                    self.before[node].append(other)
                    self.arguments[node].append(role[1][0])
                elif role[1][0] == "weight" and self.labels[node] in _PRODUCTS:
                    self.weights[node] = str(other)

    def products(self, node: object) -> set[object]:
        """Return the last products before a node, or itself."""
        found, waiting, seen = set[object](), [node], {node}
        while waiting:
            node = waiting.pop()
            if self.labels.get(node) in _PRODUCTS:
                found.add(node)
                continue
            new = {*self.before[node]} - seen
            waiting += new
            seen |= new
        return found

    def product(self, node: object) -> object:
        """Return the only product that a node is computed from, or itself; None where there are several, or none."""
        found = self.products(node)
        return found.pop() if len(found) == 1 else None

    def attentions(self) -> Iterator[tuple[object, object]]:
        """Yield the product of queries and keys and that with values."""
        for node, label in self.labels.items():
            if isinstance(node, tuple):  # of a fused function
                yield node, node[0]
            elif "softmax" in str(label) and (scores := self.product(node)) is not None and scores not in self.weights:
                mixed, waiting = set[object](), [node]
                while waiting:
                    for other in self.after[waiting.pop()]:
                        (mixed.add if self.labels[other] in _PRODUCTS else waiting.append)(other)
                if len(mixed) == 1 and not mixed & self.weights.keys():
                    yield scores, mixed.pop()

    def is_alone(self, node: object, taker: object) -> bool:
        """Return True if all that a node gives goes on to another one."""
        while len(self.after[node]) == 1 and node != taker:
            node = self.after[node][0]
        return node == taker

    def is_upsampled(self, node: object) -> bool:
        """Return True if a node is, or its only product is given, features of a larger image than those before."""
        seen_product = False
        while node in self.labels and not (seen_product and self.labels[node] in _PRODUCTS):
            if str(self.labels[node]).startswith("upsample"):
                return True
            seen_product |= self.labels[node] in _PRODUCTS
            if len(self.before[node]) != 1:
                return False
            node = self.before[node][0]
        return False

    def branch(self, node: object) -> Iterator[object]:
        """Yield the products before a product, for as long as each is computed from one alone."""
        for _ in range(_MAX_CLIMBED):
            before = self.product(self.before[node][0]) if len(self.before[node]) == 1 else None
            if before is None:
                return
            node = before
            yield node


def roles_of(graph: nx.DiGraph) -> dict[str, str]:
    """Return what a call does with the weights of some layers, as a word of the vocabulary, by key.

    >>> from torch.nn import functional
    >>> class Gated(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a, self.b, self.c = (nn.Linear(4, 4) for _ in "abc")
    ...     def forward(self, x):
    ...         return self.c(self.a(x) * functional.silu(self.b(x)))
    >>> roles_of(traced(Gated())[0])
    {'b.weight': 'gate', 'a.weight': 'up', 'c.weight': 'down'}
    """
    uses = _Uses(graph)
    found: dict[str, set[str]] = defaultdict(set)

    def note(node: object, role: str) -> None:
        if role and node in uses.weights:
            found[uses.weights[node]].add(role)

    def note_only(before: object, role: str) -> None:
        if len(uses.after[before]) == 1:
            note(uses.after[before][0], role)

    for scores, mixed in uses.attentions():
        both = zip(uses.arguments[scores], uses.before[scores], strict=True)
        operands: dict[str | int, object] = {
            _SIDES.get(place, number): uses.product(node) for number, (place, node) in enumerate(both)
        }
        values = {node for node in uses.before[mixed] if scores not in uses.products(node)}
        value = uses.product(values.pop()) if len(values) == 1 else None
        if {*operands.values()} == {value}:
            note(value, "qkv")
        elif value in operands.values():
            note(value, "kv")
            note(operands.get("q"), "q" if operands.get("k") == value else "")
        else:
            note(value, "v")
            for side, node in operands.items() if len({*operands.values()}) > 1 else ():
                note(node, side if isinstance(side, str) else "")
        note_only(mixed, "o")
    for node, label in uses.labels.items():
        given = uses.before[node]
        for one, other in (given, given[::-1]) if len(given) == 2 and label == "cat" else ():
            if uses.is_upsampled(one) and not uses.is_upsampled(other):
                note(uses.product(one), "up")
                note(uses.product(other), "skip")
        for one, other in (given, given[::-1]) if len(given) == 2 and label in ("add", "mul") else ():
            first, second = uses.product(one), uses.product(other)
            if label == "add" and uses.labels.get(one) == "mul" and other in uses.weights:
                scales = {uses.product(of) for of in uses.before[one]} & uses.weights.keys() - {other}
                scales = {scale for scale in scales if uses.before[scale] == uses.before[other]}
                if len(scales) == 1:  # else it is a gate and what it gates
                    note(scales.pop(), "scale")
                    note(other, "shift")
            if first is None or second is None or first == second:
                continue
            if label == "mul" and first != one and second == other and uses.before[first] == uses.before[second]:
                note(first, "gate")
                note(second, "up")
                note_only(node, "down")
            if label == "mul":
                continue
            beside = list(takewhile(first.__ne__, uses.branch(second)))
            if any(uses.before[first] == uses.before[each] for each in beside):
                note(first, "shortcut")
            inner = next(uses.branch(second), None)
            is_layer = second == other and uses.labels[second] == "matmul" and uses.is_alone(inner, second)
            if is_layer and [uses.products(each) for each in uses.before[inner]] == [uses.products(one)]:
                note(inner, "in")
                note(second, "out")
    norms: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))  # by what they stand in and before
    for key in map(str, uses.tensors):
        takers = {taker for user in uses.after[key] if user not in uses.weights for taker in uses.after[user]}
        told = {role for taker in takers for role in found.get(uses.weights.get(taker, ""), {""})}
        for role, norm in ((_ATTENDING, "attention_norm"), (_FEEDING, "ffn_norm")):
            if told and told <= role:
                norms[split_key(split_key(key)[0])[0]][norm].append(key)
    for of in norms.values():
        for norm, keys in of.items() if len(of) == 2 else ():  # one alone might be the other of two
            found |= {key: {norm} for key in keys}
    return {key: told.pop() for key, told in found.items() if len(told) == 1}


def given_composed(graph: nx.DiGraph) -> set[str]:
    """Return the keys of layers that are given concatenated features, flattened images or unfolded patches.

    >>> import torch
    >>> network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 4))
    >>> sorted(given_composed(traced(network, torch.zeros(1, 3, 8, 8))[0]))
    ['2.bias', '2.weight']
    """
    nodes, found = graph.nodes, set[str]()

    def composes(node: object) -> bool:
        name, shape = nodes[node].get("operation"), nodes[node]["shape"]
        given = [nodes[before].get("shape", ()) for before in graph.pred[node] if name in RESHAPING]
        # what only joins the dimensions before the last, as torch does around each matrix, leaves features as they are
        return name in ("cat", "im2col") or any(len(of) > len(shape) > 0 and of[-1] < shape[-1] for of in given)

    waiting = [node for node, kind in nodes(data="kind") if kind == "operation" and composes(node)]
    seen = {*waiting}
    while waiting:
        for user in graph.succ[waiting.pop()]:
            own = {key for key in graph.pred[user] if nodes[key]["kind"] in ("parameter", "buffer")}
            moved = (graph.pred[before] for before in graph.pred[user] if nodes[before].get("operation") in MOVING)
            own |= {key for of in moved for key in of if nodes[key]["kind"] in ("parameter", "buffer")}
            found |= {str(key) for key in own}
            if user not in seen and all(len(nodes[key]["shape"]) < 2 for key in own):
                waiting.append(user)
            seen.add(user)
    return found


def with_roles(
    plan: Plan, order: Sequence[str], *, source: nx.DiGraph | None = None, target: nx.DiGraph | None = None
) -> Plan:
    """Return a plan of the same sides, matched again by names that tell what a call of either does with its tensors.

    The ``order`` of the target's keys stands for that of their registration. A plan with rules, adaptations or
    quantised tensors is returned as it is.
    """
    sides, graphs = (plan.tensors, plan.target_tensors), (source, target)
    roles = [{} if graph is None else roles_of(graph) for graph in graphs]
    keys = [_keys_by_role([*of], told) for of, told in zip((plan.sources, plan.targets), roles, strict=True)]
    is_plain = not any("rule" in match.evidence or match.operation.adapts for match in plan.matches)
    own, other = sides
    if not (any(keys) and is_plain and isinstance(own, Checkpoint) and isinstance(other, Checkpoint)):
        return plan
    if own.quantised:
        return plan
    orders = [[key for key in of if key not in plan.excluded] for of in (plan.sources, order)]
    found = match_tensors(_renamed(own, orders[0], keys[0]), _renamed(other, orders[1], keys[1]))
    old = [{new: key for key, new in of.items()} for of in keys]
    found = with_sources(found, old[0])
    place = {key: n for n, key in enumerate(plan.targets)}

    def named(matches: Iterable[Match]) -> tuple[Match, ...]:
        told = (
            replace(match, target=old[1].get(match.target, match.target), evidence={**match.evidence, CODE: 1.0})
            if match.target in old[1] or not keys[0].keys().isdisjoint(match.sources)
            else match
            for match in matches
        )
        return tuple(sorted(told, key=lambda match: place[match.target]))

    counts = Counter(told[key] for of, told in zip(keys, roles, strict=True) for key in of if key in told)
    said = ", ".join(f"{count} {role}" for role, count in counts.items())
    return replace(
        plan,
        matches=named(found.matches),
        ambiguous=named(found.ambiguous),
        mismatched=tuple(replace(each, key=old[1].get(each.key, each.key)) for each in found.mismatched),
        notes=(*dict.fromkeys((*plan.notes, *found.notes)), f"{_TOLD}: {said}."),
    )


def _renamed(side: Checkpoint, order: Iterable[str], keys: Mapping[str, str]) -> Checkpoint:
    """Return a side with some of its tensors, in an order, under other keys."""
    specs = {spec.key: replace(spec, key=keys.get(spec.key, spec.key)) for spec in side.specs}
    return replace(side, specs=tuple(specs[key] for key in order if key in specs))


def with_sources(plan: Plan, keys: Mapping[str, str]) -> Plan:
    """Return a plan with other keys of its source; those that are not given are left."""
    if all(old == new for old, new in keys.items()):
        return plan

    def renamed(of: Iterable[str]) -> tuple[str, ...]:
        return tuple(keys.get(key, key) for key in of)

    def with_keys(match: Match) -> Match:
        rivals = tuple(replace(each, sources=renamed(each.sources)) for each in match.alternatives)
        return replace(match, sources=renamed(match.sources), alternatives=rivals)

    return replace(
        plan,
        matches=tuple(map(with_keys, plan.matches)),
        ambiguous=tuple(map(with_keys, plan.ambiguous)),
        mismatched=tuple(replace(m, source_key=keys.get(m.source_key, m.source_key)) for m in plan.mismatched),
        source_specs=tuple(replace(spec, key=keys.get(spec.key, spec.key)) for spec in plan.source_specs),
    )


def _keys_by_role(keys: Sequence[str], roles: Mapping[str, str]) -> dict[str, str]:
    """Return new names of the keys in modules that have a role and whose own names tell none, or another one."""
    modules: dict[str, set[str]] = defaultdict(set)
    for key, role in roles.items():
        module = split_key(key)[0]
        while module.rpartition(".")[2].isdigit():
            module = module.rpartition(".")[0]
        modules[module].add(role)
    renamed = {}
    for module, told in modules.items():
        above, _, name = module.rpartition(".")
        (role,) = told if len(told) == 1 else ("",)
        known = KNOWN.intersection(words(name))
        if role and (not known or any((word, role) in RIVAL_PAIRS for word in known)):
            renamed[module] = f"{above}.{role}".removeprefix(".")
    taken = Counter([*renamed.values(), *(module for module, _ in map(split_key, keys))])
    renamed = {module: new for module, new in renamed.items() if taken[new] == 1}
    return {
        key: new + key[len(module) :] for module, new in renamed.items() for key in keys if key.startswith(f"{module}.")
    }


def in_doubt(match: Match, reason: str) -> Match:
    """Return a match as a proposal that nothing decides."""
    confidence = min(match.confidence, MAX_DOUBTED)
    return replace(match, confidence=confidence, warnings=(*match.warnings, reason))


def with_doubts(plan: Plan, reasons: Mapping[str, str]) -> Plan:
    """Return a plan in which the matches of some target keys are ambiguous, for a reason each."""
    return plan.revised((), [in_doubt(m, reasons[m.target]) for m in plan.matches if m.target in reasons])


def decided_by_target(plan: Plan, target_model: nn.Module, example_inputs: object) -> Plan:
    """Return a plan with what the target's code alone tells, and without what it does not bear out.

    Of what nothing but order tells, only that is believed which shapes show to stand in one order on both sides, and
    which the model uses in the order in which it registers it, unless ``example_inputs`` are given, which stand for the
    order of use. What it uses alike, or for different outputs, has no order. With ``example_inputs``, a layer under
    another name is not believed to be given several tensors or places in the source's order.
    """
    alike = Counter(spec.shape for spec in plan.target_specs)
    nameless = filter(_is_nameless, (*plan.matches, *plan.ambiguous))
    is_asked = example_inputs is not None
    may_differ = [match.target for match in plan.matches if is_asked and not OTHERWISE.isdisjoint(match.warnings)]
    if not may_differ and all(alike[plan.targets[match.target].shape] == 1 for match in nameless):
        return plan
    try:
        graph = traced(target_model, example_inputs)[0]
    except TraceError:
        graph = nx.DiGraph()
    keys = [*plan.targets]
    used = sorted((key for key in keys if key in graph and graph.out_degree(key)), key=lambda k: min(graph.succ[k]))
    order = [*used, *(key for key in keys if key not in used)] if is_asked else keys
    plan = with_roles(plan, order, target=graph)
    composed = given_composed(graph) if may_differ else ()
    plan = with_doubts(plan, {key: _COMPOSED for key in may_differ if key in composed})
    if not (groups := _told_by_order(plan)):
        return plan
    nameless = filter(_is_nameless, plan.matches)
    has_order = is_in_order(nameless, [*plan.sources], order)
    reasons = {key: _NO_ORDER for of, left in groups if not has_order or len(of) <= left for key in of}
    told = pairs_of(graph, graph, {})
    outputs = [node for node, kind in graph.nodes(data="kind") if kind == "output"]
    before = {node: nx.ancestors(graph, node) for node in outputs}
    for of, _ in groups:
        known = [key for key in order if key in of and key in used]
        by_use = [key for key in used if key in of]
        reasons |= {key: _OUT_OF_ORDER for key, other in zip(known, by_use, strict=True) if key != other}
        leads_to = {key: {node for node in before if key in before[node]} for key in known}
        reasons |= {key: _APART for key in known if any(leads_to[key].isdisjoint(other) for other in leads_to.values())}
        twins = [key for key in known if key not in told]
        reasons |= dict.fromkeys(twins if len(twins) > 1 else (), _SYMMETRIC)
    return with_doubts(plan, reasons)


def _is_nameless(match: Match) -> bool:
    return not match.evidence.get("name", 1.0) and CODE not in match.evidence


def _told_by_order(plan: Plan) -> list[tuple[list[str], int]]:
    """List the target keys of each shape that only order tells from others, with how many of that shape get nothing."""
    groups: dict[Shape, list[str]] = defaultdict(list)
    for match in filter(_is_nameless, plan.matches):
        if match.confidence < _ORDERED:
            groups[plan.targets[match.target].shape].append(match.target)
    left = Counter(plan.targets[key].shape for key in plan.missing_keys)
    return [(of, left[shape]) for shape, of in groups.items() if len(of) + left[shape] > 1]


def is_in_order(matches: Iterable[Match], source: Sequence[str], target: Sequence[str]) -> bool:
    """Return False if the layers of some matches stand in different orders on the two sides, beyond chance."""
    if is_alphabetical(source):
        source = sorted(source, key=lambda key: [(numbers(part), part) for part in key.split(".")])
    own, other = ({key: place for place, key in enumerate(keys)} for keys in (source, target))
    layers = {split_key(match.target)[0]: (other[match.target], own[match.sources[0]]) for match in matches}
    tails: list[int] = []  # the least ends of increasing sequences, by their length
    for _, place in sorted(layers.values()):
        at = bisect_left(tails, place)
        tails[at : at + 1] = [place]
    return len(layers) < _MIN_LAYERS or len(tails) >= _MIN_IN_ORDER * len(layers)
