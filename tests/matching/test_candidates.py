"""Candidates: the pairs of layers that are compared, and what is left out where they are too many."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import numpy as np
import pytest
import torch

import autoalign
from autoalign.matching.candidates import Candidates, candidates, kinds_of, transposed_parts, unit_fit
from autoalign.matching.layers import Part, units_of


def _word(random: Random) -> str:
    return "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=8))


def _nameless(count: int, seed: int) -> dict[str, torch.Tensor]:
    random = Random(seed)
    return {f"{_word(random)}.weight": torch.empty(16, 16, device="meta") for _ in range(count)}


def _listed(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> Candidates:
    own, other = (
        [Part(k, (*key.split("."),), tuple(tensor.shape), "float") for k, (key, tensor) in enumerate(side.items())]
        for side in (source, target)
    )
    kinds = kinds_of(units_of(own), own, units_of(other), other)
    return candidates(kinds, units_of(own), units_of(other))


def test_of_few_layers_all_pairs_are_compared() -> None:
    pairs = _listed(_nameless(40, 0), _nameless(30, 1))
    assert len(pairs.source) == 40 * 30
    assert not pairs.crowded


@pytest.mark.parametrize("count", [400, 1_200])
def test_the_pairs_do_not_grow_with_the_square_of_the_layers(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr("autoalign.matching.candidates.MAX_COST", 2_000_000)
    pairs = _listed(_nameless(count, 0), _nameless(count, 1))
    assert count < len(pairs.source) < 30_000
    assert set(pairs.source.tolist()) == set(pairs.target.tolist()) == set(range(count))
    assert np.abs(pairs.source - pairs.target).max() < 64  # the nearest in order


def test_unequal_sides_are_compared_at_the_same_place_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoalign.matching.candidates.MAX_COST", 2_000_000)
    pairs = _listed(_nameless(800, 0), _nameless(200, 1))
    assert len(pairs.source) < 30_000
    assert np.abs(pairs.source / 4 - pairs.target).max() < 32
    assert set(pairs.source.tolist()) == set(range(800))
    assert set(pairs.target.tolist()) == set(range(200))


def test_pairs_with_a_rare_word_or_the_same_numbers_are_compared_wherever_they_stand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("autoalign.matching.candidates.MAX_COST", 2_000_000)
    source, target = _nameless(400, 0), _nameless(400, 1)
    layer = torch.empty(16, 16, device="meta")
    named = {"blocks.7.kernel.weight": layer, "rarity.weight": layer}
    pairs = _listed(named | source, target | {"its_rarity.weight": layer, "layers.7.matrix.weight": layer})
    listed = set(zip(pairs.source.tolist(), pairs.target.tolist(), strict=True))
    assert {(1, 400), (0, 401)} <= listed
    assert (1, 401) not in listed
    assert pairs.same_numbers == {(0, 401)}


def test_what_only_order_tells_among_so_many_is_ambiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoalign.matching.candidates.MAX_COST", 200_000)
    alignment = autoalign.align(_nameless(300, 0), _nameless(300, 1))
    assert not alignment.matches
    assert len(alignment.ambiguous) == 300
    assert all("only those at about the same place were compared" in m.warnings[0] for m in alignment.ambiguous)


def test_what_names_tell_among_so_many_is_matched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoalign.matching.candidates.MAX_COST", 200_000)
    random = Random(0)
    called = [_word(random) for _ in range(300)]
    source = {f"{word}_proj.weight": torch.empty(16, 16, device="meta") for word in called}
    random.shuffle(called)
    target = {f"to.proj_{word}.weight": torch.empty(16, 16, device="meta") for word in called}
    assert autoalign.align(source, target).mapping == {
        f"{word}_proj.weight": f"to.proj_{word}.weight" for word in called
    }


def test_what_numbers_tell_among_so_many_is_matched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoalign.matching.candidates.MAX_COST", 500_000)
    random = Random(0)
    source = {
        f"l.{layer}.experts.{expert}.{_word(random)}.weight": torch.empty(8, 8, device="meta")
        for layer in range(12)
        for expert in range(32)
    }
    target = {f"layers.{layer}.{_word(random)}": torch.empty(32, 8, 8, device="meta") for layer in range(12)}
    keys = list(source)
    matches = autoalign.align(source, target).matches
    assert [match.sources for match in matches] == [tuple(keys[32 * n : 32 * n + 32]) for n in range(12)]


@pytest.mark.parametrize("limit", [("MAX_LAYER_PAIRS", 9_999), ("MAX_COST", 3_000)])
def test_more_layers_than_memory_has_room_for_are_refused(
    monkeypatch: pytest.MonkeyPatch, limit: tuple[str, int]
) -> None:
    monkeypatch.setattr(f"autoalign.matching.candidates.{limit[0]}", limit[1])
    source, target = _nameless(100, 0), _nameless(100, 1)
    expected = r"^100 layers of the source and 100 of the target are too many .* Nothing was aligned; align them in"
    with pytest.raises(autoalign.InputError, match=expected):
        autoalign.align(source, target)


def test_exclude_brings_layers_under_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoalign.matching.candidates.MAX_LAYER_PAIRS", 99)
    source, target = _nameless(10, 0), _nameless(10, 1)
    with pytest.raises(autoalign.InputError, match="too many to be compared at once"):
        autoalign.align(source, target)
    assert autoalign.align(source, target, exclude=next(iter(source)).partition(".")[0]).excluded


def _block(prefix: str, width: int) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        f"attn1.{name}.weight": (width, width) for name in ("to_q", "to_k", "to_v", "to_out.0")
    }
    shapes |= {
        "ff.net.0.proj.weight": (4 * width, width),
        "ff.net.2.weight": (width, 4 * width),
        "norm1.weight": (width,),
    }
    return {f"{prefix}.{key}": torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("is_sorted", [False, True], ids=["in order", "sorted"])
def test_adapters_go_to_their_own_places_and_not_to_those_of_the_layers_beside_them(is_sorted: bool) -> None:
    target, mapping = dict[str, torch.Tensor](), dict[str, str]()
    for place in range(4):
        width = 32 * (1 + place // 2)
        target |= _block(f"down_blocks.{place}.attentions.0.transformer_blocks.0", width)
        own = _block(f"down_blocks.{place}.motion_modules.0.transformer_blocks.0", width)
        target |= own
        for key in own:
            source = key.replace("motion_modules.0.", "motion_modules.0.temporal_transformer.")
            mapping[source.replace("attn1", "attention_blocks.0").replace("norm1", "norms.0")] = key
    keys = sorted(mapping) if is_sorted else list(mapping)
    assert autoalign.align({key: target[mapping[key]] for key in keys}, target).mapping == mapping


def test_a_matrix_alone_may_be_the_weight_of_a_layer_with_a_bias() -> None:
    """As CLIP's projections and timm's heads are."""
    layers = {f"blocks.{block}.fc.weight": torch.rand(12, 12) for block in range(3)} | {"norm.weight": torch.rand(12)}
    source = {f"visual.{key}": tensor for key, tensor in layers.items()} | {"visual.proj": torch.rand(12, 5)}
    target = layers | {"head.weight": torch.empty(5, 12), "head.bias": torch.empty(5)}
    alignment = autoalign.align(source, target)
    assert alignment.missing_keys == ["head.bias"]
    assert torch.equal(alignment.state_dict()["head.weight"], source["visual.proj"].T)


def _parts(shapes: Mapping[str, tuple[int, ...]]) -> list[Part]:
    return [Part(k, (*key.split("."),), shape, "float") for k, (key, shape) in enumerate(shapes.items())]


def _embeddings(count: int) -> dict[str, tuple[int, ...]]:
    return {f"embed{number}.weight": (4, 8) for number in range(count)}


def _layers(count: int) -> dict[str, tuple[int, ...]]:
    return {f"layer{number}.weight": (4, 8) for number in range(count)}


_TURNED: dict[str, tuple[int, ...]] = {"a.weight": (3, 5), "b.weight": (3, 7)}
_AS_IS: dict[str, tuple[int, ...]] = {"c.weight": (5, 3), "d.weight": (7, 3)}
_SQUARE: dict[str, tuple[int, ...]] = {"e.weight": (6, 6)}


@pytest.mark.parametrize(
    ("source", "target", "transposed"),
    [
        ({"a.weight": (4, 8)}, {"b.weight": (8, 4)}, {0}),
        ({"a.weight": (4, 8)}, {"b.weight": (4, 8)}, set()),
        ({"a.weight": (4, 8), "b.weight": (8, 4)}, {"c.weight": (4, 8), "d.weight": (8, 4)}, set()),
        ({"a.weight": (5, 7), "b.weight": (6, 6)}, {"c.weight": (9, 3), "d.weight": (6, 6)}, set()),
        # a square matrix is as most layers are, if two or more are turned
        ({"a.weight": (3, 5), "b.weight": (6, 6)}, {"c.weight": (5, 3), "d.weight": (6, 6)}, {0}),
        (_TURNED | _SQUARE, _AS_IS | _SQUARE, {0, 1, 2}),
        (_TURNED | _SQUARE | _embeddings(2), _AS_IS | _SQUARE | _embeddings(2), {0, 1, 2}),
        (_TURNED | _SQUARE | _layers(2), _AS_IS | _SQUARE | _layers(2), {0, 1}),
    ],
)
def test_shapes_show_what_is_transposed(
    source: dict[str, tuple[int, ...]], target: dict[str, tuple[int, ...]], transposed: set[int]
) -> None:
    assert transposed_parts(_parts(source), _parts(target)) == transposed


def test_a_layer_fits_as_it_is_or_transposed_and_of_another_kind_never() -> None:
    wanted = (("weight", (8, 4), "float", False),)
    assert unit_fit((("weight", (4, 8), "float", True),), wanted) == 1
    assert unit_fit((("weight", (8, 4), "float", False),), wanted) == 1
    assert not unit_fit((("weight", (4, 8), "float", False),), wanted)
    assert not unit_fit((("weight", (8, 4), "int", False),), wanted)
    assert 0 < unit_fit((("weight", (8, 2, 2), "float", False),), wanted) < 1
