"""Tables of positions: the grid on which their rows stand, and how a table is resized to another grid.

A grid is read off modules and configurations around a table, else assumed to be a square. What a table gives positions
to shows in the smallest module around it that holds a kernel, a layer of patches, or a table of words.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isqrt, prod

from torch import nn

from autoalign.matching.layers import squeeze
from autoalign.matching.names import kind, role_words, words
from autoalign.matching.paths import Path
from autoalign.matching.vocabulary import (
    GRID_ATTRIBUTES,
    IMAGE_ATTRIBUTES,
    NO_POSITIONS,
    PATCH_ATTRIBUTE,
    TOKENS,
    TOKENS_BEFORE_GRID,
)
from autoalign.plan.adaptations import ResizeBiases, ResizeGrid, ResizePositions
from autoalign.plan.keys import components
from autoalign.plan.operations import Copy, Operation, Reshape, chain
from autoalign.plan.specs import TensorSpec

_EXTRA_ROWS = (0, 3)  # after a table of relative positions: none, or those from, to and of a class token
_INTERPOLATED = "positions were interpolated"

_Size = tuple[int, int]


@dataclass(frozen=True)
class AdaptableSide:
    """One side of an alignment, as far as adapting needs it."""

    specs: tuple[TensorSpec, ...]
    module: nn.Module | None = None  # the side itself, if it is a module
    config: Mapping[str, object] = field(default_factory=dict)  # found beside the checkpoint

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

    def has_no_bias(self, key: str) -> bool:
        """True if a weight has no bias beside it."""
        return f"{key.rpartition('.')[0]}.bias".lstrip(".") not in self.by_key


@dataclass(frozen=True, slots=True)
class Adaptation:
    """How a tensor is adapted, as an operation and in words."""

    operation: Operation
    warning: str


def key_words(*keys: str) -> set[str]:
    """Return the words in the last components of keys."""
    return {word for key in keys for word in role_words(components(key))}


@dataclass(frozen=True, slots=True)
class _Grid:
    """The rows of one table of positions."""

    size: tuple[int, ...]  # (h, w) of an image, (n,) of a text or a sound
    tokens: tuple[str, ...] = ()  # what the rows before the grid belong to
    is_known: bool = False  # from a module, not assumed


def _grid_of(spec: TensorSpec, side: AdaptableSide) -> _Grid | None:
    """Find the grid of a table of positions, [..., rows, width]; None if it is unknown."""
    rows, width = spec.shape[-2:]
    dims, scope = _surroundings(spec, side.specs)
    if dims == 1:
        reserved = _reserved(spec.key, side.module)
        return _Grid((rows - reserved,), ("reserved row",) * reserved, is_known=side.module is not None)
    if dims != 2:
        return None
    choices = _token_choices(scope, side.specs, width)
    for sizes in _sizes_around(spec.key, side):
        if found := {(size, tokens) for size in sizes for tokens in choices if prod(size) + len(tokens) == rows}:
            return _Grid(*found.pop(), is_known=True) if len(found) == 1 else None
    square = [
        tokens for tokens in choices if rows > len(tokens) and isqrt(rows - len(tokens)) ** 2 == rows - len(tokens)
    ]
    if len(square) != 1:
        return None
    length = isqrt(rows - len(square[0]))
    return _Grid((length, length), square[0])


def _window_of(key: str, rows: int, side: AdaptableSide) -> _Size | None:
    """Find the window (h, w) of a table of relative positions with (2h - 1)(2w - 1) rows, or None."""
    for sizes in _sizes_around(key, side):
        if found := {(h, w) for h, w in sizes if (2 * h - 1) * (2 * w - 1) == rows}:
            return found.pop() if len(found) == 1 else None
    length = isqrt(max(rows, 0))
    return ((length + 1) // 2, (length + 1) // 2) if length * length == rows and length % 2 else None


def _surroundings(spec: TensorSpec, specs: Sequence[TensorSpec]) -> tuple[int, Path]:
    """Find what a table gives positions to, in the smallest module around it that holds evidence.

    Returns:
        The dimensions of the grid, 1 for words or sound, 2 for images, 3 for videos, 0 if unknown; the module.
    """
    path = components(spec.key)
    paths = {components(other.key): other for other in specs}
    known = [(around, dims) for around, other in paths.items() if (dims := _grid_dims(around, other, paths))]
    for depth in range(len(path) - 1, -1, -1):
        near = [entry for entry in known if entry[0][:depth] == path[:depth]]
        if near:
            return min(near, key=lambda entry: len(entry[0]))[1], path[:depth]
    return 0, ()


def _grid_dims(path: Path, spec: TensorSpec, paths: Mapping[Path, TensorSpec]) -> int:
    """Return the dimensions of the grid of a kernel, a layer of patches, or a table of words; 0 for other tensors."""
    if kind(path[-1])[0] != "weight" or len(spec.shape) < 2:
        return 0
    if len(spec.shape) > 2:
        return len(spec.shape) - 2
    found = role_words(path)
    if "patch" in found:
        return 2
    has_no_bias = (*path[:-1], "bias") not in paths
    return int(has_no_bias and bool(found & {"tok", "embed"}) and not found & {"pos", "rel", "type", "cls"})


def _token_choices(scope: Path, specs: Sequence[TensorSpec], width: int) -> list[tuple[str, ...]]:
    """List the tokens that may stand before a grid, one name for each row, by the parameters in scope."""
    counts: dict[str, int] = {}
    for spec in specs:
        *above, name = components(spec.key)
        found = set(words(name))
        if tuple(above[: len(scope)]) == scope and found & {"tok", "embed"} and "pos" not in found:
            for token, spellings in TOKENS.items():
                if found & spellings and spec.numel % width == 0:
                    counts[token] = spec.numel // width
    choices = [choice for choice in TOKENS_BEFORE_GRID if counts.keys() >= set(choice)]
    return [tuple(token for token in choice for _ in range(counts[token])) for choice in choices]


def _reserved(key: str, module: nn.Module | None) -> int:
    """Count the rows before the first position: those up to the padding's, or those that an offset skips."""
    owners = _owners(key, module)
    attributes = vars(owners[-1]) if owners else {}
    padding, offset = attributes.get("padding_idx"), attributes.get("offset")
    return padding + 1 if isinstance(padding, int) else offset if isinstance(offset, int) else 0


def _owners(key: str, module: nn.Module | None) -> list[nn.Module]:
    """List the modules around a tensor, outermost first, as far as the key's names lead."""
    owners = [] if module is None else [module]
    for name in components(key)[:-1]:
        child = owners[-1]._modules.get(name) if owners else None
        if child is None:
            break
        owners.append(child)
    return owners


def _sizes_around(key: str, side: AdaptableSide) -> Iterator[set[_Size]]:
    """Yield the sizes of grids that the modules around a tensor tell, innermost first, then the configurations."""
    for owner in reversed(_owners(key, side.module)):
        inner = [vars(part) for part in owner.modules()]
        configs = [getattr(attributes["config"], "__dict__", {}) for attributes in inner if "config" in attributes]
        yield {size for attributes in (*inner, *configs) for size in _sizes(attributes)}
    yield {size for config in _nested(side.config) for size in _sizes(config)}


def _nested(config: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _nested(value)


def _sizes(attributes: Mapping[str, object]) -> set[_Size]:
    """Return the sizes of grids in attributes: as they are, or as those of an image and its patches."""
    sizes = {size for name in GRID_ATTRIBUTES if (size := _pair(attributes.get(name)))}
    patch = _pair(attributes.get(PATCH_ATTRIBUTE))
    if patch and all(patch):
        images = [size for name in IMAGE_ATTRIBUTES if (size := _pair(attributes.get(name)))]
        sizes |= {(height // patch[0], width // patch[1]) for height, width in images}
    return sizes


def _pair(value: object) -> _Size | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(size, int) for size in value):
        return value[0], value[1]
    return None


def are_positions(source: TensorSpec, target: TensorSpec) -> bool:
    """True for two tables of absolute positions."""
    found = key_words(source.key), key_words(target.key)
    are_tables = len(source.shape) > 1 and len(target.shape) > 1
    return are_tables and all("pos" in each and not each & NO_POSITIONS for each in found)


def positions_plan(
    source: TensorSpec, target: TensorSpec, own: AdaptableSide, other: AdaptableSide
) -> Adaptation | str:
    """Plan to resize a table of positions, or return the reason why that cannot be done."""
    if len(source.shape) == len(target.shape) == 4:
        return _grid_plan(source.shape, target.shape)
    leading = source.shape[:-2] + target.shape[:-2]
    if source.shape[-1] != target.shape[-1] or any(size != 1 for size in leading):
        return "they differ in more than the number of positions."
    grids = _grid_of(source, own), _grid_of(target, other)
    if grids[0] is None or grids[1] is None:
        side, rows = ("source", source.shape[-2]) if grids[0] is None else ("target", target.shape[-2])
        return f"the grid of the {rows} rows of the {side} is unknown; pass a module instead of a state dict."
    if len(grids[0].size) != len(grids[1].size):
        return "one side has the positions of a sequence, the other those of a grid."
    return _resizing(_like(grids[0], grids[1]), _like(grids[1], grids[0]), source.shape, target.shape)


def regridding_plan(
    source: TensorSpec, target: TensorSpec, own: AdaptableSide, other: AdaptableSide
) -> Adaptation | None:
    """Plan to resize a table of positions of equal shape, if modules tell that the two grids differ."""
    if source.shape[-2:] != target.shape[-2:] or len(source.shape) > 3:
        return None
    grids = _grid_of(source, own), _grid_of(target, other)
    if not (grids[0] and grids[1] and grids[0].is_known and grids[1].is_known) or grids[0].size == grids[1].size:
        return None
    return _resizing(grids[0], grids[1], source.shape, target.shape) if len(grids[0].size) == 2 else None


def _like(grid: _Grid, other: _Grid) -> _Grid:
    """Return an assumed grid of a sequence with as many rows before the first position as a known one has."""
    if grid.is_known or not other.is_known or len(grid.size) != 1 or grid.size[0] <= len(other.tokens):
        return grid
    return replace(grid, size=(grid.size[0] - len(other.tokens),), tokens=other.tokens)


def _resizing(own: _Grid, other: _Grid, source: tuple[int, ...], target: tuple[int, ...]) -> Adaptation:
    places = {token: place for place, token in enumerate(_counted(own.tokens))}
    tokens = tuple(places.get(token, -1) for token in _counted(other.tokens))
    text = _INTERPOLATED if own.size != other.size else "positions were taken"
    if dropped := sorted(set(own.tokens) - set(other.tokens)):
        text += f", that of the source's {', '.join(dropped)} was left out"
    if kept := sorted({name for name, place in zip(other.tokens, tokens, strict=True) if place < 0}):
        text += f", that of the {', '.join(kept)} keeps the model's own values"
    resize = ResizePositions(own.size, other.size, len(own.tokens), tokens)
    return Adaptation(chain(resize, Copy() if len(source) == len(target) else Reshape(target)), text)


def _counted(tokens: Iterable[str]) -> list[tuple[str, int]]:
    """Number the tokens of each name.

    >>> _counted(["class token", "register", "register"])
    [('class token', 0), ('register', 0), ('register', 1)]
    """
    counted: list[tuple[str, int]] = []
    for token in tokens:
        counted.append((token, sum(token == name for name, _ in counted)))
    return counted


def _grid_plan(source: tuple[int, ...], target: tuple[int, ...]) -> Adaptation | str:
    first, last = source[:2] == target[:2], (source[0], source[3]) == (target[0], target[3])
    if first == last or source[0] != 1:
        return "it is unknown which of its dimensions are those of the grid."
    place = slice(1, 3) if last else slice(2, 4)
    (old_height, old_width), (height, width) = source[place], target[place]
    return Adaptation(ResizeGrid((old_height, old_width), (height, width), last), _INTERPOLATED)


def are_relative(source: TensorSpec, target: TensorSpec) -> bool:
    """True for two tables of relative positions, not for coordinates of such positions."""
    found = key_words(source.key), key_words(target.key)
    return len(source.shape) == len(target.shape) and all("rel" in each and each & {"bias", "pos"} for each in found)


def relative_plan(source: TensorSpec, target: TensorSpec, own: AdaptableSide, other: AdaptableSide) -> Adaptation | str:
    """Plan to resize a table of relative positions, or return the reason why that cannot be done."""
    text = f"relative {_INTERPOLATED}"
    shapes = source.shape, target.shape
    if len(source.shape) == 3 and source.shape[0] == target.shape[0]:
        if any(size % 2 == 0 for shape in shapes for size in shape[1:]):
            return "a table of relative positions with an even length has no centre."
        windows = [((shape[1] + 1) // 2, (shape[2] + 1) // 2) for shape in shapes]
        return Adaptation(ResizeBiases(windows[0], windows[1]), text)
    if len(source.shape) != 2 or source.shape[1] != target.shape[1]:
        return "they differ in more than the window."
    if "bias" not in key_words(source.key, target.key):  # one axis alone, as [2h - 1, width]
        if any(shape[0] % 2 == 0 for shape in shapes):
            return "a table of relative positions with an even length has no centre."
        return Adaptation(ResizePositions(source.shape[:1], target.shape[:1]), text)
    for extra in _EXTRA_ROWS:
        old = _window_of(source.key, source.shape[0] - extra, own)
        new = _window_of(target.key, target.shape[0] - extra, other)
        if old and new:
            return Adaptation(ResizeBiases(old, new, extra), text)
    return "their windows are unknown; pass modules instead of state dicts."
