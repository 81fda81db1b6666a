"""Leaves: what layers call their own tensors, where no vocabulary tells.

A layer's tensors show what they are by their company. Of a matrix and a vector of its length, one is the weight and the
other the bias; two vectors are the gain and the bias of a norm, and with two more, its mean and variance. What a name
means in one layer it means in all.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from autoalign.names import kind
from autoalign.units import Part

_USUAL = {
    "weight": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "count": "num_batches_tracked",
}
_OF_NORMS = {2: ("weight", "bias"), 4: ("weight", "bias", "mean", "var")}  # by their number, as they are registered
_LEAST = 2  # layers that must agree on what a name means
_AGREED = 0.9  # share of them

_Layer = Sequence[Part]  # the tensors of a module that has no others below it
_Meanings = Mapping[str, str]  # own name of a tensor -> kind of values


def with_known_leaves(parts: Sequence[Part], *, ordered: bool) -> list[Part]:
    """Give the tensors of layers whose names say nothing the names that torch gives them; the rest stay as they are.

    >>> shapes = {"0.mat": (8, 4), "0.vec": (8,), "1.a": (8,), "1.b": (8,), "2.mat": (8, 8), "2.vec": (8,)}
    >>> parts = [Part(n, tuple(key.split(".")), shape, "float") for n, (key, shape) in enumerate(shapes.items())]
    >>> [".".join(part.path) for part in with_known_leaves(parts, ordered=True)]
    ['0.weight', '0.bias', '1.a', '1.b', '2.weight', '2.bias']

    Args:
        parts: Of one side.
        ordered: Whether they are in the order of registration.
    """
    names = {part.path[-1] for part in parts}
    known = {name: values for name in names if (values := _told(name)) in _USUAL}
    untold = {name for name in names if kind(name)[0] == "other"}
    layers = _layers(parts, untold) if untold else []
    if not layers:
        return list(parts)
    found: dict[str, str] = {}
    for _ in range(2):  # what is found of one name tells another
        found |= _agreed(_by_company(layers, known | found))
    by_order = _agreed(_by_order(layers, known | found)) if ordered else {}
    alone = {id(part) for layer in layers for part in layer}
    return [
        replace(part, path=(*part.path[:-1], _USUAL[meaning]), by_order=part.path[-1] in by_order)
        if id(part) in alone and (meaning := found.get(part.path[-1]) or by_order.get(part.path[-1]))
        else part
        for part in parts
    ]


def _told(name: str) -> str:
    """Tell what a tensor's name says of its values; "other" where it says nothing or more than that."""
    values, rest = kind(name)
    return "other" if rest else values


def _layers(parts: Sequence[Part], untold: Collection[str]) -> list[_Layer]:
    """List the layers with a tensor of one of these names."""
    modules: dict[tuple[str, ...], list[Part]] = defaultdict(list)
    for part in parts:
        modules[part.path[:-1]].append(part)
    above = {path[:depth] for path in modules for depth in range(len(path))}
    return [
        layer for path, layer in modules.items() if path not in above and any(part.path[-1] in untold for part in layer)
    ]


def _by_company(layers: Iterable[_Layer], known: _Meanings) -> Iterator[tuple[str, str]]:
    """Say what a name means where the shapes of a layer tell, or the names of all its other tensors do."""
    for layer in layers:
        floats, counters = _split(layer)
        if len(floats) == 2:
            matrix, vector = sorted(floats, key=lambda part: -len(part.shape))
            fits = len(matrix.shape) > 1 and len(vector.shape) == 1 and vector.shape[0] in matrix.shape
            if fits and _may_be(matrix, "weight", known) and _may_be(vector, "bias", known):
                yield matrix.path[-1], "weight"
                yield vector.path[-1], "bias"
        unknown, left = _unknown(floats, known)
        if len(unknown) == 1:
            yield unknown[0], left[0]
        if _is_norm(floats) and len(counters) == 1:
            yield counters[0].path[-1], "count"


def _by_order(layers: Iterable[_Layer], known: _Meanings) -> Iterator[tuple[str, str]]:
    """Say what the names of vectors of one length mean, if they come in the usual order."""
    for layer in layers:
        yield from zip(*_unknown(_split(layer)[0], known), strict=True)


def _unknown(floats: _Layer, known: _Meanings) -> tuple[list[str], list[str]]:
    """List the names of a norm's tensors that say nothing, and what is left for them to mean."""
    if not _is_norm(floats):
        return [], []
    names = [part.path[-1] for part in floats]
    told = [known[name] for name in names if name in known]
    left = [values for values in _OF_NORMS[len(floats)] if values not in told]
    unknown = [name for name in names if name not in known]
    return (unknown, left) if len(unknown) == len(left) else ([], [])


def _is_norm(floats: _Layer) -> bool:
    return len(floats) in _OF_NORMS and len({part.shape for part in floats}) == 1 and len(floats[0].shape) == 1


def _split(layer: _Layer) -> tuple[_Layer, _Layer]:
    return (
        [part for part in layer if part.numeric == "float"],
        [part for part in layer if part.numeric == "int" and not part.shape],
    )


def _may_be(part: Part, values: str, known: _Meanings) -> bool:
    return known.get(part.path[-1], values) == values


def _agreed(votes: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Take what nearly all layers say of a name that is not known."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for name, values in votes:
        if kind(name)[0] == "other":
            counts[name][values] += 1
    best = {name: count.most_common(1)[0] for name, count in counts.items()}
    return {
        name: values
        for name, (values, number) in best.items()
        if number >= _LEAST and number >= _AGREED * counts[name].total()
    }
