"""Order: what nothing but the order of keys tells, believed as far as shapes and the target's code bear it out."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from math import prod
from statistics import fmean, stdev

import networkx as nx
from torch import nn

from autoalign.errors import TraceError
from autoalign.matching.candidates import squeeze
from autoalign.matching.list_order import MIN_AGREEMENT, common_length
from autoalign.plan.keys import natural, numbers, split_key, stem
from autoalign.plan.matches import Match, Plan
from autoalign.plan.operations import Shape
from autoalign.verification.dataflow import traced
from autoalign.verification.refinement import pairs_of

_ORDERED = 0.9  # confidence below which a match without a name is told by order alone
_SIMILAR = 0.6  # similarity of names that tells which layer it is
MAX_DOUBTED = 0.4  # confidence in what is doubted
_MAX_MODULES = 2000  # whose order is compared
_SHUFFLES = 20
_MIN_DEVIATIONS = 4.0  # of chance, between its agreement and the best one: with less, none can be told from the other

_AT_RANDOM = "neither its name nor its shape tells which it is, and the two sides have no common order"
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

    It cannot if shapes stand as if at random, on one side as seen from the other; if the model uses tensors in another
    order than it registers them, unless ``example_inputs`` are given, which stand for the order of use; and if it uses
    several alike, or for different outputs, since these have no order.
    """
    shapes = {spec.key: spec.shape for spec in plan.target_specs}
    numbered = _Numbered({spec.key: spec.shape for spec in plan.source_specs}, plan)
    groups: dict[Shape, list[str]] = defaultdict(list)
    for match in plan.matches:
        if match.confidence < _ORDERED and not match.evidence.get("name", 1.0):
            groups[shapes[match.target]].append(match.target)
    groups = {shape: keys for shape, keys in groups.items() if len(keys) > 1}
    is_kept = numbered.are_ordered_as(shapes)
    try:
        graph = nx.DiGraph() if is_kept and not groups else traced(target_model, example_inputs)[0]
    except TraceError:
        graph = nx.DiGraph()
    used = _in_order_of_use(shapes, graph)
    reasons: dict[str, str] = {}
    if not is_kept and not (used and numbered.are_ordered_as(used)):
        reasons = dict.fromkeys(numbered.untold(shapes), _AT_RANDOM)
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


def _kinds(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the kind of each module: the sizes of its largest tensor, ascending."""
    largest: dict[str, Shape] = {}
    for key, shape in shapes.items():
        module = split_key(key)[0]
        if prod(shape) > prod(largest.get(module, (0,))):
            largest[module] = shape
    return {module: tuple(sorted(squeeze(shape))) for module, shape in largest.items()}


class _Numbered:
    """The source's modules that are named by a number beside others of other shapes: that tells an order alone."""

    def __init__(self, shapes: Mapping[str, Shape], plan: Plan) -> None:
        self.kinds, self.plan = _kinds(shapes), plan
        self.lists: dict[tuple[str, str], list[str]] = defaultdict(list)
        for module in self.kinds:
            parent, name = split_key(module)
            if numbers(name):
                self.lists[parent, stem(name)].append(module)
        self.lists = {name: of for name, of in self.lists.items() if len({self.kinds[module] for module in of}) > 1}
        self.list_of = {module: name for name, of in self.lists.items() for module in of}

    def are_ordered_as(self, target: Mapping[str, Shape]) -> bool:
        """Return False if they stand as if at random, as seen from the modules that they fill."""
        kinds = _kinds(target)
        filled: dict[tuple[str, str], dict[str, Shape]] = defaultdict(dict)
        sources = {m.target: m.sources for m in (*self.plan.matches, *self.plan.ambiguous)}
        for key in target:
            for module in {split_key(source)[0] for source in sources.get(key, ())} & self.list_of.keys():
                filled[self.list_of[module]][split_key(key)[0]] = kinds[split_key(key)[0]]
        return has_common_order(
            [({m: self.kinds[m] for m in self.lists[name]}, others) for name, others in filled.items()]
        )

    def untold(self, target: Mapping[str, Shape]) -> list[str]:
        """List the target's keys that they fill, where neither shapes tell which does nor the numbers of a list."""
        kinds = _kinds(target)
        counts = Counter(self.kinds.values()), Counter(kinds.values())
        places: dict[object, list[int]] = defaultdict(list)
        for module, which in self.list_of.items():
            places[which, self.kinds[module]].append(numbers(split_key(module)[1])[-1])
        listed = {which for which, of in places.items() if len({*of}) == max(of) - min(of) + 1}

        def is_told(match: Match, module: str) -> bool:
            own, other = self.kinds[module], kinds[split_key(match.target)[0]]
            if module not in self.list_of or (counts[0][own] == counts[1][other] == 1):
                return True
            return match.evidence["name"] >= _SIMILAR and (self.list_of[module], own) in listed

        by_cues = (match for match in self.plan.matches if "name" in match.evidence)
        return [m.target for m in by_cues if not all(is_told(m, split_key(key)[0]) for key in m.sources)]


def has_common_order(sides: Sequence[tuple[Mapping[str, Hashable], Mapping[str, Hashable]]]) -> bool:
    """Return False if the kinds of modules in lists stand as if at random, as seen from what the lists fill.

    The order of a list is that of its keys, or that of the numbers in them. How far two orders agree is the length of
    their longest common subsequence, beyond that of shuffled ones as a share of the longest there could be.

    >>> has_common_order([(dict(zip("abcdefghi", range(9))), dict(zip("rstuvwxyz", range(9))))])
    True
    >>> has_common_order([(dict(zip("abcdefghi", range(9))), dict(zip("rstuvwxyz", (4, 8, 0, 3, 7, 1, 6, 2, 5))))])
    False
    """
    draw = random.Random(0)
    found, best, by_chance = 0, 0, [0] * _SHUFFLES
    for source, target in sides:
        shared = Counter(source.values()) & Counter(target.values())
        second = [kind for kind in target.values() if kind in shared][:_MAX_MODULES]
        ways = [
            [source[module] for module in modules if source[module] in shared][:_MAX_MODULES]
            for modules in (source, sorted(source, key=natural))
        ]
        found += max(common_length(first, second) for first in ways)
        best += (Counter(ways[0]) & Counter(second)).total()
        shuffled = (draw.sample(ways[0], len(ways[0])) for _ in by_chance)
        by_chance = [sum(each) for each in zip(by_chance, (common_length(f, second) for f in shuffled), strict=True)]
    mean = fmean(by_chance)
    return best - mean < _MIN_DEVIATIONS * stdev(by_chance) or found - mean >= MIN_AGREEMENT * (best - mean)
