"""The operation on a matched pair: what shapes alone do not tell of a matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import autoalign
from tests.matching.round_trips import is_equal, meta


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


@pytest.mark.parametrize("is_turned", [False, True], ids=["as they are", "turned"])
def test_a_matrix_alone_in_its_module_is_held_as_other_layers_are(is_turned: bool) -> None:
    source, target = dict[str, Tensor](), dict[str, Tensor]()
    for block in range(2):
        for role in "qkvo":
            source[f"h.{block}.{role}_proj.kern"] = target[f"layers.{block}.{role}_proj.weight"] = torch.rand(8, 8)
        for name, shape in (("fc1", (20, 8)), ("fc2", (8, 20))):
            weight, bias = torch.rand(shape), torch.rand(shape[0])
            source |= {f"h.{block}.{name}.weight": weight, f"h.{block}.{name}.bias": bias}
            target |= {f"layers.{block}.{name}.weight": weight, f"layers.{block}.{name}.bias": bias}
    if is_turned:
        source = {key: tensor.T if tensor.dim() > 1 else tensor for key, tensor in source.items()}
    for own, other in ((source, target), (target, source)):
        loaded = autoalign.align(own, meta(other)).state_dict()
        assert is_equal(loaded, other)
