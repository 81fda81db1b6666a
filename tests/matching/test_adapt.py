"""Adapt: whole models, what rows and grids are, and everything that must be left alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import timm
import torch
import transformers
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import beit, swin_transformer, vision_transformer
from torch import Tensor, nn

import autoalign
from autoalign.alignment import Alignment
from autoalign.plan.options import Adapt

EVERYTHING: tuple[Adapt, ...] = ("head", "vocab", "pos_embed", "rel_pos", "in_channels")
TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2}

# timm's own interpolation of tables warns about the way in which it indexes
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:timm")


def shapes(entries: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    return {key: torch.empty(*shape, device="meta") for key, shape in entries.items()}


def values(entries: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    return {key: torch.randn(*shape) for key, shape in entries.items()}


def adapted(alignment: Alignment) -> dict[str, str]:
    return {match.target: str(match.operation) for match in alignment.matches if match.operation.adapts}


def vit(**options: object) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **{**TINY, **options})
    return randomized(model)


def randomized(model: nn.Module) -> nn.Module:
    """Give every parameter values of its own: a tensor of zeros or ones would be equal to any other."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    return model.eval()


# whole models


def test_a_vision_transformer_of_another_size_and_naming_equals_timms_own() -> None:
    source = vit(num_classes=30)
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, num_labels=30
    )
    renamed = transformers.ViTForImageClassification(config)
    assert not autoalign.load(renamed, source).missing_keys

    expected, model = vit(img_size=384, num_classes=10), vit(img_size=384, num_classes=10)
    state_dict = vision_transformer.checkpoint_filter_fn(source.state_dict(), expected)
    state_dict |= {key: state_dict[key][:10] for key in ("head.weight", "head.bias")}
    expected.load_state_dict(state_dict)

    alignment = autoalign.load(model, renamed.state_dict(), strict=True, adapt=("pos_embed", "head"))
    assert adapted(alignment) == {
        "pos_embed": "resize positions 14x14 -> 24x24 (bicubic)",
        "head.weight": "take 10 rows",
        "head.bias": "take 10 rows",
    }
    images = torch.randn(1, 3, 384, 384)
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected(images))


def test_what_was_adapted_is_never_called_a_copy() -> None:
    source, target = vit(num_classes=30), vit(img_size=384, num_classes=10)
    alignment = autoalign.align(source, target, adapt=EVERYTHING)
    changed = ["pos_embed", "head.weight", "head.bias"]
    assert [key for key, status in alignment.status.items() if status == "adapted"] == changed
    assert not alignment.missing_keys
    assert not alignment.unexpected_keys
    assert not alignment.mismatched_keys
    assert not set(changed) & set(alignment.mapping)
    assert alignment.coverage == 1
    for match in alignment.matches:
        assert (match.target in changed) == any(text.startswith("adapted: ") for text in match.warnings)
        assert match.confidence < 0.9 or match.target not in changed
    assert repr(alignment).startswith("<Alignment: 29 of 32 target keys matched, 3 adapted, ")
    alignment.raise_if_incomplete()
    lines = str(alignment).splitlines()
    section = lines[lines.index("Adapted: filled with changed values, as the call allows") :]
    assert any("pos_embed" in line and "[1, 577, 24]" in line for line in section)
    assert any("of [1, 197, 24]" in line for line in section)
    assert any(line.startswith("adapted") and " 3 " in line for line in lines)


def test_nothing_is_adapted_unless_asked_for() -> None:
    source, target = vit(num_classes=30), vit(img_size=384, in_chans=1, num_classes=10)
    different = {"pos_embed", "patch_embed.proj.weight", "head.weight", "head.bias"}
    cases: tuple[tuple[Adapt | Sequence[Adapt], set[str]], ...] = (
        ((), set()),
        ("head", {"head.weight", "head.bias"}),
        (("pos_embed",), {"pos_embed"}),
        (["in_channels", "vocab", "rel_pos"], {"patch_embed.proj.weight"}),
    )
    for adapt, expected in cases:
        alignment = autoalign.align(source, target, adapt=adapt)
        assert set(adapted(alignment)) == expected
        assert {item.key for item in alignment.mismatched} == different - expected
        alone = {"patch_embed.proj.bias"} - {f"{key.removesuffix('weight')}bias" for key in expected}
        assert set(alignment.missing_keys) == different - expected | alone


def test_the_source_and_what_the_target_keeps_stay_as_they_are() -> None:
    source, target = vit(num_classes=4), vit(num_classes=6)
    own, theirs = target.state_dict()["head.weight"].clone(), source.state_dict()["head.weight"].clone()
    alignment = autoalign.load(target, source, adapt="head")
    assert adapted(alignment)["head.weight"] == "take 4 rows, keep 2"
    result = target.state_dict()["head.weight"]
    assert torch.equal(result[:4], theirs)
    assert torch.equal(result[4:], own[4:])
    assert torch.equal(source.state_dict()["head.weight"], theirs)


@pytest.mark.parametrize("window", [6, 8])
def test_a_swin_transformer_with_another_window_equals_timms_own(window: int) -> None:
    options = {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16, "num_classes": 5}
    torch.manual_seed(0)
    name = "swin_tiny_patch4_window7_224"
    source = randomized(timm.create_model(name, img_size=112, **options))
    target = timm.create_model(name, img_size=16 * window, window_size=window, **options)
    expected = swin_transformer.checkpoint_filter_fn(source.state_dict(), target)
    alignment = autoalign.load(target, source.state_dict(), strict=True, adapt="rel_pos")
    assert set(adapted(alignment).values()) == {f"resize relative positions 7x7 -> {window}x{window}"}
    assert len(adapted(alignment)) == 4
    for key, value in target.state_dict().items():
        torch.testing.assert_close(value, expected[key])
    target(torch.randn(1, 3, 16 * window, 16 * window))


def test_beit_of_another_resolution_equals_timms_own() -> None:
    torch.manual_seed(0)
    source = randomized(timm.create_model("beit_base_patch16_224", num_classes=5, **TINY))
    target = timm.create_model("beit_base_patch16_224", num_classes=5, img_size=(160, 320), **TINY)
    expected = beit.checkpoint_filter_fn(source.state_dict(), target)
    alignment = autoalign.load(target, source, adapt="rel_pos")
    assert set(adapted(alignment).values()) == {"resize relative positions 14x14 -> 10x20"}
    for key, value in target.state_dict().items():
        torch.testing.assert_close(value, expected[key])


def test_tables_of_relative_positions_in_other_modules_are_found_by_their_blocks() -> None:
    options = {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16}
    with torch.device("meta"):
        source = timm.create_model("swin_tiny_patch4_window7_224", img_size=112, num_classes=5, **options)
        target = transformers.SwinForImageClassification(
            transformers.SwinConfig(image_size=128, window_size=8, num_labels=5, **options)
        )
    alignment = autoalign.align(source, target, adapt="rel_pos")
    # which older versions of transformers save
    assert not [key for key in alignment.missing_keys if not key.endswith(".relative_position_index")]
    for match in alignment.matches:
        if match.operation.adapts:
            numbers = [[part for part in key.split(".") if part.isdigit()] for key in (match.target, *match.sources)]
            assert numbers[0] == numbers[1]


def test_buffers_that_follow_from_a_window_keep_the_models_own_values() -> None:
    block = {
        f"{name}.weight": (48 + place, 16) for place, name in enumerate(("norm", "qkv", "proj", "up", "down", "scale"))
    }
    sides = []
    for window in (7, 8):
        entries = {f"blocks.{b}.attn.{key}": shape for b in range(3) for key, shape in block.items()}
        side = shapes(entries)
        for b in range(3):
            side[f"blocks.{b}.attn.relative_position_bias_table"] = torch.empty((2 * window - 1) ** 2, 2, device="meta")
            side[f"blocks.{b}.attn.relative_coords_table"] = torch.empty(
                1, 2 * window - 1, 2 * window - 1, 2, device="meta"
            )
            side[f"blocks.{b}.attn.relative_position_index"] = torch.empty(window**4, dtype=torch.int64, device="meta")
        sides.append(side)
    alignment = autoalign.align(*sides, adapt=EVERYTHING)
    assert sorted(adapted(alignment)) == [f"blocks.{b}.attn.relative_position_bias_table" for b in range(3)]
    assert len(alignment.missing_keys) == 6


def llama(vocab_size: int, *, tied: bool) -> nn.Module:
    torch.manual_seed(vocab_size)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("have", "need"), [(32, 40), (40, 32)])
def test_a_vocabulary_shares_the_rows_that_both_have(have: int, need: int, *, tied: bool) -> None:
    source, target = llama(have, tied=tied), llama(need, tied=tied)
    own = {key: value.clone() for key, value in target.state_dict().items()}
    assert not adapted(autoalign.align(source, target, adapt="head"))  # an output layer of tokens is no classifier
    alignment = autoalign.load(target, source, strict=True, adapt="vocab")
    assert set(adapted(alignment)) == {"model.embed_tokens.weight", "lm_head.weight"}
    for key in adapted(alignment):
        result = target.state_dict()[key]
        assert torch.equal(result[: min(have, need)], source.state_dict()[key][:need])
        assert torch.equal(result[have:], own[key][have:])
    target(torch.tensor([[1, 2, 3]]))


def test_an_output_layer_that_is_tied_in_the_target_alone_is_filled_with_its_embedding() -> None:
    source, target = llama(32, tied=False), llama(40, tied=True)
    alignment = autoalign.load(target, source, adapt="vocab")
    assert alignment.unexpected_keys == ["lm_head.weight"]
    assert torch.equal(target.state_dict()["lm_head.weight"][:32], source.state_dict()["model.embed_tokens.weight"])


TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def test_words_and_positions_of_text_are_told_apart() -> None:
    def bert(vocab_size: int, length: int) -> nn.Module:
        config = transformers.BertConfig(vocab_size=vocab_size, max_position_embeddings=length, **TEXT)
        model: nn.Module = transformers.BertForMaskedLM(config)
        return model

    with torch.device("meta"):
        source, target = bert(32, 49), bert(40, 64)  # squares, which are no grids here
    alignment = autoalign.align(source, target, adapt=EVERYTHING)
    assert not alignment.missing_keys
    done = adapted(alignment)
    assert done.pop("bert.embeddings.position_embeddings.weight") == "resize positions 49 -> 64 (linear)"
    assert set(done.values()) == {"take 32 rows, keep 8"}
    assert sorted(key.rpartition(".")[0] for key in done) == [
        "bert.embeddings.word_embeddings",
        "cls.predictions",
        "cls.predictions.decoder",
        "cls.predictions.decoder",
    ]


def test_rows_that_a_module_reserves_are_no_positions() -> None:
    def roberta(length: int) -> nn.Module:
        config = transformers.RobertaConfig(vocab_size=32, max_position_embeddings=length, **TEXT)
        model: nn.Module = transformers.RobertaModel(config)
        return model

    source, target = roberta(18), roberta(34)
    key = "embeddings.position_embeddings.weight"
    for side in (source, source.state_dict()):
        assert adapted(autoalign.align(side, target, adapt="pos_embed")) == {key: "resize positions 16 -> 32 (linear)"}
    autoalign.load(target, source, adapt="pos_embed")
    assert torch.equal(target.state_dict()[key][:2], source.state_dict()[key][:2])


def test_both_towers_of_a_model_get_positions_of_their_own_kind() -> None:
    def clip(image_size: int, length: int) -> nn.Module:
        tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.CLIPConfig(
            text_config={**tower, "vocab_size": 32, "max_position_embeddings": length, "eos_token_id": 2},
            vision_config={**tower, "image_size": image_size, "patch_size": 8},
            projection_dim=8,
        )
        model: nn.Module = transformers.CLIPModel(config)
        return model

    with torch.device("meta"):
        source, target = clip(32, 16), clip(48, 25)
    for sides in ((source, target), (source.state_dict(), target.state_dict())):
        alignment = autoalign.align(*sides, adapt="pos_embed")
        assert not alignment.missing_keys
        assert adapted(alignment) == {
            "text_model.embeddings.position_embedding.weight": "resize positions 16 -> 25 (linear)",
            "vision_model.embeddings.position_embedding.weight": "resize positions 4x4 -> 6x6 (bicubic)",
        }


# grids


def test_a_grid_that_is_no_square_is_told_by_the_module_alone() -> None:
    source, target = vit(), vit(img_size=(160, 320))
    expected = vision_transformer.checkpoint_filter_fn(source.state_dict(), target)["pos_embed"]
    alignment = autoalign.align(source.state_dict(), target, adapt="pos_embed")
    assert adapted(alignment) == {"pos_embed": "resize positions 14x14 -> 10x20 (bicubic)"}
    torch.testing.assert_close(alignment.state_dict()["pos_embed"], expected)
    alignment = autoalign.align(source, target.state_dict(), adapt="pos_embed")
    assert alignment.missing_keys == ["pos_embed"]
    assert [item.key for item in alignment.mismatched] == ["pos_embed"]
    (note,) = alignment.notes
    assert note.startswith("pos_embed [1, 201, 24] was not adapted: the grid of the 201 rows")
    saved = {"model": target.state_dict(), "config": {"vision": {"image_size": [160, 320], "patch_size": 16}}}
    alignment = autoalign.align(source, saved, adapt="pos_embed")
    assert adapted(alignment) == {"pos_embed": "resize positions 14x14 -> 10x20 (bicubic)"}


def test_a_table_of_the_same_shape_for_another_grid_is_no_copy() -> None:
    source, target = vit(img_size=(112, 448)), vit(img_size=(448, 112))
    assert not adapted(autoalign.align(source, target))
    for alignment in (
        autoalign.align(source, target, adapt="pos_embed"),
        autoalign.load(target, source, adapt="pos_embed"),
    ):
        assert adapted(alignment) == {"pos_embed": "resize positions 7x28 -> 28x7 (bicubic)"}
    assert not adapted(
        autoalign.align(source.state_dict(), target, adapt="pos_embed")
    )  # the same grid, for all we know


def test_positions_of_tokens_that_one_side_lacks_are_left_out_or_kept() -> None:
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", **TINY)
    plain = vit(img_size=128)
    randomized(distilled)
    alignment = autoalign.align(distilled, plain, adapt="pos_embed")
    assert adapted(alignment) == {"pos_embed": "resize positions 14x14 -> 8x8 (bicubic), drop 1"}
    (match,) = [match for match in alignment.matches if match.operation.adapts]
    assert match.warnings == (
        "adapted: positions were interpolated, that of the source's distillation token was left out",
    )
    theirs = distilled.state_dict()["pos_embed"]
    without = torch.cat([theirs[:, :1], theirs[:, 2:]], dim=1)
    expected = resample_abs_pos_embed(without, [8, 8], num_prefix_tokens=1)
    torch.testing.assert_close(alignment.state_dict()["pos_embed"], expected)

    alignment = autoalign.align(plain, distilled, adapt="pos_embed")
    assert adapted(alignment) == {"pos_embed": "resize positions 8x8 -> 14x14 (bicubic), keep 1"}
    result = alignment.state_dict()["pos_embed"]
    assert torch.equal(result[:, 0], plain.state_dict()["pos_embed"][:, 0])
    assert torch.equal(result[:, 1], theirs[:, 1])


VIDEO = {"patch_embed.proj.weight": (16, 3, 2, 8, 8), "cls_token": (1, 1, 16)}
IMAGE = {"patch_embed.proj.weight": (16, 3, 8, 8), "cls_token": (1, 1, 16)}
LAYERS = {f"blocks.{b}.{name}.weight": (16, 16) for b in range(3) for name in ("q", "k", "v", "o")}


@pytest.mark.parametrize(
    ("around", "source", "target", "expected"),
    [
        (IMAGE, (1, 17, 16), (1, 26, 16), "resize positions 4x4 -> 5x5 (bicubic)"),
        (IMAGE, (17, 16), (1, 26, 16), "resize positions 4x4 -> 5x5 (bicubic) + reshape[1, 26, 16]"),
        (IMAGE, (1, 16, 16), (1, 26, 16), "resize positions 4x4 -> 5x5 (bicubic), keep 1"),
        (IMAGE, (1, 4, 4, 16), (1, 5, 6, 16), "resize positions 4x4 -> 5x6 (bicubic)"),
        (IMAGE, (1, 16, 4, 4), (1, 16, 5, 6), "resize positions 4x4 -> 5x6 (bicubic)"),
        (IMAGE, (1, 18, 16), (1, 26, 16), None),  # no square
        (IMAGE, (1, 17, 16), (1, 26, 8), None),  # another width
        (VIDEO, (1, 17, 16), (1, 26, 16), None),  # a square of patches in space and time is no grid
        ({}, (1, 16, 16), (1, 25, 16), None),  # nothing tells what the positions are of
        ({"to_patch.1.weight": (16, 64)}, (1, 16, 16), (1, 25, 16), "resize positions 4x4 -> 5x5 (bicubic)"),
        ({"tok_emb.weight": (9, 16)}, (1, 16, 16), (1, 25, 16), "resize positions 16 -> 25 (linear)"),
        ({"conv.weight": (16, 4, 3)}, (16, 16), (25, 16), "resize positions 16 -> 25 (linear)"),
    ],
)
def test_what_stands_around_a_table_tells_its_grid(
    around: dict[str, Sequence[int]], source: Sequence[int], target: Sequence[int], expected: str | None
) -> None:
    sides = [shapes({**around, "pos_embed": shape, **LAYERS}) for shape in (source, target)]
    alignment = autoalign.align(*sides, adapt="pos_embed")
    assert adapted(alignment).get("pos_embed") == expected
    assert alignment.status["pos_embed"] == ("adapted" if expected else "mismatched")
    assert bool(alignment.notes) == (expected is None)


# what rows are


BODY = {
    f"layers.{b}.{name}": shape
    for b in range(4)
    for name, shape in (
        ("up.weight", (32, 16)),
        ("down.weight", (16, 32)),
        ("q.weight", (16, 24)),
        ("o.weight", (24, 16)),
        ("norm.weight", (16,)),
    )
}


@pytest.mark.parametrize(
    ("source", "target", "adapt", "operation"),
    [
        ({"fc.weight": (9, 16)}, {"fc.weight": (4, 16)}, "head", "take 4 rows"),
        ({"head.weight": (9, 16, 1, 1)}, {"classifier.weight": (4, 16)}, "head", "reshape[9, 16] + take 4 rows"),
        ({"fc.weight": (9, 16)}, {"out.weight": (4, 16)}, "head", "take 4 rows"),  # the last on both sides
        ({"fc.kernel": (16, 9)}, {"fc.weight": (4, 16)}, "head", "transpose + take 4 rows"),
        ({"fc.kernel": (16, 4)}, {"fc.weight": (9, 16)}, "head", "(transpose, copy) + take 4 rows, keep 5"),
        ({"logits.weight": (9, 16, 3, 3)}, {"logits.weight": (4, 16, 3, 3)}, "head", None),  # places, not classes
        ({"fc.weight": (9, 16)}, {"fc.weight": (9, 12)}, "head", None),  # other inputs
        ({"embed.weight": (9, 16)}, {"embed.weight": (4, 16)}, "head", None),
        ({"embed.weight": (9, 16)}, {"embed.weight": (4, 16)}, "vocab", "take 4 rows"),
        ({"patch_embed.weight": (9, 16)}, {"embed.weight": (4, 16)}, "vocab", None),  # of patches, says one side
        ({"lm_head.weight": (9, 16)}, {"lm_head.weight": (4, 16)}, "vocab", "take 4 rows"),
        ({"lm_head.weight": (9, 16)}, {"lm_head.weight": (4, 16)}, "head", "take 4 rows"),  # with no tokens around
    ],
)
def test_name_and_place_tell_what_rows_are(
    source: dict[str, Sequence[int]], target: dict[str, Sequence[int]], adapt: Adapt, operation: str | None
) -> None:
    alignment = autoalign.align(shapes({**BODY, **source}), shapes({**BODY, **target}), adapt=adapt)
    (key,) = target
    assert adapted(alignment).get(key) == operation
    assert alignment.status[key] == ("adapted" if operation else "mismatched")


def test_the_bias_tells_along_which_dimension_the_classes_stand() -> None:
    source = shapes({**BODY, "fc.weight": (16, 9), "fc.bias": (9,)})
    target = shapes({**BODY, "fc.weight": (16, 4), "fc.bias": (4,)})
    alignment = autoalign.align(source, target, adapt="head")
    assert adapted(alignment) == {"fc.weight": "take 4 rows", "fc.bias": "take 4 rows"}
    assert alignment.state_dict()["fc.weight"].shape == (16, 4)


def test_layers_of_another_width_in_every_block_are_no_heads() -> None:
    narrow = {f"layers.{b}.fc.weight": (8, 16) for b in range(1, 4)}
    wide = {f"layers.{b}.fc.weight": (12, 16) for b in range(1, 4)}
    alignment = autoalign.align(shapes({**BODY, **narrow}), shapes({**BODY, **wide}), adapt=EVERYTHING)
    assert sorted(alignment.missing_keys) == sorted(wide)


def test_several_heads_of_one_model_are_adapted_alike() -> None:
    def heads(classes: int) -> dict[str, Sequence[int]]:
        names = ("aux.dense", "head", "head_dist")
        return {
            f"{name}.{kind}": shape
            for name in names
            for kind, shape in (("weight", (classes, 16)), ("bias", (classes,)))
        }

    alignment = autoalign.align(shapes({**BODY, **heads(9)}), shapes({**BODY, **heads(4)}), adapt="head")
    assert set(adapted(alignment)) == set(heads(4))


@pytest.mark.parametrize(
    ("source", "target", "operation"),
    [
        ((8, 3, 7, 7), (8, 1, 7, 7), "sum 3 channels"),
        ((8, 3, 7, 7), (8, 4, 7, 7), "repeat to 4 channels, rescaled"),
        ((8, 4, 3), (8, 2, 3), "repeat to 2 channels, rescaled"),
        ((8, 48, 3, 3), (8, 16, 3, 3), "sum 3 channels"),
        ((8, 3, 7, 7), (8, 1, 5, 5), None),
        ((8, 3, 7, 7), (9, 1, 7, 7), None),
    ],
)
def test_only_the_channels_of_a_first_layer_are_adapted(
    source: Sequence[int], target: Sequence[int], operation: str | None
) -> None:
    later = {f"layer{b}.conv.weight": (8, 8, 3, 3) for b in range(4)}
    sides = [shapes({"stem.weight": shape, **later}) for shape in (source, target)]
    assert adapted(autoalign.align(*sides, adapt="in_channels")).get("stem.weight") == operation
    sides = [shapes({**later, "last.weight": shape}) for shape in (source, target)]
    assert not adapted(autoalign.align(*sides, adapt="in_channels"))


# around it


def test_a_rule_may_name_what_adapt_allows() -> None:
    source, target = shapes({**BODY, "a.weight": (9, 16)}), shapes({**BODY, "fc.weight": (4, 16)})
    with pytest.raises(autoalign.PatternError, match="no operation reconciles these shapes"):
        autoalign.align(source, target, rules=[("a.weight", "fc.weight")])
    alignment = autoalign.align(source, target, rules=[("a.weight", "fc.weight")], adapt="head")
    (match,) = [match for match in alignment.matches if match.operation.adapts]
    assert match.evidence == {"rule": 1.0}
    assert match.confidence == 0.95


def test_a_threshold_holds_for_what_was_adapted_too() -> None:
    source, target = values({**BODY, "fc.weight": (9, 16)}), values({**BODY, "fc.weight": (4, 16)})
    alignment = autoalign.align(source, target, adapt="head", min_confidence=0.9)
    assert alignment.status["fc.weight"] == "ambiguous"
    (match,) = alignment.ambiguous
    assert torch.equal(alignment.tensor(match), source["fc.weight"][:4])


def test_values_to_keep_must_be_there() -> None:
    def network(classes: int) -> nn.Module:
        return nn.Sequential(*(nn.Linear(size, size + 1) for size in range(3, 9)), nn.Linear(9, classes))

    source = network(2).state_dict()
    with torch.device("meta"):
        larger, smaller = network(5), network(1)
    message = r"6.weight is on the meta device and has no values that 'take 2 rows, keep 3' could keep"
    with pytest.raises(autoalign.InputError, match=message):
        autoalign.load(larger, source, adapt="head", assign=True)
    assert all(parameter.is_meta for parameter in larger.parameters())
    autoalign.load(smaller, source, adapt="head", assign=True)
    assert torch.equal(smaller.state_dict()["6.weight"], source["6.weight"][:1])


def test_what_was_adapted_is_left_out_of_the_way_back() -> None:
    source, target = values({**BODY, "fc.kernel": (16, 4)}), values({**BODY, "fc.weight": (9, 16)})
    back = autoalign.align(source, target, adapt="head").inverse()
    assert back.missing_keys == ["fc.kernel"]
    assert back.notes == ("1 tensors were adapted and cannot be restored: fc.weight.",)


def test_one_storage_is_adapted_from_one_source() -> None:
    config = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1}
    source = transformers.GPT2Model(transformers.GPT2Config(**config, eos_token_id=1))
    larger = transformers.GPT2Config(**{**config, "vocab_size": 40, "n_positions": 24}, eos_token_id=1)
    target = transformers.GPT2LMHeadModel(larger)
    alignment = autoalign.load(target, source.state_dict(), strict=True, adapt=("vocab", "pos_embed"))
    assert adapted(alignment) == {
        "transformer.wte.weight": "take 32 rows, keep 8",
        "transformer.wpe.weight": "resize positions 16 -> 24 (linear)",
        "lm_head.weight": "take 32 rows, keep 8",
    }
    assert target.lm_head.weight is target.transformer.wte.weight
