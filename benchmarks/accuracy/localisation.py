"""Localisation: how often ``verify`` names the module that holds a misplaced tensor.

In a right alignment of two real networks, two tensors of equal shape are exchanged, or a square matrix is transposed.
The target is loaded so and verified; or the spoilt alignment is verified, which then pairs the modules wrongly too.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from autoalign.alignment import Alignment
from autoalign.api import align
from autoalign.plan.matches import Match
from autoalign.plan.operations import Transpose, chain
from autoalign.verification.run import execution_order
from autoalign.verification.verify import Verification, verify

Way = Literal["loaded", "given"]
WAYS: tuple[Way, ...] = get_args(Way)


@dataclass(frozen=True, slots=True)
class Subject:
    """Two implementations of one network, which the library aligns rightly."""

    name: str
    source: Callable[[], nn.Module]
    target: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Localisation:
    """Counts over the trials of one subject and way."""

    name: str
    way: Way
    trials: int
    located: int  # the first divergence names a module that holds a changed tensor
    first: int  # it names the one of the changed tensor that is used first
    seconds: float


@dataclass(frozen=True, slots=True)
class Trial:
    """One spoilt alignment."""

    changed: tuple[str, ...]  # target keys, in the order of their use
    alignment: Alignment


def _images(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images = nn.functional.interpolate(torch.randn(2, 3, 4, 4, generator=generator), size, mode="bicubic")
    return images + 0.5 * torch.randn(images.shape, generator=generator)


def _tokens() -> Tensor:
    return torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))


def _torchvision(name: str) -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.get_model(name, weights=None)
    return model


def _timm(name: str, **options: object) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, **options)
    return model


def _transformers(kind: str, head: str, **options: object) -> nn.Module:
    import transformers

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3}
    tokens = {"num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**sizes | tokens | options)
    model: nn.Module = getattr(transformers, f"{kind}{head}")(config)
    return model


_LLAMA = partial(_transformers, "Llama", "ForCausalLM", num_key_value_heads=2, rms_norm_eps=1e-6)
_PHI = partial(_transformers, "Phi3", "ForCausalLM", num_key_value_heads=2, rms_norm_eps=1e-6)
_BERT = partial(_transformers, "Bert", "Model", max_position_embeddings=24)
_VIT = partial(_timm, "vit_tiny_patch16_224", img_size=64, depth=4)
_HF_VIT = partial(
    _transformers,
    "ViT",
    "ForImageClassification",
    num_labels=1000,
    hidden_size=192,
    num_attention_heads=3,
    intermediate_size=768,
    num_hidden_layers=4,
    image_size=64,
    layer_norm_eps=1e-6,
)

SUBJECTS = (
    Subject(
        "torchvision.resnet18 -> timm.resnet18",
        partial(_torchvision, "resnet18"),
        partial(_timm, "resnet18"),
        partial(_images, 64),
    ),
    Subject(
        "torchvision.convnext_tiny -> timm.convnext_tiny",
        partial(_torchvision, "convnext_tiny"),
        partial(_timm, "convnext_tiny"),
        partial(_images, 64),
    ),
    Subject("timm.vit_tiny -> timm.vit_tiny", _VIT, _VIT, partial(_images, 64)),
    Subject("timm.vit_tiny -> transformers.ViT", _VIT, _HF_VIT, partial(_images, 64)),
    Subject("transformers.Bert -> transformers.Bert", _BERT, _BERT, _tokens),
    Subject("transformers.Llama -> transformers.Llama", _LLAMA, _LLAMA, _tokens),
    Subject("transformers.Phi3 -> transformers.Llama", _PHI, _LLAMA, _tokens),
)


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Give every parameter and every buffer of the state dict values of its own, in place."""
    generator = torch.Generator().manual_seed(seed)
    keys = model.state_dict(keep_vars=True)
    for key, tensor in keys.items():
        values = torch.randn(tensor.shape, generator=generator)
        if not tensor.is_floating_point():
            if key.endswith("num_batches_tracked"):
                tensor.data = torch.randint(1, 10**6, tensor.shape, generator=generator)
        elif key.endswith("running_var"):
            tensor.data = 0.5 + torch.rand(tensor.shape, generator=generator)
        elif tensor.squeeze().dim() < 2:  # a gain, or else a bias, told by the value that its library gave it
            is_gain = bool((tensor > 0).all()) and not key.endswith("running_mean")
            tensor.data = 1 + 0.2 * values.clamp(-3, 3) if is_gain else 0.2 * values
        else:
            tensor.data = values / (tensor[0].numel() ** 0.5 if key.endswith("weight") else 1.0)
    return model.eval()


def spoilt(alignment: Alignment, order: list[str], rng: random.Random) -> Trial:
    """Exchange what fills two target keys of equal shape, or transpose a square matrix."""
    shapes = {spec.key: spec.shape for spec in alignment.target_specs}
    matches = {match.target: match for match in alignment.matches}
    tied = {spec.storage for spec in alignment.target_specs if spec.storage is not None}
    assert len(tied) >= len({spec.key for spec in alignment.target_specs if spec.storage is not None}), "tied tensors"
    groups: dict[tuple[int, ...], list[str]] = {}
    for key in matches:
        groups.setdefault(shapes[key], []).append(key)
    pairs = [(a, b) for keys in groups.values() for i, a in enumerate(keys) for b in keys[i + 1 :]]
    squares = [key for key in matches if len(shapes[key]) == 2 and shapes[key][0] == shapes[key][1] > 1]
    changed: dict[str, Match]
    if squares and rng.random() < 0.25:
        key = rng.choice(squares)
        changed = {key: replace(matches[key], operation=chain(matches[key].operation, Transpose()))}
    else:
        first, second = rng.choice(pairs)
        one, other = matches[first], matches[second]
        changed = {
            first: replace(one, sources=other.sources, operation=other.operation),
            second: replace(other, sources=one.sources, operation=one.operation),
        }
    filled = tuple(changed.get(match.target, match) for match in alignment.matches)
    return Trial(tuple(sorted(changed, key=order.index)), replace(alignment, matches=filled))


def attempts(subject: Subject, count: int, way: Way, seed: int = 0) -> Iterator[tuple[Trial, Verification]]:
    """Spoil the alignment of a subject again and again, and verify each."""
    source, target = randomise(subject.source(), 1), randomise(subject.target(), 2)
    inputs = subject.inputs()
    alignment = align(source, target)
    target.load_state_dict(alignment.state_dict())
    verification = verify(source, target, inputs)
    if not verification.equal or verification.first_divergence is not None:
        raise RuntimeError(f"{subject.name} is not aligned rightly: {verification}")
    order = execution_order(target, inputs)
    rng = random.Random(f"{subject.name} {way} {seed}")
    for _ in range(count):
        trial = spoilt(alignment, order, rng)
        if way == "loaded":
            target.load_state_dict(trial.alignment.state_dict())
            yield trial, verify(source, target, inputs)
        else:
            target.load_state_dict(alignment.state_dict())
            yield trial, verify(source, target, inputs, alignment=trial.alignment)


def named(verification: Verification) -> str | None:
    """Name the module that the first divergence blames, if there is one."""
    return None if verification.first_divergence is None else verification.first_divergence.target_module


def measure(subject: Subject, count: int, way: Way, seed: int = 0) -> tuple[Localisation, list[str]]:
    """Count how often the module of a changed tensor is named; also describe the trials where it was not."""
    located = first = 0
    start, missed = time.perf_counter(), []
    for trial, verification in attempts(subject, count, way, seed):
        modules = [key.rpartition(".")[0] for key in trial.changed]
        name = named(verification)
        located += name in modules
        first += name == modules[0]
        if name != modules[0]:
            missed.append(f"{subject.name}, {way}: changed {', '.join(trial.changed)}; {verification.first_divergence}")
    return Localisation(subject.name, way, count, located, first, time.perf_counter() - start), missed


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table and what was missed; the exit status is 1 if anything was."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.localisation", description=__doc__)
    parser.add_argument("--trials", type=int, default=200, help="of all subjects and both ways together (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of tensors (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    options = parser.parse_args(arguments)
    kinds = [(subject, way) for subject in SUBJECTS for way in WAYS]
    results, missed = [], []
    for place, (subject, way) in enumerate(kinds):
        count = options.trials // len(kinds) + (place < options.trials % len(kinds))
        result, lines = measure(subject, count, way, options.seed)
        results.append(result)
        missed += lines
    print("\n".join(table(results)))
    print("\n".join(missed))
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1), encoding="utf-8")
    return 0 if all(result.located == result.trials for result in results) else 1


def table(results: Sequence[Localisation]) -> Iterator[str]:
    """Write a line for each subject and way, and one for all."""
    yield "| source -> target | verified | trials | module named | the first one | seconds a trial |"
    yield "| --- | --- | ---: | ---: | ---: | ---: |"
    words = {"loaded": "the loaded target", "given": "the alignment"}
    for r in results:
        yield (
            f"| {r.name} | {words[r.way]} | {r.trials} | {r.located / max(r.trials, 1):.1%} "
            f"| {r.first / max(r.trials, 1):.1%} | {r.seconds / max(r.trials, 1):.1f} |"
        )
    trials, located, first = (sum(getattr(r, name) for r in results) for name in ("trials", "located", "first"))
    seconds = sum(r.seconds for r in results)
    yield f"| all | | {trials} | {located / trials:.1%} | {first / trials:.1%} | {seconds / trials:.1f} |"


if __name__ == "__main__":
    sys.exit(main())
