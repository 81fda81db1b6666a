"""Hostile checkpoints and bad moments: each ends in one clear error, in bounded time and memory, or in a right load.

Code in pickles, false headers, duplicate keys and indices that lead elsewhere have their tests with their formats, and
``formats/test_damage.py`` damages files of all formats at random.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autoalign.api import convert, load
from autoalign.checkpoints.checkpoint import open_checkpoint
from autoalign.errors import CheckpointError, NothingLoadedError, ValueWarning

SLOWEST, LARGEST = 5.0, 2**18  # seconds of this process, and KiB by which it may grow


@contextmanager
def bounded() -> Iterator[None]:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - start < SLOWEST
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < LARGEST


def write_header(path: Path, header: bytes, length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)
    return path


def test_a_header_of_a_million_tensors(tmp_path: Path) -> None:
    entries = ",".join(f'"{place:x}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for place in range(2**20))
    path = write_header(tmp_path / "a", f"{{{entries}}}".encode())
    with bounded(), pytest.raises(CheckpointError, match=r"it announces 1,048,576 tensors, and no more than 262,144"):
        open_checkpoint(path)


@pytest.mark.parametrize("length", [10**8 + 1, 2**40, 2**63, 2**64 - 1])
def test_a_header_that_is_said_to_be_of_a_billion_keys(tmp_path: Path, length: int) -> None:
    path = write_header(tmp_path / "a", b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', length)
    os.truncate(path, min(length + 8, 2**41))  # of which the disk holds nothing
    with (
        bounded(),
        pytest.raises(CheckpointError, match=r"header too large|neither a file of torch nor of safetensors"),
    ):
        open_checkpoint(path)


def test_an_index_of_endless_length(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(b'{"weight_map": {')
    os.truncate(path, 2**33)
    with bounded(), pytest.raises(CheckpointError, match=r"it has more than 67108864 bytes"):
        open_checkpoint(path)


def test_a_pickle_of_endless_length(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a", "w") as archive, archive.open("a/data.pkl", "w") as member:
        for _ in range(2**7 + 1):
            member.write(bytes(2**20))
    with bounded(), pytest.raises(CheckpointError, match=r"a pickle of 135,266,304 bytes beside its tensors"):
        open_checkpoint(tmp_path / "a")


def test_a_bomb_for_torch_and_for_torchscript(tmp_path: Path) -> None:
    for name, others in (("torch", ()), ("script", ("a/constants.pkl", "a/code/__torch__.py"))):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for other in others:
                archive.writestr(other, b"")
            with archive.open("a/data.pkl", "w", force_zip64=True) as member:
                for _ in range(2**9):
                    member.write(bytes(2**20))
        assert (tmp_path / name).stat().st_size < 2**20
        with bounded(), pytest.raises(CheckpointError, match=r"of 536870912 bytes"):
            open_checkpoint(tmp_path / name)


def test_shards_that_are_links(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"fc.weight": torch.ones(2, 3)}, tmp_path / "blob")
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"fc.weight": names[0], "fc.bias": names[1]}}))
    (folder / names[0]).symlink_to("../blob")  # as the cache of the hub has them
    for target, problem in (
        ("absent", r"1 of the 2 files .* are missing: 'model-00002"),
        (names[1], r"1 of the 2 files .* are missing"),  # to itself
        ("..", r"1 of the 2 files .* are missing"),
        ("/dev/zero", r"1 of the 2 files .* are missing"),
        ("../text", r"neither a file of torch nor of safetensors"),
        ("../blob", r"1 tensors that .* lists are not in their files: 'fc.bias'"),
    ):
        (tmp_path / "text").write_text("root:x:0:0:secret:/root:/bin/sh")
        (folder / names[1]).unlink(missing_ok=True)
        (folder / names[1]).symlink_to(target)
        for path in (index, folder):
            with bounded(), pytest.raises(CheckpointError, match=problem):
                open_checkpoint(path)


NAMES = ("a\nb.weight", "\x1b[31mred\x1b[0m.weight", "\u202eevil.weight", "\x00.weight", "é\u0301.weight", " .weight")


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
@pytest.mark.filterwarnings("ignore:Loading:autoalign.errors.PartialLoadWarning")
def test_keys_with_control_characters(tmp_path: Path, kind: str) -> None:
    tensors = {name: torch.full((2, 3 + place), torch.nan) for place, name in enumerate(NAMES)}
    save: Any = save_file if kind == "safetensors" else torch.save
    save(tensors, tmp_path / "a")
    checkpoint = open_checkpoint(tmp_path / "a")
    assert set(checkpoint) == set(NAMES)
    model = nn.ModuleDict({f"layer{place}": nn.Linear(3 + place, 2, bias=False) for place in range(len(NAMES))})
    rules = [(name, f"layer{place}.weight") for place, name in enumerate(NAMES)]
    with pytest.warns(ValueWarning) as caught:
        alignment = load(model, checkpoint, rules=rules)
    texts = [str(alignment), *(str(warning.message) for warning in caught)]
    with pytest.raises(NothingLoadedError, match=r"No tensor of") as error:
        load(nn.Conv2d(5, 7, 9), checkpoint)
    for text in [*texts, str(error.value)]:
        assert all(char.isprintable() or char == "\n" for char in text), text
    assert not any("\nb.weight" in text for text in texts)


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_file_that_is_written_to_after_it_was_opened(tmp_path: Path, kind: str) -> None:
    """A process that reads what was mapped of a file, and is no longer in it, is ended by the system."""
    tensors = {"net.weight": torch.ones(2**10, 2**10), "net.bias": torch.ones(2**10)}
    save: Any = save_file if kind == "safetensors" else torch.save
    save(tensors, tmp_path / "a")
    model, before = nn.Linear(2**10, 2**10), torch.full((2**10,), 7.0)
    nn.init.constant_(model.bias, 7)
    checkpoint = open_checkpoint(tmp_path / "a")
    os.truncate(tmp_path / "a", 4096)
    with pytest.raises(CheckpointError, match=r"was changed after it was opened: it has 4,096 bytes and had 4,19"):
        load(model, checkpoint)
    with pytest.raises(CheckpointError, match=r"was changed after it was opened"):
        convert(checkpoint, model, tmp_path / "b.safetensors")
    assert torch.equal(model.bias, before)
    save(tensors, tmp_path / "a")
    checkpoint = open_checkpoint(tmp_path / "a")
    save({"other": torch.ones(3)}, tmp_path / "new")
    if kind == "torch":  # which is mapped when it is opened
        (tmp_path / "new").replace(tmp_path / "a")
    load(model, checkpoint, strict=True)
    assert torch.equal(model.bias, torch.ones(2**10))
    if kind == "torch":
        (tmp_path / "a").unlink()
        load(model, checkpoint, strict=True)


class Loading(nn.Linear):
    """A layer whose loading code has another process write to the file."""

    path: Path

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self.path.write_bytes(self.path.read_bytes())


@pytest.mark.parametrize("assign", [True, False])
def test_a_file_that_is_written_to_while_code_of_the_model_loads_it(tmp_path: Path, assign: bool) -> None:
    model = Loading(3, 2)
    model.path, before = tmp_path / "a", model.weight.clone()
    save_file({"net.weight": torch.ones(2, 3), "net.bias": torch.ones(2)}, model.path)
    os.utime(model.path, (0, 0))
    with pytest.raises(CheckpointError, match=r"was changed after it was opened.* model was not changed. Load again"):
        load(model, model.path, assign=assign)
    assert torch.equal(model.weight, before)


def test_a_shard_that_is_written_to_after_it_was_opened(tmp_path: Path) -> None:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, key in zip(names, ("weight", "bias"), strict=True):
        save_file({key: torch.ones(2, 3) if key == "weight" else torch.ones(2)}, tmp_path / name)
    checkpoint = open_checkpoint(tmp_path)
    os.truncate(tmp_path / names[1], 4)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors' was changed after it was opened"):
        load(nn.Linear(3, 2), checkpoint)


def test_a_file_that_is_written_to_while_it_is_converted(tmp_path: Path) -> None:
    save_file({"net.weight": torch.ones(2, 3), "net.bias": torch.ones(2)}, tmp_path / "a")
    os.utime(tmp_path / "a", (0, 0))

    def overwrite(done: int, _of: int) -> None:
        if done == 1:
            (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes())

    with pytest.raises(CheckpointError, match=r"was changed after it was opened.*Nothing was written"):
        convert(tmp_path / "a", nn.Linear(3, 2), tmp_path / "b.safetensors", progress=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("format_", ["npz", "distributed"])
@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
def test_an_interrupt_while_a_file_is_read_leaves_the_model_as_it_was(
    tmp_path: Path, ctrl_c: Callable[[], None], monkeypatch: pytest.MonkeyPatch, format_: str
) -> None:
    source, model = (
        nn.Sequential(*(nn.Linear(3, 3) for _ in range(4))),
        nn.Sequential(*(nn.Linear(3, 3) for _ in range(4))),
    )
    if format_ == "npz":
        import numpy as np

        with (tmp_path / "a").open("wb") as stream:
            np.savez(stream, **{key: tensor.numpy() for key, tensor in source.state_dict().items()})
    else:
        from torch.distributed.checkpoint.state_dict_saver import save

        save(source.state_dict(), checkpoint_id=tmp_path / "a", no_dist=True)
    checkpoint = open_checkpoint(tmp_path / "a")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    asked: list[str] = []
    read = checkpoint.read

    def interrupted(key: str) -> Tensor:
        asked.append(key)
        if len(asked) == 5:
            ctrl_c()
        return read(key)

    monkeypatch.setattr(type(checkpoint), "__getitem__", lambda _, key: interrupted(key))
    with pytest.raises(KeyboardInterrupt):
        load(model, checkpoint)
    assert len(asked) == 5
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_an_interrupt_of_a_process_that_loads_a_large_file(tmp_path: Path) -> None:
    """All or nothing: after Ctrl-C at any moment, a model holds the old values or the new ones."""
    code = """
import os, signal, sys, threading, time, torch
from torch import nn
from safetensors.torch import save_file
import autoalign
model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(24)))
with torch.no_grad():
    for parameter in model.parameters():
        parameter.fill_(1)
save_file({f"net.{key}": torch.full_like(tensor, 2) for key, tensor in model.state_dict().items()}, sys.argv[1])
autoalign.align(sys.argv[1], model)
outcomes = set()
for wait in (0.0, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.1):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    timer = threading.Timer(wait, os.kill, (os.getpid(), signal.SIGINT))
    interrupted = False
    try:
        timer.start()
        autoalign.load(model, sys.argv[1])
        timer.join()
        time.sleep(0.01)  # it comes in here at the latest
    except KeyboardInterrupt:
        interrupted = True
    timer.join()
    values = {float(value) for parameter in model.parameters() for value in parameter.unique()}
    assert values in ({1.0}, {2.0}), values
    outcomes.add((interrupted, *values))
print(sorted(outcomes))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "(True," in done.stdout
