"""What is loaded between networks that are unlike: ``python -m benchmarks.accuracy.unlike [--sorted]``.

Nothing of one helps another, though many have one width, 768, so that single layers have equal shapes. Of each ordered
pair it counts what is loaded, and how much of that has the same key and shape on both sides.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations

import timm
import torchvision
import transformers
from torch import Tensor, nn

from autoalign import align
from benchmarks.cases.architectures import build_on_meta

_TIMM = ("vit_base_patch16_224", "mixer_b16_224", "poolformer_m36", "mobilevit_s", "levit_128s", "regnety_004")
_TORCHVISION = (
    *("resnet50", "vgg11_bn", "densenet121", "squeezenet1_0", "mobilenet_v3_small", "efficientnet_b0"),
    *("convnext_tiny", "swin_t"),
)
_TRANSFORMERS: Mapping[str, Callable[[], nn.Module]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig()),
    "t5": lambda: transformers.T5Model(transformers.T5Config(d_model=768, d_ff=3072, num_heads=12, num_layers=12)),
    "whisper": lambda: transformers.WhisperModel(transformers.WhisperConfig(d_model=768)),
    "wav2vec2": lambda: transformers.Wav2Vec2Model(transformers.Wav2Vec2Config()),
    "mamba": lambda: transformers.MambaModel(transformers.MambaConfig(num_hidden_layers=12)),
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """What ``align`` loads of one network into another."""

    source: str
    target: str
    count: int
    equal: int  # of them with the same key and shape on both sides


def builders() -> dict[str, Callable[[], nn.Module]]:
    """Return what makes each network."""
    return (
        {name: partial(timm.create_model, name) for name in _TIMM}
        | {name: partial(torchvision.models.get_model, name) for name in _TORCHVISION}
        | dict(_TRANSFORMERS)
    )


def loaded(networks: Mapping[str, Callable[[], nn.Module]], *, with_sorted_keys: bool = False) -> Iterator[Loaded]:
    """Align each network with each other."""
    sides: dict[str, dict[str, Tensor]] = {}
    for name, builder in networks.items():
        sides[name] = build_on_meta(builder).state_dict()
    for source, target in permutations(sides, 2):
        own = dict(sorted(sides[source].items())) if with_sorted_keys else sides[source]
        matches = align(own, sides[target]).matches
        equal = [
            m for m in matches if m.sources == (m.target,) and own[m.target].shape == sides[target][m.target].shape
        ]
        yield Loaded(source, target, len(matches), len(equal))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what is loaded, and of how many pairs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.unlike", description=__doc__)
    parser.add_argument("--sorted", action="store_true", help="the sources' keys in alphabetical order")
    found = list(loaded(builders(), with_sorted_keys=parser.parse_args(arguments).sorted))
    for one in found:
        if one.count:
            print(f"{one.source} -> {one.target}: {one.count} loaded, {one.equal} with the same key and shape")
    print(f"{sum(one.count > 0 for one in found)} of {len(found)} ordered pairs load something")
    return 0


if __name__ == "__main__":
    sys.exit(main())
