"""Grids: how the positions of a table stand, as the names and modules around it tell.

A token count alone does not tell a grid: 200 rows may be a class token and 199 words, or 10 x 20 patches. What counts
is what stands around the table (words or patches, class and distillation tokens), and the sizes that a module has as
its attributes, or a configuration names; a square is assumed only where these do not tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt, prod

from torch import nn

from autoalign.adaptable import AdaptableSide
from autoalign.graph import Path
from autoalign.names import components, kind, role_words, words
from autoalign.specs import TensorSpec

Size = tuple[int, int]

_TOKENS: Mapping[str, frozenset[str]] = {
    "class token": frozenset({"cls"}),
    "distillation token": frozenset({"dist"}),
    "register": frozenset({"register", "registers", "reg"}),
}
# Which of them may stand before a grid, in this order.
_CHOICES: tuple[tuple[str, ...], ...] = (
    (),
    ("class token",),
    ("class token", "distillation token"),
    ("class token", "register"),
    ("class token", "distillation token", "register"),
)
_GRID_NAMES, _IMAGE_NAMES, _PATCH_NAME = ("grid_size", "window_size"), ("image_size", "img_size"), "patch_size"


@dataclass(frozen=True, slots=True)
class Grid:
    """The rows of one table of positions."""

    size: tuple[int, ...]  # (h, w) of an image, (n,) of a text or a sound
    tokens: tuple[str, ...] = ()  # what the rows before the grid belong to
    told: bool = False  # by a module, and not assumed


def grid_of(spec: TensorSpec, side: AdaptableSide) -> Grid | None:
    """Find the grid of a table of positions, [..., rows, width]; None where nothing tells it."""
    rows, width = spec.shape[-2:]
    dims, scope = _surroundings(spec, side.specs)
    if dims == 1:
        reserved = _reserved(spec.key, side.module)
        return Grid((rows - reserved,), ("reserved row",) * reserved, told=side.module is not None)
    if dims != 2:
        return None
    choices = _token_choices(scope, side.specs, width)
    for level in _attributes(spec.key, side):
        sizes = {size for attributes in level for size in _sizes(attributes)}
        found = {(size, tokens) for size in sizes for tokens in choices if prod(size) + len(tokens) == rows}
        if found:
            return Grid(*found.pop(), told=True) if len(found) == 1 else None
    square = [
        tokens for tokens in choices if rows > len(tokens) and isqrt(rows - len(tokens)) ** 2 == rows - len(tokens)
    ]
    if len(square) != 1:
        return None
    length = isqrt(rows - len(square[0]))
    return Grid((length, length), square[0])


def window_of(key: str, rows: int, side: AdaptableSide) -> Size | None:
    """Find the window (h, w) of a table of relative positions with (2h - 1)(2w - 1) rows, if anything tells it."""
    for level in _attributes(key, side):
        found = {(h, w) for attributes in level for h, w in _sizes(attributes) if (2 * h - 1) * (2 * w - 1) == rows}
        if found:
            return found.pop() if len(found) == 1 else None
    length = isqrt(max(rows, 0))
    return ((length + 1) // 2, (length + 1) // 2) if length * length == rows and length % 2 else None


def _surroundings(spec: TensorSpec, specs: Sequence[TensorSpec]) -> tuple[int, Path]:
    """Find what a table gives positions to, in the smallest module around it that tells.

    Returns:
        The dimensions of the grid, 1 for words or sound, 2 for images, 3 for videos, 0 if nothing tells; the module.
    """
    path = components(spec.key)
    paths = {components(other.key): other for other in specs}
    told = [(around, dims) for around, other in paths.items() if (dims := _dims_told(around, other, paths))]
    for depth in range(len(path) - 1, -1, -1):
        near = [entry for entry in told if entry[0][:depth] == path[:depth]]
        if near:
            return min(near, key=lambda entry: len(entry[0]))[1], path[:depth]
    return 0, ()


def _dims_told(path: Path, spec: TensorSpec, paths: Mapping[Path, TensorSpec]) -> int:
    """Read the dimensions of a grid off a kernel, a layer of patches, or a table of words; 0 for all other tensors."""
    if kind(path[-1])[0] != "weight" or len(spec.shape) < 2:
        return 0
    if len(spec.shape) > 2:
        return len(spec.shape) - 2
    named = role_words(path)
    if "patch" in named:
        return 2
    lone = (*path[:-1], "bias") not in paths
    return int(lone and bool(named & {"tok", "embed"}) and not named & {"pos", "rel", "type", "cls"})


def _token_choices(scope: Path, specs: Sequence[TensorSpec], width: int) -> list[tuple[str, ...]]:
    """List the tokens that may stand before a grid, one name for each row, by the parameters in scope."""
    counts: dict[str, int] = {}
    for spec in specs:
        *above, name = components(spec.key)
        named = set(words(name))
        if tuple(above[: len(scope)]) == scope and named & {"tok", "embed"} and "pos" not in named:
            for token, spellings in _TOKENS.items():
                if named & spellings and spec.numel % width == 0:
                    counts[token] = spec.numel // width
    choices = [choice for choice in _CHOICES if counts.keys() >= set(choice)]
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


def _attributes(key: str, side: AdaptableSide) -> Iterator[list[Mapping[str, object]]]:
    """Yield the attributes of the modules in each module around a tensor, innermost first; last the configurations."""
    for owner in reversed(_owners(key, side.module)):
        inner = [vars(part) for part in owner.modules()]
        yield [*inner, *(getattr(held["config"], "__dict__", {}) for held in inner if "config" in held)]
    yield list(_configs(side.config))


def _configs(config: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _configs(value)


def _sizes(attributes: Mapping[str, object]) -> set[Size]:
    """Read the sizes of grids off attributes: as they are, or as those of an image and its patches."""
    sizes = {size for name in _GRID_NAMES if (size := _pair(attributes.get(name)))}
    patch = _pair(attributes.get(_PATCH_NAME))
    if patch and all(patch):
        images = [size for name in _IMAGE_NAMES if (size := _pair(attributes.get(name)))]
        sizes |= {(height // patch[0], width // patch[1]) for height, width in images}
    return sizes


def _pair(value: object) -> Size | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(size, int) for size in value):
        return value[0], value[1]
    return None
