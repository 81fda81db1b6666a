"""Renamings and conversions do what ``apply`` does, by the other library's own code, or are refused."""

from __future__ import annotations

import pickle
import re
import sys
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from torch import Tensor
from transformers import core_model_loading
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

import autoalign
from autoalign import DependencyError, Match, Rule, Rules, RulesError
from autoalign.plan.dequantise import Dequantise
from autoalign.plan.operations import Chain, Concatenate, Flip, Grouped, Operation, Permute, Split, Stack, Transpose
from autoalign.rules.size_free import Sized
from tests.rules.test_induce import few, made, renamings
from tests.rules.test_rules import EVERY_KIND
from tests.strategies import Case, perturbed, written_cases

RENAMINGS = Rules(
    (
        Rule((r"^fc\.",)),
        Rule((r"^layers\.(\d+)\.attn\.(q|k)_proj\.",), (r"encoder.blocks.\1.attention.\2.",)),
        Rule((r"^layers\.(\d+)\.out(\d+)$",), (r"encoder.blocks.\1.\2",)),
        Rule((r"^a\.",), ("b.",)),
        Rule((r"^b\.",), ("a.",)),
        Rule((r"^tied$",), ("first", "second"), tied=True),
        Rule((r"^",), ("encoder.",)),
    )
)
NAMES = {
    "layers.3.attn.q_proj.w": "encoder.blocks.3.attention.q.w",
    "layers.12.attn.k_proj.b": "encoder.blocks.12.attention.k.b",
    "layers.1.out20": "encoder.blocks.1.20",
    "a.x": "b.x",
    "b.x": "a.x",
    "b.a.x": "a.a.x",
    "tied": "first",
    "layers.1.norm": "encoder.layers.1.norm",
    "encoder": "encoder.encoder",
}


def values(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return tuple({key: torch.zeros(shape) for key, shape in side.items()} for side in (case.source, case.target))  # type: ignore[return-value]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def renamed(rules: Rules, key: str) -> list[str]:
    """What the two lists of renamings make of a key, by ``re.sub`` and by transformers."""
    by_sub = key
    for pattern, replacement in rules.to_revise_keys():
        by_sub = re.sub(pattern, replacement, by_sub)
    mapping = [WeightRenaming(pattern, replacement) for pattern, replacement in rules.to_key_mapping().items()]
    return [by_sub, rename_source_key(key, mapping, [])[0]]


@pytest.mark.parametrize(("key", "name"), NAMES.items())
def test_renamings_one_after_another_do_what_the_rules_do(key: str, name: str) -> None:
    assert next(iter(RENAMINGS.apply({key: torch.ones(1)}))) == name
    assert renamed(RENAMINGS, key) == [name, name]


def test_what_is_dropped_is_passed_by() -> None:
    assert RENAMINGS.apply({"fc.w": torch.ones(1)}) == {}
    assert renamed(RENAMINGS, "fc.w") == ["fc.w", "fc.w"]


def test_a_pattern_for_any_word_does_not_take_what_was_renamed() -> None:
    rules = Rules((Rule((r"^a\.",), ("z.",)), Rule((r"^([a-z]+)\.",), (r"y.\1.",))))
    assert renamed(rules, "a.x") == ["z.x", "z.x"]
    assert renamed(rules, "q.x") == ["y.q.x", "y.q.x"]


@settings(few, max_examples=100)
@given(renamings())
def test_renamings_agree_with_apply_on_any_names(names: tuple[list[str], list[str]]) -> None:
    keys, targets = names
    source = {key: torch.empty(1, device="meta") for key in keys}
    matches = [Match(target, (key,)) for key, target in zip(keys, targets, strict=True) if target]
    rules = made(source, {match.target: torch.empty(1) for match in matches}, *matches).rules()
    try:
        rules.to_key_mapping()
    except RulesError:
        return
    for match in rules.plan(dict.fromkeys(keys, (1,))):
        assert renamed(rules, match.sources[0]) == [match.target, match.target]


@settings(few, max_examples=8)
@given(written_cases | perturbed())
def test_a_key_mapping_is_taken_by_align(case: Case) -> None:
    source, target = values(case)
    alignment = autoalign.align(source, target)
    rules = alignment.rules()
    if not rules.rules or any(not rule.renames or rule.has_arithmetic for rule in rules.rules):
        return
    again = autoalign.align(source, target, rules=rules.to_key_mapping())
    assert again.mapping == alignment.mapping


@pytest.mark.parametrize("form", ["to_key_mapping", "to_revise_keys"])
def test_renamings_cannot_hold_operations_or_arithmetic_and_say_so(form: str) -> None:
    with pytest.raises(RulesError, match="5 of 7 rules do more than rename") as caught:
        getattr(EVERY_KIND, form)()
    assert r"  ^layer(\d+)\.(\d+)\. -> stages.{\1 - 1}.\2." in str(caught.value)
    assert "concatenate(dim 0)" in str(caught.value)


def test_a_name_that_transformers_would_misread_is_refused() -> None:
    rules = Rules((Rule((r"^a",), ("b(c)",)),))
    assert rules.to_revise_keys() == [("^a", "b(c)")]
    with pytest.raises(RulesError, match="special characters"):
        rules.to_key_mapping()


splits = pytest.mark.skipif(not hasattr(core_model_loading, "Split"), reason="needs transformers 5.20")


def llama(**options: Any) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, **options
    )
    return transformers.LlamaForCausalLM(config)


def gpt_like(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """Its weights in the names of litgpt, with one tensor for query, key and value, and one matrix turned."""
    state = {key: torch.rand_like(value) for key, value in model.state_dict().items()}
    result = {"transformer.wte.weight": state["model.embed_tokens.weight"]}
    for i in range(3):
        own = {key.removeprefix(f"model.layers.{i}."): value for key, value in state.items() if f"layers.{i}." in key}
        fused = torch.cat([own[f"self_attn.{part}_proj.weight"] for part in "qkv"])
        result |= {
            f"transformer.h.{i}.attn.qkv.weight": fused,
            f"transformer.h.{i}.attn.proj.weight": own["self_attn.o_proj.weight"],
            f"transformer.h.{i}.norm_1.weight": own["input_layernorm.weight"],
            f"transformer.h.{i}.norm_2.weight": own["post_attention_layernorm.weight"],
            f"transformer.h.{i}.mlp.fc_1.weight": own["mlp.gate_proj.weight"],
            f"transformer.h.{i}.mlp.fc_2.weight": own["mlp.up_proj.weight"],
            f"transformer.h.{i}.mlp.proj.weight": own["mlp.down_proj.weight"],
        }
    return result | {"transformer.ln_f.weight": state["model.norm.weight"], "lm_head.weight": state["lm_head.weight"]}


def halved(state_dict: dict[str, Tensor]) -> dict[str, object]:
    """Mark a state dict as one in which the halves of its heads are rotated together, as Hugging Face's code does."""
    return {"model": state_dict, "config": {"rotary_interleaved": False}}


def convert(conversions: list[Any], state_dict: dict[str, Tensor], model: torch.nn.Module) -> dict[str, Tensor]:
    """What transformers makes of a state dict, by its own renaming, collecting and converting."""
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    collected: dict[str, Any] = {}
    for key, tensor in sorted(state_dict.items(), key=lambda item: dot_natural_key(item[0])):
        name, pattern = rename_source_key(key, renamings, converters)
        own = WeightRenaming(key, name) if pattern is None else deepcopy(by_pattern[pattern])
        collected.setdefault(name, own).add_tensor(name, key, pattern or key, lambda tensor=tensor: tensor)
    result = {}
    for name, conversion in collected.items():
        for key, value in conversion.convert(name, model=model, config=None).items():
            result[key] = value[0] if isinstance(value, list) else value
    return result


@pytest.mark.parametrize("options", [{}, pytest.param({"num_key_value_heads": 2}, marks=splits)])
def test_conversions_split_by_the_machinery_of_transformers(options: dict[str, int]) -> None:
    model = llama(**options)
    source = gpt_like(model)
    alignment = autoalign.align(halved(source), model)
    assert not alignment.missing_keys
    conversions = alignment.rules().to_transformers()
    (converter,) = (each for each in conversions if isinstance(each, WeightConverter))
    assert [type(operation).__name__ for operation in converter.operations] == ["Split" if options else "Chunk"]
    got, wanted = convert(conversions, source, model), alignment.state_dict()
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], tensor) for key, tensor in wanted.items())


def test_parts_of_unequal_size_need_a_transformers_that_splits_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.core_model_loading.Split", raising=False)
    model = llama(num_key_value_heads=2)
    rules = autoalign.align(halved(gpt_like(model)), model).rules()
    with pytest.raises(RulesError, match=r"its parts differ in size, which transformers splits from version 5\.20 on"):
        rules.to_transformers()


@pytest.mark.parametrize("version", ["5.0.0", "5.5.4"])
def test_a_transformers_that_renames_too_much_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(DependencyError, match=rf"transformers {version} renames every .* 'transformers>=5\.6'"):
        RENAMINGS.to_transformers()


def test_conversions_are_loaded_by_transformers() -> None:
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    model = llama()
    source = gpt_like(model)
    rules = autoalign.align(halved(source), model).rules()
    config = LoadStateDictConfig(weight_mapping=rules.to_transformers())
    old = "tp_plan" in signature(convert_and_load_state_dict_in_model).parameters
    info, _ = convert_and_load_state_dict_in_model(model, source, config, **({"tp_plan": None} if old else {}))
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert not info.conversion_errors
    wanted = rules.apply(source)
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "steps",
    [
        (Grouped(2, Concatenate(0)), Stack(0)),
        (Grouped(2, Concatenate(1)), Stack(1)),
        (Transpose(), Grouped(2, Concatenate(1)), Stack(0)),
    ],
)
def test_experts_are_stacked_by_the_machinery_of_transformers(steps: tuple[Operation, ...]) -> None:
    pattern = r"^layers\.(\d+)\.experts\.(?P<n>\d+)\."
    rules = Rules(
        (
            Rule((f"{pattern}gate\\.weight$", f"{pattern}up\\.weight$"), (r"h.\1.moe.gate_up",), (Chain(steps),)),
            Rule((f"{pattern}down\\.weight$",), (r"h.\1.moe.down",), (Chain((Transpose(), Stack(0))),)),
        )
    )
    source = {
        f"layers.{i}.experts.{e}.{name}.weight": torch.rand(6, 4)
        for i in range(2)
        for e in range(11)
        for name in ("gate", "up", "down")
    }
    assert same(convert(rules.to_transformers(), source, torch.nn.Module()), rules.apply(source))


def test_weights_are_dequantised_and_combined_by_the_machinery_of_transformers() -> None:
    source: dict[str, Tensor] = {}
    for layer in range(2):
        for name in ("q", "k"):
            source[f"layers.{layer}.{name}.weight"] = torch.randn(16, 32).to(torch.float8_e4m3fn)
            source[f"layers.{layer}.{name}.weight_scale_inv"] = torch.rand(1, 2)
        source |= {f"layers.{layer}.up.weight_v": torch.randn(8, 16), f"layers.{layer}.up.weight_g": torch.rand(8, 1)}
    target = {
        f"h.{layer}.{key}": torch.zeros(shape)
        for layer in range(2)
        for key, shape in {"qk.weight": (32, 32), "up.weight": (8, 16)}.items()
    }
    alignment = autoalign.align(source, target, min_confidence=0)
    assert not alignment.missing_keys
    conversions = alignment.rules().to_transformers()
    assert "dequantise(FP8 in blocks)" in str([each.operations for each in conversions if hasattr(each, "operations")])
    assert same(convert(conversions, source, torch.nn.Module()), alignment.state_dict())
    converter = next(each for each in conversions if isinstance(each, WeightConverter))
    kept = pickle.loads(pickle.dumps(converter))  # a model keeps its conversions
    assert str(kept.operations) == str(converter.operations)
    with pytest.raises(RulesError, match=r"cannot be turned back.*save_original_format=False"):
        converter.reverse_transform()


def test_codes_that_a_cast_spoils_are_refused() -> None:
    """transformers casts every tensor to the model's dtype before it converts it."""
    codes = {"fc.weight": torch.zeros(4, 16, dtype=torch.uint8), "fc.weight_scale": torch.ones(4, 1, dtype=torch.uint8)}
    rules = autoalign.align(codes, {"fc.weight": torch.zeros(4, 32)}, min_confidence=0).rules()
    with pytest.raises(RulesError, match=r"dequantise\(MXFP4\)  \(transformers casts what it loads .*spoils MXFP4\)"):
        rules.to_transformers()


def test_a_key_mapping_is_taken_by_from_pretrained(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    source = {
        key.replace("model.layers.", "net.block").replace("self_attn.", "attn.to_").replace("model.", "net."): value
        for key, value in model.state_dict().items()
    }
    from safetensors.torch import save_file

    save_file(source, tmp_path / "model.safetensors", metadata={"format": "pt"})
    rules = autoalign.align(halved(source), model).rules()
    loaded, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, key_mapping=rules.to_key_mapping(), output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_conversions_that_cannot_be_said_are_refused() -> None:
    with pytest.raises(RulesError, match="2 of 7 rules cannot be expressed as transformers' conversions") as caught:
        EVERY_KIND.to_transformers()
    assert "numbers in names are computed" in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule(("^a",), ("b",), (Transpose(),)), ["Transpose"]),
        (Rule(("^a",), ("b",), (Permute((0, 2, 1)),)), ["Transpose"]),
        (Rule(("^a",), ("b",), (Permute((1, 2, 0)),)), "has no counterpart"),
        (Rule(("^a",), ("b",), (Flip(0),)), "has no counterpart"),
        (Rule(("^q", "^k"), ("qk",), (Chain((Transpose(), Concatenate(0))),)), ["Concatenate", "Transpose"]),
        (Rule(("^q", "^k"), ("qk",), (Flip(0),)), "what joins its tensors has no counterpart"),
        (Rule((r"^e\.(?P<n>\d+)\.w",), ("e",), (Stack(0),)), ["MergeModulelist"]),
        (Rule(("^a", "^b"), ("c", "d"), (Concatenate(0), Concatenate(1))), "several tensors make several"),
        (Rule(("^a",), ("b", "c"), (Flip(0), Chain((Transpose(), Flip(0))))), "laid out in different ways"),
        (Rule(("^a",), ("b", "c"), (Flip(0), Flip(1))), "has no counterpart"),
        (Rule((r"^a(\d+)",), (r"x.\1.b", r"y.\1.c"), (Flip(0), Flip(1))), "differ in more than their last words"),
        (Rule((r"^a(b|(c))\.",), ("d.",)), "is not made of text and plain groups"),
        (Rule(("^a",), ("b", "c"), tuple(Sized(((5,),), Split(0, start, 2)) for start in (0, 3))), "do not follow"),
        (
            Rule(("^a",), ("b", "c"), tuple(Sized(((5,),), Split(0, start, 2)) for start in (0, 2))),
            "not all of a tensor",
        ),
        (Rule((r"^e\.(?P<n>\d+)\.w",), ("e",), (Dequantise("FP8 by row", ("codes", "scale")),)), "a list of quantised"),
    ],
    ids=str,
)
def test_each_operation_is_written_as_one_of_transformers_or_refused(rule: Rule, expected: list[str] | str) -> None:
    if isinstance(expected, str):
        with pytest.raises(RulesError, match=expected):
            Rules((rule,)).to_transformers()
    else:
        (converter,) = (each for each in Rules((rule,)).to_transformers() if isinstance(each, WeightConverter))
        assert [type(operation).__name__ for operation in converter.operations] == expected


def test_without_transformers_there_are_no_objects_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)
    with pytest.raises(DependencyError, match="which is not installed"):
        RENAMINGS.to_transformers()


def test_a_transformers_that_makes_no_several_tensors_of_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(core_model_loading.ConversionOps, "supports_many_to_many", raising=False)
    made = Dequantise("FP8 by row", ("codes", "scale"))
    with pytest.raises(RulesError, match="several tensors make several"):
        Rules((Rule(("^a", "^s"), ("b", "c"), (made, made)),)).to_transformers()
