from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoalign.checkpoints.checkpoint import open_checkpoint
from autoalign.errors import CheckpointError, DependencyError

msgpack: Any = pytest.importorskip("msgpack")


def packed_array(values: Any, name: str | None = None) -> Any:
    values = np.asarray(values)
    return msgpack.ExtType(1, msgpack.packb((values.shape, name or values.dtype.name, values.tobytes())))


def variables() -> dict[str, Any]:
    return {
        "params": {
            "Conv_0": {"kernel": packed_array(np.arange(18, dtype=np.float32).reshape(3, 3, 2))},
            "BatchNorm_0": {"scale": packed_array(np.ones(2, np.float16)), "bias": packed_array(np.zeros(2))},
        },
        "batch_stats": {"BatchNorm_0": {"mean": packed_array(np.zeros(2)), "var": packed_array(np.ones(2))}},
    }


@pytest.mark.parametrize("suffix", [".msgpack", ".bin", ""])
def test_variables_are_one_state_dict(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"flax_model{suffix}"
    step = msgpack.ExtType(3, packed_array(np.int64(7)).data)
    path.write_bytes(msgpack.packb({"step": step, **variables(), "phase": msgpack.ExtType(2, msgpack.packb((1, 2)))}))
    checkpoint = open_checkpoint(path)
    assert [str(spec) for spec in checkpoint.specs] == [
        "step [] int64",
        "params.Conv_0.kernel [3, 3, 2] float32",
        "params.BatchNorm_0.scale [2] float16",
        "params.BatchNorm_0.bias [2] float64",
        "batch_stats.BatchNorm_0.mean [2] float64",
        "batch_stats.BatchNorm_0.var [2] float64",
    ]
    assert checkpoint["params.Conv_0.kernel"].tolist() == np.arange(18.0).reshape(3, 3, 2).tolist()
    assert checkpoint["step"].item() == 7
    assert checkpoint.extras["phase"] == 1 + 2j


def test_parameters_alone(tmp_path: Path) -> None:
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack.packb(variables()["params"]))
    assert next(iter(open_checkpoint(tmp_path / "flax_model.msgpack"))) == "Conv_0.kernel"


def test_bfloat16_and_empty_arrays_are_read(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    saved = {"a": packed_array(values.view(torch.int16).numpy(), "bfloat16"), "b": packed_array(np.zeros((0, 3)))}
    (tmp_path / "a").write_bytes(msgpack.packb(saved))
    checkpoint = open_checkpoint(tmp_path / "a")
    assert torch.equal(checkpoint["a"], values)
    assert checkpoint["b"].shape == (0, 3)


def test_large_arrays_in_pieces_are_joined(tmp_path: Path) -> None:
    values = np.arange(10.0)
    pieces = {"0": packed_array(values[:4]), "1": packed_array(values[4:8]), "2": packed_array(values[8:])}
    chunked = {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 5}, "chunks": pieces}
    (tmp_path / "a").write_bytes(msgpack.packb({"params": {"kernel": chunked, "bias": packed_array(values)}}))
    assert open_checkpoint(tmp_path / "a")["kernel"].tolist() == values.reshape(2, 5).tolist()
    chunked["shape"]["0"] = 3  # type: ignore[index]
    (tmp_path / "a").write_bytes(msgpack.packb({"params": {"kernel": chunked}}))
    with pytest.raises(CheckpointError, match=r"an array of shape \(3, 5\) in pieces of other sizes"):
        open_checkpoint(tmp_path / "a")


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (msgpack.ExtType(1, msgpack.packb(((2**40,), "float32", b"1234"))), "in 4 bytes"),
        (msgpack.ExtType(1, msgpack.packb(((-1, -1), "float32", b"1234"))), "shape"),
        (msgpack.ExtType(1, msgpack.packb(((1,), "object", b"12345678"))), "dtype object in 8 bytes"),
        (msgpack.ExtType(9, b""), "an extension of code 9"),
    ],
)
def test_arrays_that_are_none(tmp_path: Path, array: Any, problem: str) -> None:
    (tmp_path / "a").write_bytes(msgpack.packb({"weight": array}))
    with pytest.raises(CheckpointError, match=f"could not be read as a msgpack file of Flax .*{problem}"):
        open_checkpoint(tmp_path / "a")


def test_two_entries_of_one_name(tmp_path: Path) -> None:
    entry = msgpack.packb("weight") + msgpack.packb(packed_array(np.ones(2)))
    (tmp_path / "a").write_bytes(b"\x82" + entry + entry)
    with pytest.raises(CheckpointError, match=r"it lists 'weight' twice"):
        open_checkpoint(tmp_path / "a")


def test_truncated_file(tmp_path: Path) -> None:
    content = msgpack.packb(variables())
    (tmp_path / "a").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="could not be read as a msgpack file of Flax"):
        open_checkpoint(tmp_path / "a")


def test_mappings_without_end(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\x81\xa6weight" * 10_000 + b"\x01")
    with pytest.raises(CheckpointError, match="could not be read as a msgpack file of Flax"):
        open_checkpoint(tmp_path / "a")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(msgpack.packb(variables()))
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(DependencyError, match=r"package msgpack.*pip install 'autoalign\[formats\]'"):
        open_checkpoint(tmp_path / "a")
