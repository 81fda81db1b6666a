from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoalign.checkpoints.checkpoint import open_checkpoint
from autoalign.checkpoints.formats import records
from autoalign.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 3)
        self.head.weight = self.body[0].weight  # type: ignore[assignment]
        self.scale = nn.Parameter(torch.randn(2, 3).half().t())
        self.register_buffer("empty", torch.zeros(0, 4))
        self.steps = [1, 2]
        self.names = {"a": 1}

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(inputs)) * self.steps[0] + self.names["a"]
        return outputs


def save(module: nn.Module, path: Path) -> None:
    save_module: Any = torch.jit.save
    save_module(torch.jit.script(module), path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ""])
def test_the_state_dict_is_read(tmp_path: Path, suffix: str) -> None:
    network, path = Network(), tmp_path / f"script{suffix}"
    save(network, path)
    checkpoint = open_checkpoint(path)
    expected = network.state_dict()
    assert checkpoint.keys() == expected.keys()
    for spec in checkpoint.specs:
        tensor = checkpoint[spec.key]
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype)
        assert torch.equal(tensor, expected[spec.key])


def test_a_traced_module_is_read(tmp_path: Path) -> None:
    network = Network().eval()
    trace: Any = torch.jit.trace
    torch.jit.save(trace(network, torch.ones(1, 3)), tmp_path / "a.pt")
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    assert torch.equal(checkpoint["head.weight"], network.head.weight)


def rewritten(source: Path, target: Path, member: str, content: bytes) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, content if info.filename.endswith(member) else old.read(info))


def test_code_is_never_run(tmp_path: Path) -> None:
    save(Network(), tmp_path / "a.pt")
    attack = b"cposix\nmkdir\n(X" + len(os.fsencode(tmp_path / "trace")).to_bytes(4, "little")
    attack += os.fsencode(tmp_path / "trace") + b"tR."
    rewritten(tmp_path / "a.pt", tmp_path / "b.pt", "/data.pkl", attack)
    with pytest.raises(CheckpointError, match="could not be read as a TorchScript archive"):
        open_checkpoint(tmp_path / "b.pt")
    assert not (tmp_path / "trace").exists()


def test_a_missing_record(tmp_path: Path) -> None:
    save(Network(), tmp_path / "a.pt")
    rewritten(tmp_path / "a.pt", tmp_path / "b.pt", "/data/0", b"")
    with pytest.raises(CheckpointError, match=r"a tensor \[3, 2\] is not within its record"):
        open_checkpoint(tmp_path / "b.pt")


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self.weight = state[0]  # type: ignore[assignment]
        self.training = state[1]


def test_a_state_of_its_own_making_is_refused(tmp_path: Path) -> None:
    save(nn.Sequential(Packed()), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"The module '0' has a state that only its code can"):
        open_checkpoint(tmp_path / "a.pt")


def test_a_pickle_in_capitals_is_no_other_format(tmp_path: Path) -> None:
    """Torch finds its records in any case, and versions before 2.6 run the code of such a file."""
    network = Network()
    save(network, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for info in old.infolist():
            new.writestr(info.filename.replace("data.pkl", "DATA.PKL"), old.read(info))
    assert torch.equal(open_checkpoint(tmp_path / "b.pt")["scale"], network.scale)


def test_compressed_tensors_are_not_unpacked(tmp_path: Path) -> None:
    save(Network(), tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            packed = zipfile.ZIP_DEFLATED if "/data/" in info.filename else zipfile.ZIP_STORED
            new.writestr(info.filename, old.read(info), packed)
    with pytest.raises(CheckpointError, match=r"is not within its record"):
        open_checkpoint(tmp_path / "b.pt")


def test_a_part_of_a_record(tmp_path: Path) -> None:
    module = nn.Module()
    module.register_buffer("part", torch.arange(2.0**12)[7:9])
    save(module, tmp_path / "a.pt")
    assert open_checkpoint(tmp_path / "a.pt")["part"].tolist() == [7, 8]


@pytest.mark.parametrize("shape", [(0, -5), (2**63, 1), (True, 1), (1,)], ids=str)
def test_a_view_of_an_impossible_shape_is_refused(shape: tuple[int, ...]) -> None:
    storage = records.Storage(torch.float32, "0")
    with pytest.raises(ValueError, match=r"a tensor (of shape|without a storage)"):
        records._view(storage, 0, shape, (1, 1))
