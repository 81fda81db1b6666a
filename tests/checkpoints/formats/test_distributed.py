from __future__ import annotations

import gzip
import io
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import autoalign
from autoalign.checkpoints.checkpoint import open_checkpoint
from autoalign.checkpoints.formats.distributed import write_distributed
from autoalign.errors import CheckpointError
from autoalign.plan.specs import TensorSpec

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 2)))


def saved(folder: Path) -> dict[str, Tensor]:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "half": torch.ones(2).half()}
    save(state, checkpoint_id=folder, no_dist=True)
    return model.state_dict()


def test_tensors_are_read_one_at_a_time_and_nested_as_they_were_saved(tmp_path: Path) -> None:
    expected = saved(tmp_path / "step1")
    checkpoint = open_checkpoint(tmp_path / "step1", container="model")
    assert list(checkpoint) == list(expected)
    for spec in checkpoint.specs:
        assert (spec.shape, spec.dtype) == (tuple(expected[spec.key].shape), expected[spec.key].dtype)
        assert torch.equal(checkpoint[spec.key], expected[spec.key])
    model = nn.Sequential(*network())
    assert autoalign.load(model, tmp_path / "step1", container="model", strict=True).coverage == 1


def test_a_flat_state_dict(tmp_path: Path) -> None:
    expected = network().state_dict()
    save(expected, checkpoint_id=tmp_path, no_dist=True)
    checkpoint = open_checkpoint(tmp_path)
    assert (list(checkpoint), checkpoint.container) == (list(expected), "")


def test_a_tensor_in_several_pieces(tmp_path: Path) -> None:
    save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(1, 3)}, checkpoint_id=tmp_path, no_dist=True)
    whole = read(tmp_path)
    first, second = metadata.MetadataIndex("a", (0, 0)), metadata.MetadataIndex("a", (2, 0))
    entry = whole.state_dict_metadata["a"]
    assert isinstance(entry, metadata.TensorStorageMetadata)
    entry.size = torch.Size((3, 3))
    entry.chunks.append(metadata.ChunkStorageMetadata(torch.Size((2, 0)), torch.Size((1, 3))))
    whole.storage_data[second] = whole.storage_data[metadata.MetadataIndex("b", (0, 0))]
    write(tmp_path, whole)
    assert open_checkpoint(tmp_path)["a"].tolist() == [[0, 1, 2], [3, 4, 5], [0, 0, 0]]
    del whole.storage_data[first]
    write(tmp_path, whole)
    with pytest.raises(CheckpointError, match=r"could not be read as a folder of torch.distributed.checkpoint"):
        open_checkpoint(tmp_path)


def read(folder: Path) -> metadata.Metadata:
    found = pickle.loads((folder / ".metadata").read_bytes())
    assert isinstance(found, metadata.Metadata)
    return found


def write(folder: Path, changed: object) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(changed))


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.mkdir, (self.path,)


def test_code_in_metadata_does_not_run(tmp_path: Path) -> None:
    saved(tmp_path)
    changed = read(tmp_path)
    changed.planner_data = Attack(tmp_path / "trace")
    write(tmp_path, changed)
    with pytest.raises(CheckpointError, match="there is no mapping where one should be"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "trace").exists()


def test_metadata_are_read_without_the_code_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes as long to be imported as all else that ``inspect`` does."""
    saved(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.distributed.checkpoint", None)
    assert "0.weight" in open_checkpoint(tmp_path, container="model")


def test_metadata_of_torch_2_2(tmp_path: Path) -> None:
    """Which had the class of properties in another module."""
    saved(tmp_path)
    file = tmp_path / ".metadata"
    content = pickle.dumps(pickle.loads(file.read_bytes()), protocol=2)
    here, there = b"checkpoint.metadata\nTensorProperties", b"_shard.sharded_tensor.metadata\nTensorProperties"
    assert here in content
    file.write_bytes(content.replace(here, there))
    assert len(open_checkpoint(tmp_path)) == 9


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"relative_path": "../other"}, "is in '../other', which is not in the folder"),
        ({"relative_path": "/etc/passwd"}, "is in '/etc/passwd', which is not in the folder"),
        ({"relative_path": "other"}, "is in 'other', which is missing"),
        ({"offset": -1}, "bytes at -1 of"),
        ({"offset": 2**40}, "bytes at 1099511627776 of"),
        ({"length": 2**40}, "has 1099511627776 bytes at"),
        ({"length": 3}, "has 3 bytes at"),
    ],
)
def test_pieces_that_are_not_there(tmp_path: Path, change: dict[str, object], problem: str) -> None:
    save({"a": torch.ones(2, 3)}, checkpoint_id=tmp_path, no_dist=True)
    changed = read(tmp_path)
    ((index, place),) = changed.storage_data.items()
    fields = {"relative_path": place.relative_path, "offset": place.offset, "length": place.length} | change
    changed.storage_data = {index: filesystem._StorageInfo(**fields)}
    write(tmp_path, changed)
    with pytest.raises(CheckpointError, match=problem):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("size", [(2**40, 3), (-2, 3), (3, 3)])
def test_shapes_that_the_pieces_do_not_make_up(tmp_path: Path, size: tuple[int, ...]) -> None:
    save({"a": torch.ones(2, 3)}, checkpoint_id=tmp_path, no_dist=True)
    changed = read(tmp_path)
    entry = changed.state_dict_metadata["a"]
    assert isinstance(entry, metadata.TensorStorageMetadata)
    entry.size = torch.Size(size)
    write(tmp_path, changed)
    with pytest.raises(CheckpointError, match=r"could not be read as a folder of torch.distributed.checkpoint"):
        open_checkpoint(tmp_path)


def test_a_piece_that_is_damaged(tmp_path: Path) -> None:
    save({"a": torch.ones(2, 3)}, checkpoint_id=tmp_path, no_dist=True)
    (file,) = tmp_path.glob("*.distcp")
    file.write_bytes(bytes(file.stat().st_size))
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"could not be read as a folder of torch.distributed.checkpoint"):
        checkpoint["a"]


def test_an_index_in_the_pickle_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"\x80\x02}r\xff\xff\xff\xff.")
    with pytest.raises(CheckpointError, match="there is no Metadata where one should be"):
        open_checkpoint(tmp_path)


def test_only_the_pieces_of_a_region_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(1, 3)}, checkpoint_id=tmp_path, no_dist=True)
    whole = read(tmp_path)
    entry = whole.state_dict_metadata["a"]
    assert isinstance(entry, metadata.TensorStorageMetadata)
    entry.size = torch.Size((3, 3))
    entry.chunks.append(metadata.ChunkStorageMetadata(torch.Size((2, 0)), torch.Size((1, 3))))
    whole.storage_data[metadata.MetadataIndex("a", (2, 0))] = whole.storage_data[metadata.MetadataIndex("b", (0, 0))]
    write(tmp_path, whole)
    checkpoint = open_checkpoint(tmp_path)
    pieces: list[int] = []
    loaded = torch.load

    def counted(*arguments: Any, **options: Any) -> Any:
        pieces.append(1)
        return loaded(*arguments, **options)

    monkeypatch.setattr(torch, "load", counted)
    assert checkpoint.region("a", ((1, 1), (1, 2))).tolist() == [[4, 5]]
    assert len(pieces) == 1
    assert checkpoint.region("a", ((1, 2), (1, 2))).tolist() == [[4, 5], [0, 0]]
    assert len(pieces) == 3


SPECS = [TensorSpec("a.weight", (2, 3), torch.bfloat16), TensorSpec("a.count", (), torch.int64)]


def test_a_folder_is_written_tensor_by_tensor(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(2, 3).bfloat16(), "a.count": torch.tensor(3)}
    asked: list[str] = []
    write_distributed(tmp_path / "step", SPECS, lambda key: asked.append(key) or tensors[key])  # type: ignore[func-returns-value]
    assert sorted(asked) == ["a.count", "a.weight"]
    checkpoint = open_checkpoint(tmp_path / "step")
    assert {key: tensor.tolist() for key, tensor in checkpoint.items()} == {k: t.tolist() for k, t in tensors.items()}
    into = {"a.weight": torch.zeros(2, 3).bfloat16(), "a.count": torch.tensor(0)}
    load(into, checkpoint_id=tmp_path / "step", no_dist=True)  # as torch reads it
    assert torch.equal(into["a.weight"], tensors["a.weight"])
    with pytest.raises(CheckpointError, match=r"is not an empty folder. Nothing was written"):
        write_distributed(tmp_path / "step", SPECS, tensors.__getitem__)


@pytest.mark.parametrize("given", [torch.ones(3, 2).bfloat16(), torch.ones(2, 3)])
def test_what_was_not_announced_is_not_written(tmp_path: Path, given: Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"a.weight \[2, 3\] bfloat16 was announced, and"):
        write_distributed(tmp_path / "step", SPECS[:1], lambda _: given)
    with pytest.raises(CheckpointError, match=r"None of its own is a checkpoint"):
        open_checkpoint(tmp_path / "step")


def replace_piece(folder: Path, content: bytes, *transforms: str) -> None:
    """Put another content in the place of the one piece of a folder."""
    (file,) = folder.glob("*.distcp")
    file.write_bytes(content)
    changed = read(folder)
    ((index, _),) = changed.storage_data.items()
    place = filesystem._StorageInfo(file.name, 0, len(content), transforms or None)
    changed.storage_data = {index: place}
    write(folder, changed)


def piece(value: Tensor, *, compressed: bool = False) -> bytes:
    stream, packed = io.BytesIO(), io.BytesIO()
    torch.save(value, stream)
    if not compressed:
        return stream.getvalue()
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return packed.getvalue()


def nested() -> bytes:
    """Make a pickle with a key that takes 2**40 steps to be hashed."""
    content = b"\x80\x02)q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(40)) + b"}h\x28K\x01s."
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, value in (("data.pkl", content), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(f"a/{name}", value)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            piece(torch.zeros(2**12), compressed=True),
            r"is a compressed zip file, as torch writes none, of 16\d\d\d bytes",
        ),
        (nested(), r"values that refer to each other so often"),
        (b"\x80\x02}." * 20, r"two different zip files"),
    ],
)
def test_pieces_are_looked_at_before_they_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, problem: str
) -> None:
    save({"a": torch.ones(2, 3)}, checkpoint_id=tmp_path, no_dist=True)
    replace_piece(tmp_path, content)
    checkpoint = open_checkpoint(tmp_path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(CheckpointError, match=problem):
        checkpoint["a"]


def test_compressed_pieces_are_unpacked_up_to_the_size_of_their_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpacked(_self: object, _item: object, _descriptors: object, stream: Any) -> Any:
        return gzip.GzipFile(fileobj=stream) if isinstance(stream, io.RawIOBase) else stream

    monkeypatch.setattr(filesystem._StorageReaderTransforms, "transform_load_stream", unpacked)
    save({"a": torch.ones(2, 3)}, checkpoint_id=tmp_path, no_dist=True)
    replace_piece(tmp_path, gzip.compress(piece(torch.full((2, 3), 2.0))), "stream.gzip/1")
    assert open_checkpoint(tmp_path)["a"].tolist() == [[2, 2, 2], [2, 2, 2]]
    replace_piece(tmp_path, gzip.compress(piece(torch.zeros(2**20))), "stream.gzip/1")
    with pytest.raises(CheckpointError, match=r"a piece of a tensor of 24 bytes is larger when unpacked"):
        open_checkpoint(tmp_path)["a"]


def test_the_pieces_have_one_budget(tmp_path: Path) -> None:
    """Many pieces may be the same part of a file, which is read for each of them."""
    count = 2**12
    save({"a": torch.ones(1, 1), "b": torch.ones(2**12)}, checkpoint_id=tmp_path, no_dist=True)
    changed = read(tmp_path)
    entry = changed.state_dict_metadata["a"]
    assert isinstance(entry, metadata.TensorStorageMetadata)
    entry.size = torch.Size((count, 1))
    places = [torch.Size((number, 0)) for number in range(count)]
    entry.chunks = [metadata.ChunkStorageMetadata(place, torch.Size((1, 1))) for place in places]
    whole = changed.storage_data[metadata.MetadataIndex("b", (0,))]
    changed.storage_data |= {metadata.MetadataIndex("a", place): whole for place in places}
    write(tmp_path, changed)
    with pytest.raises(CheckpointError, match=r"reading it would take more than [\d,]+ steps"):
        open_checkpoint(tmp_path)


def test_a_folder_of_thousands_of_tensors(tmp_path: Path) -> None:
    """Each has a key of its own in the index, whose hash is that of its fields."""
    state_dict = {f"layers.{i}.weight": torch.full((2,), float(i)) for i in range(6000)}
    autoalign.convert(state_dict, state_dict, tmp_path / "dcp", format="dcp")
    read = autoalign.open_checkpoint(tmp_path / "dcp")
    assert len(read) == 6000
    assert torch.equal(read["layers.5999.weight"], state_dict["layers.5999.weight"])
