"""Rules that are found from alignments: exact on their pair, few, and true of deeper and wider networks of the kind."""

from __future__ import annotations

import re
from random import Random
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import autoalign
from autoalign import Alignment, Match, Rules
from autoalign.alignment import Alignment as Made
from autoalign.plan.operations import (
    Chain,
    Concatenate,
    Grouped,
    Operation,
    Permute,
    Reshape,
    Split,
    Transpose,
    Unstack,
    chain,
)
from autoalign.plan.specs import specs_of
from autoalign.rules import induce
from autoalign.rules.size_free import size_free
from tests.strategies import Case, perturbed, tensors, written_cases

few = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def shapes_of(state_dict: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state_dict.items()}


def plan(rules: Rules, source: dict[str, Tensor]) -> dict[str, tuple[tuple[str, ...], Operation]]:
    return {match.target: (match.sources, match.operation) for match in rules.plan(shapes_of(source))}


def matched(alignment: Alignment) -> dict[str, tuple[tuple[str, ...], Operation]]:
    return {match.target: (match.sources, match.operation) for match in alignment.matches}


def made(source: dict[str, Tensor], target: dict[str, Tensor], *matches: Match) -> Alignment:
    """An alignment of these matches."""
    return Made(matches, (), (), specs_of(source), specs_of(target), tensors=source, target_tensors=target)


def meta(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {key.replace("__", "."): torch.empty(shape, device="meta") for key, shape in shapes.items()}


@few
@given(written_cases | perturbed())
def test_rules_reproduce_the_alignment_exactly(case: Case) -> None:
    source = tensors(case.source)
    alignment = autoalign.align(source, tensors(case.target))
    rules = alignment.rules()
    assert plan(rules, source) == matched(alignment)
    assert Rules.from_json(rules.to_json()) == rules


WORDS = ("attn", "mlp", "norm", "fc1", "w", "block2", "0", "1", "2", "10", "(", "a-b", "{", "\\1", "x y", "weight")


@st.composite
def renamings(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    """Names of a random tree, and other names for some of them: by part, by number, at random, or none."""
    paths = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(".".join)
    keys = draw(st.lists(paths, unique=True, min_size=1, max_size=24))
    random = draw(st.randoms(use_true_random=False))
    parts = {word: random.choice([word, word, "new", "layers.0", "3"]) for word in WORDS}
    renamed = [
        ".".join(parts[part] for part in key.split(".")) if random.random() < 0.8 else f"{random.randrange(99)}.x"
        for key in keys
    ]
    used = [place for place in range(len(keys)) if renamed[place] not in renamed[:place] and random.random() < 0.9]
    return keys, [renamed[place] if place in used else "" for place in range(len(keys))]


@settings(few, max_examples=150)
@given(renamings())
def test_any_renaming_whatever_is_reproduced(names: tuple[list[str], list[str]]) -> None:
    keys, targets = names
    source = {key: torch.empty(1, device="meta") for key in keys}
    matches = [Match(target, (key,)) for key, target in zip(keys, targets, strict=True) if target]
    alignment = made(source, {match.target: torch.empty(1, device="meta") for match in matches}, *matches)
    rules = alignment.rules()
    assert plan(rules, source) == matched(alignment)
    assert len(rules) <= len(keys)


@few
@given(st.randoms(use_true_random=False))
def test_any_operations_whatever_are_reproduced(random: Random) -> None:
    source: dict[str, Tensor] = {}
    matches: list[Match] = []
    for layer in range(random.randrange(1, 4)):
        width = random.choice([2, 4])
        for name in "qkv":
            source[f"{layer}.{name}"] = torch.empty(width, 6, device="meta")
        source[f"{layer}.fused"] = torch.empty(3 * width, 6, device="meta")
        source[f"{layer}.stack"] = torch.empty(3, width, 6, device="meta")
        matches.append(Match(f"l.{layer}.qkv", tuple(f"{layer}.{n}" for n in "qkv"), Concatenate(0)))
        sizes = random.choice([(width, width, width), (1, width, 2 * width - 1)])
        starts = (0, sizes[0], sizes[0] + sizes[1])
        matches += [
            Match(f"l.{layer}.{name}", (f"{layer}.fused",), Split(0, start, size))
            for name, start, size in zip("abc", starts, sizes, strict=True)
        ][: random.randrange(1, 4)]
        turn = random.choice([(), (Transpose(),), (Reshape((6, width)),)])
        matches += [
            Match(f"l.{layer}.list.{i + 1}", (f"{layer}.stack",), chain(Unstack(0, i), *turn))
            for i in range(random.choice([2, 3]))
        ]
        if random.random() < 0.5:
            matches.append(Match(f"l.{layer}.again", (f"{layer}.q",), Permute((1, 0))))
    alignment = made(source, {}, *matches)
    assert plan(alignment.rules(), source) == matched(alignment)


def test_one_line_for_a_repeated_block() -> None:
    source = {f"layers.{i}.attn.{n}.weight": torch.empty(2, 2) for i in range(12) for n in "qkvo"}
    source |= {f"layers.{i}.{n}": torch.empty(2) for i in range(12) for n in ("norm.weight", "norm.bias")}
    target = {f"encoder.blocks.{key.removeprefix('layers.')}": tensor for key, tensor in source.items()}
    rules = autoalign.align(source, target).rules()
    assert str(rules) == r"^layers\. -> encoder.blocks."


def test_words_that_stay_are_captured() -> None:
    source = {f"{side}.{i}.{n}_lin.w": torch.empty(1) for side in ("enc", "dec") for i in range(2) for n in "qk"}
    names = [f"{key.split('.')[0]}.layers.{key.split('.')[1]}.attn.{key.split('.')[2][0]}.w" for key in source]
    matches = [Match(name, (key,)) for key, name in zip(source, names, strict=True)]
    rules = made(source, dict(zip(names, source.values(), strict=True)), *matches).rules()
    assert str(rules) == r"^(enc|dec)\.(\d+)\.(q|k)_lin\. -> \1.layers.\2.attn.\3."


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ({f"blocks.{i}.w": f"stages.{i // 2}.{i % 2}.w" for i in range(8)}, r"stages.{\1 // 2}.{\1 % 2}."),
        ({f"stages.{i // 2}.{i % 2}.w": f"blocks.{i}.w" for i in range(8)}, r"blocks.{2*\1 + \2}."),
        ({f"layer{i + 1}.w": f"stages.{i}.x.w" for i in range(4)}, r"stages.{\1 - 1}.x."),
        ({f"f.{2 * i}.w": f"g.{i}.w" for i in range(4)}, r"g.{\1 // 2}."),
        ({f"f.{i}.w": f"g.{3 * i + 1}.w" for i in range(4)}, r"g.{3*\1 + 1}."),
        ({f"s.{s}.{b}.w": f"f.{(0, 2, 5)[s] + b}.w" for s, b in [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0)]},
         r"f.{(0, 2, 5)[\1] + \2}."),
        ({f"f.{i}.w": f"s.{(0, 0, 0, 1, 2, 2)[i]}.w{i}" for i in range(6)}, r"s.{(0, 0, 0, 1, 2, 2)[\1]}.w\1"),
    ],
)  # fmt: skip
def test_arithmetic_where_lists_are_counted_otherwise(names: dict[str, str], text: str) -> None:
    source = {key: torch.empty(1) for key in names}
    matches = [Match(name, (key,)) for key, name in names.items()]
    rules = made(source, {name: torch.empty(1) for name in names.values()}, *matches).rules()
    assert [rule.targets for rule in rules.rules] == [(text,)]


def test_what_is_not_used_is_dropped_and_what_is_used_is_the_general_case() -> None:
    source = {f"l.{i}.{n}": torch.empty(1) for i in range(9) for n in ("w", "b", "table")} | {"head": torch.empty(1)}
    names = {f"l.{i}.{n}": f"m.{i}.{n}" for i in range(3) for n in ("w", "b")}
    matches = [Match(name, (key,)) for key, name in names.items()]
    rules = made(source, {name: torch.empty(1) for name in names.values()}, *matches).rules()
    assert str(rules).splitlines() == [
        r"^l\.(3|4|5|6|7|8)\. -> (dropped)",
        r"^l\.(\d+)\.table$   -> (dropped)",
        r"^l\.(\d+)\.         -> m.\1.",
        r"^head$              -> (dropped)",
    ]


def test_values_that_the_model_keeps_are_no_rule_and_said_so() -> None:
    source = {"emb.weight": torch.rand(4, 8), "fc.weight": torch.rand(3, 8), "fc.bias": torch.rand(3)}
    target = {"emb.weight": torch.rand(6, 8), "fc.weight": torch.rand(3, 8), "fc.bias": torch.rand(3)}
    alignment = autoalign.align(source, target, adapt=("vocab",))
    assert alignment.status["emb.weight"] == "adapted"
    rules = alignment.rules()
    assert rules.notes == ("Left out, since they keep values of the model: 1 (emb.weight).",)
    assert list(rules.apply(source)) == ["fc.weight", "fc.bias"]


# sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "even", "text"),
    [
        ([(Split(0, 2, 2), (6,))], True, "part 2 of 3 (dim 0)"),
        ([(Split(0, 2, 2), (6,))], False, "split(dim 0, 2:4) of [6] only"),
        ([(Split(0, 0, 4), (6,)), (Split(0, 0, 8), (12,))], False, "parts 1 to 2 of 3 (dim 0)"),
        ([(Split(0, 0, 4), (6,)), (Split(0, 0, 8), (13,))], False, None),
        ([(Reshape((6, 4)), (6, 4, 1, 1))], False, "reshape [d0, d1]"),
        ([(Reshape((1, 1, 5)), (5,))], False, "reshape [1, 1, d0]"),
        ([(Reshape((8, 12)), (8, 3, 4))], False, "reshape [d0, d1*d2]"),
        ([(Reshape((96, 12, 64)), (96, 768))], False, "reshape [d0, -1, 64]"),
        ([(Reshape((8, 3, 16, 16)), (8, 768))], False, "reshape [d0, 3, -1, 16]"),
        ([(Reshape((2, 6)), (12,)), (Reshape((2, 8)), (16,))], False, "reshape [2, -1]"),
        ([(Reshape((2, 6)), (12,)), (Reshape((4, 5)), (20,))], False, None),
        ([(Reshape((3, 4)), (12,))], False, "reshape [3, 4]"),
        ([(Reshape(()), (1,))], False, "reshape []"),
        ([(Chain((Transpose(), Split(0, 0, 2))), (3, 4))], True, "transpose + part 1 of 2 (dim 0)"),
    ],
)
def test_sizes_are_left_out_where_they_can_be(
    samples: list[tuple[Operation, tuple[int, ...]]], even: bool, text: str | None
) -> None:
    found = size_free([(operation, (shape,)) for operation, shape in samples], even=even)
    assert (None if found is None else str(found)) == text


def vit(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    with torch.device("meta"):
        model = timm.create_model(name)
        config = transformers.ViTConfig(
            hidden_size=model.embed_dim,
            num_hidden_layers=len(model.blocks),
            num_attention_heads=model.blocks[0].attn.num_heads,
            intermediate_size=4 * model.embed_dim,
            num_labels=1000,
        )
        return model.state_dict(), transformers.ViTForImageClassification(config).state_dict()


@pytest.mark.parametrize("back", [False, True])
def test_rules_of_vit_small_hold_for_vit_large(back: bool) -> None:
    small, large = vit("vit_small_patch16_224"), vit("vit_large_patch16_224")
    if back:
        small, large = small[::-1], large[::-1]
    rules = autoalign.align(*small).rules()
    assert 3 * len(rules) <= len(small[0])
    assert plan(rules, large[0]) == matched(autoalign.align(*large))
    assert shapes_of(rules.apply(large[0])) == shapes_of(large[1])


def meta_llama(layers: int, width: int, heads: int) -> dict[str, Tensor]:
    """Meta's own names."""
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (90, width)}
    for i in range(layers):
        shapes |= {f"layers.{i}.attention.{w}.weight": (width, width) for w in ("wq", "wk", "wv", "wo")}
        shapes |= {f"layers.{i}.feed_forward.{w}.weight": (3 * width, width) for w in ("w1", "w3")}
        shapes |= {f"layers.{i}.feed_forward.w2.weight": (width, 3 * width)}
        shapes |= {f"layers.{i}.{norm}.weight": (width,) for norm in ("attention_norm", "ffn_norm")}
    shapes |= {"norm.weight": (width,), "output.weight": (90, width), "rope.freqs": (width // heads // 2,)}
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def hf_llama(layers: int, width: int, heads: int) -> dict[str, Tensor]:
    config = transformers.LlamaConfig(
        vocab_size=90,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    with torch.device("meta"):
        return dict(transformers.LlamaForCausalLM(config).state_dict())


def test_rules_of_a_llama_of_4_layers_hold_for_one_of_80() -> None:
    small, large = (4, 64, 4), (80, 128, 8)  # heads of 16 in both

    def aligned(source: dict[str, Tensor], target: dict[str, Tensor]) -> Alignment:
        sides = (
            {"model": side, "config": {"rotary_interleaved": pairs}}
            for side, pairs in ((source, True), (target, False))
        )
        return autoalign.align(*sides)

    rules = aligned(meta_llama(*small), hf_llama(*small)).rules()
    source = meta_llama(*large)
    alignment = aligned(source, hf_llama(*large))
    assert plan(rules, source) == matched(alignment)
    assert len(alignment.matches) == 80 * 9 + 3
    assert len(rules) <= 14
    assert r"reshape [-1, 8, 2, d1] + permute[0, 2, 1, 3] + reshape [d0*d1*d2, d3]" in str(rules)


def test_uneven_parts_are_kept_for_their_sizes_and_refused_for_others() -> None:
    source, target = meta(l__0__qkv=(8, 4)), meta(b__0__q=(4, 4), b__0__k=(2, 4), b__0__v=(2, 4))
    splits = [("q", 0, 4), ("k", 4, 2), ("v", 6, 2)]
    matches = [Match(f"b.0.{name}", ("l.0.qkv",), Split(0, start, size)) for name, start, size in splits]
    rules = made(source, target, *matches).rules()
    assert "split(dim 0, 4:6) of [8, 4] only" in str(rules)
    with pytest.raises(autoalign.RulesError, match=re.escape("was found for [8, 4] and cannot be carried over to [10")):
        rules.apply(meta(l__0__qkv=(10, 4)))


def test_experts_may_be_more() -> None:
    def both(experts: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        source = {
            f"layers.{i}.experts.{e}.{name}.weight": torch.rand(shape)
            for i in range(2)
            for e in range(experts)
            for name, shape in (("gate_proj", (6, 4)), ("up_proj", (6, 4)), ("down_proj", (4, 6)))
        }
        target = {
            f"layers.{i}.experts.{name}": torch.zeros(experts, *shape)
            for i in range(2)
            for name, shape in (("gate_up_proj", (12, 4)), ("down_proj", (4, 6)))
        }
        return source, target

    rules = autoalign.align(*both(4)).rules()
    assert len(rules) == 2
    source, target = both(11)
    alignment = autoalign.align(source, target)
    wanted, got = alignment.state_dict(), rules.apply(source)
    assert wanted.keys() == got.keys() == target.keys()
    assert all(torch.equal(got[key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize(
    ("source", "target", "most"),
    [
        (torchvision.models.resnet50, lambda: timm.create_model("resnet50"), 0),
        (torchvision.models.vit_b_16, lambda: timm.create_model("vit_base_patch16_224"), 12),
        (torchvision.models.swin_t, lambda: timm.create_model("swin_tiny_patch4_window7_224"), 20),
    ],
)
def test_real_networks_take_few_rules(source: object, target: object, most: int) -> None:
    with torch.device("meta"):
        own, other = source().state_dict(), target().state_dict()  # type: ignore[operator]
    alignment = autoalign.align(own, other)
    rules = alignment.rules()
    assert plan(rules, own) == matched(alignment)
    assert len(rules) <= most


def test_numbers_that_run_on_from_stage_to_stage_are_counted_back() -> None:
    """The table of what is added has negative numbers."""
    source = {f"stages.{i}.{i + k}.fc.weight": torch.rand(3 + 2 * i + k, 4) for i in range(3) for k in range(2)}
    target = {f"levels.{i}.{k}.fc.weight": torch.empty(3 + 2 * i + k, 4) for i in range(3) for k in range(2)}
    alignment = autoalign.align(source, target)
    rules = alignment.rules()
    assert str(rules) == r"^stages\.(\d+)\.(\d+)\. -> levels.\1.{(0, -1, -2)[\1] + \2}."
    assert Rules.from_json(rules.to_json()) == rules
    namespace: dict[str, Any] = {}
    exec(rules.to_python(), namespace)
    for converted in (rules.apply(source), namespace["checkpoint_filter_fn"](source)):
        assert converted.keys() == target.keys()
        assert all(converted[match.target] is source[match.sources[0]] for match in alignment.matches)


@pytest.mark.parametrize(
    "names",
    [
        {f"l.{i}.{j}.w": f"{'ba'[i == j]}.{i}.{j}.w" for i in range(2) for j in range(2)},
        {f"l.{i**2}.{j**2}.w": f"m.{(31 * i + 7 * j**3) % 53}.w" for i in range(4) for j in range(4)},
        {f"l{'.1' * 30}.w": f"m{'.1' * 30}.w"},
    ],
    ids=["no number tells which of two", "no arithmetic", "more numbers than are set apart"],
)
def test_names_without_a_common_pattern_are_reproduced(names: dict[str, str]) -> None:
    source = meta(**dict.fromkeys(names, (1,)))
    target = meta(**dict.fromkeys(names.values(), (1,)))
    alignment = made(source, target, *(Match(other, (own,)) for own, other in names.items()))
    assert plan(alignment.rules(), source) == matched(alignment)


def test_tensors_of_other_ranks_are_flattened_together() -> None:
    """No operation without sizes flattens both."""
    source, target = meta(a=(2, 6), b=(2, 2, 3)), meta(c=(24,))
    flat = Match("c", ("a", "b"), Chain((Grouped(1, Reshape((12,))), Concatenate(0))))
    alignment = made(source, target, flat)
    assert plan(alignment.rules(), source) == matched(alignment)


def test_what_cannot_be_corrected_is_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(induce, "_MAX_CORRECTIONS", 0)
    source = {f"h.{n}.w": torch.rand(2) for n in range(3)}
    target = {f"blocks.{n}.w": torch.rand(2) for n in range(3)}
    matches = [Match(f"blocks.{n}.w", (f"h.{n}.w",)) for n in range(3)]
    rules = made(source, target, *matches).rules()
    assert len(rules) == 3
    assert list(rules.apply(source)) == list(target)
