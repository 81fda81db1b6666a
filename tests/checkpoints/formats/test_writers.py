"""Checkpoints as the field's own writers leave them: each is loaded into a model whose keys have other names."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from autoalign.api import load
from autoalign.checkpoints.checkpoint import open_checkpoint
from autoalign.errors import NothingLoadedError


class Network(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.proj = nn.Linear(4, 8)
        self.head = nn.Linear(8, 5)
        self.norm.running_mean = torch.randn(4)


class Other(nn.Module):
    """The same network under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.classifier = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 5))


def zipped(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "model.pth")
    return folder / "model.pth"


def legacy(model: nn.Module, folder: Path) -> Path:
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, folder / "a.tar", _use_new_zipfile_serialization=False)
    return folder / "a.tar"


def safe(model: nn.Module, folder: Path) -> Path:
    save_model(model, str(folder / "model.safetensors"))
    return folder / "model.safetensors"


def sharded(name: str, *, safe_serialization: bool) -> Callable[[nn.Module, Path], Path]:
    def write(model: nn.Module, folder: Path) -> Path:
        hub: Any = pytest.importorskip("huggingface_hub")
        hub.save_torch_model(model, folder, max_shard_size=200, safe_serialization=safe_serialization)
        assert len([path for path in folder.iterdir() if name in path.name]) > 2
        return folder

    write.__name__ = f"sharded_{name}"
    return write


def arrays(model: nn.Module, folder: Path) -> Path:
    with (folder / "a.npz").open("wb") as stream:
        np.savez(stream, **{key: tensor.numpy() for key, tensor in model.state_dict().items()})
    return folder / "a.npz"


def distributed(model: nn.Module, folder: Path) -> Path:
    from torch.distributed.checkpoint.state_dict_saver import save

    save({"model": model.state_dict(), "epoch": 3}, checkpoint_id=folder, no_dist=True)
    return folder


def script(model: nn.Module, folder: Path) -> Path:
    jit: Any = torch.jit
    holder = nn.Sequential(model.stem, model.norm, model.proj, model.head)  # type: ignore[arg-type]
    jit.save(jit.script(holder), folder / "a.pt")
    return folder / "a.pt"


def gguf(model: nn.Module, folder: Path) -> Path:
    package: Any = pytest.importorskip("gguf")
    writer = package.GGUFWriter(folder / "a.gguf", "llama")
    for key, tensor in model.state_dict().items():
        if tensor.dim():  # the format has no scalars
            writer.add_tensor(key, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "a.gguf"


def lightning(model: nn.Module, folder: Path) -> Path:
    lightning: Any = pytest.importorskip("pytorch_lightning")

    class Wrapped(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self, width: int) -> None:  # noqa: ARG002, it is saved
            super().__init__()
            self.save_hyperparameters()
            self.model = model

        def configure_optimizers(self) -> object:
            return torch.optim.Adam(self.parameters())

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            found: Tensor = model.head(model.proj(batch)).sum()  # type: ignore[operator]
            return found

    trainer = lightning.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Wrapped(7), torch.utils.data.DataLoader(torch.ones(2, 4)))  # type: ignore[arg-type]
        trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def flax(model: nn.Module, folder: Path) -> Path:
    serialization: Any = pytest.importorskip("flax.serialization")
    numbers = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    variables = {
        "params": {
            "stem": {"kernel": numbers["stem.weight"].transpose(2, 3, 1, 0), "bias": numbers["stem.bias"]},
            "norm": {"scale": numbers["norm.weight"], "bias": numbers["norm.bias"]},
            "proj": {"kernel": numbers["proj.weight"].T, "bias": numbers["proj.bias"]},
            "head": {"kernel": numbers["head.weight"].T, "bias": numbers["head.bias"]},
        },
        "batch_stats": {"norm": {"mean": numbers["norm.running_mean"], "var": numbers["norm.running_var"]}},
    }
    (folder / "flax_model.msgpack").write_bytes(serialization.to_bytes(variables))
    return folder / "flax_model.msgpack"


WRITERS = (
    *(zipped, legacy, safe, arrays, distributed, script, gguf, lightning, flax),
    sharded("model", safe_serialization=True),
    sharded("pytorch_model", safe_serialization=False),
)


@pytest.mark.filterwarnings(
    "ignore:torch.distributed is:UserWarning",
    "ignore:.*torch.jit.*:FutureWarning",
    "ignore:.*torch.jit.*:DeprecationWarning",
    "ignore:Loading:autoalign.errors.PartialLoadWarning",  # of the counter, which two formats do not have
)
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_what_the_fields_own_writers_save_is_loaded(tmp_path: Path, write: Callable[[nn.Module, Path], Path]) -> None:
    source, model = Network(0), Other()
    path = write(source, tmp_path)
    alignment = load(model, path)
    assert [key for key in alignment.missing_keys if not key.endswith("num_batches_tracked")] == []
    for key, expected in zip(model.state_dict(), source.state_dict().values(), strict=True):
        assert key in alignment.missing_keys or torch.equal(model.state_dict()[key], expected), key


def test_merged_parts_of_zero(tmp_path: Path) -> None:
    """``zero_to_fp32.py`` saves a plain state dict, in one file or sharded as huggingface_hub does."""
    hub: Any = pytest.importorskip("huggingface_hub")
    source, model = Network(0), Other()
    merged = {f"module.{key}": tensor for key, tensor in source.state_dict().items()}
    pattern = "pytorch_model{suffix}.bin"
    split = hub.split_torch_state_dict_into_shards(merged, filename_pattern=pattern, max_shard_size=300)
    for name, keys in split.filename_to_tensors.items():
        torch.save({key: merged[key] for key in keys}, tmp_path / name)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert load(model, tmp_path, strict=True).coverage == 1
    assert torch.equal(model.features[0].weight, source.stem.weight)  # type: ignore[arg-type]


def transformer() -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(8, 8)
            self.v_proj = nn.Linear(8, 8)
            self.fc = nn.Linear(8, 16)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return x

    return Model()


def adapted(seed: int) -> Any:
    peft: Any = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(transformer(), config)


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_adapters_of_peft_are_aligned_to_adapters(tmp_path: Path) -> None:
    source, model = adapted(0), adapted(1)
    source.save_pretrained(tmp_path)
    alignment = load(model, tmp_path, include="re:lora_")
    wanted = {key: tensor for key, tensor in source.state_dict().items() if "lora_" in key}
    assert set(wanted) <= {match.target for match in alignment.matches}
    for key, tensor in wanted.items():
        assert torch.equal(model.state_dict()[key], tensor), key
    assert alignment.unexpected_keys == []
    assert not any("LoRA" in note for note in alignment.notes)  # they are loaded as what they are


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_adapters_alone_are_said_to_be_no_weights_of_the_model(tmp_path: Path) -> None:
    adapted(0).save_pretrained(tmp_path)
    model = transformer()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(NothingLoadedError, match=r"4 layers are given as LoRA matrices.*merge_adapter=True"):
        load(model, tmp_path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_motion_modules_and_an_ip_adapter_of_diffusers(tmp_path: Path) -> None:
    package: Any = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32, "norm_num_groups": 8}
    kinds = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    kinds |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    network = package.UNet2DConditionModel(**sizes, **kinds)
    motion = package.MotionAdapter(
        block_out_channels=(32, 64), motion_layers_per_block=1, motion_num_attention_heads=4, motion_norm_num_groups=8
    )
    motion.save_pretrained(tmp_path / "motion")
    layers = {
        f"{2 * number + 1}.to_{name}_ip.weight": torch.randn(network.get_submodule(path).to_k.weight.shape)
        for number, path in enumerate(key[: -len(".processor")] for key in network.attn_processors if "attn2" in key)
        for name in "kv"
    }
    projection = {"proj.weight": torch.randn(128, 16), "proj.bias": torch.randn(128)}
    projection |= {"norm.weight": torch.randn(32), "norm.bias": torch.randn(32)}
    adapter = {"image_proj": projection, "ip_adapter": layers}  # as its authors save it, and diffusers takes it
    torch.save(adapter, tmp_path / "ip.bin")
    for name in ("motion", "ip.bin"):
        with pytest.raises(NothingLoadedError, match="alone, of which the model has none"):
            load(network, tmp_path / name)
    with_motion = package.UNetMotionModel.from_unet2d(network, package.MotionAdapter.from_config(motion.config))
    load(with_motion, tmp_path / "motion")
    values = with_motion.state_dict()
    assert all(torch.equal(values[key], tensor) for key, tensor in motion.state_dict().items())
    with_images = package.UNet2DConditionModel.from_config(network.config)
    with_images._load_ip_adapter_weights([adapter])
    wanted = {key: tensor.clone() for key, tensor in with_images.state_dict().items()}
    for key, parameter in with_images.named_parameters():
        if "_ip." in key or "proj_layers" in key:
            nn.init.zeros_(parameter)
    load(with_images, tmp_path / "ip.bin")
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in with_images.state_dict().items())


def test_a_merged_adapter_is_loaded(tmp_path: Path) -> None:
    merged = adapted(0).merge_and_unload()
    save_file(merged.state_dict(), tmp_path / "model.safetensors")
    model = transformer()
    load(model, tmp_path, strict=True)
    assert len(open_checkpoint(tmp_path)) == len(model.state_dict())


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"layers.{n}.{name}.weight": torch.randn(128, 256) for n in range(3) for name in ("up", "gate")}


class Layers(torch.nn.Module):
    """A model of such weights."""

    def __init__(self) -> None:
        super().__init__()
        names = ("up", "gate")
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({name: torch.nn.Linear(256, 128, bias=False) for name in names}) for _ in range(3)
        )


def assert_dequantised(path: Path, wanted: dict[str, torch.Tensor], scheme: str) -> None:
    model = Layers()
    alignment = load(model, path, strict=True)
    assert any(f"Dequantised to float32: 6 tensors quantised as {scheme}" in note for note in alignment.notes)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[key].float()), key


@pytest.mark.filterwarnings("ignore")
def test_torchao(tmp_path: Path) -> None:
    package: Any = pytest.importorskip("torchao.quantization")
    model = Layers()
    package.quantize_(model, package.Int8WeightOnlyConfig())
    torch.save(model.state_dict(), tmp_path / "a.pt")
    wanted = {key: tensor.dequantize() for key, tensor in model.state_dict().items()}
    assert_dequantised(tmp_path / "a.pt", wanted, "torchao")
    code = f"""
from autoalign import convert
from tests.checkpoints.formats.test_writers import Layers
convert({str(tmp_path / "a.pt")!r}, Layers(), {str(tmp_path / "b.safetensors")!r}, strict=True)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)  # where nothing has imported torchao
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in load_file(tmp_path / "b.safetensors").items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "game"), [("PPO", "CartPole-v1"), ("SAC", "Pendulum-v1")])  # one trains more tensors
def test_a_policy_of_stable_baselines(tmp_path: Path, name: str, game: str) -> None:
    package: Any = pytest.importorskip("stable_baselines3")
    source, model = (getattr(package, name)("MlpPolicy", game) for _ in range(2))
    source.save(tmp_path / "a.zip")
    load(model.policy, tmp_path / "a.zip", strict=True)
    wanted = source.policy.state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in model.policy.state_dict().items())


def test_averages_of_torch_ema(tmp_path: Path) -> None:
    package: Any = pytest.importorskip("torch_ema")
    source, model = Layers(), Layers()
    average = package.ExponentialMovingAverage(source.parameters(), decay=0.9)
    with torch.no_grad():
        source.layers[0].up.weight.add_(1)  # type: ignore[union-attr, operator]
    average.update()
    torch.save(average.state_dict(), tmp_path / "a.pt")
    load(model, tmp_path / "a.pt", strict=True)
    assert all(map(torch.equal, model.parameters(), average.shadow_params))
