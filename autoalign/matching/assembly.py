"""Assembly: from matched parts back to whole tensors, each with its operation; and the counterparts of what is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoalign.matching.candidates import operation_between
from autoalign.matching.confidence import AMBIGUOUS, INFERRED, SPLIT_BY_ORDER_FACTOR
from autoalign.matching.conventions import (
    as_in_torch,
    with_claimed_roles,
    with_own_statistics,
    with_parametrised_weights,
    with_torch_names,
)
from autoalign.matching.features import SideFeatures, is_alphabetical, name_scores
from autoalign.matching.fusion import BY_ORDER, Fusion, with_joined_roles
from autoalign.matching.layers import Part, Parts, Unit, Units, block_around, parts_of, squeeze
from autoalign.matching.layouts import ROTARY, Doubt, Style, doubt_about, other_layouts, style_of
from autoalign.matching.names import kind, words
from autoalign.matching.paths import Path
from autoalign.matching.scope import with_averages
from autoalign.plan.keys import common_module, components
from autoalign.plan.matches import Candidate, Match
from autoalign.plan.operations import Copy, InsertZeros, Operation, Shape, chain, in_parallel, output_shapes
from autoalign.plan.regions import joined, place_of
from autoalign.plan.specs import TensorSpec, tied_groups

_STRANDED = "the weight of this layer has another shape, so its bias is not taken alone"
_NO_BIAS = "the source has no bias here, which is one of zeros"


@dataclass(frozen=True, slots=True)
class SideParts:
    """What takes part of one side in matching."""

    specs: tuple[TensorSpec, ...]
    parts: Parts
    fusions: tuple[Fusion, ...] = ()
    config: Mapping[str, object] = field(default_factory=dict)  # what is known of its network, as it was found
    ordered: bool = True  # whether its keys come in the order of registration, as far as can be seen

    @staticmethod
    def of(
        specs: Sequence[TensorSpec],
        config: Mapping[str, object],
        counts: Sequence[int] | None = None,
        others: Collection[TensorSpec] = (),
    ) -> SideParts:
        """Read one side; ``others`` are the tensors of the other side, ``counts`` how many each tensor stands for."""
        ordered = not is_alphabetical([spec.key for spec in specs])
        named = with_torch_names(
            with_own_statistics(with_parametrised_weights(with_averages(parts_of(specs, counts)))), ordered=ordered
        )
        shapes = Counter(spec.shape for spec in others)
        parts = as_in_torch(with_joined_roles(with_claimed_roles(named), shapes), shapes)
        return SideParts(tuple(specs), parts, config=config, ordered=ordered)

    def key(self, part: Part) -> str:
        return self.specs[part.tensor].key


@dataclass(frozen=True, slots=True)
class Found:
    """The source part of one target part."""

    source: int
    operation: Operation  # from the source part to the target part
    confidence: float
    evidence: Mapping[str, float]
    rival: int | None  # the next best source part
    doubt: str | None = None  # why the rival may be as good


def assembled(source: SideParts, target: SideParts, found: Mapping[int, Found]) -> list[Match]:
    """Put the parts of each target tensor together; a tensor with a part that nothing fills gets no match.

    A bias that the source does not have beside those that it has (that of the key, often) is zero.
    """
    styles = style_of(source.specs, source.parts, source.config), style_of(target.specs, target.parts, target.config)
    layouts = _layouts(source, styles), _layouts(target, styles)
    wholes: dict[int, list[int]] = {}
    for part, piece in enumerate(target.parts):
        wholes.setdefault(piece.tensor, []).append(part)
    absent = {part for fusion in target.fusions for part in fusion.absent if len(target.parts[part].shape) == 1}
    filled = found.keys() | absent
    weights = {part.path[:-1]: part.shape for part in source.parts if len(part.shape) == 2}
    return [
        _match(source, target, parts, found, styles, layouts, weights)
        for parts in wholes.values()
        if filled.issuperset(parts) and not found.keys().isdisjoint(parts)
    ]


def _layouts(side: SideParts, styles: tuple[Style, Style]) -> dict[int, Doubt]:
    """Find, for the parts of fused tensors, how else they might be taken out of these."""
    result = {}
    convolved = {components(spec.key)[:-1] for spec in side.specs if len(spec.shape) == 3 and spec.shape[-1] == 1}
    for fusion in side.fusions:
        path = components(side.specs[fusion.tensor].key)
        reason, ways = other_layouts(fusion, path, styles, is_convolved=path[:-1] in convolved)
        if reason:
            for place, part in enumerate(fusion.parts):
                result[part] = Doubt(reason, tuple(views[place] for views in ways))
    return result


class _Piece(NamedTuple):
    """What fills a part of a target tensor."""

    key: str | None  # of the source tensor; None for zeros
    view: Operation  # from that tensor to the part
    shape: Shape


def _match(
    source: SideParts,
    target: SideParts,
    parts: Sequence[int],
    found: Mapping[int, Found],
    styles: tuple[Style, Style],
    layouts: tuple[Mapping[int, Doubt], Mapping[int, Doubt]],
    weights: Mapping[Path, Shape],
) -> Match:
    if _is_whole(source, target, parts, found):  # split on both sides, for other tensors' sake
        layouts = {}, {}
    filled = [found[part] for part in parts if part in found]
    least = filled[0] if len(filled) == 1 else min(filled, key=lambda piece: piece.confidence)
    confidence, whole = least.confidence, target.specs[target.parts[parts[0]].tensor]
    pieces, views = [], [target.parts[part].view for part in parts]
    others: dict[int, tuple[Operation, ...]] = {}  # place of a piece -> its other views
    is_known = is_usual = is_open = False  # whether a layout is known by more than its shape, usual, or neither
    split: dict[int, Doubt] = {}  # of the pieces that hold several blocks on both sides
    warnings: set[str] = set()
    for place, part in enumerate(parts):
        if part not in found:
            pieces.append(_Piece(None, Copy(), target.parts[part].shape))
            warnings.add(_NO_BIAS)
            continue
        piece = found[part]
        if piece.doubt:
            warnings.add(piece.doubt)
        own = source.parts[piece.source]
        pieces.append(_Piece(source.key(own), chain(own.view, piece.operation), target.parts[part].shape))
        if known := layouts[0].get(piece.source):
            others[place] = tuple(chain(view, piece.operation) for view in known.otherwise)
            is_open = True
            warnings.add(known.reason)
        doubt = doubt_about(own, target.parts[part], piece.operation, styles, weights.get(own.path[:-1], ()))
        if doubt and (known is None or doubt.reason == ROTARY):
            others[place] = (*others.get(place, ()), *(chain(own.view, way) for way in doubt.otherwise))
            warnings.add(doubt.reason)
            apart = doubt.blocks and own.shape[:1] == target.parts[part].shape[:1]
            split |= {place: doubt} if apart else {}
            settled = doubt.is_known and (apart or not doubt.blocks)
            usual = doubt.is_unlikely and not piece.doubt
            is_known, is_usual, is_open = is_known or settled, is_usual or usual, is_open or not (settled or usual)
    if _is_whole(source, target, parts, found) and not others:
        pieces, views = [_Piece(pieces[0].key, Copy(), whole.shape)], [Copy()]
    ways = [(pieces, views)]
    if others:
        for turn in range(max(map(len, others.values()))):
            changed = {place: views[turn] for place, views in others.items() if turn < len(views)}
            ways.append(([p._replace(view=changed.get(k, p.view)) for k, p in enumerate(pieces)], views))
    turns = min((len(doubt.blocks) for doubt in split.values()), default=0)
    ways += [_by_blocks(pieces, views, split, turn) for turn in range(turns)]
    if known := layouts[1].get(parts[0]):
        is_open = True
        warnings.add(known.reason)
        ways += [(pieces, [layouts[1][part].otherwise[turn] for part in parts]) for turn in range(len(known.otherwise))]
    if is_known and not is_open:
        ways[:2] = ways[1::-1]
    if BY_ORDER in warnings:
        confidence *= SPLIT_BY_ORDER_FACTOR
    if warnings - {BY_ORDER, _NO_BIAS}:
        confidence = min(confidence, INFERRED if (is_known or is_usual) and not is_open else AMBIGUOUS)
    (sources, operation), *rest = dict.fromkeys(_put_together(*way, whole.shape) for way in ways)
    alternatives = [Candidate(sources, operation, 0.0) for sources, operation in rest]
    if len(parts) == 1 and least.rival is not None and not alternatives:
        rival = source.parts[least.rival]
        shape = target.parts[parts[0]].shape
        chosen = source.parts[least.source]
        other = least.operation if rival.shape == chosen.shape else operation_between(rival.shape, shape)
        storage = source.specs[rival.tensor].storage
        is_same = storage is not None and storage == source.specs[chosen.tensor].storage and rival.view == chosen.view
        if other is not None and not is_same:
            otherwise = [_Piece(source.key(rival), chain(rival.view, other), shape)]
            alternatives.append(Candidate(*_put_together(otherwise, views, whole.shape), 0.0))
    return Match(
        target=whole.key,
        sources=sources,
        operation=operation,
        confidence=confidence,
        evidence=least.evidence,
        alternatives=tuple(alternatives),
        warnings=tuple(sorted(warnings)),
    )


def _is_whole(source: SideParts, target: SideParts, parts: Sequence[int], found: Mapping[int, Found]) -> bool:
    """True if the parts of a tensor are filled from the same parts of one of its shape."""
    pairs = [(source.parts[found[part].source], target.parts[part]) for part in parts if part in found]
    return (
        len(pairs) == len(parts) > 1
        and len({own.tensor for own, _ in pairs}) == 1
        and all(
            chain(own.view, found[part].operation) == other.view
            for part, (own, other) in zip(parts, pairs, strict=True)
        )
        and source.specs[pairs[0][0].tensor].shape == target.specs[pairs[0][1].tensor].shape
    )


def _by_blocks(
    pieces: Sequence[_Piece], views: Sequence[Operation], doubts: Mapping[int, Doubt], turn: int
) -> tuple[list[_Piece], list[Operation]]:
    """Split pieces, and the parts that they fill, into blocks with an operation each."""
    filling, taken = [], []
    for place, (piece, view) in enumerate(zip(pieces, views, strict=True)):
        if place not in doubts:
            filling.append(piece)
            taken.append(view)
            continue
        way = doubts[place].blocks[turn]
        for block, steps in zip(way.places, way.made, strict=True):
            filling.append(_Piece(piece.key, chain(piece.view, steps), output_shapes(block, [piece.shape])[0]))
            taken.append(chain(view, block))
    return filling, taken


def _put_together(
    pieces: Sequence[_Piece], views: Sequence[Operation], shape: Shape
) -> tuple[tuple[str, ...], Operation]:
    """Return the sources of a tensor and the operation that makes it of them; ``views`` take its parts out of it."""
    if len(pieces) == 1 and isinstance(views[0], Copy) and pieces[0].key is not None:
        return (pieces[0].key,), pieces[0].view
    order = sorted(range(len(pieces)), key=lambda place: place_of(views[place]))
    join = joined(shape, [views[place] for place in order])
    assert join is not None, "the parts of a tensor make it up"
    ordered = [pieces[place] for place in order]
    zeros = [InsertZeros(place, piece.shape) for place, piece in enumerate(ordered) if piece.key is None]
    steps = [piece.view for piece in ordered if piece.key is not None]
    sources = tuple(piece.key for piece in ordered if piece.key is not None)
    return sources, chain(in_parallel(steps), *zeros, join)


def operation_on_whole(key: str, own: Part, operation: Operation, wanted: Part, shape: Shape) -> Operation:
    """Return the operation from a source tensor to a target tensor of this shape, each of which is one part."""
    return _put_together([_Piece(key, chain(own.view, operation), wanted.shape)], [wanted.view], shape)[1]


def tie_warning(others: Sequence[Candidate]) -> str:
    """Write what else fits a tensor that the target ties."""
    return f"tied in the target; {', '.join(' + '.join(other.sources) for other in others)} would fit as well"


def without_aliases(
    source: Sequence[TensorSpec], target: Sequence[TensorSpec], kept: Collection[str]
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Leave out further keys of one tensor where the other side has no more matrices of its shape than this side.

    Where it has more, those of vectors stay as well.
    """
    sides = tuple(source), tuple(target)
    groups = [tied_groups(side) for side in sides]
    if not any(groups):
        return sides
    keys = [{spec.key for spec in side} for side in sides]
    aliases = [
        {key for group in of for key in sorted(group, key=lambda key: key not in known)[1:]} - set(kept)
        for of, known in zip(groups, reversed(keys), strict=True)
    ]
    counts = [
        Counter(spec.shape for spec in side if spec.key not in left) for side, left in zip(sides, aliases, strict=True)
    ]
    result = []
    for side, left, own, other in zip(sides, aliases, counts, reversed(counts), strict=True):
        shapes = {spec.shape for spec in side if spec.key in left and len(spec.shape) > 1}
        needed = {shape for shape in shapes if other[shape] > own[shape]}
        result.append(
            tuple(
                spec
                for spec in side
                if spec.key not in left or (spec.shape in needed if len(spec.shape) > 1 else needed)
            )
        )
    return result[0], result[1]


def with_ties(source: Sequence[TensorSpec], target: Sequence[TensorSpec], matches: Sequence[Match]) -> list[Match]:
    """Fill all keys of each tied target tensor from one source: that of the surest match among them."""
    groups = tied_groups(target)
    if not groups:
        return list(matches)
    by_key = {match.target: match for match in matches}
    storage = {spec.key: spec.storage for spec in source if spec.storage is not None}
    for keys in groups:
        known = [by_key[key] for key in keys if key in by_key]
        if not known:
            continue
        best = max(known, key=lambda match: match.confidence)
        tensors = {tuple(storage.get(key, key) for key in match.sources): match.sources for match in known}
        if len(tensors) > 1:  # one storage cannot hold them all
            ways = {match.sources: Candidate(match.sources, match.operation, 0.0) for match in known}
            others = [ways[sources] for sources in tensors.values() if sources != best.sources]
            warnings = (*best.warnings, tie_warning(others))
            best = replace(best, warnings=warnings, alternatives=(*others, *best.alternatives))
        for key in keys:
            if len(tensors) > 1 or key not in by_key or by_key[key].confidence < best.confidence:
                by_key[key] = replace(best, target=key)
    return list(by_key.values())


def with_stranded_biases(matches: Sequence[Match], *sides: Iterable[TensorSpec]) -> list[Match]:
    """Doubt the biases of layers whose weights have another shape, unless a rule fills them.

    >>> import torch
    >>> sides = ([TensorSpec(*weight, torch.float32)] for weight in (("head.weight", (4, 3)), ("fc.weight", (4, 2))))
    >>> with_stranded_biases([Match("fc.bias", ("head.bias",), confidence=1.0)], *sides)[0].warnings
    ('the weight of this layer has another shape, so its bias is not taken alone',)
    """
    filled = {match.target for match in matches}
    shapes, others = ({spec.key: spec.shape for spec in side if spec.key.endswith("weight")} for side in sides)

    def is_stranded(match: Match) -> bool:
        own, other = (
            shapes_of.get(f"{key.removesuffix('bias')}weight") if key.endswith("bias") else None
            for shapes_of, key in ((shapes, match.sources[0]), (others, match.target))
        )
        is_empty = f"{match.target.removesuffix('bias')}weight" not in filled
        return None not in (own, other) and own != other and is_empty and "rule" not in match.evidence

    return with_doubts(matches, _STRANDED, is_stranded)


def with_doubts(matches: Iterable[Match], why: str, is_doubted: Callable[[Match], bool]) -> list[Match]:
    """Warn of some matches, and limit their confidence to that of what is not loaded by default."""
    return [
        replace(match, confidence=min(match.confidence, AMBIGUOUS), warnings=(*match.warnings, why))
        if is_doubted(match)
        else match
        for match in matches
    ]


_MIN_SCORE = 0.5  # of a counterpart: names alike, or one neighbour in common
_MIN_NAME_SCORE_IN_BLOCK = 0.1  # from which the block that both stand in counts


def mismatched_units(
    source: tuple[Units, Sequence[Part], SideFeatures],
    target: tuple[Units, Sequence[Part], SideFeatures],
    partners: Mapping[int, int],
) -> list[tuple[int, int]]:
    """Pair the layers that are left on both sides: of the same kind, and alike in name or in the same surroundings.

    Surroundings are the neighbours, the block, and the end of the network. ``partners`` are the matched units, target
    -> source. Of each pair of a source and a target unit, either is the other's best.
    """
    used = set(partners.values())
    rows = [index for index in range(len(source[0])) if index not in used]
    columns = [index for index in range(len(target[0])) if index not in partners]
    if not rows or not columns:
        return []
    scores = name_scores([source[0].paths[i] for i in rows], [target[0].paths[j] for j in columns])
    blocks = source[0].blocks, target[0].blocks
    together = Counter((blocks[1][j], blocks[0][i]) for j, i in partners.items())
    counterpart = dict(pair for pair, _ in reversed(together.most_common()))  # target block -> source block
    last = len(source[0]) - 1, len(target[0]) - 1
    kinds = [_kind(source[0][i], source[1]) for i in rows], [_kind(target[0][j], target[1]) for j in columns]
    alike = _equal([of for of, _ in kinds[0]], [of for of, _ in kinds[1]])
    alike |= _equal([of for _, of in kinds[0]], [of for _, of in kinds[1]])
    extra = _equal([blocks[0][i] or None for i in rows], [counterpart.get(blocks[1][j], ()) for j in columns])
    extra &= scores > _MIN_NAME_SCORE_IN_BLOCK
    extra |= np.outer([i == last[0] for i in rows], [j == last[1] for j in columns])
    scores[extra] += 0.5
    for own, other in ((source[2].previous, target[2].previous), (source[2].next, target[2].next)):
        beside = [own[i] if own[i] >= 0 else None for i in rows]
        scores[_equal(beside, [partners.get(int(other[j]), -1) for j in columns])] += 0.5
    scores[_equal([source[0].paths[i] for i in rows], [target[0].paths[j] for j in columns])] += 1
    scores[~alike] = -1
    best, best_row = scores.argmax(axis=1).tolist(), scores.argmax(axis=0).tolist()
    return [
        (rows[row], columns[column])
        for row, column in enumerate(best)
        if scores[row, column] >= _MIN_SCORE and best_row[column] == row
    ]


def _equal(first: Sequence[Hashable], second: Sequence[Hashable]) -> NDArray[np.bool_]:
    """Compare all of one list with all of another: [first, second]."""
    numbers: dict[Hashable, int] = {}
    own, other = ([numbers.setdefault(value, len(numbers)) for value in values] for values in (first, second))
    return np.equal.outer(own, other)


def _kind(unit: Unit, parts: Sequence[Part]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Count the dimensions of each of a layer's tensors, with and without those of size one."""
    shapes = [parts[index].shape for name, index in unit.parts if name in ("weight", "bias", "other")]
    return tuple(map(len, shapes)), tuple(len(squeeze(shape)) for shape in shapes)


_Values = tuple[tuple[int, ...], str]  # shape and numeric


def unmatched_parameter_pairs(
    source: Sequence[Part], target: Sequence[Part], matched: Mapping[int, int]
) -> dict[int, int]:
    """Pair the remaining parameters of modules that are already matched: the only ones of a shape and a name there.

    Under other names, they must stand directly in these modules, within a numbered block.

    >>> names = ("gate.weight", "up.weight", "score_bias"), ("gate.weight", "up.weight", "gate.score_bias")
    >>> own, other = ([Part(k, (*name.split("."),), (4,), "float") for k, name in enumerate(side)] for side in names)
    >>> unmatched_parameter_pairs(own, other, {0: 0, 1: 1})
    {2: 2}

    ``matched`` maps parts of the target to those of the source, as does what is returned.
    """
    used = set(matched.values())
    spare = [index for index, part in enumerate(source) if index not in used]
    fitting = {_values(source[index]) for index in spare}
    vacant = [index for index, part in enumerate(target) if index not in matched and _values(part) in fitting]
    if not vacant:
        return {}
    partners: dict[Path, list[Path]] = {module: [] for index in vacant for module in _modules(target[index])}
    for other, partner in matched.items():
        for module in _modules(target[other]):
            if module in partners:
                partners[module].append(source[partner].path)
    sizes = Counter(module for index in used for module in _modules(source[index]))
    below = _below(source, spare), _below(target, vacant)
    pairs: dict[int, int] = {}
    for index in vacant:
        path, values = target[index].path, _values(target[index])
        for module in _modules(target[index]):
            counterpart = common_module(partners[module]) if partners[module] else None
            if counterpart is None or sizes[counterpart] > len(partners[module]):
                continue  # nothing tells what corresponds, or that holds more than this module does
            own, rivals = below[0].get((counterpart, values), []), below[1][module, values]
            is_direct = module == path[:-1] and all(source[k].path[:-1] == counterpart for k in own)
            if not (is_direct and block_around(path) and len(own) == len(rivals) == 1):
                own = [k for k in own if words(source[k].path[-1]) == words(path[-1]) != ()]
                rivals = [k for k in rivals if words(target[k].path[-1]) == words(path[-1])]
            if own:
                kinds = {kind(part.path[-1])[0] for part in (source[own[0]], target[index])} - {"other"}
                is_told = len(own) == len(rivals) == 1 and len(kinds) < 2  # a bias is no scale
                is_told &= _has_own_name(source[own[0]]) or _has_own_name(target[index])
                pairs |= {index: own[0]} if is_told else {}
                break
    return pairs


def _below(parts: Sequence[Part], indices: Sequence[int]) -> dict[tuple[Path, _Values], list[int]]:
    """Group some parts by module and shape, for each of the modules around them."""
    found: dict[tuple[Path, _Values], list[int]] = {}
    for index in indices:
        for module in _modules(parts[index]):
            found.setdefault((module, _values(parts[index])), []).append(index)
    return found


def _has_own_name(part: Part) -> bool:
    """True for a name like ``sinks`` or ``score_bias``, unlike ``weight`` or ``bias``, which every layer has."""
    return bool(kind(part.path[-1])[1])


def _values(part: Part) -> _Values:
    return squeeze(part.shape), part.numeric


def _modules(part: Part) -> list[Path]:
    """List the modules that a part is in, from the innermost to the root."""
    return [part.path[:depth] for depth in range(len(part.path) - 1, -1, -1)]
