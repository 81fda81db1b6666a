"""Dataflow: how many networks can be traced on the meta device with guessed inputs, and how long it takes.

All of torchvision, a sample of timm, and families of transformers of their default configurations; then
the time of three networks of known size. ``python -m benchmarks.speed.dataflow [--only torchvision] [--sample 200]``.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import nn

import autoalign
from autoalign.checkpoints.named_models import build

_FAMILIES = """
    Albert Bart Bert BigBird Blip2 Bloom CLIP Clap Clvp ConvNext Data2VecAudio Deberta Dinov2 DistilBert Electra Falcon
    Flava Funnel GPT2 GPTNeoX Gemma Hubert LayoutLM Llama Longformer MBart Mamba Mistral Mixtral MobileViT Opt Qwen2
    Qwen3Moe Roberta Segformer Siglip Swin T5 ViT Wav2Vec2 Whisper
"""
_TIMED = {"torchvision:resnet50": 1.0, "torchvision:vit_b_16": 1.0, "transformers:LlamaForCausalLM": 4.0}
_Make = Callable[[], nn.Module]


def makers(library: str, sample: int) -> Iterator[tuple[str, _Make]]:
    """Yield networks of a library by name, with what makes them."""
    if library == "transformers":
        for family in _FAMILIES.split():
            yield family, partial(_transformer, family)
        return
    names = torchvision.models.list_models() if library == "torchvision" else timm.list_models()
    for name in sorted(random.Random(0).sample(names, min(sample, len(names)))):
        yield name, partial(_built, f"{library}:{name}")


def _built(spec: str) -> nn.Module:
    model = build(spec, values=False)
    assert isinstance(model, nn.Module)
    return model


def _transformer(family: str) -> nn.Module:
    names = {name.lower(): name for name in dir(transformers) if name.endswith(("Model", "ForConditionalGeneration"))}
    kind: Any = getattr(transformers, names.get(f"{family}Model".lower(), ""), None) or getattr(
        transformers, names[f"{family}ForConditionalGeneration".lower()]
    )
    config = kind.config_class()
    with torch.device("meta"):
        model: nn.Module = kind(config)
    return model


def traced(make: _Make) -> tuple[float, str]:
    """Return the seconds that a network takes to trace, and why it cannot be, or the inputs."""
    model = make()
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = autoalign.dataflow(model)
    except autoalign.TraceError as error:
        return time.perf_counter() - start, str(error)
    seconds = time.perf_counter() - start
    keys = [key for key, each in model.named_parameters()]
    used = sum(graph.out_degree(key) > 0 for key in keys)
    assumed = f"; assumed: {', '.join(graph.graph['assumed'])}" if graph.graph["assumed"] else ""
    return seconds, f"+ {used} of {len(keys)} parameters used; {graph.graph['inputs']}{assumed}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return 1 if a time is over its limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.dataflow", description=__doc__)
    parser.add_argument("--only", nargs="+", default=["torchvision", "timm", "transformers", "time"])
    parser.add_argument("--sample", type=int, default=200, help="networks of timm")
    parser.add_argument("--all", action="store_true", help="print every network, and not those alone that fail")
    options = parser.parse_args(arguments)
    for group in ("torchvision", "timm", "transformers"):
        if group in options.only:
            results = []
            for name, make in makers(group, 10_000 if group == "torchvision" else options.sample):
                results.append(traced(make))
                if options.all or not results[-1][1].startswith("+"):
                    print(f"  {name}: {results[-1][0]:.2f} s, {results[-1][1][:600]}", flush=True)
            count = sum(text.startswith("+") for _, text in results)
            seconds = [taken for taken, _ in results]
            print(f"{group}: {count} of {len(results)} traced; {median(seconds):.2f} s, at most {max(seconds):.1f} s")
    is_slow = False
    for name, limit in _TIMED.items() if "time" in options.only else ():
        seconds = [traced(partial(_built, name))[0] for _ in range(3)]
        is_slow |= median(seconds) > limit
        print(f"{name}: {median(seconds):.2f} s (limit {limit} s)")
    return int(is_slow)


if __name__ == "__main__":
    sys.exit(main())
