"""The data of a page: an alignment as columns of small numbers, which a script turns back into trees and matches."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

from autoalign.html.tree import Leaf, Tree, template, tree
from autoalign.layout import escaped
from autoalign.leftovers import Counterparts, counterparts, difference, nearest, reason
from autoalign.matches import Match, Plan, Status
from autoalign.operations import Copy, Operation
from autoalign.specs import TensorSpec

LINKS: tuple[Status, ...] = ("matched", "adapted", "ambiguous", "mismatched")  # what joins tensors of both sides
NEAREST = 200  # rows of a side whose nearest counterpart is sought, which takes a while for each

_Use = tuple[tuple[Hashable, ...], tuple[int, ...]]  # what is said of a tensor where it is used, and the numbers in it


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
class _Side:
    """One side of the page."""

    specs: tuple[TensorSpec, ...]  # in the order of the tree
    tree: Tree
    places: Mapping[str, int]  # of each key among them
    reasons: Mapping[str, str]  # why nothing joins or uses a tensor, for those
    others: Counterparts | None  # what the other side has for them; None where there are none


@dataclass(slots=True)
class _Pools:
    names: _Pool = field(default_factory=_Pool)
    shapes: _Pool = field(default_factory=_Pool)
    dtypes: _Pool = field(default_factory=_Pool)
    operations: _Pool = field(default_factory=_Pool)
    texts: _Pool = field(default_factory=_Pool)
    evidence: _Pool = field(default_factory=_Pool)


def page_data(alignment: Plan) -> dict[str, Any]:
    """Turn an alignment into what the page needs of it; all of it can be written as JSON.

    Keys are written as on a screen, with characters that cannot be seen as their escapes. Tensors are numbered on
    each side in the order of its tree, and everything that occurs many times stands in a table once.
    """
    links = _links(alignment)
    pools = _Pools()
    source, target = _side_of(alignment, "source", links), _side_of(alignment, "target", links)
    return {
        "notes": [escaped(note) for note in alignment.notes],
        "statuses": list(LINKS),
        "source": _side_columns(source, target, pools),
        "target": _side_columns(target, source, pools),
        "links": _link_columns(links, source.places, target.places, pools),
        "names": list(pools.names.places),
        "shapes": [list(shape) for shape in pools.shapes.places],
        "dtypes": list(pools.dtypes.places),
        "operations": [[text, _kinds(text)] for text in pools.operations.places],
        "texts": list(pools.texts.places),
        "evidence": [dict(cues) for cues in pools.evidence.places],
    }


def _links(alignment: Plan) -> list[_Link]:
    links = [_link("adapted" if m.operation.adapts else "matched", m) for m in alignment.matches]
    links += [_link("ambiguous", match) for match in alignment.ambiguous]
    links += [_link("mismatched", Match(item.key, (item.source_key,))) for item in alignment.mismatched]
    return links


def _link(status: Status, match: Match) -> _Link:
    operation, numbers = template(str(match.operation))
    return _Link(status, match, (status, operation, match.warnings), tuple(numbers))


def _side_of(alignment: Plan, side: Literal["source", "target"], links: Sequence[_Link]) -> _Side:
    if side == "source":
        specs, uses, left = alignment.source_specs, _uses_of_sources(links), alignment.unexpected_keys
        others = counterparts(alignment, "target") if left else None
    else:
        specs, uses = alignment.target_specs, _uses_of_targets(links)
        left = [key for key, status in alignment.status.items() if status == "missing"]
        others = counterparts(alignment, "source") if left else None
    by_key = {spec.key: spec for spec in specs}
    reasons = {key: reason(by_key[key], others) for key in left} if others else {}
    leaves = []
    for spec in specs:
        said: tuple[Hashable, ...] = (spec.shape, spec.dtype)
        numbers: tuple[int, ...] = ()
        for more, own in uses.get(spec.key) or [((reasons.get(spec.key, "tied"),), ())]:
            said, numbers = (*said, *more), (*numbers, *own)
        leaves.append(Leaf(escaped(spec.key), said, numbers))
    found = tree(leaves)
    ordered = tuple(specs[tensor] for tensor in found.tensors if tensor >= 0)
    return _Side(ordered, found, {spec.key: place for place, spec in enumerate(ordered)}, reasons, others)


def _uses_of_targets(links: Sequence[_Link]) -> dict[str, list[_Use]]:
    uses: dict[str, list[_Use]] = {}
    for link in links:
        texts, numbers = zip(*map(template, link.match.sources), strict=True)
        uses[link.match.target] = [((*texts, *link.said), (*chain.from_iterable(numbers), *link.numbers))]
    return uses


def _uses_of_sources(links: Sequence[_Link]) -> dict[str, list[_Use]]:
    uses: dict[str, list[_Use]] = {}
    for link in links:
        text, numbers = template(link.match.target)
        for place, key in enumerate(link.match.sources):
            uses.setdefault(key, []).append(((text, *link.said), (*numbers, *link.numbers, place)))
    return uses


def _side_columns(side: _Side, opposite: _Side, pools: _Pools) -> dict[str, Any]:
    tree = side.tree
    return {
        "name": [pools.names.add(name) for name in tree.names],
        # of modules; of tensors one less than the negative
        "depth": [depth if tensor < 0 else -1 - depth for depth, tensor in zip(tree.depths, tree.tensors, strict=True)],
        "runs": [[node, length] for node, length in sorted(tree.runs.items())],
        "shape": [pools.shapes.add(spec.shape) for spec in side.specs],
        "dtype": [pools.dtypes.add(spec.dtype_name) for spec in side.specs],
        "left": _rows_left(side, opposite.places, pools),
    }


def _rows_left(side: _Side, opposite: Mapping[str, int], pools: _Pools) -> list[list[int]]:
    """List what is missing or unexpected: the tensor, the reason, and its nearest counterpart with the difference."""
    if side.others is None:
        return []
    nodes = [node for node, tensor in enumerate(side.tree.tensors) if tensor >= 0]
    shown = side.tree.representatives()
    sought = 0
    rows = []
    for key, why in side.reasons.items():
        place = side.places[key]
        row = [place, pools.texts.add(escaped(why))]
        if shown[nodes[place]] == nodes[place] and sought < NEAREST:
            sought += 1
            row += _nearest(side.specs[place], side.others, opposite, pools)
        rows.append(row)
    return rows


def _nearest(spec: TensorSpec, others: Counterparts, places: Mapping[str, int], pools: _Pools) -> list[int]:
    near = nearest(spec, others)
    if near is None:
        return []
    return [places[near.key], pools.texts.add(difference(near.shape, spec.shape).strip(" ()"))]


def _link_columns(
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
