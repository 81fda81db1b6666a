"""The data of a page: an alignment as columns of small numbers, which a script turns back into trees and matches."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from autoalign.alignment import Alignment, Match, Status
from autoalign.html.tree import Leaf, Tree, template, tree
from autoalign.layout import escaped
from autoalign.leftovers import Counterparts, counterparts, difference, nearest, reason
from autoalign.operations import Copy, Operation
from autoalign.specs import TensorSpec

LINKS: tuple[Status, ...] = ("matched", "adapted", "ambiguous", "mismatched")  # what joins tensors of both sides
NEAREST = 200  # rows of a side whose nearest counterpart is sought, which takes a while for each

_Side = Literal["source", "target"]


@dataclass(frozen=True, slots=True)
class _Link:
    """What joins one target tensor with its sources."""

    status: Status
    match: Match
    said: tuple[Hashable, ...]  # of it in either tree: status, operation and warnings, without numbers
    numbers: tuple[int, ...]  # of its operation


@dataclass(slots=True)
class _Pool:
    """Values that occur many times, by their places."""

    places: dict[Any, int] = field(default_factory=dict)

    def add(self, value: Hashable) -> int:
        return self.places.setdefault(value, len(self.places))


@dataclass(frozen=True, slots=True)
class _Left:
    """The tensors of a side that nothing joins or uses, each with the reason, and what the other side has for them."""

    reasons: Mapping[str, str]
    others: Counterparts | None  # None where nothing is left


@dataclass(slots=True)
class _Pools:
    names: _Pool = field(default_factory=_Pool)
    shapes: _Pool = field(default_factory=_Pool)
    dtypes: _Pool = field(default_factory=_Pool)
    operations: _Pool = field(default_factory=_Pool)
    texts: _Pool = field(default_factory=_Pool)
    evidence: _Pool = field(default_factory=_Pool)


def page_data(alignment: Alignment) -> dict[str, Any]:
    """Turn an alignment into what the page needs of it; all of it can be written as JSON.

    Keys are written as on a screen, with characters that cannot be seen as their escapes. Tensors are numbered on
    each side in the order of its tree, and everything that occurs many times stands in a table once.
    """
    links = _links(alignment)
    pools = _Pools()
    left = {"source": _left(alignment, "source"), "target": _left(alignment, "target")}
    leaves = {
        "source": _source_leaves(alignment, links, left["source"]),
        "target": _target_leaves(alignment, links, left["target"]),
    }
    trees = {side: tree(found) for side, found in leaves.items()}
    places = {side: _places(alignment, side, trees[side]) for side in ("source", "target")}
    sides = {side: _side(alignment, side, trees[side], left[side], places, pools) for side in ("source", "target")}
    return {
        "notes": [escaped(note) for note in alignment.notes],
        "statuses": list(LINKS),
        **sides,
        "links": _columns(links, places["source"], places["target"], pools),
        "names": list(pools.names.places),
        "shapes": [list(shape) for shape in pools.shapes.places],
        "dtypes": list(pools.dtypes.places),
        "operations": [[text, _kinds(text)] for text in pools.operations.places],
        "texts": list(pools.texts.places),
        "evidence": [dict(cues) for cues in pools.evidence.places],
    }


def _links(alignment: Alignment) -> list[_Link]:
    links = [_link("adapted" if m.operation.adapts else "matched", m) for m in alignment.matches]
    links += [_link("ambiguous", match) for match in alignment.ambiguous]
    links += [_link("mismatched", Match(item.key, (item.source_key,))) for item in alignment.mismatched]
    return links


def _link(status: Status, match: Match) -> _Link:
    operation, numbers = template(str(match.operation))
    return _Link(status, match, (status, operation, match.warnings), tuple(numbers))


def _left(alignment: Alignment, side: _Side) -> _Left:
    specs = {spec.key: spec for spec in _specs(alignment, side)}
    keys = [key for key, status in alignment.status.items() if status == "missing"]
    if side == "source":
        keys = alignment.unexpected_keys
    if not keys:
        return _Left({}, None)
    others = counterparts(alignment, "target" if side == "source" else "source")
    return _Left({key: reason(specs[key], others) for key in keys}, others)


def _target_leaves(alignment: Alignment, links: Sequence[_Link], left: _Left) -> list[Leaf]:
    by_key = {link.match.target: link for link in links}
    leaves = []
    for spec in alignment.target_specs:
        said: tuple[Hashable, ...] = (spec.shape, spec.dtype)
        numbers: list[int] = []
        if link := by_key.get(spec.key):
            for key in link.match.sources:
                text, found = template(key)
                said, numbers = (*said, text), numbers + found
            said, numbers = (*said, *link.said), [*numbers, *link.numbers]
        else:
            said = (*said, left.reasons[spec.key])
        leaves.append(Leaf(escaped(spec.key), said, tuple(numbers)))
    return leaves


def _source_leaves(alignment: Alignment, links: Sequence[_Link], left: _Left) -> list[Leaf]:
    uses: dict[str, list[tuple[_Link, int, tuple[str, list[int]]]]] = {}
    for link in links:
        use = template(link.match.target)
        for place, key in enumerate(link.match.sources):
            uses.setdefault(key, []).append((link, place, use))
    leaves = []
    for spec in alignment.source_specs:
        said: tuple[Hashable, ...] = (spec.shape, spec.dtype)
        numbers: list[int] = []
        for link, place, (text, own) in uses.get(spec.key, ()):
            said, numbers = (*said, text, *link.said), [*numbers, *own, *link.numbers, place]
        if not uses.get(spec.key):
            said = (*said, left.reasons.get(spec.key, "tied"))
        leaves.append(Leaf(escaped(spec.key), said, tuple(numbers)))
    return leaves


def _specs(alignment: Alignment, side: str) -> tuple[TensorSpec, ...]:
    return alignment.source_specs if side == "source" else alignment.target_specs


def _places(alignment: Alignment, side: str, found: Tree) -> dict[str, int]:
    """Number the tensors of a side in the order of its tree."""
    specs = _specs(alignment, side)
    return {specs[tensor].key: place for place, tensor in enumerate(tensor for tensor in found.tensors if tensor >= 0)}


def _side(
    alignment: Alignment,
    side: _Side,
    found: Tree,
    left: _Left,
    places: Mapping[str, Mapping[str, int]],
    pools: _Pools,
) -> dict[str, Any]:
    specs = [_specs(alignment, side)[tensor] for tensor in found.tensors if tensor >= 0]
    return {
        "name": [pools.names.add(name) for name in found.names],
        # of modules; of tensors one less than the negative
        "depth": [
            depth if tensor < 0 else -1 - depth for depth, tensor in zip(found.depths, found.tensors, strict=True)
        ],
        "runs": [[node, length] for node, length in sorted(found.runs.items())],
        "shape": [pools.shapes.add(spec.shape) for spec in specs],
        "dtype": [pools.dtypes.add(spec.dtype_name) for spec in specs],
        "left": _rows_left(alignment, side, found, left, places, pools),
    }


def _rows_left(
    alignment: Alignment,
    side: _Side,
    found: Tree,
    left: _Left,
    places: Mapping[str, Mapping[str, int]],
    pools: _Pools,
) -> list[list[int]]:
    """List what is missing or unexpected: the tensor, the reason, and its nearest counterpart with the difference."""
    if left.others is None:
        return []
    own, opposite = places[side], places["target" if side == "source" else "source"]
    specs = {spec.key: spec for spec in _specs(alignment, side)}
    nodes = [node for node, tensor in enumerate(found.tensors) if tensor >= 0]
    shown = found.representatives()
    sought = 0
    rows = []
    for key, why in left.reasons.items():
        place = own[key]
        row = [place, pools.texts.add(escaped(why))]
        if shown[nodes[place]] == nodes[place] and sought < NEAREST:
            sought += 1
            row += _nearest(specs[key], left.others, opposite, pools)
        rows.append(row)
    return rows


def _nearest(spec: TensorSpec, others: Counterparts, places: Mapping[str, int], pools: _Pools) -> list[int]:
    near = nearest(spec, others)
    if near is None:
        return []
    return [places[near.key], pools.texts.add(difference(near.shape, spec.shape).strip(" ()"))]


def _columns(
    links: Sequence[_Link], source: Mapping[str, int], target: Mapping[str, int], pools: _Pools
) -> dict[str, Any]:
    def one_or_more(keys: Sequence[str]) -> int | list[int]:
        found = [source[key] for key in keys]
        return found[0] if len(found) == 1 else found

    def operation(of: Operation) -> int:
        return pools.operations.add(escaped(str(of)))

    matches = [link.match for link in links]
    return {
        "status": [LINKS.index(link.status) for link in links],
        "target": [target[match.target] for match in matches],
        "sources": [one_or_more(match.sources) for match in matches],
        "operation": [operation(match.operation) for match in matches],
        "confidence": [round(match.confidence, 4) for match in matches],
        "evidence": [
            pools.evidence.add(tuple((escaped(cue), round(value, 3)) for cue, value in match.evidence.items()))
            for match in matches
        ],
        "warnings": [[pools.texts.add(escaped(warning)) for warning in match.warnings] or 0 for match in matches],
        "alternatives": [
            [[one_or_more(other.sources), operation(other.operation)] for other in match.alternatives] or 0
            for match in matches
        ],
    }


def _kinds(operation: str) -> str:
    """Name the kinds of operations, without their numbers.

    >>> _kinds("transpose + concatenate(dim 0)"), _kinds("reshape[4, 2]")
    ('transpose + concatenate', 'reshape')
    """
    kinds: list[str] = []
    depth = 0
    for char in operation:
        depth += char in "(["
        if not depth:
            kinds.append(char)
        depth -= char in ")]"
    return "".join(kinds).strip() or str(Copy())
