"""Adapters and averages of weights by the libraries that write them, with what these make of them.

``python -m tests.checkpoints.formats.writing_adapters KIND`` writes one into ``written/`` anew, on a CPU: ``peft``;
``kohya`` (lycoris-lora, as the trainer of kohya-ss calls it); ``comfy`` (SimpleTuner's conversion); ``ip`` (ip-adapter,
and diffusers' own reading of it); ``ema`` (LitEma of latent diffusion, which audioldm has); ``diffusers`` (as its
training scripts save LoRA).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.checkpoints.formats.writing import WRITTEN

RANK, ALPHA = 2, 6.0
TARGETS = ["to_q", "to_k", "to_out.0", "proj_in", "conv1"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.0)])


class Transformer2DModel(nn.Module):
    """Of this name, as kohya's code looks for those of diffusers' blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in, self.attn_one = nn.Conv2d(8, 8, 1), Attention()


class ResnetBlock2D(nn.Module):
    """Of this name for the same reason."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(8, 12, 3), nn.GroupNorm(2, 8)


class Network(nn.Module):
    """A network as a UNet of diffusers is, always of the same values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [nn.ModuleDict({"resnets": ResnetBlock2D(), "attentions": Transformer2DModel()}) for _ in range(3)]
        self.down_blocks, self.time_embed = nn.ModuleList(blocks), nn.Linear(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x


def randomised(module: nn.Module) -> None:
    torch.manual_seed(5)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) / 2


def keep(name: str, merged: dict[str, Tensor]) -> None:
    """Keep what a library makes of a network and its adapter."""
    found = {key: tensor.detach().float().numpy() for key, tensor in merged.items()}
    np.savez_compressed(WRITTEN / name / "merged.npz", **found)  # type: ignore[arg-type]


def write_peft() -> None:
    peft: Any = import_module("peft")
    plain = {"r": RANK, "target_modules": TARGETS}
    for name, config in {
        "lora-peft": peft.LoraConfig(**plain, lora_alpha=ALPHA, use_rslora=True),
        "dora-peft": peft.LoraConfig(**plain, lora_alpha=ALPHA, use_dora=True),
        "loha-peft": peft.LoHaConfig(**plain, alpha=ALPHA),
        "lokr-peft": peft.LoKrConfig(**plain, alpha=ALPHA),
    }.items():
        model = peft.get_peft_model(Network(), config)
        randomised(model)
        model.save_pretrained(WRITTEN / name)
        (WRITTEN / name / "README.md").unlink()  # a card without words
        if name == "lora-peft":  # others are not added
            keep(name, model.merge_and_unload().state_dict())


def write_kohya() -> None:
    kohya: Any = import_module("lycoris.kohya")
    for name, options in {
        "lora-kohya": {},
        "tucker-kohya": {"use_tucker": "True"},
        "dora-kohya": {"dora_wd": "True"},
        "loha-kohya": {"algo": "loha"},
        "lokr-kohya": {"algo": "lokr", "factor": "2"},
    }.items():
        model = Network()
        adapter = kohya.create_network(1.0, RANK, ALPHA, None, [], model, conv_dim=RANK, conv_alpha=ALPHA, **options)
        adapter.apply_to([], model, False, True)
        randomised(adapter)
        (WRITTEN / name).mkdir(exist_ok=True)
        path = WRITTEN / name / "adapter.safetensors"
        adapter.save_weights(str(path), None, {"ss_network_module": "lycoris.kohya"})
        adapter.merge_to([], model, load_file(path), None, "cpu")
        if name in ("lora-kohya", "tucker-kohya"):
            keep(name, {key: tensor for key, tensor in model.state_dict().items() if "lora" not in key})


def write_comfy() -> None:
    formats: Any = import_module("simpletuner.helpers.training.lora_format")
    plain = load_file(WRITTEN / "lora-peft" / "adapter_model.safetensors")
    names = {"base_model.model.": "unet.", ".lora_A.": ".lora.down.", ".lora_B.": ".lora.up."}
    for old, new in names.items():
        plain = {key.replace(old, new): tensor for key, tensor in plain.items()}
    saved = formats.convert_diffusers_to_comfyui(plain, adapter_metadata={"lora_alpha": ALPHA})
    (WRITTEN / "lora-comfy").mkdir(exist_ok=True)
    save_file(saved, WRITTEN / "lora-comfy" / "adapter.safetensors")
    merged = Network().state_dict()
    lora: Any = import_module("peft")
    config = lora.LoraConfig(r=RANK, target_modules=TARGETS, lora_alpha=ALPHA)
    model = lora.get_peft_model(Network(), config)
    lora.set_peft_model_state_dict(model, load_file(WRITTEN / "lora-peft" / "adapter_model.safetensors"))
    merged |= model.merge_and_unload().state_dict()
    keep("lora-comfy", merged)


def small_unet() -> Any:
    return import_module("diffusers").UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def write_diffusers() -> None:
    peft: Any = import_module("peft")
    pipeline: Any = import_module("diffusers").StableDiffusionPipeline
    training: Any = import_module("diffusers.training_utils")
    utils: Any = import_module("diffusers.utils")
    network = small_unet()
    network.requires_grad_(False)
    targets = r"down_blocks\.0\..*\.(to_q|to_k|to_out\.0|conv1)"
    network.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    randomised(network)
    layers = utils.convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(network))
    own = WRITTEN / "lora-diffusers"
    pipeline.save_lora_weights(own, unet_lora_layers=layers, **training._collate_lora_metadata({"unet": network}))
    plain = small_unet()
    for parameter in plain.parameters():
        parameter.data.zero_()
    saved, alphas, metadata = pipeline.lora_state_dict(own, return_lora_metadata=True)
    pipeline.load_lora_into_unet(saved, alphas, plain, metadata=metadata)
    plain.fuse_lora()
    plain.unload_lora()
    keep("lora-diffusers", plain.state_dict())


def write_ip() -> None:
    diffusers: Any = import_module("diffusers")
    import_module("diffusers.pipelines.controlnet").MultiControlNetModel = object  # type: ignore[attr-defined] # as it was
    package: Any = import_module("ip_adapter.ip_adapter")
    own, base = WRITTEN / "ip-adapter", 32
    network = small_unet()
    processors: dict[str, Any] = {}
    for name in network.attn_processors:  # as IPAdapter.set_ip_adapter does
        width = network.get_submodule(name.removesuffix(".processor")).to_q.in_features
        make = package.AttnProcessor if name.endswith("attn1.processor") else package.IPAttnProcessor
        keywords = {} if make is package.AttnProcessor else {"hidden_size": width, "cross_attention_dim": base}
        processors[name] = make(**keywords)
    network.set_attn_processor(processors)
    projection, layers = package.ImageProjModel(base, 16), nn.ModuleList(network.attn_processors.values())
    randomised(projection)
    randomised(layers)
    own.mkdir(exist_ok=True)
    saved = {"image_proj": projection.state_dict(), "ip_adapter": layers.state_dict()}
    torch.save(saved, own / "ip-adapter.bin")  # as its authors' instructions say
    with_images: Any = diffusers.UNet2DConditionModel.from_config(network.config)
    with_images._load_ip_adapter_weights([saved])
    whole = with_images.state_dict()
    kept = {key for key in whole if "_ip." in key or "projection_layers" in key}
    keep("ip-adapter", {key: tensor if key in kept else tensor.zero_() for key, tensor in whole.items()})


def write_ema() -> None:
    """Without the rest of the package, which needs others."""
    found: Any = spec_from_file_location(
        "ema",
        Path(find_spec("audioldm").origin).parent / "latent_diffusion" / "ema.py",  # type: ignore[union-attr, arg-type]
    )
    module: Any = module_from_spec(found)
    found.loader.exec_module(module)
    model = nn.ModuleDict({"diffusion_model": Network()})
    average = module.LitEma(model)
    randomised(model)
    average(model)
    whole = nn.ModuleDict({"model": model, "model_ema": average})
    (WRITTEN / "litema").mkdir(exist_ok=True)
    torch.save({"state_dict": whole.state_dict(), "global_step": 1}, WRITTEN / "litema" / "last.ckpt")
    average.copy_to(model)
    keep("litema", model["diffusion_model"].state_dict())


KINDS: dict[str, Callable[[], None]] = {
    "peft": write_peft,
    "kohya": write_kohya,
    "comfy": write_comfy,
    "diffusers": write_diffusers,
    "ip": write_ip,
    "ema": write_ema,
}

if __name__ == "__main__":
    KINDS[sys.argv[1]]()
