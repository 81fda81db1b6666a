"""Moves: what could be exchanged as well."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

import autoalign
from autoalign.matching.moves import _filled_anew


def test_what_has_nothing_of_its_kind_to_take_instead_is_not_exchanged() -> None:
    state: Any = SimpleNamespace(own_of={10: 0, 11: 1}, other_of={0: 10, 1: 11}, kinds=([0, 1],))
    assert list(_filled_anew(state, {10: 1})) == []


def test_a_list_of_lists_in_one_name_stands_as_one_in_two() -> None:
    layers = {"net.0": ("conv.conv", (6, 4, 1)), "net.1": ("act", (1,)), "net.2": ("norm", (6,))}
    layers |= {"net.3.net.0": ("deep.conv_0.conv", (6, 1, 3)), "net.3.net.3": ("deep.conv_1.conv", (4, 6, 1))}
    source, pairs = dict[str, torch.Tensor](), dict[str, str]()
    for stack in range(2):
        for block in range(3):
            for place, (name, shape) in layers.items():
                key = f"separator.network.2.{stack}.{block}.{place}.weight"
                source[key] = torch.empty(shape, device="meta")
                pairs[f"masknet.tower.block_{stack}_{block}.layers.{name}.weight"] = key
    alignment = autoalign.align(source, {key: source[own] for key, own in pairs.items()})
    assert {match.target: match.sources[0] for match in alignment.matches} == pairs


def test_the_last_norm_of_a_list_fills_the_empty_place_of_the_list() -> None:
    source, pairs = dict[str, torch.Tensor](), dict[str, str]()
    for stage, width in enumerate((8, 16, 32, 64)):
        source[f"backbone.stages.{stage}.fc.weight"] = torch.empty(width, width + 1, device="meta")
        pairs[f"backbone.swin.encoder.layers.{stage}.dense.weight"] = f"backbone.stages.{stage}.fc.weight"
        for kind in ("weight", "bias"):
            source[f"backbone.norm{stage}.{kind}"] = torch.empty(width, device="meta")
            pairs[f"backbone.hidden_states_norms.stage{stage + 1}.{kind}"] = f"backbone.norm{stage}.{kind}"
    target = {key: torch.empty_like(source[own]) for key, own in pairs.items()}
    target |= {f"backbone.swin.layernorm.{kind}": torch.empty(64, device="meta") for kind in ("weight", "bias")}
    alignment = autoalign.align(source, target)
    assert {match.target: match.sources[0] for match in alignment.matches} == pairs


def test_a_member_that_shapes_decide_shows_that_a_list_is_numbered_backwards() -> None:
    source, pairs = dict[str, torch.Tensor](), dict[str, str]()
    for level, width in ((3, 16), (2, 8), (1, 8)):
        for block in range(2):
            for own, other, shape in (("norm1.body", "ln1", (width,)), ("attn.out", "mix.out", (width, width))):
                key = f"decoder_level{level}.{block}.{own}.weight"
                source[key] = torch.empty(shape, device="meta")
                pairs[f"dec.{3 - level}.{block}.{other}.weight"] = key
    alignment = autoalign.align(source, {key: source[own] for key, own in pairs.items()})
    assert {match.target: match.sources[0] for match in alignment.matches} == pairs


def test_a_norm_goes_with_the_convolution_before_it_where_names_are_sorted() -> None:
    layers = {"sortcut_conv": ("conv_pw", (16, 4, 1, 1)), "sortcut_bn": ("bn1", (16,))}
    layers |= {"MB_dw_": ("conv_dw", (16, 1, 3, 3)), "MB_dw_bn": ("bn2", (16,))}
    pairs = {
        f"blocks.{block}.{other}.weight": (f"stack{block}_{own}.weight", shape)
        for block in range(3)
        for own, (other, shape) in layers.items()
    }
    source = {key: torch.empty(shape, device="meta") for key, shape in sorted(pairs.values())}
    alignment = autoalign.align(source, {key: source[own] for key, (own, _) in pairs.items()})
    wanted = {key: own for key, (own, _) in pairs.items()}
    assert {match.target: match.sources[0] for match in alignment.matches} == wanted


def test_the_root_may_be_a_layer() -> None:
    shapes = {"weight": (8, 8), "h.0.fc.weight": (8, 8), "h.0.up.weight": (16, 8)}
    source = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    pairs = {key.replace("h.0", "blocks.0"): key for key in source}
    alignment = autoalign.align(source, {key: source[own] for key, own in pairs.items()})
    assert {match.target: match.sources[0] for match in alignment.matches} == pairs


def test_numbers_of_some_members_do_not_tell_which_members_of_a_longer_list_they_are() -> None:
    names, widths = ("head_0", "middle_0", "middle_1", "up_0", "up_1", "up_2", "up_3"), (8, 8, 8, 16, 32, 64, 128)
    source, pairs = dict[str, torch.Tensor](), dict[str, str]()
    for place, (name, width) in enumerate(zip(names, widths, strict=True)):
        for own, other, shape in (("conv_0", "convs.0", (width, 3, 3, 3)), ("norm_0", "norms.0", (width,))):
            source[f"{name}.{own}.weight"] = torch.empty(shape, device="meta")
            pairs[f"blocks.{place}.{other}.weight"] = f"{name}.{own}.weight"
    target = {key: source[own] for key, own in pairs.items()}
    found = autoalign.align({key: source[key] for key in sorted(source)}, target)
    assert {match.target: match.sources[0] for match in found.matches} == dict(list(pairs.items())[6:])
    assert {match.target for match in found.ambiguous} == set(list(pairs)[:6])


def test_unlike_members_of_a_long_list_are_compared() -> None:
    members = ("top", "high", "middle", "low", "upper", "wide", "right", "near")
    source, pairs = dict[str, torch.Tensor](), dict[str, str]()
    for place, name in enumerate(members):
        for own, other, shape in (("dw", "conv_dw", (8, 1, 3, 3)), ("pw", "conv_pw", (8, 8, 1, 1)), ("bn", "bn", (8,))):
            source[f"bifpn.{name}.{own}.weight"] = torch.empty(shape, device="meta")
            pairs[f"cell.fnode.{place}.after.{other}.weight"] = f"bifpn.{name}.{own}.weight"
    for place, width in ((1, 24), (2, 20), (4, 16)):  # so that no member is like another
        source[f"bifpn.p{place}_down.weight"] = torch.empty(8, width, 1, 1, device="meta")
        pairs[f"cell.fnode.{place}.resample.conv.weight"] = f"bifpn.p{place}_down.weight"
    target = {key: source[own] for key, own in sorted(pairs.items())}
    found = autoalign.align({key: source[key] for key in sorted(source)}, target)
    assert all(pairs[match.target] == match.sources[0] for match in found.matches)
