"""Names of layers and of their tensors, joined in one."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import autoalign
from autoalign.matching.layers import parts_of, units_of
from autoalign.plan.operations import Shape
from autoalign.plan.specs import TensorSpec

_MXNET = {
    "weight": "arg:{}_gamma",
    "bias": "arg:{}_beta",
    "running_mean": "aux:{}_moving_mean",
    "running_var": "aux:{}_moving_var",
}
_CAFFE2 = {"weight": "{}_s", "bias": "{}_b", "running_mean": "{}_rm", "running_var": "{}_riv"}


def _network() -> dict[str, Tensor]:
    result = {"conv0.weight": torch.empty(16, 3, 3, 3), "fc.weight": torch.empty(10, 16), "fc.bias": torch.empty(10)}
    for stage in (1, 2):
        for block in (0, 1, 2):
            for name in ("a", "b"):
                result[f"layer{stage}.{block}.{name}.weight"] = torch.empty(16, 16, 3, 3)
                norm = f"layer{stage}.{block}.{name}_bn"
                result |= {f"{norm}.{kind}": torch.empty(16) for kind in _CAFFE2}
    return result


@pytest.mark.parametrize("is_sorted", [False, True], ids=["in order", "sorted"])
@pytest.mark.parametrize(
    ("norm", "other"), [(_MXNET, "arg:{}_weight"), (_CAFFE2, "{}_w")], ids=["as in MXNet", "as in Caffe2"]
)
def test_tensors_whose_names_are_joined_to_those_of_their_layers(
    norm: dict[str, str], other: str, is_sorted: bool
) -> None:
    target = _network()
    names = dict[str, str]()
    for key in target:
        module, _, kind = key.rpartition(".")
        form = (
            norm[kind] if module.endswith("_bn") else other if kind == "weight" else norm[kind].replace("beta", "bias")
        )
        names[form.format(module.replace("layer", "res").replace(".", "_"))] = key
    keys = sorted(names) if is_sorted else list(names)
    assert autoalign.align({key: target[names[key]] for key in keys}, target).mapping == names


def test_names_of_a_lone_layer_stay_whole() -> None:
    model = torch.nn.LSTM(4, 8, num_layers=3, bidirectional=True)
    assert autoalign.align(model, torch.nn.ModuleDict({"rnn": model})).mapping == {
        key: f"rnn.{key}" for key in model.state_dict()
    }


@pytest.mark.parametrize("is_sorted", [False, True], ids=["in order", "sorted"])
def test_names_without_dots_are_pulled_apart(is_sorted: bool) -> None:
    target = _network()
    names = {f"model_ema.{key.replace('.', '')}": key for key in target}
    source = {name: target[names[name]] for name in (sorted(names) if is_sorted else names)}
    assert autoalign.align(source | {"model_ema.decay": torch.empty(())}, target).mapping == names
    renamed = {key.replace("layer", "stages.").replace("_bn", ".norm"): tensor for key, tensor in target.items()}
    found = autoalign.align(source, renamed).mapping
    assert {key: name.replace("stages.", "layer").replace(".norm", "_bn") for key, name in found.items()} == names


@pytest.mark.parametrize("is_sorted", [False, True], ids=["in order", "sorted"])
def test_letters_after_numbers_count_the_members_of_lists(is_sorted: bool) -> None:
    names = {
        re.sub(r"^layer(\d)\.(\d)\.", lambda at: f"res{int(at[1]) + 1}{'abc'[int(at[2])]}.", key): key
        for key in _network()
    }
    keys = sorted(names) if is_sorted else list(names)
    assert autoalign.align({key: _network()[names[key]] for key in keys}, _network()).mapping == names


def test_tensors_of_one_layer_and_kind_keep_their_names_whichever_comes_first() -> None:
    names = ("x_r", "x_w", "x_k", "x_g")
    target = {f"layers.{n}.attn.{name}": torch.empty(1, 1, 16) for n in range(2) for name in names}
    target |= {f"layers.{n}.attn.{name}_proj.weight": torch.empty(16, 16) for n in range(2) for name in ("r", "k")}
    renamed = {key.replace("layers", "blocks").replace("attn", "att").replace("_proj", ""): key for key in target}
    source = {key: target[renamed[key]] for key in sorted(renamed)}
    assert autoalign.align(source, target).mapping == renamed


@pytest.mark.parametrize("other", ["scale", "gamma", "kernel"])
def test_a_layer_stays_whole_beside_another_name_of_one_kind(other: str) -> None:
    target = {"fc.weight": torch.empty(5, 16), "stem.weight": torch.empty(16, 3, 3, 3)}
    for n in range(3):
        target |= {f"blocks.{n}.conv.weight": torch.empty(16, 16, 3, 3), f"blocks.{n}.conv.bias": torch.empty(16)}
    source = {key.replace("blocks", "layers"): tensor for key, tensor in target.items()}
    source |= {f"layers.{n}.conv.{other}": torch.empty(16) for n in range(3)}
    mapping = autoalign.align(dict(sorted(source.items())), target).mapping
    assert mapping == {key.replace("blocks", "layers"): key for key in target}


@pytest.mark.parametrize("is_sorted", [False, True])
def test_a_bias_around_its_kernel_is_of_its_layer(is_sorted: bool) -> None:
    keys = ["block/gamma", "block/conv/depthwise_kernel", "block/conv/bias", "block/fc/kernel", "block/fc/bias"]
    shapes: list[Shape] = [(8,), (3, 3, 8, 1), (8,), (8, 5), (5,)]
    listed = sorted(zip(keys, shapes, strict=True)) if is_sorted else list(zip(keys, shapes, strict=True))
    parts = parts_of([TensorSpec(key, shape, torch.float32) for key, shape in listed])
    units = {unit.path[-1]: dict(unit.parts).keys() for unit in units_of(parts)}
    assert units == {"block": {"weight"}, "depthwise": {"weight", "bias"}, "fc": {"weight", "bias"}}


def test_a_bias_around_a_kernel_and_other_modules_is_on_its_own() -> None:
    shapes: dict[str, Shape] = {"head.bias": (6,), "head.proj.weight": (6, 5), "head.mlp.fc.weight": (6, 6)}
    parts = parts_of([TensorSpec(key, shape, torch.float32) for key, shape in shapes.items()])
    assert [[kind for kind, _ in unit.parts] for unit in units_of(parts)] == [["bias"], ["weight"], ["weight"]]
