"""transformers' own ``from_pretrained``, with weights of timm's networks and of one written by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import autoalign
from autoalign import AlignmentError, DependencyError, IncompatibleTensorsError, InputError, PartialLoadWarning

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CONFIG = transformers.BertConfig(vocab_size=90, max_position_embeddings=16, **SIZES)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.attn_norm, self.mlp_norm = nn.LayerNorm(32), nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.segments = nn.Embedding(90, 32), nn.Embedding(16, 32), nn.Embedding(2, 32)
        self.norm = nn.LayerNorm(32)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.pooler = nn.Linear(32, 32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(
        {key: torch.rand_like(value) for key, value in Encoder().state_dict().items()}, tmp_path / "own.safetensors"
    )
    CONFIG.save_pretrained(tmp_path)
    return tmp_path


def own(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "own.safetensors")


def test_a_model_is_returned_as_transformers_returns_it(folder: Path) -> None:
    model, info = autoalign.hf.from_pretrained(
        transformers.BertModel, folder, dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True
    )
    assert type(model) is transformers.BertModel
    assert (model.dtype, model.training, model.config._attn_implementation) == (torch.bfloat16, False, "eager")
    assert not info["missing_keys"]
    assert info["alignment"].missing_keys == []
    weight = own(folder)["blocks.1.qkv.weight"][32:64].bfloat16()
    assert torch.equal(model.encoder.layer[1].attention.self.key.weight, weight)


def test_a_class_of_auto_classes_takes_the_configuration_as_it_is_given(folder: Path) -> None:
    for config in (None, CONFIG, str(folder)):
        model = autoalign.hf.from_pretrained(transformers.AutoModel, folder / "own.safetensors", config=config)
        assert type(model) is transformers.BertModel
        assert torch.equal(model.embeddings.word_embeddings.weight, own(folder)["tokens.weight"])


def test_what_is_missing_gets_initial_values_with_a_warning(folder: Path) -> None:
    given = {key: value for key, value in own(folder).items() if not key.startswith("pooler")}
    with pytest.warns(PartialLoadWarning, match="2 get initial values: pooler.dense.weight, pooler.dense.bias"):
        model = autoalign.hf.from_pretrained(transformers.BertModel, given, config=CONFIG)
    assert 0 < float(model.pooler.dense.weight.detach().std()) < 0.1
    with pytest.raises(IncompatibleTensorsError, match="pooler"):
        autoalign.hf.from_pretrained(transformers.BertModel, given, config=CONFIG, strict=True)


def test_a_configuration_that_is_not_there_or_of_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"no config.json of transformers beside .* Pass config="):
        autoalign.hf.from_pretrained(transformers.BertModel, own(folder))
    with pytest.raises(InputError, match="is of a 'bert', and not of a 'vit'"):
        autoalign.hf.from_pretrained(transformers.ViTModel, folder)


def test_a_generation_config_beside_the_checkpoint_is_kept(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(vocab_size=90, num_key_value_heads=2, **SIZES)
    given = transformers.LlamaForCausalLM(config)
    given.generation_config.eos_token_id = [7, 8]
    given.save_pretrained(tmp_path)
    model = autoalign.hf.from_pretrained(transformers.LlamaForCausalLM, tmp_path)
    assert model.generation_config.eos_token_id == [7, 8]
    ids = torch.arange(6)[None]
    assert torch.equal(model(ids).logits, given.eval()(ids).logits)


@pytest.mark.usefixtures("registry")
def test_conversions_are_registered_and_reversed_where_a_model_is_saved(folder: Path) -> None:
    alignment = autoalign.align(own(folder), transformers.BertModel(CONFIG))
    conversions = autoalign.hf.register(transformers.BertModel, alignment)
    assert {type(item).__name__ for item in conversions} == {"WeightRenaming", "WeightConverter"}
    (folder / "own.safetensors").rename(folder / "model.safetensors")
    model, info = transformers.BertModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in alignment.state_dict().items())
    model.save_pretrained(folder / "saved")
    saved, before = load_file(folder / "saved" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[key], value) for key, value in before.items())
    with pytest.raises(InputError, match=r"already exists.*Nothing was registered"):
        autoalign.hf.register("BertModel", alignment.rules())


@pytest.mark.usefixtures("registry")
def test_what_transformers_loses_is_an_error(folder: Path) -> None:
    rules = autoalign.Rules((autoalign.Rule((r"^pooler\.dense\.",), ("encoder.layer.0.output.dense.",)),))
    autoalign.hf.register(transformers.BertModel, rules)
    with pytest.raises(
        AlignmentError, match="conversions of its own for BertModel, by which 2 tensors were lost: pooler"
    ):
        autoalign.hf.from_pretrained(transformers.BertModel, folder)


def test_without_transformers_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DependencyError, match=r"pip install 'autoalign\[transformers\]'"):
        autoalign.hf.from_pretrained(object, {})
