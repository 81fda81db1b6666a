"""Shared rows: classifiers, embeddings and output layers that differ in how many classes or tokens they have.

What a layer is shows in its name, its shape and its place, never in the name of a network: a table of embeddings has
no bias, a classifier is called so or stands last, and what has as many rows as either belongs to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from autoalign.adaptable import AdaptableSide, Plan, named
from autoalign.adaptations import Adapt, TakeRows
from autoalign.candidates import operation_between
from autoalign.graph import Path
from autoalign.matches import Mismatch
from autoalign.names import components, kind, numbers, stem, words
from autoalign.operations import Copy, Operation, Parallel, chain

_HEAD = frozenset({"head", "fc", "logits"})
_VOCAB = frozenset({"tok", "embed", "vocab"})
_NO_VOCAB = frozenset({"pos", "rel", "patch"})


@dataclass(frozen=True, slots=True)
class Rows:
    """Counterparts that differ in the number of their rows alone, of which there is one for each class or token."""

    dim: int  # along which they stand in the target
    have: int
    need: int
    before: Operation  # brings the source to the target's layout

    @property
    def counts(self) -> tuple[int, int]:
        """The number of rows on both sides."""
        return self.have, self.need


def shared_rows(
    mismatched: Sequence[Mismatch], source: AdaptableSide, target: AdaptableSide
) -> dict[str, tuple[Rows, frozenset[Adapt]]]:
    """Find the counterparts that differ in rows, and tell whether these are classes, tokens, or neither.

    What has as many rows as a layer of one kind is of its kind, but what has as many as a vocabulary is no classifier.
    """
    biases = {item.key: item.shape for item in mismatched if len(item.shape) == 1}
    found = {item.key: (item, rows) for item in mismatched if (rows := _rows_of(item, biases))}
    templates = Counter(_template(item.key) for item, _ in found.values())
    tokens, classes, outputs = set(), set(), set()
    for item, rows in found.values():
        both = named(item.source_key, item.key)
        if _is_vocabulary(item, source, target):
            tokens.add(rows.counts)
        if "lm" in both:
            outputs.add(rows.counts)
        last = templates[_template(item.key)] == 1 and (item.key == target.last or item.source_key == source.last)
        if len(item.shape) > 1 and "embed" not in both and (last or _is_called_head(item)):
            classes.add(rows.counts)
    kinds: dict[tuple[int, int], frozenset[Adapt]] = dict.fromkeys(classes, frozenset({"head"}))
    kinds |= {counts: kinds.get(counts, frozenset()) | {"vocab"} for counts in outputs}
    kinds |= dict.fromkeys(tokens, frozenset({"vocab"}))
    return {key: (rows, kinds.get(rows.counts, frozenset())) for key, (_, rows) in found.items()}


def rows_plan(rows: Rows) -> Plan:
    """Plan to take the rows that both sides have from the source, and to keep the target's others."""
    take = TakeRows(rows.dim, min(rows.have, rows.need), max(rows.need - rows.have, 0))
    before = rows.before
    text = f"the first {rows.need} of the source's {rows.have} rows were taken"
    if take.kept:
        text = f"the first {rows.have} rows are the source's, the last {take.kept} keep the model's own values"
        before = before if isinstance(before, Copy) else Parallel((before, Copy()))
    return Plan(chain(before, take), text)


def _rows_of(item: Mismatch, biases: Mapping[str, tuple[int, ...]]) -> Rows | None:
    """Read counterparts as the same layer or bias with another number of rows, if their shapes admit it."""
    shapes = item.source_shape, item.shape
    if len(item.source_shape) == len(item.shape) == 1:
        is_bias = kind(components(item.key)[-1])[0] == "bias"
        return Rows(0, *item.source_shape, *item.shape, Copy()) if is_bias else None
    if min(map(len, shapes)) < 2 or 0 in item.shape or any(size != 1 for shape in shapes for size in shape[2:]):
        return None  # the outputs of a larger kernel stand for places as well as for classes
    dim = _standing(item, biases)
    have = prod(item.source_shape) * item.shape[dim] // prod(item.shape)
    wanted = (*item.shape[:dim], have, *item.shape[dim + 1 :])
    ways = (operation_between(item.source_shape, wanted, flipped=way) for way in (False, True))
    before = next(filter(None, ways), None)
    return None if before is None else Rows(dim, have, item.shape[dim], before)


def _standing(item: Mismatch, biases: Mapping[str, tuple[int, ...]]) -> int:
    """Find the dimension of a target matrix along which its rows stand: its bias tells, where it is not the first."""
    bias = biases.get(f"{item.key.rpartition('.')[0]}.bias")
    return int(len(item.shape) == 2 and bias == item.shape[1:] and bias != item.shape[:1])


def _is_vocabulary(item: Mismatch, source: AdaptableSide, target: AdaptableSide) -> bool:
    """Tell a table of embeddings: called so on both sides, without a bias."""
    own, other = named(item.source_key), named(item.key)
    lone = source.is_lone(item.source_key) and target.is_lone(item.key)
    return lone and bool(own & _VOCAB and other & _VOCAB) and not (own | other) & _NO_VOCAB and len(item.shape) > 1


def _is_called_head(item: Mismatch) -> bool:
    """Tell a classifier that is called so on both sides, outside all blocks."""
    return all(_names_head(components(key)) for key in (item.source_key, item.key))


def _names_head(path: Path) -> bool:
    for place, component in enumerate(path):
        if _HEAD & set(words(component)):
            return not any(map(numbers, path[:place]))
    return False


def _template(key: str) -> Path:
    return tuple(map(stem, components(key)))
