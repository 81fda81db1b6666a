"""The operation on a matched pair: what shapes alone do not tell of a matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import autoalign


def _tower(name: str) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {name: (64, 64)}
    for layer in range(3):
        shapes |= {f"layers.{layer}.fc1.weight": (256, 64), f"layers.{layer}.fc1.bias": (256,)}
        shapes |= {f"layers.{layer}.fc2.weight": (64, 256), f"layers.{layer}.fc2.bias": (64,)}
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("is_reversed", [False, True], ids=["from bare", "to bare"])
@pytest.mark.parametrize(
    ("bare", "layer", "operation"),
    [
        ("text_projection", "text_projection.weight", "transpose"),
        ("positional_embedding", "position_embedding.weight", "copy"),
    ],
)
def test_a_square_bare_matrix_is_a_transposed_layer_unless_it_is_a_table(
    bare: str, layer: str, operation: str, is_reversed: bool
) -> None:
    source, target = (layer, bare) if is_reversed else (bare, layer)
    (match,) = (match for match in autoalign.align(_tower(source), _tower(target)).matches if match.target == target)
    assert match.sources == (source,)
    assert str(match.operation) == operation
