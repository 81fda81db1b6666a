"""HDF5 files, as of Keras, through the package ``h5py``.

Keras 2 names its variables, ``conv1/kernel:0``. Keras 3 numbers those of each layer, ``layers/conv2d/vars/0``: they get
the names of Keras 2 by their number, their shapes and the class of the layer, which the configuration of a ``.keras``
archive states and which automatic names show. What is left open, such as the first of the three vectors of a batch norm
that may have no scale or no centre, is left out. Layers are in the order of the configuration where there is one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoalign.checkpoints.config import folder_config
from autoalign.checkpoints.containers import TRAINING_WORDS, name_words
from autoalign.checkpoints.stored import (
    Contents,
    Place,
    StoredTensor,
    as_tensor,
    left_out_notes,
    mapped_bytes,
    reading,
    torch_dtype,
)
from autoalign.errors import DependencyError, listed
from autoalign.plan.keys import natural

_KIND = "an HDF5 file"
_MAX_RATIO = 1040  # of values to their bytes in the file: deflate reaches 1032
_MAX_LAYERS = 2**16
_PROGRAM = Path(__file__).with_name("hdf5_process.py")
_SECONDS = 30.0  # for what is not read in that, and the bytes below more
_BYTES_PER_SECOND = 2**23
_NORM = ("gamma", "beta", "moving_mean", "moving_variance")
_PRELU = frozenset({"p", "re", "lu"})
_PASSED = frozenset({"layers"})  # names of groups that say nothing of a layer
_SKIPPED = TRAINING_WORDS | {"seed"}


def is_hdf5(head: bytes) -> bool:
    """Return True if a file that begins with ``head`` is one of HDF5."""
    return head.startswith(b"\x89HDF\r\n\x1a\n")


def open_hdf5(file: Path) -> Contents:
    """Read the tree of an HDF5 file; arrays are mapped, or read when they are asked for; nothing outside it is read.

    Raises:
        CheckpointError: The file is damaged, or has no arrays of numbers.
        DependencyError: The package ``h5py`` is not installed.
    """
    if find_spec("h5py") is None:
        raise DependencyError.reading("HDF5 files, such as those of Keras,", "h5py")

    root: dict[str, object] = {}
    left_out: list[str] = []
    with reading(file, _KIND):
        layers = _layers(folder_config(file.parent)[0])
        tree = json.loads(_run(file))
        mapped = cache(partial(mapped_bytes, file))
        for key, path, array in _named(tree, layers, left_out):
            dtype = np.dtype(array["dtype"])
            kind = torch.bfloat16 if dtype == np.dtype("V2") else torch_dtype(dtype)
            if kind is None or array["shape"] is None:
                left_out.append(key)
                continue
            shape, offset = tuple(array["shape"]), array["offset"]
            size, stored = prod(shape) * kind.itemsize, array["stored"]
            is_mapped = offset is not None and stored == size and offset + size <= file.stat().st_size
            if not is_mapped and (offset is not None or size > _MAX_RATIO * stored):
                raise ValueError(f"the values of {path} are not all in the file")
            if key in root:
                raise ValueError(f"it has {key} twice")
            read = partial(_mapped, mapped, offset) if is_mapped else partial(_read, file, path)
            tensor = partial(_tensor, file, partial(read, shape, dtype), kind)
            root[key] = StoredTensor(shape, kind, tensor, is_mapped=is_mapped and dtype.isnative)
    notes: tuple[str, ...] = ()
    if left_out:
        what = f"{len(left_out)} arrays of the file whose names or values are open ({listed(left_out)})"
        notes = left_out_notes(file, root, what, "Save the model as .keras or whole, with its configuration.")
    return Contents(root, "HDF5 file", notes=notes)


def _run(file: Path, *path: str, size: int = 0) -> bytes:
    """Run the HDF5 library in a process of its own, which may not end or may crash on a damaged file."""
    environment = os.environ | {"HDF5_PLUGIN_PRELOAD": "::"}  # no plugins
    place = Place.of(file)
    command = [sys.executable, "-P", str(_PROGRAM), str(place.file), str(place.start), str(place.size), *path]
    seconds = _SECONDS + size / _BYTES_PER_SECOND
    done = subprocess.run(command, capture_output=True, timeout=seconds, env=environment, check=False)
    if done.returncode:
        raise ValueError(done.stderr.decode(errors="replace").strip().rpartition("\n")[2] or "the library ended")
    return done.stdout


def _mapped(mapped: Callable[[], Tensor], offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    array = np.ndarray(shape, dtype, mapped().numpy(), offset)
    return array if array.flags.aligned else array.copy()


def _read(file: Path, path: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    values = _run(file, path, size=prod(shape) * dtype.itemsize)
    return np.frombuffer(bytearray(values), dtype).reshape(shape)


def _tensor(file: Path, read: Callable[[], np.ndarray], dtype: torch.dtype) -> Tensor:
    with reading(file, _KIND):
        return as_tensor(read(), dtype)


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


_Found = tuple[str, str, dict[str, Any]]  # the key of an array, its path in the file, and what it is


def _named(tree: dict[str, Any], layers: Mapping[str, _Layer], left_out: list[str]) -> Iterator[_Found]:
    """Yield the arrays of a file with their keys."""

    def own_name(name: str, group: dict[str, Any]) -> str:
        given = group.get("members", {}).get("vars", {}).get("texts", {}).get("name")
        return given if isinstance(given, str) else name

    def walk(group: dict[str, Any], path: str, key: str, hint: str = "") -> Iterator[_Found]:
        inner = group["members"]
        is_list = hint == "layers"
        called = {name: own_name(name, child) if is_list else name for name, child in inner.items()}
        order = {name: layers[called[name]].place for name in inner if called[name] in layers}
        for name in sorted(inner, key=lambda name: (order.get(name, len(layers)), natural(name))):
            child, below = inner[name], f"{key}.{called[name]}" if key else called[name]
            if "members" not in child:
                yield below, f"{path}/{name}", child
            elif name == "vars":
                yield from variables(child, f"{path}/vars", key, f"{hint} {own_name('', group)}")
            elif not name_words(name) & _SKIPPED:
                yield from walk(child, f"{path}/{name}", key if name in _PASSED else below, name)

    def variables(group: dict[str, Any], path: str, key: str, hint: str) -> Iterator[_Found]:
        inner = {name: child for name, child in group["members"].items() if "members" not in child}
        arrays = sorted(inner, key=natural)
        layer = layers.get(hint.rpartition(" ")[2])
        names = _variables([tuple(inner[name]["shape"] or ()) for name in arrays], hint, layer) if key else None
        for place, name in enumerate(arrays):
            own = f"{key}.{names[place] if names else place}".lstrip(".")
            if names or not key:
                yield own, f"{path}/{name}", inner[name]
            else:
                left_out.append(own)

    start = "/model_weights" if "layer_names" in tree["members"].get("model_weights", {}).get("texts", {}) else ""
    known = tree["members"]["model_weights"] if start else tree
    if "layer_names" not in known["texts"]:
        yield from walk(tree, "", "")
        return
    for layer in known["texts"]["layer_names"]:
        group = known["members"][layer]
        for name in group["texts"]["weight_names"]:
            array = group
            for part in name.split("/"):
                array = array["members"][part]
            own = name if name.partition("/")[0] == layer else f"{layer}/{name}"
            yield own.partition(":")[0].replace("/", "."), f"{start}/{layer}/{name}", array


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
