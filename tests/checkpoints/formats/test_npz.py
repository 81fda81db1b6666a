from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import autoalign
from autoalign.checkpoints.checkpoint import open_checkpoint
from autoalign.errors import CheckpointError, InputError
from autoalign.plan.specs import TensorSpec

KERNEL = "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"


@pytest.mark.parametrize("suffix", [".npz", ".pt", ""])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_known_by_content_and_keep_their_names_and_order(tmp_path: Path, suffix: str, save: object) -> None:
    arrays: dict[str, np.ndarray] = {
        KERNEL: np.arange(6, dtype=np.float32).reshape(2, 3),
        "cls": np.zeros((1, 1, 3), np.float16),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "swapped": np.arange(3, dtype=">i4"),
        "step": np.array(7),
        "empty": np.zeros((0, 4), bool),
    }
    path = tmp_path / f"model{suffix}"
    with path.open("wb") as stream:
        save(stream, **arrays)  # type: ignore[operator]
    checkpoint = open_checkpoint(path)
    assert list(checkpoint) == list(arrays)
    assert checkpoint.specs[0] == TensorSpec(KERNEL, (2, 3), torch.float32)
    assert checkpoint.notes == ()
    for spec in checkpoint.specs:
        tensor = checkpoint[spec.key]
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype)
        assert tensor.tolist() == arrays[spec.key].tolist()


def test_arrays_load_into_a_model(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"fc/weight": np.ones((2, 3), np.float32), "fc/bias": np.zeros(2, np.float32)}
    np.savez(tmp_path / "a.npz", **arrays)
    model = torch.nn.Linear(3, 2)
    autoalign.load(model, tmp_path / "a.npz", strict=True, rules={"^fc/": ""})
    assert model.weight.tolist() == [[1.0] * 3] * 2


def test_nameless_bytes_are_bfloat16(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -2.0, 3e38], dtype=torch.bfloat16)
    np.savez(tmp_path / "a.npz", a=values.view(torch.uint16).numpy().view("V2"), b=np.zeros((), "V2"))
    checkpoint = open_checkpoint(tmp_path / "a.npz")
    assert [spec.dtype for spec in checkpoint.specs] == [torch.bfloat16, torch.bfloat16]
    assert torch.equal(checkpoint["a"], values)
    assert checkpoint["b"].item() == 0


def test_opening_reads_no_tensor_data(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, a=np.ones(50_000), b=np.ones(3))
    damaged = bytearray(path.read_bytes())
    damaged[200_000] ^= 1
    path.write_bytes(damaged)
    checkpoint = open_checkpoint(path)
    assert checkpoint["b"].tolist() == [1.0] * 3
    with pytest.raises(CheckpointError, match=r"could not be read as a file of numpy \(BadZipFile: Bad CRC-32"):
        checkpoint["a"]


class Attack:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_pickled_arrays_are_left_out_and_no_code_runs(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    objects = np.array([Attack(trace)], dtype=object)
    np.savez(tmp_path / "a.npz", objects=objects, names=np.array(["x"]), weight=np.ones(2))
    checkpoint = open_checkpoint(tmp_path / "a.npz")
    assert list(checkpoint) == ["weight"]
    (note,) = checkpoint.notes
    assert note.startswith("2 arrays of the file (objects: objects, which only unpickling would give")
    assert "names: dtype <U1, which torch does not have" in note
    np.savez(tmp_path / "b.npz", params=objects)
    with pytest.raises(
        CheckpointError, match=r"holds nothing but 1 arrays of the file \(params: objects.*Save plain arrays"
    ):
        open_checkpoint(tmp_path / "b.npz")
    assert not trace.exists()


def header(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue()


@pytest.mark.parametrize("shape", [(2**40,), (2**62, 8), (0, 2**70), (1,)])
def test_a_header_that_announces_other_bytes_than_there_are(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", header(shape) + bytes(8))
    with pytest.raises(CheckpointError, match="could not be read as a file of numpy"):
        open_checkpoint(path)


def test_a_bomb_is_opened_without_being_unpacked(tmp_path: Path) -> None:
    path, count = tmp_path / "a.npz", 2**24
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as member:
        member.write(header((2**20, count // 2**20)) + bytes(4 * count))
    assert path.stat().st_size < 2**18
    assert open_checkpoint(path).specs[0].shape == (2**20, 16)
    # and a header that never ends
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as member:
        member.write(b"\x93NUMPY\x02\x00" + (2**28).to_bytes(4, "little") + bytes(2**26))
    with pytest.raises(CheckpointError, match="could not be read as a file of numpy"):
        open_checkpoint(path)


def test_two_arrays_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", header((2,)) + bytes(8))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.npy", header((2,)) + bytes(8))
    with pytest.raises(CheckpointError, match="has two arrays 'a'"):
        open_checkpoint(path)


@pytest.mark.parametrize("kept", [0.3, 0.95])
def test_truncated_file(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, a=np.ones(2000), b=np.ones(50))
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"could not be read as a file of numpy .* It may be truncated"):
        open_checkpoint(path)


def test_there_are_no_containers(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.ones(2))
    with pytest.raises(CheckpointError, match="is a flat npz file without containers, such as 'ema'"):
        open_checkpoint(tmp_path / "a.npz", container="ema")


def test_an_array_without_a_counterpart_in_torch_in_a_mapping() -> None:
    with pytest.raises(InputError, match="Convert the array first"):
        autoalign.align({"a": np.zeros(2, np.longdouble)}, {"a": torch.zeros(2)})


def test_long_headers_are_within_a_budget(tmp_path: Path) -> None:
    start = b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little")
    header = start + b"{'descr': '<f4', 'fortran_order': False, 'shape': (0,)}".ljust(8999) + b"\n"
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(1100):
            archive.writestr(f"{number}.npy", header)
    with pytest.raises(CheckpointError, match=r"reading it would take more than [\d,]+ steps"):
        open_checkpoint(tmp_path / "a.npz")
