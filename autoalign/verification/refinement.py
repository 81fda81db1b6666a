"""Refinement: which tensors correspond by what two networks compute with them, where their keys leave it open.

Both dataflow graphs are coloured together by colour refinement (Weisfeiler and Leman, "The reduction of a graph to
canonical form", 1968): a node's new colour is its old one with those of its neighbours. It departs from the paper where
the graphs differ, as those of two implementations do: a colour is split only into what both graphs have, and the rest
keeps it for good, so that a difference does not spread. Tensors of one size are paired only if both have as many of
them: networks of unlike depths would be paired from both ends.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import networkx as nx
import torch

_MAX_ROUNDS = 500
_MAX_FOLLOWED = 24  # operations from one product to the next

PART = "@"  # between the key of a tensor and where a part of it begins

_PASSING = frozenset(  # operations that change no value
    "_to_copy _unsafe_view as_strided clone contiguous expand flatten permute reshape squeeze t transpose unsqueeze "  # noqa: SIM905
    "view".split()
)
_CANONICAL = {
    **dict.fromkeys(("addmm", "baddbmm", "bmm", "mm", "mv"), "matmul"),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"), "batch_norm"),
}
MOVING = frozenset({"permute", "squeeze", "t", "transpose", "unsqueeze"})  # operations that move dimensions
RESHAPING = frozenset({"_unsafe_view", "reshape", "view"})
_PARTS = frozenset({"select", "slice", "split", "split_with_sizes", "unbind"})
_COMMUTATIVE = frozenset({"add", "mul", "maximum", "minimum"})
_FILLING = frozenset(  # operations that take the shape of a tensor, and none of its values
    "empty_like full_like new_empty new_full new_ones new_zeros ones_like zeros_like".split()  # noqa: SIM905
)

_Edge = tuple[object, object, object]  # from, to, and as what


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What of a dataflow graph two implementations have alike."""

    labels: dict[object, object]  # of its nodes: operations by name, tensors by how many elements they have
    tensors: frozenset[object]  # the nodes that are tensors of the state dict
    neighbours: dict[object, list[tuple[object, object]]]  # of each node, with the role that an edge has, both ways


def skeleton_of(graph: nx.DiGraph, *, unary: bool, is_split: bool = False) -> Skeleton:
    """Reduce a dataflow graph: no operations that change no value, and without ``unary`` none of one operand alone.

    Attention is two products, and what is added to a product as a bias is an operand of it. With ``is_split``, a
    product of which only parts are used is several, of parts of its tensors: ``"KEY@BEGIN"``, as a share of the rows.
    """
    kinds = dict(graph.nodes(data="kind"))
    outputs = [node for node, kind in kinds.items() if kind == "output"]
    live = set(outputs).union(*(nx.ancestors(graph, node) for node in outputs))
    nodes = graph.nodes
    tensors = {n for n in nodes if kinds[n] in ("parameter", "buffer") and nodes[n]["dtype"].is_floating_point}
    labels: dict[object, object] = {node: prod(nodes[node]["shape"]) for node in tensors}
    labels |= {node: "input" for node, kind in kinds.items() if kind == "input"}
    # what computes the values of a node, and which part of them it has; nothing computes those of constants
    stands_for: dict[object, tuple[object, tuple[float, ...]]] = {node: (node, ()) for node in labels}
    edges: list[_Edge] = []
    role: object
    for node in (node for node in nx.topological_sort(graph) if node in live and node not in labels):
        operands = [
            (stands_for[before][0], argument, (*stands_for[before][1], *_part(graph, before, result)))
            for before, _, edge in graph.in_edges(node, data=True)
            for argument, result in zip(edge["arguments"], edge["results"], strict=True)
            if before in stands_for
        ]
        given = [before for before, _, _ in operands if before in tensors]
        data = [before for before, _, _ in operands if before not in tensors]
        name = str(nodes[node].get("operation", kinds[node])).rstrip("_")
        is_bias = name == "add" and len(given) == len(data) == 1 and labels[data[0]] == "matmul"
        if not operands or name in _FILLING:  # such as masks, which every implementation makes in its own way
            continue
        is_alone = len(operands) == 1 and kinds[node] != "output"
        if is_bias or (is_alone and (name in _PASSING or name in _PARTS or not (unary or given))):
            stands_for[node] = next(each[::2] for each in operands if not (is_bias and each[0] in tensors))
            edges += [(given[0], data[0], ("bias", ()))] if is_bias else []
            continue
        stands_for[node] = node, ()
        labels[node] = _CANONICAL.get(name, name)
        if name == "convolution" and _is_product(graph, node):
            labels[node] = "matmul"
        if name.startswith("_scaled_dot_product"):
            labels[node] = labels[(node, "scores")] = "matmul"
            edges.append(((node, "scores"), node, (0, ())))
            for before, argument, part in operands:
                role = {"query": (0, part), "key": (1, part), "value": (1, part)}.get(argument, "bias")
                edges.append((before, node if argument == "value" else (node, "scores"), role))
            continue
        places = _sides(graph, node) if labels[node] == "matmul" and not given and len(data) == 2 else ()
        for place, (before, argument, part) in enumerate(operands):
            role = argument
            if labels[node] == "matmul" and given:
                is_bias = argument == "bias" or (argument == "self" and len(operands) == 3)
                role = "" if before not in tensors else "bias" if is_bias else "weight"
            elif labels[node] == "matmul":
                role = places[place] if len(places) > place else place
            elif name in _COMMUTATIVE:
                role = ""
            edges.append((before, node, (role, part)))
    if is_split:
        edges = _split_products(edges, labels, tensors)
    neighbours: dict[object, list[tuple[object, object]]] = defaultdict(list)
    for first, second, role in edges:
        neighbours[first].append((second, ("to", role)))
        neighbours[second].append((first, ("from", role)))
    return Skeleton(labels, frozenset(tensors), neighbours)


def _split_products(edges: Sequence[_Edge], labels: dict[object, object], tensors: set[object]) -> list[_Edge]:
    """Return edges between parts of products where only parts are used; add the parts to labels and tensors."""
    uses: dict[object, list[Any]] = defaultdict(list)
    for first, _, role in edges:
        uses[first].append(role)
    begins = {
        node: sorted({part[0] for _, part in of if part}) for node, of in uses.items() if labels[node] == "matmul"
    }
    begins = {n: of for n, of in begins.items() if len(of) > 1 and of[0] == 0 and all(part for _, part in uses[n])}
    found: list[_Edge] = []
    for first, second, role in edges:
        use: Any = role
        own = (first, use[1][0]) if first in begins else first
        use = (use[0], use[1][1:]) if first in begins else use
        for begin, end in pairwise([*begins.get(second, []), 1.0]):
            part: object = own
            if first in tensors:
                part = f"{first}{PART}{begin}"
                labels[part] = round(int(str(labels[first])) * (end - begin))
                tensors.add(part)
            labels[second, begin] = labels[second]
            found.append((part, (second, begin), use))
        if second not in begins:
            found.append((own, second, use))
    labels |= {(node, begin): labels[node] for node, of in begins.items() for begin in of}
    return found


def _is_product(graph: nx.DiGraph, node: object) -> bool:
    """Return True for a convolution that multiplies each position with one matrix."""
    weights = [before for before, _, edge in graph.in_edges(node, data=True) if "weight" in edge["arguments"]]
    return bool(graph.nodes[node]["settings"].get("groups") == 1 and prod(graph.nodes[weights[0]]["shape"][2:]) == 1)


def _sides(graph: nx.DiGraph, product: Any) -> tuple[object, object]:
    """Return which operand of a product is which: the next product sums over the second's side, as over that of keys.

    A product that sums over neither side, as one that mixes heads, is passed. Both are "" where that is not known,
    since code may as well compute the transposed product of both exchanged.
    """
    nodes = graph.nodes
    shape = nodes[product]["shape"]
    own = shape[-2:]  # sides: rows and columns, or one of a product with a vector
    views = [(-1, *(1 for _ in own[place + 1 :])) for place in range(len(own))]
    marks = [(torch.arange(n) % 2).to(torch.int8).view(view).expand(shape) for n, view in zip(own, views, strict=True)]
    waiting = [(product, marks)]
    for _ in range(_MAX_FOLLOWED):
        if not waiting:
            break
        before, given = waiting.pop(0)
        for node in sorted(other for other in graph.succ[before] if isinstance(other, int)):  # some lead nowhere
            name, settings, shape = (nodes[node][key] for key in ("operation", "settings", "shape"))
            if _CANONICAL.get(name) == "matmul" or name == "convolution":
                is_second = {"mat2", "batch2"}.intersection(graph.edges[before, node]["arguments"])
                dim = 1 if name == "convolution" else -2 if is_second else -1
                second = min(given[0].shape[dim] - 1, 1)
                summed = [bool((mark.select(dim, 0) != mark.select(dim, second)).any()) for mark in given]
                if sum(summed) == 1:
                    return (1, 0) if summed[0] else (0, 1)
                if any(summed) or not second or given[0].shape != shape:
                    return "", ""
                waiting.append((node, given))
                continue
            with suppress(RuntimeError):  # it is cut or joined
                if name in MOVING:
                    marks = [getattr(torch.ops.aten, name)(mark, **settings) for mark in given]
                elif name in RESHAPING:
                    marks = [mark.reshape(shape) for mark in given]
                else:
                    marks = [mark.expand(shape) for mark in given]
                waiting.append((node, marks))
    return "", ""


def _part(graph: nx.DiGraph, node: object, result: int) -> tuple[float, ...]:
    """Return where the part of a tensor that a node cuts out begins, as a share of the size; () if it cuts none."""
    name, settings = graph.nodes[node].get("operation"), graph.nodes[node].get("settings", {})
    if name not in _PARTS:
        return ()
    shape = next(graph.nodes[before]["shape"] for before in graph.predecessors(node))
    size = max(shape[settings.get("dim", 0)], 1)
    match name:
        case "select" | "slice":
            begin = settings.get("index", settings.get("start")) or 0
        case "split_with_sizes":
            begin = sum(settings["split_sizes"][:result])
        case _:
            begin = result * settings.get("split_size", 1)
    return (round(begin % size / size, 6),)


def paired_tensors(source: Skeleton, target: Skeleton, anchors: Mapping[str, str]) -> dict[str, str]:
    """Return the target's tensors that code alone tells apart, with those of the source; ``anchors`` are such pairs."""
    sides = source, target
    numbers: dict[object, int] = {}
    colours: list[dict[object, int]] = [{}, {}]
    for side, skeleton in enumerate(sides):
        named = {key: ("anchor", pair) for pair in anchors.items() for key in (pair[1 - side],)}
        for node, label in skeleton.labels.items():
            if node in skeleton.neighbours:
                colours[side][node] = numbers.setdefault(named.get(str(node), label), len(numbers))
    final: set[int] = set()  # colours that are not split any more
    for _ in range(_MAX_ROUNDS):
        found = [_next_colours(skeleton, own, final) for skeleton, own in zip(sides, colours, strict=True)]
        values = [set(side.values()) for side in found]
        shared, every = values[0] & values[1], values[0] | values[1]
        final |= {colour[0] for colour in every - shared}
        for side, new in enumerate(found):
            for node, colour in new.items():
                if colour in shared:
                    colours[side][node] = numbers.setdefault(("refined", colour), len(numbers))
        if len({colour[0] for colour in every}) == len(every):  # no colour was split
            break
    members: dict[int, tuple[list[object], list[object]]] = defaultdict(lambda: ([], []))
    for side, own in enumerate(colours):
        for node, number in own.items():
            if node in sides[side].tensors:
                members[number][side].append(node)
    counts = [
        Counter(side.labels[node] for node in side.tensors & own.keys())
        for side, own in zip(sides, colours, strict=True)
    ]
    doubted = {label for label in counts[0] | counts[1] if counts[0][label] != counts[1][label]}
    pairs = (both for both in members.values() if len(both[0]) == len(both[1]) == 1)
    return {str(b[0]): str(a[0]) for a, b in pairs if target.labels[b[0]] not in doubted}


def _next_colours(
    skeleton: Skeleton, colours: Mapping[object, int], final: Collection[int]
) -> dict[object, tuple[int, tuple[object, ...]]]:
    """Return the colour that each node would have next: its own, with those of its neighbours and their roles."""
    return {
        node: (own, tuple(sorted([(str(role), colours[other]) for other, role in skeleton.neighbours[node]])))
        for node, own in colours.items()
        if own not in final
    }


def pairs_of(source: nx.DiGraph, target: nx.DiGraph, anchors: Mapping[str, str]) -> dict[str, str]:
    """Return the pairs that code decides: from whole skeletons, then from those without activations or with parts."""
    found: dict[str, str] = {}
    for unary, is_split in ((True, False), (False, False), (True, True), (False, True)):
        skeletons = [skeleton_of(graph, unary=unary, is_split=is_split) for graph in (source, target)]
        new = paired_tensors(skeletons[0], skeletons[1], anchors)
        taken = set(found.values())
        found |= {key: own for key, own in new.items() if key not in found and own not in taken}
    return found
