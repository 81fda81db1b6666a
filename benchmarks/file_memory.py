"""Memory and time of ``load`` from a file of two gigabytes with other names: ``python -m benchmarks.file_memory``.

Time is compared with what torch and safetensors offer for a file with the model's own names, in the same process and in
turn: from the disk, after the system was told to drop the pages of the file that it has in memory, and again from
memory, where there is nothing to wait for but the copy itself, and alignment shows the most.

Memory is what a process of its own takes beyond the model: the most that its anonymous memory (``RssAnon`` of
``/proc/self/status``) grows while it loads, looked at every two milliseconds. Pages of the mapped file are not in it,
since the system may take them back at any time; neither are they in the figures of the others.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_model, save_file
from torch import Tensor, nn

import autoalign

LAYERS, WIDTH = 18, 1536  # two gigabytes in float32
TIME_BUDGET = 1.15  # times the time of the others
MEMORY_BUDGET = 64 * 2**20  # bytes beyond the largest tensor
_MODULE = "benchmarks.file_memory"  # which writes and measures in processes of its own
KINDS = ("safetensors", "torch")
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
class Loading:
    """Figures of loading one kind of file; seconds of each repeat, in order, taken in turn."""

    kind: str
    tensors: int
    size: int  # bytes of the file
    largest: int  # bytes of the largest tensor
    from_disk: dict[str, tuple[float, ...]]  # by way: renamed, apart (query, key and value), and the peer's
    from_memory: dict[str, tuple[float, ...]]
    memory: dict[str, int]  # bytes beyond the model: renamed, apart, peer, and assign, to a model on meta

    def ratio(self, way: str, *, warm: bool = False) -> float:
        """The median time over that of the peer."""
        seconds = self.from_memory if warm else self.from_disk
        return median(seconds[way]) / median(seconds["peer"])

    @property
    def is_within_budget(self) -> bool:
        worst = max(self.memory[way] for way in ("renamed", "apart", "assign"))
        return self.ratio("renamed") <= TIME_BUDGET and worst <= self.largest + MEMORY_BUDGET


def network(device: str = "cpu") -> nn.Module:
    """Make a transformer whose every tensor is in memory."""
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(WIDTH, 12, 4 * WIDTH, batch_first=True)
        model = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    if device == "meta":
        return model
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return model


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


def write(folder: Path) -> None:
    """Write the files that are loaded: ``same``, ``renamed`` and ``apart``, of each kind."""
    torch.manual_seed(0)
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    state_dict = model.state_dict()
    for name in ("same", "renamed", "apart"):
        saved = state_dict if name == "same" else renamed(state_dict, apart=name == "apart")
        save_file(saved, folder / f"{name}.safetensors")
        torch.save(saved, folder / f"{name}.torch")


def ways(folder: Path, kind: str) -> dict[str, Callable[[nn.Module], object]]:
    """List the ways to load that are compared."""
    peer: Callable[[nn.Module], object]
    if kind == "safetensors":
        peer = lambda model: load_model(model, folder / "same.safetensors")  # noqa: E731
    else:
        peer = lambda model: model.load_state_dict(torch.load(folder / "same.torch", mmap=True))  # noqa: E731
    return {
        "peer": peer,
        "renamed": lambda model: autoalign.load(model, folder / f"renamed.{kind}", strict=True),
        "apart": lambda model: autoalign.load(model, folder / f"apart.{kind}", strict=True),
        "assign": lambda model: autoalign.load(model, folder / f"renamed.{kind}", strict=True, assign=True),
    }


def peak_memory(way: Callable[[nn.Module], object], model: nn.Module) -> int:
    """Measure by how many bytes the anonymous memory of this process grows at most while a model is loaded."""
    autoalign.load(nn.Linear(2, 2), nn.Linear(2, 2))  # imports what is imported late
    gc.collect()
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], _anonymous())

    before = _anonymous()
    watcher = threading.Thread(target=watch)
    watcher.start()
    way(model)
    done.set()
    watcher.join()
    return max(peak[0], _anonymous()) - before


def _anonymous() -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) * 1024


def measure(repeats: int = 5, folder: Path | None = None) -> list[Loading]:
    """Measure both kinds of files; the files are written to a temporary folder, or are found in one from before.

    Raises:
        AssertionError: A model was loaded with other values than those of the file.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return measure(repeats, Path(temporary))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "apart.torch").exists():
        subprocess.run([sys.executable, "-m", _MODULE, "--write", str(folder)], check=True)
    return [_measured(folder, kind, repeats) for kind in KINDS]


def _measured(folder: Path, kind: str, repeats: int) -> Loading:
    model = network()
    timed = {name: way for name, way in ways(folder, kind).items() if name != "assign"}
    seconds: dict[bool, dict[str, list[float]]] = {warm: {name: [] for name in timed} for warm in (False, True)}
    for way in timed.values():
        way(model)
        _check(model, folder)
    for warm in seconds:
        for _ in range(repeats):
            for name, way in timed.items():
                file = folder / f"{'same' if name == 'peer' else name}.{kind}"
                _bring(file) if warm else _drop(file)
                start = time.perf_counter()
                way(model)
                seconds[warm][name].append(time.perf_counter() - start)
    memory = {}
    for name in ways(folder, kind):
        command = [sys.executable, "-m", _MODULE, "--memory", str(folder), kind, name]
        memory[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    tensors = list(model.state_dict().values())
    return Loading(
        kind,
        len(tensors),
        (folder / f"renamed.{kind}").stat().st_size,
        max(tensor.nbytes for tensor in tensors),
        {name: tuple(times) for name, times in seconds[False].items()},
        {name: tuple(times) for name, times in seconds[True].items()},
        memory,
    )


def _drop(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _bring(file: Path) -> None:
    with file.open("rb") as stream:
        while stream.read(2**24):
            pass


def _check(model: nn.Module, folder: Path) -> None:
    expected = torch.load(folder / "same.torch", mmap=True)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items()), "other values"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)


def table(figures: list[Loading]) -> list[str]:
    """Write a line for each kind."""
    lines = [
        "| time | load, s | peer, s | ratio | q, k, v apart | |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for each in figures:
        for warm, place in ((False, "disk"), (True, "memory")):
            seconds = each.from_memory if warm else each.from_disk
            verdict = "" if warm else "ok" if each.ratio("renamed") <= TIME_BUDGET else "OVER"
            lines.append(
                f"| {each.kind}, {each.size / 1e9:.2f} GB, from {place} | {median(seconds['renamed']):.2f} "
                f"| {median(seconds['peer']):.2f} | {each.ratio('renamed', warm=warm):.2f}x "
                f"| {each.ratio('apart', warm=warm):.2f}x | {verdict} |"
            )
    lines += [
        "",
        "| memory beyond the model, MiB | renamed | q, k, v apart | assign to meta | peer | allowed | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for each in figures:
        memory = " | ".join(f"{each.memory[way] / 2**20:.0f}" for way in ("renamed", "apart", "assign", "peer"))
        allowed = each.largest + MEMORY_BUDGET
        verdict = "ok" if max(each.memory[way] for way in ("renamed", "apart", "assign")) <= allowed else "OVER"
        lines.append(f"| {each.kind} | {memory} | {allowed / 2**20:.0f} | {verdict} |")
    return lines


def main() -> int:
    """Measure and print; the exit status is 1 if a budget is exceeded."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.file_memory", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="measured runs of each way (default: 5)")
    parser.add_argument("--folder", type=Path, help="where the files, of 12 GB, are or will be")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(options.write)
        return 0
    if options.memory:
        folder, kind, name = options.memory
        print(peak_memory(ways(Path(folder), kind)[name], network("meta" if name == "assign" else "cpu")))
        return 0
    figures = measure(options.repeats, options.folder)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("\n".join(table(figures)))
    if options.json:
        options.json.write_text(json.dumps([asdict(each) for each in figures], indent=1), encoding="utf-8")
    return 0 if all(each.is_within_budget for each in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
