"""Hypothesis strategies that make a source, a target and the true mapping between them together.

Two kinds of input: networks that are generated and then written down in two naming styles, and real architectures
whose state dict is perturbed on one side. A perturbation is used only where the truth stays decidable: what the names
no longer tell, the order still does, and the other way around.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import timm
import torch
import torchvision
from hypothesis import strategies as st
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]  # shape by key, in a state dict's order


@dataclass(frozen=True, slots=True, repr=False)
class Case:
    """A source, a target, and which source key belongs to each target key that has one."""

    source: Mapping[str, tuple[int, ...]]
    target: Mapping[str, tuple[int, ...]]
    truth: Mapping[str, str]  # target key -> source key

    def __repr__(self) -> str:  # thousands of keys would say nothing
        return f"Case({len(self.source)} -> {len(self.target)} tensors, {next(iter(self.source), None)}, ...)"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(repr(self))

    def flipped(self) -> Case:
        return Case(self.target, self.source, {source: target for target, source in self.truth.items()})


def tensors(shapes: Shapes) -> dict[str, Tensor]:
    """A state dict of these shapes, on the meta device."""
    return {
        key: torch.empty(shape, dtype=torch.int64 if key.endswith(COUNTER) else torch.float32, device="meta")
        for key, shape in shapes.items()
    }


COUNTER = "num_batches_tracked"


@dataclass(frozen=True, slots=True)
class Style:
    """How a library names and orders the parts of one kind of network; a role that it lacks is never asked for."""

    stem: Mapping[str, str]
    block: str  # with {stage} and {index}; flat lists leave {stage} out and count on
    parts: Mapping[str, str]  # role -> name within a block, in registration order
    head: Mapping[str, str]


TRANSFORMER_STYLES = (
    Style(  # timm, with the projections of attention apart
        {"patch": "patch_embed.proj"},
        "blocks.{index}",
        {"norm1": "norm1", "q": "attn.q", "k": "attn.k", "v": "attn.v", "o": "attn.proj", "norm2": "norm2"}
        | {"up": "mlp.fc1", "down": "mlp.fc2"},
        {"norm": "norm", "head": "head"},
    ),
    Style(  # transformers' ViT
        {"patch": "vit.embeddings.patch_embeddings.projection"},
        "vit.encoder.layer.{index}",
        {"q": "attention.attention.query", "k": "attention.attention.key", "v": "attention.attention.value"}
        | {"o": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"}
        | {"norm1": "layernorm_before", "norm2": "layernorm_after"},
        {"norm": "vit.layernorm", "head": "classifier"},
    ),
    Style(  # fairseq and transformers' BART
        {"patch": "encoder.embed.conv"},
        "encoder.layers.{index}",
        {"k": "self_attn.k_proj", "v": "self_attn.v_proj", "q": "self_attn.q_proj", "o": "self_attn.out_proj"}
        | {"norm1": "self_attn_layer_norm", "up": "fc1", "down": "fc2", "norm2": "final_layer_norm"},
        {"norm": "encoder.layer_norm", "head": "output_projection"},
    ),
    Style(  # diffusers
        {"patch": "patch_embedding"},
        "transformer_blocks.{index}",
        {"norm1": "norm1", "q": "attn1.to_q", "k": "attn1.to_k", "v": "attn1.to_v", "o": "attn1.to_out.0"}
        | {"norm2": "norm2", "up": "ff.net.0.proj", "down": "ff.net.2"},
        {"norm": "norm_out", "head": "proj_out"},
    ),
)

CONV_STYLES = (
    Style(  # torchvision's ResNet
        {"conv": "conv1", "bn": "bn1"},
        "layer{stage}.{index}",
        {"conv1": "conv1", "bn1": "bn1", "conv2": "conv2", "bn2": "bn2", "conv3": "conv3", "bn3": "bn3"}
        | {"shortcut_conv": "downsample.0", "shortcut_bn": "downsample.1"},
        {"head": "fc"},
    ),
    Style(  # transformers' ResNet, which registers the shortcut first
        {"conv": "resnet.embedder.embedder.convolution", "bn": "resnet.embedder.embedder.normalization"},
        "resnet.encoder.stages.{stage}.layers.{index}",
        {"shortcut_conv": "shortcut.convolution", "shortcut_bn": "shortcut.normalization"}
        | {"conv1": "layer.0.convolution", "bn1": "layer.0.normalization"}
        | {"conv2": "layer.1.convolution", "bn2": "layer.1.normalization"}
        | {"conv3": "layer.2.convolution", "bn3": "layer.2.normalization"},
        {"head": "classifier.1"},
    ),
    Style(  # timm's RegNet
        {"conv": "stem.conv", "bn": "stem.bn"},
        "s{stage}.b{index}",
        {"conv1": "conv1.conv", "bn1": "conv1.bn", "conv2": "conv2.conv", "bn2": "conv2.bn"}
        | {
            "conv3": "conv3.conv",
            "bn3": "conv3.bn",
            "shortcut_conv": "downsample.conv",
            "shortcut_bn": "downsample.bn",
        },
        {"head": "head.fc"},
    ),
    Style(  # detectron2
        {"conv": "stem.conv1", "bn": "stem.conv1.norm"},
        "res{stage}.{index}",
        {"shortcut_conv": "shortcut", "shortcut_bn": "shortcut.norm", "conv1": "conv1", "bn1": "conv1.norm"}
        | {"conv2": "conv2", "bn2": "conv2.norm", "conv3": "conv3", "bn3": "conv3.norm"},
        {"head": "linear"},
    ),
)

_NORM = ("weight", "bias")
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", COUNTER)


def _written(
    style: Style,
    stem: Mapping[str, Shapes],
    blocks: Mapping[tuple[int, int, int], Mapping[str, Shapes]],
    head: Mapping[str, Shapes],
) -> dict[tuple[object, ...], tuple[str, tuple[int, ...]]]:
    """Write a network down in a style: the key and shape of every role, in the style's registration order."""
    entries: dict[tuple[object, ...], tuple[str, tuple[int, ...]]] = {}

    def add(place: object, path: str, names: Mapping[str, str], parts: Mapping[str, Shapes]) -> None:
        for role, name in names.items():
            for leaf, shape in parts.get(role, {}).items():
                entries[place, role, leaf] = (f"{path}{name}.{leaf}", shape)

    add("stem", "", style.stem, stem)
    for (stage, index, running), parts in blocks.items():
        flat = "{stage}" not in style.block
        path = style.block.format(stage=stage, index=running if flat else index)
        add((stage, index), f"{path}.", style.parts, parts)
    add("head", "", style.head, head)
    return entries


def _linear(rows: int, *columns: int) -> Shapes:
    return {"weight": (rows, *columns), "bias": (rows,)}


def _norm(width: int) -> Shapes:
    return dict.fromkeys(_NORM, (width,))


def _batch_norm(width: int) -> Shapes:
    return {leaf: () if leaf == COUNTER else (width,) for leaf in _BATCH_NORM}


def _conv(out: int, into: int, size: int) -> Shapes:
    return {"weight": (out, into, size, size)}


@st.composite
def transformer_cases(draw: st.DrawFn) -> Case:
    """A transformer encoder in two styles."""
    width, hidden = draw(st.sampled_from([(16, 64), (24, 72), (32, 48)]))
    depth, classes = draw(st.integers(1, 13)), draw(st.sampled_from([5, 10, 1000]))
    block = {role: _linear(width, width) for role in "qkvo"} | {"norm1": _norm(width), "norm2": _norm(width)}
    block |= {"up": _linear(hidden, width), "down": _linear(width, hidden)}
    stem = {"patch": _linear(width, 3, 4, 4)}
    head = {"norm": _norm(width), "head": _linear(classes, width)}
    blocks = {(0, index, index): block for index in range(depth)}
    return _in_two_styles(draw, TRANSFORMER_STYLES, stem, blocks, head)


@st.composite
def conv_cases(draw: st.DrawFn) -> Case:
    """A residual convolutional network of several stages in two styles."""
    widths = draw(st.sampled_from([(8, 16), (16, 32, 64), (8, 16, 32, 64)]))
    expansion, size = draw(st.sampled_from([2, 4])), draw(st.sampled_from([3, 7]))
    stem = {"conv": _conv(widths[0], 3, size), "bn": _batch_norm(widths[0])}
    blocks: dict[tuple[int, int, int], Mapping[str, Shapes]] = {}
    into = widths[0]
    for stage, width in enumerate(widths):
        out = width * expansion
        for index in range(draw(st.integers(1, 4))):
            parts = {"conv1": _conv(width, into, 1), "conv2": _conv(width, width, 3), "conv3": _conv(out, width, 1)}
            parts |= {"bn1": _batch_norm(width), "bn2": _batch_norm(width), "bn3": _batch_norm(out)}
            if index == 0:
                parts |= {"shortcut_conv": _conv(out, into, 1), "shortcut_bn": _batch_norm(out)}
            blocks[stage, index, len(blocks)] = parts
            into = out
    return _in_two_styles(draw, CONV_STYLES, stem, blocks, {"head": _linear(10, into)})


def _in_two_styles(
    draw: st.DrawFn,
    styles: tuple[Style, ...],
    stem: Mapping[str, Shapes],
    blocks: Mapping[tuple[int, int, int], Mapping[str, Shapes]],
    head: Mapping[str, Shapes],
) -> Case:
    source, target = (_written(draw(st.sampled_from(styles)), stem, blocks, head) for _ in range(2))
    truth = {target[role][0]: source[role][0] for role in target if role in source}
    return Case(dict(source.values()), dict(target.values()), truth)


REAL = (
    "torchvision.resnet18",
    "torchvision.resnet50",
    "torchvision.mobilenet_v3_small",
    "torchvision.vit_b_16",
    "torchvision.convnext_tiny",
    "torchvision.shufflenet_v2_x1_0",
    "timm.vit_tiny_patch16_224",
    "timm.mixer_s32_224",
    "timm.regnety_004",
    "timm.resnetv2_50",
    "timm.swin_tiny_patch4_window7_224",
    "timm.pvt_v2_b0",
)


@cache
def real_shapes(name: str) -> Shapes:
    """The state dict of an architecture of torchvision or timm, built on the meta device."""
    library, _, model = name.partition(".")
    # timm's RegNet looks for unique values while it is built, which torch 2.7 cannot on the meta device
    with torch.device("cpu" if model.startswith("regnet") else "meta"):
        if library == "timm":
            state_dict = timm.create_model(model).state_dict()
        else:
            state_dict = torchvision.models.get_model(model, weights=None).state_dict()
    return {key: tuple(tensor.shape) for key, tensor in state_dict.items()}


def identical(shapes: Shapes) -> Case:
    return Case(dict(shapes), dict(shapes), {key: key for key in shapes})


real_cases = st.sampled_from(REAL).map(lambda name: identical(real_shapes(name)))


def with_source_renamed(case: Case, rename: Callable[[str], str]) -> Case:
    source = {rename(key): shape for key, shape in case.source.items()}
    assert len(source) == len(case.source), "a renaming must not make two keys one"
    return Case(source, case.target, {target: rename(key) for target, key in case.truth.items()})


def with_source_order(case: Case, keys: Iterable[str]) -> Case:
    source = {key: case.source[key] for key in keys}
    assert source.keys() == case.source.keys()
    return replace(case, source=source)


def without_source(case: Case, dropped: Callable[[str], bool]) -> Case:
    source = {key: shape for key, shape in case.source.items() if not dropped(key)}
    return Case(source, case.target, {target: key for target, key in case.truth.items() if key in source})


# the names of torch's own tensors, which a model that is written by other hands has too
LEAVES = "^(weight|bias|running|mean|var|num|batches|tracked|running_mean|running_var|num_batches_tracked)$"
NONSENSE = ("zorvu", "quiblax", "drund", "yattle", "wimsy", "jopik", "fumbra", "glixen", "sproot", "hazuki", "brimble")
WRAPPERS = ("module", "_orig_mod", "_forward_module", "model", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@st.composite
def renamed(draw: st.DrawFn, cases: st.SearchStrategy[Case] = real_cases, spare: str = "(?!)") -> Case:
    """A source in which words of the paths are others everywhere, or whole components of the paths are.

    Numbers stay what they are, and so do the words that the regex ``spare`` matches.
    """
    case = draw(cases)
    pattern = draw(st.sampled_from([r"[A-Za-z]+", r"(?<![^.])[A-Za-z_][^.]*"]))
    words = sorted({word for key in case.source for word in re.findall(pattern, key) if not re.search(spare, word)})
    chosen = draw(st.lists(st.sampled_from(words), min_size=1, unique=True)) if draw(st.booleans()) else words
    # a suffix of letters, since the nonsense words are fewer than a network's
    fresh = draw(st.permutations([first + second for first in NONSENSE for second in ("", "o", "ik", "uth", "andra")]))
    replaced = dict(zip(chosen, fresh, strict=False))
    digits = {word: "".join(re.findall(r"\d+", word)) for word in replaced}
    return with_source_renamed(
        case, lambda key: re.sub(pattern, lambda m: replaced.get(m[0], m[0]) + digits.get(m[0], ""), key)
    )


@st.composite
def reordered(draw: st.DrawFn, cases: st.SearchStrategy[Case] = real_cases) -> Case:
    """A source that registers the children of one kind of block in another order, in every block of that kind."""
    case = draw(cases)
    templates = sorted({_template(parent) for key in case.source for parent in _parents(key)})
    template = draw(st.sampled_from(templates))
    children = sorted({_child(key, template) for key in case.source} - {""})
    rank = {child: place for place, child in enumerate(draw(st.permutations(children)))}
    first: dict[str, int] = {}
    for place, key in enumerate(case.source):
        first.setdefault(_block(key, template) or key, place)
    return with_source_order(
        case,
        sorted(case.source, key=lambda key: (first[_block(key, template) or key], rank.get(_child(key, template), 0))),
    )


def _parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def _template(path: str) -> str:
    return re.sub(r"\d+", "#", path)


def _block(key: str, template: str) -> str:
    """The parent of that template that a key is below, or an empty string."""
    return next((f"{parent}." for parent in _parents(key) if _template(parent) == template), "")


def _child(key: str, template: str) -> str:
    """The name of the child that a key is below, in a parent of that template."""
    block = _block(key, template)
    return key.removeprefix("" if block == "." else block).partition(".")[0] if block else ""


@st.composite
def wrapped(draw: st.DrawFn, cases: st.SearchStrategy[Case] = real_cases) -> Case:
    """A source whose keys carry wrappers' prefixes: at the front, and within the path of every block of one kind."""
    case = draw(cases)
    front = "".join(f"{wrapper}." for wrapper in draw(st.lists(st.sampled_from(WRAPPERS), max_size=3)))
    templates = sorted({_template(parent) for key in case.source for parent in _parents(key)} - {""})
    inner = draw(st.sampled_from(WRAPPERS))
    wrapped_template = draw(st.none() | st.sampled_from(templates)) if templates else None

    def rename(key: str) -> str:
        block = _block(key, wrapped_template) if wrapped_template else ""
        return front + (f"{block}{inner}.{key.removeprefix(block)}" if block else key)

    return with_source_renamed(case, rename)


@st.composite
def with_another_head(draw: st.DrawFn, cases: st.SearchStrategy[Case] = real_cases) -> Case:
    """A target with another number of classes than the source, or none; its head has no counterpart then."""
    case = draw(cases)
    classes = draw(st.sampled_from([2, 10, 21841]))
    heads = {key for key, shape in case.target.items() if shape[:1] == (1000,)}
    target = {key: (classes, *shape[1:]) if key in heads else shape for key, shape in case.target.items()}
    truth = {key: source for key, source in case.truth.items() if key not in heads}
    return Case(case.source, target, truth)


@st.composite
def shortened(draw: st.DrawFn, cases: st.SearchStrategy[Case] = real_cases) -> Case:
    """A source that lacks the last blocks of a list of blocks, or has more of them than the target."""
    case = draw(cases)
    side = case.flipped() if draw(st.booleans()) else case
    lists = {path: names for path in _lists(side.source) if len(names := _blocks(side.source, path)) > 2}
    if not lists:
        return case
    path = draw(st.sampled_from(sorted(lists)))
    keep = set(lists[path][: draw(st.integers(1, len(lists[path]) - 1))])

    def is_dropped(key: str) -> bool:
        return key.startswith(f"{path}.") and key.removeprefix(f"{path}.").partition(".")[0] not in keep

    result = without_source(side, is_dropped)
    return result if side is case else result.flipped()


def _lists(shapes: Shapes) -> set[str]:
    """The paths that have numbered children."""
    return {
        parent.rpartition(".")[0] for key in shapes for parent in _parents(key) if parent.rpartition(".")[2].isdigit()
    }


def _blocks(shapes: Shapes, path: str) -> list[str]:
    """The numbers of a path's children, if they are alike as blocks are, and not the steps of a sequence.

    The first of them may have more than the others, such as a shortcut.
    """
    below: dict[str, set[str]] = {}
    for key in shapes:
        if key.startswith(f"{path}."):
            name, _, rest = key.removeprefix(f"{path}.").partition(".")
            below.setdefault(name, set()).add(rest)
    first, *others = below.values()
    are_alike = len(first) > 6 and all(other == others[0] and other <= first for other in others)
    return sorted(below, key=int) if are_alike and all(name.isdigit() for name in below) else []


@st.composite
def without_counters(draw: st.DrawFn, cases: st.SearchStrategy[Case] = real_cases) -> Case:
    """A source from before BatchNorm had a counter."""
    return without_source(draw(cases), lambda key: key.endswith(COUNTER))


@st.composite
def in_alphabetical_order(draw: st.DrawFn, cases: st.SearchStrategy[Case] = real_cases) -> Case:
    """A source whose keys are sorted, as in a safetensors file."""
    case = draw(cases)
    return with_source_order(case, sorted(case.source))


def perturbed(cases: st.SearchStrategy[Case] = real_cases) -> st.SearchStrategy[Case]:
    """Cases with several perturbations at once that leave the truth decidable."""
    partial = shortened(with_another_head(without_counters(cases) | cases))
    # new names need the old order, and a new order the old names
    return wrapped(renamed(partial) | reordered(partial) | in_alphabetical_order(partial))


written_cases = transformer_cases() | conv_cases()
