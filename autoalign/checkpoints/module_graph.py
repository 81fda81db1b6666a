"""Module trees and alignments as networkx graphs, for a person to look at or to compute on.

Nodes are texts and all attributes are plain, so that the functions of ``networkx.readwrite`` write them as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from autoalign.plan.keys import LEVELS
from autoalign.plan.specs import TensorSpec

if TYPE_CHECKING:
    import networkx as nx


def module_graph(specs: Iterable[TensorSpec], status: Mapping[str, str] | None = None) -> nx.DiGraph:
    """Build the tree of the modules and tensors of one side, with an edge from each module to what it holds.

    >>> import torch
    >>> graph = module_graph([TensorSpec("fc.weight", (2, 3), torch.float32)])
    >>> list(graph.edges)
    [('module:', 'module:fc'), ('module:fc', 'tensor:fc.weight')]
    >>> graph.nodes["module:fc"]
    {'kind': 'module', 'path': 'fc', 'tensors': 1, 'elements': 6}
    >>> graph.nodes["tensor:fc.weight"]
    {'kind': 'tensor', 'path': 'fc.weight', 'shape': '[2, 3]', 'dtype': 'float32', 'elements': 6}

    Args:
        specs: The tensors, in order.
        status: That of each key, for an attribute ``status``; that of a module is that of all tensors in it, or
            ``"mixed"``.
    """
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_node("module:", kind="module", path="")
    for spec in specs:
        above = "module:"
        *parts, _ = spec.key.split(".", LEVELS)
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            module = f"module:{path}"
            if module not in graph:
                graph.add_node(module, kind="module", path=path)
                graph.add_edge(above, module, relation="contains")
            above = module
        tensor = f"tensor:{spec.key}"
        facts = {"shape": str(list(spec.shape)), "dtype": spec.dtype_name, "elements": spec.numel}
        graph.add_node(tensor, kind="tensor", path=spec.key, **facts)
        if status is not None:
            graph.nodes[tensor]["status"] = status[spec.key]
        graph.add_edge(above, tensor, relation="contains")
    for node in reversed(list(nx.topological_sort(graph))):
        data, inner = graph.nodes[node], [graph.nodes[child] for child in graph[node]]
        if data["kind"] == "module":
            data["tensors"] = sum(child.get("tensors", 1) for child in inner)
            data["elements"] = sum(child["elements"] for child in inner)
            if status is not None:
                found = {child["status"] for child in inner}
                data["status"] = found.pop() if len(found) == 1 else "mixed"
    return graph
