"""What each process of the tests of sharded models does; a module that a spawned process can import."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import autoalign
from autoalign.checkpoints.checkpoint import checkpoint_of, open_checkpoint
from autoalign.errors import AlignmentError, CheckpointError, InputError, PartialLoadWarning, ValueWarning
from autoalign.plan.regions import Region

WIDTH = 8
distributed: Any = importlib.import_module("torch.distributed")
multiprocessing: Any = importlib.import_module("torch.multiprocessing")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)


class Network(nn.Module):
    """A transformer; one weight has a number of rows that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 7)
        self.register_buffer("steps", torch.tensor(0))


def filled(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    model = Network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.steps.fill_(seed + 3)  # type: ignore[operator]
    return model


def other_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the network's tensors the names and layout of another code: q, k and v apart, weights transposed."""
    words = {"embed": "wte", "blocks": "h", "norm": "ln_1", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj", "proj": "o_proj"}
    result = {}
    for key, tensor in state_dict.items():
        name = ".".join(words.get(word, word) for word in key.split("."))
        parts = zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3)) if ".qkv." in name else [("", tensor)]  # noqa: B905
        for part, value in parts:
            is_matrix = ".attn." in name or ".mlp." in name
            result[name.replace("qkv", part)] = (value.t() if is_matrix and value.dim() == 2 else value).clone(
                memory_format=torch.contiguous_format
            )
    return result


def run(world: int, works: Sequence[tuple[Callable[..., None], tuple[object, ...]]], folder: Path) -> None:
    """Run functions, one after the other, in as many processes as there are ranks; a failure of one is raised here."""
    multiprocessing.spawn(_rank, (world, works, str(folder)), nprocs=world)


def _rank(rank: int, world: int, works: Sequence[tuple[Callable[..., None], tuple[object, ...]]], folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", PartialLoadWarning)
    store = distributed.FileStore(str(Path(folder) / f"store-{world}"), world)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for work, arguments in works:  # what a failing rank leaves the others waiting for is ended by ``spawn``
        work(rank, world, *arguments)
    store.set(f"finished/{rank}", "")  # gloo aborts a rank whose peers have gone while it waits for them in a barrier
    store.wait([f"finished/{other}" for other in range(world)])
    distributed.destroy_process_group()
    os._exit(
        0
    )  # threads of torch may abort a process that ends as usual: "terminate called without an active exception"


def fully_sharded(world: int, model: nn.Module, device: str = "cpu") -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (world,))
    blocks: Any = model.blocks
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(world: int, model: nn.Module) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"blocks.*.attn.qkv": ColwiseParallel(), "blocks.*.attn.proj": RowwiseParallel()}
    plan |= {"blocks.*.fc1": ColwiseParallel(), "blocks.*.fc2": RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (world,)), plan)


def both_ways(world: int, model: nn.Module) -> Any:
    """Shard a model by FSDP2 over pairs of ranks that are tensor parallel."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "model"))
    plan = {"blocks.*.fc1": ColwiseParallel(), "blocks.*.fc2": RowwiseParallel()}
    parallelize_module(model, mesh["model"], plan)
    return fully_shard(model, mesh=mesh["data"])


SHARDINGS: dict[str, Callable[[int, nn.Module], Any]] = {
    "fsdp": fully_sharded,
    "tensor parallel": tensor_parallel,
    "both": both_ways,
}


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def assert_loaded(model: nn.Module, expected: nn.Module) -> None:
    for key, tensor in expected.state_dict().items():
        assert torch.equal(whole(model.state_dict()[key]).cpu(), tensor), key


def loads_from(rank: int, world: int, paths: dict[str, str], sharding: str) -> None:
    for kind, path in paths.items():
        model = SHARDINGS[sharding](world, filled(1))
        alignment = autoalign.load(model, path, strict=True)
        assert_loaded(model, filled())
        assert alignment.coverage == 1, (rank, kind)
    with torch.device("meta"):
        model = SHARDINGS[sharding](world, Network())
    autoalign.load(model, next(iter(paths.values())), strict=True, assign=True)
    assert_loaded(model, filled())
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())


def reads_its_part(rank: int, world: int, path: str) -> None:
    """Each rank reads what it holds, operations included, and no more."""
    source = open_checkpoint(path)
    read: dict[str, int] = {}

    def region(key: str, asked: Region) -> Tensor:
        tensor = source.region(key, asked)
        read[key] = read.get(key, 0) + tensor.numel()
        return tensor

    def never(key: str) -> Tensor:
        raise AssertionError(f"{key} was read as a whole")

    model = fully_sharded(world, filled(1))
    sample = mock.patch("autoalign.loading.sharded.digests", return_value=("", ""))
    with sample, mock.patch("autoalign.loading.sharded._read_largest"):
        autoalign.load(model, replace(source, read=never, read_region=region), strict=True)
    assert_loaded(model, filled())
    held = sum(p.to_local().numel() for p in model.parameters()) + 1  # and the buffer, which every rank has
    assert sum(read.values()) == held, (rank, read)


def keeps_no_old_values(rank: int, world: int, path: str) -> None:
    """What is mapped is copied without keeping what the model held, and an interrupt takes effect afterwards."""
    model = fully_sharded(world, filled(1))
    sound = open_checkpoint(path)
    interrupted: list[int] = []

    def region(key: str, asked: Region) -> Tensor:
        if key == "head.weight" and rank == 0 and not interrupted and asked[0][1] > 1:
            interrupted.append(1)
            signal.raise_signal(signal.SIGINT)
        return sound.region(key, asked)

    kept = mock.patch("autoalign.loading.transaction._values", side_effect=AssertionError("old values are kept"))
    with kept, mock.patch("autoalign.loading.sharded.digests", return_value=("", "")):  # else the interrupt comes there
        if rank == 0:
            with pytest.raises(KeyboardInterrupt):
                autoalign.load(model, replace(sound, read_region=region), strict=True)
        else:
            autoalign.load(model, replace(sound, read_region=region), strict=True)
    distributed.barrier()
    assert len(interrupted) == (rank == 0)
    assert_loaded(model, filled())
    model = fully_sharded(world, filled(1))
    interrupted.clear()
    unheld = replace(sound, read_region=region, is_resident=False)
    with mock.patch("autoalign.loading.sharded.digests", return_value=("", "")):
        kind = KeyboardInterrupt if rank == 0 else AlignmentError
        expect(kind, "^$" if rank == 0 else "Rank 0 failed", model, unheld)
    assert len(interrupted) == (rank == 0)
    assert_loaded(model, filled(1))


def reports_once(rank: int, world: int, path: str) -> None:
    messages: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger = logging.getLogger("autoalign.loading.load")
    logger.setLevel(logging.INFO)
    logger.addHandler(Handler())
    steps: list[tuple[int, int]] = []
    model = fully_sharded(world, filled(1))
    source = dict(open_checkpoint(path))
    source.pop("head.bias")
    source["head.weight"][:] = torch.nan
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        alignment = autoalign.load(model, source, progress=lambda done, total: steps.append((done, total)))
    ours = [warning.category for warning in caught if "Loading" in str(warning.message)]
    assert ours == ([PartialLoadWarning, ValueWarning] if rank == 0 else [])
    assert len(messages) == (rank == 0)
    assert bool(steps) == (rank == 0)
    assert any("head.weight (56 of 56)" in note for note in alignment.notes), alignment.notes
    assert all(str(warning.filename) == __file__ for warning in caught if warning.category in ours)


def fails_together(rank: int, world: int, path: str) -> None:
    """What fails on one rank fails on all, and no rank's part is changed."""
    model = fully_sharded(world, filled(1))
    sound = checkpoint_of(dict(open_checkpoint(path)))

    def fails_on(failing: int, kind: type[BaseException], text: str, source: Any, **options: Any) -> None:
        own = rank == failing
        expect(
            kind if own else AlignmentError, text if own else f"Rank {failing} failed.*{text}", model, source, **options
        )
        assert_loaded(model, filled(1))

    fails_on(0, CheckpointError, "does not exist", path if rank else f"{path}.absent")
    fails_on(0, PartialLoadWarning, "1 keep their values", {**sound, "head.bias": torch.zeros(1)}, strict=False)
    source: Any = dict(sound)
    if rank == world - 1:
        source["transformer.ln_f.weight"] = source.pop("h.1.ln_1.weight")
    expect(AlignmentError, "aligned the checkpoint in different ways", model, source, strict=False)
    for key, is_resident in (("wte.weight", True), ("steps", True), ("steps", False)):
        source = checkpoint_of({**sound, key: sound[key] + 1} if rank else sound)
        text = "Ranks 0 and 1 have checkpoints of other values, and nothing was loaded"
        expect(AlignmentError, text, model, replace(source, is_resident=is_resident))
    other = sound["h.0.mlp.c_fc.weight"].clone()
    other[0, 0] += rank
    expect(AlignmentError, text, model, {**sound, "h.0.mlp.c_fc.weight": other})
    assert_loaded(model, filled(1))

    def interrupt(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    with mock.patch("autoalign.loading.prepare.match_tensors", interrupt) if rank == 1 else nullcontext():
        fails_on(1, KeyboardInterrupt, "^$" if rank == 1 else "KeyboardInterrupt", path)

    def broken(key: str, region: Region) -> Tensor:
        if rank == 1 and prod(size for _, size in region) > largest:
            raise errors[0]
        return sound.region(key, region)

    unsampled = mock.patch("autoalign.loading.sharded.digests", return_value=("", ""))  # for which it is read too
    largest = WIDTH * WIDTH  # a rank has more of the weights of an MLP, and no more of any other

    errors: list[BaseException] = [OSError("the disk is gone"), MemoryError("no memory"), KeyboardInterrupt("now")]
    while errors:
        for is_resident in (
            True,
            False,
        ):  # which shows before anything is changed, or after which old values are put back
            source = replace(sound, read_region=broken, is_resident=is_resident)
            with unsampled:
                if isinstance(errors[0], MemoryError):
                    text = r"Rank 1 .*failed, and .* (loaded|changed) on any: MemoryError: no memory"
                    expect(AlignmentError, text, model, source)
                    assert_loaded(model, filled(1))
                else:
                    fails_on(1, type(errors[0]), str(errors[0]), source)
        del errors[0]

    def cancel(done: int, _all: int) -> None:
        if done == 9:
            raise RuntimeError("cancelled")

    fails_on(0, RuntimeError, "cancelled", sound, progress=cancel)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if rank == 0 else "ignore", ValueWarning)
        fails_on(0, ValueWarning, "NaN", {**sound, "h.0.ln_1.bias": torch.full((WIDTH,), torch.nan)})
    hook = model.register_load_state_dict_pre_hook(lambda *_: 1 // rank)
    fails_on(0, ZeroDivisionError, "by zero", path)
    hook.remove()
    errors = [MemoryError("no memory")]
    text = "may have changed in part: load it anew: MemoryError: no memory"
    with unsampled, mock.patch("autoalign.loading.sharded._read_largest"):  # as if there had still been memory
        expect(AlignmentError, text, model, replace(sound, read_region=broken))
    autoalign.load(model, path, strict=True)
    assert_loaded(model, filled())


def meets_an_unsharded_rank(rank: int, world: int, path: str) -> None:
    """Ranks do not wait for one that loads the model unsharded, and load together when it does not."""
    model = fully_sharded(world, filled(1))
    autoalign.load(filled(1), path)
    if rank == 1:  # it is late
        autoalign.load(filled(1), path)
        time.sleep(0.5)
    autoalign.load(model, path, strict=True)
    assert_loaded(model, filled())
    model = fully_sharded(world, filled(1))
    distributed.barrier()
    with mock.patch("autoalign.loading.sharded._PATIENCE_SECONDS", 0.3):  # it takes longer, and is waited for
        if rank == 1:
            autoalign.load(filled(1), path, progress=lambda *_: time.sleep(0.05))
        autoalign.load(model, path, strict=True)
    assert_loaded(model, filled())
    model = fully_sharded(world, filled(1))
    distributed.barrier()
    with mock.patch("autoalign.loading.sharded._PATIENCE_SECONDS", 0.2):
        if rank == 0:
            expect(AlignmentError, "Rank 1 has not come .* after it loaded .* that is not sharded", model, path)
        distributed.barrier()
        if rank == 1:
            expect(AlignmentError, "did not wait any longer for rank 1", model, path)
    assert_loaded(model, filled(1))
    autoalign.load(model, path, strict=True)
    assert_loaded(model, filled())


def meets_a_cut_file(rank: int, world: int, path: str) -> None:
    """A file that is cut while the parts are read ends no process, and all say what became of the model."""
    fill_parts: Any = importlib.import_module("autoalign.loading.sharded").fill_parts
    for fails in (False, True):  # before values are kept, and after
        model = fully_sharded(world, filled(1))
        cut = f"{path}-{fails}.cut"
        if rank == 0:
            shutil.copy(path, cut)
        distributed.barrier()

        def cutting(*arguments: Any, cut: str = cut) -> None:
            distributed.barrier()
            if rank == 0:
                os.truncate(cut, 0)
            distributed.barrier()
            fill_parts(*arguments)

        text = "[Tt]he model was not changed" if fails else "may have changed in part: load it anew: CheckpointError"
        with mock.patch("autoalign.loading.sharded.fill_parts", cutting), warnings.catch_warnings():
            if fails:
                warnings.simplefilter("error", ValueWarning)
            with pytest.raises((AlignmentError, CheckpointError), match=text):
                autoalign.load(model, cut, strict=True)
        if fails:
            assert_loaded(model, filled(1))


def expect(
    kind: type[BaseException], text: str, model: nn.Module, source: Any, *, strict: bool = True, progress: Any = None
) -> None:
    with pytest.raises(kind, match=text):
        autoalign.load(model, source, strict=strict, progress=progress)


def adapts(_rank: int, world: int, path: str) -> None:
    """Rows that only the model has stay its own, wherever they are."""
    source = dict(open_checkpoint(path))
    source["wte.weight"] = source["wte.weight"][:9]
    model, own = fully_sharded(world, filled(1)), filled(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        autoalign.load(model, source, adapt=("vocab",))
    found = whole(model.embed.weight)
    assert torch.equal(found[:9], filled().embed.weight[:9])
    assert torch.equal(found[9:], own.embed.weight[9:])


def dequantises(_rank: int, world: int, path: str) -> None:
    source = dict(open_checkpoint(path))
    scale = source["wte.weight"].abs().amax(1, keepdim=True) / 127
    codes = (source["wte.weight"] / scale).round().to(torch.int8)
    source |= {"wte.weight": codes, "wte.weight_scale": scale}
    model = fully_sharded(world, filled(1).half())
    alignment = autoalign.load(model, source, strict=True)
    assert torch.equal(whole(model.embed.weight), (codes * scale).half())
    assert not [note for note in alignment.notes if "cannot hold" in note]


def loads_sharded_tensors(rank: int, world: int, path: str) -> None:
    """Tensors that are spread over the ranks fill a plain model on each, and are refused for a sharded one."""
    source = fully_sharded(world, filled())
    spread = {f"net.{key}": tensor for key, tensor in source.state_dict().items()}
    for assign in (False, True):
        model = filled(1)
        autoalign.load(model, spread, strict=True, assign=assign)
        assert_loaded(model, filled())
        assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    model = fully_sharded(world, filled(1))
    expect(InputError, "is spread over processes as the model is", model, spread)
    assert_loaded(model, filled(1))
    torch.save(spread, f"{path}-{rank}.pt")


def on_cuda(rank: int, world: int, path: str) -> None:
    torch.cuda.set_device(rank)
    model = fully_sharded(world, filled(1).cuda(), "cuda")
    autoalign.load(model, path, strict=True)
    assert_loaded(model, filled())
