"""Loading a file whose keys are renamed, against torch's and safetensors' own loading of one whose keys are not.

Every way loads into the same model in a process of its own, which reports its time and its peak of resident memory,
and whether every value is right.

    python -m benchmarks.file_loading FILE autoalign    # one measurement, as JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.memory import peak_bytes

LAYERS = 24
FORMATS = ("safetensors", "torch")


@dataclass(frozen=True, slots=True)
class Load:
    """One way to load one file."""

    format: str
    way: str  # autoalign, or the format's own
    file_bytes: int
    seconds: tuple[float, ...]
    peak_bytes: int  # of resident memory above that of the model; mapped pages of the file count
    is_right: bool

    @property
    def median_seconds(self) -> float:
        return median(self.seconds)


class Block(nn.Module):
    """A layer of a transformer, with its usual names; it computes nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})


def model_of(file_bytes: int) -> nn.Module:
    """Build a model whose float32 tensors take about so many bytes; its values are not set."""
    width = max(64, int((file_bytes / 4 / LAYERS / 12) ** 0.5) // 64 * 64)
    with torch.device("meta"):
        model = nn.ModuleDict(
            {"blocks": nn.ModuleList([Block(width) for _ in range(LAYERS)]), "norm": nn.LayerNorm(width)}
        )
    return model.to_empty(device="cpu")


def renamed_key(key: str) -> str:
    """Name a tensor as another hand does.

    >>> renamed_key("blocks.3.mlp.fc1.weight")
    'model.encoder.layers.3.ffn.linear1.weight'
    """
    words = {"blocks": "layers", "norm1": "ln_1", "norm2": "ln_2", "attn": "attention", "proj": "out_proj"}
    words |= {"mlp": "ffn", "fc1": "linear1", "fc2": "linear2", "norm": "ln_post"}
    return "model.encoder." + ".".join(words.get(name, name) for name in key.split("."))


def measure(file_bytes: int, repeats: int) -> Iterator[Load]:
    """Load a file of each format in its ways, in turn, each load in a process of its own; no file is left over."""
    for format_ in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            paths = write(Path(folder), format_, file_bytes)
            loads = [_in_process(path, way, file_bytes) for _ in range(repeats) for way, path in paths.items()]
            for way, path in paths.items():
                own = [load for load in loads if load.way == way]
                seconds = tuple(load.seconds[0] for load in own)
                peak = max(load.peak_bytes for load in own)
                yield Load(format_, way, path.stat().st_size, seconds, peak, all(load.is_right for load in own))


def write(folder: Path, format_: str, file_bytes: int) -> dict[str, Path]:
    """Write the file of each way: with other keys for autoalign, and with the model's for the format's own."""
    from safetensors.torch import save_file

    paths = {way: folder / f"{way}.{format_}" for way in ("autoalign", "own")}
    tensors = _filled(model_of(file_bytes).state_dict())
    for way, path in paths.items():
        named = {renamed_key(key) if way == "autoalign" else key: tensor for key, tensor in tensors.items()}
        if format_ == "safetensors":
            save_file(named, path)
        else:
            torch.save(named, path)
    return paths


def _filled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give each tensor one value of its own everywhere, which is quick to write and to check."""
    for number, tensor in enumerate(tensors.values()):
        tensor.fill_(number + 1)
    return tensors


def _in_process(path: Path, way: str, file_bytes: int) -> Load:
    command = [sys.executable, "-m", "benchmarks.file_loading", str(path), way, str(file_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[1])
    figures = json.loads(done.stdout)
    return Load(**figures | {"seconds": tuple(figures["seconds"])})


def loaded(path: Path, way: str, file_bytes: int) -> Load:
    """Load a file in this process, and check every tensor; imports are done before the clock starts."""
    model = model_of(file_bytes)
    format_ = path.suffix[1:]
    load = _ways()[way, format_]
    for tensor in model.state_dict().values():
        tensor.zero_()  # so that the model's own pages are in memory
    before = peak_bytes()
    start = time.perf_counter()
    load(model, path)
    seconds = time.perf_counter() - start
    peak = max(peak_bytes() - before, 0)
    is_right = all(bool((tensor == number).all()) for number, tensor in enumerate(model.state_dict().values(), start=1))
    return Load(format_, way, path.stat().st_size, (seconds,), peak, is_right)


def _ways() -> dict[tuple[str, str], Callable[[nn.Module, Path], object]]:
    import safetensors.torch

    import autoalign

    linear = nn.Linear(2, 2)
    autoalign.load(linear, {f"model.{key}": tensor for key, tensor in linear.state_dict().items()})

    def torch_own(model: nn.Module, path: Path) -> None:
        model.load_state_dict(torch.load(path, mmap=True, weights_only=True))

    def safetensors_own(model: nn.Module, path: Path) -> None:
        safetensors.torch.load_model(model, path)

    return {
        **{("autoalign", format_): autoalign.load for format_ in FORMATS},
        ("own", "torch"): torch_own,
        ("own", "safetensors"): safetensors_own,
    }


if __name__ == "__main__":
    print(json.dumps(asdict(loaded(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))))
