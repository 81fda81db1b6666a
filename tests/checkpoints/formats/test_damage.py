"""Damaged files: real files of each format are mutated; each is loaded right, or refused by an error of ours.

``AUTOALIGN_FUZZ=10000 pytest tests/checkpoints/formats/test_damage.py`` tries that many of each kind.
A failure names its seed.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autoalign.api import load
from autoalign.checkpoints.checkpoint import Checkpoint, open_checkpoint
from autoalign.checkpoints.formats import hdf5
from autoalign.checkpoints.stored import Place
from autoalign.errors import CheckpointError, NothingLoadedError
from tests.checkpoints.formats.test_deepspeed import write_zero
from tests.checkpoints.formats.test_megatron import write_layers

INPUTS = int(os.environ.get("AUTOALIGN_FUZZ", "300"))  # of each kind
SLOWEST, LARGEST = (
    5.0,
    2**20,
)  # seconds of this process for an input; KiB by which the process may grow over all of a kind
NUMBERS = (0, 1, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def state_dict() -> dict[str, Tensor]:
    return {"conv.weight": torch.ones(2, 3), "conv.bias": torch.zeros(2).half(), "norm.count": torch.tensor(3)}


def write_safetensors(folder: Path) -> Path:
    save_file(state_dict(), folder / "a", metadata={"format": "pt"})
    return folder / "a"


def write_zip(folder: Path) -> Path:
    torch.save({"epoch": 3, "model": state_dict(), "args": {"depth": 2}}, folder / "a")
    return folder / "a"


def write_legacy(folder: Path) -> Path:
    torch.save(nn.BatchNorm1d(2).state_dict(), folder / "a", _use_new_zipfile_serialization=False)
    return folder / "a"


def write_with_objects(folder: Path) -> Path:
    saved = {"args": Namespace(depth=2, path=Path("a")), "mean": np.arange(3.0), "best": np.float64(0.5)}
    torch.save(saved | {"model": state_dict(), "log": defaultdict(list, {"loss": [1.0]})}, folder / "a")
    return folder / "a"


def write_module(folder: Path) -> Path:
    torch.save(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), folder / "a", _use_new_zipfile_serialization=False)
    return folder / "a"


def write_zip_archive(folder: Path) -> Path:
    file = write_zip(folder)
    with zipfile.ZipFile(folder / "b", "w") as archive:
        archive.write(file, "policy.pth")
        archive.writestr("data", "{}")
    return (folder / "b").replace(file)


def write_tar_archive(folder: Path) -> Path:
    file = write_with_objects(folder)
    with tarfile.open(folder / "b", "w") as archive:
        archive.add(file, "./model_weights.ckpt")
    return (folder / "b").replace(file)


def write_script(folder: Path) -> Path:
    jit: Any = torch.jit
    jit.save(jit.script(nn.Linear(2, 2)), folder / "a")
    return folder / "a"


def write_npz(folder: Path) -> Path:
    with (folder / "a").open("wb") as stream:
        np.savez(stream, **{key: tensor.numpy() for key, tensor in state_dict().items()})  # type: ignore[arg-type]
    return folder / "a"


def write_compressed(folder: Path) -> Path:
    with (folder / "a").open("wb") as stream:
        np.savez_compressed(stream, a=np.ones((30, 30)), b=np.zeros(3, "V2"))
    return folder / "a"


def write_gguf(folder: Path) -> Path:
    gguf: Any = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(folder / "a", "llama")
    writer.add_head_count(4)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("conv.weight", np.ones((2, 3), np.float32))
    writer.add_tensor("conv.bias", np.ones(2, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "a"


def write_msgpack(folder: Path) -> Path:
    msgpack: Any = pytest.importorskip("msgpack")
    array = msgpack.ExtType(1, msgpack.packb(((2, 3), "float32", bytes(24))))
    pieces = {"__msgpack_chunked_array__": True, "shape": {"0": 6}, "chunks": {"0": array}}
    saved = {"params": {"conv": {"kernel": array, "bias": pieces}}, "batch_stats": {"conv": {"mean": array}}, "step": 3}
    (folder / "a").write_bytes(msgpack.packb(saved))
    return folder / "a"


def write_hdf5(folder: Path) -> Path:
    h5py: Any = pytest.importorskip("h5py")
    with h5py.File(folder / "a", "w") as file:
        for name, shape in {"conv2d": (1, 1, 2, 3), "dense": (2, 3)}.items():
            file[f"layers/{name}/vars/0"] = np.ones(shape, np.float32)
            file[f"layers/{name}/vars/1"] = np.ones(3, np.float32)
            file[f"layers/{name}/vars"].attrs["name"] = f"own_{name}"
        file.create_dataset("layers/conv2d_1/vars/0", data=np.ones((3, 3, 4, 8)), compression="gzip")
    return folder / "a"


def write_keras(folder: Path) -> Path:
    file = write_hdf5(folder)
    layers = [{"class_name": "Dense", "config": {"name": "own_dense"}}, {"class_name": "Conv2D", "config": {}}]
    with zipfile.ZipFile(folder / "b", "w") as archive:
        archive.writestr("config.json", json.dumps({"class_name": "Model", "config": {"layers": layers}}))
        archive.write(file, "model.weights.h5")
    return (folder / "b").replace(file)


def write_index(folder: Path) -> Path:
    torch.save({"a": torch.ones(2), "b": torch.ones(3)}, folder / "model-1.bin")
    torch.save({"c": torch.ones(2)}, folder / "model-2.bin")
    path = folder / "model.index.json"
    path.write_text('{"metadata": {"total_size": 28}, "weight_map": {"a": "model-1.bin", "c": "model-2.bin"}}')
    return path


def write_metadata(folder: Path) -> Path:
    from torch.distributed.checkpoint.state_dict_saver import save

    save({"model": state_dict(), "epoch": 3}, checkpoint_id=folder, no_dist=True)
    return folder / ".metadata"


def write_pieces(folder: Path) -> Path:
    write_metadata(folder)
    (file,) = folder.glob("*.distcp")
    return file


def write_optimizer_of_zero(folder: Path) -> Path:
    write_zero(folder, 3, 2)
    return folder / "global_step2" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"


def write_model_of_zero(folder: Path) -> Path:
    write_zero(folder, 2, 2)
    return folder / "global_step2" / "mp_rank_00_model_states.pt"


def write_part_of_layer(folder: Path) -> Path:
    write_layers(folder, 2, blocks=1)
    (folder / "config.json").write_text('{"hidden_size": 8}')
    return folder / "layer_01-model_01-model_states.pt"


WRITERS = (
    write_safetensors,
    write_zip,
    write_legacy,
    write_with_objects,
    write_module,
    write_zip_archive,
    write_tar_archive,
    write_script,
    write_npz,
    write_compressed,
    write_gguf,
    write_msgpack,
    write_hdf5,
    write_keras,
    write_index,
    write_metadata,
    write_pieces,
    write_optimizer_of_zero,
    write_model_of_zero,
    write_part_of_layer,
)


SERVER = """
import json, os, signal, sys
import h5py
sys.path.insert(0, sys.argv[1])
import hdf5_process
for line in sys.stdin:
    source, sink = os.pipe()
    child = os.fork()
    if not child:
        signal.setitimer(signal.ITIMER_PROF, float(sys.argv[2]))
        os.dup2(sink, 1)
        try:
            hdf5_process.main(*json.loads(line))
            sys.stdout.flush()
        except BaseException:
            os._exit(1)
        os._exit(0)
    os.close(sink)
    with os.fdopen(source, "rb") as stream:
        output = stream.read()
    failed = os.waitpid(child, 0)[1]
    sys.stdout.buffer.write(b"%d %d\\n" % (failed, len(output)) + output)
    sys.stdout.flush()
"""


def forking(server: subprocess.Popen[bytes]) -> Callable[..., bytes]:
    """Return what does the work of the program for HDF5 files in forks of one process, which are there sooner."""

    def run(file: Path, *path: str, size: int = 0) -> bytes:  # noqa: ARG001, as of what it replaces
        assert server.stdin is not None
        assert server.stdout is not None
        place = Place.of(file)
        server.stdin.write(json.dumps([str(place.file), str(place.start), str(place.size), *path]).encode() + b"\n")
        server.stdin.flush()
        failed, length = map(int, server.stdout.readline().split())
        output = server.stdout.read(length)
        if failed:
            raise ValueError("the library ended")
        return output

    return run


@pytest.fixture(scope="module")
def run_hdf5() -> Iterator[Callable[..., bytes]]:
    arguments = [str(Path(hdf5.__file__).parent), str(SLOWEST / 8)]
    command = [sys.executable, "-c", SERVER, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        yield forking(server)
        assert server.stdin is not None
        server.stdin.close()


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Damage a file in one to three of the ways that files are damaged, by accident or on purpose."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(data) or 1)
        length = chance.choice((1, 1, 2, 4, 8, 64, 500))
        match chance.randrange(7):
            case 0 | 1:  # a bit
                data[place : place + 1] = bytes(byte ^ 1 << chance.randrange(8) for byte in data[place : place + 1])
            case 2:  # a number, as sizes and offsets are
                size = chance.choice((1, 2, 4, 8))
                number = chance.choice(NUMBERS) % 2 ** (8 * size)
                data[place : place + size] = number.to_bytes(size, chance.choice(("little", "big")))
            case 3:  # the end
                del data[place:]
            case 4:
                del data[place : place + length]
            case 5:  # twice
                data[place:place] = data[place : place + length]
            case 6:  # something from elsewhere
                other = chance.randrange(len(data) or 1)
                data[place : place + length] = data[other : other + length]
    return bytes(data)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Damage a file, or what is packed in one, where a checksum would else find it out."""
    if not content.startswith(b"PK") or chance.random() < 0.3:
        return mutated(content, chance)
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(packed, "w") as new:
        members = old.infolist()
        small = [info.filename for info in members if info.filename.endswith((".pkl", ".npy", ".pth", ".h5", ".json"))]
        chosen = chance.choice(small)
        for info in members:
            inner = old.read(info)
            new.writestr(info, mutated(inner, chance) if info.filename == chosen else inner)
    return packed.getvalue()


class Target(nn.Module):
    """A model with the tensors of the files, and one that none of them has."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        for place, spec in enumerate(checkpoint.specs):
            module = nn.Module()
            module.register_buffer(spec.key.rpartition(".")[2], torch.full(spec.shape, 7.0).to(spec.dtype))
            self.add_module(f"layer{place}", module)
        self.register_buffer("other", torch.full((5, 7), 7.0))


def loaded_right(path: Path, model: Target) -> bool:
    """Read and load a checkpoint; False if it is refused, anything else than what it announces is an error."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    try:
        checkpoint = open_checkpoint(path)
        for spec in checkpoint.specs:
            tensor = checkpoint[spec.key]
            assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype), spec
            if tensor.numel() < 2**20:
                tensor.clone()  # touches all of its memory
    except CheckpointError:
        with pytest.raises((CheckpointError, NothingLoadedError), match=r"\w"):  # what is damaged may have no match
            load(model, path)
        assert all(same(tensor, before[key]) for key, tensor in model.state_dict().items())
        return False
    try:
        alignment = load(model, path)
        before |= alignment.state_dict()
    except NothingLoadedError:
        pass
    assert all(same(tensor, before[key]) for key, tensor in model.state_dict().items())
    for tensor in model.buffers():
        tensor.copy_(torch.full_like(tensor, 7))
    return True


def same(tensor: Tensor, other: Tensor) -> bool:
    return torch.equal(bits(tensor), bits(other.to(tensor.dtype)))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning", "ignore:torch.distributed is"
)
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__.removeprefix("write_"))
def test_damaged_files_are_refused_or_read_right(
    tmp_path: Path,
    write: Callable[[Path], Path],
    run_hdf5: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if hasattr(os, "fork"):
        monkeypatch.setattr(hdf5, "_run", run_hdf5)
    file = write(tmp_path)
    is_part = file.suffix == ".distcp" or file.name.endswith((".metadata", "_states.pt"))
    given = file.parent if is_part else file
    content = file.read_bytes()
    model = Target(open_checkpoint(given))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert loaded_right(given, model)
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for seed in range(INPUTS):
        file.write_bytes(damaged(content, random.Random(seed)))
        start = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of numbers beyond their range, of keys that are lost, of NaN
                refused += not loaded_right(given, model)
        except BaseException as error:
            raise AssertionError(f"{write.__name__} with seed {seed}: {type(error).__name__}: {error}") from error
        assert time.process_time() - start < SLOWEST, seed
    assert refused > INPUTS / 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < LARGEST
