"""Each tensor operation on real pairs: two implementations of one network, which must compute the same after a load.

One side of a pair is a library's own model or has a published implementation's names and layout (``reference_models``);
the truth is what the networks compute from random weights. Where no name or shape shows a layout (how heads are
interleaved, which rows a rotation pairs, which half is the gate) nothing may be loaded on a guess, and the layout
that computes the same must be among the proposals.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

import autoalign
from autoalign.alignment import Alignment
from autoalign.errors import PartialLoadWarning
from autoalign.plan.matches import Match
from autoalign.plan.operations import Operation
from tests.pairs import relative_difference
from tests.reference_models import (
    encoders,
    flax_models,
    gpt,
    keras_models,
    kernels,
    llama,
    openai_clip,
    recurrent,
    vision,
)
from tests.reference_models.flax_models import FLAX_DEPTH
from tests.reference_models.openai_clip import SHARED_WIDTH, TEXT_HEADS, TEXT_WIDTH
from tests.reference_models.parts import (
    CLASSES,
    CONTEXT,
    DEPTH,
    EXPERTS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    IMAGE,
    KV_HEADS,
    PATCH,
    VOCABULARY,
    WIDTH,
)

TOLERANCE = 1e-4  # of the largest output; a misplaced tensor changes them by far more
FAILURES = (AssertionError, PartialLoadWarning, pytest.fail.Exception)  # of the library, and not of a test
NONE = "(?!)"  # a regex that matches nothing

Builder = Callable[[], nn.Module]
Inputs = tuple[Tensor, ...]


def _tokens(length: int) -> Tensor:
    return torch.randint(3, VOCABULARY - 1, (2, length), generator=torch.Generator().manual_seed(0))


TOKENS: Inputs = (_tokens(9),)
IMAGES: Inputs = (torch.randn(2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(0)),)
CAPTIONS: Inputs = (_tokens(CONTEXT).index_fill(1, torch.tensor([CONTEXT - 5]), VOCABULARY - 1), *IMAGES)
NOISE: Inputs = (*IMAGES, torch.tensor([3.0, 40.0]))


@dataclass(frozen=True, slots=True)
class Pair:
    """A source and a target implementation of one network."""

    name: str
    source: Builder
    target: Builder
    inputs: Inputs
    operations: Mapping[str, str] = field(default_factory=dict)  # regex of target keys -> operations that they need
    publish: Callable[[nn.Module], Mapping[str, Any]] = nn.Module.state_dict  # the source as its authors store it
    absent: str = NONE  # a regex of the target's keys that the source has nothing for
    unused: str = NONE  # a regex of the source's keys that the target has no use for
    doubted: str = NONE  # a regex of the target's keys whose layout nothing shows
    fails: str = ""  # what is missing today


def both(forward: Pair, operations: Mapping[str, str], **changes: Any) -> tuple[Pair, Pair]:
    """Make a pair and its reverse, which needs other operations; ``forward.name`` reads ``first -> second``."""
    first, second = forward.name.split(" -> ")
    back = replace(
        forward,
        name=f"{second} -> {first}",
        source=forward.target,
        target=forward.source,
        operations=operations,
        absent=forward.unused,
        unused=forward.absent,
    )
    return forward, replace(back, **changes)


def both_in_doubt(
    name: str,
    source: Builder,
    target: Builder,
    inputs: Inputs,
    operations: Mapping[str, str],
    back: Mapping[str, str],
) -> tuple[Pair, Pair]:
    """Make a pair and its reverse, in each of which the keys of the first operation are in doubt."""
    pair = Pair(name, source, target, inputs, operations, doubted=next(iter(operations)))
    return both(pair, back, doubted=next(iter(back)))


def randomise(model: nn.Module, inputs: Inputs, seed: int) -> nn.Module:
    """Give every parameter values of its own and every batch norm the statistics of the inputs, in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.squeeze().dim() < 2:  # a gain, or else a bias, told by the value that its library gave it
            is_gain = bool((parameter > 0).all())
            parameter.data = 1 + 0.2 * values.clamp(-3, 3) if is_gain else 0.2 * values
        else:
            parameter.data = 1.4 * values / parameter.numel() ** 0.25
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | kernels.KernelBatchNorm):
            module.train()
            module.momentum = 1.0
    output(model, inputs)
    return model.eval()


def output(model: nn.Module, inputs: Inputs) -> Tensor:
    """All that a network computes, as one tensor."""
    with torch.inference_mode():
        result = model(*inputs)
    if isinstance(result, Tensor):
        return result
    names = ("logits",), ("last_hidden_state", "pooler_output"), ("text_embeds", "image_embeds", "logits_per_text")
    (found,) = (of for of in names if of[0] in result)
    return torch.cat([result[name].flatten() for name in found]) if len(found) > 1 else result[found[0]]


def kinds(operation: Operation) -> set[str]:
    """List the kinds of an operation and of all that it is made of."""
    found = {type(operation).__name__}
    for value in (getattr(operation, part.name) for part in fields(operation)):
        for inner in value if isinstance(value, tuple) else (value,):
            found |= kinds(inner) if isinstance(inner, Operation) else set()
    return found


def _assert_operations(pair: Pair, matches: Sequence[Match]) -> None:
    for pattern, wanted in pair.operations.items():
        found = {match.target: kinds(match.operation) for match in matches if re.search(pattern, match.target)}
        assert found, pattern
        assert all(set(wanted.split()) <= of for of in found.values()), {pattern: found}


def case(pair: Pair, *values: object, fails: str = "", name: str = "") -> Any:
    """Make a test's parameters of a pair, which is expected to fail for the reason that is given."""
    reason = fails or pair.fails
    marks = [pytest.mark.xfail(reason=reason, raises=FAILURES, strict=True)] if reason else []
    return pytest.param(pair, *values, id=pair.name + name, marks=marks)


def hf(kind: str, head: str = "ForCausalLM", **options: Any) -> Builder:
    """A small transformers model, from its configuration."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }

    def build() -> nn.Module:
        model: nn.Module = getattr(transformers, f"{kind}{head}")(
            getattr(transformers, f"{kind}Config")(**common | options)
        )
        return model

    return build


GROUPED: dict[str, Any] = {"num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-6}
BASE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA = hf("Llama", **GROUPED)
MIXTRAL = hf("Mixtral", **GROUPED, num_local_experts=EXPERTS, rope_parameters=BASE)
PHI3 = hf("Phi3", **GROUPED)
GPT2 = hf(
    "GPT2",
    "LMHeadModel",
    n_embd=WIDTH,
    n_inner=None,
    n_layer=DEPTH,
    n_head=HEADS,
    n_positions=CONTEXT,
    activation_function="gelu",
    tie_word_embeddings=True,
)
GPT_NEOX = hf("GPTNeoX", max_position_embeddings=CONTEXT)
FALCON = hf("Falcon", num_kv_heads=KV_HEADS, new_decoder_architecture=True, ffn_hidden_size=HIDDEN, bias=False)
GLM = hf("Glm", **GROUPED, head_dim=HEAD_DIM)
BERT = hf("Bert", "Model", max_position_embeddings=CONTEXT)


def hf_clip() -> nn.Module:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": TEXT_HEADS,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": 2,  # which stands for the largest token, as in the published configurations
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "image_size": IMAGE,
        "patch_size": PATCH,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=SHARED_WIDTH)
    model: nn.Module = transformers.CLIPModel(config)
    return model


def timm_vit(depth: int, **options: Any) -> Builder:
    sizes = {"img_size": IMAGE, "patch_size": PATCH, "embed_dim": WIDTH, "num_heads": HEADS, "num_classes": CLASSES}
    return partial(timm.models.VisionTransformer, **sizes, depth=depth, mlp_ratio=HIDDEN / WIDTH, **options)


def timm_beit() -> nn.Module:
    sizes = {"img_size": IMAGE, "patch_size": PATCH, "embed_dim": WIDTH, "num_heads": HEADS, "num_classes": CLASSES}
    model: nn.Module = timm.models.Beit(**sizes, depth=DEPTH, mlp_ratio=HIDDEN / WIDTH)
    return model


def torchvision_swin() -> nn.Module:
    model: nn.Module = torchvision.models.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        stochastic_depth_prob=0.0,
        num_classes=CLASSES,
        block=torchvision.models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=torchvision.models.swin_transformer.PatchMergingV2,
    )
    return model


def timm_swin() -> nn.Module:
    model: nn.Module = timm.models.SwinTransformerV2(
        img_size=IMAGE,
        patch_size=4,
        embed_dim=24,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=4,
        drop_path_rate=0.0,
        num_classes=CLASSES,
    )
    return model


def torchvision_resnet() -> nn.Module:
    blocks = [count for _, count in flax_models.RESNET_STAGES]
    model: nn.Module = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, blocks, num_classes=CLASSES)
    return model


def torchvision_mobilenet() -> nn.Module:
    stages = [[t, width, count, stride] for t, width, count, stride in keras_models.MOBILE_STAGES]
    model: nn.Module = torchvision.models.MobileNetV2(num_classes=CLASSES, inverted_residual_setting=stages)
    return model


ROTARY = {r"self_attn\.[qk]_proj\.weight": "Reshape Permute"}
OWN_ROTARY = {r"\.w[qk]\.weight|attn\.[qk]_proj\.weight": "Reshape Permute"}

PAIRS = (
    *both(
        Pair(
            "nn.TransformerEncoder -> separate projections",
            encoders.TorchEncoder,
            encoders.SeparateEncoder,
            TOKENS,
            {r"\.[qkv]_proj\.": "Split"},
        ),
        {r"\.in_proj_": "Concatenate"},
    ),
    *both(
        Pair("transformers.GPT2 -> nanoGPT", GPT2, gpt.NanoGPT, TOKENS, {r"\.c_.*weight": "Transpose"}),
        {r"\.c_.*weight": "Transpose"},
    ),
    *both(
        Pair(
            "transformers.GPT2 -> GPT with separate projections",
            GPT2,
            gpt.SeparateGPT,
            TOKENS,
            {
                r"\.(query|key|value)\.weight": "Split Transpose",
                r"\.(query|key|value)\.bias": "Split",
                r"\.(out|up|down)\.weight": "Transpose",
            },
        ),
        {
            r"c_attn\.weight": "Transpose Concatenate",
            r"c_attn\.bias": "Concatenate",
            r"c_(proj|fc)\.weight": "Transpose",
        },
    ),
    *both(
        Pair(
            "transformers 4 Mixtral -> transformers 5 Mixtral",
            llama.Mixtral4,
            MIXTRAL,
            TOKENS,
            {r"\.gate_up_proj": "Concatenate Stack", r"\.down_proj": "Stack"},
        ),
        {r"\.experts\..*\.w[13]\.": "Unstack Split", r"\.experts\..*\.w2\.": "Unstack"},
    ),
    *both(
        Pair(
            "transformers.Phi3 -> transformers.Llama",
            PHI3,
            LLAMA,
            TOKENS,
            {r"\.([qkv]|gate|up)_proj\.": "Split"},
        ),
        {r"\.(qkv|gate_up)_proj\.": "Concatenate"},
    ),
    *both(
        Pair(
            "gated, fused as w12 -> gated, separate",
            partial(encoders.GatedEncoder, "w12"),
            partial(encoders.GatedEncoder, "separate"),
            TOKENS,
            {r"\.(gate|up)_proj\.": "Split"},
        ),
        {r"\.w12\.": "Concatenate"},
    ),
    *both(
        Pair(
            "OpenAI CLIP -> transformers.CLIP",
            openai_clip.OpenAIClip,
            hf_clip,
            CAPTIONS,
            {r"\.[qkv]_proj\.": "Split", r"^(visual|text)_projection": "Transpose"},
        ),
        {r"\.in_proj_": "Concatenate", r"(visual\.proj|^text_projection)$": "Transpose"},
    ),
    Pair(
        "Flax ViT -> timm.VisionTransformer",
        flax_models.FlaxViT,
        timm_vit(FLAX_DEPTH),
        IMAGES,
        {r"qkv\.weight": "Concatenate", r"patch_embed\.proj\.weight": "Permute", r"fc[12]\.weight": "Transpose"},
        publish=kernels.flat_arrays,
    ),
    Pair(
        "Flax ResNet -> torchvision.ResNet",
        flax_models.FlaxResNet,
        torchvision_resnet,
        IMAGES,
        {r"conv\d\.weight": "Permute", r"fc\.weight": "Transpose"},
        publish=kernels.flax_collections,
    ),
    Pair(
        "Keras MobileNetV2 -> torchvision.MobileNetV2",
        keras_models.KerasMobileNet,
        torchvision_mobilenet,
        IMAGES,
        {r"(features\.0|conv\.0)\.0\.weight": "Permute", r"classifier\.1\.weight": "Transpose"},
        publish=partial(kernels.flat_arrays, suffix=":0", ordered=False),
    ),
    Pair(
        "TensorFlow BERT -> transformers.Bert",
        keras_models.TensorFlowBert,
        BERT,
        TOKENS,
        {r"(query|key|value|dense)\.weight": "Transpose"},
        publish=kernels.flat_arrays,
    ),
    *both(
        Pair(
            "LSTM, a matrix for each gate -> nn.LSTM",
            partial(recurrent.GateTagger, "ifgo"),
            partial(recurrent.TorchTagger, nn.LSTM),
            TOKENS,
            {r"rnn\.": "Concatenate"},
        ),
        {r"cells\.": "Split"},
    ),
    *both(
        Pair(
            "GRU, a matrix for each gate -> nn.GRU",
            partial(recurrent.GateTagger, "rzn"),
            partial(recurrent.TorchTagger, nn.GRU),
            TOKENS,
            {r"rnn\.": "Concatenate"},
        ),
        {r"cells\.": "Split"},
    ),
    Pair(
        "Keras LSTM -> nn.LSTM",
        partial(recurrent.KerasTagger, "lstm"),
        partial(recurrent.TorchTagger, nn.LSTM, 1, silent="bias_hh_l0"),
        TOKENS,
        {r"rnn\.weight": "Transpose"},
        publish=partial(kernels.flat_arrays, suffix=":0"),
        absent=r"rnn\.bias_hh_l0",
    ),
    *both(
        Pair(
            "timm.Beit -> timm.VisionTransformer",
            timm_beit,
            timm_vit(DEPTH, global_pool="avg"),
            IMAGES,
            {r"qkv\.bias": "Concatenate"},
        ),
        {r"[qv]_bias": "Split"},
    ),
    Pair(
        "timm.SwinTransformerV2 -> torchvision.SwinTransformer",
        timm_swin,
        torchvision_swin,
        IMAGES,
        {r"qkv\.bias": "Concatenate"},
        absent=r"relative_(position_index|coords_table)$",
    ),
    *both(
        Pair(
            "DiT -> DiT in diffusers' layout",
            vision.DiT,
            vision.DiffusersDiT,
            NOISE,
            {r"norm_out\.linear\.": "Flip", r"to_[qkv]\.": "Split"},
        ),
        {r"final_layer\.adaLN_modulation\.1\.": "Flip", r"attn\.qkv\.": "Concatenate"},
    ),
)


@pytest.mark.parametrize("pair", [case(pair) for pair in PAIRS])
def test_both_compute_the_same_after_a_load(pair: Pair) -> None:
    source = randomise(pair.source(), pair.inputs, seed=1)
    target = pair.target().eval()
    checkpoint = pair.publish(source)
    absent = [key for key in target.state_dict() if re.search(pair.absent, key)]
    assert relative_difference(output(target, pair.inputs), output(source, pair.inputs)) > 100 * TOLERANCE
    with pytest.warns(PartialLoadWarning, match=re.escape(absent[0])) if absent else nullcontext():
        alignment = autoalign.load(target, checkpoint)
    assert alignment.missing_keys == absent
    assert [key for key in alignment.unexpected_keys if not re.search(pair.unused, key)] == []
    _assert_operations(pair, alignment.matches)
    assert relative_difference(output(target, pair.inputs), output(source, pair.inputs)) < TOLERANCE


DOUBTED_PAIRS = (
    *both(
        Pair(
            "transformers.Llama -> litgpt (blocks)",
            LLAMA,
            llama.LitLlama,
            TOKENS,
            {r"\.attn\.qkv\.": "Concatenate"},
            doubted=r"\.attn\.qkv\.",
        ),
        {r"\.[qkv]_proj\.": "Split"},
        doubted=r"\.[qk]_proj\.",
    ),
    *both(
        Pair(
            "Meta Llama -> transformers.Llama",
            llama.MetaLlama,
            LLAMA,
            TOKENS,
            ROTARY,
            unused=r"^rope\.freqs$",
            doubted=r"\.[qk]_proj\.",
        ),
        OWN_ROTARY,
        doubted=r"\.w[qk]\.",
    ),
    *both(
        Pair(
            "Meta Llama without frequencies -> transformers.Llama",
            partial(llama.MetaLlama, frequencies=False),
            LLAMA,
            TOKENS,
            ROTARY,
            doubted=r"\.[qk]_proj\.",
        ),
        OWN_ROTARY,
        doubted=r"\.w[qk]\.",
    ),
    *both(
        Pair(
            "torchtune Llama -> transformers.Llama",
            llama.TorchtuneLlama,
            LLAMA,
            TOKENS,
            ROTARY,
            doubted=r"\.[qk]_proj\.",
        ),
        OWN_ROTARY,
    ),
    *both(
        Pair(
            "Mistral's Mixtral -> transformers 5 Mixtral",
            llama.MistralMixtral,
            MIXTRAL,
            TOKENS,
            {r"\.gate_up_proj": "Concatenate Stack", **ROTARY},
            doubted=r"\.[qk]_proj\.",
        ),
        {r"\.experts\..*\.w[13]\.": "Unstack Split", **OWN_ROTARY},
        doubted=r"\.w[qk]\.",
    ),
    *both_in_doubt(
        "litgpt (groups of heads) -> transformers.Llama",
        partial(llama.LitLlama, "attn"),
        LLAMA,
        TOKENS,
        {r"\.[qkv]_proj\.": "Reshape"},
        {r"\.attn\.attn\.": "Reshape Concatenate"},
    ),
    *both_in_doubt(
        "InternLM2 -> transformers.Llama",
        llama.InternLM,
        LLAMA,
        TOKENS,
        {r"\.[qkv]_proj\.": "Reshape"},
        {r"\.wqkv\.": "Reshape Concatenate"},
    ),
    *both_in_doubt(
        "transformers.GPTNeoX -> separate projections",
        GPT_NEOX,
        partial(llama.ParallelDecoder, HEADS, HEAD_DIM // 4, bias=True),
        TOKENS,
        {r"\.[qkv]_proj\.": "Reshape"},
        {r"query_key_value\.": "Reshape Concatenate"},
    ),
    *both_in_doubt(
        "transformers.Falcon -> separate projections",
        FALCON,
        partial(llama.ParallelDecoder, KV_HEADS, HEAD_DIM, bias=False),
        TOKENS,
        {r"\.[qkv]_proj\.": "Reshape"},
        {r"query_key_value\.": "Reshape Concatenate"},
    ),
    *both_in_doubt(
        "ChatGLM2 -> transformers.Glm",
        llama.ChatGLM,
        GLM,
        TOKENS,
        {r"\.[qkv]_proj\.": "Split"},
        {r"query_key_value\.": "Concatenate"},
    ),
    *both_in_doubt(
        "gated, fused with the gate last -> gated, separate",
        partial(encoders.GatedEncoder, "net"),
        partial(encoders.GatedEncoder, "separate"),
        TOKENS,
        {r"\.(gate|up)_proj\.": "Split"},
        {r"\.net\.0\.proj\.": "Concatenate"},
    ),
    *both(
        Pair(
            "patches, channels first, through a linear layer -> timm.VisionTransformer",
            partial(vision.PatchViT, channels_first=True),
            timm_vit(DEPTH, qkv_bias=False),
            IMAGES,
            {r"patch_embed\.proj\.weight": "Reshape"},
        ),
        {r"to_patch_embedding\.1\.weight": "Reshape"},
    ),
    *both_in_doubt(
        "vit-pytorch, patches with channels last -> timm.VisionTransformer",
        vision.PatchViT,
        timm_vit(DEPTH, qkv_bias=False),
        IMAGES,
        {r"patch_embed\.proj\.weight": "Reshape Permute"},
        {r"to_patch_embedding\.1\.weight": "Permute Reshape"},
    ),
    Pair(
        "Keras GRU -> nn.GRU",
        partial(recurrent.KerasTagger, "gru"),
        partial(recurrent.TorchTagger, nn.GRU, 1),
        TOKENS,
        {r"rnn\.weight": "Transpose Concatenate", r"rnn\.bias": "Unstack Concatenate"},
        publish=partial(kernels.flat_arrays, suffix=":0"),
    ),
)


def _proposals(match: Match) -> list[Match]:
    """A match and what it would be by each of its alternatives."""
    others = [replace(match, sources=other.sources, operation=other.operation) for other in match.alternatives]
    return [match, *others]


def _choices(alignment: Alignment) -> Iterator[list[Match]]:
    """List the ways to settle what is ambiguous: layers that differ in their numbers, and biases, go together."""
    layers: dict[tuple[str, int], list[list[Match]]] = {}
    for match in alignment.ambiguous:
        ways = _proposals(match)
        name = re.sub(r"\d+", "#", match.target)
        layers.setdefault((re.sub(r"[._](weight|bias)\b", "", name), len(ways)), []).append(ways)
    for picks in product(*(range(count) for _, count in layers)):
        yield [ways[pick] for pick, group in zip(picks, layers.values(), strict=True) for ways in group]


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        *(case(pair, False, name=", state dicts") for pair in DOUBTED_PAIRS),
        *(case(pair, True, name=", modules") for pair in DOUBTED_PAIRS),
    ],
)
def test_a_layout_that_nothing_shows_is_among_the_proposals(pair: Pair, told: bool) -> None:
    source = randomise(pair.source(), pair.inputs, seed=1)
    target = pair.target().eval()
    sides = (source if pair.publish is nn.Module.state_dict else pair.publish(source), target)
    alignment = autoalign.align(*sides) if told else autoalign.align(pair.publish(source), target.state_dict())
    ambiguous = {match.target for match in alignment.ambiguous}
    absent = {key for key in target.state_dict() if re.search(pair.absent, key)}
    assert set(alignment.missing_keys) == absent | ambiguous
    if not told:  # a module's own settings may tell more
        assert {key for key in target.state_dict() if re.search(pair.doubted, key)} <= ambiguous
    wanted = output(source, pair.inputs)
    assert relative_difference(output(target, pair.inputs), wanted) > 100 * TOLERANCE
    sure = {key: target.state_dict()[key].clone() for key in absent} | alignment.state_dict()
    for chosen in _choices(alignment):
        tensors = {match.target: alignment.tensor(match) for match in chosen}
        if all(tensor.shape == target.get_parameter(key).shape for key, tensor in tensors.items()):
            target.load_state_dict(sure | tensors)
            if relative_difference(output(target, pair.inputs), wanted) < TOLERANCE:
                break
    else:
        pytest.fail(f"none of the proposals computes the same: {alignment}")
    used = {key for match in (*alignment.matches, *chosen) for key in match.sources}
    assert [key for key in alignment.tensors if key not in used and not re.search(pair.unused, key)] == []
    _assert_operations(pair, [*alignment.matches, *chosen])
