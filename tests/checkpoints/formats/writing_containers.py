"""Containers by their own writers: NeMo's archive, DeepSpeed's files of layers, Megatron's distributed checkpoint.

``python -m tests.checkpoints.formats.writing_containers KIND`` writes one into ``written/`` anew, on a CPU; those of
``layers`` are written by two processes if it is started as two, by ``torchrun --nproc-per-node 2 -m ...``.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Mapping
from importlib import import_module
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tests.checkpoints.formats.writing import WRITTEN

WIDTH, HIDDEN = 8, 20


def values(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Numbers for some keys, which tell every one and every place of it from others."""
    return {
        key: ((torch.arange(prod(shape)) * 7 + 5 * place) % 31 / 8 - 2).reshape(shape)
        for place, (key, shape) in enumerate(shapes.items())
    }


ARCHIVE = values(
    {
        "encoder.weight": (HIDDEN, WIDTH),
        "encoder.bias": (HIDDEN,),
        "norm.weight": (HIDDEN,),
        "norm.bias": (HIDDEN,),
        "norm.running_mean": (HIDDEN,),
        "norm.running_var": (HIDDEN,),
        "decoder.weight": (3, HIDDEN),
        "decoder.bias": (3,),
    }
)
LAYERS = values(
    {
        f"{layer}.{key}": shape
        for layer in range(3)
        for key, shape in {
            "norm.weight": (WIDTH,),
            "norm.bias": (WIDTH,),
            "dense_h_to_4h.weight": (HIDDEN, WIDTH),
            "dense_h_to_4h.bias": (HIDDEN,),
            "dense_4h_to_h.weight": (WIDTH, HIDDEN),
            "dense_4h_to_h.bias": (WIDTH,),
        }.items()
    }
)


def write_nemo() -> None:
    stub: Any = ModuleType("overrides")  # which refuses the telemetry's classes
    stub.override = stub.overrides = stub.final = lambda function: function
    stub.EnforceOverrides = object
    sys.modules["overrides"] = stub
    classes: Any = import_module("nemo.core.classes")
    omegaconf: Any = import_module("omegaconf")

    class Model(classes.ModelPT):  # type: ignore[misc]
        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg=cfg)
            self.encoder, self.norm = nn.Linear(WIDTH, HIDDEN), nn.BatchNorm1d(HIDDEN)
            self.decoder = nn.Linear(HIDDEN, 3)

        def setup_training_data(self, _: Any) -> None: ...
        def setup_validation_data(self, _: Any) -> None: ...
        @classmethod
        def list_available_models(cls) -> list[str]:
            return []

    model = Model(omegaconf.OmegaConf.create({"width": WIDTH, "optim": {"name": "adam"}}))
    model.load_state_dict(ARCHIVE, strict=False)
    model.save_to(str(WRITTEN / "nemo" / "model.nemo"))


def write_layers() -> None:
    rank, count = int(os.environ.setdefault("RANK", "0")), int(os.environ.setdefault("WORLD_SIZE", "1"))
    for name, value in {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}.items():
        os.environ.setdefault(name, value)
    import_module("deepspeed").init_distributed("gloo")
    pipe: Any = import_module("deepspeed.runtime.pipe.module")
    topology: Any = import_module("deepspeed.runtime.pipe.topology")
    engine: Any = import_module("deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine")

    class Layer(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            for key, tensor in LAYERS.items():
                layer, module, name = key.split(".")
                if int(layer) == number:
                    is_row = module == "dense_4h_to_h"
                    is_whole = module == "norm" or (is_row and name == "bias")
                    part = tensor if is_whole else tensor.chunk(count, int(is_row))[rank]
                    if module not in self._modules:
                        self.add_module(module, nn.Module())
                    self.get_submodule(module).register_parameter(name, nn.Parameter(part.clone()))

        def forward(self, x: Tensor) -> Tensor:
            return x

    parts = topology.PipeModelDataParallelTopology(num_pp=1, num_mp=count, num_dp=1)
    model = pipe.PipelineModule([pipe.LayerSpec(Layer, number) for number in range(3)], topology=parts)
    model.checkpoint_parallel_write_pipeline = False
    model.save_state_dict(str(WRITTEN / f"layers-{count}"), engine.TorchCheckpointEngine())


def write_megatron() -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29513", "RANK": "0", "WORLD_SIZE": "1"}
    torch.distributed.init_process_group("gloo")
    package: Any = import_module("megatron.core.dist_checkpointing")
    mapping: Any = import_module("megatron.core.dist_checkpointing.mapping")
    cuda: Any = torch.cuda
    cuda.synchronize, cuda.current_device = lambda *_: None, lambda: "cpu"
    model = {key: mapping.ShardedTensor.from_rank_offsets(key, tensor) for key, tensor in ARCHIVE.items()}
    (WRITTEN / "megatron").mkdir(exist_ok=True)
    package.save({"model": model, "args": Namespace(hidden_size=WIDTH), "iteration": 5}, str(WRITTEN / "megatron"))


if __name__ == "__main__":
    {"nemo": write_nemo, "layers": write_layers, "megatron": write_megatron}[sys.argv[1]]()
