"""Files that the field's own quantisers wrote are loaded as the values that their own libraries make of them.

``written/`` holds one of each, see ``writing.py``; ``versions.json`` names the libraries' versions. What a library that
is installed writes today is tried as well.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import autoalign
from tests.checkpoints.formats.writing import WRITERS, WRITTEN, save
from tests.checkpoints.formats.writing_containers import ARCHIVE, HIDDEN, LAYERS, WIDTH

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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_today(name: str, tmp_path: Path) -> None:
    try:
        found = WRITERS[name][1]()
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


@pytest.mark.parametrize("parts", [1, 2])
def test_layers_of_a_pipeline_of_deepspeed(parts: int, tmp_path: Path) -> None:
    shutil.copytree(WRITTEN / f"layers-{parts}", tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": WIDTH}))  # as GPT-NeoX has it beside them
    model = nn.Sequential(
        *(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)) for _ in range(3))
    )
    autoalign.load(model, tmp_path, strict=True)
    assert_filled(model, LAYERS)


def assert_filled(model: nn.Module, wanted: dict[str, torch.Tensor]) -> None:
    filled = [tensor for key, tensor in model.state_dict().items() if "tracked" not in key]
    assert all(torch.equal(tensor, own) for tensor, own in zip(filled, wanted.values(), strict=True))
