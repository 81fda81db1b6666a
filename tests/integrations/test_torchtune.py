"""torchtune's own checkpointer, of a file that ``convert`` wrote from Hugging Face's folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import autoalign

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_converted_file_is_what_its_checkpointer_reads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    try:  # torchtune raises what it likes where torchao is of another version
        from torchtune.models import convert_weights
        from torchtune.models.llama3 import llama3
        from torchtune.training import FullModelTorchTuneCheckpointer
    except Exception as error:
        pytest.skip(f"torchtune: {error}")
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 90}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    theirs = transformers.LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path / "hf")
    model = llama3(
        vocab_size=90, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=32, max_seq_len=64, intermediate_dim=48
    )
    model.rotary_interleaved = True
    autoalign.convert(tmp_path / "hf", model, tmp_path / "tune" / "model.safetensors", strict=True)
    reader = FullModelTorchTuneCheckpointer(
        str(tmp_path / "tune"), ["model.safetensors"], "LLAMA3", str(tmp_path / "out")
    )
    values = reader.load_checkpoint()["model"]
    assert model.load_state_dict(values) == ([], [])
    by_hand = convert_weights.hf_to_tune(theirs.state_dict(), num_heads=4, num_kv_heads=2, dim=32)
    assert all(torch.equal(values[key], value) for key, value in by_hand.items())
