"""Equal blocks of equal parts are matched block by block, also where names say nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pytest
import timm
import torch
import torchvision

import autoalign
from autoalign.matching.assignment import Assignment
from autoalign.matching.crossed_blocks import Repair, blocks_of, crossings

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


def assignment(pairs: Mapping[str, str]) -> tuple[Assignment, list[tuple[str, ...]], list[tuple[str, ...]]]:
    source, target = sorted(pairs.values()), list(pairs)
    size = len(pairs)
    chosen = Assignment(
        source=np.asarray([source.index(pairs[key]) for key in target]),
        target=np.arange(size),
        score=np.ones(size, np.float32),
        margin=np.ones(size, np.float32),
        runner_up=np.full(size, -1),
        names=np.zeros((size, size), np.float32),
        cues={},
    )
    return chosen, [tuple(key.split(".")) for key in source], [tuple(key.split(".")) for key in target]


def repaired(pairs: Mapping[str, str], repairs: Callable[..., Iterable[Repair]]) -> dict[str, str]:
    chosen, source, target = assignment(pairs)
    moved = dict(pairs)
    for repair in repairs(blocks_of(chosen, source, target, [0] * len(pairs))):
        moved.update({".".join(target[place]): ".".join(own) for place, own in repair.items()})
    return moved


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
