"""Rows that may be in another order than their shapes show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autoalign import align
from autoalign.matching.layers import Part
from autoalign.matching.layouts import _head_dims
from tests.matching.round_trips import aligned_both_ways, is_named, linear, meta

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


def test_under_the_same_names_scale_and_shift_stay_where_they_are() -> None:
    alignment = align(
        _network(_layer("net.final_layer.mod"), "layers"), _network(_layer("unet.decoder.final_layer.mod"), "blocks")
    )
    found = [match for match in alignment.matches if match.target.startswith("unet")]
    assert [str(match.operation) for match in found] == ["copy", "copy"]
    assert not any(match.warnings for match in found)


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


def test_images_may_be_flattened_with_the_channels_first_or_last() -> None:
    torchs = {
        f"features.{place}.weight": torch.rand(shape) for place, shape in enumerate([(8, 3, 3, 3), (12, 8, 3, 3)])
    }
    torchs |= {f"features.{place}.bias": torch.rand(8 + 4 * place) for place in range(2)}
    torchs |= linear("classifier.0", 20, 12 * 9) | linear("classifier.3", 5, 20)
    names = {"features.0": "block1_conv", "features.1": "block2_conv", "classifier.0": "fc1", "classifier.3": "fc2"}
    keras = {}
    for key, tensor in torchs.items():
        name, leaf = key.rsplit(".", 1)
        image = (
            tensor.reshape(20, 12, 3, 3).permute(0, 2, 3, 1).reshape(20, -1) if key == "classifier.0.weight" else tensor
        )
        turned = image.permute(2, 3, 1, 0) if image.dim() == 4 else image.T if image.dim() == 2 else image
        keras[f"{names[name]}/{leaf.replace('weight', 'kernel')}"] = turned
    for source, target in ((torchs, keras), (keras, torchs)):
        (doubted,) = align(source, meta(target)).ambiguous
        assert doubted.target in ("classifier.0.weight", "fc1/kernel")
        assert "flatten images with the channels last" in " ".join(doubted.warnings)
        assert is_named(source, target)


def test_code_that_unfolds_images_merges_patches_in_another_order(tmp_path: Path) -> None:
    """As Swin Transformers of OpenMMLab do, unlike all others."""
    sliced, unfolded = linear("embed", 6, 3), linear("embed", 6, 3)
    unfolded |= sliced
    for stage in range(2):
        rows = 6 * 2**stage
        for name in ("q", "o"):
            weight = torch.rand(rows, rows)
            sliced[f"stages.{stage}.attn.{name}.weight"] = weight
            unfolded[f"stages.{stage}.attn.w_msa.{name}.weight"] = weight
        merge = f"stages.{stage}.downsample"
        for key, shape in (("norm.weight", ()), ("norm.bias", ()), ("reduction.weight", (2 * rows,))):
            tensor = torch.rand(*shape, rows, 2, 2)  # channels, rows and columns of a patch
            unfolded[f"{merge}.{key}"] = tensor.reshape(*shape, -1)
            sliced[f"{merge}.{key}"] = tensor.transpose(-1, -3).reshape(*shape, -1)
    into_sliced, *_ = aligned_both_ways(unfolded, sliced, tmp_path / "a.json")
    merged = [match for match in into_sliced.matches if "downsample" in match.target]
    assert all(match.confidence < 0.9 and "unfolding" in " ".join(match.warnings) for match in merged)


@pytest.mark.parametrize(
    ("own", "other"),
    [("query_key_value", "linear_qkv"), ("query_key_value", "qkv_proj"), ("linear_qkv", "qkv"), ("c_qkv", "qkv")],
)
@pytest.mark.parametrize("grouped", [True, False])
def test_fused_projections_may_hold_blocks_or_groups(own: str, other: str, grouped: bool) -> None:
    """GLM's code holds queries, keys and values one after another, Megatron's those of each group of heads."""
    groups, per_group, size, width = 2, 2, 4, 16
    source, target = linear("embed", width, 5), {}
    for block in range(2):
        for kind, rest in (("weight", (width,)), ("bias", ())):
            parts = [torch.rand(groups, heads, size, *rest) for heads in (per_group, 1, 1)]
            joined = torch.cat([part.reshape(-1, *rest) for part in parts])
            apart = torch.cat(parts, dim=1).reshape(-1, *rest)
            source[f"blocks.{block}.attn.{own}.{kind}"] = apart if grouped else joined
            target[f"blocks.{block}.attn.{other}.{kind}"] = joined if grouped else apart
        source |= linear(f"blocks.{block}.attn.dense", width, width) | linear(f"blocks.{block}.up", 40, width)
    target |= {key: tensor for key, tensor in source.items() if own not in key}
    for one, another in ((source, target), (target, source)):
        alignment = align(one, meta(another))
        assert {match.target for match in alignment.ambiguous} == {key for key in another if own in key or other in key}
        assert is_named(one, another)


def test_the_names_of_adapters_leave_no_doubt_of_the_halves_of_their_layer() -> None:
    source, target = dict[str, Tensor](), dict[str, Tensor]()
    for block in range(3):
        for layer, rows, columns in (("net.0.proj", 64, _WIDTH), ("net.2", _WIDTH, 32)):
            here, there = f"lora_blocks_{block}_ff_{layer.replace('.', '_')}", f"blocks.{block}.ff.{layer}"
            for own, other, shape in (("down", "A", (4, columns)), ("up", "B", (rows, 4))):
                source[f"{here}.lora_{own}.weight"] = torch.zeros(shape)
                target[f"{there}.lora_{other}.weight"] = torch.zeros(shape)
    alignment = align(source, target)
    assert alignment.mapping == dict(zip(source, target, strict=True))


def test_the_gates_of_recurrent_layers_are_no_halves() -> None:
    """A bidirectional layer's inputs and what follows it have the shapes of a gated layer."""
    source = {f"rnn.0.rnn.{key}": value for key, value in nn.LSTM(24, 24, bidirectional=True).state_dict().items()}
    source |= {"rnn.0.embedding.weight": torch.empty(24, 48), "head.weight": torch.empty(7, 24)}
    target = {key.replace("rnn.0.rnn", "lstm_1").replace("rnn.0.embedding", "between"): t for key, t in source.items()}
    assert not align(source, target).ambiguous


def test_a_convolved_projection_may_hold_heads_together() -> None:
    source, target = linear("in", 16, 5), linear("in", 16, 5)
    for block in range(3):
        source |= {f"{block}.qkv.weight": torch.rand(48, 16, 1), f"{block}.qkv.bias": torch.rand(48)}
        source |= {f"{block}.proj.weight": torch.rand(16, 16, 1), f"{block}.proj.bias": torch.rand(16)}
        for role in ("q", "k", "v", "proj"):
            target |= linear(f"{block}.{role}", 16, 16)
    alignment = align(source, target)
    doubted = {match.target for match in alignment.ambiguous}
    assert doubted == {f"{n}.{role}.{leaf}" for n in range(3) for role in "qkv" for leaf in ("weight", "bias")}
    by_head = source["0.qkv.weight"].reshape(4, 3, 4, 16)[:, 1].reshape(16, 16)
    (match,) = [match for match in alignment.ambiguous if match.target == "0.k.weight"]
    ways = [way.operation.apply([source["0.qkv.weight"]])[0] for way in match.alternatives]
    assert any(torch.equal(way, by_head) for way in ways)


def test_a_layer_whose_rows_the_next_one_takes_holds_no_gate() -> None:
    def block(above: str, up: str, down: str) -> dict[str, Tensor]:
        return {f"{above}.{up}.weight": torch.empty(32, 8), f"{above}.{down}.weight": torch.empty(8, 32)}

    source = (
        block("mid.mlp", "fc1", "fc2") | {"out.0.skip.weight": torch.empty(8, 16)} | block("out.0.mlp", "fc1", "fc2")
    )
    target = block("layers.0", "inner", "outer") | {"layers.1.joined.weight": torch.empty(8, 16)}
    found = align(source, target | block("layers.1", "inner", "outer"))
    assert not found.ambiguous


def test_norms_of_single_queries_tell_the_size_of_heads_and_those_of_all_do_not() -> None:
    def norm(size: int) -> list[Part]:
        return [Part(0, ("attn", "q_norm", "weight"), (size,), "float")]

    assert _head_dims(norm(16), 64, {}) == {16}
    assert _head_dims(norm(64), 64, {}) == set()
    assert _head_dims(norm(16), 0, {}) == set()
