"""Weights that are saved as what they are computed from: weight norm, spectral norm and pruning, by torch's own names.

Each is a row of ``PARAMETRISATIONS`` and a function. A side that has plain weights gets the combined ones; where both
sides have a parametrisation, its tensors are matched as any others are. Names without their dots, as averages of
weights may have them, are read here too: such a tensor is its own weight under another name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from autoalign.errors import InputError
from autoalign.plan.keys import LEVELS, common_module, components, split_key
from autoalign.plan.operations import Copy, Operation, Shape
from autoalign.plan.specs import TensorSpec

_MIN_UNDOTTED = 8  # tensors of one module whose names may have lost their dots
_MIN_SHARE = 0.8  # of them whose names with dots are found, since an average has counters beside them


@dataclass(frozen=True, slots=True)
class Parametrisation:
    """One way to compute a weight."""

    weight: Callable[[Sequence[Tensor]], Tensor]
    fits: Callable[[Sequence[Shape]], bool]  # to the shapes of its tensors
    endings: tuple[tuple[str, ...], ...]  # of the names of its tensors, the first in the shape of the weight


@dataclass(frozen=True, slots=True)
class Combine(Operation):
    """The weight that is computed of every run of inputs that belong together, in their own dtype.

    >>> Combine("mask").apply([torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])])
    [tensor([0., 2.])]
    """

    scheme: str

    def __post_init__(self) -> None:
        if self.scheme not in PARAMETRISATIONS:
            raise TypeError(f"{self.scheme!r} is not a known parametrisation")

    @property
    def arity(self) -> int:
        return len(PARAMETRISATIONS[self.scheme].endings[0])

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [self._weight(tensors[start : start + self.arity]) for start in range(0, len(tensors), self.arity)]

    def _weight(self, tensors: Sequence[Tensor]) -> Tensor:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if len(tensors) != self.arity or not PARAMETRISATIONS[self.scheme].fits(shapes):
            listed = ", ".join(str(list(shape)) for shape in shapes)
            raise InputError(f"'{self}' does not fit tensors of shapes {listed}. Nothing was converted.")
        return torch.empty_like(tensors[0]) if tensors[0].is_meta else PARAMETRISATIONS[self.scheme].weight(tensors)

    def __str__(self) -> str:
        return f"combine({self.scheme})"


@dataclass(frozen=True, slots=True)
class Parametrised:
    """A weight with the tensors that it is computed from."""

    key_of_values: str  # that the weight has where it is plain
    scheme: str  # '' for a tensor that only has another name
    specs: tuple[TensorSpec, ...]
    operation: Operation = field(default_factory=Copy)  # what makes the weight of its tensors

    @property
    def codes(self) -> TensorSpec:
        """The tensor that has the shape of the weight."""
        return self.specs[0]


def parametrised(specs: Iterable[TensorSpec]) -> list[Parametrised]:
    """Find the parametrised weights of one side, but for those that are there as they are, too.

    >>> specs = [TensorSpec("fc.weight_g", (3, 1), torch.float32), TensorSpec("fc.weight_v", (3, 2), torch.float32)]
    >>> [(found.key_of_values, found.scheme) for found in parametrised(specs)]
    [('fc.weight', 'weight norm')]
    """
    by_key: dict[str, TensorSpec] | None = None
    found = []
    for spec in specs:
        if (ending := _ENDING.search(spec.key)) is None:
            continue
        by_key = by_key or {each.key: each for each in specs}
        start = spec.key[: ending.start()]
        key = start if ending[0].startswith("_") else _plain(start)
        for name, kind in PARAMETRISATIONS.items():
            for endings in kind.endings:
                parts = tuple(part for end in endings if (part := by_key.get(start + end)) is not None)
                whole = len(parts) == len(endings) and ending[0] == endings[0] and key not in by_key
                if key and whole and kind.fits([part.shape for part in parts]):
                    found.append(Parametrised(key, name, parts, Combine(name)))
    return found


def _plain(path: str) -> str:
    """Return the key of a weight whose parametrisation is at some path, such as fc.parametrizations.weight."""
    module, name = split_key(path)
    outer, parametrizations = split_key(module)
    return f"{outer}.{name}".lstrip(".") if parametrizations == "parametrizations" else ""


def undotted(
    own: Sequence[TensorSpec], beside: Sequence[TensorSpec], other: Sequence[TensorSpec]
) -> list[Parametrised]:
    """Find tensors whose names are those of others without the dots, as buffers of an average of weights are named.

    The others are beside them, or else on the other side, which may know more or less of the way to a module.

    >>> keys = [f"net.h.{layer}.fc.{name}" for layer in range(4) for name in ("weight", "bias")]
    >>> plain = [TensorSpec(key, (2,), torch.float32) for key in keys]
    >>> flat = [TensorSpec(f"ema.{key.replace('.', '')}", (2,), torch.float32) for key in keys]
    >>> undotted(flat, flat, plain)[0].key_of_values
    'ema.0.fc.weight'
    """
    groups: dict[str, dict[str, TensorSpec]] = {}
    for spec in own:
        module, name = split_key(spec.key)
        groups.setdefault(module, {})[name] = spec
    taken = {spec.key for spec in other}
    found = []
    for module, flat in groups.items():
        if len(flat) < _MIN_UNDOTTED or any(spec.key in taken for spec in flat.values()):
            continue
        apart = [spec for spec in beside if split_key(spec.key)[0] != module]
        paths = {name: components(key) for name, key in (with_dots(flat, apart) or with_dots(flat, other)).items()}
        shared = len(common_module(paths.values()))
        names = {name: ".".join(path[shared:]) for name, path in paths.items()}
        found += [Parametrised(f"{module}.{name}".lstrip("."), "", (flat[key],)) for key, name in names.items()]
    return found


def with_dots(
    flat: Mapping[str, TensorSpec], known: Iterable[TensorSpec], *, end: str = "", blank: str = "."
) -> dict[str, str]:
    """Return the keys whose names without dots some names are; none unless most of them are those of some module.

    Tensors of one key have one shape. The ``end`` of known keys does not count, and names may lack a ``blank`` too.
    """
    ends: dict[str, list[tuple[str, TensorSpec]]] = {}  # of keys without dots: from which module on, and of what
    for spec in known:
        parts = spec.key.removesuffix(end).split(".", LEVELS)
        for start in range(len(parts) - (blank == ".")):
            ends.setdefault("".join(parts[start:]).replace(blank, ""), []).append((".".join(parts[:start]), spec))
    votes: Counter[tuple[str, str]] = Counter()
    for name in flat:
        begin = next((start for start in range(len(name)) if name[start:] in ends), None)
        if begin is not None:
            votes.update({(name[:begin], module) for module, _ in ends[name[begin:]]})
    if not votes:
        return {}
    (lead, module), count = votes.most_common(1)[0]
    if count < _MIN_SHARE * len(flat):
        return {}
    found = {}
    for name, spec in flat.items():
        keys = [
            other.key
            for inner, other in ends.get(name.removeprefix(lead), ())
            if inner == module and other.shape == spec.shape
        ]
        if len(keys) == 1:
            found[name] = keys[0].removesuffix(end)
    return found


def _weight_norm(tensors: Sequence[Tensor]) -> Tensor:
    direction, length = tensors
    dim = next((dim for dim, size in enumerate(length.shape) if size > 1), 0 if length.dim() else -1)
    return torch._weight_norm(direction, length, dim)


def _is_weight_norm(shapes: Sequence[Shape]) -> bool:
    direction, length = shapes
    if not length:
        return bool(direction)
    sizes = [(size, own) for size, own in zip(length, direction, strict=False) if size > 1]
    return len(length) == len(direction) and all(size == own for size, own in sizes) and len(sizes) < 2


def _spectral_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return a weight over its largest singular value, of which the vectors are saved.

    They belong to the rows of the first or of the second dimension, which is the one that they fit better.
    """
    weight, first, second = tensors
    values = []
    for dim in range(min(2, weight.dim())):
        rows = weight.movedim(dim, 0).flatten(1)
        if rows.shape == (len(first), len(second)):
            values.append(torch.dot(first, torch.mv(rows, second)))
    return weight / max(values, key=lambda value: float(value.abs()))


def _is_spectral_norm(shapes: Sequence[Shape]) -> bool:
    weight, *vectors = shapes
    ways = [((size,), (prod(weight) // max(size, 1),)) for size in weight[:2]]
    return len(weight) > 1 and prod(weight) > 0 and tuple(vectors) in ways


def _masked(tensors: Sequence[Tensor]) -> Tensor:
    weight, mask = tensors
    return weight * mask


PARAMETRISATIONS: Mapping[str, Parametrisation] = {
    "weight norm": Parametrisation(_weight_norm, _is_weight_norm, endings=(("_v", "_g"), (".original1", ".original0"))),
    "spectral norm": Parametrisation(
        _spectral_norm, _is_spectral_norm, endings=(("_orig", "_u", "_v"), (".original", ".0._u", ".0._v"))
    ),
    "mask": Parametrisation(_masked, lambda shapes: shapes[0] == shapes[1], endings=(("_orig", "_mask"),)),
}
_FIRST = {endings[0] for kind in PARAMETRISATIONS.values() for endings in kind.endings}
_ENDING = re.compile(f"(?:{'|'.join(map(re.escape, sorted(_FIRST)))})$")
