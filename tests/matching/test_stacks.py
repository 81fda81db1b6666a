"""Tensors that hold all layers, experts or scalars of a list, along one of their dimensions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autoalign import align
from autoalign.matching.stacks import Slice, restacked, unstacked
from autoalign.plan.matches import Match
from autoalign.plan.operations import Copy, Stack, Transpose, Unstack
from autoalign.plan.specs import TensorSpec, specs_of
from tests.matching.round_trips import Tensors, aligned_both_ways, is_equal, linear, meta

_WIDTH, _HIDDEN, _HEADS, _LAYERS = 12, 20, 3, 5


def _encoder(prefix: str = "", layers: int = _LAYERS) -> Tensors:
    tensors = linear(f"{prefix}embed", _WIDTH, 7)
    for layer in range(layers):
        block = f"{prefix}layers.{layer}"
        for norm in ("norm1", "norm2"):
            tensors |= {f"{block}.{norm}.weight": torch.rand(_WIDTH), f"{block}.{norm}.bias": torch.rand(_WIDTH)}
        for name in ("query", "key", "value", "out"):
            tensors |= linear(f"{block}.attn.{name}", _WIDTH, _WIDTH)
        tensors |= linear(f"{block}.mlp.fc1", _HIDDEN, _WIDTH) | linear(f"{block}.mlp.fc2", _WIDTH, _HIDDEN)
    return tensors | linear(f"{prefix}head", 4, _WIDTH)


def _stacked(tensors: Tensors, pattern: str, into: str, dim: int = 0) -> Tensors:
    """Stack what a pattern with a number finds, in the place of the first."""
    slices: dict[str, list[Tensor]] = {}
    for key, tensor in tensors.items():
        slices.setdefault(re.sub(pattern, into, key), []).append(tensor)
    return {key: torch.stack(of, dim) if len(of) > 1 else of[0] for key, of in slices.items()}


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_layers_may_be_stacked_along_any_dimension(dim: int, tmp_path: Path) -> None:
    listed = _encoder()
    stacked = _stacked(listed, r"layers\.\d+", "layers", dim)
    into_stack, *_, into_list = aligned_both_ways(listed, stacked, tmp_path / "a.json")
    of_stack, of_list = (
        [match for match in alignment.matches if "layers" in match.target] for alignment in (into_stack, into_list)
    )
    assert all(isinstance(match.operation, Stack) and len(match.sources) == _LAYERS for match in of_stack)
    assert all(isinstance(match.operation, Unstack) for match in of_list)


def test_layers_beside_stacks_are_turned_as_these_are(tmp_path: Path) -> None:
    listed = _encoder() | linear("project", _WIDTH, _WIDTH) | linear("again", _WIDTH, _WIDTH)
    for layer in range(_LAYERS):
        listed |= linear(f"layers.{layer}.attn.gate", _WIDTH, _WIDTH)
    turned = {key: tensor.T.contiguous() if tensor.ndim == 2 else tensor for key, tensor in listed.items()}
    stacked = _stacked(turned, r"layers\.\d+", "layers")
    for name, shape in (("weight", (_WIDTH, 2, _WIDTH // 2)), ("bias", (2, _WIDTH // 2))):
        stacked[f"layers.attn.gate.{name}"] = stacked[f"layers.attn.gate.{name}"].reshape(_LAYERS, *shape)
    aligned_both_ways(listed, stacked, tmp_path / "a.json")


def test_layers_beside_stacks_that_have_inputs_first_have_them_first_too() -> None:
    head = linear("head", 4, _WIDTH) | {"norm.weight": torch.rand(_WIDTH)}
    listed = {key: tensor for n in range(_LAYERS) for key, tensor in linear(f"layers.{n}.fc", _HIDDEN, _WIDTH).items()}
    stacked = {"layers.fc.weight": torch.rand(_LAYERS, _WIDTH, _HIDDEN), "layers.fc.bias": torch.rand(_LAYERS, _HIDDEN)}
    turned = head | {"head.weight": head["head.weight"].T}
    specs, slices = unstacked(specs_of(stacked | turned), specs_of(listed | head))
    assert {spec.key: spec.shape for spec in specs}["head.weight"] == (4, _WIDTH)
    assert slices["head.weight"].view == Transpose()


def test_kernels_beside_stacks_are_turned_once(tmp_path: Path) -> None:
    listed = linear("project", _WIDTH, _WIDTH) | linear("head", 4, _WIDTH)
    for layer in range(_LAYERS):
        listed |= linear(f"layers.{layer}.fc", _HIDDEN, _WIDTH)
    turned = {key: tensor.T.contiguous() if tensor.ndim == 2 else tensor for key, tensor in listed.items()}
    stacked = {}
    for key, tensor in _stacked(turned, r"layers\.\d+", "layers").items():
        stacked[key.replace("weight", "kernel")] = tensor
    aligned_both_ways(listed, stacked, tmp_path / "a.json")


def test_the_stacks_of_two_towers_stay_apart(tmp_path: Path) -> None:
    listed = _encoder("vision.", 4) | _encoder("text.", 4)
    aligned_both_ways(listed, _stacked(listed, r"layers\.\d+", "layers"), tmp_path / "a.json")


def test_a_model_may_hold_nothing_but_stacks_of_two_towers(tmp_path: Path) -> None:
    listed = {key: of for key, of in (_encoder("vision.") | _encoder("text.")).items() if "layers" in key}
    aligned_both_ways(listed, _stacked(listed, r"layers\.\d+\.", ""), tmp_path / "a.json")


def test_bare_parameters_may_stack_layers(tmp_path: Path) -> None:
    listed = _encoder()
    names = {"attn.": "", ".weight": "", "norm1.bias": "norm1_bias", "norm2.bias": "norm2_bias"}
    stacked = {}
    for key, tensor in _stacked(listed, r"layers\.\d+\.", "layers.").items():
        name = key.removeprefix("layers.")
        if name != key:
            for old, new in names.items():
                name = name.replace(old, new)
            name = re.sub(r"(\w+)\.bias$", r"\1_bias", name).replace("mlp.", "")
        stacked[name] = tensor
    aligned_both_ways(listed, stacked, tmp_path / "a.json")


def _flax_scan(listed: Tensors, dim: int) -> Tensors:
    """Lay an encoder out as code of JAX that scans its layers: kernels are (in, out), and heads are kept apart."""
    scanned = {}
    for key, tensor in _stacked(listed, r"layers\.\d+", "layers").items():
        *module, leaf = key.split(".")
        stack = module[0] == "layers"
        if "norm" in module[-1]:
            leaf = leaf.replace("weight", "scale")
        elif leaf == "weight":
            tensor, leaf = tensor.transpose(-1, -2), "kernel"
        if module[-1] in ("query", "key", "value"):
            tensor = tensor.reshape(*tensor.shape[:-1], _HEADS, -1)
        elif module[-1] == "out" and leaf == "kernel":
            tensor = tensor.reshape(_LAYERS, _HEADS, -1, _WIDTH)
        scanned[".".join(("params", *module, leaf))] = tensor.movedim(0, dim) if stack else tensor
    return scanned


@pytest.mark.parametrize("dim", [0, 1])
def test_scanned_layers_of_jax_are_those_of_torch(dim: int, tmp_path: Path) -> None:
    listed = _encoder()
    aligned_both_ways(listed, _flax_scan(listed, dim), tmp_path / "a.json")


def test_scanned_layers_may_hold_apart_what_the_other_side_fuses(tmp_path: Path) -> None:
    listed = _encoder()
    fused = {}
    for key, tensor in listed.items():
        if ".query." in key:
            parts = [listed[key.replace("query", name)] for name in ("query", "key", "value")]
            fused[key.replace("query", "qkv")] = torch.cat(parts)
        elif ".key." not in key and ".value." not in key:
            fused[key] = tensor
    aligned_both_ways(fused, _flax_scan(listed, 0), tmp_path / "a.json")


def test_experts_may_be_stacked_in_stacked_layers(tmp_path: Path) -> None:
    listed = linear("embed", _WIDTH, 7)
    for layer in range(3):
        listed[f"layers.{layer}.gate.weight"] = torch.rand(4, _WIDTH)
        for expert in range(4):
            for name, shape in (("w1", (_HIDDEN, _WIDTH)), ("w3", (_HIDDEN, _WIDTH)), ("w2", (_WIDTH, _HIDDEN))):
                listed[f"layers.{layer}.experts.{expert}.{name}.weight"] = torch.rand(shape)
    stacked = _stacked(_stacked(listed, r"experts\.\d+", "experts"), r"layers\.\d+", "layers")
    assert stacked["layers.experts.w1.weight"].shape == (3, 4, _HIDDEN, _WIDTH)
    aligned_both_ways(listed, stacked, tmp_path / "a.json")


def test_a_vector_may_hold_a_scalar_for_each_member_of_a_list(tmp_path: Path) -> None:
    listed = _encoder()
    joined = dict(listed)
    scales, mix = torch.rand(_LAYERS), torch.rand(3)
    listed |= {f"layers.{layer}.resid_lambda": scales[layer].clone() for layer in range(_LAYERS)}
    listed |= {f"mix.scalars.{place}": mix[place : place + 1].clone() for place in range(3)}
    aligned_both_ways(listed, joined | {"resid_lambdas": scales, "mix.weights": mix}, tmp_path / "a.json")


def test_where_two_dimensions_would_do_the_other_is_among_the_alternatives() -> None:
    listed = {
        f"layers.{layer}.{name}.weight": torch.rand(4, 4) for layer in range(4) for name in ("key", "value", "out")
    }
    listed |= linear("head", 3, 4)
    stacked = _stacked(listed, r"layers\.\d+", "layers", 1)
    for source, target in ((listed, stacked), (stacked, listed)):
        alignment = align(source, meta(target))
        assert {match.target for match in alignment.matches} == {"head.weight", "head.bias"}
        for match in alignment.ambiguous:
            ways = [way.operation.apply([source[key] for key in way.sources])[0] for way in match.alternatives]
            assert any(torch.equal(way, target[match.target]) for way in ways)
            assert "another dimension" in " ".join(match.warnings)


def test_a_tensor_that_a_rule_names_is_not_taken_apart() -> None:
    listed = _encoder()
    stacked = _stacked(listed, r"layers\.\d+", "layers")
    stacked["other"] = torch.rand(_LAYERS, _WIDTH)
    source = listed | {"another": torch.rand(_LAYERS, _WIDTH)}
    alignment = align(source, meta(stacked), rules=[("another", "other")])
    assert is_equal(alignment.state_dict(), stacked | {"other": source["another"]})


def test_stacks_of_another_width_are_mismatched_as_a_whole() -> None:
    listed, wider = (
        _encoder(),
        {key: torch.rand(tuple(2 * size for size in of.shape)) for key, of in _encoder().items()},
    )
    stacked = _stacked(wider, r"layers\.\d+", "layers")
    alignment = align(listed, meta(stacked))
    assert not alignment.matches
    assert {item.key for item in alignment.mismatched} <= stacked.keys()


def test_a_tensor_with_a_slice_that_nothing_fills_gets_no_match() -> None:
    slices = {f"w.{n}": Slice("w", Unstack(0, n)) for n in range(2)}
    target = [TensorSpec("w", (2, 3), torch.float32)]
    assert restacked([Match("w.1", ("a.1",), Copy())], {}, slices, target) == []
    several = [Match(f"w.{n}", tuple(f"{part}.{n}" for part in "ab"[: n + 1]), Copy()) for n in range(2)]
    assert restacked(several, {}, slices, target) == []
