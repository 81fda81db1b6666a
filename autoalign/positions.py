"""Positions: how tables of positions, absolute and relative, are brought to another number of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from autoalign.adaptable import AdaptableSide, Plan, named
from autoalign.adaptations import ResizeBiases, ResizeGrid, ResizePositions
from autoalign.grids import Grid, grid_of, window_of
from autoalign.operations import Copy, Reshape, chain
from autoalign.specs import TensorSpec

_EXTRA_BIASES = (0, 3)  # rows behind a table of relative positions: none, or those from, to and of a class token
_NO_POSITIONS = frozenset({"q", "rel", "type", "bias", "linear", "proj", "conv", "norm"})
_INTERPOLATED = "positions were interpolated"


def are_positions(source: TensorSpec, target: TensorSpec) -> bool:
    """Tell whether two tensors are tables of absolute positions."""
    names = named(source.key), named(target.key)
    is_table = len(source.shape) > 1 and len(target.shape) > 1
    return is_table and all("pos" in name and not name & _NO_POSITIONS for name in names)


def positions_plan(source: TensorSpec, target: TensorSpec, own: AdaptableSide, other: AdaptableSide) -> Plan | str:
    """Plan to resize a table of positions, or say why that cannot be done."""
    if len(source.shape) == len(target.shape) == 4:
        return _grid_plan(source.shape, target.shape)
    leading = source.shape[:-2] + target.shape[:-2]
    if source.shape[-1] != target.shape[-1] or any(size != 1 for size in leading):
        return "more differs than the number of positions."
    grids = grid_of(source, own), grid_of(target, other)
    if grids[0] is None or grids[1] is None:
        side, rows = ("source", source.shape[-2]) if grids[0] is None else ("target", target.shape[-2])
        return f"nothing tells on what grid the {rows} rows of the {side} stand. A module tells more than a state dict."
    if len(grids[0].size) != len(grids[1].size):
        return "the positions of one side stand in a row, those of the other on a grid."
    return _resizing(_like(grids[0], grids[1]), _like(grids[1], grids[0]), source.shape, target.shape)


def regridding_plan(source: TensorSpec, target: TensorSpec, own: AdaptableSide, other: AdaptableSide) -> Plan | None:
    """Plan to resize a table of positions of the same shape, if modules tell that its grid is another one."""
    if source.shape[-2:] != target.shape[-2:] or len(source.shape) > 3:
        return None
    grids = grid_of(source, own), grid_of(target, other)
    if not (grids[0] and grids[1] and grids[0].told and grids[1].told) or grids[0].size == grids[1].size:
        return None
    return _resizing(grids[0], grids[1], source.shape, target.shape) if len(grids[0].size) == 2 else None


def _like(grid: Grid, other: Grid) -> Grid:
    """Take over from a module how many rows come before the first position of a sequence that a state dict holds."""
    if grid.told or not other.told or len(grid.size) != 1 or grid.size[0] <= len(other.tokens):
        return grid
    return replace(grid, size=(grid.size[0] - len(other.tokens),), tokens=other.tokens)


def _resizing(own: Grid, other: Grid, source: tuple[int, ...], target: tuple[int, ...]) -> Plan:
    places = {token: place for place, token in enumerate(_counted(own.tokens))}
    tokens = tuple(places.get(token, -1) for token in _counted(other.tokens))
    text = _INTERPOLATED if own.size != other.size else "positions were taken"
    if dropped := sorted(set(own.tokens) - set(other.tokens)):
        text += f", that of the source's {', '.join(dropped)} was left out"
    if kept := sorted({name for name, place in zip(other.tokens, tokens, strict=True) if place < 0}):
        text += f", that of the {', '.join(kept)} keeps the model's own values"
    resize = ResizePositions(own.size, other.size, len(own.tokens), tokens)
    return Plan(chain(resize, Copy() if len(source) == len(target) else Reshape(target)), text)


def _counted(tokens: Iterable[str]) -> list[tuple[str, int]]:
    """Number the tokens of each name.

    >>> _counted(["class token", "register", "register"])
    [('class token', 0), ('register', 0), ('register', 1)]
    """
    counted: list[tuple[str, int]] = []
    for token in tokens:
        counted.append((token, sum(token == name for name, _ in counted)))
    return counted


def _grid_plan(source: tuple[int, ...], target: tuple[int, ...]) -> Plan | str:
    first, last = source[:2] == target[:2], (source[0], source[3]) == (target[0], target[3])
    if first == last or source[0] != 1:
        return "nothing tells which of its dimensions are the grid's."
    place = slice(1, 3) if last else slice(2, 4)
    (old_height, old_width), (height, width) = source[place], target[place]
    return Plan(ResizeGrid((old_height, old_width), (height, width), last), _INTERPOLATED)


def are_relative(source: TensorSpec, target: TensorSpec) -> bool:
    """Tell whether two tensors are tables of relative positions; coordinates of such positions are none."""
    names = named(source.key), named(target.key)
    return len(source.shape) == len(target.shape) and all("rel" in name and name & {"bias", "pos"} for name in names)


def relative_plan(source: TensorSpec, target: TensorSpec, own: AdaptableSide, other: AdaptableSide) -> Plan | str:
    """Plan to resize a table of relative positions, or say why that cannot be done."""
    text = f"relative {_INTERPOLATED}"
    shapes = source.shape, target.shape
    if len(source.shape) == 3 and source.shape[0] == target.shape[0]:
        if any(size % 2 == 0 for shape in shapes for size in shape[1:]):
            return "it has no centre."
        windows = [((shape[1] + 1) // 2, (shape[2] + 1) // 2) for shape in shapes]
        return Plan(ResizeBiases(windows[0], windows[1]), text)
    if len(source.shape) != 2 or source.shape[1] != target.shape[1]:
        return "more differs than the window."
    if "bias" not in named(source.key, target.key):  # one axis alone, as [2h - 1, width]
        if any(shape[0] % 2 == 0 for shape in shapes):
            return "it has no centre."
        return Plan(ResizePositions(source.shape[:1], target.shape[:1]), text)
    for extra in _EXTRA_BIASES:
        old = window_of(source.key, source.shape[0] - extra, own)
        new = window_of(target.key, target.shape[0] - extra, other)
        if old and new:
            return Plan(ResizeBiases(old, new, extra), text)
    return "nothing tells for what windows the tables are. A module tells more than a state dict."
