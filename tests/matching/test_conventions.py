"""Conventions: unknown names of parameters, and the layouts of JAX, Keras and TensorFlow."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import autoalign
from autoalign import align
from autoalign.matching.conventions import as_in_torch, with_own_statistics
from autoalign.matching.layers import Part
from autoalign.plan.operations import Permute, Shape
from tests.matching.round_trips import Tensors, aligned_both_ways, linear

SCHEMES: Mapping[str, Mapping[str, str]] = {
    "meaningless": {
        "weight": "zor",
        "bias": "klim",
        "running_mean": "u",
        "running_var": "vax",
        "num_batches_tracked": "n",
    },
    "statistics": {"running_mean": "mu", "running_var": "sigma2"},
    "a_2 and b_2": {"weight": "a_2", "bias": "b_2"},
    "gain": {"weight": "gain"},
}
NETWORKS: Mapping[str, Callable[[], torch.nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "vit_tiny": lambda: timm.create_model("vit_tiny_patch16_224", depth=3),
}


def renamed(state_dict: Mapping[str, Tensor], scheme: Mapping[str, str], *, norms_only: bool) -> dict[str, Tensor]:
    norms = {
        key.rpartition(".")[0] for key, tensor in state_dict.items() if key.endswith("weight") and tensor.dim() == 1
    }
    result = {}
    for key, tensor in state_dict.items():
        module, _, name = key.rpartition(".")
        changed = scheme.get(name, name) if module in norms or not norms_only else name
        result[re.sub(r"^blocks|^layer", "part", f"{module}.{changed}".lstrip("."))] = tensor
    return result


@pytest.mark.parametrize("norms_only", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("network", NETWORKS)
def test_names_of_tensors_that_say_nothing(network: str, scheme: str, norms_only: bool) -> None:
    with torch.device("meta"):
        target = NETWORKS[network]().state_dict()
    source = renamed(target, SCHEMES[scheme], norms_only=norms_only)
    alignment = autoalign.align(source, target)
    keys = dict(zip(target, source, strict=True))
    assert {match.target: match.sources for match in alignment.matches} == {key: (own,) for key, own in keys.items()}


def test_what_only_the_order_in_a_layer_tells_is_less_sure() -> None:
    with torch.device("meta"):
        target = torchvision.models.resnet18().state_dict()
    source = renamed(target, SCHEMES["statistics"], norms_only=True)
    confidence = {match.target: match.confidence for match in autoalign.align(source, target).matches}
    assert all(value < 0.9 for key, value in confidence.items() if key.endswith(("running_mean", "running_var")))
    assert all(value >= 0.9 for key, value in confidence.items() if not key.endswith(("running_mean", "running_var")))
    same = autoalign.align(source, {f"model.{key}": tensor for key, tensor in source.items()})
    assert all(match.confidence >= 0.9 for match in same.matches)


def test_sorted_keys_do_not_tell_the_statistics() -> None:
    with torch.device("meta"):
        target = torchvision.models.resnet18().state_dict()
    source = renamed(target, {"running_mean": "zed", "running_var": "abc"}, norms_only=True)
    alignment = autoalign.align({key: source[key] for key in sorted(source)}, target)
    assert not any(match.target.endswith(("running_mean", "running_var")) for match in alignment.matches)


_WIDTH, _HIDDEN, _EXPERTS, _WORDS = 8, 12, 3, 20


def _mixture() -> dict[str, Tensor]:
    """Make the state dict of a small mixture of experts, laid out as torch does."""
    generator = torch.Generator().manual_seed(0)
    state_dict = {"embed_tokens.weight": torch.rand(_WORDS, _WIDTH, generator=generator)}
    for layer in range(2):
        for name in "qkvo":
            key = f"layers.{layer}.self_attn.{name}_proj.weight"
            state_dict[key] = torch.rand(_WIDTH, _WIDTH, generator=generator)
        state_dict[f"layers.{layer}.mlp.gate.weight"] = torch.rand(_EXPERTS, _WIDTH, generator=generator)
        for expert in range(_EXPERTS):
            for name, shape in (("w1", (_HIDDEN, _WIDTH)), ("w2", (_WIDTH, _HIDDEN)), ("w3", (_HIDDEN, _WIDTH))):
                state_dict[f"layers.{layer}.mlp.experts.{expert}.{name}.weight"] = torch.rand(
                    shape, generator=generator
                )
        state_dict[f"layers.{layer}.post_attention_layernorm.weight"] = torch.rand(_WIDTH, generator=generator)
    return state_dict | {"lm_head.weight": torch.rand(_WORDS, _WIDTH, generator=generator)}


def _as_in_keras(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the same tensors the names and the layout of Keras."""
    result = {
        "token_embedding/embeddings": state_dict["embed_tokens.weight"],
        "token_embedding/reverse_embeddings": state_dict["lm_head.weight"].T,
    }
    for layer in range(2):
        inside = f"layers.{layer}"
        block = f"transformer_layer_{layer}"
        for name, own in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "attention_output")):
            result[f"{block}/self_attention/{own}/kernel"] = state_dict[f"{inside}.self_attn.{name}_proj.weight"].T
        result[f"{block}/sparse_block/gate_dense/kernel"] = state_dict[f"{inside}.mlp.gate.weight"].T
        for name, own in (("w1", "gate"), ("w3", "intermediate"), ("w2", "output")):
            stack = [state_dict[f"{inside}.mlp.experts.{expert}.{name}.weight"].T for expert in range(_EXPERTS)]
            result[f"{block}/sparse_block/experts/expert_feedforward_{own}_dense"] = torch.stack(stack)
        result[f"{block}/feedforward_layernorm/scale"] = state_dict[f"{inside}.post_attention_layernorm.weight"]
    return result


def test_stacks_of_experts_and_reversed_embeddings_are_laid_out_like_kernels() -> None:
    in_torch = _mixture()
    in_keras = _as_in_keras(in_torch)
    for source, target in ((in_keras, in_torch), (in_torch, in_keras)):
        empty = {key: torch.empty_like(tensor, device="meta") for key, tensor in target.items()}
        rotated = {"rotary_interleaved": False, "head_dim": 4}
        alignment = align({"model": source, "config": rotated}, {"model": empty, "config": rotated})
        loaded = alignment.state_dict()
        assert loaded.keys() == target.keys()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in target.items())


def test_a_stack_is_turned_only_beside_kernels() -> None:
    stack, tokens = Part(0, ("experts_dense",), (3, 8, 12), "float"), Part(1, ("tokens",), (1, 8, 12), "float")
    kernel = Part(2, ("dense", "kernel"), (8, 12), "float")
    turned, *_ = as_in_torch([stack, tokens, kernel])
    assert (turned.shape, turned.view) == ((3, 12, 8), Permute((0, 2, 1)))
    assert as_in_torch([stack, tokens, kernel])[1] == tokens
    assert list(as_in_torch([stack, tokens])) == [stack, tokens]


@pytest.mark.parametrize(
    ("weight", "bias", "expected"),
    [
        ((3, 3, 32, 1), None, (32, 1, 3, 3)),  # depthwise
        ((3, 3, 32, 1), (32,), (32, 1, 3, 3)),
        ((3, 3, 32, 1), (1,), (1, 32, 3, 3)),  # one output
        ((1, 1, 32, 1), None, (1, 32, 1, 1)),
        ((3, 3, 1, 32), None, (32, 1, 3, 3)),
    ],
)
def test_a_depthwise_kernel_keeps_its_channels_apart(weight: Shape, bias: Shape | None, expected: Shape) -> None:
    parts = [Part(0, ("conv", "kernel"), weight, "float")]
    if bias:
        parts.append(Part(1, ("conv", "bias"), bias, "float"))
    assert as_in_torch(parts)[0].shape == expected


@pytest.mark.parametrize("is_sorted", [False, True], ids=["in order", "sorted"])
def test_a_numbered_name_is_no_role_where_another_layer_has_its_name(is_sorted: bool) -> None:
    source, target = dict[str, Tensor](), dict[str, Tensor]()
    for layer in range(3):
        for name, other in (("gate_proj", "wg"), ("up_proj", "w1"), ("down_proj", "w2")):
            weight = torch.empty((48, 64) if name == "down_proj" else (64, 48), device="meta")
            source[f"layers.{layer}.mlp.{name}.weight"] = weight
            target[f"layers.{layer}.ff.{other}.weight"] = weight
        source[f"layers.{layer}.norm.weight"] = target[f"layers.{layer}.norm.weight"] = torch.empty(48, device="meta")
    alignment = align(dict(sorted(source.items())) if is_sorted else source, target)
    assert alignment.mapping["layers.1.mlp.gate_proj.weight"] == "layers.1.ff.wg.weight"
    assert alignment.mapping["layers.1.mlp.up_proj.weight"] == "layers.1.ff.w1.weight"


@pytest.mark.parametrize(
    "names",
    [
        "W1 b1 W2 b2",
        "weight1 bias1 weight2 bias2",
        "mat1 vec1 mat2 vec2",
        "in_matrix in_vector out_matrix out_vector",
        "up up_bias down down_bias",
        "W_in b_in W_out b_out",
    ],
)
@pytest.mark.parametrize("turned", [True, False])
def test_a_matrix_and_a_vector_may_be_a_layer(names: str, turned: bool, tmp_path: Path) -> None:
    layers: Tensors = {}
    bare: Tensors = {}
    for block in range(3):
        own = linear(f"blocks.{block}.fc1", 20, 8) | linear(f"blocks.{block}.fc2", 8, 20)
        layers |= own
        for name, tensor in zip(names.split(), own.values(), strict=True):
            bare[f"blocks.{block}.{name}"] = tensor.T if turned and tensor.dim() > 1 else tensor
    aligned_both_ways(layers, bare, tmp_path / "a.json")


@pytest.mark.parametrize("is_sorted", [False, True], ids=["in order", "sorted"])
def test_statistics_in_a_module_below_their_norm_are_those_of_the_norm(is_sorted: bool) -> None:
    target = {
        key: torch.empty_like(value, device="meta") for key, value in torchvision.models.resnet18().state_dict().items()
    }
    statistics = re.compile(r"(bn\d|downsample\.1)\.(?=running|num)")
    apart = {"net." + statistics.sub(r"\1.statistics.", key): key for key in target}
    source = {key: target[apart[key]] for key in (sorted(apart) if is_sorted else apart)}
    assert align(source, target).mapping == apart
    assert align(target, source).mapping == {key: other for other, key in apart.items()}


def test_one_of_two_statistics_below_a_norm_is_not_guessed() -> None:
    names = ("bn.weight", "bn.bias", "bn.fast.mean", "bn.slow.mean")
    parts = [Part(place, (*name.split("."),), (8,), "float") for place, name in enumerate(names)]
    assert with_own_statistics(parts) == parts


@pytest.mark.parametrize("is_sorted", [False, True])
def test_a_norm_may_name_its_bias_with_a_number(is_sorted: bool) -> None:
    source, target = dict[str, Tensor](), dict[str, Tensor]()
    for block in range(3):
        matrix, scale, shift = torch.rand(8, 8), torch.rand(8), torch.rand(8)
        source |= {f"layers.{block}.linear.weight": matrix, f"layers.{block}.norm.a_2": scale}
        source[f"layers.{block}.norm.b_2"] = shift
        target |= {f"h.{block}.norm.weight": scale, f"h.{block}.norm.bias": shift, f"h.{block}.fc.weight": matrix}
    alignment = align(dict(sorted(source.items())) if is_sorted else source, target)
    assert {key: source[taken] for taken, key in alignment.mapping.items()} == target


@pytest.mark.parametrize("is_sorted", [False, True])
def test_a_number_is_no_role_where_the_numbers_are_counted_from_nought(is_sorted: bool) -> None:
    source = {f"h.{k}.mlp.{name}.weight": torch.empty(20, 8) for k in range(3) for name in ("c_fc_0", "c_fc_1")}
    target = {
        f"layers.{k}.mlp.{name}.weight": torch.empty(20, 8) for k in range(3) for name in ("gate_proj", "up_proj")
    }
    rest = {f"h.{k}.mlp.c_proj.weight": torch.empty(8, 20) for k in range(3)}
    source |= rest
    target |= {key.replace("h.", "layers.").replace("c_proj", "down_proj"): tensor for key, tensor in rest.items()}
    mapping = align(dict(sorted(source.items())) if is_sorted else source, target).mapping
    assert {key: taken for taken, key in mapping.items() if "gate" in key or "up" in key} == {
        f"layers.{k}.mlp.{name}.weight": f"h.{k}.mlp.c_fc_{place}.weight"
        for k in range(3)
        for place, name in enumerate(("gate_proj", "up_proj"))
    }


@pytest.mark.parametrize("is_sorted", [False, True])
def test_the_gains_of_weight_normalisation_go_with_their_kernels(is_sorted: bool) -> None:
    source, target = dict[str, Tensor](), dict[str, Tensor]()
    for unit in range(3):
        for place, size in ((1, 7), (3, 1)):
            layer = f"block.{unit}.block.{place}"
            parts = {"weight_g": torch.rand(8, 1, 1), "weight_v": torch.rand(8, 8, size), "bias": torch.rand(8)}
            source |= {f"{layer}.{name}": tensor for name, tensor in parts.items()}
            layer = f"res_unit{unit + 1}.conv{(place + 1) // 2}"
            target |= {
                f"{layer}.bias": parts["bias"],
                f"{layer}.parametrizations.weight.original0": parts["weight_g"],
                f"{layer}.parametrizations.weight.original1": parts["weight_v"],
            }
    mapping = align(dict(sorted(source.items())) if is_sorted else source, target).mapping
    assert {key: source[taken] for taken, key in mapping.items()} == target


def test_a_norm_may_keep_dimensions_of_one() -> None:
    source, target = dict[str, Tensor](), dict[str, Tensor]()
    for unit in range(3):
        kernel, alpha, beta = torch.rand(8, 8, 7), torch.rand(8), torch.rand(8)
        source |= {f"layers.{unit}.0.alpha": alpha, f"layers.{unit}.0.beta": beta, f"layers.{unit}.1.weight": kernel}
        shaped = {"alpha": alpha[None, :, None], "beta": beta[None, :, None]}
        target |= {f"block.{unit}.snake.{name}": tensor for name, tensor in shaped.items()}
        target[f"block.{unit}.conv.weight"] = kernel
    alignment = align(source, target)
    loaded = alignment.state_dict()
    assert loaded.keys() == target.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in target.items())


def test_a_gate_of_one_element_makes_no_layer_of_a_table() -> None:
    source = {"patch_embedding.weight": torch.rand(32, 3, 4, 4), "block.weight": torch.rand(32, 32)}
    source |= {f"{name}_embedding.{kind}": torch.rand(*shape) for name in ("pre", "post") for kind, shape in _TABLE}
    target = {
        key.replace("patch_embedding", "conv").replace("_embedding", "_pos_embed"): t for key, t in source.items()
    }
    loaded = align(source, target).state_dict()
    assert loaded.keys() == target.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in target.items())


_TABLE = (("embedding", (4, 4, 1, 32)), ("gate", (1,)))


def test_parameters_of_a_list_have_no_names() -> None:
    source = {f"layers.{k}.tables.{place}": torch.rand(8) for k in range(3) for place in range(2)}
    source |= {f"layers.{k}.linear.weight": torch.rand(8, 8) for k in range(3)}
    target = {key.replace("layers", "h"): tensor for key, tensor in source.items()}
    assert {key: source[taken] for taken, key in align(source, target).mapping.items()} == target


def test_one_letter_tells_weights_and_biases_with_a_dimension_of_size_one() -> None:
    """As in Marian's files: matrices are laid out as (in, out), the blocks stand in flat names."""
    source, target = dict[str, Tensor](), dict[str, Tensor]()
    for block in range(3):
        for name, own, (rows, columns) in (("self", "q", (8, 8)), ("self", "o", (8, 8)), ("ffn", "1", (8, 20))):
            source[f"encoder_l{block + 1}_{name}_W{own}"] = torch.rand(rows, columns)
            source[f"encoder_l{block + 1}_{name}_b{own}"] = torch.rand(1, columns)
            layer = f"layers.{block}." + {"q": "self_attn.q_proj", "o": "self_attn.out_proj", "1": "fc1"}[own]
            target |= {f"{layer}.weight": torch.empty(columns, rows), f"{layer}.bias": torch.empty(columns)}
    alignment = align(dict(sorted(source.items())), target)
    assert alignment.mapping["encoder_l3_self_bq"] == "layers.2.self_attn.q_proj.bias"
    loaded = alignment.state_dict()
    assert len(loaded) == len(target)
    assert torch.equal(loaded["layers.1.self_attn.q_proj.weight"], source["encoder_l2_self_Wq"].T)


def test_a_network_of_sonnet_is_read_as_torch_has_it() -> None:
    """Its kernels are (size, in, out), its matrices (in, out), with a bias or without, its means averages."""
    widths, source, target = (4, 6, 8, 10), dict[str, Tensor](), dict[str, Tensor]()
    for k, (inputs, outputs) in enumerate(pairwise(widths)):
        conv, norm = f"net/block_{k}/conv1_d", f"net/block_{k}/batch_norm"
        source |= {f"{conv}/w:0": torch.randn(5, inputs, outputs), f"{conv}/b:0": torch.randn(outputs)}
        target |= {f"blocks.{k}.0.weight": source[f"{conv}/w:0"].permute(2, 1, 0)}
        target |= {f"blocks.{k}.0.bias": source[f"{conv}/b:0"]}
        for name, key in (("scale", "weight"), ("offset", "bias")):
            source[f"{norm}/{name}:0"] = target[f"blocks.{k}.1.{key}"] = torch.randn(outputs)
        for name, key in (("moving_mean", "running_mean"), ("moving_variance", "running_var")):
            source |= {
                f"{norm}/{name}/counter:0": torch.zeros(()),
                f"{norm}/{name}/hidden:0": torch.randn(1, 1, outputs),
            }
            source[f"{norm}/{name}/average:0"] = torch.randn(1, 1, outputs)
            target[f"blocks.{k}.1.{key}"] = source[f"{norm}/{name}/average:0"].flatten()
        for name, size in (("mix", outputs), ("project", outputs + 3)):
            source[f"net/block_{k}/{name}/w:0"] = torch.randn(outputs, size)
            target[f"blocks.{k}.{name}.weight"] = source[f"net/block_{k}/{name}/w:0"].T
    source |= {"net/head/w:0": torch.randn(10, 3), "net/head/b:0": torch.randn(3)}
    target |= {"head.weight": source["net/head/w:0"].T, "head.bias": source["net/head/b:0"]}
    alignment = align(source, target)
    assert not alignment.missing_keys
    assert not alignment.ambiguous
    for key, tensor in alignment.state_dict().items():
        assert torch.equal(tensor, target[key]), key


@pytest.mark.parametrize("depthwise", [(0, 2, 3, 1), (1, 2, 3, 0)], ids=["MLX", "TensorFlow Lite"])
def test_kernels_with_their_inputs_last_are_read_and_written(depthwise: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, last = (nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16)), (nn.Conv2d(24, 24, 3) for _ in range(4))
    own = nn.Sequential(*first, nn.Conv2d(16, 24, 1), *last, nn.Linear(24, 5)).state_dict()
    own["scale.weight"] = torch.rand(())  # of no dimensions
    names = {"0": "stem", "1": "depth", "2": "point", "7": "head"} | {str(k): f"mix.{k - 3}" for k in range(3, 7)}
    other = {f"{names.get(key[0], 's')}{key[1:]}": tensor for key, tensor in own.items()}
    for key in ("stem.weight", "point.weight", *(f"mix.{k}.weight" for k in range(4))):
        other[key] = other[key].permute(0, 2, 3, 1).contiguous()
    other["depth.weight"] = other["depth.weight"].permute(depthwise).contiguous()
    aligned_both_ways(own, other, tmp_path / "a.json")


def test_stacks_of_matrices_beside_kernels_with_their_inputs_last_stay_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = nn.Conv2d(3, 12, 4).state_dict(prefix="patches.") | nn.Conv1d(4, 4, 4).state_dict(prefix="positions.")
    for block in range(2):
        own |= {f"layers.{block}.experts.{name}_proj.weight": torch.rand(4, 32, 16) for name in ("gate", "up")}
        own[f"layers.{block}.experts.down_proj.weight"] = torch.rand(4, 16, 32)
    other = {key.replace("experts", "switch_mlp"): tensor for key, tensor in own.items()}
    other["patches.weight"] = own["patches.weight"].permute(0, 2, 3, 1).contiguous()
    other["positions.weight"] = own["positions.weight"].permute(0, 2, 1).contiguous()
    aligned_both_ways(own, other, tmp_path / "a.json")


def test_a_first_kernel_of_equal_sizes_does_not_have_its_inputs_last(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24)
    own = {key: tensor for key, tensor in nn.Sequential(*layers).state_dict().items() if "num" not in key}
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    other = {
        f"{key[0]}.kernel" if tensor.dim() == 4 else f"{key[0]}.{names[key[2:]]}": tensor.permute(
            2, 3, 1, 0
        ).contiguous()
        if tensor.dim() == 4
        else tensor
        for key, tensor in own.items()
    }
    aligned_both_ways(own, other, tmp_path / "a.json")


def test_biases_tell_the_layout_of_kernels(tmp_path: Path) -> None:
    own = linear("0", 4, 12) | linear("1", 12, 12) | linear("2", 12, 8)
    other = {key.replace("weight", "kernel"): tensor for key, tensor in own.items()}
    aligned_both_ways(own, other, tmp_path / "a.json")
    turned = {key: tensor.T.contiguous() if tensor.dim() == 2 else tensor for key, tensor in other.items()}
    aligned_both_ways(own, turned, tmp_path / "a.json")


@pytest.mark.parametrize(
    "names", ["gamma beta avg_mean avg_var", "scales biases rolling_mean rolling_variance"], ids=["Chainer", "Darknet"]
)
@pytest.mark.parametrize("is_sorted", [False, True])
def test_statistics_by_other_names(names: str, is_sorted: bool) -> None:
    layers = [layer for width in (8, 16, 16) for layer in (nn.Conv2d(8, width, 3, bias=False), nn.BatchNorm2d(width))]
    target = nn.Sequential(*layers).state_dict()
    new = dict(zip(("weight", "bias", "running_mean", "running_var"), names.split(), strict=True))
    source = {
        f"layers.{key[0]}.{'W' if tensor.dim() > 1 else new[key[2:]]}": tensor
        for key, tensor in target.items()
        if "num" not in key
    }
    found = align(dict(sorted(source.items())) if is_sorted else source, target)
    assert len(found.matches) == len(source)
    assert all(match.target[0] == match.sources[0][7] for match in found.matches)
    statistics = {
        match.target[2:]: match.sources[0].split(".")[-1] for match in found.matches if "running" in match.target
    }
    assert statistics == {key: new[key] for key in ("running_mean", "running_var")}


def test_the_rows_of_one_bias_are_the_two_of_a_gru() -> None:
    rows, bias = torch.rand(2, 12), torch.rand(2, 12)
    rows[:, :4], rows[:, 4:8], rows[:, 8:] = bias[:, 4:8], bias[:, :4], bias[:, 8:]  # torch has the reset gate first
    source = {"gru.kernel": torch.rand(6, 12), "gru.recurrent_kernel": torch.rand(4, 12), "gru.bias": bias}
    target = {f"rnn.{key}": tensor for key, tensor in nn.GRU(6, 4).state_dict().items()}
    loaded = align(source, target).state_dict()
    assert torch.equal(loaded["rnn.bias_ih_l0"], rows[0])
    assert torch.equal(loaded["rnn.bias_hh_l0"], rows[1])


def test_sparse_kernels_beside_plain_ones_go_from_one_layout_into_another(tmp_path: Path) -> None:
    torch.manual_seed(0)
    widths = [4, 16, 16, 32]
    sparse = {f"voxels.{k}.weight": torch.rand(3, 3, 3, *sizes) for k, sizes in enumerate(pairwise(widths))}
    plain = {f"neck.{k}.weight": torch.rand(32, 32, 3, 3) for k in range(4)}
    other = {f"middle.{key[7:]}": tensor.permute(4, 0, 1, 2, 3).contiguous() for key, tensor in sparse.items()}
    other |= {f"backbone.{key[5:]}": tensor for key, tensor in plain.items()}
    aligned_both_ways(sparse | plain, other, tmp_path / "a.json")
