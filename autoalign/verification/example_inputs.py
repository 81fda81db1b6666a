"""Example inputs: what a module may be called with, guessed from its settings, its signature and its first layers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor, nn

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
# what takes inputs of each kind first; inputs whose names tell nothing are tried in this order
_LAYERS: dict[str, tuple[type[nn.Module], ...]] = {
    "image": (nn.Conv2d,),
    "ids": (nn.Embedding,),
    "vectors": (nn.Linear, *_RECURRENT),
    "features": (nn.Conv1d, nn.Linear, *_RECURRENT),
    "wave": (nn.Conv1d,),
    "video": (nn.Conv3d,),
}
_NAMED = {  # what the names of arguments mean in transformers and elsewhere
    "pixel_values_videos": "video",
    "pixel_values": "image",
    "input_features": "features",
    "input_values": "wave",
    "decoder_input_ids": "ids",
    "input_ids": "ids",
}
_WIDTHS = ("in_channels", "in_features", "input_size", "num_embeddings")  # attributes of layers
_CHANNELS = ("num_channels", "in_chans", "in_channels")  # of image models without convolutions
_SIZE_NAMES = ("img_size", "image_size", "input_resolution")  # of image models
_SIZES = (224, 256, 384, 112, 64, 32)  # of images, where no attribute tells one
_FRAMES, _SAMPLES, _MEL_FRAMES, _TOKENS, _CODES = 16, 16000, 3000, 8, 5

_Shape = tuple[int, ...]
Guess = tuple[object, str]  # what a module is called with, as `call` takes it, and where that comes from


def guessed_inputs(module: nn.Module) -> Iterator[Guess]:
    """Yield what a module may be called with, the likeliest first; the caller tries them in this order.

    >>> inputs, reason = next(guessed_inputs(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))))
    >>> inputs[0].shape, reason
    (torch.Size([1, 8]), 'ids [1, 8] by the first Embedding')
    """
    try:
        parameters = [p for p in inspect.signature(module.forward).parameters.values() if p.kind not in (2, 4)]
    except ValueError:  # of compiled code
        parameters = []
    required = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    shapes = _shapes(module)
    dtype = next((t.dtype for t in module.parameters() if t.is_floating_point() and t.dtype.itemsize > 1), None)

    def made(kind: str, shape: _Shape) -> Tensor:
        if kind == "ids":
            return torch.arange(_TOKENS)[None] % _CODES
        return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)

    def described(kind: str, shape: _Shape, said: str) -> str:
        return f"{kind} {list(shape)} by {said}"

    kinds = {p.name: _NAMED[p.name] for p in parameters if _NAMED.get(p.name) in shapes}
    main = str(getattr(module, "main_input_name", ""))
    sets = [kinds] if main in kinds or required else []
    sets += [{name: kinds[name]} for name in dict.fromkeys((main, *kinds)) if name in kinds and len(kinds) > 1]
    for names in filter(None, sets):
        for chosen in product(*(shapes[kind] for kind in names.values())):
            inputs = [(name, kind, *each) for (name, kind), each in zip(names.items(), chosen, strict=True)]
            text = " and ".join(f"{name}: {described(kind, shape, said)}" for name, kind, shape, said in inputs)
            yield {name: made(kind, shape) for name, kind, shape, _ in inputs}, text
        dummies = getattr(module, "dummy_inputs", None)
        if names.keys() == {"input_ids"} and isinstance(dummies, Mapping):
            yield dict(dummies), "dummy_inputs"
    count = max(len(required), 1)
    places = {id(layer): place for place, layer in enumerate(module.modules())}
    for kind in sorted(shapes, key=lambda kind: places.get(id(_first(module, kind)), len(places))):
        for shape, said in shapes[kind]:
            yield (made(kind, shape),) * count, described(kind, shape, said) + (f", {count} times" * (count > 1))
            if count > 1 and kind == "ids":  # as tokens with what is attended to
                for other, also in shapes.get("vectors", ()):
                    rest = [made("vectors", other)] * (count - 1)
                    yield (made(kind, shape), *rest), f"{described(kind, shape, said)} and vectors {list(other)} {also}"


def _first(module: nn.Module, kind: str) -> nn.Module | None:
    return next((layer for layer in module.modules() if isinstance(layer, _LAYERS[kind])), None)


def _shapes(module: nn.Module) -> dict[str, list[tuple[_Shape, str]]]:
    """Return the shapes of inputs of each kind that the first layers of a module may take, and what tells so."""
    found: dict[str, list[tuple[_Shape, str]]] = {}
    for kind in _LAYERS:
        layer = _first(module, kind)
        said = f"the first {type(layer).__name__}" if layer else "default"
        width = _attribute([layer], _WIDTHS, 0) if layer else 0
        if kind == "image" and (width or not any(isinstance(each, nn.Embedding) for each in module.modules())):
            channels = width or _attribute(module.modules(), _CHANNELS, 3)
            fewest = min(
                (each.in_channels for each in module.modules() if isinstance(each, nn.Conv2d)), default=channels
            )
            found[kind] = [
                ((1, *((count, *size)[-3:])), reason)
                for count in dict.fromkeys((channels, fewest))  # layers may be registered in any order
                for size, reason in _sizes(module, said)
            ]
        elif not width:
            continue
        elif kind == "video":
            for size, reason in _sizes(module, said):
                found.setdefault(kind, []).extend(
                    ((1, *order, *size[-2:]), reason) for order in ((width, _FRAMES), (_FRAMES, width))
                )
        elif kind == "wave":
            found[kind] = [((1, width, _SAMPLES), said), ((1, _SAMPLES), said)]
        elif kind == "features" and isinstance(layer, nn.Conv1d):
            found[kind] = [((1, width, _MEL_FRAMES), said)]
        elif kind == "ids":
            found[kind] = [((1, _TOKENS), said)]
        else:
            found[kind] = [((1, _TOKENS, width), said), ((1, width), said)]
    return found


def _sizes(module: nn.Module, said: str) -> list[tuple[_Shape, str]]:
    """List the sizes that images may have, some with channels, and what tells so, the surest first."""
    sizes: dict[_Shape, str] = {}
    for name in ("pretrained_cfg", "default_cfg"):  # timm's
        config = getattr(module, name, None)
        size = config.get("input_size") if isinstance(config, Mapping) else None
        if isinstance(size, tuple | list):
            sizes.setdefault(tuple(size), name)
    attributes: dict[_Shape, str] = {}
    for layer in (getattr(module, "config", None), *module.modules()):
        for name in _SIZE_NAMES:
            size = getattr(layer, name, None)
            shape = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, tuple | list) else ()
            if len(shape) in (2, 3) and all(isinstance(side, int) for side in shape):
                attributes.setdefault(shape, f"{name} of {type(layer).__name__}")
    for shape in sorted(attributes, key=lambda shape: -shape[-1]):  # inner layers have those of their own inputs
        sizes.setdefault(shape, attributes[shape])
    for side in _SIZES:
        sizes.setdefault((side, side), said)
    return list(sizes.items())


def _attribute(layers: Iterator[nn.Module] | Sequence[nn.Module], names: Sequence[str], default: int) -> int:
    found = (getattr(layer, name, None) for layer in layers for name in names)
    return next((value for value in found if isinstance(value, int)), default)
