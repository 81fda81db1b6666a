"""Adapting: which of the counterparts of another shape ``adapt`` may fill, and by what operation.

What a tensor is shows in its name, its shape and its place, never in the name of a network: a table of embeddings has
no bias, a classifier is called so or stands last, and what has as many rows as either belongs to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isqrt, prod

from torch import nn

from autoalign.adaptations import (
    ADAPTS,
    Adapt,
    RepeatChannels,
    ResizeBiases,
    ResizeGrid,
    ResizePositions,
    SumChannels,
    TakeRows,
)
from autoalign.alignment import Match, Mismatch
from autoalign.candidates import operation_between, squeeze
from autoalign.errors import InputError
from autoalign.graph import Path
from autoalign.grids import Grid, grid_of, window_of
from autoalign.names import components, kind, numbers, words
from autoalign.operations import Copy, Operation, Parallel, Reshape, chain
from autoalign.specs import TensorSpec

_CONFIDENCE = 0.8  # in a counterpart of another shape: name, place and the other dimensions agree
_PINNED = 0.95  # in one that a rule names
_EXTRA_BIASES = (0, 3)  # rows behind a table of relative positions: none, or those from, to and of a class token
_COLOURS = 3

_HEAD = frozenset({"head", "fc", "logits"})
_VOCAB = frozenset({"tok", "embed", "lm", "vocab"})
_NO_VOCAB = frozenset({"pos", "rel", "patch"})
_NO_POSITIONS = frozenset({"q", "rel", "type", "bias"})


@dataclass(frozen=True)
class AdaptableSide:
    """One side of an alignment, as far as adapting needs it."""

    specs: tuple[TensorSpec, ...]
    module: nn.Module | None  # the side itself, where it is a module

    @cached_property
    def by_key(self) -> dict[str, TensorSpec]:
        """The spec of each key."""
        return {spec.key: spec for spec in self.specs}

    @cached_property
    def kernels(self) -> list[TensorSpec]:
        """The weights of convolutions, in order."""
        return [spec for spec in self.specs if len(spec.shape) > 2 and kind(components(spec.key)[-1])[0] == "weight"]

    @cached_property
    def last(self) -> str:
        """The key of the last matrix."""
        return next((spec.key for spec in reversed(self.specs) if len(squeeze(spec.shape)) > 1), "")

    def is_lone(self, key: str) -> bool:
        """Tell whether a weight has no bias."""
        return f"{key.rpartition('.')[0]}.bias".lstrip(".") not in self.by_key


@dataclass(frozen=True, slots=True)
class _Plan:
    operation: Operation
    warning: str


def checked_adapt(adapt: Iterable[str]) -> frozenset[str]:
    """Take ``adapt`` as a set of names.

    >>> sorted(checked_adapt("head")), sorted(checked_adapt(("vocab", "head")))
    (['head'], ['head', 'vocab'])

    Raises:
        InputError: Some name is unknown.
    """
    names = (adapt,) if isinstance(adapt, str) else tuple(adapt) if isinstance(adapt, Iterable) else (adapt,)
    unknown = [name for name in names if name not in ADAPTS]
    if unknown:
        raise InputError(
            f"adapt={', '.join(map(repr, unknown))} is no change of values that can be made. "
            f"Nothing was aligned; choose from {', '.join(map(repr, ADAPTS))}."
        )
    return frozenset(names)


def adapted(
    matches: Sequence[Match],
    mismatched: Sequence[Mismatch],
    source: AdaptableSide,
    target: AdaptableSide,
    allowed: frozenset[str],
    pins: Mapping[str, str],
) -> tuple[list[Match], list[str]]:
    """Make the matches that change values.

    Args:
        matches: All others. One that copies a table of positions is replaced where both sides tell different grids.
        mismatched: The counterparts that may be adapted.
        source: The source.
        target: The target.
        allowed: Of ``ADAPTS``.
        pins: What the rules fix, target key -> source key.

    Returns:
        The matches that change values, and statements about what could not be adapted for want of evidence.
    """
    surest = max((match.confidence for match in matches), default=1.0)  # a side in doubt as a whole stays so
    kinds = _row_kinds(mismatched, source, target)
    made: dict[str, Match] = {}
    notes = []

    def make(key: str, source_key: str, plan: _Plan, evidence: Mapping[str, float]) -> None:
        sureness = _PINNED if pins.get(key) == source_key else _CONFIDENCE
        made[key] = Match(
            key,
            (source_key,),
            plan.operation,
            confidence=min(sureness, surest),
            evidence=evidence,
            warnings=(f"adapted: {plan.warning}",),
        )

    for item in mismatched:
        pair = source.by_key[item.source_key], target.by_key[item.key]
        if item.key in made or not all(spec.dtype.is_floating_point for spec in pair):
            continue
        plan: _Plan | str | None = None
        if kinds.get(item.key, frozenset()) & allowed:
            plan = _rows(*pair, rows_stand=_standing(item, mismatched))
        elif "in_channels" in allowed and _is_first_kernel(*pair, source, target):
            plan = _channels(*pair)
        elif "rel_pos" in allowed and _are_relative(*pair):
            plan = _relative(*pair, source, target)
        elif "pos_embed" in allowed and _are_positions(*pair):
            plan = _positions(*pair, source, target)
        if isinstance(plan, str):
            notes.append(f"{item.key} {list(item.shape)} was not adapted: {plan}")
        elif plan is not None:
            make(item.key, item.source_key, plan, {"rule": 1.0} if item.key in pins else {"name": 1.0})
    if "pos_embed" in allowed:
        for match in matches:
            pair = source.by_key[match.sources[0]], target.by_key[match.target]
            if len(match.sources) == 1 and pair[0].shape[-2:] == pair[1].shape[-2:] and _are_positions(*pair):
                plan = _positions(*pair, source, target, assume=False)
                if isinstance(plan, _Plan):
                    make(match.target, match.sources[0], plan, match.evidence)
    return list(made.values()), notes


# rows of classes and tokens


def _row_kinds(
    mismatched: Sequence[Mismatch], source: AdaptableSide, target: AdaptableSide
) -> dict[str, frozenset[Adapt]]:
    """Tell for each target key whether its rows are classes or tokens; what has as many rows as another is of its kind.

    Where a vocabulary has as many rows as an output layer, that is no classifier.
    """
    pairs = {item.key: pair for item in mismatched if (pair := _row_counts(item, mismatched))}
    tokens = {pairs[item.key] for item in mismatched if item.key in pairs and _is_vocabulary(item, source, target)}
    classes = {pairs[item.key] for item in mismatched if item.key in pairs and _is_head(item, source, target)}
    outputs = {
        pairs[item.key] for item in mismatched if item.key in pairs and "lm" in _named(item.key, item.source_key)
    }
    kinds: dict[str, frozenset[Adapt]] = {}
    for key, pair in pairs.items():
        found: set[Adapt] = set()
        if pair in tokens | outputs:
            found.add("vocab")
        if pair in classes and pair not in tokens:
            found.add("head")
        kinds[key] = frozenset(found)
    return kinds


def _row_counts(item: Mismatch, mismatched: Sequence[Mismatch]) -> tuple[int, int] | None:
    """Count the rows of a layer or a bias on both sides, where nothing else differs."""
    own, other = squeeze(item.source_shape), squeeze(item.shape)
    if max(map(len, (item.shape, item.source_shape))) > 2 and any(
        size != 1 for shape in (item.shape, item.source_shape) for size in shape[2:]
    ):
        return None  # the outputs of a kernel stand for places as well as for classes
    if len(item.source_shape) == len(item.shape) == 1:
        return item.source_shape[0], item.shape[0]
    dim = _standing(item, mismatched)
    width = prod(item.shape) // item.shape[dim]
    if len(own) > 2 or len(other) > 2 or not width or prod(item.source_shape) % width or len(item.shape) < 2:
        return None
    rows = prod(item.source_shape) // width
    if not any(_laid_out(item.source_shape, item.shape, dim, rows, flipped=way) for way in (False, True)):
        return None
    return rows, item.shape[dim]


def _standing(item: Mismatch, mismatched: Sequence[Mismatch]) -> int:
    """Find the dimension of a target matrix along which its rows stand: its bias tells, where it is not the first."""
    if len(item.shape) != 2 or item.shape[0] == item.shape[1]:
        return 0
    layer = item.key.rpartition(".")[0]
    biases = [other.shape for other in mismatched if other.key.rpartition(".")[0] == layer and len(other.shape) == 1]
    return 1 if (item.shape[1],) in biases and (item.shape[0],) not in biases else 0


def _laid_out(
    source: tuple[int, ...], target: tuple[int, ...], dim: int, rows: int, *, flipped: bool
) -> Operation | None:
    """Find the operation that brings the source to the target's shape but for the number of rows."""
    return operation_between(source, (*target[:dim], rows, *target[dim + 1 :]), flipped=flipped)


def _is_vocabulary(item: Mismatch, source: AdaptableSide, target: AdaptableSide) -> bool:
    own, other = _named(item.source_key), _named(item.key)
    lone = source.is_lone(item.source_key) and target.is_lone(item.key)
    return bool(own & _VOCAB and other & _VOCAB) and not (own | other) & _NO_VOCAB and lone and len(item.shape) == 2


def _is_head(item: Mismatch, source: AdaptableSide, target: AdaptableSide) -> bool:
    """Tell a classifier: called so outside all lists of blocks, on both sides, or the last matrix of one."""
    if len(squeeze(item.shape)) < 2 or "embed" in _named(item.source_key, item.key):
        return False
    called = all(_is_called_head(components(key)) for key in (item.source_key, item.key))
    return called or item.key == target.last or item.source_key == source.last


def _is_called_head(path: Path) -> bool:
    for place, component in enumerate(path):
        if set(words(component)) & _HEAD:
            return not any(numbers(above) and not words(above) for above in path[:place])
    return False


def _rows(source: TensorSpec, target: TensorSpec, rows_stand: int) -> _Plan | None:
    dim, width = rows_stand, target.numel // target.shape[rows_stand]
    rows, wanted = source.numel // width, target.shape[dim]
    before = next(
        (op for way in (False, True) if (op := _laid_out(source.shape, target.shape, dim, rows, flipped=way))), None
    )
    if before is None:
        return None
    take = TakeRows(dim, min(rows, wanted), max(wanted - rows, 0))
    if take.needs_target and not isinstance(before, Copy):
        before = Parallel((before, Copy()))
    text = f"the first {wanted} of the source's {rows} rows were taken"
    if take.kept:
        text = f"the first {rows} rows are the source's, the last {take.kept} keep the model's own values"
    return _Plan(chain(before, take), text)


# channels of a first layer


def _is_first_kernel(source: TensorSpec, target: TensorSpec, own: AdaptableSide, other: AdaptableSide) -> bool:
    if len(source.shape) < 3 or len(source.shape) != len(target.shape):
        return False
    alike = source.shape[:1] + source.shape[2:] == target.shape[:1] + target.shape[2:]
    first = [side.kernels[0].shape[1] if side.kernels else 0 for side in (own, other)]
    return alike and (source.shape[1] == first[0] or target.shape[1] == first[1])


def _channels(source: TensorSpec, target: TensorSpec) -> _Plan:
    have, need = source.shape[1], target.shape[1]
    blocks = have // _COLOURS  # of pixels, where a stem folds blocks of them into channels
    if need == 1:
        return _Plan(SumChannels(have), f"the sum of {have} input channels")
    if have == _COLOURS * need and isqrt(blocks) ** 2 == blocks:
        return _Plan(SumChannels(_COLOURS), f"the sum of each {_COLOURS} of {have} input channels")
    return _Plan(
        RepeatChannels(need), f"the {have} input channels again and again for {need}, rescaled by {have}/{need}"
    )


# positions


def _are_positions(source: TensorSpec, target: TensorSpec) -> bool:
    named = _named(source.key), _named(target.key)
    return (
        all("pos" in name and not name & _NO_POSITIONS for name in named)
        and min(len(source.shape), len(target.shape)) > 1
    )


def _positions(
    source: TensorSpec, target: TensorSpec, own: AdaptableSide, other: AdaptableSide, *, assume: bool = True
) -> _Plan | str | None:
    if len(source.shape) == len(target.shape) == 4:
        return _grid(source.shape, target.shape)
    if source.shape[-1] != target.shape[-1] or any(
        size != 1 for shape in (source.shape, target.shape) for size in shape[:-2]
    ):
        return None
    grids = grid_of(source, own.specs, own.module), grid_of(target, other.specs, other.module)
    if grids[0] is None or grids[1] is None:
        which = "source" if grids[0] is None else "target"
        shape = source.shape if grids[0] is None else target.shape
        return (
            f"nothing tells on what grid the {shape[-2]} rows of the {which} stand. "
            "Where one side is a state dict, give the model that it is of."
        )
    if len(grids[0].size) != len(grids[1].size):
        return "the positions of one side stand in a row, those of the other on a grid."
    if not assume and not (all(grid.told for grid in grids) and grids[0].size != grids[1].size):
        return None
    first, second = _with_reserved(grids[0], grids[1]), _with_reserved(grids[1], grids[0])
    return _resized(first, second, source.shape, target.shape)


def _with_reserved(grid: Grid, other: Grid) -> Grid:
    """Take over from a module how many rows come before the first position of a sequence that a state dict holds."""
    if grid.told or not other.told or len(grid.size) != 1 or grid.size[0] <= len(other.tokens):
        return grid
    return replace(grid, size=(grid.size[0] - len(other.tokens),), tokens=other.tokens)


def _resized(own: Grid, other: Grid, source: tuple[int, ...], target: tuple[int, ...]) -> _Plan:
    labels = list(_numbered(own.tokens))
    tokens = tuple(labels.index(token) if token in labels else -1 for token in _numbered(other.tokens))
    resize = ResizePositions(own.size, other.size, len(own.tokens), tokens)
    leading = (*source[:-2], *target[-2:])
    text = "positions were interpolated" if own.size != other.size else "positions were taken"
    if dropped := sorted(set(own.tokens) - set(other.tokens)):
        text += f"; that of the source's {', '.join(dropped)} was left out"
    if kept := sorted({name for name, row in zip(other.tokens, tokens, strict=True) if row < 0}):
        text += f"; that of the {', '.join(kept)} keeps the model's own values"
    return _Plan(chain(resize, Copy() if leading == target else Reshape(target)), text)


def _numbered(tokens: Iterable[str]) -> Iterator[tuple[str, int]]:
    counts: dict[str, int] = {}
    for token in tokens:
        counts[token] = counts.get(token, -1) + 1
        yield token, counts[token]


def _grid(source: tuple[int, ...], target: tuple[int, ...]) -> _Plan | None:
    first, last = source[:2] == target[:2], (source[0], source[3]) == (target[0], target[3])
    if first == last or source[0] != 1:
        return None
    place = slice(1, 3) if last else slice(2, 4)
    (old_height, old_width), (height, width) = source[place], target[place]
    return _Plan(ResizeGrid((old_height, old_width), (height, width), last), "positions were interpolated")


# relative positions


def _are_relative(source: TensorSpec, target: TensorSpec) -> bool:
    named = _named(source.key), _named(target.key)
    if len(source.shape) != len(target.shape) or not all("rel" in name for name in named):
        return False
    return all("bias" in name or "pos" in name for name in named)


def _relative(source: TensorSpec, target: TensorSpec, own: AdaptableSide, other: AdaptableSide) -> _Plan | str | None:
    text = "relative positions were interpolated"
    if len(source.shape) == 3 and source.shape[0] == target.shape[0]:
        if not all(size % 2 for size in (*source.shape[1:], *target.shape[1:])):
            return None
        old, new = (((shape[1] + 1) // 2, (shape[2] + 1) // 2) for shape in (source.shape, target.shape))
        return _Plan(ResizeBiases(old, new), text)
    if len(source.shape) != 2 or source.shape[1] != target.shape[1]:
        return None
    if not any("bias" in _named(spec.key) for spec in (source, target)):  # one axis alone, without heads
        ends = source.shape[0], target.shape[0]
        return _Plan(ResizePositions(ends[:1], ends[1:]), text) if all(end % 2 for end in ends) else None
    for extra in _EXTRA_BIASES:
        windows = (
            window_of(source.key, source.shape[0] - extra, own.module),
            window_of(target.key, target.shape[0] - extra, other.module),
        )
        if windows[0] and windows[1]:
            return _Plan(ResizeBiases(*windows, extra), text)
    return "nothing tells for what windows the tables are."


def _named(*keys: str) -> set[str]:
    return {word for key in keys for component in components(key)[-3:] for word in words(component)}
