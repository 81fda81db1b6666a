"""Refinement pairs tensors by what is computed with them, and not those that either network has more of."""

from __future__ import annotations

import autoalign
from autoalign.verification.refinement import paired_tensors, skeleton_of
from tests.verification.test_decisions import Chained


def test_layers_of_networks_of_unlike_depths_are_not_paired_from_both_ends() -> None:
    graphs = [autoalign.dataflow(Chained(*names)) for names in ("abcd", "vwxyz")]
    source, target = (skeleton_of(graph, unary=True) for graph in graphs)
    assert paired_tensors(source, target, {}) == {f"head.{kind}": f"head.{kind}" for kind in ("weight", "bias")}
    anchors = {f"{b}.{kind}": f"{a}.{kind}" for a, b in zip("abcd", "vwxy", strict=True) for kind in ("weight", "bias")}
    assert paired_tensors(source, target, anchors).keys().isdisjoint({"z.weight", "z.bias"})
