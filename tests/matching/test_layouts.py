"""Rows that may be in another order than their shapes show."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoalign import align

_WIDTH = 8


def _network(last: dict[str, Tensor], block: str) -> dict[str, Tensor]:
    shapes = {"embed.weight": (_WIDTH, 3), "embed.bias": (_WIDTH,)}
    for layer in range(3):
        shapes |= {f"{block}.{layer}.attn.{name}.weight": (_WIDTH, _WIDTH) for name in ("q", "k", "v", "out")}
        shapes |= {f"{block}.{layer}.mlp.up.weight": (20, _WIDTH), f"{block}.{layer}.mlp.down.weight": (_WIDTH, 20)}
    return {key: torch.zeros(shape) for key, shape in shapes.items()} | last


def _layer(name: str) -> dict[str, Tensor]:
    return {
        f"{name}.weight": torch.arange(2.0 * _WIDTH * _WIDTH).reshape(2 * _WIDTH, _WIDTH),
        f"{name}.bias": torch.arange(2.0 * _WIDTH),
    }


@pytest.mark.parametrize(
    ("own", "other"),
    [
        ("final_layer.adaLN_modulation.1", "norm_out.linear"),
        ("model.diffusion_model.final_layer.mod", "norm_out.linear"),
    ],
)
def test_names_tell_whether_scale_or_shift_of_the_last_norm_is_first(own: str, other: str) -> None:
    for here, there in ((own, other), (other, own)):
        source, target = _network(_layer(here), "double_blocks"), _network(_layer(there), "transformer_blocks")
        alignment = align(source, target)
        for kind in ("weight", "bias"):
            first, second = source[f"{here}.{kind}"].chunk(2)
            assert torch.equal(alignment.state_dict()[f"{there}.{kind}"], torch.cat([second, first]))
        found = [match for match in alignment.matches if match.target.startswith(there)]
        assert all(match.confidence < 0.9 and "scale and shift" in " ".join(match.warnings) for match in found)


def test_other_names_do_not_tell_it() -> None:
    alignment = align(_network(_layer("modF.1"), "layers"), _network(_layer("norm_out.linear"), "blocks"))
    assert [match.target for match in alignment.ambiguous] == ["norm_out.linear.weight", "norm_out.linear.bias"]
    assert all(match.alternatives for match in alignment.ambiguous)


def test_parameters_at_the_top_of_a_model_can_be_a_gate_and_what_it_gates() -> None:
    source = {"gate_up": torch.zeros(64, 16), "down": torch.zeros(16, 32)}
    target = {"w12": torch.zeros(64, 16), "w3": torch.zeros(16, 32)}
    alignment = align(source, target)  # raised an IndexError
    assert {match.target: match.sources for match in (*alignment.matches, *alignment.ambiguous)} == {
        "w12": ("gate_up",),
        "w3": ("down",),
    }


def test_a_prefix_of_bare_parameters_leaves_no_doubt_of_their_halves() -> None:
    shapes = {"w12": (64, 16), "w3": (16, 32)}
    state_dict = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    alignment = align({f"net.{key}": tensor for key, tensor in state_dict.items()}, state_dict)
    assert alignment.mapping == {f"net.{key}": key for key in shapes}


def test_one_bias_may_be_the_sum_of_two() -> None:
    shapes = {"rnn.weight_ih_l0": (32, 5), "rnn.weight_hh_l0": (32, 8), "rnn.bias_ih_l0": (32,), "fc.weight": (3, 8)}
    source = {key: torch.rand(shape) for key, shape in shapes.items()}
    target = {
        "lstm.kernel": torch.rand(5, 32),
        "lstm.recurrent_kernel": torch.rand(8, 32),
        "lstm.bias": torch.rand(32),
        "dense.kernel": torch.rand(8, 3),
    }
    assert not align(source, target).missing_keys
    (doubted,) = align(source | {"rnn.bias_hh_l0": torch.rand(32)}, target).ambiguous
    assert doubted.target == "lstm.bias"
    assert "may be their sum" in " ".join(doubted.warnings)
