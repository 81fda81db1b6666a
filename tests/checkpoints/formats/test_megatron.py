"""Files of single layers and parts of tensor parallelism, as GPT-NeoX, Megatron and Meta save them."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import autoalign
from autoalign.checkpoints.checkpoint import open_checkpoint
from autoalign.errors import CheckpointError

WIDTH, HIDDEN, WORDS = 8, 20, 30
BY_COLUMNS = ("attention.dense.weight", "dense_4h_to_h.weight")
WHOLE = ("norm", "attention.dense.bias", "dense_4h_to_h.bias", "position")


class Block(nn.Module):
    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        attention = {"query_key_value": nn.Linear(WIDTH, 3 * WIDTH), "dense": nn.Linear(WIDTH, WIDTH)}
        self.attention = nn.ModuleDict(attention)
        up, down = nn.Linear(WIDTH, (1 + gated) * HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.mlp = nn.ModuleDict({"dense_h_to_4h": up, "dense_4h_to_h": down})


def network(blocks: int = 11, gated: bool = False) -> nn.Module:
    torch.manual_seed(0)
    embedding = nn.ModuleDict({"word_embeddings": nn.Embedding(WORDS, WIDTH), "position": nn.Embedding(9, WIDTH)})
    parts = [embedding, *(Block(gated) for _ in range(blocks)), nn.LayerNorm(WIDTH)]
    return nn.ModuleDict({"layers": nn.ModuleList(parts), "head": nn.Linear(WIDTH, WORDS, bias=False)})


def cut(key: str, tensor: Tensor, count: int, gated: bool = False) -> list[Tensor]:
    """Cut a tensor as the linear layers of tensor parallelism do."""
    if any(name in key for name in WHOLE):
        return [tensor] * count
    if gated and "dense_h_to_4h" in key:  # each process has its part of the gate, then of what it gates
        halves = [torch.chunk(half, count) for half in torch.chunk(tensor, 2)]
        return [torch.cat(pair) for pair in zip(*halves, strict=True)]
    return list(torch.chunk(tensor, count, 1 if key.endswith(BY_COLUMNS) else 0))


def write_layers(folder: Path, count: int, blocks: int = 11) -> nn.Module:
    """As GPT-NeoX does: a file for each layer, with empty ones among them, and for each part of it."""
    model = network(blocks)
    layers = dict(enumerate(model.get_submodule("layers").children())) | {
        13: nn.ModuleDict({"final": model.get_submodule("head")})
    }
    for number, layer in layers.items():
        pieces = {
            key: cut(f"norm.{key}" if isinstance(layer, nn.LayerNorm) else key, tensor, count)
            for key, tensor in layer.state_dict().items()
        }
        for part in range(count):
            own = {key: parts[part].clone() for key, parts in pieces.items()}
            torch.save(own, folder / f"layer_{number:02}-model_{part:02}-model_states.pt")
    torch.save({}, folder / "layer_14-model_00-model_states.pt")
    for part in range(1, count):
        torch.save({}, folder / f"layer_14-model_{part:02}-model_states.pt")
    torch.save({"module": None, "args": Namespace(x=1)}, folder / "mp_rank_00_model_states.pt")
    return model


def assert_loaded(source: nn.Module, folder: Path) -> autoalign.Alignment:
    model = network(gated=source.state_dict()["layers.1.mlp.dense_h_to_4h.weight"].shape[0] > HIDDEN)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    alignment = autoalign.load(model, folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))
    return alignment


def test_the_number_of_a_layer_is_in_the_name_of_its_file(tmp_path: Path) -> None:
    source = write_layers(tmp_path, 1)
    assert_loaded(source, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert [key.split(".")[1] for key in checkpoint if "query_key_value.bias" in key] == [str(n) for n in range(1, 12)]
    assert "layer.13.final.weight" in checkpoint
    (tmp_path / "latest").write_text("step")
    (tmp_path / "step").mkdir()
    for path in tmp_path.glob("*.pt"):
        path.rename(tmp_path / "step" / path.name)
    assert list(open_checkpoint(tmp_path)) == list(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "configs/20B.yml"])
def test_parts_of_layers_are_joined_by_the_width_that_is_configured(tmp_path: Path, name: str) -> None:
    source = write_layers(tmp_path, 2)
    with pytest.raises(CheckpointError, match=r"how it is to be joined follows from its configuration, which is not"):
        open_checkpoint(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps({"hidden_size": WIDTH}) if "json" in name else f'"hidden-size": {WIDTH},\n')
    alignment = assert_loaded(source, tmp_path)
    counts = "46 by rows, 69 alike in all, 22 by columns"
    assert (
        f"Joined from 2 parts of tensor parallelism, by the width that the configuration states: {counts}."
        in alignment.notes
    )


@pytest.mark.parametrize("gated", [False, True])
def test_parts_of_megatron(tmp_path: Path, gated: bool) -> None:
    source = network(gated=gated)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20")
    for part in range(4):
        folder = tmp_path / "iter_0000020" / f"mp_rank_{part:02}"
        folder.mkdir(parents=True)
        own = {}
        for key, tensor in source.state_dict().items():
            if "head" not in key and "word" not in key:  # of thirty words
                pieces = cut(f"norm.{key}" if key.startswith("layers.12") else key, tensor, 4, gated)
                own[key] = pieces[part].clone()
        args = Namespace(hidden_size=WIDTH, swiglu=gated, tensor_model_parallel_size=4)
        saved = {"args": args, "checkpoint_version": 3.0, "model": {"language_model": own}, "optimizer": {}}
        torch.save(saved, folder / "model_optim_rng.pt")
    checkpoint = open_checkpoint(tmp_path)
    wanted = {key: tensor for key, tensor in source.state_dict().items() if key in own}
    assert list(checkpoint) == [f"language_model.{key}" for key in wanted]
    assert all(torch.equal(checkpoint[f"language_model.{key}"], tensor) for key, tensor in wanted.items())


def test_parts_of_meta(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = {
        "tok.weight": torch.randn(WORDS, WIDTH),
        "wq.weight": torch.randn(WIDTH, WIDTH),
        "norm.weight": torch.ones(WIDTH),
    }
    for part, (tok, wq) in enumerate(zip(whole["tok.weight"].chunk(2, 1), whole["wq.weight"].chunk(2, 0), strict=True)):
        own = {"tok.weight": tok.clone(), "wq.weight": wq.clone(), "norm.weight": whole["norm.weight"]}
        torch.save(own, tmp_path / f"consolidated.{part:02}.pth")
    (tmp_path / "params.json").write_text(json.dumps({"dim": WIDTH, "n_heads": 2}))
    checkpoint = open_checkpoint(tmp_path)
    assert all(torch.equal(checkpoint[key], tensor) for key, tensor in whole.items())
    (tmp_path / "consolidated.01.pth").unlink()
    assert open_checkpoint(tmp_path)["wq.weight"].shape == (WIDTH // 2, WIDTH)  # one file is one file


@pytest.mark.parametrize(("name", "shape"), [("dense_h_to_4h", (32, 8)), ("dense_4h_to_h", (8, 32)), ("w3", (32, 8))])
def test_the_names_of_layers_tell_where_their_parts_are_squares(
    tmp_path: Path, name: str, shape: tuple[int, int]
) -> None:
    whole = torch.randn(shape)
    for number, part in enumerate(torch.chunk(whole, 4, shape.index(32))):
        torch.save({f"mlp.{name}.weight": part.clone()}, tmp_path / f"layer_02-model_{number:02}-model_states.pt")
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    assert torch.equal(open_checkpoint(tmp_path)[f"layer.2.mlp.{name}.weight"], whole)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (
            [{"a.weight": torch.zeros(8, 8)}, {"a.weight": torch.ones(8, 8)}],
            r"a\.weight \[8, 8\] is one of 2 parts, and",
        ),
        ([{"a.weight": torch.zeros(3, 5)}, {"a.weight": torch.ones(3, 5)}], "does not tell along which dimension"),
        ([{"n.weight": torch.zeros(8)}, {"n.weight": torch.ones(8)}], r"n\.weight \[8\] is not the same in all parts"),
        (
            [{"a.weight": torch.zeros(4, 8)}, {"a.weight": torch.ones(3, 8)}],
            "has other shapes or dtypes in other parts",
        ),
        ([{"a.bias": torch.zeros(8)}, {"a.bias": torch.zeros(8).half()}], r"a\.bias has other shapes or dtypes"),
        ([{"a.weight": torch.zeros(4, 8)}, {"b.weight": torch.ones(4, 8)}], "its parts hold tensors of other names"),
        ([{"checkpoint_version": 0, "model": {}}, {"model": {}}], "Its version keeps query, key and value apart"),
        ([{"a.weight": torch.zeros(4, 8)}, None, {"a.weight": torch.ones(4, 8)}], "lacks 1 of its 3 parts: part 1 of"),
    ],
)
def test_what_leaves_open_how_to_join_is_refused(tmp_path: Path, parts: list[object], text: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": WIDTH}))
    for number, part in enumerate(parts):
        if part is not None:
            (tmp_path / f"mp_rank_{number:02}").mkdir()
            torch.save(part, tmp_path / f"mp_rank_{number:02}" / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match=text):
        open_checkpoint(tmp_path)


def test_stages_of_a_pipeline_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mp_rank_00_001").mkdir()
    torch.save({"model": {}}, tmp_path / "mp_rank_00_001" / "model_optim_rng.pt")
    with pytest.raises(
        CheckpointError, match="the stages of a pipeline, in each of which layers are numbered from zero"
    ):
        open_checkpoint(tmp_path)
