"""Refinement pairs tensors by what is computed with them, and not those that either network has more of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import autoalign
from autoalign.verification.refinement import paired_tensors, pairs_of, skeleton_of
from tests.reference_models.encoders import GatedEncoder, SeparateEncoder, TorchEncoder
from tests.verification.test_decisions import Chained


def test_layers_of_networks_of_unlike_depths_are_not_paired_from_both_ends() -> None:
    graphs = [autoalign.dataflow(Chained(*names)) for names in ("abcd", "vwxyz")]
    source, target = (skeleton_of(graph, unary=True) for graph in graphs)
    assert paired_tensors(source, target, {}) == {f"head.{kind}": f"head.{kind}" for kind in ("weight", "bias")}
    anchors = {f"{b}.{kind}": f"{a}.{kind}" for a, b in zip("abcd", "vwxy", strict=True) for kind in ("weight", "bias")}
    assert paired_tensors(source, target, anchors).keys().isdisjoint({"z.weight", "z.bias"})


def test_parts_of_a_fused_tensor_are_paired_with_what_is_apart_or_in_another_order() -> None:
    source, target = autoalign.dataflow(TorchEncoder()), autoalign.dataflow(SeparateEncoder())
    found = pairs_of(source, target, {})
    fused = {"q": 0.0, "k": 0.333333, "v": 0.666667}
    for layer in range(3):
        for name, begin in fused.items():
            own = found[f"layers.{layer}.self_attn.{name}_proj.weight"]
            assert own == f"encoder.layers.{layer}.self_attn.in_proj_weight@{begin}"
    back = pairs_of(target, source, {})
    assert back["encoder.layers.1.self_attn.in_proj_bias@0.333333"] == "layers.1.self_attn.k_proj.bias"
    gates = pairs_of(autoalign.dataflow(GatedEncoder("net")), autoalign.dataflow(GatedEncoder("w12")), {})
    assert gates["blocks.0.mlp.w12.weight@0.0"] == "blocks.0.ff.net.0.proj.weight@0.5"


def test_a_product_of_which_all_is_used_too_is_not_split() -> None:
    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y.sin() + torch.cat([y[..., 2:], y[..., :2]], -1)

    graph = autoalign.dataflow(Rotated())
    assert skeleton_of(graph, unary=True, is_split=True) == skeleton_of(graph, unary=True)
