"""Memory and reading of ``load`` into a model that FSDP2 shards over two processes, from one file with other names.

Each rank should read what it holds, and take little memory beside it. What it reads is counted where autoalign asks a
checkpoint for a part of a tensor; the pages of the mapped file that came to be in the rank's memory are counted too, as
the system tells them, which maps some beside each that is asked for. Torch's own way is ``set_model_state_dict`` with a
whole state dict of the model's own names, mapped from its file.
"""

from __future__ import annotations

import importlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import autoalign
from benchmarks.speed.files import FORMATS, clear, network, path_of, write
from benchmarks.speed.memory import anonymous_bytes, mapped_bytes

WAYS = ("own", "renamed", "apart")
MEMORY_BUDGET = 64 * 2**20  # bytes beyond the largest tensor, on each rank
READ_BUDGET = 2**20  # bytes beyond the largest tensor, for the samples of values that ranks compare


@dataclass(frozen=True, slots=True)
class ShardedLoad:
    """What one rank did to load its part of one file."""

    format: str
    way: str
    rank: int
    file_bytes: int
    held_bytes: int  # of the rank's part of the model
    largest_bytes: int  # of a whole tensor
    read_bytes: int | None  # that were asked for; None where autoalign did not read
    mapped_bytes: int | None  # of the file, in this process's memory; None where the platform does not tell
    memory_bytes: int | None  # beyond the model
    seconds: float
    is_right: bool

    @property
    def is_within_budget(self) -> bool:
        """Whether it read no more than it holds and a tensor and some samples again, in little memory."""
        is_small = self.memory_bytes is None or self.memory_bytes <= self.largest_bytes + MEMORY_BUDGET
        return is_small and (
            self.read_bytes is None or self.read_bytes <= self.held_bytes + self.largest_bytes + READ_BUDGET
        )


def measure(
    file_bytes: int, formats: Sequence[str] = FORMATS, ways: Sequence[str] = WAYS, world: int = 2
) -> Iterator[ShardedLoad]:
    """Load a file of each format in each way, with processes of their own; no file is left over."""
    multiprocessing: Any = importlib.import_module("torch.multiprocessing")
    for format_ in formats:
        with tempfile.TemporaryDirectory() as name:
            write(Path(name), format_, file_bytes)
            for way in ways:
                multiprocessing.spawn(_rank, (world, name, format_, way, file_bytes), nprocs=world)
                for rank in range(world):
                    result = json.loads(Path(name, f"{way}-{rank}.json").read_text(encoding="utf-8"))
                    yield ShardedLoad(format_, way, rank, **result)


def _rank(rank: int, world: int, folder: str, format_: str, way: str, file_bytes: int) -> None:
    distributed: Any = importlib.import_module("torch.distributed")
    torch.set_num_threads(1)
    store = distributed.FileStore(str(Path(folder, f"store-{way}")), world)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.manual_seed(0)  # all ranks load the same values
    little = nn.Linear(2, 2)  # under another name, since what alignment needs is imported late
    values = {f"net.{key}": tensor.detach().clone() for key, tensor in little.state_dict().items()}
    autoalign.load(_sharded(little, world), values)
    model = _sharded(network(file_bytes, "meta"), world).to_empty(device="cpu")
    clear(model)
    path = path_of(Path(folder), format_, way)
    read: list[int] = []
    memory, mapped, seconds = _watched(lambda: _load(model, path, way, read))
    parts = [tensor.to_local() for tensor in model.state_dict().values()]
    result = ShardedLoad(
        format_,
        way,
        rank,
        path.stat().st_size,
        sum(part.nbytes for part in parts),
        max(tensor.nbytes for tensor in network(file_bytes, "meta").parameters()),
        sum(read) if way != "own" else None,
        mapped,
        memory,
        seconds,
        _is_right(model, path_of(Path(folder), format_, "own")),
    )
    facts = {name: value for name, value in asdict(result).items() if name not in ("format", "way", "rank")}
    Path(folder, f"{way}-{rank}.json").write_text(json.dumps(facts), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()


def _sharded(model: nn.Module, world: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for layer in getattr(model, "layers", ()):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _load(model: Any, path: Path, way: str, read: list[int]) -> None:
    if way == "own":
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        whole: dict[str, Any] = dict(_opened(path))
        set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True))
        return
    source = autoalign.open_checkpoint(path)

    def region(key: str, asked: Any) -> Tensor:
        tensor = source.region(key, asked)
        read.append(tensor.nbytes)
        return tensor

    autoalign.load(model, replace(source, read_region=region), strict=True)


def _opened(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    loaded: dict[str, Tensor] = torch.load(path, mmap=True, weights_only=True)
    return loaded


def _watched(load: Callable[[], None]) -> tuple[int | None, int | None, float]:
    """Measure by how many bytes the memory of this process grows at most, anonymous and mapped, and the time."""
    before = anonymous_bytes(), mapped_bytes()
    most = [before[0] or 0, before[1] or 0]
    done = threading.Event()

    def look() -> None:
        most[:] = max(most[0], anonymous_bytes() or 0), max(most[1], mapped_bytes() or 0)

    def watch() -> None:
        while not done.wait(0.002):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        load()
    finally:
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
    look()
    taken = [None if first is None else last - first for first, last in zip(before, most, strict=True)]
    return taken[0], taken[1], seconds


def _is_right(model: Any, own: Path) -> bool:
    from torch.distributed.tensor import distribute_tensor

    expected = _opened(own)
    return all(
        torch.equal(
            distribute_tensor(expected[key], tensor.device_mesh, tensor.placements, src_data_rank=None).to_local(),
            tensor.to_local(),
        )
        for key, tensor in model.state_dict().items()
    )
