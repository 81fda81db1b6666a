"""Alignments as JSON: what it holds, what is read of it, and that it is applied later."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import timm
import torch
import torchvision
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import autoalign
from autoalign import Alignment, InputError, PairMismatchError
from autoalign.checkpoints.atomic import replace_text
from autoalign.checkpoints.checkpoint import module_graph
from autoalign.plan.matches import Candidate, Match, Mismatch, Verified
from autoalign.plan.operations import Concatenate, Split
from autoalign.plan.specs import TensorSpec
from autoalign.reports.serialization import alignment_from_plain
from tests.alignments import MIXED, spec


def names(alignment: Alignment) -> dict[str, tuple[str, ...]]:
    return {match.target: match.sources for match in alignment.matches}


@pytest.fixture(name="saved")
def saved_alignment(tmp_path: Path) -> Path:
    source = torchvision.models.resnet18(num_classes=10).state_dict()
    path = tmp_path / "alignment.json"
    autoalign.align({f"module.{key}": value for key, value in source.items()}, timm.create_model("resnet18")).save(path)
    return path


def test_what_is_read_is_what_was_saved(saved: Path, tmp_path: Path) -> None:
    alignment = Alignment.read(saved)
    assert alignment.to_dict() == json.loads(saved.read_text())
    alignment.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == saved.read_text()
    assert [mismatch.key for mismatch in alignment.mismatched_keys] == ["fc.weight", "fc.bias"]


def test_everything_that_an_alignment_says_is_kept(tmp_path: Path) -> None:
    weight = torch.rand(4, 2)
    source = {"q.weight": weight, "k.weight": torch.rand(4, 2), "tied": weight, "other": torch.rand(3)}
    target = {"qk.weight": torch.zeros(8, 2), "x": torch.zeros(5), "y": torch.zeros(2)}
    match = Match("qk.weight", ("q.weight", "k.weight"), Concatenate(0), 0.75, {"name": 0.5}, (), ("beware",))
    made = autoalign.align(source, target, exclude="other")
    alignment = Alignment(
        (match,), (), (), made.source_specs, made.target_specs, made.excluded, ("note",), made.tensors
    )
    alignment.save(tmp_path / "a.json")
    read = Alignment.read(tmp_path / "a.json")
    assert read.matches == (match,)
    assert read.excluded == {"other"}
    assert read.notes == ("note",)
    assert read.missing_keys == alignment.missing_keys
    assert read.unexpected_keys == alignment.unexpected_keys  # which knows that q.weight is tied
    assert str(read) == str(alignment)


@pytest.mark.parametrize("difference", [2e-7, float("inf")])
def test_what_was_verified_is_kept(difference: float, tmp_path: Path) -> None:
    plain = autoalign.align({"x.weight": torch.ones(2, 2), "x.bias": torch.ones(2)}, nn.Linear(2, 2))
    verified = Verified(difference < 1, difference, 0.5, ("bias",))
    replace(plain, verified=verified).save(tmp_path / "a.json")
    read = Alignment.read(tmp_path / "a.json")
    assert read.verified == verified
    assert read.to_dict() == json.loads((tmp_path / "a.json").read_text())
    applied = read.applied_to({"x.weight": torch.ones(2, 2), "x.bias": torch.ones(2)}, nn.Linear(2, 2))
    assert applied.verified == verified  # it holds for any values
    plain.save(tmp_path / "b.json")
    assert "verified" not in json.loads((tmp_path / "b.json").read_text())
    assert Alignment.read(tmp_path / "b.json").verified is None


def test_what_follows_from_an_alignment_is_written_too_and_not_read() -> None:
    source = {"qkv.weight": torch.ones(6, 2), "fc.weight": torch.ones(5, 2), "old": torch.ones(7)}
    target = {
        **{f"{name}.weight": torch.empty(2, 2) for name in "qkv"},
        "fc.weight": torch.empty(4, 2),
        "new": torch.empty(9),
    }
    alignment = autoalign.align(source, target, rules=[("fc.weight", "fc.weight")], exclude="new", adapt="head")
    found = json.loads(json.dumps(alignment.to_dict()))
    assert [match["target"] for match in found["matches"]] == [match.target for match in alignment.matches]
    assert [len(found[side]["tensors"]) for side in ("source", "target")] == [3, 5]
    assert (found["missing_keys"], found["unexpected_keys"]) == (alignment.missing_keys, alignment.unexpected_keys)
    assert found["coverage"] == alignment.coverage
    assert found["excluded"] == ["new"]
    by_target = {match["target"]: match for match in found["matches"] + found["ambiguous"]}
    assert by_target["q.weight"]["sources"] == ["qkv.weight"]
    assert by_target["q.weight"]["operation"] == {"kind": "Split", "dim": 0, "start": 0, "length": 2}
    assert by_target["fc.weight"]["warnings"]
    for name in ("coverage", "missing_keys", "unexpected_keys"):
        found[name] = None
    assert alignment_from_plain(found) == alignment


OLD = """{
 "format": "autoalign.alignment",
 "version": 1,
 "source": {"tensors": [["qkv.weight", [6, 2], "float32"], ["old", [3], "float16"], ["tied", [3], "float16"]],
            "tied": [["old", "tied"]]},
 "target": {"tensors": [["q.weight", [2, 2], "float32"], ["fc", [4], "float32"]], "tied": []},
 "matches": [{"target": "q.weight", "sources": ["qkv.weight"], "confidence": 0.5,
              "operation": {"kind": "Split", "dim": 0, "start": 0, "length": 2}, "evidence": {"name": 0.25},
              "alternatives": [{"sources": ["qkv.weight"], "operation": {"kind": "Split", "dim": 0, "start": 2,
                                                                         "length": 2}, "score": 1.5}],
              "warnings": ["beware"]}],
 "ambiguous": [],
 "mismatched": [["fc", "old"]],
 "excluded": ["tied"],
 "notes": ["a note"]
}"""


def test_a_file_of_the_first_release_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(OLD)
    other = Candidate(("qkv.weight",), Split(0, 2, 2), 1.5)
    match = Match("q.weight", ("qkv.weight",), Split(0, 0, 2), 0.5, {"name": 0.25}, (other,), ("beware",))
    float16 = torch.float16
    assert Alignment.read(tmp_path / "a.json") == Alignment(
        (match,),
        (),
        (Mismatch("fc", "old", (4,), (3,)),),
        (spec("qkv.weight", 6, 2), TensorSpec("old", (3,), float16, 1), TensorSpec("tied", (3,), float16, 1)),
        (spec("q.weight", 2, 2), spec("fc", 4)),
        frozenset({"tied"}),
        ("a note",),
    )


def _change(path: tuple[object, ...], value: object) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for part in path[:-1]:
            data = data[part]
        data[path[-1]] = value

    return change


ZEROS = {
    "kind": "Chain",
    "steps": [{"kind": "InsertZeros", "index": 0, "shape": [9]}, {"kind": "Concatenate", "dim": 0}],
}
OTHER = {"sources": ["x.weight"], "operation": {"kind": "Copy"}, "score": 1}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), True),
        (("notes",), "abc"),
        (("notes",), [5]),
        (("excluded",), 5),
        (("excluded",), [[]]),
        (("mismatched",), [["weight", "nope"]]),
        (("mismatched",), [["weight"]]),
        (("source",), []),
        (("source", "tensors", 0, 1), ["2", "2"]),
        (("source", "tensors", 0, 1), [-1, 2]),
        (("source", "tensors", 0, 1), [2**40, 2**40]),
        (("source", "tensors", 0, 2), "Tensor"),
        (("source", "tensors", 0, 2), 3),
        (("source", "tensors", 1), ["x.weight", [2, 2], "float32"]),
        (("source", "tied"), [["nope"]]),
        (("source", "tied"), [3]),
        (("matches",), {}),
        (("matches", 0), []),
        (("matches", 0, "target"), 5),
        (("matches", 0, "target"), [1]),
        (("matches", 0, "target"), "bias"),
        (("matches", 0, "sources"), []),
        (("matches", 0, "sources"), "x.weight"),
        (("matches", 0, "sources"), ["x.bias"]),
        (("matches", 0, "sources"), ["x.weight", "x.weight"]),
        (("matches", 0, "sources"), ["nope"]),
        (("matches", 0, "confidence"), float("nan")),
        (("matches", 0, "confidence"), "1"),
        (("matches", 0, "confidence"), True),
        (("matches", 0, "confidence"), 1.5),
        (("matches", 0, "evidence"), [1]),
        (("matches", 0, "evidence"), {"name": "x"}),
        (("matches", 0, "warnings"), [1]),
        (("matches", 0, "warnings"), "abc"),
        (("matches", 0, "alternatives"), [{"sources": ["x.weight"]}]),
        (("matches", 0, "alternatives"), [OTHER | {"sources": ["nope"]}]),
        (("matches", 0, "alternatives"), [OTHER | {"score": float("inf")}]),
        (("matches", 0, "operation"), 3),
        (("matches", 0, "operation"), {"kind": "Operation"}),
        (("matches", 0, "operation"), {"kind": "Reshape", "shape": ["evil()"]}),
        (("matches", 0, "operation"), {"kind": "Reshape", "shape": [10**18]}),
        (("matches", 0, "operation"), {"kind": "Reshape", "shape": [4]}),
        (("matches", 0, "operation"), {"kind": "Flip", "dim": 9}),
        (("matches", 0, "operation"), {"kind": "Permute", "dims": [0, 0]}),
        (("matches", 0, "operation"), ZEROS),
        (("verified",), [1]),
        (("verified",), {"equal": 1, "max_difference": 0, "coverage": 1, "uncovered": []}),
        (("verified",), {"equal": True, "max_difference": -1, "coverage": 1, "uncovered": []}),
        (("verified",), {"equal": True, "max_difference": 0, "coverage": 2, "uncovered": []}),
        (("verified",), {"equal": True, "max_difference": 0, "coverage": 1, "uncovered": "bias"}),
        (("verified",), {"equal": True, "max_difference": 0, "coverage": 1}),
    ],
)
def test_every_field_is_checked_on_reading(path: tuple[object, ...], value: object, tmp_path: Path) -> None:
    made = autoalign.align({"x.weight": torch.ones(2, 2), "x.bias": torch.ones(2)}, nn.Linear(2, 2))
    made.save(tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text())
    _change(path, value)(data)
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"Nothing was read|cannot be read as a saved alignment"):
        Alignment.read(tmp_path / "a.json")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"version": ' + "1" * 5000 + "}", "3", "", "{}", "\ud800"])
def test_what_is_not_a_saved_alignment_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match=r"not a saved alignment|cannot be read as a saved alignment"):
        Alignment.read(tmp_path / "a.json")


def test_a_saved_alignment_is_applied_without_matching(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = {f"module.{key}": value for key, value in torchvision.models.resnet18(num_classes=10).state_dict().items()}
    first, second = timm.create_model("resnet18"), timm.create_model("resnet18")
    with pytest.warns(autoalign.PartialLoadWarning, match=r"fc\.weight, fc\.bias"):
        wanted = autoalign.load(first, source)
    monkeypatch.setattr("autoalign.loading.prepare.match_tensors", lambda *_, **__: pytest.fail("it was matched again"))
    with pytest.warns(autoalign.PartialLoadWarning, match=r"fc\.weight, fc\.bias"):
        got = autoalign.load(second, source, alignment=Alignment.read(saved))
    assert names(got) == names(wanted)
    body = [(a, b) for key, a in first.state_dict().items() for b in [second.state_dict()[key]] if "fc" not in key]
    assert all(torch.equal(a, b) for a, b in body)


def test_a_pair_that_differs_is_refused_with_the_difference(saved: Path) -> None:
    source = {f"module.{key}": value for key, value in torchvision.models.resnet18(num_classes=10).state_dict().items()}
    source["extra"] = source.pop("module.bn1.weight")
    model = timm.create_model("resnet18", num_classes=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(PairMismatchError, match="4 tensors differ") as caught:
        autoalign.load(model, source, alignment=Alignment.read(saved))
    assert isinstance(caught.value, RuntimeError)
    lines = str(caught.value).splitlines()
    assert lines[1:5] == [
        "  source lacks module.bn1.weight [64]",
        "  source has extra [64] too",
        "  target has fc.weight [3, 512] instead of [1000, 512]",
        "  target has fc.bias [3] instead of [1000]",
    ]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_an_alignment_and_options_of_matching_exclude_each_other(saved: Path) -> None:
    with pytest.raises(InputError, match="exclude, min_confidence would change it"):
        autoalign.load(
            timm.create_model("resnet18"), {}, alignment=Alignment.read(saved), exclude="fc", min_confidence=0.1
        )


def test_counters_that_the_checkpoint_lacks_do_not_keep_an_alignment_from_being_applied(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    old = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
    autoalign.load(model, old).save(tmp_path / "a.json")
    assert repr(autoalign.load(model, old, alignment=Alignment.read(tmp_path / "a.json"))) == (
        "<All keys matched successfully>"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as a saved alignment"),
        ("[]", "not a saved alignment"),
        ('{"version": 1}', "not a saved alignment"),
        ('{"format": "autoalign.alignment", "version": 9}', "saved in version 9; this autoalign reads 1"),
        ('{"format": "autoalign.alignment", "version": 1}', "damaged"),
    ],
)
def test_a_file_that_is_no_alignment_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=message):
        Alignment.read(tmp_path / "a.json")


def test_an_alignment_that_names_what_it_does_not_list_is_refused(saved: Path) -> None:
    data = json.loads(saved.read_text())
    data["matches"][0]["sources"] = ["nowhere"]
    saved.write_text(json.dumps(data))
    with pytest.raises(InputError, match="it lacks 'nowhere'"):
        Alignment.read(saved)


def test_a_file_that_is_not_there_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read as a saved alignment"):
        Alignment.read(tmp_path / "none.json")


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        replace_text(path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"


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
