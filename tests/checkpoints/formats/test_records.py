"""Files that name code of others: their tensors are read, and none of that code is looked up or run."""

from __future__ import annotations

import argparse
import datetime
import enum
import os
import sys
import zipfile
from collections import OrderedDict, defaultdict, deque
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autoalign
from autoalign.checkpoints.checkpoint import open_checkpoint
from autoalign.checkpoints.formats import records
from autoalign.errors import CheckpointError


class Kind(enum.Enum):
    SMALL = 1


class Config:
    def __init__(self) -> None:
        self.depth = 3


class Slotted:
    __slots__ = ("depth",)

    def __init__(self) -> None:
        self.depth = 3


class Settings(dict[str, object]):
    pass


class Called:
    def __reduce__(self) -> tuple[object, ...]:
        return sys.exit, ("it ran",)


class Wrapped(Tensor):
    """A tensor of another, as torchao's are."""

    @classmethod
    def __torch_dispatch__(cls, *_: object, **__: object) -> Any:
        raise NotImplementedError


def wrapped() -> Tensor:
    made: Tensor = Tensor._make_wrapper_subclass(Wrapped, (2,), dtype=torch.float32)
    return made


def state_dict() -> dict[str, Tensor]:
    return {"fc.weight": torch.arange(6.0).reshape(3, 2), "fc.bias": torch.ones(3, dtype=torch.bfloat16)}


both_formats = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])

VALUES: dict[str, tuple[object, str]] = {
    "namespace": (argparse.Namespace(lr=1.0), "argparse.Namespace"),
    "simple": (SimpleNamespace(a=1), "types.SimpleNamespace"),
    "path": (Path("/tmp"), "pathlib"),
    "date": (datetime.datetime(2020, 1, 1), "datetime.datetime"),
    "delta": (datetime.timedelta(1), "datetime.timedelta"),
    "enum": (Kind.SMALL, "test_records.Kind"),
    "own": (Config(), "test_records.Config"),
    "slots": (Slotted(), "test_records.Slotted"),
    "class": (Config, "test_records.Config"),
    "function": (os.getcwd, "posix.getcwd"),
    "partial": (partial(os.path.join, "a"), "functools.partial"),
    "call": (Called(), "sys.exit"),
    "texts": (np.array(["a", "b"]), "numpy.ndarray"),
    "subclass": (wrapped(), "test_records.Wrapped"),
    "generator": (torch.optim.SGD, "torch.optim.sgd.SGD"),
}


@both_formats
@pytest.mark.parametrize("name", VALUES)
def test_what_is_no_tensor_is_ignored_and_named(tmp_path: Path, name: str, legacy: bool) -> None:
    value, path = VALUES[name]
    saved = {"model": state_dict(), "more": {name: value}}
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    assert checkpoint.container == "model"
    for key, tensor in state_dict().items():
        assert torch.equal(checkpoint[key], tensor)
        assert checkpoint[key].dtype == tensor.dtype
    assert checkpoint.notes[0].startswith("The file names code of others, and none of it was run; ignored: ")
    assert path in checkpoint.notes[0]
    assert f" in 'more.{name}'" in checkpoint.notes[0]


@both_formats
def test_mappings_and_lists_of_other_classes_are_read_as_plain_ones(tmp_path: Path, legacy: bool) -> None:
    held = OrderedDict(state_dict())
    held._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    saved: dict[str, object] = {"epoch": np.float32(3), "log": defaultdict(list, loss=[1.0]), "last": deque([1, 2])}
    saved |= {"model": held, "mean": np.arange(6, dtype=">f4").reshape(2, 3), "config": Settings(heads=4, of={"a": 1})}
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(tmp_path / "a.pt", container="model")
    assert checkpoint.config == {"heads": 4, "of": {"a": 1}}
    assert checkpoint.state_metadata == {"": {"version": 1}}
    assert not checkpoint.notes
    assert checkpoint.root is not None
    assert checkpoint.root["epoch"] == 3.0
    assert checkpoint.root["log"] == {"loss": [1.0]}
    assert checkpoint.root["last"] == [1, 2]
    mean: Any = checkpoint.root["mean"]
    assert np.array_equal(mean, np.arange(6).reshape(2, 3))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 2, bias=False)
        self.head.weight = nn.Parameter(torch.ones(3, 2).T)
        self.tied = self.layers[0]
        self.register_buffer("passing", torch.ones(2), persistent=False)


@both_formats
@pytest.mark.parametrize("container", ["", "model"])
def test_a_whole_module_gives_its_state_dict(tmp_path: Path, container: str, legacy: bool) -> None:
    module = Network()
    saved: object = {"model": module, "epoch": 3} if container else module
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    assert list(checkpoint) == list(module.state_dict())
    other = Network()
    autoalign.load(other, tmp_path / "a.pt", strict=True)
    for key, tensor in module.state_dict().items():
        assert torch.equal(checkpoint[key], tensor)
        assert torch.equal(other.state_dict()[key], tensor)
    specs = {spec.key: spec.storage for spec in checkpoint.specs}
    assert specs["tied.weight"] == specs["layers.0.weight"] != specs["head.weight"]


@both_formats
def test_views_and_tied_tensors_are_as_torch_reads_them(tmp_path: Path, legacy: bool) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    saved = {"whole": whole, "part": whole[1:3, ::2], "turned": whole.T, "none": whole[:0], "one": torch.tensor(7)}
    saved |= {"parameter": nn.Parameter(whole.half()), "flag": torch.tensor([True, False])}
    options = {"_use_new_zipfile_serialization": not legacy}
    torch.save({"state_dict": saved, "cfg": Config()}, tmp_path / "a.pt", **options)
    torch.save(saved, tmp_path / "b.pt", **options)
    own, other = open_checkpoint(tmp_path / "a.pt"), open_checkpoint(tmp_path / "b.pt")
    for key, tensor in saved.items():
        assert torch.equal(own[key], tensor)
        assert (own[key].dtype, own[key].stride()) == (other[key].dtype, other[key].stride())
    assert own["whole"].untyped_storage().data_ptr() == own["part"].untyped_storage().data_ptr()


def test_views_that_are_negated_or_conjugated_are_as_torch_reads_them(tmp_path: Path) -> None:
    values = torch.tensor([1 + 2j, 3 - 4j])
    torch.save({"a": values.conj(), "b": values.clone().conj().imag}, tmp_path / "a.pt")  # a storage has one dtype
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    assert checkpoint["a"].tolist() == [1 - 2j, 3 + 4j]
    assert checkpoint["b"].tolist() == [-2, 4]


def test_a_tensor_of_a_file_is_saved_without_the_file(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": torch.ones(2**16)}, tmp_path / "a.pt")
    torch.save(open_checkpoint(tmp_path / "a.pt")["a"], tmp_path / "b.pt")
    assert (tmp_path / "b.pt").stat().st_size < 2**12


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_newer_protocols_are_read(tmp_path: Path, protocol: int) -> None:
    torch.save({"model": state_dict(), "args": Config()}, tmp_path / "a.pt", pickle_protocol=protocol)
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    assert torch.equal(checkpoint["fc.weight"], state_dict()["fc.weight"])


def test_a_damaged_file_is_still_called_so(tmp_path: Path) -> None:
    torch.save({"model": state_dict(), "args": Config()}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, b"" if info.filename.endswith("data/0") else old.read(info))
    with pytest.raises(CheckpointError, match=r"its pickle asks for .*Config"):
        open_checkpoint(tmp_path / "b.pt")


def test_names_without_end_are_refused() -> None:
    found = records.finder()
    for number in range(2**12):
        found("a", str(number))
    assert found("a", "1") is found("a", "1")
    with pytest.raises(ValueError, match=r"names more than 4,096 classes"):
        found("b", "1")
    assert found("torch", "float16") is torch.float16
    assert issubclass(records.finder()("torch", "_dynamo"), records.Stub)  # which getattr would import


def test_a_stub_does_nothing() -> None:
    stub = records.finder()("os", "system")("touch trace", option=1)
    assert stub.given == ("touch trace",)
    assert stub.path == "os.system"
