"""Alignments and module trees as networkx graphs: what they hold, and that it can be written and computed on."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
import torchvision
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import autoalign
from autoalign.checkpoints.checkpoint import module_graph
from autoalign.plan.specs import TensorSpec
from tests.alignments import MIXED


def sides() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    source = {f"attn.{name}.weight": torch.rand(4, 4) for name in "qkv"}
    source |= {"attn.out.weight": torch.rand(4, 6, dtype=torch.float64), "fc.bias": torch.rand(9)}
    target = {"attn.qkv.weight": torch.rand(12, 4), "attn.out.weight": torch.rand(4, 6), "head.bias": torch.rand(5)}
    return source, target


def edges(graph: Any, relation: str) -> dict[tuple[str, str], dict[str, object]]:
    return {(first, second): data for first, second, data in graph.edges(data=True) if data["relation"] == relation}


def test_the_graph_of_an_alignment() -> None:
    graph = autoalign.align(*sides()).to_networkx()
    assert type(graph) is nx.DiGraph
    assert graph.nodes["source:tensor:attn.q.weight"] == {
        "side": "source",
        "kind": "tensor",
        "path": "attn.q.weight",
        "shape": "[4, 4]",
        "dtype": "float32",
        "elements": 16,
        "status": "used",
    }
    assert graph.nodes["target:module:attn"] == {
        "side": "target",
        "kind": "module",
        "path": "attn",
        "tensors": 2,
        "elements": 72,
        "status": "matched",
    }
    assert graph.nodes["source:tensor:attn.out.weight"]["dtype"] == "float64"
    assert [graph.nodes[f"{side}:module:"]["status"] for side in ("source", "target")] == ["mixed", "mixed"]
    assert graph.nodes["source:tensor:fc.bias"]["status"] == graph.nodes["source:module:fc"]["status"] == "unexpected"
    fills = edges(graph, "fills")
    assert {ends: (data["operation"], data["inputs"]) for ends, data in fills.items()} == {
        ("source:tensor:attn.q.weight", "target:tensor:attn.qkv.weight"): ("concatenate(dim 0)", "0"),
        ("source:tensor:attn.k.weight", "target:tensor:attn.qkv.weight"): ("concatenate(dim 0)", "1"),
        ("source:tensor:attn.v.weight", "target:tensor:attn.qkv.weight"): ("concatenate(dim 0)", "2"),
        ("source:tensor:attn.out.weight", "target:tensor:attn.out.weight"): ("copy", "0"),
    }
    assert len(fills) + len(edges(graph, "contains")) == graph.number_of_edges()


def test_the_graph_has_every_tensor_match_and_status_of_an_alignment() -> None:
    graph = MIXED.to_networkx(proposals=True)
    nodes: dict[str, dict[str, Any]] = dict(graph.nodes(data=True))
    tensors = {(data["side"], data["path"]): data for data in nodes.values() if data["kind"] == "tensor"}
    assert tensors.keys() == {("source", spec.key) for spec in MIXED.source_specs} | {
        ("target", spec.key) for spec in MIXED.target_specs
    }
    assert {key: data["status"] for (side, key), data in tensors.items() if side == "target"} == MIXED.status
    unexpected = [key for (side, key), data in tensors.items() if side == "source" and data["status"] == "unexpected"]
    assert unexpected == MIXED.unexpected_keys
    for relation, matches in (("fills", MIXED.matches), ("proposed", MIXED.ambiguous)):
        expected = {
            (f"source:tensor:{key}", f"target:tensor:{match.target}"): (str(match.operation), match.confidence)
            for match in matches
            for key in match.sources
        }
        found = {ends: (data["operation"], data["confidence"]) for ends, data in edges(graph, relation).items()}
        assert found == expected != {}
    without = MIXED.to_networkx()
    assert not edges(without, "proposed")
    assert nx.utils.graphs_equal(nx.edge_subgraph(graph, without.edges), nx.edge_subgraph(without, without.edges))


def test_what_a_module_goes_into_and_is_made_of() -> None:
    source = {f"module.{key}": value for key, value in torchvision.models.resnet18().state_dict().items()}
    graph = autoalign.align(source, torchvision.models.resnet18()).to_networkx()
    stage = {f"target:tensor:{key.removeprefix('module.')}" for key in source if ".layer3." in key}
    filled = {node for node in nx.descendants(graph, "source:module:module.layer3") if node.startswith("target:")}
    assert filled == stage
    origin = nx.ancestors(graph, "target:tensor:layer3.0.conv1.weight")
    assert {"source:tensor:module.layer3.0.conv1.weight", "source:module:", "target:module:layer3.0"} <= origin
    assert nx.is_directed_acyclic_graph(graph)
    assert nx.number_weakly_connected_components(graph) == 1


def test_keys_of_both_sides_and_names_of_modules_do_not_clash() -> None:
    state_dict = {"a": torch.ones(1), "a.b": torch.ones(2), "a.b.": torch.ones(3), ".a": torch.ones(4)}
    graph = autoalign.align(state_dict, state_dict).to_networkx()
    tensors = [data["path"] for _, data in graph.nodes(data=True) if data["kind"] == "tensor"]
    assert sorted(tensors) == sorted([*state_dict, *state_dict])
    assert graph.nodes["source:tensor:a.b"]["shape"] == "[2]"
    assert graph.nodes["source:module:a.b"]["tensors"] == 1


def node_link(graph: Any) -> Any:
    return nx.node_link_graph(json.loads(json.dumps(nx.node_link_data(graph, edges="edges"))), edges="edges")


def graphml(graph: Any) -> Any:
    file = io.BytesIO()
    nx.write_graphml(graph, file)
    return nx.read_graphml(io.BytesIO(file.getvalue()))


def gexf(graph: Any) -> Any:
    file = io.BytesIO()
    nx.write_gexf(graph, file)
    read = nx.read_gexf(io.BytesIO(file.getvalue()))
    for data in (*(data for _, data in read.nodes(data=True)), *(data for *_, data in read.edges(data=True))):
        for name in ("label", "id"):  # of the format
            data.pop(name, None)
    read.graph.clear()
    return read


@pytest.mark.parametrize("again", [node_link, graphml, gexf], ids=lambda function: str(function.__name__))
def test_graphs_are_written_and_read_again(again: Callable[[Any], Any]) -> None:
    for graph in (MIXED.to_networkx(proposals=True), autoalign.align(*sides()).to_networkx()):
        read = again(graph)
        read.graph.clear()
        assert dict(read.nodes(data=True)) == dict(graph.nodes(data=True))
        assert {ends: read.edges[ends] for ends in read.edges} == {ends: graph.edges[ends] for ends in graph.edges}


def test_the_graph_of_a_checkpoint_is_its_module_tree(tmp_path: Path) -> None:
    model = torchvision.models.resnet18()
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    tree = autoalign.open_checkpoint(tmp_path / "a.safetensors").to_networkx()
    assert nx.is_arborescence(tree)
    with_tensors = {f"module:{name}" for name, module in model.named_modules() if module.state_dict()}
    assert {node for node, data in tree.nodes(data=True) if data["kind"] == "module"} == with_tensors
    leaves = {node for node in tree if tree.out_degree(node) == 0}
    assert leaves == {f"tensor:{key}" for key in model.state_dict()}
    assert tree.nodes["module:"]["tensors"] == len(leaves)
    layer = tree.nodes["module:layer2.1.bn1"]
    assert (layer["tensors"], layer["elements"]) == (5, 4 * 128 + 1)
    assert nx.shortest_path(tree, "module:", "tensor:layer1.0.conv1.weight")[1:-1] == [
        *("module:layer1", "module:layer1.0", "module:layer1.0.conv1")
    ]
    blocks = [tree.subgraph(nx.descendants(tree, f"module:layer{stage}.1")) for stage in (3, 4)]
    assert nx.is_isomorphic(*blocks)


@given(st.lists(st.text("a.0", max_size=8), unique=True, max_size=8))
@example(["a" + ".a" * 3000, "a" + ".a" * 3000 + "b"])
@example(["", ".", "..", "a", "a."])
def test_any_keys_make_a_tree_with_a_leaf_for_each(keys: list[str]) -> None:
    graph = module_graph([TensorSpec(key, (2,), torch.float32) for key in keys])
    assert nx.is_arborescence(graph)
    tensors = [data["path"] for _, data in graph.nodes(data=True) if data["kind"] == "tensor"]
    assert sorted(tensors) == sorted(keys)
    assert graph.nodes["module:"]["elements"] == 2 * len(keys)
    assert all(graph.out_degree(node) for node in graph if node.startswith("module:") and keys)
