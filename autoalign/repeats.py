"""Repeats: long lists of equal blocks, of which a few stand for all.

Matching costs grow with the square of the layers. A list of 58 equal blocks is matched by its first few; the rest is
paired by order, as these were. Lists in lists (experts in layers) are shortened each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from autoalign.alignment import Match
from autoalign.graph import Path
from autoalign.names import components, kind, numbers, stem
from autoalign.specs import TensorSpec

LARGE = 100_000  # pairs of layers of equal shape from which on repeats are shortened
KEPT = 4  # blocks of each run that are matched


@dataclass(frozen=True, slots=True)
class Runs:
    """The runs of equal blocks of one side: members of one list with the same tensors below."""

    members: Mapping[tuple[Path, str], tuple[Path, ...]]  # (list, name of a kept member) -> all members of its run

    def dropped(self) -> frozenset[Path]:
        """List the members that are left out of matching."""
        return frozenset(member for run in self.members.values() for member in run[KEPT:])


def pair_count(source: Sequence[TensorSpec], target: Sequence[TensorSpec]) -> int:
    """Count the pairs of weights and other parameters of equal shape, which is what matching costs."""
    shapes = [
        Counter(spec.shape for spec in specs if kind(components(spec.key)[-1])[0] in ("weight", "other"))
        for specs in (source, target)
    ]
    return sum(count * shapes[1][shape] for shape, count in shapes[0].items())


def runs_of(
    specs: Sequence[TensorSpec], lengths_to_keep: frozenset[int] = frozenset(), pinned: Iterable[str] = ()
) -> Runs:
    """Find the runs of more than ``KEPT`` equal blocks.

    Lists of a length that must stay whole are passed over, and those around a pinned key.
    """
    whole = {path[:depth] for path in map(components, pinned) for depth in range(len(path))}
    content: dict[Path, list[tuple[Path, tuple[int, ...]]]] = {}
    for spec in specs:
        path = components(spec.key)
        for depth in range(1, len(path)):
            if numbers(path[depth - 1]):
                content.setdefault(path[:depth], []).append((path[depth:], spec.shape))
    lists: dict[tuple[Path, str], list[Path]] = {}
    for member in content:
        lists.setdefault((member[:-1], stem(member[-1])), []).append(member)
    runs: dict[tuple[Path, str], tuple[Path, ...]] = {}
    for (parent, _), found in lists.items():
        if len(found) <= KEPT or len(found) in lengths_to_keep or parent in whole:
            continue
        found.sort(key=lambda member: numbers(member[-1]))
        kinds = [frozenset(content[member]) for member in found]
        start = 0
        for end in range(1, len(found) + 1):
            if end == len(found) or kinds[end] != kinds[start]:
                if end - start > KEPT:
                    run = tuple(found[start:end])
                    runs.update({(parent, member[-1]): run for member in run[:KEPT]})
                start = end
    return Runs(runs)


def shortened(specs: Sequence[TensorSpec], runs: Runs) -> list[TensorSpec]:
    """Leave out the tensors of all but the first members of each run."""
    dropped = runs.dropped()
    kept = []
    for spec in specs:
        path = components(spec.key)
        if not any(numbers(path[depth - 1]) and path[:depth] in dropped for depth in range(1, len(path))):
            kept.append(spec)
    return kept


def extended(
    matches: Sequence[Match], source: Runs, target: Runs, source_keys: frozenset[str], target_keys: frozenset[str]
) -> list[Match]:
    """Extend the matches of shortened sides to all members of their runs, pairing by order; inner lists first."""
    result = {match.target: match for match in matches}
    depths = sorted({len(parent) for parent, _ in target.members}, reverse=True)
    for depth in depths:
        for key in list(result):
            path = components(key)
            if len(path) <= depth + 1 or (run := target.members.get((path[:depth], path[depth]))) is None:
                continue
            if run[KEPT - 1][-1] != path[depth]:
                continue  # the last of the kept members is continued
            before = result.get(_moved(key, depth, run[KEPT - 2][-1]))
            if before is None or before.operation != result[key].operation:
                continue
            for step, member in enumerate(run[KEPT:], start=1):
                moved = _continued(before.sources, result[key].sources, source, step)
                other = _moved(key, depth, member[-1])
                if moved is None or other not in target_keys or not source_keys.issuperset(moved):
                    break
                result[other] = replace(result[key], target=other, sources=moved, alternatives=())
    return list(result.values())


def _continued(before: tuple[str, ...], last: tuple[str, ...], runs: Runs, step: int) -> tuple[str, ...] | None:
    """Move the sources of the last kept block ``step`` blocks on, if those of the block before are one block back."""
    if len(before) != len(last):
        return None
    moved = []
    for previous, current in zip(before, last, strict=True):
        old, new = components(previous), components(current)
        places = [place for place in range(len(new)) if len(old) != len(new) or old[place] != new[place]]
        if len(places) != 1 or (run := runs.members.get((new[: places[0]], new[places[0]]))) is None:
            return None
        names = [member[-1] for member in run]
        place = names.index(new[places[0]])
        if place + step >= len(names) or place == 0 or names[place - 1] != old[places[0]]:
            return None
        moved.append(_moved(current, places[0], names[place + step]))
    return tuple(moved)


def _moved(key: str, depth: int, name: str) -> str:
    """Replace one component of a key, keeping its separators."""
    path = components(key)
    start = sum(len(part) + 1 for part in path[:depth])
    return key[:start] + name + key[start + len(path[depth]) :]
