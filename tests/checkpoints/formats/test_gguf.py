from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import autoalign
from autoalign.checkpoints.checkpoint import open_checkpoint
from autoalign.checkpoints.formats.detection import format_of
from autoalign.errors import CheckpointError, DependencyError, PairMismatchError
from autoalign.plan.dequantise import _GGUF

gguf: Any = pytest.importorskip("gguf")

VALUES: dict[str, np.ndarray] = {
    "token_embd.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "blk.0.attn_q.weight": np.arange(6, dtype=np.float16).reshape(2, 3),
    "counts": np.arange(3, dtype=np.int32),
}


def write(path: Path, tensors: dict[str, tuple[np.ndarray, str | None]], **options: Any) -> None:
    writer = gguf.GGUFWriter(path, "llama", **options)
    writer.add_head_count(4)
    writer.add_name("small")
    writer.add_token_list([f"token{index}" for index in range(2000)])
    for name, (values, kind) in tensors.items():
        dtype = None if kind is None else gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, values, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("endian", ["LITTLE", "BIG"])
def test_tensors_and_configuration_are_read(tmp_path: Path, endian: str) -> None:
    path = tmp_path / "model"
    write(path, {name: (values.copy(), None) for name, values in VALUES.items()}, endianess=gguf.GGUFEndian[endian])
    checkpoint = open_checkpoint(path)
    assert list(checkpoint) == list(VALUES)
    for spec in checkpoint.specs:
        assert (spec.shape, checkpoint[spec.key].dtype) == (VALUES[spec.key].shape, spec.dtype)
        assert checkpoint[spec.key].tolist() == VALUES[spec.key].tolist()
    assert checkpoint.config["llama.attention.head_count"] == 4
    assert checkpoint.config["general.name"] == "small"
    assert "tokenizer.ggml.tokens" not in checkpoint.config


def test_bfloat16_is_read(tmp_path: Path) -> None:
    values = torch.tensor([[1.5, -2.0], [3e38, 0.0]], dtype=torch.bfloat16)
    write(tmp_path / "a.gguf", {"a.weight": (values.view(torch.uint8).numpy(), "BF16")})
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    assert torch.equal(checkpoint["a.weight"], values)


def test_quantised_tensors_are_loaded_as_their_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64, bias=False))
    tensors: dict[str, tuple[np.ndarray, str | None]] = {}
    wanted = {}
    for (key, tensor), name in zip(model.state_dict().items(), ("Q8_0", None, "Q4_0"), strict=True):
        values = tensor.numpy()
        if name is not None:
            kind = gguf.GGMLQuantizationType[name]
            values = gguf.quants.quantize(values, kind)
            wanted[key] = torch.from_numpy(gguf.quants.dequantize(values, kind))
        tensors[key] = values, name
    write(tmp_path / "a.gguf", tensors)
    alignment = autoalign.load(model, tmp_path / "a.gguf", strict=True)
    for key, tensor in wanted.items():
        assert torch.equal(model.state_dict()[key], tensor)
    assert "dequantise(GGUF Q8_0) of [96, 68], GGUF Q8_0 to float32" in str(alignment)
    alignment.save(tmp_path / "a.json")
    assert autoalign.Alignment.read(tmp_path / "a.json").applied_to(tmp_path / "a.gguf", model) == alignment
    assert torch.equal(alignment.rules().apply(open_checkpoint(tmp_path / "a.gguf"))["0.weight"], wanted["0.weight"])
    left_out = autoalign.align(tmp_path / "a.gguf", model, dequantise=False)
    assert wanted.keys() <= set(left_out.missing_keys)
    text = (tmp_path / "a.json").read_text().replace("GGUF Q4_0", "GGUF IQ4_NL")  # whose blocks are as long
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(PairMismatchError, match=r"takes codes for values"):
        autoalign.Alignment.read(tmp_path / "a.json").applied_to(tmp_path / "a.gguf", model)


@pytest.mark.parametrize("name", [*_GGUF.split(), "Q8_1"])
def test_every_encoding_has_the_values_of_its_package_or_is_left_out(tmp_path: Path, name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = np.random.default_rng(0).integers(0, 64, (3, 2 * size), dtype=np.uint8)
    write(tmp_path / "a.gguf", {"fc.weight": (rows, name), "norm.weight": (np.ones(64, np.float32), None)})
    target = {"fc.weight": torch.empty(3, 2 * block), "norm.weight": torch.empty(64)}
    alignment = autoalign.align(tmp_path / "a.gguf", target)
    if name == "Q8_1":
        assert alignment.missing_keys == ["fc.weight"]
        assert "Left out: 1 tensors quantised as GGUF Q8_1 (weight)" in " ".join(alignment.notes)
    else:
        wanted = torch.from_numpy(gguf.quants.dequantize(rows, kind))
        torch.testing.assert_close(alignment.state_dict()["fc.weight"], wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kept", [6, 30, 0.5, 0.99])
def test_truncated_file(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "a.gguf"
    write(path, {"a": (np.ones((300, 300), np.float32), None)})
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else int(kept)])
    with pytest.raises(CheckpointError, match="could not be read as a GGUF file"):
        open_checkpoint(path)


def test_a_large_file_whose_tensor_count_looks_like_json(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + ord("{").to_bytes(8, "little"))
    os.truncate(path, 2**34)  # to safetensors, a file with a header of 14 GB
    assert format_of(path) == "GGUF"


def test_tensors_that_overlap(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write(path, {"first": (np.ones(8, np.float32), None), "second": (np.ones(8, np.float32), None)})
    content = bytearray(path.read_bytes())
    place = content.index(b"second") + len("second") + 4 + 8 + 4  # after its name, dimensions and type
    assert int.from_bytes(content[place : place + 8], "little") == 32
    content[place : place + 8] = bytes(8)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="second overlaps what is before it"):
        open_checkpoint(path)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(20))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DependencyError, match=r"package gguf.*pip install 'autoalign\[formats\]'"):
        open_checkpoint(tmp_path / "a.gguf")
