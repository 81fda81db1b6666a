"""Files that the field's own libraries wrote are loaded as the values that these make of them.

``written/`` holds one of each, see ``writing.py``; ``versions.json`` names the libraries' versions. What a library that
is installed writes today is tried as well.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config

import autoalign
from autoalign.errors import NothingLoadedError
from autoalign.plan.dequantise import is_dequantised
from tests.checkpoints.formats.writing import WRITERS, WRITTEN, save, weight
from tests.checkpoints.formats.writing_adapters import Network
from tests.checkpoints.formats.writing_containers import ARCHIVE, HIDDEN, MEGATRON, META, NEOX, WIDTH, WORDS, Trained

VALUES = np.load(WRITTEN / "values.npz")
SCHEMES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
    "int4": "compressed-tensors",
    "int8": "LLM.int8",
    "nf4": "NF4",
    "fp4": "FP4",
    "fp8": "FP8 in blocks",
    "fp8-compressed": "FP8 by row",
    "fp8-tensor-compressed": "FP8 by tensor",
    "int8-compressed": "INT8 by row",
    "fp8-blocks-ue8m0": "MXFP8",
    "mlx": "MLX",
}


def assert_read(path: Path, name: str, wanted: torch.Tensor) -> None:
    rows, columns = wanted.shape
    model = nn.ModuleDict({"proj": nn.Linear(columns, rows, bias=False), "norm": nn.RMSNorm(columns)})
    alignment = autoalign.load(model, path, strict=True)
    kind, _, rest = name.partition("-")
    scheme = f"GGUF {rest}" if kind == "gguf" else SCHEMES.get(name, SCHEMES[kind])
    assert any(f"Dequantised to float32: 1 tensors quantised as {scheme} (" in note for note in alignment.notes)
    assert torch.equal(model.state_dict()["proj.weight"], wanted)


@pytest.mark.parametrize("name", WRITERS)
def test_what_was_written(name: str) -> None:
    assert_read(WRITTEN / name, name, torch.from_numpy(VALUES[name]))


def of_torch(path: Path) -> Path:
    module: Any = torch.ao.nn.quantized
    layer = module.Linear(64, 32)
    scales, zeros = torch.rand(32).double(), torch.zeros(32, dtype=torch.int64)
    layer.set_weight_bias(torch.quantize_per_channel(torch.randn(32, 64), scales, zeros, 0, torch.qint8), None)
    torch.save(nn.ModuleDict({"proj": layer, "norm": nn.RMSNorm(64)}).state_dict(), path)
    return path


def of_torchao(kind: str, path: Path) -> Path:
    package: Any = pytest.importorskip("torchao.quantization")
    model = nn.ModuleDict({"proj": nn.Linear(64, 32, bias=False), "norm": nn.RMSNorm(64)})
    package.quantize_(model, getattr(package, f"{kind}Config")())
    torch.save(model.state_dict(), path)
    return path


OTHERS: dict[str, Callable[[Path], Path]] = {
    "torch.ao": of_torch,
    **{kind: partial(of_torchao, kind) for kind in ("Int8WeightOnly", "Float8WeightOnly", "IntxWeightOnly")},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*WRITERS, *OTHERS])
def test_no_codes_are_taken_for_values(name: str, tmp_path: Path) -> None:
    path = OTHERS[name](tmp_path / "a.pt") if name in OTHERS else WRITTEN / name
    checkpoint = autoalign.open_checkpoint(path)
    codes = {key for key, member in checkpoint.quantised.items() if member.role == "codes"}
    assert len(codes) == 1
    rows, columns = VALUES[name].shape if name in WRITERS else (32, 64)
    model = nn.ModuleDict({"proj": nn.Linear(columns, rows, bias=False), "norm": nn.RMSNorm(columns)})
    before = model.state_dict()["proj.weight"].clone()
    alignment = autoalign.load(model, path, dequantise=False)
    assert alignment.missing_keys == ["proj.weight"]
    assert set(alignment.unexpected_keys) == checkpoint.quantised.keys()
    assert any("Left out: 1 tensors quantised as" in note for note in alignment.notes)
    assert torch.equal(model.state_dict()["proj.weight"], before)
    autoalign.convert(path, model, tmp_path / "a.safetensors", dequantise=False)
    assert load_file(tmp_path / "a.safetensors").keys() == {"norm.weight"}
    alone = {"norm.weight", *codes}
    if name == "torch.ao":  # whose dtype no empty tensor has
        alone -= codes
    shapes = {spec.key: torch.empty(spec.shape) for spec in checkpoint.all_specs}
    for target in (  # models that have tensors in the shapes of the codes themselves
        shapes,
        {f"net.{key}": tensor for key, tensor in shapes.items()},
        {f"net.{s.key}": torch.empty(s.shape, dtype=s.dtype) for s in checkpoint.all_specs if s.key in alone},
    ):
        aligned = autoalign.align(checkpoint, target, min_confidence=0)
        for match in (*aligned.matches, *aligned.ambiguous):
            assert codes.isdisjoint(match.sources) or is_dequantised(match.operation), match


def test_awq_of_other_bits_than_four_is_left_out_where_nothing_says_who_wrote_it() -> None:
    """GPTQModel writes the numbers one after another, and vLLM reads them in an order as that of four bits."""
    alignment = autoalign.align(WRITTEN / "awq-8" / "model.safetensors", {"fc.weight": torch.empty(32, 64)})
    assert not alignment.missing_keys  # the configuration lies beside it
    alignment = autoalign.align(load_file(WRITTEN / "awq-8" / "model.safetensors"), {"fc.weight": torch.empty(32, 64)})
    assert alignment.missing_keys == ["fc.weight"]
    assert "Left out: 1 tensors quantised as AWQ" in alignment.notes[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_today(name: str, tmp_path: Path) -> None:
    try:
        found = WRITERS[name][1](weight(name))
    except (ImportError, KeyError) as error:
        pytest.skip(f"not installed: {error}")
    save(found, tmp_path / name)
    assert_read(tmp_path / name, name, found.values.float())


class Archive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.head = nn.Linear(WIDTH, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Linear(HIDDEN, 3)


@pytest.mark.filterwarnings("ignore:Loading:autoalign.errors.PartialLoadWarning")  # Megatron's has no counter
@pytest.mark.parametrize("name", ["nemo/model.nemo", "megatron"])
def test_an_archive_of_nemo_and_a_checkpoint_of_megatron(name: str) -> None:
    model = Archive()
    assert set(autoalign.load(model, WRITTEN / name).missing_keys) <= {"bn.num_batches_tracked"}
    assert_filled(model, ARCHIVE)


def written(name: str, folder: Path, *, is_packed: bool) -> Path:
    archive = WRITTEN / f"{name}.zip"
    if is_packed:
        return archive
    shutil.unpack_archive(archive, folder)
    return folder


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(("name", "whole"), [("neox-1", NEOX), ("neox-2", NEOX), ("megatron-lm", MEGATRON)])
def test_layers_of_neox_and_parts_of_megatron(
    name: str, whole: dict[str, torch.Tensor], is_packed: bool, tmp_path: Path
) -> None:
    checkpoint = autoalign.open_checkpoint(written(name, tmp_path, is_packed=is_packed))
    assert checkpoint.keys() == whole.keys()
    assert all(torch.equal(checkpoint[key], tensor) for key, tensor in whole.items())


def test_layers_of_neox_are_loaded_into_its_model_of_transformers() -> None:
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": 2, "vocab_size": WORDS}
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, num_attention_heads=2))
    mapping = autoalign.load(model, WRITTEN / "neox-2.zip", strict=True).mapping
    values = model.state_dict()
    assert all(torch.equal(values[mapping[key]], tensor) for key, tensor in NEOX.items())
    assert mapping["layer.3.mlp.linear2.bias"] == "gpt_neox.layers.1.mlp.dense_4h_to_h.bias"


@pytest.mark.parametrize("is_packed", [False, True])
def test_parts_of_metas_llama(is_packed: bool, tmp_path: Path) -> None:
    path = written("meta-2", tmp_path, is_packed=is_packed)
    checkpoint = autoalign.open_checkpoint(path)
    assert {key: tuple(tensor.shape) for key, tensor in checkpoint.items()} == {k: t.shape for k, t in META.items()}
    assert all(torch.equal(checkpoint[key].float(), tensor) for key, tensor in META.items())


@pytest.mark.parametrize("name", ["lora-peft", "lora-kohya", "tucker-kohya", "lora-comfy"])
def test_lora_is_added_as_by_the_library_that_made_it(name: str) -> None:
    (path,), model = (WRITTEN / name).glob("*.safetensors"), Network()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(NothingLoadedError, match=r"15 layers are given as LoRA.*merge_adapter=True"):
        autoalign.load(model, path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert "Added: 15 layers of LoRA" in autoalign.load(model, path, merge_adapter=True).notes[0]
    assert_as_merged(name, model.state_dict())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("dora-peft", "DoRA"), ("loha-peft", "LoHa"), ("lokr-peft", "LoKr")),
        *(("dora-kohya", "DoRA"), ("loha-kohya", "LoHa"), ("lokr-kohya", "LoKr")),
    ],
)
@pytest.mark.parametrize("merge", [False, True])
def test_adapters_whose_arithmetic_is_another_are_refused_by_their_name(name: str, kind: str, merge: bool) -> None:
    (path,), model = (WRITTEN / name).glob("*.safetensors"), Network()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    text = rf"Not {'added' if merge else 'loaded'}: 15 layers of {kind}\. LoRA alone can be added: merge others with"
    with pytest.raises(NothingLoadedError, match=text):
        autoalign.load(model, path, merge_adapter=merge)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_lora_is_added_as_diffusers_adds_what_it_saved() -> None:
    with np.load(WRITTEN / "lora-diffusers" / "merged.npz") as file:  # of a network of zeros
        zeros = {key: torch.zeros(array.shape) for key, array in file.items()}
    path = WRITTEN / "lora-diffusers" / "pytorch_lora_weights.safetensors"
    with pytest.raises(NothingLoadedError, match=r"7 layers are given as LoRA.*merge_adapter=True"):
        autoalign.load(nn.Linear(2, 2), path)
    alignment = autoalign.align(path, zeros, merge_adapter=True)
    assert_as_merged("lora-diffusers", zeros | alignment.state_dict())


def test_experts_in_mxfp4_are_those_of_transformers() -> None:
    """Their matrices are square, so that no shape tells that transformers turns them."""
    folder = WRITTEN / "mxfp4-experts"
    model = GptOssForCausalLM(GptOssConfig.from_pretrained(folder))
    alignment = autoalign.load(model, folder, strict=True)
    assert any("Dequantised to float32: 4 tensors quantised as MXFP4 (" in note for note in alignment.notes)
    wanted = GptOssForCausalLM.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True))
    assert all(torch.equal(model.state_dict()[key], tensor.float()) for key, tensor in wanted.state_dict().items())


def test_an_ip_adapter_fills_what_diffusers_fills() -> None:
    with np.load(WRITTEN / "ip-adapter" / "merged.npz") as file:
        wanted = {key: torch.from_numpy(array) for key, array in file.items()}
    target = {key: torch.zeros_like(tensor) for key, tensor in wanted.items()}
    found = autoalign.align(WRITTEN / "ip-adapter" / "ip-adapter.bin", target).state_dict()
    assert found.keys() == {key for key in wanted if "_ip." in key or "projection_layers" in key}
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in found.items())


def test_averages_of_lit_ema() -> None:
    model = Network()
    autoalign.load(model, WRITTEN / "litema" / "last.ckpt", exclude="model")
    assert_as_merged("litema", model.state_dict())
    with pytest.warns(autoalign.ChoiceWarning, match=r"'model.diffusion_model' was taken, not 'model_ema'"):
        autoalign.load(model, WRITTEN / "litema" / "last.ckpt")
    saved = autoalign.open_checkpoint(WRITTEN / "litema" / "last.ckpt")
    assert all(torch.equal(tensor, saved[f"model.diffusion_model.{key}"]) for key, tensor in model.state_dict().items())


def assert_as_merged(name: str, values: dict[str, torch.Tensor]) -> None:
    with np.load(WRITTEN / name / "merged.npz") as file:
        assert file.keys() == values.keys()
        for key, array in file.items():
            torch.testing.assert_close(values[key], torch.from_numpy(array), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_of_deepspeed(stage: int, is_packed: bool, tmp_path: Path) -> None:
    """As its own conversion puts together what its engine saved, with what is frozen at stage 1, too."""
    model = Trained()
    with np.load(WRITTEN / f"zero-{stage}.npz") as file:
        wanted = dict(file)
    autoalign.load(model, written(f"zero-{stage}", tmp_path, is_packed=is_packed), strict=True)
    values = model.state_dict()
    assert values.keys() == wanted.keys()
    assert all(torch.equal(tensor, torch.from_numpy(wanted[key])) for key, tensor in values.items())


def assert_filled(model: nn.Module, wanted: dict[str, torch.Tensor]) -> None:
    filled = [tensor for key, tensor in model.state_dict().items() if "tracked" not in key]
    assert all(torch.equal(tensor, own) for tensor, own in zip(filled, wanted.values(), strict=True))
