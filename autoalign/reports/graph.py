"""Module trees and alignments as networkx graphs, for a person to look at or to compute on.

Nodes are texts and all attributes are plain, so that the functions of ``networkx.readwrite`` write them as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from autoalign.checkpoints.checkpoint import module_graph
from autoalign.plan.matches import Plan

if TYPE_CHECKING:
    import networkx as nx


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
