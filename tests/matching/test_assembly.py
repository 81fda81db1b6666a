"""Parameters that are left over in modules that correspond."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor

from autoalign import Alignment, align
from autoalign.matching.assembly import _by_blocks, _Piece, unmatched_parameter_pairs, with_ties
from autoalign.matching.layers import Part
from autoalign.matching.layouts import Blocks, Doubt
from autoalign.plan.matches import Match
from autoalign.plan.operations import Copy, Flip, Split, chain
from autoalign.plan.specs import specs_of


def _blocks(block: str, names: dict[str, tuple[int, ...]], more: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    shapes = {f"{block}.{k}.{name}": shape for k in range(3) for name, shape in names.items()} | more
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


_LAYERS = {
    "attn.{}.weight": (16, 16),
    "attn.out_proj.weight": (16, 16),
    "mlp.gate.weight": (4, 16),
    "mlp.up_proj.weight": (32, 16),
    "mlp.down_proj.weight": (16, 32),
}
_ENDS = {"embed.weight": (50, 16), "head.weight": (50, 16)}


def _aligned(own: dict[str, tuple[int, ...]], other: dict[str, tuple[int, ...]]) -> Alignment:
    layers = {name.format("q_proj"): shape for name, shape in _LAYERS.items()}
    source = _blocks("model.layers", layers | {k: s for k, s in own.items() if k[0] != "/"}, _ENDS | _at_top(own))
    target = _blocks("net.blocks", layers | {k: s for k, s in other.items() if k[0] != "/"}, _ENDS | _at_top(other))
    return align(source, target)


def _at_top(names: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name[1:]: shape for name, shape in names.items() if name[0] == "/"}


@pytest.mark.parametrize(
    ("own", "other"),
    [
        ("mlp.score_correction_bias", "mlp.gate.score_correction_bias"),
        ("mlp.gate.score_correction_bias", "mlp.score_correction_bias"),
        ("attn.sinks", "attn.softmax_offset"),
        ("attn.attention_sink_bias", "attn.sinks"),
    ],
)
def test_the_only_ones_that_are_left_in_a_module_are_matched(own: str, other: str) -> None:
    alignment = _aligned({own: (4,)}, {other: (4,)})
    assert not alignment.missing_keys
    for block in range(3):
        (match,) = (match for match in alignment.matches if match.target == f"net.blocks.{block}.{other}")
        assert match.sources == (f"model.layers.{block}.{own}",)


@pytest.mark.parametrize(
    ("own", "other"),
    [
        ({"/sinks": (4,)}, {"/softmax_offset": (4,)}),  # a network may well have but one of them
        ({"attn.sinks": (4,)}, {"attn.softmax_offset": (8,)}),
        ({"attn.sinks": (4,)}, {"mlp.softmax_offset": (4,)}),
        ({"attn.sinks": (4,), "attn.scales": (4,)}, {"attn.softmax_offset": (4,)}),
    ],
)
def test_others_are_left(own: dict[str, tuple[int, ...]], other: dict[str, tuple[int, ...]]) -> None:
    alignment = _aligned(own, other)
    names = {name.removeprefix("/") for name in other}
    assert all(any(key.endswith(name) for name in names) for key in alignment.missing_keys)
    assert len(alignment.missing_keys) + len(alignment.ambiguous) == (1 if "/softmax_offset" in other else 3)


def test_a_module_that_holds_more_than_its_counterpart_tells_nothing() -> None:
    source = [Part(0, ("a", "x", "weight"), (4,), "float"), Part(1, ("a", "y", "weight"), (4,), "float")]
    target = [Part(0, ("b", "x", "weight"), (4,), "float"), Part(1, ("c", "y", "weight"), (4,), "float")]
    lone = Part(2, ("a", "own_bias"), (4,), "float"), Part(2, ("b", "own_bias"), (4,), "float")
    assert unmatched_parameter_pairs([*source, lone[0]], [*target, lone[1]], {0: 0, 1: 1}) == {2: 2}  # at the root
    more = Part(3, ("c", "own_bias"), (4,), "float")
    assert unmatched_parameter_pairs([*source, lone[0]], [*target, lone[1], more], {0: 0, 1: 1}) == {}


def test_what_is_not_doubted_stays_as_it_is_between_blocks() -> None:
    pieces, halves = [_Piece("a", Copy(), (4, 2)), _Piece("b", Copy(), (4, 2))], (Split(0, 0, 2), Split(0, 2, 2))
    doubt = Doubt("", blocks=(Blocks((Flip(0), Copy()), halves),))
    filling, taken = _by_blocks(pieces, [Split(0, 0, 4), Split(0, 4, 4)], {1: doubt}, 0)
    assert [piece.key for piece in filling] == ["a", "b", "b"]
    assert taken == [Split(0, 0, 4), chain(Split(0, 4, 4), halves[0]), chain(Split(0, 4, 4), halves[1])]


def test_a_bias_is_stranded_where_other_layers_have_the_shape_of_its_weight() -> None:
    with torch.device("meta"):
        target = timm.create_model("gcvit_xxtiny", pretrained=False).state_dict()
    source = {**target, "stem.conv1.weight": torch.empty(64, 1, 3, 3, device="meta")}
    alignment = align(source, target)
    assert alignment.mapping == {key: key for key in target if "stem.conv1" not in key}


def test_each_name_of_a_tied_tensor_is_filled_from_the_name_that_matches_it() -> None:
    source, target = ({name: torch.empty(3, 2) for name in names} for names in ("ab", "xy"))
    source["b"], target["y"] = source["a"], target["x"]
    sides = specs_of(source), specs_of(target)
    own = [Match("x", ("a",), confidence=0.9), Match("y", ("b",), confidence=0.9)]
    assert with_ties(*sides, own) == own
    less_sure = [own[0], Match("y", ("b",), confidence=0.8)]
    assert with_ties(*sides, less_sure) == [own[0], Match("y", ("a",), confidence=0.9)]
    assert with_ties(*sides, own[:1]) == [own[0], Match("y", ("a",), confidence=0.9)]
