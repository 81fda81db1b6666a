"""Code: pairs of networks whose keys do not decide, by keys alone, with the target's code, and with that of both sides.

One side of a pair is written by hand or of another library, or its layers have no names: those of ``Anonymous`` are
numbered at random, and those of ``Renamed`` have made-up names in another order. What is right is what ``verify``
proves of the pair under its own names, with all that it may try.
``python -m benchmarks.accuracy.code [--only inception]``; pairs of libraries that are not installed are left out.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

import autoalign
from autoalign.checkpoints.checkpoint import Side
from autoalign.verification.run import arguments_of, flat_tensors, preserved
from autoalign.verification.session import fresh_values
from benchmarks.cases.twins import (
    ActorCritic,
    Anonymous,
    Attention,
    Convolutional,
    Dense,
    Merging,
    PostNorm,
    Renamed,
    Stack,
    channels_first,
    turned,
    turned_columns,
    unfolded,
    unfolded_columns,
)
from tests.matching.test_operation_pairs import (
    FALCON,
    GLM,
    GPT_NEOX,
    IMAGES,
    LLAMA,
    MIXTRAL,
    NOISE,
    TOKENS,
    timm_vit,
)
from tests.pairs import hf, tm, tv
from tests.reference_models import encoders, llama, vision
from tests.reference_models.parts import CLASSES, DEPTH, HEAD_DIM, HEADS, KV_HEADS, WIDTH, rotate_halves, rotate_pairs

WAYS = "keys", "target", "both"
_SURE = 0.9
_PROJECTIONS = {
    "wq wk wv": "wo",
    "q_proj k_proj v_proj": "o_proj",
    "query key value": "dense",
    "to_q to_k to_v": "to_out",
    "c_q c_k c_v": "c_proj",
}
Builder = Callable[[], nn.Module]


@dataclass(frozen=True, slots=True)
class Pair:
    """A source and a target of the same network; what both are called with is guessed if no inputs are given."""

    name: str
    source: Builder
    target: Builder
    inputs: Any
    is_anonymous: bool = False  # whether the source's names are taken from it
    is_renamed: bool = False  # whether those of the target's modules are made up
    names: Mapping[str, str] | None = None  # how keys of the target begin -> those of the source, where that is known
    turns: Mapping[str, Callable[[Tensor], Tensor]] | None = None  # patterns of keys -> what is done to these tensors


def _images(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = nn.functional.interpolate(torch.randn(1, 3, 4, 4, generator=generator), size, mode="bicubic")
    return coarse + 0.5 * torch.randn(coarse.shape, generator=generator)


def _vectors(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _of(library: str, path: str, *arguments: Any, **options: Any) -> Builder:
    """Return what builds a network of a library that may not be installed."""

    def build() -> nn.Module:
        made: Any = import_module(library)
        for name in path.split("."):
            made = getattr(made, name)
        model: nn.Module = made(*arguments, **options)
        return model

    return build


DPT = hf(
    "DPT",
    "ForDepthEstimation",
    hidden_size=32,
    num_attention_heads=4,
    num_hidden_layers=4,
    intermediate_size=64,
    image_size=64,
    backbone_out_indices=[0, 1, 2, 3],
    neck_hidden_sizes=[8, 16, 32, 32],
    fusion_hidden_size=16,
    is_hybrid=False,
)
VAE = _of(
    "diffusers",
    "AutoencoderKL",
    block_out_channels=(32, 64),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
)
VIT = _of(
    "vit_pytorch",
    "ViT",
    image_size=32,
    patch_size=8,
    num_classes=CLASSES,
    dim=WIDTH,
    depth=DEPTH,
    heads=HEADS,
    mlp_dim=64,
    dim_head=HEAD_DIM,
)


OPEN_CLIP = _of(
    "open_clip.transformer",
    "VisionTransformer",
    image_size=32,
    patch_size=8,
    width=WIDTH,
    layers=DEPTH,
    heads=HEADS,
    mlp_ratio=2.0,
    output_dim=CLASSES,
)


def _x_transformer() -> nn.Module:
    layers = _of("x_transformers", "Decoder", dim=WIDTH, depth=DEPTH, heads=HEADS, ff_glu=True)()
    return _of("x_transformers", "TransformerWrapper", num_tokens=97, max_seq_len=64, attn_layers=layers)()


def _cv(name: str) -> Builder:
    return _of("pytorchcv.model_provider", "get_model", name)


def pairs() -> Iterator[Pair]:
    """Yield all pairs."""
    inception = tv("inception_v3", init_weights=False, transform_input=False)
    mobilenet = tv("mobilenet_v3_small"), tm("mobilenetv3_small_100", bn_eps=1e-3)
    across = (
        ("torchvision.inception_v3 -> timm", inception, tm("inception_v3"), 128),
        ("timm.inception_v4 -> pytorchcv", tm("inception_v4"), _cv("inceptionv4"), 299),
        ("torchvision.shufflenet_v2 -> itself", tv("shufflenet_v2_x1_0"), tv("shufflenet_v2_x1_0"), 64),
        ("torchvision.densenet121 -> timm", tv("densenet121"), tm("densenet121"), 64),
        ("torchvision.resnet50 -> transformers", tv("resnet50"), hf("ResNet"), 64),
        ("torchvision.mobilenet_v3_small -> timm", *mobilenet, 64),
        ("torchvision.efficientnet_b0 -> timm", tv("efficientnet_b0"), tm("efficientnet_b0"), 64),
        ("torchvision.regnet_y_400mf -> timm", tv("regnet_y_400mf"), tm("regnety_004"), 64),
        ("torchvision.convnext_tiny -> timm", tv("convnext_tiny"), tm("convnext_tiny"), 64),
        ("torchvision.squeezenet1_1 -> pytorchcv", tv("squeezenet1_1"), _cv("squeezenet_v1_1"), 224),
        ("timm.swin_tiny -> torchvision", tm("swin_tiny_patch4_window7_224"), tv("swin_t"), 224),
        ("timm.focalnet_tiny_srf -> transformers", tm("focalnet_tiny_srf"), hf("FocalNet"), 64),
        ("timm.mobilevitv2_050 -> transformers", tm("mobilevitv2_050"), hf("MobileViTV2", width_multiplier=0.5), 64),
        ("timm.dla34 -> pytorchcv", tm("dla34"), _cv("dla34"), 224),
        ("timm.selecsls42 -> pytorchcv", tm("selecsls42"), _cv("selecsls42"), 224),
        ("transformers.DPT -> itself", DPT, DPT, 64),
        ("diffusers.AutoencoderKL -> itself", VAE, VAE, 32),
        ("vit_pytorch.ViT -> itself", VIT, VIT, 32),
        ("open_clip.VisionTransformer -> itself", OPEN_CLIP, OPEN_CLIP, 32),
        ("timm.levit_128s -> itself", tm("levit_128s"), tm("levit_128s"), 224),
    )
    for name, source, target, size in across:
        yield Pair(name, source, target, _images(size), is_anonymous=True)
    yield Pair("x_transformers, gated -> itself", _x_transformer, _x_transformer, TOKENS, is_anonymous=True)
    for names, out in _PROJECTIONS.items():
        for layout, rotate in (("neighbours", rotate_pairs), ("halves", rotate_halves)):
            own = partial(llama.OwnLlama, f"{names} {out}", rotate)
            yield Pair(f"Llama with {names}, {layout} -> transformers", own, LLAMA, TOKENS)
    neox = partial(llama.ParallelDecoder, HEADS, HEAD_DIM // 4, bias=True)
    falcon = partial(llama.ParallelDecoder, KV_HEADS, HEAD_DIM, bias=False)
    yield Pair("GPT-NeoX with separate projections -> transformers", neox, GPT_NEOX, TOKENS)
    yield Pair("transformers.Falcon -> separate projections", FALCON, falcon, TOKENS)
    yield Pair("litgpt, groups of heads -> transformers.Llama", partial(llama.LitLlama, "attn"), LLAMA, TOKENS)
    yield Pair("ChatGLM2 -> transformers.Glm", llama.ChatGLM, GLM, TOKENS)
    yield Pair("Mistral's Mixtral -> transformers", llama.MistralMixtral, MIXTRAL, TOKENS)
    last, first, apart = (partial(encoders.GatedEncoder, layout) for layout in ("net", "w12", "separate"))
    yield Pair("gated, the gate last -> gate first", last, first, TOKENS)
    yield Pair("gated, the gate first -> gate last", first, last, TOKENS)
    yield Pair("gated, the gate last -> separate", last, apart, TOKENS)
    yield Pair("vit-pytorch, channels last -> timm", vision.PatchViT, timm_vit(DEPTH, qkv_bias=False), IMAGES)
    encoder = encoders.TorchEncoder, encoders.SeparateEncoder
    yield Pair("post-norm torch.nn.TransformerEncoder -> separate", *encoder, TOKENS, is_anonymous=True)
    yield Pair("DiT -> diffusers' layout", vision.DiT, vision.DiffusersDiT, NOISE, is_anonymous=True)
    plain = partial(encoders.GatedEncoder, "separate")
    renamed = (
        ("transformers.Llama", LLAMA, TOKENS),
        ("transformers.Mixtral", MIXTRAL, TOKENS),
        ("transformers.Bert", hf("Bert", "ForSequenceClassification", num_hidden_layers=3), TOKENS),
        ("transformers.DPT", DPT, _images(64)),
        ("diffusers.AutoencoderKL", VAE, _images(32)),
        ("timm.VisionTransformer", timm_vit(DEPTH, qkv_bias=True), IMAGES),
        ("timm.levit_128s", tm("levit_128s"), _images(224)),
        ("torchvision.resnet50", tv("resnet50"), _images(64)),
        ("torchvision.inception_v3", inception, _images(128)),
        ("gated blocks", plain, TOKENS),
        ("post-norm blocks", encoders.SeparateEncoder, TOKENS),
    )
    for name, build, inputs in renamed:
        yield Pair(f"{name} -> itself with made-up names", build, build, inputs, is_renamed=True)
    yield Pair(
        "post-norm blocks -> registered backwards",
        partial(PostNorm, "a b c d e", registered_as_used=True),
        partial(PostNorm, "v w x y z", registered_as_used=False),
        _vectors(2, 5, WIDTH),
    )
    yield Pair(
        "actor and critic -> critic first",
        partial(ActorCritic, "a", "b", is_actor_first=True),
        partial(ActorCritic, "x", "y", is_actor_first=False),
        _vectors(3, 8),
        names={"x": "a", "y": "b"},
    )
    yield Pair(
        "a chain -> registered backwards",
        partial(Stack, "a b c d", "a b c d"),
        partial(Stack, "w x y z", "z y x w"),
        _vectors(4, WIDTH),
    )
    yield Pair(
        "attention -> other names in another order",
        partial(Attention, "a b c d", "a b c d"),
        partial(Attention, "w x y z", "y z x w"),
        _vectors(2, 5, WIDTH),
    )
    yield Pair(
        "dense blocks, the newest last -> newest first",
        partial(Dense, "units", newest_first=False),
        partial(Dense, "layers", newest_first=True),
        _images(16),
        names={"layers.": "units."},
        turns={r"\.0\.\w+$": turned, r"\.2\.weight|head.weight": turned_columns},
    )
    yield Pair(
        "flattened, channels last -> channels first",
        partial(Convolutional, "c1 c2 f1 f2", channels_last=True),
        partial(Convolutional, "conv_a conv_b fc out", channels_last=False),
        _images(32),
        names={"conv_a": "c1", "conv_b": "c2", "fc": "f1", "out": "f2"},
        turns={r"fc\.weight": channels_first},
    )
    yield Pair(
        "patches merged by fours -> by unfolding",
        partial(Merging, "proj norm reduction head", unfolds=False),
        partial(Merging, "patches norm reduce out", unfolds=True),
        _images(32),
        names={"patches": "proj", "reduce": "reduction", "out": "head"},
        turns={r"norm\.": unfolded, r"reduce\.": unfolded_columns},
    )


@dataclass(slots=True)
class Tally:
    """What came of the pairs in one way."""

    equal: int = 0  # pairs of which all is right, and so the outputs equal
    right: int = 0  # tensors
    wrong: int = 0
    sure: int = 0  # wrong ones at a confidence of 0.9 and more
    seconds: float = 0.0


def truth_of(pair: Pair, source: nn.Module, target: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the target that are right, as is proved by equal outputs.

    Raises:
        UnequalModelsError: Nothing that can be tried makes them equal.
    """
    if pair.names is None:
        alignment = autoalign.align(source, target, source_model=source, example_inputs=pair.inputs)
        if not computes_alike(source, target, alignment.state_dict(), pair):
            found = autoalign.verify(source, target, pair.inputs, alignment=alignment)
            if found.max_difference > found.tolerance:
                raise autoalign.UnequalModelsError(str(found), found)
            alignment = found.alignment
        return {match.target: alignment.tensor(match).clone() for match in alignment.matches}
    truth = dict(target.state_dict())
    for key in truth:
        begin = next(filter(key.startswith, pair.names), "")
        truth[key] = source.state_dict()[pair.names.get(begin, "") + key[len(begin) :]]
        for pattern, turn in (pair.turns or {}).items():
            truth[key] = turn(truth[key]) if truth[key].dim() and re.search(pattern, key) else truth[key]
    assert computes_alike(source, target, truth, pair), "not equal"
    return truth


def computes_alike(source: nn.Module, target: nn.Module, tensors: Mapping[str, Tensor], pair: Pair) -> bool:
    """Return True if the outputs are equal, whatever becomes of tensors that the call does not use."""
    loaded = deepcopy(target)
    loaded.load_state_dict({**loaded.state_dict(), **tensors})
    arguments, options = arguments_of(pair.inputs)
    with torch.no_grad():
        results = [[*flat_tensors(model(*arguments, **options)).values()] for model in (source, loaded)]
    alike = [(own, other) for own, other in zip(*results, strict=False) if own.shape == other.shape]
    return bool(alike) and all(torch.allclose(*each, atol=1e-4 * float(each[0].abs().max())) for each in alike)


def measured(pair: Pair, tallies: Mapping[str, Tally]) -> str:
    """Align a pair in all ways, count, and return what is to be said of it."""
    torch.manual_seed(0)
    original, target = pair.source().eval(), pair.target().eval()
    with preserved(original):
        values = fresh_values(original, pair.inputs, original.state_dict().keys())
    assert values is not None, "no values carry a signal"
    original.load_state_dict({**original.state_dict(), **values})
    truth = truth_of(pair, original, pair.target().eval())
    source = Anonymous(original) if pair.is_anonymous else original
    if pair.is_renamed:
        target = Renamed(target)
        truth = {key: truth[own] for key, own in target.keys.items() if own in truth}
    code: dict[str, Any] = {"example_inputs": pair.inputs}
    ways: dict[str, tuple[Side, dict[str, Any]]] = {
        "keys": (target.state_dict(), {}),
        "target": (target, code),
        "both": (target, code | {"source_model": source}),
    }
    said = []
    for way, (side, options) in ways.items():
        tally, start = tallies[way], time.perf_counter()
        found = autoalign.align(source.state_dict(), side, **options)
        tally.seconds += time.perf_counter() - start
        wrong = [m for m in found.matches if m.target in truth and not torch.equal(found.tensor(m), truth[m.target])]
        right = len(found.matches) - len(wrong)
        sure = sum(match.confidence >= _SURE for match in wrong)
        tally.equal += right == len(truth) or (not wrong and computes_alike(original, target, found.state_dict(), pair))
        tally.right, tally.wrong, tally.sure = tally.right + right, tally.wrong + len(wrong), tally.sure + sure
        said.append(f"{way}: {right} of {len(truth)}, {len(wrong)} wrong, {sure} at {_SURE}")
    return "; ".join(said)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return 1 if any tensor is wrong with code, or by keys at a confidence of 0.9."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.code", description=__doc__)
    parser.add_argument("--only", default="", help="a regex of the names of pairs")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    groups = {is_renamed: {way: Tally() for way in WAYS} for is_renamed in (False, True)}
    counts = dict.fromkeys(groups, 0)
    for pair in pairs():
        if not re.search(options.only, pair.name):
            continue
        try:
            said = measured(pair, groups[pair.is_renamed])
        except ImportError as error:
            said = f"left out: {error}"
        except (AssertionError, autoalign.UnequalModelsError, autoalign.InputError) as error:
            said = f"left out, without a proof: {str(error)[:900]}"
        counts[pair.is_renamed] += not said.startswith("left out")
        print(f"  {pair.name}: {said}", flush=True)
    for is_renamed, tallies in groups.items():
        if not counts[is_renamed]:
            continue
        print("\nTargets with made-up names:" if is_renamed else "\nPairs of codes:")
        print("| by | equal | right | wrong | at 0.9 | seconds each |\n| --- | ---: | ---: | ---: | ---: | ---: |")
        for way, tally in tallies.items():
            each, count = tally.seconds / max(counts[is_renamed], 1), counts[is_renamed]
            print(f"| {way} | {tally.equal} of {count} | {tally.right} | {tally.wrong} | {tally.sure} | {each:.1f} |")
    return int(any(of["both"].wrong + of["target"].wrong + of["keys"].sure for of in groups.values()))


if __name__ == "__main__":
    sys.exit(main())
