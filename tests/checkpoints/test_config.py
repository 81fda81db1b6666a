from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from autoalign.checkpoints.checkpoint import checkpoint_of, open_checkpoint

WEIGHT = {"fc.weight": torch.ones(2, 2)}


@pytest.mark.parametrize("name", ["config.json", "params.json"])
def test_beside_a_file(tmp_path: Path, name: str) -> None:
    config = {"num_attention_heads": 4, "rope": {"theta": 1e4}, "kinds": ["a", None]}
    save_file(WEIGHT, tmp_path / "model.safetensors")
    (tmp_path / name).write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    assert checkpoint.config == config
    assert checkpoint.notes == ()


@pytest.mark.parametrize("content", ["{", "[1]", "\udc80", "[" * 100_000, "{}" + " " * 2**24])
def test_a_broken_file_is_a_note(tmp_path: Path, content: str) -> None:
    save_file(WEIGHT, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    assert (dict(checkpoint.config), list(checkpoint)) == ({}, ["fc.weight"])
    assert len(checkpoint.notes) == 1
    assert "config.json' was not read: " in checkpoint.notes[0]


def test_in_a_file_of_torch(tmp_path: Path) -> None:
    saved = {
        "state_dict": WEIGHT,
        "hyper_parameters": {"n_head": 4, "mean": torch.ones(1), "model": {"depth": 2}},
        "args": {"n_head": 8, "lr": 0.1},
        "other": {"n_head": 16},
    }
    torch.save(saved, tmp_path / "model.ckpt")
    (tmp_path / "config.json").write_text('{"n_head": 2, "vocab_size": 5}')
    checkpoint = open_checkpoint(tmp_path / "model.ckpt")
    assert checkpoint.config == {"n_head": 4, "model": {"depth": 2}, "lr": 0.1, "vocab_size": 5}


def test_above_a_container_and_beside_it() -> None:
    copies = {"model": WEIGHT, "ema": WEIGHT, "config": {"n_head": 4}}
    saved = {"run.1": {**copies, "epoch": 1}, "args": {"width": 8}, "more": {"config": {"n_head": 1}}}
    checkpoint = checkpoint_of(saved)
    assert (checkpoint.container, checkpoint.config) == ("run.1.model", {"width": 8, "n_head": 4})
    assert checkpoint_of(checkpoint, container="ema").config == {"width": 8, "n_head": 4}


@dataclass
class Options:
    n_head: int
    act: object = nn.GELU


class FromLibrary:
    def to_dict(self) -> dict[str, object]:
        return {"n_head": 4, "dtype": torch.float32}


class Broken:
    def to_dict(self) -> dict[str, object]:
        raise KeyError("n_head")


@pytest.mark.parametrize("config", [Options(4), FromLibrary(), {"n_head": 4}, Namespace(n_head=4, f=print)])
def test_of_a_module(config: object) -> None:
    model = nn.Linear(2, 2)
    model.config = config  # type: ignore[assignment]
    assert checkpoint_of(model).config == checkpoint_of(nn.Sequential(model)).config == {"n_head": 4}


@pytest.mark.parametrize("config", [None, 3, nn.Linear(2, 2), Options, FromLibrary])
def test_of_a_module_that_has_something_else_by_that_name(config: object) -> None:
    model = nn.Linear(2, 2)
    model.config = config  # type: ignore[assignment]
    checkpoint = checkpoint_of(model)
    assert (dict(checkpoint.config), checkpoint.notes) == ({}, ())


def test_of_a_module_that_fails_is_a_note() -> None:
    model = nn.Linear(2, 2)
    model.config = Broken()  # type: ignore[assignment]
    (note,) = checkpoint_of(model).notes
    assert note == "The configuration of Linear was not read: KeyError: 'n_head'."


def test_of_a_module_of_transformers() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8, vocab_size=5)
    found = checkpoint_of(BertModel(config)).config
    assert found["num_attention_heads"] == 2


def test_data_without_end_is_cut() -> None:
    model = nn.Linear(2, 2)
    endless: dict[str, object] = {"n_head": 4}
    endless["self"] = endless
    for _ in range(100):  # each holds the last one twice
        endless = {"a": endless, "b": [endless, endless], "n_head": 4}
    model.config = endless  # type: ignore[assignment]
    assert checkpoint_of(model).config["n_head"] == 4


def test_the_attributes_of_an_object_in_a_file_are_its_configuration(tmp_path: Path) -> None:
    torch.save({"model": {"a.weight": torch.ones(2)}, "args": Namespace(heads=4, path=Path("x"))}, tmp_path / "a.pt")
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    assert checkpoint.config == {"heads": 4}
    assert "ignored: argparse.Namespace in 'args'" in checkpoint.notes[-1]
