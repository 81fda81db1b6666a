"""Time of ``align`` on two state dicts, against ``load_state_dict`` of the same model and against weightbridge."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median

import timm
import torchvision
import transformers
from torch import Tensor, nn

import autoalign
from benchmarks.peers import PEERS


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, and the names that its checkpoint has instead of its own."""

    name: str
    build: Callable[[], nn.Module]
    source_key: Callable[[str], str]  # from the model's key to the checkpoint's
    budget: float | None  # how many times the time of load_state_dict it may take


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of each repeat, in order; the two were taken in turn."""

    name: str
    tensors: int
    align: tuple[float, ...]
    load_state_dict: tuple[float, ...]
    weightbridge: tuple[float, ...]  # empty where it is not installed
    is_weightbridge_right: bool
    budget: float | None

    @property
    def ratio(self) -> float:
        """The median time of ``align`` over that of ``load_state_dict``."""
        return median(self.align) / median(self.load_state_dict)

    @property
    def peer_ratio(self) -> float | None:
        """The median time of weightbridge over that of ``align``, where both find the truth."""
        return median(self.weightbridge) / median(self.align) if self.is_weightbridge_right else None

    @property
    def is_within_budget(self) -> bool:
        return self.budget is None or self.ratio <= self.budget


def torchvision_resnet_key(key: str) -> str:
    """Translate a key of transformers' ResNet to torchvision's.

    >>> torchvision_resnet_key("resnet.encoder.stages.0.layers.2.layer.1.normalization.bias")
    'layer1.2.bn2.bias'
    """
    key = re.sub(r"^resnet\.embedder\.embedder\.(\w+)", lambda found: f"{_SHORT[found[1]]}1", key)
    key = key.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")
    key = re.sub(
        r"\blayer\.(\d)\.(convolution|normalization)", lambda found: f"{_SHORT[found[2]]}{int(found[1]) + 1}", key
    )
    key = re.sub(r"^resnet\.encoder\.stages\.(\d)\.layers", lambda found: f"layer{int(found[1]) + 1}", key)
    return key.replace("classifier.1.", "fc.")


_SHORT = {"convolution": "conv", "normalization": "bn"}


def renamed_key(key: str) -> str:
    """Give a key other words for the containers, and leave the words for what a layer is.

    >>> renamed_key("features.denseblock1.denselayer2.conv1.weight")
    'trunk.group1.unit2.conv1.weight'
    """
    words = {"features": "trunk", "denseblock": "group", "denselayer": "unit", "transition": "between"}
    words |= {
        "stages": "levels",
        "blocks": "layers",
        "attn": "attention",
        "mlp": "ffn",
        "patch_embed": "embed",
        "head": "classifier",
    }
    return re.sub(r"[a-z_]+", lambda found: words.get(found[0], found[0]), key)


SUBJECTS = (
    Subject(
        "resnet50, torchvision -> transformers",
        lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000)),
        torchvision_resnet_key,
        budget=10,
    ),
    Subject("densenet121, renamed", torchvision.models.densenet121, renamed_key, budget=10),
    Subject("vit_base, renamed", lambda: timm.create_model("vit_base_patch16_224"), renamed_key, budget=10),
    Subject("swin_base, renamed", lambda: timm.create_model("swin_base_patch4_window7_224"), renamed_key, budget=10),
    Subject("resnet50, identical keys", torchvision.models.resnet50, lambda key: key, budget=2),
    Subject("densenet121, identical keys", torchvision.models.densenet121, lambda key: key, budget=2),
)


def measure(subject: Subject, repeats: int) -> Timing:
    """Time one subject, after one unmeasured run, and assert that every result is the true mapping.

    Raises:
        AssertionError: ``align`` found something else than the truth, so that its time means nothing.
    """
    model = subject.build()
    target = model.state_dict()
    source = {subject.source_key(key): tensor.clone() for key, tensor in target.items()}
    truth = {subject.source_key(key): key for key in target}
    assert len(source) == len(target), f"{subject.name}: two keys were given one name"
    align_seconds, load_seconds = zip(*_repeated(model, source, target, truth, repeats), strict=True)
    peer_seconds, is_right = _weightbridge(source, target, truth, max(1, repeats // 5))
    return Timing(
        subject.name, len(target), align_seconds[1:], load_seconds[1:], peer_seconds, is_right, subject.budget
    )


def _weightbridge(
    source: Mapping[str, Tensor], target: Mapping[str, Tensor], truth: Mapping[str, str], repeats: int
) -> tuple[tuple[float, ...], bool]:
    """Time weightbridge on the same two sides, and tell whether it finds the truth; it takes seconds for each call."""
    peer = PEERS["weightbridge"]
    if not peer.is_available:
        return (), False
    seconds, is_right = [], True
    for _ in range(repeats):
        start = time.perf_counter()
        try:
            found = peer.match(source, target)
        except ValueError:  # a group stays ambiguous
            found = {}
        seconds.append(time.perf_counter() - start)
        is_right &= found == {other: own for own, other in truth.items()}
    return tuple(seconds), is_right


def _repeated(
    model: nn.Module,
    source: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    truth: Mapping[str, str],
    repeats: int,
) -> Iterator[tuple[float, float]]:
    for _ in range(repeats + 1):
        start = time.perf_counter()
        alignment = autoalign.align(source, target)
        align_seconds = time.perf_counter() - start
        assert alignment.mapping == truth, f"wrong result: {alignment}"
        aligned = alignment.state_dict()
        start = time.perf_counter()
        model.load_state_dict(aligned)
        yield align_seconds, time.perf_counter() - start
