"""What layers are given: concatenated features, flattened images, merged patches."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from autoalign import align
from autoalign.matching.composition import Composition, composition_of
from autoalign.matching.layers import parts_of
from autoalign.plan.operations import Shape
from autoalign.plan.specs import TensorSpec
from benchmarks.cases.twins import (
    Convolutional,
    Dense,
    Merging,
    channels_first,
    turned,
    turned_columns,
    unfolded,
)
from tests.reference_models.parts import WIDTH


def _composition(shapes: Mapping[str, Shape]) -> Composition:
    return composition_of(
        parts_of([TensorSpec(key, shape, torch.float32) for key, shape in shapes.items()]), channels_last=False
    )


def test_the_layers_of_a_dense_list_and_those_after_it_are_given_what_grows() -> None:
    shapes: dict[str, Shape] = {"stem.weight": (16, 3, 3, 3)}
    for place in range(4):
        shapes |= {f"block.layer{place + 1}.norm.weight": (16 + 8 * place,)}
        shapes |= {f"block.layer{place + 1}.conv.weight": (8, 16 + 8 * place, 3, 3)}
        shapes |= {f"block.layer{place + 1}.conv.bias": (8,)}
    shapes |= {"after.norm.weight": (48,), "after.conv.weight": (24, 48, 1, 1), "fc.weight": (5, 24)}
    dense = _composition(shapes).dense
    assert dense["after", "conv"] == dense["after", "norm"] == ([16, 8, 8, 8, 8], "layer#")
    assert dense["block", "layer4", "norm"][0] == [16, 8, 8, 8]
    assert not {("block", "layer1", "conv"), ("stem",), ("fc",)} & dense.keys()


def test_lists_that_do_not_grow_by_their_outputs_are_not_dense() -> None:
    shapes = {f"convs.{place}.weight": (16 * 2 ** (place + 1), 16 * 2**place, 3, 3) for place in range(4)}
    assert not _composition(shapes).dense
    assert not _composition({f"fc.{place}.weight": (8, 8) for place in range(4)}).dense
    assert not _composition({f"fc.{place}.weight": (8, 16 + 8 * place) for place in range(3)}).dense  # nor three alone


def test_dense_features_under_another_name_are_not_sure_and_the_other_order_is_listed() -> None:
    source = Dense("units", newest_first=False)
    alignment = align(source.state_dict(), Dense("layers", newest_first=True).state_dict())
    found = {match.target: match for match in alignment.matches}
    weight, norm, head = (found[key] for key in ("layers.3.2.weight", "layers.3.0.bias", "head.weight"))
    for match, turn in ((weight, turned_columns), (norm, turned), (head, turned_columns)):
        assert 0.5 < match.confidence < 0.9
        (other,) = match.alternatives
        tensors = [source.state_dict()[key] for key in other.sources]
        assert torch.equal(other.operation.apply(tensors)[0], turn(source.state_dict()[match.sources[0]]))
    assert found["layers.3.2.bias"].confidence > 0.9
    assert found["layers.0.2.weight"].confidence > 0.9  # which is given one tensor
    same = align(source.state_dict(), Dense("units", newest_first=False).state_dict())
    assert min(match.confidence for match in same.matches) > 0.9


def test_flattened_images_under_another_name_are_not_sure() -> None:
    source = Convolutional("c1 c2 f1 f2", channels_last=True)
    alignment = align(source.state_dict(), Convolutional("conv_a conv_b fc out", channels_last=False).state_dict())
    (match,) = [match for match in alignment.matches if match.confidence < 0.9]
    weight = source.state_dict()[match.sources[0]]
    ways = [alignment.tensor(match, [weight]), *(way.operation.apply([weight])[0] for way in match.alternatives)]
    assert match.target == "fc.weight"
    assert torch.equal(ways[0], weight)
    assert any(torch.equal(way, channels_first(weight)) for way in ways)


def test_merged_patches_under_another_name_are_not_sure() -> None:
    source = Merging("proj norm reduction head", unfolds=False).state_dict()
    alignment = align(source, Merging("patches norm reduce out", unfolds=True).state_dict())
    unsure = {match.target: match for match in alignment.matches if match.confidence < 0.9}
    assert [*unsure] == ["norm.weight", "norm.bias", "reduce.weight"]
    values = torch.arange(4.0 * WIDTH)
    assert torch.equal(unsure["norm.weight"].alternatives[0].operation.apply([values])[0], unfolded(values))


def test_a_layer_after_concatenated_channels_is_given_no_flattened_image() -> None:
    plain: dict[str, Shape] = {"a.weight": (16, 3, 3, 3), "b.weight": (32, 16, 3, 3), "fc.weight": (5, 128)}
    assert _composition(plain).flattened == {("fc",): ([32, 16], "fc")}
    assert not _composition(plain | {"c.weight": (32, 48, 1, 1)}).flattened


def test_what_a_layer_is_given_leaves_other_doubts_of_its_rows() -> None:
    shapes = {"conv.weight": (16, 3, 4, 4), "attn.qkv.weight": (96, 32), "attn.proj.weight": (16, 32)}
    source = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    target = {key.replace("qkv", "query_key_value").replace("proj", "dense"): tensor for key, tensor in source.items()}
    (match,) = align(source, target).ambiguous
    assert match.target == "attn.query_key_value.weight"
    assert "interleave query, key and value by head" in match.warnings[0]


@pytest.mark.parametrize("width", [6, 8])
def test_a_layer_that_gives_back_what_another_halves_is_given_no_merged_patches(width: int) -> None:
    shapes: dict[str, Shape] = {"gate.reduce.weight": (width // 2, width), "gate.expand.weight": (width, width // 2)}
    found = _composition(shapes | {"gate.expand.bias": (width,), "gate.norm.weight": (width,)})
    assert {path[-1] for path in found.merging} == ({"reduce", "norm"} if width == 8 else set())
