"""Repeats: long lists of equal blocks, of which a few stand for all.

The cost of matching grows with the square of the layers, and a network of a hundred thousand tensors has fifty kinds of
them. Modules are told apart by a hash of the names and shapes below them (hash-consing, from the leaves up), so that
equal subtrees have one number. A list of 58 equal blocks is matched by its first few; the rest is paired by order, as
these were. Lists in lists (experts in layers) are shortened each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from autoalign.exchange import BY_ORDER
from autoalign.matches import Candidate, Match, Mismatch
from autoalign.names import LEVELS, components, kind, numbers, split_key, stem
from autoalign.specs import TensorSpec

LARGE = 500_000  # pairs of layers of equal shape up to which all blocks may be matched instead
KEPT = 4  # blocks of each run that are matched

Specs = Sequence[TensorSpec]
_Members = tuple[str, ...]
_Kind = tuple[tuple[int, ...], bool]  # shape, and whether of floating point


@dataclass(frozen=True, slots=True)
class Runs:
    """The runs of equal blocks of one side: members of one list with the same tensors below."""

    specs: Specs  # of the side
    run_of: Mapping[str, _Members]  # kept member, a module's whole name -> all members of its run
    kept: Specs  # what is matched: all tensors but those of the later members
    counts: Sequence[int]  # of each of them: how many tensors it stands for
    spans: frozenset[int] = frozenset()  # lengths of lists that are kept whole for a gap in their numbers, if filled


def pair_count(source: Specs, target: Specs) -> int:
    """Count the pairs of weights and other parameters of equal shape, which is what matching costs."""
    shapes = [
        Counter(spec.shape for spec in specs if kind(components(spec.key)[-1])[0] in ("weight", "other"))
        for specs in (source, target)
    ]
    return sum(count * shapes[1][shape] for shape, count in shapes[0].items())


def runs_of(specs: Specs, lengths_to_keep: frozenset[int] = frozenset(), pinned: Iterable[str] = ()) -> Runs:
    """Find the runs of more than ``KEPT`` equal blocks.

    Lists of a length that must stay whole are passed over, and those around a pinned key, and those with gaps.

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
    kinds = _kinds(specs, tensors, children)
    whole = {module for key in pinned for module in _above(key)}
    spans: set[int] = set()
    run_of: dict[str, _Members] = {}
    kept: dict[int, int] = {}  # place -> how many it stands for
    visited = [("", 1)]
    while visited:
        module, count = visited.pop()
        kept.update(dict.fromkeys(tensors.get(module, ()), count))
        below = dict.fromkeys(children.get(module, ()), count)
        if len(below) > KEPT and module not in whole:
            for run in _runs(list(below), kinds, lengths_to_keep, spans):
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


def _kinds(specs: Specs, tensors: Mapping[str, Sequence[int]], children: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Number the modules so that those with the same names and shapes below have the same number."""
    numbered: dict[object, int] = {}
    kinds: dict[str, int] = {}
    for module in sorted({*tensors, *children}, key=len, reverse=True):  # what is below a module has a longer name
        start = len(module)
        own = [(specs[place].key[start:], specs[place].shape) for place in tensors.get(module, ())]
        below = [(child[start:], kinds[child]) for child in children.get(module, ())]
        kinds[module] = numbered.setdefault((frozenset(own), frozenset(below)), len(numbered))
    return kinds


def _runs(
    modules: Sequence[str], kinds: Mapping[str, int], lengths_to_keep: frozenset[int], spans: set[int]
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
            if end == len(members) or kinds[members[end]] != kinds[members[start]]:
                if end - start > KEPT:
                    yield tuple(members[start:end])
                start = end


def _above(key: str) -> Iterator[str]:
    """Name the modules above a key, from the nearest on, ``LEVELS`` at most, and the root, whose name is empty."""
    for _ in range(LEVELS):
        if not key:
            return
        key = split_key(key)[0]
        yield key
    if key:
        yield ""


@dataclass(frozen=True, slots=True)
class _Move:
    """How a source key goes on from the last matched block of a run to the ones after it."""

    block: str  # the block that it is in
    following: _Members  # the blocks after it
    rest: str  # of the key

    def to(self, step: int) -> str:
        return self.following[step] + self.rest


def extended(
    matches: Sequence[Match], mismatched: Sequence[Mismatch], source: Runs, target: Runs
) -> tuple[list[Match], list[Mismatch]]:
    """Extend what was found for shortened sides to all members of their runs, pairing by order; inner lists first.

    What was found in the last of the matched blocks goes on in the ones after it, if it was found one block further
    back in the block before.
    """
    found = {match.target: match for match in matches}
    for run, key, suffix in _in_last_blocks(found, target):
        last, before = found[key], found.get(run[KEPT - 2] + suffix)
        if before is None or before.operation != last.operation:
            continue
        moves = _moves(before.sources, last.sources, source)
        others = [(other, _along(other.sources, moves)) for other in last.alternatives]
        for step in range(_steps(run, moves)):
            moved = run[KEPT + step] + suffix
            alternatives = [
                Candidate(tuple([move.to(step) for move in way]), other.operation, other.score)
                for other, way in others
                if way
            ]
            found[moved] = Match(
                moved,
                tuple([move.to(step) for move in moves]),
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
        moves = _moves((one_before.source_key,), (last_one.source_key,), source)
        for step in range(_steps(run, moves)):
            moved = run[KEPT + step] + suffix
            unlike[moved] = replace(last_one, key=moved, source_key=moves[0].to(step))
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


def _moves(before: tuple[str, ...], last: tuple[str, ...], runs: Runs) -> list[_Move]:
    """Tell how the sources of a match go on, if those of the block before are one block back; else nothing."""
    moves = [_move(*pair, runs) for pair in zip(before, last, strict=False)]
    return [move for move in moves if move] if len(before) == len(last) and all(moves) else []


def _move(before: str, last: str, runs: Runs) -> _Move | None:
    for block in _above(last):
        if run := runs.run_of.get(block):
            place, rest = run.index(block), last[len(block) :]
            if place and before == run[place - 1] + rest:
                return _Move(block, run[place + 1 :], rest)
    return None


def _along(sources: Sequence[str], moves: Sequence[_Move]) -> list[_Move]:
    """Tell how other sources go on beside those of a match; nothing if one of them is in none of its blocks."""
    way = [
        next((replace(move, rest=key[len(move.block) :]) for move in moves if key.startswith(move.block)), None)
        for key in sources
    ]
    return [move for move in way if move] if all(way) else []


def _steps(run: _Members, moves: Sequence[_Move]) -> int:
    return min(len(run) - KEPT, *(len(move.following) for move in moves)) if moves else 0


def is_settled(source: Runs, target: Runs, matches: Sequence[Match]) -> bool:
    """Tell whether the first blocks settled all others.

    They did not where a tensor in a run of one side is left, and one of its shape on the other side.
    """
    if len(matches) == len(target.specs):
        return True
    used = {key for match in matches for key in match.sources}, {match.target for match in matches}
    left: list[tuple[set[_Kind], set[_Kind]]] = []  # of each side: in runs, and in all
    for runs, done in zip((source, target), used, strict=True):
        members = {block for run in runs.run_of.values() for block in run}
        open_specs = [spec for spec in runs.specs if spec.key not in done]
        in_runs = [spec for spec in open_specs if not members.isdisjoint(_above(spec.key))]
        left.append((set(map(_kind, in_runs)), set(map(_kind, open_specs))))
    return left[0][0].isdisjoint(left[1][1]) and left[0][1].isdisjoint(left[1][0])


def less_sure(target: Runs, matches: Sequence[Match]) -> list[Match]:
    """Believe what is in the runs of the target no more than an order alone, since they are not settled."""
    members = {block for run in target.run_of.values() for block in run}
    return [
        replace(match, confidence=min(match.confidence, 1.0 if members.isdisjoint(_above(match.target)) else BY_ORDER))
        for match in matches
    ]


def _kind(spec: TensorSpec) -> _Kind:
    return spec.shape, spec.dtype.is_floating_point
