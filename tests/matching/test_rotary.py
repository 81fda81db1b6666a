"""Queries and keys whose rows are rotated in one of two layouts, which shapes do not show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoalign
from autoalign import Alignment, align, load
from autoalign.errors import PartialLoadWarning
from autoalign.matching.rotary import layouts_of, rotation_of
from autoalign.plan.specs import TensorSpec
from tests.matching.test_operation_pairs import LLAMA, TOKENS, TOLERANCE, hf, output, randomise
from tests.pairs import relative_difference
from tests.reference_models.llama import MetaLlama, OwnLlama
from tests.reference_models.parts import (
    CONTEXT,
    DEPTH,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    WIDTH,
    Rotation,
    rotate_halves,
    rotate_pairs,
)

NAMES = ["wq wk wv wo", "q k v o", "query key value proj", "to_q to_k to_v to_out", "q_proj k_proj v_proj o_proj"]
FUSED = ["Wqkv out_proj", "qkv proj"]
ROTATIONS = [pytest.param(rotate_halves, id="halves"), pytest.param(rotate_pairs, id="pairs")]
QUERY, KEY = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
VALUE = "model.layers.0.self_attn.v_proj.weight"


@pytest.fixture(autouse=True)
def _code_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the matter to names, shapes and configs: where the modules of both sides are at hand, calls decide it."""
    monkeypatch.setattr("autoalign.api._decide", lambda *_: None)


def _paired(rows: Tensor, heads: int) -> Tensor:
    """Put the rows of the two halves of each head by turns."""
    return torch.stack(rows.view(heads, 2, HEAD_DIM // 2, -1).unbind(1), 2).reshape_as(rows)


def _llama() -> nn.Module:
    return randomise(LLAMA(), TOKENS, seed=1)


def _ways(alignment: Alignment, target: str) -> list[Tensor]:
    """Make the tensor of an ambiguous match by each of its proposals."""
    (match,) = (match for match in alignment.ambiguous if match.target == target)
    ways = [(match.sources, match.operation), *((way.sources, way.operation) for way in match.alternatives)]
    return [operation.apply([alignment.tensors[key] for key in sources])[0] for sources, operation in ways]


def _holds(ways: list[Tensor], wanted: Tensor) -> bool:
    return any(torch.equal(way, wanted) for way in ways)


def test_both_layouts_are_proposed_for_kernels() -> None:
    target = _llama().state_dict()
    names = {"self_attn": "attention", "_proj": "", "model.layers": "h", "weight": "kernel", ".": "/"}
    source = {}
    for key, tensor in target.items():
        if heads := {QUERY[-13:]: HEADS, KEY[-13:]: KV_HEADS}.get(key[-13:]):
            tensor = _paired(tensor, heads)
        name = key if "embed" in key else reduce(lambda text, pair: text.replace(*pair), names.items(), key)
        source[name] = tensor.T.contiguous() if tensor.ndim == 2 and name != key else tensor
    alignment = align(source, target)
    assert all(_holds(_ways(alignment, key), target[key]) for key in (QUERY, KEY))


@pytest.mark.parametrize("told", [False, True], ids=["state dict", "module"])
@pytest.mark.parametrize("names", [*NAMES, *FUSED])
def test_both_layouts_are_proposed_whatever_projections_are_called(names: str, told: bool) -> None:
    source, target = _llama(), OwnLlama(names, rotate_halves)
    alignment = align(source if told else source.state_dict(), target)
    fused = names in FUSED
    first, second, *_ = names.split()
    wanted = {
        f"blocks.{n}.attn.{name}.weight" for n in range(DEPTH) for name in ((first,) if fused else (first, second))
    }
    assert {match.target for match in alignment.ambiguous} == wanted
    assert set(alignment.missing_keys) == wanted
    state = source.state_dict()
    query, key, value = state[QUERY], state[KEY], state[VALUE]
    rows = _paired(query, HEADS), _paired(key, KV_HEADS)
    if fused:
        ways = _ways(alignment, f"blocks.0.attn.{first}.weight")
        assert _holds(ways, torch.cat([query, key, value]))
        assert _holds(ways, torch.cat([*rows, value]))
    else:
        for name, plain, paired in zip((first, second), (query, key), rows, strict=False):
            ways = _ways(alignment, f"blocks.0.attn.{name}.weight")
            assert _holds(ways, plain)
            assert _holds(ways, paired)
            assert len(ways) == 2 or not told  # the config of a module tells the size of its heads


@pytest.mark.parametrize("names", [NAMES[0], NAMES[4], *FUSED])
def test_either_direction_is_proposed_where_nothing_is_known(names: str) -> None:
    source, target = OwnLlama(names, rotate_pairs), OwnLlama("to_q to_k to_v to_out", rotate_halves)
    rows = torch.arange(WIDTH * WIDTH).float().view(WIDTH, WIDTH)
    state = source.state_dict()
    first = names.split()[0]
    state[f"blocks.0.attn.{first}.weight"][:WIDTH] = rows
    # other norms: names of one's own are no proof that the code is the same
    state = {key.replace(".n1.", ".norm1.").replace(".n2.", ".norm2."): value for key, value in state.items()}
    ways = _ways(align(state, target), "blocks.0.attn.to_q.weight")
    assert _holds(ways, rows)
    assert _holds(ways, _paired(rows, HEADS))
    assert _holds([_paired(way, HEADS) for way in ways], rows)


def test_fused_on_both_sides_are_reordered_in_part() -> None:
    source, target = OwnLlama("Wqkv out_proj", rotate_halves), OwnLlama("qkv proj", rotate_pairs)
    fused = source.state_dict()["blocks.0.attn.Wqkv.weight"]
    query, key, value = fused.split([WIDTH, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM])
    alignment = align(source, target)
    ways = _ways(alignment, "blocks.0.attn.qkv.weight")
    assert _holds(ways, fused)
    assert _holds(ways, torch.cat([_paired(query, HEADS), _paired(key, KV_HEADS), value]))
    assert str(alignment)


def test_biases_go_with_their_weights() -> None:
    source = randomise(hf("Qwen2", num_key_value_heads=KV_HEADS)(), TOKENS, seed=1)
    alignment = align(source, OwnLlama("q k v o", rotate_pairs, bias=True))
    bias = source.state_dict()["model.layers.0.self_attn.k_proj.bias"]
    ways = _ways(alignment, "blocks.0.attn.k.bias")
    assert _holds(ways, bias)
    assert _holds(ways, _paired(bias, KV_HEADS))
    assert "blocks.0.attn.v.bias" in {match.target for match in alignment.matches}


@pytest.mark.parametrize("rotate", ROTATIONS)
@pytest.mark.parametrize("names", [NAMES[0], NAMES[2], *FUSED])
def test_one_line_settles_all(names: str, rotate: Rotation) -> None:
    source, model = _llama(), OwnLlama(names, rotate)
    with pytest.warns(PartialLoadWarning, match=r"(?s)ambiguous.*as in model\.rotary_interleaved = False\."):
        alignment = load(model, source)
    assert "model.rotary_interleaved = False" in str(alignment).replace("\n  ", " ")
    remedies = alignment.explain(alignment.ambiguous[0].target).remedies
    assert any("model.rotary_interleaved = False" in line for line in remedies)
    model.rotary_interleaved = rotate is rotate_pairs  # type: ignore[assignment]
    settled = align(source, model)
    # whether a fused projection holds blocks or groups of heads is another question
    if names != "Wqkv out_proj":
        assert not settled.ambiguous
        assert not load(model, source).missing_keys
        assert relative_difference(output(model, TOKENS), output(source, TOKENS)) < TOLERANCE


def test_a_state_dict_says_it_in_a_config_beside_it() -> None:
    source, model = _llama(), OwnLlama("q k v o", rotate_pairs)
    state = source.state_dict()
    with pytest.warns(
        PartialLoadWarning,
        match=r"as in \{'model': checkpoint, 'config': \{'rotary_interleaved': False\}\} for the checkpoint "
        r"and model\.rotary_interleaved = False; model\.head_dim = 64\.",
    ):
        load(model, state)
    model.rotary_interleaved, model.head_dim = True, HEAD_DIM  # type: ignore[assignment]
    load(model, {"model": state, "config": {"rotary_interleaved": False}})
    assert relative_difference(output(model, TOKENS), output(source, TOKENS)) < TOLERANCE


def test_a_rule_takes_rows_as_they_are() -> None:
    source, model = _llama(), OwnLlama("q k v o", rotate_halves)
    rule = {r"^model\.layers\.(\d+)\.self_attn\.([qk])_proj\.": r"blocks.\1.attn.\2."}
    assert not load(model, source, rules=rule).missing_keys
    assert relative_difference(output(model, TOKENS), output(source, TOKENS)) < TOLERANCE


META = {"dim": WIDTH, "n_layers": DEPTH, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "norm_eps": 1e-6}


@pytest.mark.parametrize("state_only", [False, True], ids=["module", "state dict"])
def test_the_config_beside_metas_file_settles(tmp_path: Path, state_only: bool) -> None:
    source, model = randomise(MetaLlama(frequencies=False), TOKENS, seed=1), LLAMA().eval()
    torch.save(source.state_dict(), tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(META))
    alignment = align(tmp_path / "consolidated.00.pth", model.state_dict() if state_only else model)
    assert not alignment.missing_keys
    assert {match.confidence for match in alignment.matches if "q_proj" in match.target} == {0.85}
    model.load_state_dict(alignment.state_dict())
    assert relative_difference(output(model, TOKENS), output(source, TOKENS)) < TOLERANCE
    (tmp_path / "params.json").unlink()
    assert align(tmp_path / "consolidated.00.pth", model).ambiguous


def test_another_codes_config_beside_it_settles_nothing(tmp_path: Path) -> None:
    torch.save(MetaLlama(frequencies=False).state_dict(), tmp_path / "consolidated.00.pth")
    config = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "num_attention_heads": HEADS}
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": WIDTH}))
    assert len(align(tmp_path / "consolidated.00.pth", LLAMA()).ambiguous) == 2 * DEPTH


GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
}


def _write_gguf(path: Path, state: Mapping[str, Tensor], architecture: str) -> None:
    """Write a Llama's tensors as llama.cpp's converter does, which reorders those of the architecture "llama"."""
    gguf: Any = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_embedding_length(WIDTH)
    for key, tensor in state.items():
        for heads, name in ((HEADS, "q_proj"), (KV_HEADS, "k_proj")):
            if name in key and architecture == "llama":
                tensor = _paired(tensor, heads)
        for ours, theirs in GGUF.items():
            key = key.replace(ours, theirs)
        writer.add_tensor(key, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("state_only", [False, True], ids=["module", "state dict"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_the_header_of_a_gguf_file_settles(tmp_path: Path, architecture: str, state_only: bool) -> None:
    source, model = _llama(), LLAMA().eval()
    _write_gguf(tmp_path / "a.gguf", source.state_dict(), architecture)
    alignment = align(tmp_path / "a.gguf", model.state_dict() if state_only else model)
    assert not alignment.missing_keys
    for match in alignment.matches:
        if "q_proj" in match.target:
            assert ("permute" in str(match.operation)) == (architecture == "llama")
            assert match.confidence == 0.85 or architecture != "llama"
    model.load_state_dict(alignment.state_dict())
    assert relative_difference(output(model, TOKENS), output(source, TOKENS)) < TOLERANCE


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_a_gguf_file_into_a_network_of_ones_own(tmp_path: Path, rotate: Rotation) -> None:
    source, model = _llama(), OwnLlama("wq wk wv wo", rotate).eval()
    _write_gguf(tmp_path / "a.gguf", source.state_dict(), "llama")
    assert len(align(tmp_path / "a.gguf", model).ambiguous) == 2 * DEPTH
    model.rotary_interleaved = rotate is rotate_pairs  # type: ignore[assignment]
    assert not load(model, tmp_path / "a.gguf").missing_keys
    assert relative_difference(output(model, TOKENS), output(source, TOKENS)) < TOLERANCE


def test_an_architecture_that_is_not_known_settles_nothing(tmp_path: Path) -> None:
    _write_gguf(tmp_path / "a.gguf", _llama().state_dict(), "another")
    assert len(align(tmp_path / "a.gguf", LLAMA()).ambiguous) == 2 * DEPTH


def test_a_head_that_is_rotated_in_part_has_no_known_order() -> None:
    source, model = _llama(), OwnLlama("q k v o", rotate_pairs)
    model.rotary_interleaved = True  # type: ignore[assignment]
    source.config.partial_rotary_factor = 0.5  # type: ignore[union-attr]
    alignment = align(source, model)
    assert len(alignment.ambiguous) == 2 * DEPTH
    assert not any(way.sources == match.sources for match in alignment.ambiguous for way in match.alternatives)


@pytest.mark.parametrize("told", [False, True], ids=["state dict", "module"])
def test_names_of_the_same_code_are_sure(told: bool) -> None:
    state = {f"student.{key}": value for key, value in _llama().state_dict().items() if key != "model.norm.weight"}
    alignment = align(state, LLAMA() if told else LLAMA().state_dict())
    assert not alignment.ambiguous
    assert all(match.confidence > 0.9 for match in alignment.matches if "_proj" in match.target)


def test_positions_that_are_learned_leave_nothing_to_doubt() -> None:
    source, target = (OwnLlama(names, None, CONTEXT) for names in ("q k v o", "wq wk wv wo"))
    assert not align(source, target).ambiguous


def test_a_table_of_positions_belongs_to_the_blocks_beside_it() -> None:
    shapes = {
        "vision.embed.position_embedding.weight": (9, WIDTH),
        **{f"vision.blocks.0.attn.{name}.weight": (WIDTH, WIDTH) for name in "qkv"},
        **{f"text.layers.0.attn.{name}.weight": (WIDTH, WIDTH) for name in "qkv"},
        "text.layers.0.mlp.w1.weight": (56, WIDTH),
        "text.layers.0.mlp.w3.weight": (56, WIDTH),
        "text.layers.0.mlp.w2.weight": (WIDTH, 56),
        "text.layers.0.norm1.weight": (WIDTH,),
    }
    specs = [TensorSpec(key, shape, torch.float32) for key, shape in shapes.items()]
    projections = rotation_of(specs, {}).projections
    told = {specs[place].key: found.tower for place, found in projections.items()}
    assert not told["vision.blocks.0.attn.q.weight"].rotated
    assert told["vision.blocks.0.attn.q.weight"].positions
    assert told["text.layers.0.attn.k.weight"].rotated
    assert not told["text.layers.0.attn.k.weight"].positions
    assert "text.layers.0.attn.v.weight" not in told


def test_a_config_of_a_model_of_several_parts_is_that_of_its_text() -> None:
    names = ["layers.0.self_attn.o_proj.weight", "layers.0.input_layernorm.weight"]
    specs = [TensorSpec(name, (4, 4), torch.float32) for name in names]
    outer = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    assert rotation_of(specs, outer | {"text_config": {"model_type": "llama"}}).layout == "halves"
    assert rotation_of(specs, outer | {"text_config": {"model_type": "cohere"}}).layout == "pairs"
    assert rotation_of(specs, outer | {"rope_interleave": True}).layout == "pairs"
    assert rotation_of(specs, {"model_type": "llama"}).layout is None


def test_an_alignment_in_doubt_is_saved_and_verified(tmp_path: Path) -> None:
    source, model = _llama(), OwnLlama("Wqkv out_proj", rotate_pairs).eval()
    alignment = align(source, model)
    alignment.save(tmp_path / "a.json")
    assert Alignment.read(tmp_path / "a.json").to_dict()["ambiguous"] == alignment.to_dict()["ambiguous"]
    verification = autoalign.verify(source, model, TOKENS, alignment=alignment)
    assert verification.equal
    assert {match.target for match in verification.taken} == {f"blocks.{n}.attn.Wqkv.weight" for n in range(DEPTH)}


def test_the_layout_of_hugging_faces_names_is_taken_where_the_other_side_shows_published_ones() -> None:
    unknown = rotation_of([], {})
    theirs, published = replace(unknown, hugging_face=True), replace(unknown, published=True)
    assert layouts_of(theirs, published) == ("halves", None)
    assert layouts_of(published, theirs) == (None, "halves")


def test_a_projection_before_a_convolution_is_not_rotated() -> None:
    def tensors(mixer: str, inputs: str, conv: str, attention: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for layer in range(4):
            around = f"{'layers' if conv == 'conv' else 'blk'}.{layer}"
            found |= {f"{around}.{name}.weight": torch.empty(8) for name in ("norm1", "norm2")}
            for name, shape in (("gate", (24, 8)), ("up", (24, 8)), ("down", (8, 24))):
                found[f"{around}.mlp.{name}.weight"] = torch.empty(shape)
            if layer % 2:
                found |= {f"{around}.{attention}.{name}.weight": torch.empty(8, 8) for name in ("q", "k", "v", "o")}
                continue
            found[f"{around}.{mixer}.{inputs}.weight"] = torch.empty(24, 8)
            found[f"{around}.{mixer}.{conv}.weight"] = torch.empty(8, 1, 3)
            found[f"{around}.{mixer}.out_proj.weight"] = torch.empty(8, 8)
        return found

    found = align(tensors("shortconv", "in_proj", "kernel", "attn"), tensors("conv", "in_proj", "conv", "self_attn"))
    assert {match.target.split(".")[-2] for match in found.ambiguous} == {"q", "k"}
