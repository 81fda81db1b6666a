"""Nothing is loaded that only shapes speak for: between unrelated networks, or of what a related one leaves over."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor

import autoalign
from autoalign.errors import NothingLoadedError
from benchmarks.accuracy import unlike

State = dict[str, Tensor]


def _layer(name: str, *shape: int) -> State:
    return {f"{name}.weight": torch.empty(shape, device="meta"), f"{name}.bias": torch.empty(shape[:1], device="meta")}


def _network(prefix: str) -> State:
    """Make a network of convolutions and norms, of growing width."""
    result: State = {}
    for stage, (inputs, width) in enumerate(pairwise((3, 16, 32, 64, 128))):
        for block in range(2):
            result |= _layer(f"{prefix}layer{stage}.{block}.conv", width, width if block else inputs, 3, 3)
            result |= _layer(f"{prefix}layer{stage}.{block}.bn", width)
    return result


def _decoder() -> State:
    """Make what a checkpoint of self-supervised learning has beside its backbone."""
    reconstruction = _layer("decoder.conv.0", 64, 128, 3, 3) | _layer("decoder.conv.3", 16, 64, 3, 3)
    return reconstruction | _layer("proj.0", 128, 128) | _layer("proj.2", 32, 128)


def _upsampling() -> State:
    result: State = {}
    for place, (width, inputs) in enumerate(((64, 128), (16, 64))):
        result |= _layer(f"up.{place}.conv", width, inputs, 3, 3) | _layer(f"up.{place}.bn", width)
    return result


def _projector() -> State:
    return _layer("projector.0", 128, 128) | _layer("projector.1", 128) | _layer("projector.3", 24, 128)


def _blocks(prefix: str, count: int) -> State:
    result: State = {}
    for block in range(count):
        result |= _layer(f"{prefix}.{block}.norm", 48) | _layer(f"{prefix}.{block}.attn.qkv", 144, 48)
        result |= _layer(f"{prefix}.{block}.mlp.fc1", 96, 48) | _layer(f"{prefix}.{block}.mlp.fc2", 48, 96)
    return result


UNLIKE = {
    "a decoder without norms, one with": (_decoder(), _upsampling()),
    "a decoder, a pyramid": (_decoder(), _layer("aspp.0", 64, 128, 1, 1) | _layer("aspp.1", 64, 128, 3, 3)),
    "a projector, a classifier": (_projector(), _layer("classifier.0", 128, 128) | _layer("classifier.3", 10, 128)),
    "a masked autoencoder's decoder, a neck": (
        _layer("decoder_embed", 48, 128) | _blocks("decoder_blocks", 4) | _layer("decoder_pred", 64, 48),
        _layer("neck.embed", 48, 128) | _blocks("neck.layers", 2),
    ),
    "a head with a last layer of its own, a retrieval head": (
        _layer("head.mlp.0", 96, 128) | _layer("head.mlp.2", 96, 96) | _layer("head.mlp.4", 24, 96),
        _layer("retrieval.fc1", 96, 128) | _layer("retrieval.norm", 96) | _layer("retrieval.fc2", 24, 96),
    ),
}


@pytest.mark.parametrize("is_sorted", [False, True], ids=["in order", "sorted"])
@pytest.mark.parametrize(("left_over", "vacant"), UNLIKE.values(), ids=UNLIKE)
def test_what_is_left_over_is_not_loaded_into_an_unlike_module(
    left_over: State, vacant: State, is_sorted: bool
) -> None:
    source, target = _network("backbone.") | left_over, _network("encoder.") | vacant
    alignment = autoalign.align(dict(sorted(source.items())) if is_sorted else source, target)
    assert alignment.mapping == {key: key.replace("backbone", "encoder") for key in _network("backbone.")}
    assert {match.target for match in alignment.ambiguous} <= vacant.keys()
    assert all("no other evidence" in "".join(match.warnings) for match in alignment.ambiguous)


def test_an_island_is_found_below_a_module_that_all_but_one_tensor_is_in() -> None:
    source = _network("backbone.") | _decoder()
    inside = {f"net.{key}": value for key, value in (_network("encoder.") | _upsampling()).items()}
    target = inside | {"criterion.scale": torch.empty(7, device="meta")}
    alignment = autoalign.align(source, target)
    assert {match.target for match in alignment.matches} == {f"net.{key}" for key in _network("encoder.")}


ALIKE = {
    "a whole head of other words": (
        _layer("proj.0", 96, 128) | _layer("proj.2", 24, 96),
        _layer("classifier.0", 96, 128) | _layer("classifier.3", 24, 96),
        {"proj.0": "classifier.0", "proj.2": "classifier.3"},
    ),
    "one layer": (_layer("fc", 24, 128), _layer("classifier", 24, 128), {"fc": "classifier"}),
    "a head of a word in common and another number of classes": (
        _layer("head.dense", 96, 128) | _layer("head.norm", 96) | _layer("head.out_proj", 24, 96),
        _layer("cls_head.0", 96, 128) | _layer("cls_head.3", 10, 96),
        {"head.dense": "cls_head.0"},
    ),
}


@pytest.mark.parametrize(("own", "other", "truth"), ALIKE.values(), ids=ALIKE)
def test_what_corresponds_as_a_whole_or_in_words_is_loaded(own: State, other: State, truth: dict[str, str]) -> None:
    alignment = autoalign.align(_network("backbone.") | own, _network("encoder.") | other)
    found = {key: target for key, target in alignment.mapping.items() if not key.startswith("backbone.")}
    assert found == {f"{key}.{leaf}": f"{to}.{leaf}" for key, to in truth.items() for leaf in ("weight", "bias")}


def test_a_rule_for_one_layer_speaks_for_the_others_of_its_island() -> None:
    source, target = _network("backbone.") | _decoder(), _network("encoder.") | _upsampling()
    rule = ("decoder.conv.0.weight", "up.0.conv.weight")
    alignment = autoalign.align(source, target, rules=[rule])
    assert alignment.mapping["decoder.conv.3.weight"] == "up.1.conv.weight"


def test_where_nothing_speaks_for_most_of_a_network_all_names_may_have_been_changed() -> None:
    source = {key: value for key, value in _network("").items() if ".bn." not in key}
    target = {key.replace("layer", "part"): value for key, value in _network("").items()}
    assert autoalign.align(source, target).mapping == {key: key.replace("layer", "part") for key in source}


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
    "t5 of width 768": lambda: transformers.T5Model(
        transformers.T5Config(d_model=768, d_ff=3072, num_heads=12, num_layers=12)
    ),
    "whisper": lambda: transformers.WhisperModel(transformers.WhisperConfig()),
}

UNRELATED = [
    ("resnet50", "vit_base_patch16_224"),
    ("vgg11_bn", "resnet18"),
    ("gpt2", "resnet18"),
    ("gpt2 of width 64", "resnet18"),
    ("vit_base_patch16_224", "resnet50"),
    ("vit_base_patch16_224", "bert"),
    ("resnet18", "densenet121"),
    ("densenet121", "mobilenet_v3_small"),
    ("convnext_tiny", "resnet50"),
    ("mixer_s32_224", "t5"),
    ("vit_base_patch16_224", "t5 of width 768"),
    ("bert", "convnext_tiny"),
    ("t5", "vgg11_bn"),
    ("mobilenet_v3_small", "whisper"),
]
IDS = [f"{source} -> {target}" for source, target in UNRELATED]


@cache
def state_dict(name: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(BUILDERS[name]().state_dict())


@pytest.mark.parametrize("is_sorted", [False, True], ids=["in order", "sorted"])
@pytest.mark.parametrize(("source", "target"), UNRELATED, ids=IDS)
def test_nothing_is_aligned_between_unrelated_networks(source: str, target: str, is_sorted: bool) -> None:
    own, other = state_dict(source), state_dict(target)
    alignment = autoalign.align(dict(sorted(own.items())) if is_sorted else own, other)
    assert alignment.matches == ()
    assert set(alignment.unexpected_keys) == own.keys()


@pytest.mark.parametrize("is_sorted", [False, True], ids=["in order", "sorted"])
def test_nothing_is_loaded_between_networks_for_words_for_waves_and_for_spectrograms(is_sorted: bool) -> None:
    networks = {name: builder for name, builder in unlike.builders().items() if name in ("bert", "whisper", "wav2vec2")}
    pairs = list(unlike.loaded(networks, with_sorted_keys=is_sorted))
    assert len(pairs) == 6
    assert not [pair for pair in pairs if pair.count]


@pytest.mark.parametrize(("source", "target"), UNRELATED, ids=IDS)
def test_a_load_between_unrelated_networks_raises_and_says_why(source: str, target: str) -> None:
    with torch.device("meta"):
        model = BUILDERS[target]()
    with pytest.raises(NothingLoadedError, match=r"(?s)No tensor of .* could be aligned.*Nothing was loaded"):
        autoalign.load(model, state_dict(source), assign=True)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
