"""Time and memory of ``load`` from a file with other names, against torch's and safetensors' own loading.

Those load a file that has the model's own names. Each way's time is taken in turn in one process: from the disk, after
the system was told to drop the pages of the file that it has in memory, and again from memory, where there is nothing
to wait for but the copy itself, and alignment shows the most. Where the system cannot be told, there is no first time.

Memory is what a process of its own takes beyond the model: the most that its anonymous memory grows while it loads,
looked at every two milliseconds. Pages of the mapped file are not in it, since the system may take them back at any
time; neither are they in the figures of the others.

    python -m benchmarks.speed.files FOLDER safetensors renamed 2000000000    # memory of one way, in bytes
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import safetensors.torch
import torch
from torch import Tensor, nn

import autoalign
from benchmarks.speed.memory import anonymous_bytes

TIME_BUDGET = 1.15  # times the time of the format's own way, from the disk
MEMORY_BUDGET = 64 * 2**20  # bytes beyond the largest tensor
SMALLEST_FILE = 500_000_000  # bytes; the time of a smaller one says little about loading
FORMATS = ("safetensors", "torch")
# the format's own; autoalign with other names; with query, key and value apart too; and assigning to a model on meta
WAYS = ("own", "renamed", "apart", "assign")
_LAYERS, _HEADS = 18, 12
_NAMES = {
    r"^layers\.": "encoder.layer.",
    r"self_attn\.out_proj": "attention.output.dense",
    r"self_attn\.in_proj_": "attention.self.qkv.",
    r"linear1": "intermediate.dense",
    r"linear2": "output.dense",
    r"norm1": "attention.output.LayerNorm",
    r"norm2": "output.LayerNorm",
}


@dataclass(frozen=True, slots=True)
class Load:
    """One way to load one file."""

    format: str
    way: str
    file_bytes: int
    largest_bytes: int  # of a tensor
    from_disk: tuple[float, ...]  # seconds of each repeat; empty for assign, which copies nothing
    from_memory: tuple[float, ...]
    memory_bytes: int | None  # beyond the model; None where the platform does not tell
    is_right: bool  # whether every value is that of the file

    @property
    def is_within_memory_budget(self) -> bool:
        return self.memory_bytes is None or self.memory_bytes <= self.largest_bytes + MEMORY_BUDGET


def ratio(load: Load, own: Load, *, from_disk: bool = True) -> float | None:
    """Divide a way's median time by that of the format's own; None where there are no times."""
    seconds = [each.from_disk if from_disk else each.from_memory for each in (load, own)]
    return median(seconds[0]) / median(seconds[1]) if all(seconds) else None


def network(file_bytes: int, device: str = "cpu") -> nn.Module:
    """Make a transformer whose float32 tensors take about so many bytes, and are in memory."""
    width = max(1, round((file_bytes / 4 / 12 / _LAYERS) ** 0.5 / _HEADS / 4)) * _HEADS * 4
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(width, _HEADS, 4 * width, batch_first=True)
        model = nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)
    if device != "meta":
        model.to_empty(device=device)
        clear(model)
    return model


@torch.no_grad()
def clear(model: nn.Module) -> None:
    """Set every value, so that nothing of an earlier load is left and the pages are in memory."""
    for parameter in model.parameters():
        parameter.fill_(0.5)


def renamed(state_dict: dict[str, Tensor], *, apart: bool) -> dict[str, Tensor]:
    """Give a state dict the names of BERT, with query, key and value in one tensor or apart."""
    result = {}
    for key, tensor in state_dict.items():
        name = key
        for old, new in _NAMES.items():
            name = re.sub(old, new, name)
        if apart and ".qkv." in name:
            for part, value in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                result[name.replace("qkv", part)] = value.clone()
        else:
            result[name] = tensor
    return result


def measure(file_bytes: int, repeats: int, ways: Sequence[str] = WAYS) -> Iterator[Load]:
    """Load a file of each format in several ways, of which the first is the format's own; no file is left over."""
    for format_ in FORMATS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write(folder, format_, file_bytes)
            seconds, are_right = timed(folder, format_, file_bytes, repeats, ways)
            for way in ways:
                yield Load(
                    format_,
                    way,
                    path_of(folder, format_, way).stat().st_size,
                    max(tensor.nbytes for tensor in network(file_bytes, "meta").parameters()),
                    tuple(seconds[way, True]),
                    tuple(seconds[way, False]),
                    _memory_in_process(folder, format_, way, file_bytes),
                    are_right[way],
                )


def path_of(folder: Path, format_: str, way: str) -> Path:
    """Name the file that a way loads."""
    return folder / f"{'renamed' if way == 'assign' else way}.{format_}"


@torch.no_grad()
def write(folder: Path, format_: str, file_bytes: int) -> None:
    """Write the file of each way, with random values."""
    model = network(file_bytes)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(generator=generator)
    state_dict = model.state_dict()
    for way in ("own", "renamed", "apart"):
        tensors = state_dict if way == "own" else renamed(state_dict, apart=way == "apart")
        path = path_of(folder, format_, way)
        if format_ == "safetensors":
            safetensors.torch.save_file(tensors, path)
        else:
            torch.save(tensors, path)


def load_by(way: str, folder: Path, format_: str) -> Callable[[nn.Module], object]:
    """Give the function that loads a model in one way."""
    path = path_of(folder, format_, way)
    if way != "own":
        return lambda model: autoalign.load(model, path, strict=True, assign=way == "assign")
    if format_ == "safetensors":
        return lambda model: safetensors.torch.load_model(model, path)
    return lambda model: model.load_state_dict(torch.load(path, mmap=True, weights_only=True))


def timed(
    folder: Path, format_: str, file_bytes: int, repeats: int, ways: Sequence[str] = WAYS
) -> tuple[dict[tuple[str, bool], list[float]], dict[str, bool]]:
    """Check every way once, then time them in turn.

    Returns:
        The seconds by way and by whether they are from the disk, and for each way whether all values were right.
    """
    model = network(file_bytes)
    are_right = {}
    for way in ways:
        checked = network(file_bytes, "meta") if way == "assign" else model
        load_by(way, folder, format_)(checked)
        are_right[way] = _is_right(checked, path_of(folder, format_, "own"))
        clear(model)
        del checked  # a model that was assigned to keeps the file's pages in memory
    seconds: dict[tuple[str, bool], list[float]] = {(way, from_disk): [] for way in ways for from_disk in (True, False)}
    for from_disk in (True, False) if hasattr(os, "posix_fadvise") else (False,):
        taken = [way for way in ways if way != "assign"]
        for repeat in range(repeats):
            first = repeat % len(taken)  # each way goes first at times: a disk is slower after much was read from it
            for way in taken[first:] + taken[:first]:
                (drop if from_disk else bring)(path_of(folder, format_, way))
                load = load_by(way, folder, format_)
                start = time.perf_counter()
                load(model)
                seconds[way, from_disk].append(time.perf_counter() - start)
    return seconds, are_right


def _is_right(model: nn.Module, own: Path) -> bool:
    is_torch = own.suffix == ".torch"
    expected = torch.load(own, mmap=True, weights_only=True) if is_torch else safetensors.torch.load_file(own)
    return all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


def drop(file: Path) -> None:
    """Have the system forget the pages of a file that it has in memory."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def bring(file: Path) -> None:
    """Read a file, so that its pages are in memory."""
    with file.open("rb") as stream:
        while stream.read(2**24):
            pass


def _memory_in_process(folder: Path, format_: str, way: str, file_bytes: int) -> int | None:
    if anonymous_bytes() is None:
        return None
    command = [sys.executable, "-m", "benchmarks.speed.files", str(folder), format_, way, str(file_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[2])
    return int(done.stdout)


def peak_memory(load: Callable[[nn.Module], object], model: nn.Module) -> int:
    """Measure by how many bytes the anonymous memory of this process grows at most while a model is loaded."""
    linear = nn.Linear(2, 2)  # under another name, since what alignment needs is imported late
    autoalign.load(linear, {f"model.{key}": tensor for key, tensor in linear.state_dict().items()})
    gc.collect()
    done = threading.Event()
    seen = [anonymous_bytes() or 0]

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(anonymous_bytes() or 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        load(model)
    finally:
        done.set()
        watcher.join()
    return max(*seen, anonymous_bytes() or 0) - seen[0]


if __name__ == "__main__":
    where, kind, name_of_way, size = sys.argv[1:]
    empty = network(int(size), "meta" if name_of_way == "assign" else "cpu")
    print(peak_memory(load_by(name_of_way, Path(where), kind), empty))
