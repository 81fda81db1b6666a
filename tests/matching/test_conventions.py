"""Layers that call their own tensors what no vocabulary knows are matched by what the tensors are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pytest
import timm
import torch
import torchvision
from torch import Tensor

import autoalign

SCHEMES: Mapping[str, Mapping[str, str]] = {
    "meaningless": {
        "weight": "zor",
        "bias": "klim",
        "running_mean": "u",
        "running_var": "vax",
        "num_batches_tracked": "n",
    },
    "statistics": {"running_mean": "mu", "running_var": "sigma2"},
    "a_2 and b_2": {"weight": "a_2", "bias": "b_2"},
    "gain": {"weight": "gain"},
}
NETWORKS: Mapping[str, Callable[[], torch.nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "vit_tiny": lambda: timm.create_model("vit_tiny_patch16_224", depth=3),
}


def renamed(state_dict: Mapping[str, Tensor], scheme: Mapping[str, str], *, norms_only: bool) -> dict[str, Tensor]:
    norms = {
        key.rpartition(".")[0] for key, tensor in state_dict.items() if key.endswith("weight") and tensor.dim() == 1
    }
    result = {}
    for key, tensor in state_dict.items():
        module, _, name = key.rpartition(".")
        changed = scheme.get(name, name) if module in norms or not norms_only else name
        result[re.sub(r"^blocks|^layer", "part", f"{module}.{changed}".lstrip("."))] = tensor
    return result


@pytest.mark.parametrize("norms_only", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("network", NETWORKS)
def test_names_of_tensors_that_say_nothing(network: str, scheme: str, norms_only: bool) -> None:
    with torch.device("meta"):
        target = NETWORKS[network]().state_dict()
    source = renamed(target, SCHEMES[scheme], norms_only=norms_only)
    alignment = autoalign.align(source, target)
    keys = dict(zip(target, source, strict=True))
    assert {match.target: match.sources for match in alignment.matches} == {key: (own,) for key, own in keys.items()}


def test_what_only_the_order_in_a_layer_tells_is_less_sure() -> None:
    with torch.device("meta"):
        target = torchvision.models.resnet18().state_dict()
    source = renamed(target, SCHEMES["statistics"], norms_only=True)
    confidence = {match.target: match.confidence for match in autoalign.align(source, target).matches}
    assert all(value < 0.9 for key, value in confidence.items() if key.endswith(("running_mean", "running_var")))
    assert all(value >= 0.9 for key, value in confidence.items() if not key.endswith(("running_mean", "running_var")))
    same = autoalign.align(source, {f"model.{key}": tensor for key, tensor in source.items()})
    assert all(match.confidence >= 0.9 for match in same.matches)


def test_sorted_keys_do_not_tell_the_statistics() -> None:
    with torch.device("meta"):
        target = torchvision.models.resnet18().state_dict()
    source = renamed(target, {"running_mean": "zed", "running_var": "abc"}, norms_only=True)
    alignment = autoalign.align({key: source[key] for key in sorted(source)}, target)
    assert not any(match.target.endswith(("running_mean", "running_var")) for match in alignment.matches)
