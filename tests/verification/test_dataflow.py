"""The graph of one call: what feeds what, on models that Python itself makes hard to follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

import autoalign
from autoalign.errors import InputError, TraceError

X = torch.ones(2, 3)


class Calls(nn.Module):
    """A linear layer whose result goes through a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer(x))


def operations(graph: nx.DiGraph[Any]) -> list[str]:
    return [data["operation"] for _, data in graph.nodes.items() if data["kind"] == "operation"]


def test_edges_say_as_which_argument_and_which_result() -> None:
    graph = autoalign.dataflow(Calls(lambda x: torch.cat(x.chunk(3, 1)[::-1])), X)
    assert operations(graph) == ["t", "addmm", "split", "cat"]
    assert graph.edges["layer.weight", 0] == {"arguments": ("self",), "results": (0,)}
    assert graph.edges["layer.bias", 1] == {"arguments": ("self",), "results": (0,)}
    assert graph.edges["input:0", 1] == {"arguments": ("mat1",), "results": (0,)}
    assert graph.edges[2, 3] == {"arguments": ("tensors.0", "tensors.1", "tensors.2"), "results": (2, 1, 0)}
    assert graph.edges[3, "output:"] == {"arguments": ("result",), "results": (0,)}
    assert graph.nodes[1] == {
        "kind": "operation",
        "operation": "addmm",
        "settings": {},
        "module": "layer",
        "shape": (2, 3),
        "dtype": torch.float32,
    }
    assert graph.nodes[2]["settings"] == {"split_size": 1, "dim": 1}
    assert graph.nodes["layer.bias"] == {"kind": "parameter", "shape": (3,), "dtype": torch.float32}


def test_a_change_in_place_is_seen_through_views_of_the_same_memory() -> None:
    def written(x: Tensor) -> Tensor:
        x[:, 0] += 1
        return x * 2

    graph = autoalign.dataflow(Calls(written), X)
    (added,) = [node for node, data in graph.nodes.items() if data.get("operation") == "add_"]
    (result,) = graph.predecessors("output:")
    assert nx.has_path(graph, added, result)
    assert graph.nodes[result]["operation"] == "mul"


def test_members_of_a_list_are_marked_if_they_are_alike() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, 3), nn.ReLU()) for width in (3, 3, 3)), nn.Linear(3, 1))
    nodes = autoalign.dataflow(model, X).nodes
    assert [nodes[f"{place}.0.weight"].get("member") for place in range(3)] == [0, 1, 2]
    assert nodes["1.0.weight"]["repeated"] == ""
    assert "repeated" not in nodes["3.weight"]
    relus = [data for data in nodes.values() if data.get("operation") == "relu"]
    assert [(data["module"], data["member"]) for data in relus] == [("0.1", 0), ("1.1", 1), ("2.1", 2)]


def test_tied_tensors_are_one_node_and_buffers_outside_of_the_state_dict_are_constants() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.last.weight = self.first.weight
            self.scale: Tensor
            self.register_buffer("scale", torch.ones(3), persistent=False)
            self.shift = torch.ones(3)

        def forward(self, x: Tensor) -> Tensor:
            last: Tensor = self.last(self.first(x))
            return last * self.scale + self.shift

    graph = autoalign.dataflow(Tied(), X)
    assert "last.weight" not in graph
    assert graph.out_degree("first.weight") == 2
    assert sorted(name for name, data in graph.nodes(data="kind") if data == "constant") == ["constant:0", "scale"]


def test_the_module_is_left_as_it_was_after_each_trial() -> None:
    class Narrowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.width = nn.Linear(3, 3), 3

        def forward(self, x: Tensor) -> Tensor:
            self.width -= 1  # as a window that is cut to a small image
            self.kept = kept = self.layer(x)
            if x.dim() == 3 or self.width != 2:
                raise ValueError("not this")
            return torch.relu(kept)

    model = Narrowing().train()
    weight, before = model.layer.weight, dict(vars(model))
    state = torch.get_rng_state()
    assert autoalign.dataflow(model).graph["inputs"] == "vectors [1, 3] by the first Linear"
    assert dict(vars(model)) == before
    assert model.training
    assert model.layer.weight is weight
    assert torch.equal(torch.get_rng_state(), state)


def test_it_works_on_the_meta_device_and_with_tensors_made_there() -> None:
    with torch.device("meta"):
        offset = torch.ones(3)
        model = Calls(lambda x: x + offset + torch.ones(3, device=offset.device))
    graph = autoalign.dataflow(model)
    assert operations(graph)[-3:] == ["add", "ones", "add"]
    assert graph.graph["inputs"] == "vectors [1, 8, 3] by the first Linear"
    assert model.layer.weight.is_meta


def test_values_without_parameters_behind_them_are_computed() -> None:
    def repeated(x: Tensor) -> Tensor:
        for _ in range(int(torch.linspace(0, 4, 5)[-1])):
            x = x + 1
        return x

    graph = autoalign.dataflow(Calls(repeated), X)
    assert operations(graph).count("add") == 4
    assert graph.graph["assumed"] == []


def test_values_that_are_not_there_are_assumed_and_named() -> None:
    def routed(x: Tensor) -> Tensor:
        if x.isnan().any():
            x = torch.sin(x)
        values: Tensor = torch.unique(x[x > 0])
        return values * x.argmax().item()

    graph = autoalign.dataflow(Calls(routed), X)
    assert graph.graph["assumed"] == ["_local_scalar_dense", "_unique2", "index"]
    assert "sin" in operations(graph)


def test_computing_values_changes_neither_inputs_nor_buffers() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.count: Tensor
            self.register_buffer("count", torch.zeros(1, dtype=torch.long), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return x.add_(self.count)

    model, x = Counting(), torch.zeros(2)
    autoalign.dataflow(model, x)
    assert model.count.item() == 0
    assert x.tolist() == [0, 0]


def test_a_call_without_end_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoalign.verification.dataflow._MAX_OPERATIONS", 1_000)

    def endless(x: Tensor) -> Tensor:
        while x.sum() > 0:
            x = x + 1
        return x

    with pytest.raises(TraceError, match=r"OverflowError: more than 1,000 operations \(inputs: as given\)"):
        autoalign.dataflow(Calls(endless), X)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning", "ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize("make", [lambda: torch.jit.script(nn.Linear(3, 2)), lambda: nn.LazyLinear(2)])
def test_what_cannot_be_traced_is_an_error_of_ours(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(TraceError, match=r"could not be called on tensors without data: (RuntimeError|ValueError)"):
        autoalign.dataflow(make())


def test_only_modules_are_called() -> None:
    with pytest.raises(InputError, match=r"Expected an nn.Module to call, not dict"):
        autoalign.dataflow({})  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.create_unbacked_symint:FutureWarning")  # within torch
@pytest.mark.parametrize("name", ["resnet18", "swin_t", "fasterrcnn_mobilenet_v3_large_fpn", "raft_small", "r3d_18"])
def test_networks_are_traced_with_all_of_their_parameters(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    downloads = {"weights_backbone": None} if "rcnn" in name else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **downloads)
    graph = autoalign.dataflow(model)
    assert [key for key, _ in model.named_parameters() if not graph.out_degree(key)] == []


def test_what_a_module_keeps_of_a_call_is_gone() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.tables: dict[str, Tensor] = {}
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.tables.setdefault("bias", self.layer.bias * 2)
            self.seen.append(x)
            return self.layer(x) + self.tables["bias"]  # type: ignore[no-any-return]

    module = Keeping()
    tables = module.tables
    autoalign.dataflow(module, X)
    assert module.tables is tables
    assert (tables, module.seen) == ({}, [])
