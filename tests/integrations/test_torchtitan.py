"""Adapters against those that torchtitan has for its own models, and its way of loading Hugging Face's files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from autoalign import DependencyError, PartialLoadWarning
from autoalign.integrations.torchtitan import state_dict_adapter

pytestmark = pytest.mark.filterwarnings("ignore")


def configured(name: str) -> tuple[Any, type]:
    module = pytest.importorskip(f"torchtitan.models.{name}")
    (adapter,) = (value for key, value in vars(module).items() if key.endswith("StateDictAdapter"))
    return getattr(module, f"{name}_configs")["debugmodel"](attn_backend="flex"), adapter


def checkpoint(config: Any, adapter: Any, folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of a model of torchtitan, and the same as Hugging Face's files have them, which are written."""
    own = {key: torch.randn_like(value) for key, value in config.build().state_dict().items()}
    theirs = {key: value.clone().contiguous() for key, value in adapter(config, None).to_hf(dict(own)).items()}
    save_file(theirs, folder / "model.safetensors")
    attention = config.layers[0].attention
    settings = {"model_type": kind, "architectures": [""], "hidden_size": config.dim}
    settings["num_attention_heads"] = attention.n_heads
    settings["num_key_value_heads"] = attention.n_kv_heads or attention.n_heads
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return own, theirs


@pytest.mark.parametrize(("name", "kind"), [("llama3", "llama"), ("qwen3", "qwen3")])
def test_it_converts_as_the_adapter_written_by_hand(name: str, kind: str, tmp_path: Path) -> None:
    config, by_hand = configured(name)
    own, theirs = checkpoint(config, by_hand, tmp_path, kind)
    adapter = state_dict_adapter()(config, str(tmp_path))
    there, back = by_hand(config, None).from_hf(dict(theirs)), adapter.from_hf(theirs)
    assert there.keys() == back.keys()
    assert all(torch.equal(back[key], value) for key, value in there.items())
    again = adapter.to_hf(own)
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[key], value) for key, value in theirs.items())


def test_files_are_read_as_torchtitan_reads_them(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_loader import load

    config, by_hand = configured("llama3")
    own, _ = checkpoint(config, by_hand, tmp_path, "llama")
    model, adapter = config.build(), state_dict_adapter()(config, str(tmp_path))
    wanted = adapter.to_hf({key: torch.zeros_like(value) for key, value in model.state_dict().items()})
    load(wanted, storage_reader=adapter.get_hf_storage_reader(str(tmp_path)))
    model.load_state_dict(adapter.from_hf(wanted))
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())


def test_what_gets_nothing_is_warned_of(tmp_path: Path) -> None:
    config, by_hand = configured("llama3")
    _, theirs = checkpoint(config, by_hand, tmp_path, "llama")
    del theirs["lm_head.weight"]
    save_file(theirs, tmp_path / "model.safetensors")
    with pytest.warns(PartialLoadWarning, match="1 get nothing from it: lm_head.weight"):
        assert len(state_dict_adapter()(config, str(tmp_path)).from_hf(theirs)) == len(theirs)


def test_without_torchtitan_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchtitan", None)
    monkeypatch.setitem(sys.modules, "torchtitan.models.common.rope", None)
    with pytest.raises(DependencyError, match="pip install torchtitan"):
        state_dict_adapter()
