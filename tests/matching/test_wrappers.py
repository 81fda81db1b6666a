"""What a wrapper puts into keys changes no match."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import cast

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import autoalign
from tests.pairs import FUSED_PAIRS, TORCHVISION_TIMM, Builder
from tests.reference_models.llama import LitLlama, MetaLlama
from tests.reference_models.unet import unet
from tests.strategies import tensors


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 16)  # n x 2n, as a layer that gives scale and shift
        self.mlp = _Mlp(16)
        self.blocks = nn.ModuleList(_Mlp(16) for _ in range(3))
        self.head = nn.Linear(16, 10)


WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "averaged_model")
_AT: dict[str, Callable[[str, str], str]] = {
    "around all": lambda key, name: f"{name}.{key}",
    "around each block": lambda key, name: ".".join(
        f"{part}.{name}" if before == "blocks" else part for before, part in _pairs(key)
    ),
    "around each mlp": lambda key, name: key.replace("mlp.", f"mlp.{name}."),
}


def _pairs(key: str) -> list[tuple[str, str]]:
    parts = key.split(".")
    return list(zip(["", *parts], parts, strict=False))


@pytest.mark.parametrize("where", _AT)
@pytest.mark.parametrize("wrapper", [*WRAPPERS, "module", "ema"])
def test_a_wrapper_changes_no_match(wrapper: str, where: str) -> None:
    plain: dict[str, Tensor] = _Net().state_dict()
    wrapped = {_AT[where](key, wrapper): value for key, value in plain.items()}
    expected = {_AT[where](key, wrapper): key for key in plain}
    assert autoalign.align(wrapped, plain).mapping == expected
    assert autoalign.align(plain, wrapped).mapping == {key: name for name, key in expected.items()}


def test_a_compiled_model_takes_its_own_state_dict() -> None:
    net = _Net()
    compiled = cast("nn.Module", torch.compile(_Net()))
    alignment = autoalign.load(compiled, net.state_dict(), strict=True)
    assert len(alignment.matches) == len(net.state_dict())


Shapes = Mapping[str, tuple[int, ...]]


def _shapes(build: Builder) -> Shapes:
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in build().state_dict().items()}


@cache
def _sides(name: str) -> tuple[Shapes, Shapes]:
    if name == "unet":
        return unet()[:2]
    if name == "gated mlp":
        return _shapes(LitLlama), _shapes(MetaLlama)
    pair = next(pair for pair in (*TORCHVISION_TIMM, *FUSED_PAIRS) if pair.name == name)
    return _shapes(pair.source), _shapes(pair.target)


def _matches(source: Shapes, target: Shapes) -> dict[str, tuple[tuple[str, ...], str, bool]]:
    alignment = autoalign.align(tensors(source), tensors(target))
    loaded = {
        match.target: (match.sources, str(match.operation), match.confidence >= 0.5) for match in alignment.matches
    }
    return loaded | {match.target: (match.sources, "ambiguous", False) for match in alignment.ambiguous}


def _ordered(name: str, *, is_sorted: bool) -> tuple[Shapes, Shapes]:
    source, target = _sides(name)
    return (dict(sorted(source.items())) if is_sorted else source), target


@cache
def _unprefixed(name: str, is_sorted: bool) -> dict[str, tuple[tuple[str, ...], str, bool]]:
    return _matches(*_ordered(name, is_sorted=is_sorted))


NETWORKS = (
    "unet",
    "gated mlp",
    "timm.resnet18 -> torchvision.resnet18",
    "torchvision.convnext_tiny -> timm.convnext_tiny",
    "timm.vit_tiny -> transformers.ViT",
    "timm.swin_tiny -> torchvision.swin_t",
    "torchvision.mobilenet_v3_small -> timm.mobilenetv3_small_100",
    "timm.inception_v3 -> torchvision.inception_v3",
)
_names = st.sampled_from(
    [*WRAPPERS, "module", "model", "ema", "net", "diffusion_model", "student.backbone", "mid_block"]
)
_prefixes = st.lists(_names | st.from_regex(r"[a-z]{1,8}", fullmatch=True), max_size=2).map(
    lambda names: "".join(f"{name}." for name in names)
)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(NETWORKS), st.booleans(), _prefixes, _prefixes)
@example("unet", False, "", "")
@example("unet", False, "model.diffusion_model.", "")
@example("gated mlp", True, "_orig_mod.", "module.")
def test_a_prefix_changes_no_match(name: str, is_sorted: bool, before: str, around: str) -> None:
    source, target = _ordered(name, is_sorted=is_sorted)
    prefixed = (
        {prefix + key: shape for key, shape in side.items()} for prefix, side in ((before, source), (around, target))
    )
    assert _matches(*prefixed) == {
        around + key: (tuple(before + own for own in sources), *rest)
        for key, (sources, *rest) in _unprefixed(name, is_sorted).items()
    }


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_unet_is_matched_with_its_other_implementation_under_any_prefix(prefix: str) -> None:
    source, target, truth = unet()
    alignment = autoalign.align(tensors({prefix + key: shape for key, shape in source.items()}), tensors(target))
    assert [match for match in alignment.matches if match.sources != (prefix + truth[match.target],)] == []
    assert len(alignment.matches) >= len(target) - 2  # two convolutions of one shape are ambiguous
