"""Archives with checkpoints in them are opened as mappings of these, whatever else they hold."""

from __future__ import annotations

import errno
import gc
import gzip
import io
import json
import shutil
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

import autoalign
from autoalign.checkpoints.checkpoint import open_checkpoint
from autoalign.errors import CheckpointError
from tests.checkpoints.formats.test_damage import (
    write_gguf,
    write_legacy,
    write_msgpack,
    write_npz,
    write_safetensors,
    write_script,
    write_zip,
)
from tests.checkpoints.formats.test_deepspeed import write_zero
from tests.checkpoints.formats.test_megatron import write_layers


def policy() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"pi": nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8)), "value": nn.Linear(8, 1)})


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def write_stable_baselines(path: Path) -> None:
    """As its save_to_zip_file does."""
    model = policy()
    optimizer = torch.optim.Adam(model.parameters())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", "{}")
        archive.writestr("pytorch_variables.pth", saved({}))
        archive.writestr("policy.pth", saved(model.state_dict()))
        archive.writestr("policy.optimizer.pth", saved(optimizer.state_dict()))
        archive.writestr("_stable_baselines3_version", "2.3.0")


def write_nemo(path: Path, mode: str = "w:") -> None:
    """As its SaveRestoreConnector does: paths that begin with a dot, in a tar archive that may be packed."""
    files = {"./model_config.yaml": b"target: x", "./model_weights.ckpt": saved(policy().state_dict())}
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def write_packed_nemo(path: Path) -> None:
    write_nemo(path, "w:gz")


def write_zip_of_safetensors(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("run/model.safetensors", save(dict(policy().state_dict())))


PACKED = (write_packed_nemo, write_zip_of_safetensors)
PLAIN = (write_gguf, write_legacy, write_msgpack, write_npz, write_safetensors, write_script, write_zip)
WRITERS = (write_stable_baselines, write_nemo, *PACKED)


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others that test at once have theirs."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))


def temporary() -> set[str]:
    return {path.name for path in Path(tempfile.gettempdir()).glob("autoalign-*")}


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_the_model_in_an_archive_is_loaded(tmp_path: Path, write: object) -> None:
    assert callable(write)
    before = temporary()
    write(tmp_path / "a")
    model = policy()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    alignment = autoalign.load(model, tmp_path / "a", strict=True)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in policy().state_dict().items())
    assert all(torch.equal(tensor, policy().state_dict()[key]) for key, tensor in alignment.state_dict().items())
    assert len(temporary() - before) == (write in PACKED)
    del alignment
    gc.collect()
    assert temporary() == before


def test_an_archive_without_a_checkpoint_is_called_so(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights", b"x")
    with pytest.raises(CheckpointError, match=r"an archive, and none of its 2 files .*'model.weights'.* Unpack it"):
        open_checkpoint(tmp_path / "a.zip")


def test_the_configuration_in_an_archive_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("config.json", '{"heads": 4}')
        archive.writestr("model.pt", saved(policy().state_dict()))
    assert open_checkpoint(tmp_path / "a.zip").config == {"heads": 4}


@pytest.mark.parametrize("name", ["model.nemo", "model.ckpt"])
def test_one_archive_in_an_archive_is_opened_and_none_in_that(tmp_path: Path, name: str) -> None:
    write_nemo(tmp_path / "a.nemo")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.write(tmp_path / "a.nemo", name)
    outer, inner = (open_checkpoint(tmp_path / each) for each in ("b.zip", "a.nemo"))
    gc.collect()
    assert outer.keys() == inner.keys()
    assert all(torch.equal(outer[key], inner[key]) for key in inner)
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.write(tmp_path / "b.zip", "b.zip")
    with pytest.raises(CheckpointError, match="It holds archives in archives, which are not opened"):
        open_checkpoint(tmp_path / "c.zip")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_that_grows_endlessly_is_refused(tmp_path: Path, kind: str) -> None:
    before, size = temporary(), 2**28
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "a", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("model.ckpt", bytes(size))
    else:
        with tarfile.open(tmp_path / "a", "w:gz") as packed:
            info = tarfile.TarInfo("model.ckpt")
            info.size = size
            packed.addfile(info, io.BytesIO(bytes(size)))
    with pytest.raises(CheckpointError, match=r"times larger when it is unpacked"):
        open_checkpoint(tmp_path / "a")
    gc.collect()
    assert temporary() == before


@pytest.mark.parametrize("write", PACKED, ids=lambda write: write.__name__)
def test_a_full_disk_is_no_damaged_archive(
    tmp_path: Path, write: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = temporary()
    write(tmp_path / "a")
    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(CheckpointError, match=r"no room for a copy .* Nothing was read. Set TMPDIR"):
        open_checkpoint(tmp_path / "a")
    gc.collect()
    assert temporary() == before


def test_a_compressed_file_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.pt.gz").write_bytes(gzip.compress(saved(policy().state_dict())))
    with pytest.raises(CheckpointError, match=r"is compressed, and what is in it is not a tar archive .* Unpack it"):
        open_checkpoint(tmp_path / "a.pt.gz")


def test_several_models_are_containers(tmp_path: Path) -> None:
    def state(value: float) -> dict[str, Tensor]:
        return {"fc.weight": torch.full((2, 2), value), "fc.bias": torch.zeros(2)}

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("one/model.pt", saved(state(1)))
        archive.writestr("two/model.pt", saved(state(2)))
    checkpoint = open_checkpoint(tmp_path / "a.zip", container="two/model.pt")
    assert checkpoint["fc.weight"][0, 0] == 2


def sharded(folder: Path) -> None:
    save_torch_state_dict(policy().state_dict(), folder, max_shard_size=128)


def distributed(folder: Path) -> None:
    save_distributed({"model": policy().state_dict()}, checkpoint_id=folder, no_dist=True)


def zero(folder: Path) -> None:
    write_zero(folder, 3)


def layers(folder: Path) -> None:
    write_layers(folder, 2)
    (folder / "config.json").write_text('{"hidden_size": 8}')


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar", "bztar", "xztar"])
@pytest.mark.parametrize("write", [sharded, distributed, zero, layers])
@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_folder_in_an_archive_is_one_checkpoint(tmp_path: Path, write: Callable[[Path], None], kind: str) -> None:
    (tmp_path / "a" / "run").mkdir(parents=True)
    write(tmp_path / "a" / "run")
    archive = shutil.make_archive(str(tmp_path / "packed"), kind, tmp_path / "a")
    wanted, checkpoint = open_checkpoint(tmp_path / "a" / "run"), open_checkpoint(archive)
    assert list(checkpoint) == list(wanted)
    assert all(torch.equal(checkpoint[key], wanted[key]) for key in wanted)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("place", ["tar", "a", "aa", "aaa", "aaaa"])  # of which three are not aligned in a zip file
@pytest.mark.parametrize("write", PLAIN, ids=lambda write: write.__name__)
def test_files_are_read_where_they_stand(tmp_path: Path, write: Callable[[Path], Path], place: str) -> None:
    file, before = write(tmp_path), temporary()
    archive = tmp_path / "archive"
    if place == "tar":
        with tarfile.open(archive, "w") as packed:
            packed.add(file, "model.pt")
    else:
        with zipfile.ZipFile(archive, "w") as zipped:
            zipped.write(file, f"{place}.pt")
    wanted, checkpoint = open_checkpoint(file), open_checkpoint(archive)
    assert list(checkpoint) == list(wanted)
    for key, tensor in wanted.items():
        assert checkpoint[key].dtype == tensor.dtype
        assert checkpoint[key].data_ptr() % tensor.dtype.itemsize == 0
        assert torch.equal(checkpoint[key], tensor)
        part = tuple((size // 2, size - size // 2) for size in tensor.shape)
        assert torch.equal(checkpoint.region(key, part), wanted.region(key, part))
    is_copied = write is write_gguf  # whose library opens paths alone
    assert len(temporary() - before) <= is_copied  # a copy goes as soon as nothing opens it again
    assert any("were copied out of it first" in note for note in checkpoint.notes) == is_copied


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_hundred_gigabytes_open_at_once(tmp_path: Path, kind: str) -> None:
    size, entry = 10**11, {"dtype": "BF16", "shape": [5, 10**10], "data_offsets": [0, 10**11]}
    header = json.dumps({"fc.weight": entry}).encode()
    start = len(header).to_bytes(8, "little") + header
    with (tmp_path / "a").open("wb") as stream:
        if kind == "tar":
            info = tarfile.TarInfo("model.safetensors")
            info.size = len(start) + size
            stream.write(info.tobuf(tarfile.GNU_FORMAT) + start)
        else:
            member = zipfile.ZipInfo("model.safetensors")
            member.file_size = member.compress_size = len(start) + size
            member.CRC = member.header_offset = 0
            stream.write(member.FileHeader(zip64=True) + start)
        stream.seek(size - 2, io.SEEK_CUR)
        stream.write(b"\x80\x3f")  # one
        if kind == "tar":
            stream.truncate(-(-stream.tell() // 512) * 512 + 1024)
        else:
            archive: Any = zipfile.ZipFile(stream, "w")
            archive.filelist, archive.start_dir, archive._didModify = [member], stream.tell(), True
            archive.close()
    if (tmp_path / "a").stat().st_blocks > 2**12:
        pytest.skip("the file system keeps no holes")
    begin = time.process_time()
    checkpoint = open_checkpoint(tmp_path / "a")
    assert checkpoint.region("fc.weight", ((4, 1), (10**10 - 2, 2))).tolist() == [[0, 1]]
    assert time.process_time() - begin < 1


def test_members_of_one_name_and_of_names_that_lead_elsewhere(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("../model.pt", saved({"a.weight": torch.ones(1)}))
        archive.writestr("/b/model.pt", saved({"b.weight": torch.ones(1)}))
    assert list(open_checkpoint(tmp_path / "a.zip")) == ["b.weight"]
    with tarfile.open(tmp_path / "b.tar", "w") as packed:
        for _ in range(2):
            packed.add(tmp_path / "a.zip", "model.pt")
    with pytest.raises(CheckpointError, match=r"holds two files 'model.pt'"):
        open_checkpoint(tmp_path / "b.tar")
