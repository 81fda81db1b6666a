"""HDF5 files, as of Keras, through the package ``h5py``.

Keras 2 names its variables, ``conv1/kernel:0``. Keras 3 numbers those of each layer, ``layers/conv2d/vars/0``: they get
the names of Keras 2 by their number, their shapes and the class of the layer, which the configuration of a ``.keras``
archive states and which automatic names show. What is left open, such as the first of the three vectors of a batch norm
that may have no scale or no centre, is left out. Layers are in the order of the configuration where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoalign.checkpoints.config import folder_config
from autoalign.checkpoints.containers import TRAINING_WORDS, name_words
from autoalign.checkpoints.stored import (
    MAX_MEMBERS,
    Contents,
    StoredTensor,
    as_tensor,
    left_out_notes,
    reading,
    torch_dtype,
)
from autoalign.errors import DependencyError, listed
from autoalign.plan.keys import natural
from autoalign.plan.regions import Region

_KIND = "an HDF5 file"
_MAX_RATIO = 1040  # of values to their bytes in the file: deflate reaches 1032
_MAX_DEPTH = 64
_MAX_LAYERS = 2**16
_NORM = ("gamma", "beta", "moving_mean", "moving_variance")
_PRELU = frozenset({"p", "re", "lu"})
_PASSED = frozenset({"layers"})  # names of groups that say nothing of a layer
_SKIPPED = TRAINING_WORDS | {"seed"}


def is_hdf5(head: bytes) -> bool:
    """Return True if a file that begins with ``head`` is one of HDF5."""
    return head.startswith(b"\x89HDF\r\n\x1a\n")


def open_hdf5(file: Path) -> Contents:
    """Read the tree of an HDF5 file; arrays are read when they are asked for, and nothing outside the file is.

    Raises:
        CheckpointError: The file is damaged, or has no arrays of numbers.
        DependencyError: The package ``h5py`` is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise DependencyError.reading("HDF5 files, such as those of Keras,", "h5py") from error

    @cache
    def opened() -> Any:
        return h5py.File(file, "r")

    def stored(path: str, shape: tuple[int, ...], dtype: torch.dtype) -> StoredTensor:
        def region(part: Region | None) -> Tensor:
            place: Any = () if part is None else tuple(slice(start, start + length) for start, length in part)
            with reading(file, _KIND):
                return as_tensor(np.asarray(opened()[path][place]), dtype)

        return StoredTensor(shape, dtype, lambda: region(None), read_region=region)

    root: dict[str, object] = {}
    left_out: list[str] = []
    with reading(file, _KIND):
        layers = _layers(folder_config(file.parent)[0])
        with h5py.File(file, "r") as source:
            for key, path in _named(source, h5py, layers, left_out):
                dataset = source[path]
                kind = torch.bfloat16 if dataset.dtype == np.dtype("V2") else torch_dtype(dataset.dtype)
                if kind is None or dataset.shape is None:
                    left_out.append(key)
                    continue
                size = prod(dataset.shape) * kind.itemsize
                if dataset.external or dataset.is_virtual or size > _MAX_RATIO * dataset.id.get_storage_size():
                    raise ValueError(f"the values of {path} are not all in the file")
                if key in root:
                    raise ValueError(f"it has {key} twice")
                root[key] = stored(path, tuple(dataset.shape), kind)
    notes: tuple[str, ...] = ()
    if left_out:
        what = f"{len(left_out)} arrays of the file whose names or values are open ({listed(left_out)})"
        notes = left_out_notes(file, root, what, "Save the model as .keras or whole, with its configuration.")
    return Contents(root, "HDF5 file", notes=notes)


@dataclass(frozen=True, slots=True)
class _Layer:
    """What the configuration of a model says of a layer."""

    place: int
    kind: str  # the name of its class
    settings: Mapping[str, object] = field(default_factory=dict)


def _layers(config: object) -> dict[str, _Layer]:
    """List the layers of a configuration of Keras by their names."""
    found: dict[str, _Layer] = {}
    left = [config]
    while left and len(found) < _MAX_LAYERS:
        value = left.pop()
        if isinstance(value, Mapping):
            kind, settings = value.get("class_name"), value.get("config")
            if (
                isinstance(kind, str)
                and isinstance(settings, Mapping)
                and isinstance(name := settings.get("name"), str)
            ):
                found.setdefault(name, _Layer(len(found), kind, settings))
            left.extend(reversed(list(value.values())))
        elif isinstance(value, list):
            left.extend(reversed(value))
    return found


def _named(source: Any, h5py: Any, layers: Mapping[str, _Layer], left_out: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the key and the path in the file of each array."""
    seen = 0

    def children(group: Any, depth: int) -> dict[str, Any]:
        nonlocal seen
        # links to other files, or to other places of this one, are not followed
        names = [name for name in group if isinstance(group.get(name, getlink=True), h5py.HardLink)]
        seen += len(names)
        if seen > MAX_MEMBERS or depth > _MAX_DEPTH:
            raise ValueError(f"it has more than {MAX_MEMBERS:,} members, or more than {_MAX_DEPTH} in each other")
        return {name: group[name] for name in names}

    def own_name(name: str, group: Any) -> str:
        variables = group.get("vars") if isinstance(group, h5py.Group) else None
        given = variables.attrs.get("name") if isinstance(variables, h5py.Group) else None
        return given if isinstance(given, str) else name

    def walk(group: Any, key: str, depth: int, hint: str = "") -> Iterator[tuple[str, str]]:
        inner = children(group, depth)
        is_list = group.name.rpartition("/")[2] == "layers"
        called = {name: own_name(name, child) if is_list else name for name, child in inner.items()}
        order = {name: layers[called[name]].place for name in inner if called[name] in layers}
        for name in sorted(inner, key=lambda name: (order.get(name, len(layers)), natural(name))):
            child = inner[name]
            path = f"{key}.{called[name]}" if key else called[name]
            if isinstance(child, h5py.Dataset):
                yield path, child.name
            elif name == "vars":
                yield from variables(child, key, depth + 1, f"{hint} {own_name('', group)}")
            elif not name_words(name) & _SKIPPED:
                yield from walk(child, key if name in _PASSED else path, depth + 1, name)

    def variables(group: Any, key: str, depth: int, hint: str) -> Iterator[tuple[str, str]]:
        inner = children(group, depth)
        arrays = [inner[name] for name in sorted(inner, key=natural) if isinstance(inner[name], h5py.Dataset)]
        layer = layers.get(hint.rpartition(" ")[2])
        names = _variables([array.shape or () for array in arrays], hint, layer) if key else None
        for place, array in enumerate(arrays):
            path = f"{key}.{names[place] if names else place}".lstrip(".")
            if names or not key:
                yield path, array.name
            else:
                left_out.append(path)

    known = source.get("model_weights") if isinstance(source.get("model_weights"), h5py.Group) else source
    lists = known.attrs.get("layer_names")
    if lists is None:
        yield from walk(source, "", 0)
        return
    for layer in map(_text, lists):
        for name in map(_text, known[layer].attrs["weight_names"]):
            head = name.partition("/")[0]
            key = name if head == layer else f"{layer}/{name}"
            yield key.partition(":")[0].replace("/", "."), f"{known.name}/{layer}/{name}".replace("//", "/")


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _variables(shapes: Sequence[tuple[int, ...]], hint: str, layer: _Layer | None) -> tuple[str, ...] | None:
    """Name the variables of a layer, in the order in which Keras makes them; None where it is open what they are.

    >>> _variables([(3, 3, 8, 16), (16,)], "conv2d", None)
    ('kernel', 'bias')
    >>> _variables([(8,), (8,), (8,)], "bn", None) is None
    True

    Args:
        shapes: Theirs.
        hint: Names of the layer.
        layer: What the configuration says.
    """
    settings = layer.settings if layer else {}
    words = name_words(f"{hint} {layer.kind if layer else ''}")
    first, *rest = shapes or [()]
    if words >= _PRELU:
        return ("alpha",) if len(shapes) == 1 else None
    if len(first) > 1:
        return _kernels(first, rest, "embeddings" if "embedding" in words else "kernel")
    if len(first) != 1 or set(shapes) != {first}:
        return None
    is_batch = "batch" in words
    if words >= _PRELU or "rms" in words:
        names: tuple[str, ...] = ("alpha" if words >= _PRELU else "gamma",)
    elif layer is not None and "normalization" in words:
        used = (settings.get("scale", True), settings.get("center", True), is_batch, is_batch)
        names = tuple(name for name, is_used in zip(_NORM, used, strict=True) if is_used)
    else:
        names = _NORM if len(shapes) == 4 else () if is_batch else _NORM[:2]
    return names if len(names) == len(shapes) else None


def _kernels(first: tuple[int, ...], rest: Sequence[tuple[int, ...]], name: str) -> tuple[str, ...] | None:
    """Name variables of which the first is a kernel."""
    if not rest:
        return (name,)
    second, *bias = rest
    if len(second) < len(first):
        return None if bias else (name, "bias")
    if len(first) == len(second) == 2 and second[1] == first[1] and second[0] and second[1] % second[0] == 0:
        names: tuple[str, ...] = ("kernel", "recurrent_kernel", "bias")
    elif len(first) == len(second) > 2 and set(second[:-2]) == {1}:
        names = ("depthwise_kernel", "pointwise_kernel", "bias")
    else:
        return None
    return names[: 2 + len(bias)] if len(bias) < 2 else None
