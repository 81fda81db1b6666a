"""Containers by their own writers: NeMo, Megatron-core, Megatron-LM, GPT-NeoX, DeepSpeed's ZeRO, and Meta's Llama.

``python -m tests.checkpoints.formats.writing_containers KIND`` writes one into ``written/`` anew, on a CPU. ``neox``
and ``lm`` need a checkout of GPT-NeoX or Megatron-LM in ``PYTHONPATH``, since neither is a package of an index. What
several processes write is started as two, by ``torchrun --nproc-per-node 2 -m ...``, and kept as an archive.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import typing
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from math import prod
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.checkpoints.formats.writing import WRITTEN

WIDTH, HIDDEN, WORDS = 8, 20, 30


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


def blocks(*names: str, first: int = 0) -> dict[str, tuple[int, ...]]:
    """Shapes of two blocks of a transformer, by what they call the layers."""
    norm, qkv, dense, second_norm, up, down = names[1:]
    shapes = {norm: (WIDTH,), qkv: (3 * WIDTH, WIDTH), dense: (WIDTH, WIDTH), second_norm: (WIDTH,)}
    shapes |= {up: (HIDDEN, WIDTH), down: (WIDTH, HIDDEN)}
    return {
        f"{names[0].format(block)}.{name}.{leaf}": shape[: 2 if leaf == "weight" else 1]
        for block in (first, first + 1)
        for name, shape in shapes.items()
        for leaf in ("weight", "bias")
    }


NEOX = values(
    {
        "layer.0.word_embeddings.weight": (WORDS, WIDTH),
        **blocks(
            "layer.{}",
            *("input_layernorm", "attention.query_key_value", "attention.dense"),
            *("post_attention_layernorm", "mlp.linear1", "mlp.linear2"),
            first=2,
        ),
        "layer.5.norm.weight": (WIDTH,),
        "layer.5.norm.bias": (WIDTH,),
        "layer.6.final_linear.weight": (WORDS, WIDTH),
    }
)
MEGATRON = values(
    {
        "embedding.word_embeddings.weight": (WORDS, WIDTH),
        "embedding.position_embeddings.weight": (6, WIDTH),
        **blocks(
            "decoder.layers.{}",
            *("input_layernorm", "self_attention.linear_qkv", "self_attention.linear_proj"),
            *("pre_mlp_layernorm", "mlp.linear_fc1", "mlp.linear_fc2"),
        ),
        "decoder.final_layernorm.weight": (WIDTH,),
        "decoder.final_layernorm.bias": (WIDTH,),
    }
)


META_PARAMS: dict[str, Any] = {"dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": WORDS}
META_PARAMS |= {"multiple_of": 4, "norm_eps": 1e-5, "rope_theta": 500000.0}
META = values(
    {
        "tok_embeddings.weight": (WORDS, 16),
        **{
            f"layers.{layer}.{name}.weight": shape
            for layer in range(2)
            for name, shape in {
                "attention.wq": (16, 16),
                "attention.wk": (8, 16),
                "attention.wv": (8, 16),
                "attention.wo": (16, 16),
                "feed_forward.w1": (44, 16),
                "feed_forward.w2": (16, 44),
                "feed_forward.w3": (44, 16),
                "attention_norm": (16,),
                "ffn_norm": (16,),
            }.items()
        },
        "norm.weight": (16,),
        "output.weight": (WORDS, 16),
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


@contextmanager
def processes(name: str) -> Iterator[tuple[int, Path]]:
    """Join the others, on a machine without a GPU; what is written into a folder becomes an archive."""
    settings = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": os.environ.get("RANK", 0), "MASTER_ADDR": "127.0.0.1"}
    settings |= {"MASTER_PORT": 29511, "DS_ACCELERATOR": "cpu", "CUDA_DEVICE_MAX_CONNECTIONS": 1}
    for key, value in settings.items():
        os.environ.setdefault(key, str(value))
    cuda: Any = torch.cuda
    cuda.synchronize, cuda.set_device, cuda.current_device = lambda *_: None, lambda *_: None, lambda: "cpu"
    cuda.get_rng_state = lambda *_: torch.get_rng_state()
    cuda.get_device_properties = lambda *_: SimpleNamespace(major=8, minor=0)
    torch.distributed.init_process_group("gloo")
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    folder = Path(tempfile.gettempdir(), f"written-{os.getppid()}")
    folder.mkdir(exist_ok=True)
    os.chdir(folder)  # so that no path of a machine is written
    yield count, Path("out")
    torch.distributed.barrier()
    if rank == 0:
        for script in folder.glob("out/*.py"):  # DeepSpeed's, which are not needed
            script.unlink()
        shutil.make_archive(str(WRITTEN / name.format(count)), "zip", folder / "out")
        shutil.rmtree(folder)


def fill(model: nn.Module, whole: Mapping[str, Tensor], start: str = "") -> None:
    """Give each process its own part, by what the parameters know of that."""
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for key, parameter in model.named_parameters():
        is_part = getattr(parameter, "tensor_model_parallel", getattr(parameter, "model_parallel", False))
        dim: int = getattr(parameter, "partition_dim", 0)
        tensor = whole[start + key]
        parameter.data = (tensor.chunk(count, dim)[rank] if is_part else tensor).clone()


def write_neox() -> None:
    with processes("neox-{}") as (count, folder):
        deepspeed: Any = import_module("deepspeed")
        arguments: Any = import_module("megatron.neox_arguments")
        topology: Any = import_module("deepspeed.runtime.pipe.topology")
        Path("tiny.yml").write_text(
            f'''{{
  "pipe_parallel_size": 1,
  "model_parallel_size": {count},
  "num_layers": 2,
  "hidden_size": {WIDTH},
  "intermediate_size": {HIDDEN},
  "num_attention_heads": 2,
  "seq_length": 6,
  "max_position_embeddings": 6,
  "pos_emb": "rotary",
  "no_weight_tying": true,
  "use_cpu_initialization": true,
  "precision": "fp32",
  "no_save_rng": true,
  "save": "{folder}",
  "checkpoint_factor": 1,
  "train_iters": 1,
  "lr_decay_iters": 1,
  "train_micro_batch_size_per_gpu": 1,
  "vocab_file": "words",
  "optimizer": {{"type": "Adam", "params": {{"lr": 0.001}}}}
}}
'''
        )
        args = arguments.NeoXArgs.from_ymls(["tiny.yml"], overwrite_values={"global_num_gpus": count})
        args.padded_vocab_size = WORDS
        grid = topology.PipeModelDataParallelTopology(num_pp=1, num_mp=count, num_dp=1)
        deepspeed.init_distributed("gloo")
        import_module("megatron.mpu").initialize_model_parallel(count, topology=grid)
        model = import_module("megatron.model").GPT2ModelPipe(neox_args=args, topology=grid)
        fill(model, NEOX, "layer.")
        optimizer = torch.optim.Adam(model.parameters())
        config = {"train_micro_batch_size_per_gpu": 1}
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        import_module("megatron.checkpointing").save_checkpoint(args, 1, engine, optimizer, None)


def write_lm() -> None:
    typing.override = import_module("typing_extensions").override  # type: ignore[attr-defined] # before Python 3.12
    with processes("megatron-lm") as (count, folder):
        import_module("megatron.core.parallel_state").initialize_model_parallel(count)
        arguments: Any = import_module("megatron.training.arguments")
        sys.argv[1:] = f"""--num-layers 2 --hidden-size {WIDTH} --ffn-hidden-size {HIDDEN} --num-attention-heads 2
            --seq-length 6 --max-position-embeddings 6 --micro-batch-size 1 --tensor-model-parallel-size {count}
            --transformer-impl local --use-cpu-initialization --no-persist-layer-norm --no-gradient-accumulation-fusion
            --vocab-size {WORDS} --tokenizer-type NullTokenizer --lr 1e-3 --train-iters 1
            --ckpt-format torch --save {folder} --save-interval 1 --no-save-rng --no-save-optim""".split()
        args = arguments.parse_args()
        args.rank, args.world_size = torch.distributed.get_rank(), count
        arguments.validate_args(args)
        import_module("megatron.training.global_vars").set_args(args)
        specs: Any = import_module("megatron.core.models.gpt.gpt_layer_specs")
        model = import_module("megatron.core.models.gpt").GPTModel(
            arguments.core_transformer_config_from_args(args),
            specs.get_gpt_layer_local_spec(),
            WORDS,
            6,
            position_embedding_type="learned_absolute",
            share_embeddings_and_output_weights=True,
        )
        fill(model, MEGATRON)
        import_module("megatron.training.checkpointing").save_checkpoint(1, [model], None, None, 0)


class Trained(nn.Module):
    """With tied, frozen and other parameters of two groups, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(WIDTH - 1, 13), nn.LayerNorm(13)
        self.head, self.tied, self.frozen = nn.Linear(13, 3), nn.Linear(13, 3, bias=False), nn.Linear(3, 3)
        self.tied.weight = self.head.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("steps", torch.arange(3.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        found: Tensor = self.frozen(self.head(x) + self.tied(x))
        return found


def write_zero(stage: int) -> None:
    """After a step of training in bfloat16, with the values that DeepSpeed's own conversion gives."""
    with processes(f"zero-{stage}") as (_, folder):
        deepspeed: Any = import_module("deepspeed")
        torch.manual_seed(0)
        model = Trained()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [{"params": [each for each in trained if (each.dim() > 1) == flag]} for flag in (True, False)]
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-3), config=config)
        engine.backward(engine(torch.randn(4, WIDTH - 1, dtype=torch.bfloat16)).float().square().mean())
        engine.step()
        engine.save_checkpoint(str(folder))
        torch.distributed.barrier()
        convert: Any = import_module("deepspeed.utils.zero_to_fp32")
        whole = convert.get_fp32_state_dict_from_zero_checkpoint(str(folder))
        frozen = {key: tensor for key, tensor in model.state_dict().items() if "frozen" in key}  # lost at stage 1
        whole = frozen | whole
        if torch.distributed.get_rank() == 0:
            found = {key: tensor.detach().float().numpy() for key, tensor in whole.items()}
            np.savez_compressed(WRITTEN / f"zero-{stage}.npz", **found)


def write_meta() -> None:
    """Parts of the model that Meta publishes as llama-models; what writes its files was never published."""
    with processes("meta-{}") as (count, folder):
        parallel: Any = import_module("fairscale.nn.model_parallel.initialize")
        parallel.initialize_model_parallel(count)
        package: Any = import_module("llama_models.llama3.model")
        arguments: Any = import_module("llama_models.llama3.args")
        model = package.Transformer(arguments.ModelArgs(**META_PARAMS, max_seq_len=8))
        for key, parameter in model.named_parameters():
            whole, rank = META[key], torch.distributed.get_rank()
            dim = next((dim for dim, size in enumerate(parameter.shape) if size != whole.shape[dim]), None)
            parameter.data = (whole if dim is None else whole.chunk(count, dim)[rank]).to(torch.bfloat16)
        folder.mkdir(exist_ok=True)
        torch.save(model.state_dict(), folder / f"consolidated.{torch.distributed.get_rank():02}.pth")
        (folder / "params.json").write_text(json.dumps(META_PARAMS))


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


KINDS: dict[str, Callable[..., None]] = {
    "nemo": write_nemo,
    "core": write_megatron,
    "lm": write_lm,
    "meta": write_meta,
    "neox": write_neox,
    "zero": write_zero,
}

if __name__ == "__main__":
    KINDS[sys.argv[1]](*map(int, sys.argv[2:]))
