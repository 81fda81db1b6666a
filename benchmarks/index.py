"""Write the index of known architectures that ``identify`` looks them up in: ``python -m benchmarks.index``.

It holds every architecture of torchvision (but the quantised ones, which are the same networks again), of timm and of
mmpretrain, the default configuration of every family of transformers, and the published sizes of
``cases/published.py``; those of transformers as they are in memory and, where experts are apart there or names are
others, as they are in files. All are built without memory, and nothing is downloaded. That takes a quarter of an hour;
what was built is kept in ``build/index`` for the versions of the libraries that are installed. mmpretrain 1.2 wants
``pip install 'mmcv-lite<2.2' mmengine model-index einops mat4py`` beside it, and ``--no-deps`` itself.
"""

from __future__ import annotations

import gzip
import inspect
import io
import json
import os
import pickle
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from torch import nn

from autoalign.matching.architectures import INDEX_FILE, fingerprint, numeric, shapes_by_name
from autoalign.plan.operations import Shape
from autoalign.plan.specs import TensorSpec, specs_of
from benchmarks.cases.architectures import build_on_meta
from benchmarks.cases.published import published

CLASSES = 1237  # a prime that no size of a network is a multiple of, so that heads are seen
LIBRARIES = ("torchvision", "timm", "transformers", "mmpretrain")
_CACHE = Path("build/index")
_MAX_BYTES = 3_000_000


@dataclass(frozen=True, slots=True)
class Built:
    """A network of a library, with heads of ``CLASSES`` classes where it has any."""

    library: str
    name: str
    builder: tuple[str, ...]  # of transformers: as the command line takes it, and the class of its configuration; of
    # mmpretrain: its whole name, with how it was trained
    specs: tuple[TensorSpec, ...]


def built() -> Iterator[Built]:
    """Build all networks, or read those that were built before; what cannot be built is named on stderr."""
    for library, builders in zip(LIBRARIES, (_torchvision, _timm, _transformers, _mmpretrain), strict=True):
        path = _CACHE / f"{library}-{version(library)}.gz"
        if path.is_file():
            yield from (Built(*each) for each in pickle.loads(gzip.decompress(path.read_bytes())))
            continue
        found = []
        for name, builder, ways in builders():
            if model := _first_built(f"{library}:{name}", ways):
                for state_dict in _state_dicts(model):
                    specs = tuple(TensorSpec(spec.key, spec.shape, spec.dtype) for spec in specs_of(state_dict))
                    found.append(Built(library, name, builder, specs))
                    yield found[-1]
        _CACHE.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            gzip.compress(pickle.dumps([(one.library, one.name, one.builder, one.specs) for one in found]))
        )


def _state_dicts(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield a model's own state dict, and what transformers saves of it where that has other names or other parts.

    Each of a class that may be built without a pooler is there without one too, as models with other heads hold it.
    """
    forms = [dict(model.state_dict())]
    with suppress(Exception):  # of what transformers cannot revert on the meta device
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion

        if isinstance(model, PreTrainedModel):
            saved = revert_weight_conversion(model, dict(forms[0]))
            forms = [saved, *(forms if saved.keys() != forms[0].keys() else [])]
    for form in forms:
        yield form
        if "add_pooling_layer" in inspect.signature(type(model)).parameters:
            yield {key: value for key, value in form.items() if not key.startswith("pooler.")}


_Builder = tuple[str, tuple[str, ...], list[Callable[[], nn.Module]]]


def _first_built(name: str, ways: Sequence[Callable[[], nn.Module]]) -> nn.Module | None:
    failure: Exception | None = None
    for way in ways:
        try:
            return build_on_meta(way)
        except Exception as error:  # any, since the code is not ours
            failure = error
    print(f"{name} is left out: {type(failure).__name__}: {str(failure)[:100]}", file=sys.stderr)
    return None


def _torchvision() -> Iterator[_Builder]:
    for name in torchvision.models.list_models():
        if not name.startswith("quantized_"):
            builder = torchvision.models.get_model_builder(name)
            downloads = {"weights", "weights_backbone"} & inspect.signature(builder).parameters.keys()
            make = partial(builder, **dict.fromkeys(downloads))
            options = ("weights_backbone=None",) if "weights_backbone" in downloads else ()
            yield name, options, [partial(make, num_classes=CLASSES), make]


def _timm() -> Iterator[_Builder]:
    for name in timm.list_models():
        yield name, (), [partial(timm.create_model, name, num_classes=CLASSES), partial(timm.create_model, name)]


def _transformers() -> Iterator[_Builder]:
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.dinat import modeling_dinat
    from transformers.models.layoutlmv2 import modeling_layoutlmv2

    modeling_dinat.requires_backends = lambda *_: None  # natten computes its attention, and holds no tensor of it
    modeling_layoutlmv2.requires_backends = lambda *_: None
    modeling_layoutlmv2.LayoutLMv2VisualBackbone = _DetectronBackbone
    modeling_layoutlmv2.detectron2 = SimpleNamespace(layers=SimpleNamespace(FrozenBatchNorm2d=_DetectronBackbone))
    for name, class_name, options in published():
        kind = getattr(transformers, class_name)
        arguments = ", ".join(f"{key}={value!r}" for key, value in options.items())
        builder = f"{class_name}({arguments})", kind.config_class.__name__
        yield name, builder, [partial(_of_config, kind, kind.config_class, options)]
    mappings = [getattr(modeling_auto, name) for name in dir(modeling_auto) if name.endswith("_MAPPING")]
    mappings = [mapping for mapping in mappings if isinstance(mapping, type(modeling_auto.MODEL_MAPPING))]
    mappings.sort(key=lambda mapping: mapping is not modeling_auto.MODEL_MAPPING)
    seen = set()
    for model_type in transformers.CONFIG_MAPPING:
        config = transformers.CONFIG_MAPPING[model_type]
        with suppress(Exception):  # of a family whose code needs what is not installed
            kind = next((mapping[config] for mapping in mappings if config in mapping), None) or _part_of(config)
            kind = kind[0] if isinstance(kind, Sequence) else kind
            if kind not in seen:
                seen.add(kind)
                yield kind.__name__, (f"{kind.__name__}()", config.__name__), [partial(_of_config, kind, config, {})]


class _DetectronBackbone(nn.Module):
    """The ResNeXt-101 with a pyramid of features that LayoutLMv2 takes from detectron2, which no registry has.

    It is made of torchvision's, with detectron2's names, and holds the tensors alone.
    """

    def __init__(self, _config: object) -> None:
        super().__init__()
        resnext: Any = torchvision.models.resnext101_32x8d()
        self.backbone: Any = nn.Module()
        self.backbone.bottom_up = bottom_up = nn.Module()
        bottom_up.stem = nn.Module()
        bottom_up.stem.conv1 = self._with_norm(resnext.conv1, resnext.bn1)
        for level in range(2, 6):
            stage = getattr(resnext, f"layer{level - 1}")
            bottom_up.add_module(f"res{level}", stage)
            for block in stage:
                if block.downsample is not None:
                    block.shortcut, block.downsample = self._with_norm(*block.downsample), None
                for number in (1, 2, 3):
                    self._with_norm(getattr(block, f"conv{number}"), block._modules.pop(f"bn{number}"))
            self.backbone.add_module(f"fpn_lateral{level}", nn.Conv2d(256 * 2 ** (level - 2), 256, 1))
            self.backbone.add_module(f"fpn_output{level}", nn.Conv2d(256, 256, 3))

    @staticmethod
    def _with_norm(conv: nn.Module, norm: nn.Module) -> nn.Module:
        conv.norm = norm
        return conv


def _part_of(config: type) -> type[nn.Module]:
    """Return the class of a part of a model, which transformers builds by no name, such as a text tower alone."""
    module = import_module(config.__module__.replace("configuration_", "modeling_"))
    classes = (vars(module)[name] for name in module.__all__ if not name.endswith("PreTrainedModel"))
    kind: type[nn.Module] = next(kind for kind in classes if getattr(kind, "config_class", None) is config)
    return kind


def _mmpretrain() -> Iterator[_Builder]:
    """A name is that of a network, then how it was trained; of what is no classifier the method comes first."""
    from mmpretrain import get_model, list_models
    from mmpretrain.apis.model import ModelHub

    for name in sorted(list_models(), key=len):
        with suppress(Exception):  # of a configuration that cannot be read
            is_classifier = ModelHub.get(name).config.model.type == "ImageClassifier"
            short = "_".join(name.split("_")[: 1 if is_classifier else 2])
            make = partial(get_model, name)
            yield short, (name,), [partial(make, head={"num_classes": CLASSES}), make]


def _of_config(kind: type[nn.Module], config: Callable[..., Any], options: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return kind(config(**options))


def head_of(shape: Shape) -> Shape:
    """Write sizes that depend on the number of classes as multiples of it, with a minus.

    >>> head_of((4 * CLASSES, 1024)), head_of((1024, 1024))
    ((-4, 1024), (1024, 1024))
    """
    return tuple(-(size // CLASSES) if size % CLASSES == 0 else size for size in shape)


def arrays_of(networks: Iterable[Built], versions: Mapping[str, str]) -> dict[str, Any]:
    """Make the index of some networks."""
    shapes, names = _Numbers(), _Numbers()  # all that occur
    groups, heads, name_sets = _Numbers(), _Numbers(), _Numbers()
    blocks: list[set[int]] = []
    depths: list[int] = []
    entries, seen = list[tuple[Any, ...]](), set[tuple[int, str]]()
    for network in networks:
        specs = [replace(spec, shape=head_of(spec.shape)) for spec in numeric(network.specs)]
        own = fingerprint(specs)
        body = Counter({shape: count for shape, count in own.shapes.items() if min(shape) > 0})
        head = sorted(shape for shape in own.shapes.elements() if min(shape) < 0)
        if not body:
            continue
        group = groups[frozenset((shapes[shape], count) for shape, count in body.items())]
        if group == len(blocks):
            blocks.append(set())
            depths.append(own.depth)
        blocks[group] |= set(own.blocks)
        kind = network.builder[0].partition("(")[0] if network.library == "transformers" else network.name
        builder = group, f"{network.library}:{kind}"
        if builder in seen:  # the defaults of a configuration are among its published sizes
            continue
        seen.add(builder)
        by_name = {(names[name], shapes[shape]) for name, found in shapes_by_name(specs).items() for shape in found}
        numbered = heads[tuple(shapes[shape] for shape in head)], name_sets[frozenset(by_name)]
        entries.append((network.library, network.name, group, *numbered, *network.builder))
    entries.sort(key=lambda entry: (entry[2], *_rank(entry[0], entry[1], "".join(entry[5:6]))))
    about = json.dumps({"versions": dict(versions), "entries": entries}, separators=(",", ":"))
    return {
        "about": np.frombuffer(about.encode(), dtype=np.uint8),
        "names": np.frombuffer("\n".join(names).encode(), dtype=np.uint8),
        "ranks": np.array([len(shape) for shape in shapes], dtype=np.uint8),
        "dims": np.array([size for shape in shapes for size in shape], dtype=np.int32),
        "depths": np.array(depths, dtype=np.uint16),
        **_ragged("shape_starts", map(sorted, groups), shape_numbers=np.uint16, shape_counts=np.uint32),
        **_ragged("block_starts", ([(one,) for one in sorted(group)] for group in blocks), block_hashes=np.uint32),
        **_ragged("head_starts", ([(one,) for one in head] for head in heads), head_shapes=np.uint16),
        **_ragged("name_starts", map(sorted, name_sets), name_numbers=np.uint16, name_shapes=np.uint16),
    }


class _Numbers(dict[Any, int]):
    """A number for each value, in the order in which they first come."""

    def __missing__(self, value: Any) -> int:
        self[value] = len(self)
        return self[value]


def _rank(library: str, name: str, builder: str) -> tuple[bool, bool, int, int, str]:
    """Order names of one network: published ones are before names of classes, and short ones are the originals."""
    return library == "mmpretrain", builder == f"{name}()", len(name), LIBRARIES.index(library), name


def _ragged(starts: str, lists: Iterable[Sequence[tuple[int, ...]]], **columns: Any) -> dict[str, Any]:
    """Return lists of different lengths as arrays: one for each column, and where each list starts."""
    rows = list(lists)
    flat = [item for row in rows for item in row]
    ends = np.cumsum([len(row) for row in rows])
    arrays = {
        name: np.array([item[place] for item in flat]).astype(dtype, casting="unsafe")
        for place, (name, dtype) in enumerate(columns.items())
    }
    for place, array in enumerate(arrays.values()):
        assert array.tolist() == [item[place] for item in flat], "a number is too large for its column"
    return {**arrays, starts: np.array([0, *ends], dtype=np.uint32)}


def main() -> None:
    """Build all, and write the index into the package."""
    warnings.simplefilter("ignore")
    networks = list(built())
    arrays = arrays_of(networks, {library: version(library) for library in LIBRARIES})
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)
    if data.tell() > _MAX_BYTES:
        raise SystemExit(f"The index would have {data.tell():,} bytes, more than {_MAX_BYTES:,}. Nothing was written.")
    INDEX_FILE.write_bytes(data.getvalue())
    names = {(network.library, network.name) for network in networks}
    counts = {library: sum(library == each for each, _ in names) for library in LIBRARIES}
    print(f"{INDEX_FILE.name}: {counts}, {len(arrays['depths']):,} different ones, {data.tell():,} bytes")


if __name__ == "__main__":
    main()
