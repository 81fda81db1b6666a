"""The arithmetic of LoRA, and which tensors are those of adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autoalign.errors import InputError, PatternError
from autoalign.plan.adapters import AddTo, LowRank, adapters_of, alpha_of, merged_layers
from autoalign.plan.operations import Chain, Copy, Transpose, output_shapes
from autoalign.plan.serialization import from_plain, to_plain
from autoalign.plan.specs import TensorSpec


def specs(shapes: dict[str, tuple[int, ...]]) -> list[TensorSpec]:
    return [TensorSpec(key, shape, torch.float32) for key, shape in shapes.items()]


def test_a_core_between_the_matrices_makes_the_kernel() -> None:
    """As in LoCon: a 1x1 convolution, one in the kernel's size, and a 1x1 convolution."""
    down, mid, up = torch.randn(2, 5, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(7, 2, 1, 1)
    change = LowRank(("down", "mid", "up", "alpha"), 1.0, (7, 5, 3, 3))
    images = torch.randn(1, 5, 8, 8)
    (kernel,) = change.apply([down, mid, up, torch.tensor(4.0)])
    conv = torch.nn.functional.conv2d
    wanted = conv(conv(conv(images, down), mid), up) * (4.0 / 2)
    torch.testing.assert_close(conv(images, kernel), wanted, rtol=1e-4, atol=1e-4)
    assert output_shapes(change, [(2, 5, 1, 1), (2, 2, 3, 3), (7, 2, 1, 1), ()]) == [(7, 5, 3, 3)]


@pytest.mark.parametrize(
    "operation",
    [
        LowRank(("down", "up"), 0.5, (3, 4)),
        AddTo(Chain((LowRank(("base", "down", "up", "alpha"), 1.0, (4, 3), True), Transpose()))),
    ],
)
def test_operations_are_written_and_read(operation: Any) -> None:
    assert from_plain(to_plain(operation)) == operation


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"roles": ["down"]}, "not the tensors of a layer"),
        ({"scale": 1}, "scale"),
        ({"scale": float("inf")}, "not the"),
    ],
)
def test_malformed_operations_are_refused(change: dict[str, Any], text: str) -> None:
    plain = to_plain(LowRank(("down", "up"), 0.5, (3, 4))) | change
    with pytest.raises(InputError, match=text):
        from_plain(plain)


def test_tensors_of_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match=r"'low rank\(scale 1\)' does not fit tensors of shapes \[2, 4\], \[3, 3\]"):
        LowRank(("down", "up"), 1.0, (3, 4)).apply([torch.ones(2, 4), torch.ones(3, 3)])


def test_a_sum_has_the_dtype_of_the_target() -> None:
    (found,) = AddTo(Copy()).apply([torch.tensor([0.25]), torch.tensor([1.0], dtype=torch.bfloat16)])
    assert found.dtype == torch.bfloat16
    assert found.item() == 1.25


@pytest.mark.parametrize(
    "shapes",
    [
        {"fc.lora_A.weight": (2, 8)},  # half of a pair
        {"fc.lora_A.weight": (2, 8), "fc.lora_B.weight": (8, 3)},  # of other ranks
        {"fc.w_lora.lora.0.weight": (2, 8), "fc.w_lora.lora.2.weight": (8, 2)},  # a layer of the network
        {"lora_A.weight": (2, 8), "lora_B.weight": (8, 2)},  # of no layer
    ],
)
def test_what_is_no_whole_layer_of_lora(shapes: dict[str, tuple[int, ...]]) -> None:
    assert not adapters_of(specs(shapes)).layers


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 1.0),
        ({"lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {"fc": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"c": 2}}, 2.0),
        ({"lora_alpha": 8, "alpha_pattern": {"^net.fc": 2, "fc": 16}}, 0.5),  # the first, as PEFT has it
        ({"lora_alpha": 8, "alpha_pattern": {r"[a-z]+\.fc": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"^fc": 2}}, 2.0),
        ({"lora_alpha": "many"}, 1.0),
    ],
)
def test_the_scale_that_a_configuration_states(config: dict[str, object], scale: float) -> None:
    adapters = adapters_of(specs({"net.fc.lora_A.weight": (4, 8), "net.fc.lora_B.weight": (9, 4)}))
    (found,) = merged_layers(adapters, [], config)
    assert found.operation == LowRank(("down", "up"), scale, (9, 8))


@pytest.mark.parametrize("pattern", ["(", "(a|a)*$"])
def test_a_pattern_of_layers_that_cannot_be_used(pattern: str) -> None:
    with pytest.raises(PatternError, match=r"regular expression"):
        alpha_of("a" * 60 + ".b", {"alpha_pattern": {pattern: 2}})
