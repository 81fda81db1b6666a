"""Order: what nothing but the order of keys tells, believed as far as the target's code bears it out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import networkx as nx
from torch import nn

from autoalign.errors import TraceError
from autoalign.plan.matches import Match, Plan
from autoalign.plan.operations import Shape
from autoalign.verification.dataflow import traced
from autoalign.verification.refinement import pairs_of

_ORDERED = 0.9  # confidence below which a match without a name is told by order alone
MAX_DOUBTED = 0.4  # confidence in what is doubted

_OUT_OF_ORDER = "only order tells which it is, and the model uses it in another order than it registers it"
_SYMMETRIC = "only order tells which it is, and the model uses another one of its shape alike"
_APART = "only order tells which it is, and what the model computes with it never meets what another one gives"


def in_doubt(match: Match, reason: str) -> Match:
    """Return a match as a proposal that nothing decides."""
    confidence = min(match.confidence, MAX_DOUBTED)
    return replace(match, confidence=confidence, warnings=(*match.warnings, reason))


def with_doubts(plan: Plan, reasons: Mapping[str, str]) -> Plan:
    """Return a plan in which the matches of some target keys are ambiguous, for a reason each."""
    found = tuple(in_doubt(match, reasons[match.target]) for match in plan.matches if match.target in reasons)
    kept = tuple(match for match in plan.matches if match.target not in reasons)
    return replace(plan, matches=kept, ambiguous=(*plan.ambiguous, *found))


def without_order(plan: Plan, target_model: nn.Module, example_inputs: object) -> Plan:
    """Return a plan in which matches that nothing but order tells are ambiguous where that cannot be believed.

    It cannot if the model uses tensors in another order than it registers them, unless ``example_inputs`` are given,
    which stand for the order of use; and if it uses several alike, or for different outputs, since these have no order.
    """
    shapes = {spec.key: spec.shape for spec in plan.target_specs}
    groups: dict[Shape, list[str]] = defaultdict(list)
    for match in plan.matches:
        if match.confidence < _ORDERED and not match.evidence.get("name", 1.0):
            groups[shapes[match.target]].append(match.target)
    groups = {shape: keys for shape, keys in groups.items() if len(keys) > 1}
    try:
        graph = traced(target_model, example_inputs)[0] if groups else nx.DiGraph()
    except TraceError:
        graph = nx.DiGraph()
    used = _in_order_of_use(shapes, graph)
    reasons: dict[str, str] = {}
    told = pairs_of(graph, graph, {}) if groups else {}
    outputs = [node for node, kind in graph.nodes(data="kind") if kind == "output"]
    before = {node: nx.ancestors(graph, node) for node in outputs} if groups else {}
    for keys in groups.values():
        order = [key for key in used if key in keys]
        known = order if example_inputs is not None else [key for key in keys if key in used]
        reasons |= {key: _OUT_OF_ORDER for key, other in zip(known, order, strict=True) if key != other}
        leads_to = {key: {node for node in before if key in before[node]} for key in known}
        reasons |= {key: _APART for key in known if any(leads_to[key].isdisjoint(other) for other in leads_to.values())}
        alike = [key for key in known if key not in told]
        reasons |= dict.fromkeys(alike if len(alike) > 1 else (), _SYMMETRIC)
    return with_doubts(plan, reasons)


def _in_order_of_use(shapes: Mapping[str, Shape], graph: nx.DiGraph) -> dict[str, Shape]:
    used = (key for key in shapes if key in graph and graph.out_degree(key))
    return {key: shapes[key] for key in sorted(used, key=lambda key: min(graph.successors(key)))}
