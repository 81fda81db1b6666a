"""The matchers where one side has what the other lacks: parts, two copies, and networks that have nothing in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from random import Random

import timm
import transformers

from autoalign.plan.specs import TensorSpec
from benchmarks.accuracy.contest import Attempt, Truth, attempt_on_keys
from benchmarks.cases.architectures import architecture_of, architectures, build_on_meta
from benchmarks.cases.content import dropped
from benchmarks.cases.module_trees import path_of
from benchmarks.cases.naming import Entry, renamed
from benchmarks.cases.perturbations import on_meta
from benchmarks.peers import Peer

Specs = tuple[TensorSpec, ...]

SUBJECTS = (
    "torchvision.resnet18",
    "torchvision.convnext_tiny",
    "torchvision.efficientnet_b0",
    "torchvision.swin_t",
    "torchvision.vit_b_16",
    "torchvision.regnet_y_400mf",
    "torchvision.mobilenet_v3_small",
    "timm.mixer_b16_224",
)
COPIES = (  # the prefixes of the two copies, and that of the target: one of them, or that of neither
    ("model.", "ema.", ""),
    ("", "model_ema.module.", ""),
    ("student.backbone.", "teacher.backbone.", "backbone."),
    ("student.", "teacher.", "teacher."),
    ("online_encoder.", "momentum_encoder.", "momentum_encoder."),
    ("module.encoder_q.", "module.encoder_k.", ""),
)
UNRELATED = (
    ("torchvision.resnet50", "torchvision.vit_b_16"),
    ("torchvision.vgg11_bn", "torchvision.resnet18"),
    ("gpt2", "torchvision.resnet18"),
    ("torchvision.vit_b_16", "torchvision.resnet50"),
    ("torchvision.resnet18", "torchvision.densenet121"),
    ("torchvision.densenet121", "torchvision.mobilenet_v3_small"),
    ("torchvision.convnext_tiny", "torchvision.resnet50"),
    ("bert", "torchvision.convnext_tiny"),
    ("torchvision.efficientnet_b0", "torchvision.regnet_y_400mf"),
    ("torchvision.swin_t", "bert"),
)


@dataclass(frozen=True, slots=True)
class PartialCase:
    """Two sides and their truths, of which any one may be met."""

    group: str
    name: str
    source: Specs
    target: Specs
    truths: tuple[Truth, ...]


def attempts(peers: Sequence[Peer], limit: int | None = None) -> Iterator[Attempt]:
    """Try every matcher on all cases, or on the first ``limit`` of each group."""
    seen: dict[str, int] = {}
    for case in partial_cases():
        seen[case.group] = seen.get(case.group, 0) + 1
        if limit is None or seen[case.group] <= limit:
            source, target = on_meta(case.source), on_meta(case.target)
            for peer in peers:
                yield attempt_on_keys(peer, case.group, case.name, source, target, case.truths)


def partial_cases() -> Iterator[PartialCase]:
    """Make all cases, always the same."""
    for name in SUBJECTS:
        for index, make in enumerate((_other_head, _other_last_stage, _shallower, _beside_another)):
            yield make(name, Random(f"{name}:{index}"))
    for place, name in enumerate(SUBJECTS):
        for index, prefixes in enumerate(COPIES[place % 2 :: 2]):
            yield _two_copies(name, prefixes, Random(f"{name}:copies:{index}"))
    for first, second in UNRELATED:
        none: Truth = dict.fromkeys((spec.key for spec in _specs(second)), None)
        yield PartialCase("unrelated", f"{first} -> {second}", _specs(first), _specs(second), (none,))


def _other_head(name: str, random: Random) -> PartialCase:
    """A target of ten classes, whose head cannot be filled."""
    specs = _specs(name)
    target = tuple(replace(spec, shape=(10, *spec.shape[1:])) if spec.shape[:1] == (1000,) else spec for spec in specs)
    return _case(f"{name}, another head", _synonyms(specs, random), target)


def _other_last_stage(name: str, random: Random) -> PartialCase:
    """A target whose last layers are others: what has the largest widths of all, by half as many again."""
    specs = _specs(name)
    widest = max(max(spec.shape) for spec in specs if len(spec.shape) > 1 and 1000 not in spec.shape)

    def changed(spec: TensorSpec) -> TensorSpec:
        return replace(spec, shape=tuple(size * 3 // 2 if size == widest else size for size in spec.shape))

    return _case(f"{name}, other widest layers", _synonyms(specs, random), tuple(map(changed, specs)))


def _shallower(name: str, random: Random) -> PartialCase:
    """A source that lacks the end of a list, a module at the top, or the counters of batches."""
    kept = {entry.origin for entry in dropped(_entries(_specs(name)), random)}
    source = [entry for entry in _synonyms(_specs(name), random) if entry.origin in kept]
    return _case(f"{name}, shallower", source, _specs(name))


def _beside_another(name: str, random: Random) -> PartialCase:
    """A source that holds another network beside the wanted one, as detectors and pairs of towers do."""
    other = SUBJECTS[(SUBJECTS.index(name) + 3) % len(SUBJECTS)]
    wanted = [replace(entry, path=("backbone", *entry.path)) for entry in _synonyms(_specs(name), random)]
    beside = [replace(entry, path=("neck", *entry.path), origin=None) for entry in _entries(_specs(other))]
    return _case(f"{name}, beside {other}", [*wanted, *beside], _specs(name))


def _two_copies(name: str, prefixes: tuple[str, str, str], random: Random) -> PartialCase:
    """A source with two copies; the one whose prefix the target has is meant, and any one where it has neither."""
    first, second, own = prefixes
    entries = _synonyms(_specs(name), random)
    source = tuple(
        TensorSpec(prefix + entry.key, entry.shape, entry.dtype) for prefix in (first, second) for entry in entries
    )
    target = tuple(replace(spec, key=own + spec.key) for spec in _specs(name))
    meant = (own,) if own and own in (first, second) else (first, second)
    truths = tuple({own + str(entry.origin): prefix + entry.key for entry in entries} for prefix in meant)
    return PartialCase(
        "two copies", f"{name}, {first or '(none)'} and {second} -> {own or '(none)'}", source, target, truths
    )


def _case(name: str, source: Sequence[Entry], target: Specs) -> PartialCase:
    """Tensors of one origin and of equal shape belong together."""
    found = {(entry.origin, entry.shape): entry.key for entry in source}
    truth = {spec.key: found.get((spec.key, spec.shape)) for spec in target}
    return PartialCase("partial", name, tuple(TensorSpec(e.key, e.shape, e.dtype) for e in source), target, (truth,))


def _synonyms(specs: Specs, random: Random) -> list[Entry]:
    return renamed(_entries(specs), random, synonyms=0.6, made=0.0)


def _entries(specs: Specs) -> list[Entry]:
    return [Entry(path_of(spec), spec.shape, spec.dtype, spec.key) for spec in specs]


@cache
def _specs(name: str) -> Specs:
    builders: dict[str, Callable[[], transformers.PreTrainedModel]] = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config()),
        "bert": lambda: transformers.BertModel(transformers.BertConfig()),
    }
    if name in builders:
        return architecture_of(name, build_on_meta(builders[name])).specs
    known = next((one for one in architectures() if one.name == name), None)
    if known is None:
        library, model = name.split(".", 1)
        assert library == "timm", name
        known = architecture_of(name, build_on_meta(partial(timm.create_model, model)))
    return known.specs
