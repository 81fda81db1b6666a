"""What needs no search: sides that differ in few names or in names alone, and equal blocks, of which few stand for all.

Sides of the same names, a few layers aside, are matched by these where each of the few is the only layer of its shapes
on both sides, and no other tensor has as many elements, in whatever layout. Sides whose module trees are isomorphic are
matched tensor by tensor where names tell equal siblings apart. In long lists of equal blocks only the first are
matched; their matches are continued in the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from autoalign.matching.assembly import Found, SideParts, assembled
from autoalign.matching.candidates import operation_between
from autoalign.matching.confidence import INFERRED, PROVEN
from autoalign.matching.layers import Part, Unit
from autoalign.matching.names import kind, words
from autoalign.matching.paths import Path
from autoalign.matching.vocabulary import RIVAL_PAIRS
from autoalign.plan.keys import LEVELS, common_module, components, numbers, split_key, stem
from autoalign.plan.matches import Candidate, Match, Mismatch
from autoalign.plan.operations import Shape
from autoalign.plan.specs import TensorSpec

KEPT = 4  # blocks of each run that are matched
MAX_PAIRS_OF_ALL = 500_000  # pairs of layers of equal shape up to which all blocks may be matched instead
_MAX_OTHER_SHARE = 0.5  # of tensors with other names or shapes
_MAX_OTHERS = 32  # such tensors; more are seldom the only ones of their shapes
_BY_NAME = {"name": 1.0, "shape": 1.0}
_BY_SHAPE = {"structure": 1.0, "shape": 1.0}
_MIN_TENSORS = 8  # of two sides whose module trees are no coincidence
_LONG_LIST = 6  # members above which a list runs from the input to the output, wherever its numbers begin

Specs = Sequence[TensorSpec]
_Members = tuple[str, ...]
_Content = tuple[tuple[str, str, Shape], ...]  # kind, numeric and flat shape of each tensor of a layer


def with_same_names(source: Specs, target: Specs) -> list[Match] | None:
    """Match two sides by equal names; None unless that matches each tensor of either side for certain.

    >>> import torch
    >>> shapes = {"a.weight": (3, 2), "b.weight": (4, 3), "c.weight": (5, 4)}
    >>> source = [TensorSpec(key, shape, torch.float32) for key, shape in shapes.items()]
    >>> target = [*source[:2], TensorSpec("head.weight", (5, 4), torch.float32)]
    >>> [(match.sources, match.target) for match in with_same_names(source, target) or ()][2:]
    [(('c.weight',), 'head.weight')]
    """
    shapes = {spec.key: spec.shape for spec in source}
    if len(shapes) != len(target):
        return None
    rest = [spec for spec in target if shapes.get(spec.key) != spec.shape]
    if not rest:
        return [Match(spec.key, (spec.key,), evidence=_BY_NAME) for spec in target]
    if len(rest) > min(_MAX_OTHER_SHARE * len(target), _MAX_OTHERS):
        return None
    known = {spec.key: spec.shape for spec in target if shapes.get(spec.key) == spec.shape}
    own = [spec for spec in source if spec.key not in known]
    modules = {split_key(key)[0] for key in known}
    if any(split_key(spec.key)[0] in modules for spec in (*own, *rest)):  # parts of layers of equal names
        return None
    found = _only_ones(own, rest, set(map(prod, known.values())))
    return found and [Match(key, (key,), evidence=_BY_NAME) for key in known] + found


def _only_ones(source: Specs, target: Specs, other_sizes: set[int]) -> list[Match] | None:
    """Match layers that are the only ones of their shapes; no tensor in them may be of one of the other sizes."""
    sides = SideParts.of(source, {}), SideParts.of(target, {})
    own, other = ({_content(unit, side.parts): unit for unit in side.parts.units} for side in sides)
    if len(own) < len(sides[0].parts.units) or len(other) < len(sides[1].parts.units) or own.keys() != other.keys():
        return None
    if any(max(prod(shape) for _, _, shape in content) in other_sizes for content in own):
        return None
    found = {}
    for content, unit in own.items():
        for (_, a), (_, b) in zip(unit.parts, other[content].parts, strict=True):
            operation = operation_between(sides[0].parts[a].shape, sides[1].parts[b].shape)
            if operation is None:
                return None
            found[b] = Found(a, operation, PROVEN, _BY_SHAPE, None)
    matches = assembled(*sides, found)
    is_sure = len(matches) == len(target) and all(match.confidence == PROVEN for match in matches)
    return matches if is_sure else None


def _content(unit: Unit, parts: Sequence[Part]) -> _Content:
    tensors = ((values, parts[index].numeric, parts[index].shape) for values, index in unit.parts)
    return tuple((values, numeric, ((*shape, 1)[0], prod(shape[1:]))) for values, numeric, shape in tensors)


def is_renamed(source: Sequence[Part], target: Sequence[Part]) -> bool:
    """True if the n-th part of one side is certainly the n-th of the other.

    >>> own, other = ([Part(n, (top, str(n), "weight"), (n + 1, n + 2), "float") for n in range(8)] for top in "ab")
    >>> is_renamed(own, other), is_renamed(own, other[::-1])
    (True, False)
    """
    if len(source) != len(target) or len(source) < _MIN_TENSORS:
        return False
    if any(_values(a) != _values(b) for a, b in zip(source, target, strict=True)):
        return False
    partner: dict[Path, Path] = {(): ()}
    content: dict[Path, int] = {}  # sums of hashes, which tell multisets of tensors apart
    for own, other, part in zip(_inner(source), _inner(target), source, strict=True):
        if len(own) != len(other):
            return False
        values = hash(_values(part))
        for depth in range(len(own) + 1):
            if partner.setdefault(own[:depth], other[:depth]) != other[:depth]:
                return False
            content[own[:depth]] = content.get(own[:depth], 0) + values
    if len(set(partner.values())) < len(partner):
        return False
    siblings: dict[tuple[Path, int], list[tuple[str, str]]] = {}
    for own, other in partner.items():
        if own:
            siblings.setdefault((own[:-1], content[own]), []).append((own[-1], other[-1]))
    return all(map(_are_distinct, siblings.values()))


def _values(part: Part) -> tuple[tuple[int, ...], str, str]:
    return part.shape, part.numeric, kind(part.path[-1])[0]


def _inner(parts: Sequence[Part]) -> list[Path]:
    """List the paths below the module that holds everything."""
    paths = [part.path for part in parts]
    depth = len(common_module(paths))
    return [path[depth:] for path in paths]


def _are_distinct(names: Sequence[tuple[str, str]]) -> bool:
    """True if the names of equal siblings tell which is which, and none of them is a rival of its partner's."""
    if any((a, b) in RIVAL_PAIRS for own, other in names for a in words(own) for b in words(other)):
        return False
    if len(names) == 1:
        return True
    lists = [{stem(name) for name in side} for side in zip(*names, strict=True)]
    places = [[numbers(name) for name in side] for side in zip(*names, strict=True)]
    if len(lists[0]) == len(lists[1]) == 1:
        in_order = all(side == sorted(side) for side in places)
        return places[0] == places[1] or (in_order and len(names) > _LONG_LIST)
    return all(
        own == other or (words(own) == words(other) != () and numbers(own) == numbers(other)) for own, other in names
    )


@dataclass(frozen=True)
class Runs:
    """The runs of equal blocks of one side: members of one list with the same tensors below."""

    specs: Specs  # of the side
    run_of: Mapping[str, _Members]  # name of a kept member -> those of all members of its run
    kept: Specs  # the tensors to match: all but those of the later members
    counts: Sequence[int]  # of each kept tensor: how many it stands for
    spans: frozenset[int] = frozenset()  # of numbers in lists that are kept whole because of gaps

    @cached_property
    def members(self) -> frozenset[str]:
        """All members of all runs."""
        return frozenset(member for run in self.run_of.values() for member in run)

    def holds(self, key: str) -> bool:
        """True if a tensor is in a run."""
        return not self.members.isdisjoint(_above(key))


def pair_count(source: Specs, target: Specs) -> int:
    """Count the pairs of weights and other parameters of equal shape, to which the cost of matching is proportional."""
    shapes = [
        Counter(spec.shape for spec in specs if kind(components(spec.key)[-1])[0] in ("weight", "other"))
        for specs in (source, target)
    ]
    return sum(count * shapes[1][shape] for shape, count in shapes[0].items())


def runs_of(specs: Specs, lengths_to_keep: frozenset[int] = frozenset(), pinned: Iterable[str] = ()) -> Runs:
    """Find the runs of more than ``KEPT`` equal blocks.

    Lists of a length that must stay whole are left out, and those with gaps; a member around a pinned key is in no run.

    >>> import torch
    >>> specs = [TensorSpec(f"h.{n}.weight", (2, 2), torch.float32) for n in range(6)]
    >>> runs = runs_of(specs)
    >>> runs.run_of["h.0"], [spec.key for spec in runs.kept][-1]
    (('h.0', 'h.1', 'h.2', 'h.3', 'h.4', 'h.5'), 'h.3.weight')
    """
    tensors: dict[str, list[int]] = {}  # of each module, by their places in specs
    for place, spec in enumerate(specs):
        tensors.setdefault(split_key(spec.key)[0], []).append(place)
    children = _children(tensors)
    if max(map(len, children.values()), default=0) <= KEPT:
        return Runs(specs, {}, specs, [1] * len(specs))
    contents = _contents(specs, tensors, children)
    around = {module for key in pinned for module in _above(key)}
    contents.update((module, -1 - place) for place, module in enumerate(around))  # equal to no other
    spans: set[int] = set()
    run_of: dict[str, _Members] = {}
    kept: dict[int, int] = {}  # place -> how many it stands for
    visited = [("", 1)]
    while visited:
        module, count = visited.pop()
        kept.update(dict.fromkeys(tensors.get(module, ()), count))
        below = dict.fromkeys(children.get(module, ()), count)
        if len(below) > KEPT:
            for run in _runs(list(below), contents, lengths_to_keep, spans):
                run_of.update(dict.fromkeys(run[:KEPT], run))
                for member in run[KEPT:]:
                    del below[member]
                below[run[KEPT - 1]] *= len(run) - KEPT + 1
        visited.extend(below.items())
    places = sorted(kept)
    return Runs(specs, run_of, [specs[place] for place in places], [kept[place] for place in places], frozenset(spans))


def _children(modules: Iterable[str]) -> dict[str, list[str]]:
    """List the modules in each module."""
    children: dict[str, list[str]] = {}
    known = set(modules)
    for module in list(known):
        while module:
            parent = split_key(module)[0]
            siblings = children.setdefault(parent, [])
            siblings.append(module)
            if len(siblings) > 1 or parent in known:
                break  # the parent has its place already, or gets it in its turn
            module = parent
    return children


def _contents(
    specs: Specs, tensors: Mapping[str, Sequence[int]], children: Mapping[str, Sequence[str]]
) -> dict[str, int]:
    """Number the modules so that those with the same names and shapes below have the same number."""
    numbered: dict[object, int] = {}
    contents: dict[str, int] = {}
    for module in sorted({*tensors, *children}, key=len, reverse=True):  # modules inside others have longer names
        start = len(module)
        held: list[object] = [(specs[place].key[start:], specs[place].shape) for place in tensors.get(module, ())]
        if module in children:
            held += [(child[start:], contents[child]) for child in children[module]]
        contents[module] = numbered.setdefault(frozenset(held), len(numbered))
    return contents


def _runs(
    modules: Sequence[str], contents: Mapping[str, int], lengths_to_keep: frozenset[int], spans: set[int]
) -> Iterator[_Members]:
    """Find the runs of equal modules among siblings, and add the spans of lists with gaps."""
    lists: dict[str, list[tuple[tuple[int, ...], str]]] = {}
    for module in modules:
        name = split_key(module)[1]
        if number := numbers(name):
            lists.setdefault(stem(name), []).append((number, module))
    for found in lists.values():
        if len(found) <= KEPT or len(found) in lengths_to_keep:
            continue
        found.sort()
        if (span := found[-1][0][-1] - found[0][0][-1] + 1) != len(found):
            spans.add(span)
            continue
        members = [module for _, module in found]
        start = 0
        for end in range(1, len(members) + 1):
            if end == len(members) or contents[members[end]] != contents[members[start]]:
                if end - start > KEPT:
                    yield tuple(members[start:end])
                start = end


def _above(key: str) -> Iterator[str]:
    """Yield the modules above a key from the nearest on, ``LEVELS`` at most, and the root, whose name is empty."""
    for _ in range(LEVELS):
        if not key:
            return
        key = split_key(key)[0]
        yield key
    yield ""


@dataclass(frozen=True, slots=True)
class _Continuation:
    """A source key in the last matched block of a run, and the blocks after it."""

    block: str
    following: _Members
    rest: str  # of the key

    def at(self, step: int) -> str:
        """Return the key in a later block."""
        return self.following[step] + self.rest


def extended(
    matches: Sequence[Match], mismatched: Sequence[Mismatch], source: Runs, target: Runs
) -> tuple[list[Match], list[Mismatch]]:
    """Extend what was found for shortened sides to all members of their runs, in order; inner lists first.

    A match in the last of the matched blocks is continued in the ones after it, if the same was found in the block
    before, one source block further back.
    """
    found = {match.target: match for match in matches}
    for run, key, suffix in _in_last_blocks(found, target):
        last, before = found[key], found.get(run[KEPT - 2] + suffix)
        if before is None or before.operation != last.operation:
            continue
        on = _continuations(before.sources, last.sources, source)
        others = [(other, _along(other.sources, on)) for other in last.alternatives]
        for step in range(_steps(run, on)):
            moved = run[KEPT + step] + suffix
            alternatives = [
                Candidate(tuple(each.at(step) for each in way), other.operation, other.score)
                for other, way in others
                if way
            ]
            found[moved] = Match(
                moved,
                tuple(each.at(step) for each in on),
                last.operation,
                last.confidence,
                last.evidence,
                tuple(alternatives),
                last.warnings,
            )
    unlike = {mismatch.key: mismatch for mismatch in mismatched}
    for run, key, suffix in _in_last_blocks(unlike, target):
        last_one, one_before = unlike[key], unlike.get(run[KEPT - 2] + suffix)
        if one_before is None:
            continue
        on = _continuations((one_before.source_key,), (last_one.source_key,), source)
        for step in range(_steps(run, on)):
            moved = run[KEPT + step] + suffix
            unlike[moved] = replace(last_one, key=moved, source_key=on[0].at(step))
    return list(found.values()), list(unlike.values())


def _in_last_blocks(found: Mapping[str, object], runs: Runs) -> Iterator[tuple[_Members, str, str]]:
    """List the keys in the last matched block of a run, inner runs first: the run, the key, and its end in the block.

    Keys that are added to ``found`` meanwhile are listed too, where an outer run is concerned.
    """
    last = {run[KEPT - 1]: run for run in runs.run_of.values()}
    for depth in sorted({len(components(block)) for block in last}, reverse=True):
        blocks = {block: run for block, run in last.items() if len(components(block)) == depth}
        starts = tuple(blocks)
        for key in [key for key in found if key.startswith(starts)]:
            for block in _above(key):
                if block in blocks:
                    yield blocks[block], key, key[len(block) :]
                    break


def _continuations(before: Sequence[str], last: Sequence[str], runs: Runs) -> list[_Continuation]:
    """Return how the sources of a match go on, if those in the block before are one block back; else nothing."""
    found = [_continuation(*pair, runs) for pair in zip(before, last, strict=False)]
    return [each for each in found if each] if len(before) == len(last) and all(found) else []


def _continuation(before: str, last: str, runs: Runs) -> _Continuation | None:
    for block in _above(last):
        if run := runs.run_of.get(block):
            place, rest = run.index(block), last[len(block) :]
            if place and before == run[place - 1] + rest:
                return _Continuation(block, run[place + 1 :], rest)
    return None


def _along(sources: Sequence[str], on: Sequence[_Continuation]) -> list[_Continuation]:
    """Return how other sources go on beside those of a match; nothing if one of them is in none of its blocks."""
    way = [
        next((replace(each, rest=key[len(each.block) :]) for each in on if key.startswith(each.block)), None)
        for key in sources
    ]
    return [each for each in way if each] if all(way) else []


def _steps(run: _Members, on: Sequence[_Continuation]) -> int:
    return min(len(run) - KEPT, *(len(each.following) for each in on)) if on else 0


def is_settled(source: Runs, target: Runs, matches: Sequence[Match]) -> bool:
    """True if matching the first blocks settled all others.

    It did not if a tensor in a run of one side is left, and one of its shape on the other side.
    """
    if len(matches) == len(target.specs):
        return True
    used = {key for match in matches for key in match.sources}, {match.target for match in matches}
    left: list[tuple[set[tuple[Shape, bool]], ...]] = []  # of each side: unmatched shapes in runs, and in all
    for runs, done in zip((source, target), used, strict=True):
        open_specs = [spec for spec in runs.specs if spec.key not in done]
        in_runs = [spec for spec in open_specs if runs.holds(spec.key)]
        left.append(
            tuple({(spec.shape, spec.dtype.is_floating_point) for spec in specs} for specs in (in_runs, open_specs))
        )
    return left[0][0].isdisjoint(left[1][1]) and left[0][1].isdisjoint(left[1][0])


def less_sure(target: Runs, matches: Sequence[Match]) -> list[Match]:
    """Believe matches in the runs of the target no more than an order alone, since they are not settled."""
    return [
        replace(match, confidence=min(match.confidence, INFERRED)) if target.holds(match.target) else match
        for match in matches
    ]
