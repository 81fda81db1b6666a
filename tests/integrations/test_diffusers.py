"""Models of diffusers, from files that its own ``from_single_file`` does not take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from autoalign import PartialLoadWarning
from autoalign.integrations.diffusers import from_single_file

diffusers = pytest.importorskip("diffusers")
SIZES = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
}


@pytest.fixture
def theirs() -> Any:
    return diffusers.UNet2DModel(**SIZES)


def renamed(model: Any) -> dict[str, torch.Tensor]:
    """Names as of code that diffusers does not know."""
    names = (("_blocks", ""), ("resnets", "res"), ("attentions", "attn"), ("time_embedding.linear_", "temb.fc"))
    values = {key: torch.rand_like(value) for key, value in model.state_dict().items()}
    for old, new in names:
        values = {key.replace(old, new): value for key, value in values.items()}
    return {f"model.{key}": value for key, value in values.items()}


def test_a_class_that_diffusers_does_not_load_from_files_is_loaded(theirs: Any, tmp_path: Path) -> None:
    given = renamed(theirs)
    save_file(given, tmp_path / "unet.safetensors")
    theirs.save_config(tmp_path / "config")
    assert not hasattr(diffusers.UNet2DModel, "from_single_file")
    for config in (theirs.config, str(tmp_path / "config")):
        model = from_single_file(
            diffusers.UNet2DModel, tmp_path / "unet.safetensors", config=config, dtype="float64", strict=True
        )
        assert (type(model), model.dtype, model.training) == (diffusers.UNet2DModel, torch.float64, False)
        assert torch.equal(model.conv_in.weight, given["model.conv_in.weight"].double())
        assert torch.equal(model.time_embedding.linear_2.bias, given["model.temb.fc2.bias"].double())
        model(torch.rand(1, 3, 8, 8).double(), 1)


def test_what_the_file_lacks_has_initial_values_with_a_warning(theirs: Any) -> None:
    given = renamed(theirs)
    del given["model.conv_out.bias"]
    with pytest.warns(PartialLoadWarning, match="1 keep their values: conv_out.bias"):
        model = from_single_file(diffusers.UNet2DModel, given, config=theirs.config)
    assert not model.conv_out.bias.is_meta
