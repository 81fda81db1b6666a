"""The keys and shapes of many architectures of torchvision and timm, built without memory and cached as a file."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any
from zlib import crc32

import timm
import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

from autoalign.plan.specs import TensorSpec, specs_of

TIMM_COUNT = 300  # of its 1,371 names, spread over all of its modules
MOST_TENSORS = 1_400  # what has more is left out, so that thousands of cases stay quick

_WITH_BACKBONE = ("rcnn", "ssd", "fcos", "retinanet", "deeplab", "fcn", "lraspp")


@dataclass(frozen=True, slots=True)
class Architecture:
    """The entries of one model's state dict; a tensor that several keys share is listed under the first of them."""

    name: str
    specs: tuple[TensorSpec, ...]


class _ParametersOnMeta(TorchFunctionMode):
    """Parameters without memory, while what a constructor computes of sizes stays on the CPU, where it can be read."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in (torch.empty, torch.rand, torch.randn):
            options["device"] = "meta"
        return func(*args, **options)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which architectures take part; all by default."""

    most_tensors: int | None = None  # leaves out what has more
    few: bool = False  # only some small ones, which are built in seconds and need no cache

    def architectures(self) -> tuple[Architecture, ...]:
        return _chosen(self)


@cache
def _chosen(choice: Choice) -> tuple[Architecture, ...]:
    found = few_architectures() if choice.few else architectures()
    return tuple(one for one in found if choice.most_tensors is None or len(one.specs) <= choice.most_tensors)


@cache
def few_architectures() -> tuple[Architecture, ...]:
    """Build some small architectures of several kinds."""
    return tuple(
        architecture_of(name, build_on_meta(builder))
        for name, builder in (
            ("torchvision.resnet18", partial(torchvision.models.resnet18)),
            ("torchvision.squeezenet1_1", partial(torchvision.models.squeezenet1_1)),
            ("torchvision.mobilenet_v2", partial(torchvision.models.mobilenet_v2)),
            ("torchvision.shufflenet_v2_x0_5", partial(torchvision.models.shufflenet_v2_x0_5)),
            ("timm.vit_tiny_patch16_224", partial(timm.create_model, "vit_tiny_patch16_224")),
            ("timm.convnext_atto", partial(timm.create_model, "convnext_atto")),
            ("timm.mixer_s32_224", partial(timm.create_model, "mixer_s32_224")),
            ("timm.test_efficientnet", partial(timm.create_model, "test_efficientnet")),
            ("timm.swin_tiny_patch4_window7_224", partial(timm.create_model, "swin_tiny_patch4_window7_224")),
        )
    )


@cache
def architectures() -> tuple[Architecture, ...]:
    """List all architectures, from the cache's file where there is one for these versions.

    The file lies in ``$XDG_CACHE_HOME/autoalign-benchmarks``, or in ``~/.cache``; without a place to write it to, it is
    left out and the models are built each time, which takes a minute.
    """
    path = _cache_file()
    if path.is_file():
        stored = json.loads(gzip.decompress(path.read_bytes()))
        return tuple(Architecture(name, tuple(_read_spec(*entry) for entry in entries)) for name, entries in stored)
    built = tuple(_built())
    entries = [
        (
            architecture.name,
            [(spec.key, spec.shape, str(spec.dtype).removeprefix("torch.")) for spec in architecture.specs],
        )
        for architecture in built
    ]
    _write(path, gzip.compress(json.dumps(entries).encode()))
    return built


def every_architecture() -> list[str]:
    """List the names of all architectures of torchvision and timm, whatever their size."""
    return [name for name, _ in (*_torchvision_builders(), *_all_of_timm())]


def is_fitted(name: str) -> bool:
    """True for the quarter of all architectures that take part in fits; figures are told of the others."""
    return crc32(name.encode()) % 4 == 0


def named_architecture(name: str) -> Architecture | None:
    """Build one of ``every_architecture``; None if it can't be built without memory."""
    builders = _torchvision_builders() if name.startswith("torchvision.") else _all_of_timm()
    builder = next(builder for known, builder in builders if known == name)
    try:
        return architecture_of(name, build_on_meta(builder))
    except (RuntimeError, NotImplementedError):
        return None


def build_on_meta(builder: Callable[[], nn.Module]) -> nn.Module:
    """Build a model whose parameters take no memory.

    Raises:
        Exception: Whatever the constructor raises where it computes with its parameters.
    """
    modes: tuple[Callable[[], AbstractContextManager[Any]], ...] = (
        _ParametersOnMeta,
        partial(torch.device, "meta"),
    )
    for mode in modes:
        try:
            with warnings.catch_warnings(), mode():
                warnings.simplefilter("ignore")
                return builder()
        except (RuntimeError, NotImplementedError) as error:  # mixed devices, or a value asked of a meta tensor
            failure = error
    raise failure


def architecture_of(name: str, model: nn.Module) -> Architecture:
    """Read a model's entries, each storage once."""
    specs: dict[object, TensorSpec] = {}
    for spec in specs_of(model.state_dict()):
        specs.setdefault(spec.key if spec.storage is None else spec.storage, spec)
    return Architecture(name, tuple(TensorSpec(spec.key, spec.shape, spec.dtype) for spec in specs.values()))


def _built() -> Iterator[Architecture]:
    yield from _buildable(_torchvision_builders())
    yield from islice(_buildable(_timm_builders()), TIMM_COUNT)


def _buildable(builders: Iterator[tuple[str, Callable[[], nn.Module]]]) -> Iterator[Architecture]:
    for name, builder in builders:
        try:
            model = build_on_meta(builder)
        except (RuntimeError, NotImplementedError):
            continue
        architecture = architecture_of(name, model)
        if len(architecture.specs) <= MOST_TENSORS:
            yield architecture


def _torchvision_builders() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    for name in sorted(torchvision.models.list_models()):
        if not name.startswith("quantized_"):  # the same networks again, with their names
            options = {"weights_backbone": None} if any(word in name for word in _WITH_BACKBONE) else {}
            yield f"torchvision.{name}", partial(torchvision.models.get_model, name, weights=None, **options)


def _timm_builders() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Take the first name of each module, then a name from the middle of each, and so on."""
    lists = [sorted(timm.list_models(module=module)) for module in sorted(timm.list_modules())]
    shares = (0, 1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8)
    picked = ([names[int(len(names) * share)] for names in lists if names] for share in shares)
    spread = dict.fromkeys(chain.from_iterable(picked))
    for name in spread:
        yield f"timm.{name}", partial(timm.create_model, name)


def _all_of_timm() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    for name in sorted(timm.list_models()):
        yield f"timm.{name}", partial(timm.create_model, name)


def _read_spec(key: str, shape: Sequence[int], dtype: str) -> TensorSpec:
    return TensorSpec(key, tuple(shape), getattr(torch, dtype))


def _cache_file() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autoalign-benchmarks"
    names = "-".join(f"{package}-{version(package)}" for package in ("torchvision", "timm"))
    return folder / f"architectures-{names}-{TIMM_COUNT}-{MOST_TENSORS}.json.gz"


def _write(path: Path, data: bytes) -> None:
    """Write a file at once or not at all, so that another process never reads a part of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as handle:
            handle.write(data)
        Path(handle.name).replace(path)
    except OSError:
        return
