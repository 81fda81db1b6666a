"""Guessed inputs: shapes by settings, names and layers, in the order in which they are tried."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import Tensor, nn

import autoalign
from autoalign.verification.example_inputs import guessed_inputs


def reasons(module: nn.Module, count: int = 4) -> list[str]:
    return [reason for _, reason in islice(guessed_inputs(module), count)]


def test_images_have_the_size_that_settings_tell_and_the_channels_of_the_first_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    assert reasons(model)[0] == "image [1, 4, 224, 224] by the first Conv2d"
    model[0].img_size, model[1].image_size = 48, (96, 64)  # type: ignore[assignment]
    assert reasons(model)[:2] == [
        "image [1, 4, 96, 64] by image_size of Flatten",
        "image [1, 4, 48, 48] by img_size of Conv2d",
    ]
    model.default_cfg = {"input_size": (4, 80, 80)}  # type: ignore[assignment]
    assert reasons(model)[0] == "image [1, 4, 80, 80] by default_cfg"


def test_the_first_layer_decides_between_kinds() -> None:
    assert reasons(nn.Sequential(nn.Embedding(9, 4), nn.Conv2d(4, 4, 1)))[0].startswith("ids [1, 8]")
    assert reasons(nn.Sequential(nn.Linear(4, 4), nn.Embedding(9, 4)))[0] == "vectors [1, 8, 4] by the first Linear"
    assert reasons(nn.Sequential(nn.GRU(5, 4)))[0] == "vectors [1, 8, 5] by the first GRU"


def test_arguments_that_are_known_by_name_come_together_and_then_alone() -> None:
    class Both(nn.Module):
        main_input_name = "input_ids"

        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.patches = nn.Embedding(9, 4), nn.Conv2d(3, 4, 16)
            self.image_size = 32

        def forward(self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None) -> Tensor:
            return torch.cat([self.tokens(input_ids).flatten(), self.patches(pixel_values).flatten()])

    (inputs, reason), *_ = guessed_inputs(Both())
    assert isinstance(inputs, dict)
    assert {name: tuple(tensor.shape) for name, tensor in inputs.items()} == {
        "input_ids": (1, 8),
        "pixel_values": (1, 3, 32, 32),
    }
    assert reason == (
        "input_ids: ids [1, 8] by the first Embedding and pixel_values: image [1, 3, 32, 32] by image_size of Both"
    )
    alone = [set(inputs) for inputs, _ in guessed_inputs(Both()) if isinstance(inputs, dict) and len(inputs) == 1]
    assert alone[0] == {"input_ids"}


def test_several_required_arguments_get_a_tensor_each() -> None:
    class Sum(nn.Linear):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x + y)

    inputs, reason = next(guessed_inputs(Sum(3, 3)))
    assert isinstance(inputs, tuple)
    assert [tuple(tensor.shape) for tensor in inputs] == [(1, 8, 3), (1, 8, 3)]
    assert reason.endswith(", 2 times")


@pytest.mark.parametrize(
    "name", ["BertModel", "WhisperModel", "CLIPModel", "Wav2Vec2Model", "SwinModel", "MixtralModel"]
)
def test_models_of_transformers_can_be_called_on_what_is_guessed(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class())
    graph = autoalign.dataflow(model)
    unused = [key for key, _ in model.named_parameters() if not graph.out_degree(key)]
    assert unused == (["masked_spec_embed"] if name == "Wav2Vec2Model" else [])
