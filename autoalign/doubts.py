"""Doubts: tensors whose shapes fit although their rows may be in another order.

Nothing in two lists of shapes shows these. A match in doubt is proposed, with its other layouts, and not loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoalign.names import words
from autoalign.operations import Operation, Permute, Reshape, chain
from autoalign.specs import TensorSpec
from autoalign.units import Part
from autoalign.vocabulary import INTERLEAVED, META_STYLE

DOUBTED = 0.45  # the most that a match in doubt is believed

_ROTARY = (
    "right shape, but rotary layouts differ between Meta's and Hugging Face's code: "
    "the rows of each query and key head may have to be reordered"
)
_FUSED = "right shape, but one side may interleave query, key and value by head"


@dataclass(frozen=True, slots=True)
class Doubt:
    """Why a pair of tensors might not be laid out alike, and what would turn one layout into the other."""

    reason: str
    otherwise: Operation | None = None


@dataclass(frozen=True, slots=True)
class Style:
    """What a side's keys tell of the code that they come from."""

    meta: bool  # of Meta's code, which rotates neighbouring rows
    positions: bool  # has tables of positions, so nothing is rotated
    head_dim: int | None  # as a companion buffer of rotation frequencies tells


def style_of(specs: Sequence[TensorSpec], parts: Sequence[Part]) -> Style:
    """Read the style off a side's keys."""
    names = {component for part in parts for component in part.path}
    found = {frozenset(words(name)) for name in names}
    frequencies = {
        2 * spec.shape[0] for spec in specs if spec.key.endswith(("rope.freqs", "inv_freq")) and len(spec.shape) == 1
    }
    return Style(
        meta=bool(names & META_STYLE),
        positions=any({"pos", "embed"} <= of or "rel" in of for of in found),
        head_dim=frequencies.pop() if len(frequencies) == 1 else None,
    )


def doubt_about(source: Part, target: Part, styles: tuple[Style, Style]) -> Doubt | None:
    """Tell what speaks against taking a source part as it is for a target part of its shape."""
    own, other = ({word for component in part.path[-3:] for word in words(component)} for part in (source, target))
    whole = "qkv" in own and "qkv" in other
    if whole and any(
        (a in source.path and a not in target.path) or (a in target.path and a not in source.path) for a in INTERLEAVED
    ):
        return Doubt(_FUSED)
    split = {"q", "k"} & own & other and len(source.shape) == 2
    separate = source.view == target.view  # a part of a fused tensor comes from code that does not rotate neighbours
    if split and separate and styles[0].meta != styles[1].meta and not any(style.positions for style in styles):
        return Doubt(_ROTARY, _reordered(source, styles))
    return None


def _reordered(source: Part, styles: tuple[Style, Style]) -> Operation | None:
    head_dim = styles[0].head_dim or styles[1].head_dim
    if not head_dim or head_dim % 2 or not source.shape or source.shape[0] % head_dim:
        return None
    heads, half, rest = source.shape[0] // head_dim, head_dim // 2, source.shape[1:]
    pairs = (heads, half, 2, *rest) if styles[0].meta else (heads, 2, half, *rest)
    return chain(Reshape(pairs), Permute((0, 2, 1, *range(3, len(pairs)))), Reshape(source.shape))
