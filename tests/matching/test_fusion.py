"""Tensors that hold what the other side keeps apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from autoalign import Alignment, align
from autoalign.matching.fusion import split_both, with_joined_roles
from autoalign.matching.layers import Part
from tests.matching.round_trips import aligned_both_ways, is_named, linear, meta

_WIDTH, _HIDDEN = 8, 20


def _aligned(source: dict[str, Tensor], target: dict[str, Tensor]) -> Alignment:
    """Align both ways, and check that all that is loaded is right and nothing is left."""
    for own, other in ((target, source), (source, target)):
        alignment = align(own, {key: torch.empty_like(tensor, device="meta") for key, tensor in other.items()})
        loaded = alignment.state_dict()
        assert loaded.keys() == other.keys()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in other.items())
    return alignment


def _linear(name: str, rows: int, columns: int = _WIDTH) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.rand(rows, columns), f"{name}.bias": torch.rand(rows)}


def _joined(parts: dict[str, Tensor], names: list[str], into: str) -> dict[str, Tensor]:
    return {f"{into}.{kind}": torch.cat([parts[f"{name}.{kind}"] for name in names]) for kind in ("weight", "bias")}


def test_queries_keys_and_values_may_be_joined_with_the_layer_beside_them() -> None:
    ends = _linear("embedder", _WIDTH, 3) | _linear("head", 5)
    apart, joined = (
        dict(ends),
        {key.replace("embedder", "img_in").replace("head", "last"): t for key, t in ends.items()},
    )
    for block in range(3):
        here, there = f"single_transformer_blocks.{block}", f"single_blocks.{block}"
        parts = _linear("proj_mlp", _HIDDEN) | _linear("proj_out", _WIDTH, _WIDTH + _HIDDEN)
        for role in "qkv":
            parts |= _linear(f"attn.to_{role}", _WIDTH)
        apart |= {f"{here}.{name}": tensor for name, tensor in parts.items()}
        joined |= _joined(parts, ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"], f"{there}.linear1")
        joined |= {f"{there}.linear2.{kind}": parts[f"proj_out.{kind}"] for kind in ("weight", "bias")}
    alignment = _aligned(joined, apart)
    split = [match for match in alignment.matches if match.sources[0].startswith("single_blocks.0.linear1")]
    assert len(split) == 8
    assert all(match.confidence < 0.9 for match in split)  # another network may hold them in another order
    assert all("order alone" in " ".join(match.warnings) for match in split)


def test_several_fused_layers_of_one_module_stay_apart() -> None:
    apart = _linear("embedder", _WIDTH, 3)
    joined = {key: tensor.clone() for key, tensor in apart.items()}
    for block in range(3):
        for stream, names in (("img", ["to_q", "to_k", "to_v"]), ("txt", ["add_q_proj", "add_k_proj", "add_v_proj"])):
            out = "to_out" if stream == "img" else "to_add_out"
            parts = {key: tensor for name in [*names, out] for key, tensor in _linear(name, _WIDTH).items()}
            joined |= _joined(parts, names, f"double_blocks.{block}.{stream}_attn_qkv")
            feed = "ff" if stream == "img" else "ff_context"
            parts |= _linear("up", _HIDDEN) | _linear("down", _WIDTH, _HIDDEN)
            here, there = f"transformer_blocks.{block}.{feed}", f"double_blocks.{block}.{stream}_mlp"
            for own, name in ((f"{there}.0", "up"), (f"{there}.2", "down"), (f"{there[:-3]}attn_proj", out)):
                joined |= {f"{own}.{kind}": parts[f"{name}.{kind}"] for kind in ("weight", "bias")}
            apart |= {f"{here}.{key}": parts.pop(key) for key in list(parts) if key.startswith(("up", "down"))}
            apart |= {f"transformer_blocks.{block}.attn.{key}": tensor for key, tensor in parts.items()}
    alignment = align(joined, apart)
    assert alignment.missing_keys == [match.target for match in alignment.ambiguous]
    loaded = alignment.state_dict()
    assert all(torch.equal(tensor, apart[key]) for key, tensor in loaded.items())
    # the module around the query is called like the other stream's output: that is said, and the right one is proposed
    assert {key.rpartition(".")[0][-10:] for key in apart.keys() - loaded.keys()} <= {
        "to_add_out",
        *(f"add_{role}_proj" for role in "qkv"),
    }
    for match in alignment.ambiguous:
        (tensor,) = match.operation.apply([joined[key] for key in match.sources])
        assert torch.equal(tensor, apart[match.target])


def test_fused_layers_of_one_module_that_nothing_names_are_kept_apart() -> None:
    names = ("mulberry", "quince", "medlar")
    source = {f"{name}.{part}.weight": torch.empty(8, 8) for name in names for part in ("one", "two", "three")}
    target = {f"{name}.weight": torch.empty(24, 8) for name in names}
    alignment = align(source, target)
    assert not alignment.matches  # nothing tells the order of the parts
    assert {match.target: match.sources for match in alignment.ambiguous} == {
        f"{name}.weight": tuple(f"{name}.{part}.weight" for part in ("one", "two", "three")) for name in names
    }


@pytest.mark.parametrize("sizes", [(9, 5), (9, 9), (6, 4, 5)])
def test_a_layer_may_be_split_along_its_input(sizes: tuple[int, ...]) -> None:
    """Nothing tells in which order the inputs are joined."""
    apart, joined = linear("embed", _WIDTH, 3), {}
    for block in range(2):
        parts = [torch.rand(_HIDDEN, size) for size in sizes]
        apart |= {f"blocks.{block}.of_{name}.weight": part for name, part in zip("abc", parts, strict=False)}
        apart |= {f"blocks.{block}.of_b.bias": torch.rand(_HIDDEN)} | linear(f"blocks.{block}.out", _WIDTH, _HIDDEN)
        joined[f"blocks.{block}.merge.weight"] = torch.cat(parts, dim=1)
        joined[f"blocks.{block}.merge.bias"] = apart[f"blocks.{block}.of_b.bias"]
    joined |= {key: tensor for key, tensor in apart.items() if ".of_" not in key}
    for source, target in ((apart, joined), (joined, apart)):
        for own in (source, dict(sorted(source.items()))):
            assert is_named(own, target)
            alignment = align(own, meta(target))
            assert {match.target for match in alignment.ambiguous} == {
                key for key, tensor in target.items() if "weight" in key and (".of_" in key or ".merge" in key)
            }


def test_an_lstm_may_join_its_input_and_its_state() -> None:
    apart = {"cell.weight_ih": torch.rand(4 * _WIDTH, 5), "cell.weight_hh": torch.rand(4 * _WIDTH, _WIDTH)}
    rest = linear("embed", 5, 7) | linear("head", 3, _WIDTH)
    joined = {"cell.linear.weight": torch.cat([*apart.values()], dim=1)}
    bias = torch.rand(4 * _WIDTH)
    assert is_named(apart | rest | {"cell.bias_ih": bias}, joined | rest | {"cell.linear.bias": bias})
    assert is_named(joined | rest | {"cell.linear.bias": bias}, apart | rest | {"cell.bias_ih": bias})


@pytest.mark.parametrize("gates", ["rzn", "ifgo"])
@pytest.mark.parametrize("name", ["cell.{side}{gate}", "cell.W_{side}{gate}", "fc_{x}{gate}", "{x}2{word}"])
def test_gates_may_be_layers_of_their_own(gates: str, name: str, tmp_path: Path) -> None:
    words = {"r": "reset", "z": "update", "n": "new", "i": "input", "f": "forget", "g": "cell", "o": "output"}
    apart = linear("embed", 5, 7) | linear("head", 3, _WIDTH)
    fused = dict(apart)
    for side, width in (("i", 5), ("h", _WIDTH)):
        names = [name.format(side=side, gate=gate, x=side.replace("i", "x"), word=words[gate]) for gate in gates]
        parts = {key: tensor for part in names for key, tensor in linear(part, _WIDTH, width).items()}
        fused |= {
            f"rnn.{kind}_{side}h_l0": torch.cat([parts[f"{part}.{kind}"] for part in names])
            for kind in ("weight", "bias")
        }
        apart |= parts
    aligned_both_ways(apart, fused, tmp_path / "a.json")


def test_the_gates_of_keras_are_put_in_the_order_of_torch(tmp_path: Path) -> None:
    rest = linear("embed", 5, 7) | linear("head", 3, _WIDTH)
    torchs = {f"rnn.weight_{side}h_l0": torch.rand(3 * _WIDTH, width) for side, width in (("i", 5), ("h", _WIDTH))}
    torchs |= {f"rnn.bias_{side}h_l0": torch.rand(3 * _WIDTH) for side in "ih"}
    updated_first = {key: torch.cat([tensor.chunk(3)[gate] for gate in (1, 0, 2)], 0) for key, tensor in torchs.items()}
    keras = {
        "gru.gru_cell.kernel": updated_first["rnn.weight_ih_l0"].T,
        "gru.gru_cell.recurrent_kernel": updated_first["rnn.weight_hh_l0"].T,
        "gru.gru_cell.bias": torch.stack([updated_first["rnn.bias_ih_l0"], updated_first["rnn.bias_hh_l0"]]),
    }
    into_torch, *_ = aligned_both_ways(rest | keras, rest | torchs, tmp_path / "a.json")
    gates = [match for match in into_torch.matches if "rnn" in match.target]
    assert all(match.confidence < 0.9 and "Keras orders the gates" in " ".join(match.warnings) for match in gates)
    assert str(into_torch.explain("rnn.bias_hh_l0")).count("filled from gru.gru_cell.bias [2, 24] float32 by") == 1


def test_what_one_side_fuses_may_be_apart_elsewhere_and_the_other_way_round(tmp_path: Path) -> None:
    """As in SigLIP, whose blocks and whose pooling are fused in one code or the other."""
    first = linear("embed", _WIDTH, 3)
    second = dict(first)
    for place in ("blocks.0", "blocks.1", "pool"):
        roles = {role: linear(role, _WIDTH, _WIDTH) for role in "qkv"}
        apart = {
            f"{role}_proj.{kind}": of[f"{role}.{kind}"] for role, of in roles.items() for kind in ("weight", "bias")
        }
        fused = {
            f"qkv.{kind}": torch.cat([roles[role][f"{role}.{kind}"] for role in "qkv"]) for kind in ("weight", "bias")
        }
        halves = {f"q.{kind}": roles["q"][f"q.{kind}"] for kind in ("weight", "bias")}
        halves |= {
            f"kv.{kind}": torch.cat([roles[role][f"{role}.{kind}"] for role in "kv"]) for kind in ("weight", "bias")
        }
        rest = linear("out", _WIDTH, _WIDTH) | linear("up", _HIDDEN, _WIDTH) | linear("down", _WIDTH, _HIDDEN)
        for side, parts in (
            (first, fused if place == "pool" else apart),
            (second, halves if place == "pool" else fused),
        ):
            side |= {f"{place}.attn.{key}": tensor for key, tensor in parts.items()}
            side |= {f"{place}.{key}": tensor for key, tensor in rest.items()}
    aligned_both_ways(first, second, tmp_path / "a.json")


def test_tensors_that_both_sides_fuse_are_copied_where_others_are_split(tmp_path: Path) -> None:
    shared = linear("embed", _WIDTH, 3) | {f"blocks.{block}.qkv.weight": torch.rand(24, _WIDTH) for block in range(2)}
    shared |= {f"blocks.{block}.out.weight": torch.rand(_WIDTH, _WIDTH) for block in range(2)}
    parts = [torch.rand(_WIDTH, _WIDTH) for _ in range(3)]
    apart = shared | {f"last.{role}.weight": part for role, part in zip("qkv", parts, strict=True)}
    into_apart, *_ = aligned_both_ways(shared | {"last.qkv.weight": torch.cat(parts)}, apart, tmp_path / "a.json")
    assert {str(match.operation) for match in into_apart.matches if "blocks" in match.target} == {"copy"}


_EXPERTS = 4


def _mixture(
    *, fused: bool, turned: bool = False, biased: bool = False, alternating: bool = False
) -> dict[str, Tensor]:
    """Experts in stacks; gate and up are apart or fused, one after the other or in turn."""
    torch.manual_seed(0)
    tensors = linear("embed", _WIDTH, 3)
    for layer in range(2):
        tensors |= linear(f"layers.{layer}.attn.o_proj", _WIDTH, _WIDTH)
        tensors[f"layers.{layer}.mlp.router.weight"] = torch.rand(_EXPERTS, _WIDTH)
        here = f"layers.{layer}.mlp.experts"
        for kind, rest in (("weight", (_WIDTH,)), ("bias", ()))[: 1 + biased]:
            gate, up = torch.rand(_EXPERTS, _HIDDEN, *rest), torch.rand(_EXPERTS, _HIDDEN, *rest)
            down = torch.rand(_EXPERTS, _WIDTH, *([_HIDDEN] if rest else []))
            both = torch.stack([gate, up], 2).flatten(1, 2) if alternating else torch.cat([gate, up], dim=1)
            if not fused:
                tensors |= {f"{here}.gate.{kind}": gate, f"{here}.up.{kind}": up, f"{here}.down.{kind}": down}
                continue
            for name, tensor in (("gate_up_proj", both), ("down_proj", down)):
                turn = turned and kind == "weight"
                tensors[f"{here}.{name}" + "_bias" * (kind == "bias")] = tensor.transpose(1, 2) if turn else tensor
    return tensors


@pytest.mark.parametrize("turned", [True, False])
def test_stacks_of_experts_may_be_fused(turned: bool, tmp_path: Path) -> None:
    """Here they are in transformers; in GGUF and MLX they are apart."""
    aligned_both_ways(_mixture(fused=True, turned=turned), _mixture(fused=False), tmp_path / "a.json")


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("alternating", [True, False])
def test_the_rows_of_experts_with_biases_may_alternate(turned: bool, alternating: bool) -> None:
    """As in gpt-oss."""
    apart = _mixture(fused=False, biased=True)
    fused = _mixture(fused=True, turned=turned, biased=True, alternating=alternating)
    for source, target in ((apart, fused), (fused, apart)):
        for own in (source, dict(sorted(source.items()))):
            assert is_named(own, target)
            doubted = {match.target.split("experts.")[1] for match in align(own, meta(target)).ambiguous}
            assert doubted in (
                {"gate.weight", "gate.bias", "up.weight", "up.bias"},
                {"gate_up_proj", "gate_up_proj_bias"},
            )


def test_the_layout_of_experts_says_nothing_of_other_layers(tmp_path: Path) -> None:
    listed, stacked = linear("embed", _WIDTH, 3), _mixture(fused=True, turned=True)
    for key, tensor in stacked.items():
        if "experts" not in key:
            listed[key] = tensor
            continue
        for expert, matrix in enumerate(tensor.transpose(1, 2)):
            names = ("gate", "up") if "gate_up" in key else ("down",)
            for name, part in zip(names, matrix.chunk(len(names)), strict=True):
                listed[key.rsplit(".", 1)[0] + f".{expert}.{name}.weight"] = part.clone()
    aligned_both_ways(listed, stacked, tmp_path / "a.json")


def test_layers_that_pool_queries_and_keys_are_not_taken_for_these(tmp_path: Path) -> None:
    shared = linear("embed", _WIDTH, 3)
    fused, apart = dict(shared), dict(shared)
    for block in range(3):
        roles = {role: linear(f"blocks.{block}.attn.{role}", _WIDTH, _WIDTH) for role in "qkv"}
        rest = {f"blocks.{block}.attn.pool_{role}.weight": torch.rand(_WIDTH, 1, 3, 3) for role in "qkv"}
        rest |= linear(f"blocks.{block}.proj", _WIDTH, _WIDTH) | linear(f"blocks.{block}.fc", _HIDDEN, _WIDTH)
        for kind in ("weight", "bias"):
            parts = [roles[role][f"blocks.{block}.attn.{role}.{kind}"] for role in "qkv"]
            fused[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
        for parts_of_role in roles.values():
            apart |= parts_of_role
        fused, apart = fused | rest, apart | rest
    aligned_both_ways(fused, apart, tmp_path / "a.json")


def test_a_fused_tensor_may_be_in_a_list_and_the_layer_of_a_role_in_a_module(tmp_path: Path) -> None:
    joined, apart = linear("head", 5, _WIDTH), linear("last", 5, _WIDTH)
    apart = dict(zip(apart, joined.values(), strict=True))
    for block in range(3):
        parts = {role: torch.rand(_WIDTH, _WIDTH) for role in "qkv"}
        joined[f"layers.{block}.self_attn.in_projs.0.weight"] = torch.cat(list(parts.values()))
        apart |= {f"h.{block}.self_attn.{role}_proj.linear.weight": tensor for role, tensor in parts.items()}
        wide, out = torch.rand(_HIDDEN, _WIDTH), torch.rand(_WIDTH, _WIDTH)
        joined |= {f"layers.{block}.gating.weight": wide, f"layers.{block}.self_attn.out_projs.0.weight": out}
        apart |= {f"h.{block}.mlp.weight": wide, f"h.{block}.self_attn.o_proj.linear.weight": out}
    aligned_both_ways(joined, apart, tmp_path / "a.json")


def test_depthwise_kernels_of_queries_keys_and_values_may_be_one(tmp_path: Path) -> None:
    joined, apart = linear("head", 5, _WIDTH), dict[str, Tensor]()
    apart |= joined
    for block in range(3):
        kernels = {role: torch.rand(_WIDTH, 1, 4) for role in "qkv"}
        matrices = {role: torch.rand(_WIDTH, _WIDTH) for role in "qkvo"}
        apart |= {f"layers.{block}.mixer.{role}_conv1d.weight": kernel for role, kernel in kernels.items()}
        joined[f"layers.{block}.mixer.conv1d.weight"] = torch.cat(list(kernels.values()))
        same = {f"layers.{block}.mixer.{role}_proj.weight": matrix for role, matrix in matrices.items()}
        joined, apart = joined | same, apart | same
    aligned_both_ways(joined, apart, tmp_path / "a.json")


@pytest.mark.parametrize("sizes", [(16, 12, 4, 2), (8, 8, 8, 8)])
def test_neighbours_that_nothing_names_may_be_one_tensor(sizes: tuple[int, ...]) -> None:
    joined, apart = linear("head", 5, _WIDTH), dict[str, Tensor]()
    apart |= joined
    for block in range(3):
        parts = {name: torch.rand(size, _WIDTH) for name, size in zip(("gate", "x", "B", "C"), sizes, strict=True)}
        apart |= {f"layers.{block}.ssm.{name}_part.weight": tensor for name, tensor in parts.items()}
        joined[f"layers.{block}.mixer.all.weight"] = torch.cat(list(parts.values()))
        wide = torch.rand(_HIDDEN, _WIDTH)
        joined, apart = (
            joined | {f"layers.{block}.mixer.up.weight": wide},
            apart | {f"layers.{block}.ssm.up.weight": wide},
        )
    assert is_named(joined, apart)
    assert is_named(apart, joined)
    assert {match.target for match in align(apart, meta(joined)).ambiguous} == {
        f"layers.{block}.mixer.all.weight" for block in range(3)
    }


def test_gates_may_be_named_after_what_they_take(tmp_path: Path) -> None:
    joined, apart = linear("head", 5, _WIDTH), dict[str, Tensor]()
    apart |= joined
    for side, short, columns in (("input", "ih", 6), ("hidden", "hh", _WIDTH)):
        gates = {gate: linear(f"cell.{side}_{gate}", _WIDTH, columns) for gate in "rzn"}
        for gate in gates.values():
            apart |= gate
        for kind in ("weight", "bias"):
            joined[f"rnn.{kind}_{short}_l0"] = torch.cat([gates[gate][f"cell.{side}_{gate}.{kind}"] for gate in "rzn"])
    aligned_both_ways(joined, apart, tmp_path / "a.json")


def test_the_name_of_a_fused_tensor_may_have_the_initials_of_its_parts(tmp_path: Path) -> None:
    joined, apart = linear("head", 5, _WIDTH), dict[str, Tensor]()
    apart |= joined
    for block in range(3):
        parts = {name: torch.rand(_WIDTH, _WIDTH) for name in ("gate", "q", "k", "v", "o")}
        apart |= {f"layers.{block}.attn.{name}_proj.weight": tensor for name, tensor in parts.items()}
        joined[f"layers.{block}.attn.o_proj.weight"] = parts.pop("o")
        joined[f"layers.{block}.attn.gqkv_proj.weight"] = torch.cat(list(parts.values()))
    aligned_both_ways(joined, apart, tmp_path / "a.json")


def test_queries_may_be_apart_from_keys_and_values(tmp_path: Path) -> None:
    joined, apart = linear("head", 5, _WIDTH), dict[str, Tensor]()
    apart |= joined
    for block in range(2):
        query, both, out = torch.rand(_WIDTH, _WIDTH), torch.rand(2 * _WIDTH, _WIDTH), torch.rand(_WIDTH, _WIDTH)
        apart |= {f"pool.{block}.q.weight": query, f"pool.{block}.kv.weight": both, f"pool.{block}.proj.weight": out}
        joined |= {f"pool.{block}.attn.in_proj_weight": torch.cat([query, both])}
        joined[f"pool.{block}.attn.out_proj.weight"] = out
    aligned_both_ways(joined, apart, tmp_path / "a.json")


def test_roles_may_have_a_dimension_of_their_own() -> None:
    source, target, heads, size, hidden = dict[str, Tensor](), dict[str, Tensor](), 4, 6, 20
    for block in range(2):
        query, both = torch.rand(heads, _WIDTH, size), torch.rand(2, 2, _WIDTH, size)
        gates, down, out = torch.rand(2, _WIDTH, hidden), torch.rand(hidden, _WIDTH), torch.rand(heads, size, _WIDTH)
        name = f"transformer/layer_{block}"
        source |= {f"{name}/attn/attn_vec_einsum/w": out, f"{name}/attn/kv_einsum/w": both}
        source |= {f"{name}/attn/q_einsum/w": query, f"{name}/mlp/gating_einsum": gates, f"{name}/mlp/linear": down}
        key, value = both.transpose(2, 3).reshape(2, -1, _WIDTH)
        layer = {"self_attn.q": query.transpose(1, 2).reshape(-1, _WIDTH), "self_attn.k": key, "self_attn.v": value}
        layer |= {"self_attn.o": out.reshape(-1, _WIDTH).T, "mlp.gate": gates[0].T, "mlp.up": gates[1].T}
        target |= {f"model.layers.{block}.{own}_proj.weight": tensor for own, tensor in layer.items()}
        target[f"model.layers.{block}.mlp.down_proj.weight"] = down.T
    loaded = align(
        source, {key: torch.empty_like(tensor, device="meta") for key, tensor in target.items()}
    ).state_dict()
    assert loaded.keys() == target.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in target.items())


def test_the_biases_of_roles_with_a_dimension_of_their_own_follow_their_weights() -> None:
    parts = [Part(0, ("kv", "weight"), (2, 4, 8, 16), "float"), Part(1, ("kv", "bias"), (2, 4, 16), "float")]
    assert [part.shape for part in with_joined_roles(parts, {(64, 8): 2})] == [(128, 8), (128,)]


def test_a_fused_tensor_is_not_split_into_parts_of_other_sizes() -> None:
    apart = [Part(n, ("attn", role, "weight"), (n + 8, 8), "float") for n, role in enumerate("qkv")]
    fused = [Part(0, ("attn", "qkv", "weight"), (24, 8), "float")]
    assert split_both(fused, apart) == ((fused, []), (apart, []))


def test_keys_and_values_are_split_where_their_module_shows_it_whatever_else_has_their_shape() -> None:
    source, target = dict[str, Tensor](), dict[str, Tensor]()
    for block in range(2):
        own, other = f"decoder.layer_{block}", f"model.decoder.layers.{block}"
        layers = [_linear("l", rows, columns) for rows, columns in ((8, 8), (16, 8), (8, 8), (16, 8), (8, 16))]
        names = "attention.linear_0", "attention.linear_1", "attention.linear_2", "ffn.linear_0", "ffn.linear_1"
        for name, layer in zip(names, layers, strict=True):
            source |= {f"{own}.{name}.{kind}": layer[f"l.{kind}"] for kind in ("weight", "bias")}
        for kind in ("weight", "bias"):
            query, both, out, *mlp = [layer[f"l.{kind}"] for layer in layers]
            attention = zip("kvqo", (*both.chunk(2), query, out), strict=True)
            target |= {f"{other}.encoder_attn.{role}_proj.{kind}": tensor for role, tensor in attention}
            target |= {f"{other}.fc{place}.{kind}": tensor for place, tensor in enumerate(mlp, 1)}
    alignment = align(source, {key: torch.empty_like(tensor, device="meta") for key, tensor in target.items()})
    loaded = alignment.state_dict()
    assert {key for key in target if "k_proj" in key or "v_proj" in key} <= loaded.keys()
    assert all(torch.equal(tensor, target[key]) for key, tensor in loaded.items())


def test_the_layers_of_a_role_may_be_a_sequence() -> None:
    source, target = dict[str, Tensor](), dict[str, Tensor]()
    for block in range(2):
        mixed, deep, out = torch.rand(24, 8, 1, 1), torch.rand(24, 1, 3, 3), torch.rand(8, 8, 1, 1)
        source |= {f"blocks.{block}.attn.qkv.weight": mixed, f"blocks.{block}.attn.qkv_dwconv.weight": deep}
        source[f"blocks.{block}.attn.project_out.weight"] = target[f"enc.{block}.mix.to_out.weight"] = out
        for place, tensor in enumerate((mixed, deep)):
            target |= {f"enc.{block}.mix.to_q.{place}.weight": tensor[:8]}
            target |= {f"enc.{block}.mix.to_kv.{place}.weight": tensor[8:]}
    loaded = align(
        source, {key: torch.empty_like(tensor, device="meta") for key, tensor in target.items()}
    ).state_dict()
    assert loaded.keys() == target.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in target.items())


def test_a_square_with_a_dimension_for_roles_is_not_read_in_one_of_two_ways() -> None:
    fused, apart = dict[str, Tensor](), dict[str, Tensor]()
    for block in range(2):
        layers = {"out": torch.rand(8, 8), "fc1": torch.rand(20, 8), "fc2": torch.rand(8, 20)}
        fused |= {f"h.{block}.{name}.weight": tensor for name, tensor in layers.items()}
        apart |= {f"l.{block}.{name}.weight": tensor for name, tensor in layers.items()}
        fused[f"h.{block}.qkv.weight"] = torch.rand(3, 8, 8)
        for role, tensor in zip("qkv", fused[f"h.{block}.qkv.weight"], strict=True):
            apart[f"l.{block}.{role}.weight"] = tensor
    for source, target in ((fused, apart), (apart, fused)):
        loaded = align(source, meta(target)).state_dict()
        assert all(torch.equal(tensor, target[key]) for key, tensor in loaded.items())


def test_norms_of_queries_and_keys_do_not_hide_that_keys_and_values_are_joined() -> None:
    joined, apart = dict[str, Tensor](), dict[str, Tensor]()
    for block in range(2):
        own, other = f"d.{block}", f"m.{block}"
        query, both, out, up, down = (torch.rand(s) for s in ((8, 8), (16, 8), (8, 8), (16, 8), (8, 16)))
        norms = {f"attn.{role}_norm.weight": torch.rand(4) for role in "qk"}
        layers = {"attn.lin_0": query, "attn.lin_1": both, "attn.lin_2": out, "ffn.lin_0": up, "ffn.lin_1": down}
        joined |= {f"{own}.{name}.weight": tensor for name, tensor in layers.items()}
        layers = dict(
            zip(
                (*(f"attn.{role}_proj" for role in "qkvo"), "fc1", "fc2"),
                (query, *both.chunk(2), out, up, down),
                strict=True,
            )
        )
        apart |= {f"{other}.{name}.weight": tensor for name, tensor in layers.items()}
        for side, module in ((joined, own), (apart, other)):
            side |= {f"{module}.{name}": tensor for name, tensor in norms.items()}
    _aligned(joined, apart)
