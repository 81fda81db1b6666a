"""Networks that have nothing to do with each other: nothing is loaded, whatever shapes they happen to share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor

import autoalign
from autoalign.errors import NothingLoadedError


def _gpt2(width: int = 768, depth: int = 12) -> torch.nn.Module:
    config = transformers.GPT2Config(n_embd=width, n_layer=depth, n_head=4)
    model: torch.nn.Module = transformers.GPT2LMHeadModel(config)
    return model


BUILDERS: dict[str, Callable[[], torch.nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "resnet50": torchvision.models.resnet50,
    "vgg11_bn": torchvision.models.vgg11_bn,
    "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "densenet121": torchvision.models.densenet121,
    "vit_base_patch16_224": lambda: timm.create_model("vit_base_patch16_224"),
    "convnext_tiny": lambda: timm.create_model("convnext_tiny"),
    "mixer_s32_224": lambda: timm.create_model("mixer_s32_224"),
    "gpt2": _gpt2,
    "gpt2 of width 64": lambda: _gpt2(width=64, depth=2),
    "bert": lambda: transformers.BertModel(transformers.BertConfig()),
    "t5": lambda: transformers.T5Model(transformers.T5Config()),
    "whisper": lambda: transformers.WhisperModel(transformers.WhisperConfig()),
}

UNRELATED = [
    ("resnet50", "vit_base_patch16_224"),
    ("vgg11_bn", "resnet18"),
    ("gpt2", "resnet18"),
    ("gpt2 of width 64", "resnet18"),
    ("vit_base_patch16_224", "resnet50"),
    ("resnet18", "densenet121"),
    ("densenet121", "mobilenet_v3_small"),
    ("convnext_tiny", "resnet50"),
    ("mixer_s32_224", "t5"),
    ("bert", "convnext_tiny"),
    ("t5", "vgg11_bn"),
    ("mobilenet_v3_small", "whisper"),
]
IDS = [f"{source} -> {target}" for source, target in UNRELATED]


@cache
def state_dict(name: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(BUILDERS[name]().state_dict())


@pytest.mark.parametrize(("source", "target"), UNRELATED, ids=IDS)
def test_nothing_is_aligned_between_unrelated_networks(source: str, target: str) -> None:
    alignment = autoalign.align(state_dict(source), state_dict(target))
    assert alignment.matches == ()
    assert alignment.unexpected_keys == list(state_dict(source))


@pytest.mark.parametrize(("source", "target"), UNRELATED, ids=IDS)
def test_a_load_between_unrelated_networks_raises_and_says_why(source: str, target: str) -> None:
    with torch.device("meta"):
        model = BUILDERS[target]()
    with pytest.raises(NothingLoadedError, match=r"(?s)No tensor of .* could be aligned.*Nothing was loaded"):
        autoalign.load(model, state_dict(source), assign=True)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
