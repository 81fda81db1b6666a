"""Blocks stay whole; what could be matched another way as well (lists in reverse, unused modules) is not loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import autoalign
from autoalign.matching.symmetries import REVERSIBLE, crossings
from tests.matching.test_list_order import repaired

WIDTHS = (8, 12, 16, 24)


class Pyramid(nn.Module):
    """A backbone of four levels, and a decoder from the last to the first, which may be listed in either direction."""

    def __init__(self, names: Sequence[str], *, reverse: bool, levels: int = 4) -> None:
        super().__init__()
        self.names, self.reverse, self.levels = names, reverse, levels
        self.stem = nn.Conv2d(3, WIDTHS[0], 3, padding=1)
        stage, lateral, fusion = names
        for level in range(levels):
            before = WIDTHS[max(level - 1, 0)]
            self.add_module(stage.format(level, level + 1), nn.Conv2d(before, WIDTHS[level], 3, padding=1))
        for level in range(levels):
            self.add_module(lateral.format(level, level + 1), nn.Conv2d(WIDTHS[level], 10, 1))
        for level in range(levels):
            block = nn.Sequential(nn.Conv2d(10, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 10, 1))
            self.add_module(fusion.format(level, level + 1), block)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        parts = [[self.get_submodule(name.format(k, k + 1)) for k in range(self.levels)] for name in self.names]
        stages, laterals, fusions = parts
        features = [x := torch.relu(stage(x)) for stage in stages]
        result = torch.zeros(())
        for level in reversed(range(self.levels)):
            place = self.levels - 1 - level if self.reverse else level
            result = torch.as_tensor(fusions[place](laterals[level](features[level]) + result))
        return result


FROM_ONE = ("stage{1}", "lateral{1}", "refine{1}")
FROM_NOUGHT = ("stage_{0}", "convs_{0}", "fusion_{0}")


def test_a_list_of_levels_that_are_numbered_otherwise_is_not_loaded() -> None:
    source, target = Pyramid(FROM_ONE, reverse=False), Pyramid(FROM_NOUGHT, reverse=True)
    alignment = autoalign.align(source.state_dict(), target.state_dict())
    proposed = {match.target: match for match in alignment.ambiguous}
    assert set(proposed) == {key for key in target.state_dict() if key.startswith("fusion")}
    match = proposed["fusion_0.2.bias"]
    assert match.sources == ("refine1.2.bias",)
    assert [other.sources for other in match.alternatives] == [("refine4.2.bias",)]
    assert match.warnings == (REVERSIBLE,)
    assert len(alignment.matches) + len(proposed) == len(target.state_dict())


@pytest.mark.parametrize("reverse", [False, True])
def test_a_call_of_both_tells_the_direction(reverse: bool) -> None:
    torch.manual_seed(0)
    source, target = Pyramid(FROM_ONE, reverse=False), Pyramid(FROM_NOUGHT, reverse=reverse)
    alignment = autoalign.align(source.state_dict(), target.state_dict())
    assert alignment.ambiguous
    verification = autoalign.verify(source, target, torch.rand(1, 3, 8, 8), alignment=alignment)
    assert verification.alignment is not None
    matches = {match.target: match.sources[0] for match in verification.alignment.matches}
    assert matches["fusion_0.0.weight"] == ("refine4.0.weight" if reverse else "refine1.0.weight")
    assert len(matches) == len(target.state_dict())


def test_equal_numbers_tell() -> None:
    source, target = Pyramid(FROM_NOUGHT, reverse=False), Pyramid(("s{0}", "l{0}", "f{0}"), reverse=False)
    alignment = autoalign.align(source.state_dict(), target.state_dict())
    assert len(alignment.matches) == len(target.state_dict())
    assert all(match.confidence >= 0.9 for match in alignment.matches)


def test_two_members_are_no_levels() -> None:
    source, target = Pyramid(FROM_ONE, reverse=False, levels=2), Pyramid(FROM_NOUGHT, reverse=False, levels=2)
    alignment = autoalign.align(source.state_dict(), target.state_dict())
    assert len(alignment.matches) == len(target.state_dict())
    assert {match.target for match in alignment.matches if match.confidence < 0.9} == {
        key for key in target.state_dict() if key.startswith("fusion")
    }


TOWER = {"conv1": (8, 3, 3, 3), "conv2": (12, 8, 3, 3), "conv3": (16, 12, 3, 3)}
TRUNK = {"stem": (10, 32, 3, 3), "body.0": (10, 10, 3, 3), "body.1": (10, 10, 3, 3), "head": (5, 10, 1, 1)}


def network(*towers: str) -> dict[str, Tensor]:
    shapes = {f"{tower}.{name}": shape for tower in towers for name, shape in TOWER.items()}
    shapes |= {f"trunk.{name}": shape for name, shape in TRUNK.items()}
    return {f"{name}.weight": torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("is_source", [False, True])
def test_a_tower_that_is_left_over_is_a_rival(named: bool, is_source: bool) -> None:
    both, one = network("image_encoder", "depth_encoder"), network("depth" if named else "net")
    source, target = (both, one) if is_source else (one, both)
    alignment = autoalign.align(source, target)
    matched = {match.target: match.sources[0] for match in alignment.matches}
    assert sum("trunk" in key for key in matched) == len(TRUNK)
    towers = {key: source for key, source in matched.items() if "trunk" not in key}
    if named:
        assert {key.rpartition("conv")[2]: own.rpartition("conv")[2] for key, own in towers.items()} == {
            f"{n}.weight": f"{n}.weight" for n in (1, 2, 3)
        }
        assert all("depth" in key and "depth" in own for key, own in towers.items())
    else:
        assert towers == {}


WORDS: Mapping[str, Mapping[str, str]] = {
    "r2plus1d_18": {"stem": "x", "layer1": "ruba", "layer2": "mogi", "layer3": "zexi", "layer4": "tunar"}
    | {"conv1": "vanbin", "conv2": "reveka", "downsample": "kolu"},
    "efficientvit_m0": {"stages": "benon", "blocks": "kugax", "ffn0": "birper", "ffn1": "zoxrun", "mixer": "lomi"}
    | {"dw0": "parin", "dw1": "salko", "m": "goze", "pw1": "gelox", "pw2": "verle", "conv": "vixzu", "bn": "gurron"},
}


@pytest.mark.parametrize("name", WORDS)
def test_blocks_stay_whole_where_names_say_nothing(name: str) -> None:
    with torch.device("meta"):
        network = torchvision.models.get_model(name) if name == "r2plus1d_18" else timm.create_model(name)
    target = network.state_dict()
    keys = {key: ".".join(WORDS[name].get(word, word) for word in key.split(".")) for key in target}
    alignment = autoalign.align({keys[key]: tensor for key, tensor in target.items()}, target)
    wrong = [match for match in alignment.matches if match.sources != (keys[match.target],)]
    assert wrong == []
    assert len(alignment.matches) > 0.9 * len(target)


def test_blocks_that_were_matched_across_are_matched_straight() -> None:
    crossed = {"h.0.a": "s.0.x", "h.0.b": "s.1.x", "h.1.a": "s.0.y", "h.1.b": "s.1.y"}
    straight = repaired(crossed, crossings)
    assert {re.sub(r"\D", "", source) for key, source in straight.items() if key[2] == "0"} == {"0"}
    assert repaired(straight, crossings) == straight


def test_a_layer_of_a_block_that_has_its_own_goes_home() -> None:
    right = {f"m_{block}.{part}": f"n_{block}.{part}" for block in "bc" for part in ("x", "y", "z.u", "z.v")}
    wrong = right | {"m_b.z.u": "n_c.z.u", "m_c.z.u": "n_b.z.u"}
    assert repaired(wrong, crossings) == right
    assert repaired(right, crossings) == right


def test_a_list_of_parts_stays_one() -> None:
    by_part = {"h.0.a": "x.0", "h.0.b": "y.0", "h.1.a": "x.1", "h.1.b": "y.1"}
    assert repaired(by_part, crossings) == by_part


def test_a_norm_stays_with_its_convolution() -> None:
    """The two norms of a block have one shape; their convolutions, which have not, tell where each belongs."""
    with torch.device("meta"):
        target = torchvision.models.mobilenet_v3_large().state_dict()
    names = {"0": "exp_conv", "1": "conv1", "2": "conv2", "3": "conv2"}
    own = {
        key: re.sub(r"block\.(\d)\.([01])", lambda match: f"{names[match[1]]}.{('conv', 'bn')[int(match[2])]}", key)
        for key in target
    }
    source = {own[key]: tensor for key, tensor in target.items()}
    alignment = autoalign.align(dict(sorted(source.items())), target)
    assert {match.target: match.sources for match in alignment.matches} == {key: (own[key],) for key in target}
