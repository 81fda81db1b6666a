"""Conventions: one side as torch names its parameters and lays them out.

What unknown names of parameters mean shows in their company: of a matrix and a vector of its length, one is the weight
and the other the bias; two vectors are the gain and the bias of a norm, and with two more, its mean and variance. What
a name means in one layer it means in all. Kernels of JAX, Keras and TensorFlow are viewed as torch's weights, and
projections that keep the heads of attention apart as matrices.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from types import MappingProxyType
from typing import NamedTuple

from autoalign.matching.layers import (
    Part,
    Parts,
    convolution_in_torch,
    inputs_come_first,
    is_plain,
    layout_of,
    spatial_first,
    squeeze,
    views_of_last_inputs,
)
from autoalign.matching.names import kind, words
from autoalign.matching.paths import Path
from autoalign.matching.vocabulary import (
    AFTER_ATTENTION,
    AROUND_MLP,
    FUSED,
    KERNELS,
    PARAMETRISATIONS,
    PARAMETRISED,
    ROLES,
    TORCH_NAMES,
)
from autoalign.plan.keys import numbers, stem
from autoalign.plan.operations import Copy, Operation, Permute, Reshape, Shape, Transpose, Unstack, chain, output_shapes

_NORM_KINDS = {2: ("weight", "bias"), 4: ("weight", "bias", "mean", "var")}  # by their number, as they are registered
_STATISTICS = frozenset({"mean", "var", "count"})
_MIN_VOTES = 2  # of layers for what a name means
_MIN_SHARE_OF_VOTES = 0.9
_ATTENTION_ROLES = frozenset(role for word in ("qkv", "gateup") for roles in FUSED[word] for role in roles)

_Layer = Sequence[Part]  # the tensors of a module that has no others below it
_Meanings = Mapping[str, str]  # own name of a tensor -> kind of values


def with_torch_names(parts: Sequence[Part], *, ordered: bool) -> list[Part]:
    """Rename the parameters of layers whose names are unknown as torch names them; the rest stay as they are.

    >>> shapes = {"0.mat": (8, 4), "0.vec": (8,), "1.a": (8,), "1.b": (8,), "2.mat": (8, 8), "2.vec": (8,)}
    >>> parts = [Part(n, tuple(key.split(".")), shape, "float") for n, (key, shape) in enumerate(shapes.items())]
    >>> [".".join(part.path) for part in with_torch_names(parts, ordered=True)]
    ['0.weight', '0.bias', '1.a', '1.b', '2.weight', '2.bias']

    Args:
        parts: The parts of one side.
        ordered: True if they are in the order of registration.
    """
    parts = _with_layers_of_pairs(parts)
    names = {part.path[-1] for part in parts}
    known = {name: values for name in names for values, rest in [kind(name)] if not rest and values in TORCH_NAMES}
    unknown = {name for name in names if kind(name)[0] == "other"}
    layers = _layers(parts, unknown) if unknown else []
    if not layers:
        return list(parts)
    numbered = {name: of for name in names for of, rest in [kind(name)] if of in TORCH_NAMES and rest.isdigit()}
    others = [layer for layer in _layers(parts, numbered) if not _is_norm(_floats(layer))]
    elsewhere = {part.path[-1] for layer in others for part in layer}
    found = {name: of for name, of in numbered.items() if name not in elsewhere}  # as "b_2" beside "a_2"
    known |= found
    for _ in range(2):  # what one name means may imply what another does
        found |= _agreed(_by_company(layers, known | found))
    known |= found
    by_order = _agreed(pair for layer in layers for pair in _unknown(_floats(layer), known)) if ordered else {}
    in_layers = {id(part) for layer in layers for part in layer}
    return [
        replace(part, path=(*part.path[:-1], TORCH_NAMES[meaning]), by_order=part.path[-1] in by_order)
        if id(part) in in_layers and (meaning := found.get(part.path[-1]) or by_order.get(part.path[-1]))
        else part
        for part in parts
    ]


def _with_layers_of_pairs(parts: Sequence[Part]) -> Sequence[Part]:
    """Read a matrix and a vector as a layer if their names differ like those of other such pairs: ``W1``, ``b1``.

    One name may also be that of the other with ``bias`` after it.

    >>> shapes = {"W1": (8, 4), "b1": (8,), "W2": (2, 8), "b2": (2,)}
    >>> parts = [Part(n, (key,), shape, "float") for n, (key, shape) in enumerate(shapes.items())]
    >>> [".".join(part.path) for part in _with_layers_of_pairs(parts)]
    ['W1.weight', 'W1.bias', 'W2.weight', 'W2.bias']
    """
    groups: dict[tuple[object, ...], dict[str, int]] = defaultdict(dict)  # what pairs share -> their own part -> place
    for place, part in enumerate(parts):
        name = part.path[-1]
        if part.numeric == "float" and kind(name)[0] == "other":
            first, _, last = name.rpartition("_")
            for shared, own in ((numbers(name), stem(name)), (first, last), ((first, last[1:]), last[:1])):
                if shared:
                    groups[part.path[:-1], shared][own] = place
    pairs: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for group in groups.values():
        if len(group) == 2:
            (own, a), (other, b) = sorted(group.items(), key=lambda item: -prod(parts[item[1]].shape))
            of_matrix, of_vector = parts[a].shape, parts[b].shape
            vectors: set[Shape] = {of for size in of_matrix for of in ((size,), (1, size))}
            if len(of_matrix) == 2 and of_vector in vectors - {of_matrix}:
                pairs[own, other].append((a, b))
    result = list(parts)
    named = [(place, *kind(part.path[-1])) for place, part in enumerate(parts)]
    biases = {(*parts[k].path[:-1], rest): k for k, values, rest in named if values == "bias" and rest}
    for place, values, rest in named if biases else ():
        layer = parts[place].path if values == "other" else (*parts[place].path[:-1], rest)
        beside = biases.get(layer, place) if values in ("other", "weight") else place
        shape, bias = parts[place].shape, parts[beside].shape
        if (
            beside != place
            and (values == "other" or len(bias) > 1)
            and bias[:-1] in ((), shape[:-2])
            and set(bias[-1:]) & set(shape[len(bias) - 1 :])
        ):
            result[place] = replace(parts[place], path=(*layer, "weight"))
            result[beside] = replace(parts[beside], path=(*layer, "bias"))
    for found in pairs.values():
        for matrix, vector in found if len(found) >= _MIN_VOTES else ():
            for place, name in ((matrix, "weight"), (vector, "bias")):
                result[place] = replace(parts[place], path=(*parts[matrix].path, name))
    return result


def _layers(parts: Sequence[Part], names: Collection[str]) -> list[_Layer]:
    """List the layers with a tensor of one of these names."""
    modules: dict[tuple[str, ...], list[Part]] = defaultdict(list)
    for part in parts:
        modules[part.path[:-1]].append(part)
    above = {path[:depth] for path in modules for depth in range(len(path))}
    return [
        layer for path, layer in modules.items() if path not in above and any(part.path[-1] in names for part in layer)
    ]


def _by_company(layers: Iterable[_Layer], known: _Meanings) -> Iterator[tuple[str, str]]:
    """Yield what names mean where the shapes of a layer tell, or the names of all its other tensors do."""
    for layer in layers:
        floats = _floats(layer)
        counters = [part.path[-1] for part in layer if part.numeric == "int" and not part.shape]
        if len(floats) == 2:
            matrix, vector = sorted(floats, key=lambda part: -len(part.shape))
            meanings = {matrix.path[-1]: "weight", vector.path[-1]: "bias"}
            fits = len(matrix.shape) > 1 and len(vector.shape) == 1 and vector.shape[0] in {*matrix.shape} - {1}
            if fits and all(known.get(name, values) == values for name, values in meanings.items()):
                yield from meanings.items()
        unknown = _unknown(floats, known)
        if len(unknown) == 1:
            yield from unknown
        if _is_norm(floats) and len(counters) == 1:
            yield counters[0], "count"


def _unknown(floats: _Layer, known: _Meanings) -> list[tuple[str, str]]:
    """Pair the unknown names of a norm's tensors with what is left for them to mean, in torch's order."""
    if not _is_norm(floats):
        return []
    names = [part.path[-1] for part in floats]
    taken = [known[name] for name in names if name in known]
    left = [values for values in _NORM_KINDS[len(floats)] if values not in taken]
    unknown = [name for name in names if name not in known]
    return list(zip(unknown, left, strict=True)) if len(unknown) == len(left) else []


def _floats(layer: _Layer) -> _Layer:
    return [part for part in layer if part.numeric == "float"]


def _is_norm(floats: _Layer) -> bool:
    shapes = {part.shape for part in floats}
    return len(floats) in _NORM_KINDS and len(shapes) == 1 and sum(size != 1 for size in shapes.pop()) == 1


def _agreed(votes: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return what nearly all layers say that an unknown name means."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for name, values in votes:
        if kind(name)[0] == "other":
            counts[name][values] += 1
    best = {name: count.most_common(1)[0] for name, count in counts.items()}
    return {
        name: values
        for name, (values, number) in best.items()
        if number >= max(_MIN_VOTES, _MIN_SHARE_OF_VOTES * counts[name].total())
    }


def with_literal_norms(parts: Sequence[Part], others: Sequence[Part]) -> Sequence[Part]:
    """Read ``post_attention_norm`` literally if the block also has a norm of that name before or after the MLP.

    Otherwise it is the norm before the MLP. If the other side has the name too, the name is enough.

    >>> parts = [Part(0, ("0", "post_attention_norm"), (8,), "float"), Part(1, ("0", "post_mlp_norm"), (8,), "float")]
    >>> with_literal_norms(parts, [])[0].path
    ('0', 'attn_post_norm')
    """
    names = [(part.path[:depth], name) for part in parts for depth, name in enumerate(part.path)]
    around = {(module, AROUND_MLP.sub("", name)) for module, name in names if AROUND_MLP.match(name)}
    if not around or any(AFTER_ATTENTION.match(name) for part in others for name in part.path):
        return parts
    return [
        replace(
            part,
            path=tuple(
                AFTER_ATTENTION.sub("attn_post", name)
                if (part.path[:depth], AFTER_ATTENTION.sub("", name)) in around
                else name
                for depth, name in enumerate(part.path)
            ),
        )
        for part in parts
    ]


def with_own_statistics(parts: Sequence[Part]) -> Sequence[Part]:
    """Move the statistics of a norm that are in modules directly below it, one for all or one each, to the norm.

    >>> names = ("bn.weight", "bn.bias", "bn.stats.mean", "bn.var_ema.hidden", "bn.var_ema.average")
    >>> parts = [Part(k, (*name.split("."),), (8,), "float") for k, name in enumerate(names)]
    >>> [".".join(part.path) for part in with_own_statistics(parts)]
    ['bn.weight', 'bn.bias', 'bn.running_mean', 'bn.var_ema.hidden', 'bn.running_var']
    """
    kinds: dict[Path, set[str]] = defaultdict(set)
    shapes: dict[Path, set[Shape]] = defaultdict(set)
    for part in parts:
        kinds[part.path[:-1]].add(kind(part.path[-1])[0])
        shapes[part.path[:-1]].add(squeeze(part.shape))
    below: dict[tuple[Path, str], list[int]] = defaultdict(list)  # norm and statistic -> what may be it
    for place, part in enumerate(parts):
        *norm, module, name = ("", *part.path)
        for of in _STATISTICS.intersection((kind(name)[0], *words(module))):
            around, beside = tuple(norm[1:]), kinds[part.path[:-1]]
            is_apart = squeeze(part.shape) in shapes.get(around, ()) or (of == "count" and "mean" in beside)
            if around and is_apart and beside.isdisjoint(("weight", "bias")) and of not in kinds[around]:
                below[around, of].append(place)
    result, averaged = list(parts), set[Path]()  # and the modules that hold what averages are computed with
    for (around, of), places in below.items():
        averages = [place for place in places if "average" in parts[place].path[-1]] or places
        if len(averages) == 1:
            (place,) = averages
            result[place] = replace(parts[place], path=(*around, TORCH_NAMES[of]))
            averaged |= {parts[place].path[:-1]} if len(places) > 1 else set()
    return [replace(part, count=0) if part.path[:-1] in averaged else part for part in result]


def with_parametrised_weights(parts: Sequence[Part]) -> Sequence[Part]:
    """Name what torch computes a weight of as parts of its layer; of weight normalisation, as a weight and a gain.

    >>> names = ("a.parametrizations.weight.original0", "a.parametrizations.weight.original1", "b.weight_v")
    >>> parts = [Part(k, (*name.split("."),), (8, 1), "float") for k, name in enumerate(names)]
    >>> [".".join(part.path) for part in with_parametrised_weights(parts)]
    ['a.weight_gain', 'a.weight', 'b.weight_v']
    """
    paths = [
        (*part.path[:-3], PARAMETRISED[part.path[-1]])
        if part.path[-3:-1] == PARAMETRISATIONS and part.path[-1] in PARAMETRISED
        else part.path
        for part in parts
    ]
    normalised = {path[:-1] for path in paths if path[-1] == "weight_g"}
    normalised &= {path[:-1] for path in paths if path[-1] == "weight_v"}
    named = {"weight_g": "weight_gain", "weight_v": "weight"}
    return [
        replace(part, path=(*path[:-1], named.get(path[-1], path[-1])) if path[:-1] in normalised else path)
        for part, path in zip(parts, paths, strict=True)
    ]


def with_claimed_roles(parts: Sequence[Part]) -> Sequence[Part]:
    """Read a name as a mere number where the numbers beside it are counted otherwise, or its role has another name.

    So ``fc_1`` beside ``fc_0``, and ``w1`` beside ``wg`` of the same shape.

    >>> parts = [Part(k, (name, "weight"), (8, 4), "float") for k, name in enumerate(("w1", "wg", "fc_0", "fc_1"))]
    >>> [part.path[0] for part in with_claimed_roles(parts)]
    ['1', 'wg', '0', '1']
    """
    beside: dict[tuple[Path, str], dict[str, Shape]] = defaultdict(dict)
    for part in parts:
        if len(part.path) > 1:
            beside[part.path[:-2], part.path[-1]][part.path[-2]] = part.shape
    plain: dict[tuple[Path, str], str] = {}
    for (module, _), shapes in beside.items():
        for name, shape in shapes.items():
            if words(name) != words(stem(name)):  # its number is a part of a word
                counted = [each for each in shapes if stem(each) == stem(name) and words(each) == words(stem(each))]
                like = [each for each in shapes if shapes[each] == shape and not numbers(each)]
                has_other_name = len(words(name)) == 1 and any(words(name)[0] in words(each) for each in like)
                for each in (name, *counted) if counted or has_other_name else ():
                    plain[module, each] = "".join(map(str, numbers(each)))
    if not plain:
        return parts
    return [
        replace(part, path=(*part.path[:-2], plain[part.path[:-2], part.path[-2]], part.path[-1]))
        if (part.path[:-2], *part.path[-2:-1]) in plain
        else part
        for part in parts
    ]


def as_in_torch(parts: Sequence[Part], others: Mapping[Shape, int] = MappingProxyType({})) -> Parts:
    """View the parts of one side in torch's layout; those that have it already stay as they are.

    >>> (part,) = as_in_torch([Part(0, ("dense", "kernel"), (8, 4), "float")])
    >>> part.shape, part.view
    ((4, 8), Transpose())

    ``others`` counts the tensors of each shape of the other side, which may keep heads apart too.
    """
    parts = _with_separate_biases(parts)
    apart = _shapes_with_heads_apart(parts, others)
    layout = layout_of(parts)
    parts, are_first = _with_joined_heads(parts, others, apart)
    are_first = are_first and layout == 0 and inputs_come_first(parts, others)  # of what has no bias
    layers = [kinds for unit in parts.units if "weight" in (kinds := dict(unit.parts))]
    shapes = [{values: parts[index].shape for values, index in kinds.items()} for kinds in layers]
    if views := views_of_last_inputs(shapes, others):
        viewed = list(parts)
        for kinds, view in zip(layers, views, strict=True):
            viewed[kinds["weight"]] = _viewed(parts[kinds["weight"]], view)
        return Parts(viewed)
    named = [layout < 1 and _is_kernel(parts[kinds["weight"]]) for kinds in layers]
    is_named = any(named)
    votes = Counter[int]()  # for convolutions whose outputs come last, by their dimensions: layers of a kind are alike
    for of in shapes:
        votes[len(of["weight"])] += spatial_first(of)
    are_last = is_named or max(votes.values(), default=0) > 0
    if not (are_last or are_first or layout < 0):
        return parts
    result = [_viewed(part, Permute((0, 2, 1))) if is_named and _is_stack(part) else part for part in parts]
    for kinds, of, is_kernel in zip(layers, shapes, named, strict=True):
        if (weight := parts[kinds["weight"]]).shape in apart or not isinstance(weight.view, Copy):
            continue
        is_last = len(squeeze(weight.shape)) == 2 or of.get("bias") == weight.shape[2:]
        is_first = (layout < 0 and "bias" in of and is_last) or (are_first and "bias" not in of and is_plain(weight))
        is_turned = is_kernel or (is_first and not is_named and (layout < 0 or weight.shape[::-1] in others))
        if is_turned and len(weight.shape) == 2:
            result[kinds["weight"]] = _viewed(weight, Transpose())
        elif len(weight.shape) > (2 if is_turned else 3) and (
            is_turned or is_named or (votes[len(weight.shape)] or votes.total()) > 0
        ):
            turned = _viewed(weight, convolution_in_torch(weight.shape, of.get("bias")))
            result[kinds["weight"]] = weight if others.get(weight.shape, 0) > others.get(turned.shape, 0) else turned
    return Parts(result)


def _is_kernel(part: Part) -> bool:
    return part.path[-1].lower().endswith(KERNELS)


def _is_stack(part: Part) -> bool:
    """True for kernels of equal layers, such as experts, in one parameter of another name."""
    return len(part.shape) == 3 and min(part.shape) > 1 and kind(part.path[-1])[0] == "other"


def _viewed(part: Part, view: Operation) -> Part:
    (shape,) = output_shapes(view, [part.shape])
    return replace(part, shape=shape, view=chain(part.view, view))


def _with_separate_biases(parts: Sequence[Part]) -> Sequence[Part]:
    """Split the two biases of a recurrent layer of Keras, which are the rows of one matrix."""
    recurrent = {part.path[:-1] for part in parts if part.path[-1] == "recurrent_kernel"}
    result = []
    for part in parts if recurrent else ():
        if part.path[:-1] in recurrent and part.path[-1] == "bias" and part.shape[:-1] == (2,):
            result += [
                replace(_viewed(part, Unstack(0, row)), path=(*part.path[:-1], name))
                for row, name in enumerate(("bias", "recurrent_bias"))
            ]
        else:
            result.append(part)
    return result or parts


def _shapes_with_heads_apart(parts: Sequence[Part], others: Mapping[Shape, int]) -> set[Shape]:
    """Return the shapes of projections with their heads apart of which the other side has as many tensors."""
    named = Counter(
        part.shape
        for part in parts
        if len(part.shape) == 3
        and not _ATTENTION_ROLES.isdisjoint(word for name in part.path[-2:] for word in words(name))
    )
    return {shape for shape, count in named.items() if others.get(shape, 0) >= count}


def _with_joined_heads(parts: Sequence[Part], others: Collection[Shape], apart: set[Shape]) -> tuple[Parts, bool]:
    """View projections that keep heads of attention apart as matrices; True if they show that inputs come first.

    Those to queries, keys and values have names that say so, or, of kernels, biases that keep heads apart too; the one
    that joins heads has such a name, or heads of the same number and size.
    """
    layers: dict[tuple[str, ...], dict[str, int]] = {}
    for index, part in enumerate(parts):
        values, rest = kind(part.path[-1])
        layers.setdefault((*part.path[:-1], rest) if rest else part.path[:-1], {})[values] = index
    holding = {
        path: of
        for path, of in layers.items()
        if "weight" in of and parts[of["weight"]].shape not in apart and _may_hold_heads(parts[of["weight"]], others)
    }
    widths = Counter(part.shape[0] for part in (parts if holding else ()) if len(part.shape) == 1).most_common(1)
    width = widths[0][0] if widths else 0
    result, heads, votes = list(parts), set[Shape](), 0
    for joins in (False, True):
        for path, of in holding.items():
            weight, bias = parts[of["weight"]], parts[of["bias"]].shape if "bias" in of else None
            names = {word for name in path[-1:] for word in words(name)}
            is_shown = _is_kernel(weight) and bool(names & _ATTENTION_ROLES or len(bias or ()) > 1)
            if joins == (is_shown or bool(names & ROLES) or bias == weight.shape[1:]):
                continue
            is_named = not joins or "o" in names or {"attn", "out"} <= names.union(*map(words, path[-2:-1]))
            ways = [
                way
                for way in _joined(weight.shape, joins=joins)
                if (is_named or (way.heads in heads and weight.shape not in others))
                and (bias is None or bias in (way.matrix[:1], *[way.heads] * (not joins)))
            ]
            usual = 2 * joins  # the place of the width in Flax and Keras
            best = max(ways, key=lambda w: (w.matrix in others, w.width == width, w.place == usual), default=None)
            if best and (_is_kernel(weight) or best.matrix in others or best.width == width):
                heads.update([best.heads] * (not joins))
                votes += 0 if joins else 1 if best.place < 2 else -1
                result[of["weight"]] = _viewed(weight, best.view)
                if bias and len(bias) > 1:
                    result[of["bias"]] = _viewed(parts[of["bias"]], Reshape((prod(bias),)))
    return Parts(result), votes > 0


def _may_hold_heads(weight: Part, others: Collection[Shape]) -> bool:
    is_known = weight.shape in others or any("conv" in words(name) for name in weight.path)
    return len(weight.shape) == 3 and min(weight.shape) > 1 and (_is_kernel(weight) or not is_known)


class _Joined(NamedTuple):
    """A matrix that three dimensions may be, two of which are heads."""

    width: int
    heads: Shape  # their number and size
    matrix: Shape  # (out, in)
    view: Operation
    place: int  # of the width


def _joined(shape: Shape, *, joins: bool) -> Iterator[_Joined]:
    for place, width in enumerate(shape):
        heads = (*shape[:place], *shape[place + 1 :])
        matrix = (width, prod(heads)) if joins else (prod(heads), width)
        if place == 1:
            view = chain(Permute((1, 0, 2) if joins else (0, 2, 1)), Reshape(matrix))
        else:
            view = Reshape(matrix) if joins == (place == 0) else chain(Reshape(matrix[::-1]), Transpose())
        yield _Joined(width, heads, matrix, view, place)
