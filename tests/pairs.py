"""Pairs of one architecture in two libraries, with equal hyperparameters so that equal weights give equal outputs.

Each side is a zero-argument builder. The variants are small and the images are too: what is tested is the naming,
nesting and order of the real implementations, which do not depend on width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

Builder = Callable[[], nn.Module]


@dataclass(frozen=True, slots=True)
class Pair:
    """A source and a target implementation of one network."""

    name: str
    source: Builder
    target: Builder
    image_size: int = 64
    absent: str = "(?!)"  # a regex of the target's keys that the source has nothing for


def both_directions(
    name: str, first: Builder, second: Builder, image_size: int = 64, only_second: str = "(?!)"
) -> tuple[Pair, Pair]:
    """Make the pair of ``first`` into ``second`` and its reverse; ``name`` reads ``first <-> second``."""
    left, right = name.split(" <-> ")
    return (
        Pair(f"{left} -> {right}", first, second, image_size, only_second),
        Pair(f"{right} -> {left}", second, first, image_size),
    )


def randomise(model: nn.Module, image_size: int, seed: int) -> nn.Module:
    """Give every tensor values of its own, in place, such that each of them shows in the output.

    Weights keep the scale of their input, gains are near 1, and BatchNorm's statistics are those of random images,
    without which a deep network's output would hardly depend on its first layers.
    """
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in model.named_parameters():
        values = torch.randn(tensor.shape, generator=generator)
        if tensor.squeeze().dim() < 2:  # a gain, or else a bias, told by the value that its library gave it
            is_gain = bool((tensor > 0).all())
            tensor.data = 1 + 0.2 * values.clamp(-3, 3) if is_gain else 0.2 * values
        elif key.endswith("weight"):
            tensor.data = values / tensor[0].numel() ** 0.5
        else:  # position tables and tokens
            tensor.data = values
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    output(model, image_size)
    model.eval()
    return model


def output(model: nn.Module, image_size: int) -> Tensor:
    """The logits for two fixed images, of shape [2, classes].

    The images have structure at a large and a small scale, as pooling would average mere noise away.
    """
    generator = torch.Generator().manual_seed(0)
    images = nn.functional.interpolate(torch.randn(2, 3, 4, 4, generator=generator), image_size, mode="bicubic")
    images += 0.5 * torch.randn(images.shape, generator=generator)
    with torch.inference_mode():
        result = model(images)
    if isinstance(result, Tensor):
        return result
    logits: Tensor = result.logits if "logits" in result else result.pooler_output
    return logits


def relative_difference(got: Tensor, want: Tensor) -> float:
    """The largest difference, as a share of the largest wanted value."""
    return float((got - want).abs().max() / want.abs().max())


def tv(name: str, **options: object) -> Builder:
    """A torchvision classifier without pretrained weights."""
    return partial(torchvision.models.get_model, name, weights=None, **options)


def tm(name: str, **options: object) -> Builder:
    """A timm classifier without pretrained weights."""
    return partial(timm.create_model, name, **options)


def hf(kind: str, head: str = "ForImageClassification", **options: object) -> Builder:
    """A transformers image classifier of 1,000 classes, from its configuration."""
    config = getattr(transformers, f"{kind}Config")(num_labels=1000, **options)
    return partial(getattr(transformers, f"{kind}{head}"), config)


def zeroed(builder: Builder) -> Builder:
    """The same model with zeros for its parameters, which for a big one is much faster than its own initialisation."""

    def build() -> nn.Module:
        with torch.device("meta"):
            model = builder()
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        return model

    return build


def _tv_vit(**options: int) -> Builder:
    return partial(torchvision.models.VisionTransformer, **options)


VIT_TINY: dict[str, Any] = {
    "hidden_size": 192,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "image_size": 64,
    "layer_norm_eps": 1e-6,
}
LEVIT_128S: dict[str, Any] = {
    "hidden_sizes": [128, 256, 384],
    "num_attention_heads": [4, 6, 8],
    "depths": [2, 3, 4],
}

TORCHVISION_TIMM = (
    *both_directions("torchvision.resnet18 <-> timm.resnet18", tv("resnet18"), tm("resnet18")),
    *both_directions("torchvision.resnet50 <-> timm.resnet50", tv("resnet50"), tm("resnet50")),
    *both_directions(
        "torchvision.resnext50_32x4d <-> timm.resnext50_32x4d", tv("resnext50_32x4d"), tm("resnext50_32x4d")
    ),
    *both_directions("torchvision.densenet121 <-> timm.densenet121", tv("densenet121"), tm("densenet121")),
    *both_directions("torchvision.mobilenet_v2 <-> timm.mobilenetv2_100", tv("mobilenet_v2"), tm("mobilenetv2_100")),
    *both_directions(
        "torchvision.mobilenet_v3_small <-> timm.mobilenetv3_small_100",
        tv("mobilenet_v3_small"),
        tm("mobilenetv3_small_100", bn_eps=1e-3),
    ),
    *both_directions(
        "torchvision.mobilenet_v3_large <-> timm.mobilenetv3_large_100",
        tv("mobilenet_v3_large"),
        tm("mobilenetv3_large_100", bn_eps=1e-3),
    ),
    *both_directions("torchvision.mnasnet0_5 <-> timm.mnasnet_050", tv("mnasnet0_5"), tm("mnasnet_050")),
    *both_directions(
        "torchvision.efficientnet_b0 <-> timm.efficientnet_b0", tv("efficientnet_b0"), tm("efficientnet_b0")
    ),
    *both_directions(
        "torchvision.efficientnet_v2_s <-> timm.efficientnetv2_s",
        tv("efficientnet_v2_s"),
        tm("efficientnetv2_s", bn_eps=1e-3),
    ),
    *both_directions("torchvision.regnet_x_400mf <-> timm.regnetx_004_tv", tv("regnet_x_400mf"), tm("regnetx_004_tv")),
    *both_directions("torchvision.regnet_y_400mf <-> timm.regnety_004", tv("regnet_y_400mf"), tm("regnety_004")),
    *both_directions("torchvision.convnext_tiny <-> timm.convnext_tiny", tv("convnext_tiny"), tm("convnext_tiny")),
    *both_directions(
        "timm.swin_tiny <-> torchvision.swin_t",
        tm("swin_tiny_patch4_window7_224"),
        tv("swin_t"),
        image_size=224,
        only_second="relative_position_index$",
    ),
    *both_directions(
        "torchvision.vit (tiny) <-> timm.vit_tiny",
        _tv_vit(image_size=64, patch_size=16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768),
        tm("vit_tiny_patch16_224", img_size=64),
    ),
    *both_directions(
        "timm.inception_v3 <-> torchvision.inception_v3",
        tm("inception_v3"),
        tv("inception_v3", init_weights=False, transform_input=False),
        image_size=128,
        only_second="^AuxLogits",
    ),
    Pair("torchvision.vgg11 -> timm.vgg11", zeroed(tv("vgg11")), zeroed(tm("vgg11")), image_size=224),
)

TIMM_TRANSFORMERS = (
    *both_directions(
        "timm.resnet18 <-> transformers.ResNet",
        tm("resnet18"),
        hf("ResNet", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic"),
    ),
    *both_directions("timm.resnet50 <-> transformers.ResNet", tm("resnet50"), hf("ResNet")),
    *both_directions(
        "timm.regnetx_004 <-> transformers.RegNet",
        tm("regnetx_004"),
        hf("RegNet", layer_type="x", groups_width=16, hidden_sizes=[32, 64, 160, 384], depths=[1, 2, 7, 12]),
    ),
    *both_directions(
        "timm.regnety_004 <-> transformers.RegNet",
        tm("regnety_004"),
        hf("RegNet", groups_width=8, hidden_sizes=[48, 104, 208, 440], depths=[1, 3, 6, 6]),
    ),
    *both_directions(
        "timm.convnext_tiny <-> transformers.ConvNext", tm("convnext_tiny"), hf("ConvNext", layer_norm_eps=1e-6)
    ),
    *both_directions(
        "timm.convnextv2_atto <-> transformers.ConvNextV2",
        tm("convnextv2_atto"),
        hf("ConvNextV2", hidden_sizes=[40, 80, 160, 320], depths=[2, 2, 6, 2], layer_norm_eps=1e-6),
    ),
    *both_directions(
        "timm.tf_efficientnet_b0 <-> transformers.EfficientNet",
        tm("tf_efficientnet_b0"),
        hf("EfficientNet", width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, image_size=64),
        image_size=64,
    ),
    *both_directions(
        "timm.mobilenetv1_100 <-> transformers.MobileNetV1",
        tm("mobilenetv1_100"),
        hf("MobileNetV1", tf_padding=False, layer_norm_eps=1e-5),
    ),
    *both_directions(
        "timm.mobilenetv2_100 <-> transformers.MobileNetV2",
        tm("mobilenetv2_100"),
        hf("MobileNetV2", tf_padding=False, layer_norm_eps=1e-5),
    ),
    *both_directions(
        "timm.levit_128s <-> transformers.Levit",
        tm("levit_128s"),
        hf(
            "Levit",
            "ForImageClassificationWithTeacher",
            hidden_sizes=[128, 256, 384],
            num_attention_heads=[4, 6, 8],
            depths=[2, 3, 4],
        ),
        image_size=224,
    ),
    *both_directions(
        "timm.focalnet_tiny_srf <-> transformers.FocalNet",
        tm("focalnet_tiny_srf"),
        hf("FocalNet"),
    ),
    *both_directions("timm.resnetv2_50x1_bit <-> transformers.Bit", tm("resnetv2_50x1_bit"), hf("Bit")),
    *both_directions(
        "timm.mobilevitv2_050 <-> transformers.MobileViTV2",
        tm("mobilevitv2_050"),
        hf("MobileViTV2", width_multiplier=0.5),
    ),
    *both_directions(
        "timm.hiera_tiny_224 <-> transformers.Hiera",
        tm("hiera_tiny_224"),
        hf("Hiera", depths=[1, 2, 7, 2]),
        image_size=224,
    ),
)

# The library's own attention is one fused projection on one side and three separate ones on the other.
FUSED_PAIRS = (
    Pair("torchvision.swin_v2_t -> timm.swinv2_tiny", tv("swin_v2_t"), tm("swinv2_tiny_window8_256"), image_size=256),
    *both_directions(
        "timm.vit_tiny <-> transformers.ViT",
        tm("vit_tiny_patch16_224", img_size=64),
        hf("ViT", **VIT_TINY),
    ),
    *both_directions(
        "torchvision.vit (tiny) <-> transformers.ViT",
        _tv_vit(image_size=64, patch_size=16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768),
        hf("ViT", **VIT_TINY),
    ),
    *both_directions(
        "timm.deit_tiny_distilled <-> transformers.DeiT",
        tm("deit_tiny_distilled_patch16_224", img_size=64),
        hf("DeiT", "ForImageClassificationWithTeacher", **VIT_TINY),
    ),
    *both_directions(
        "timm.beit (tiny) <-> transformers.Beit",
        tm("beit_base_patch16_224", img_size=64, embed_dim=192, num_heads=3),
        hf("Beit", use_relative_position_bias=True, **VIT_TINY),
    ),
    *both_directions(
        "timm.dinov2_small <-> transformers.Dinov2",
        tm("vit_small_patch14_dinov2", img_size=56),
        hf("Dinov2", "Model", hidden_size=384, num_attention_heads=6, image_size=56, use_mask_token=False),
        image_size=56,
    ),
    *both_directions(
        "timm.swin_tiny <-> transformers.Swin",
        tm("swin_tiny_patch4_window7_224"),
        hf("Swin"),
        image_size=224,
        only_second=r"\.relative_position_index$",  # which older versions save
    ),
    *both_directions(
        "timm.swinv2_tiny <-> transformers.Swinv2",
        tm("swinv2_tiny_window8_256"),
        hf("Swinv2", image_size=256, window_size=8),
        image_size=256,
    ),
    *both_directions("timm.pvt_v2_b0 <-> transformers.PvtV2", tm("pvt_v2_b0"), hf("PvtV2")),
    *both_directions(
        "timm.mobilevit_xxs <-> transformers.MobileViT",
        tm("mobilevit_xxs"),
        hf("MobileViT", hidden_sizes=[64, 80, 96], neck_hidden_sizes=[16, 16, 24, 48, 64, 80, 320], expand_ratio=2.0),
    ),
)
