r"""Numbers in keys: which function of a source's numbers gives those of its target.

``blocks.7`` becomes ``layers.7`` (as it is), ``stages.0`` was ``layer1`` (an offset), a flat list meets a nested one
(quotient and remainder, or a table where stages are uneven). What is fitted is exact on all that was seen, or nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from autoalign.plan.matches import Match, Plan
from autoalign.plan.operations import Operation, Shape, Split, Stack, Unstack, chain, steps_of
from autoalign.rules.rule import NUMBER, SLICE, shifted
from autoalign.rules.size_free import Pick, Sample

Rows = Mapping[tuple[int, ...], int]  # numbers of a source up to some place, the same for all -> number of its target

_SEEN = 3  # distinct numbers from which on more than an offset is believed
_LARGEST = 64  # quotient or table worth trying


def function_of(pairs: Iterable[tuple[tuple[int, ...], int]]) -> dict[tuple[int, ...], int] | None:
    """Collect which number follows from which, or None where it does not always."""
    table: dict[tuple[int, ...], int] = {}
    return table if all(table.setdefault(numbers, value) == value for numbers, value in pairs) else None


def fitted(rows: Rows) -> tuple[int, str] | None:
    r"""Find the simplest arithmetic that gives each number of the target from the last numbers of the source.

    >>> fitted({(1,): 0, (2,): 1, (3,): 2})
    (1, '\\1 - 1')
    >>> fitted({(0,): 0, (1,): 0, (2,): 1, (3,): 1, (4,): 2})
    (2, '\\1 // 2')
    >>> fitted({(0, 0): 0, (0, 1): 1, (1, 0): 2, (1, 1): 3, (1, 2): 4, (2, 0): 5})
    (4, '(0, 2, 5)[\\1] + \\2')
    >>> fitted({(0,): 3, (1,): 3}) is None
    True

    Returns:
        How simple it is (0 is the simplest) and the arithmetic, or None; a number that does not vary has none.
    """
    if len(set(rows.values())) < 2:
        return None
    place = len(next(iter(rows)))
    own = function_of((numbers[-1:], value) for numbers, value in rows.items())
    if own and (found := next(_of_one({number: value for (number,), value in own.items()}, f"\\{place}"), None)):
        return found
    both = function_of((numbers[-2:], value) for numbers, value in rows.items()) if place > 1 else None
    return next(_of_two(both, f"\\{place - 1}", f"\\{place}"), None) if both and len(both) >= _SEEN else None


def _of_one(pairs: Mapping[int, int], name: str) -> Iterator[tuple[int, str]]:
    distances = {value - number for number, value in pairs.items()}
    if len(distances) == 1:
        (distance,) = distances
        yield int(distance != 0), shifted(name, distance)
    if len(pairs) < _SEEN:
        return
    first, last = min(pairs), max(pairs)
    for unit in range(2, min(last - first + 1, _LARGEST) + 1):
        for offset in sorted(range(1 - unit, unit), key=abs):
            base = f"({shifted(name, offset)})" if offset else name
            quotients = {value - (number + offset) // unit for number, value in pairs.items()}
            if len(quotients) == 1:
                yield 2, shifted(f"{base} // {unit}", quotients.pop())
            remainders = {value - (number + offset) % unit for number, value in pairs.items()}
            if len(remainders) == 1:
                yield 2, shifted(f"{base} % {unit}", remainders.pop())
    slope, rest = divmod(pairs[last] - pairs[first], last - first)
    if not rest and slope > 1:
        starts = {value - slope * number for number, value in pairs.items()}
        if len(starts) == 1:
            yield 2, shifted(f"{slope}*{name}", starts.pop())
    if last - first + 1 == len(pairs):
        yield 5, f"({', '.join(str(pairs[number]) for number in range(first, last + 1))})[{shifted(name, -first)}]"


def _of_two(pairs: Mapping[tuple[int, ...], int], outer: str, inner: str) -> Iterator[tuple[int, str]]:
    bases: dict[int, set[int]] = {}
    for (number, member), value in pairs.items():
        bases.setdefault(number, set()).add(value - member)
    if any(len(base) > 1 for base in bases.values()) or len(bases) < 2:
        return
    starts = {number: base.pop() for number, base in bases.items()}
    first, last = min(starts), max(starts)
    slope, rest = divmod(starts[last] - starts[first], last - first)
    if not rest and slope > 0 and all(start == starts[first] + slope * (n - first) for n, start in starts.items()):
        yield 3, shifted(f"{slope}*{outer} + {inner}", starts[first] - slope * first)
    elif last - first + 1 == len(starts):
        table: Sequence[int] = [starts[number] for number in range(first, last + 1)]
        yield 4, f"({', '.join(map(str, table))})[{shifted(outer, -first)}] + {inner}"


Texts = tuple[str, ...]  # a key without its numbers: the text before, between and after them
_LIST = 4  # tensors of one list that are joined, from which on they are a list and not named parts
_MARK = "\0"  # around what stands for the number of a list's member
_NUMBERS = 24  # of a key that are set apart, its last ones; those before them are text


@dataclass(frozen=True, slots=True)
class Move:
    """Source tensors, and the target tensors that are made of them alone."""

    keys: tuple[str, ...]  # of the sources, in the operations' order
    matches: tuple[Match, ...]  # none: the tensors are dropped
    operations: tuple[Operation, ...]  # on the sources, one for each match
    shapes: tuple[Shape, ...]  # of the sources
    tied: bool  # whether all targets share one storage
    sources: tuple[Texts, ...]  # one for each pattern; a list of experts has one
    targets: tuple[Texts, ...]
    numbers: tuple[int, ...]  # in the sources' patterns
    results: tuple[tuple[int, ...], ...]  # in each target
    spread: bool = False  # whether the targets are those of every slice in turn

    @property
    def picks(self) -> tuple[Operation, ...]:
        """For each operation what takes its inputs from the sources."""
        return tuple(chain(*(step for step in steps_of(own) if isinstance(step, Pick))) for own in self.operations)

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Each operation on its own inputs, with their shapes."""
        result = []
        for own in self.operations:
            pick, rest = steps_of(own)[:1], steps_of(own)
            shapes = self.shapes
            if pick and isinstance(pick[0], Pick):
                shapes, rest = tuple(shapes[place] for place in pick[0].places), rest[1:]
            result.append((chain(*rest), shapes))
        return tuple(result)

    @property
    def even(self) -> bool:
        """Whether a tensor is split into equal parts."""
        splits = [step for operation in self.operations for step in steps_of(operation) if isinstance(step, Split)]
        lengths = {split.length for split in splits}
        starts = {split.start for split in splits}
        return len(lengths) == 1 and len(starts) > 1 and all(start % min(lengths) == 0 for start in starts)


def moves_of(alignment: Plan) -> tuple[list[Move], list[Match]]:
    """Take an alignment apart into moves, in the source's order.

    Returns:
        The moves, and the matches that no rule can say, since they keep values of the target.
    """
    from autoalign.plan.adaptations import needs_target

    shapes = {spec.key: spec.shape for spec in alignment.source_specs}
    storage = {spec.key: spec.storage for spec in alignment.target_specs}
    kept = [match for match in alignment.matches if needs_target(match.operation)]
    matches = [match for match in alignment.matches if not needs_target(match.operation)]
    together = _together(matches)
    moves: list[Move] = []
    done: set[str] = set()
    for spec in alignment.source_specs:
        if spec.key in done:
            continue
        members = together.get(spec.key, [])
        keys = tuple(dict.fromkeys(key for match in members for key in match.sources)) or (spec.key,)
        done.update(keys)
        operations = tuple(
            match.operation
            if match.sources == keys
            else chain(Pick(tuple(map(keys.index, match.sources))), match.operation)
            for match in members
        )
        storages = {storage.get(match.target) for match in members}
        tied = len(members) > 1 and len(storages) == 1 and None not in storages
        moves.append(_move(keys, tuple(members), operations, tuple(shapes[key] for key in keys), tied=tied))
    return moves, kept


def _together(matches: Sequence[Match]) -> dict[str, list[Match]]:
    """Join the matches that share a source, by each source."""
    together: dict[str, list[Match]] = {}
    for match in matches:
        joined = [match]
        for group in {id(group): group for key in match.sources if (group := together.get(key))}.values():
            joined = [*group, *joined]
        together.update(dict.fromkeys((key for each in joined for key in each.sources), joined))
    return together


def _move(
    keys: tuple[str, ...],
    matches: tuple[Match, ...],
    operations: tuple[Operation, ...],
    shapes: tuple[Shape, ...],
    *,
    tied: bool,
) -> Move:
    names = tuple(match.target for match in matches)
    listed = _listed(keys) if _is_list(operations, keys) else None
    sources, numbers = listed or _aligned(keys)
    spread = _spread(names, operations) if len(keys) == 1 else None
    if spread is not None:
        targets, results, count = spread
        operations = operations[:count]
    else:
        split = [_parts(name) for name in names]
        targets, results = tuple(texts for texts, _ in split), tuple(own for _, own in split)
    return Move(keys, matches, operations, shapes, tied, sources, targets, numbers, results, spread=spread is not None)


def _parts(key: str) -> tuple[Texts, tuple[int, ...]]:
    parts = NUMBER.split(key)
    if (beyond := len(parts) - 2 * _NUMBERS) > 1:
        parts[:beyond] = ["".join(parts[:beyond])]
    return tuple(parts[0::2]), tuple(map(int, parts[1::2]))


def _aligned(keys: Sequence[str]) -> tuple[tuple[Texts, ...], tuple[int, ...]]:
    """Set apart the numbers that several keys have in common; others are text, which tells the keys from each other."""
    parts = [_parts(key) for key in keys]
    (first, numbers), *others = parts
    if not others:
        return (first,), numbers
    common = min(len(own) for _, own in parts)
    shared = [place for place in range(common) if all(own[place] == numbers[place] for _, own in others)]
    return tuple(_without(texts, own, shared) for texts, own in parts), tuple(numbers[place] for place in shared)


def _without(texts: Texts, numbers: Sequence[int], kept: Sequence[int]) -> Texts:
    """Make text of the numbers that are not to be set apart."""
    result = [texts[0]]
    for place, (number, text) in enumerate(zip(numbers, texts[1:], strict=True)):
        if place in kept:
            result.append(text)
        else:
            result[-1] += f"{number}{text}"
    return tuple(result)


def _is_list(operations: Sequence[Operation], keys: Sequence[str]) -> bool:
    stacked = any(isinstance(step, Stack) for operation in operations for step in steps_of(operation))
    return len(keys) > 1 and (stacked or len(keys) > _LIST)


def _listed(keys: Sequence[str]) -> tuple[tuple[Texts, ...], tuple[int, ...]] | None:
    """See keys as those of a list of modules, member by member, each with the same patterns."""
    parts = [_parts(key) for key in keys]
    for size in range(1, len(keys) // 2 + 1):
        members = [parts[start : start + size] for start in range(0, len(keys), size)]
        for place, start in _counting(members) if len(keys) % size == 0 else ():
            others = {_other(own, place) for _, own in members[0]}
            if start == 0 and len(others) == 1:
                return tuple(_marked(texts, place, SLICE) for texts, _ in members[0]), others.pop()
    return None


def _spread(
    names: Sequence[str], operations: Sequence[Operation]
) -> tuple[tuple[Texts, ...], tuple[tuple[int, ...], ...], int] | None:
    """See targets as those of a list of modules, slice by slice; return also how many targets a slice has."""
    slices = [[step.index for step in steps_of(own) if isinstance(step, Unstack)] for own in operations]
    if len(names) < 2 or any(len(own) != 1 for own in slices):
        return None
    groups: dict[int, list[int]] = {}
    for place, (index,) in enumerate(slices):
        groups.setdefault(index, []).append(place)
    size = len(groups[min(groups)])
    if sorted(groups) != list(range(len(groups))) or any(len(group) != size for group in groups.values()):
        return None
    if groups[0] != list(range(size)):
        return None
    members = [[_parts(names[at]) for at in groups[index]] for index in range(len(groups))]
    for place, start in _counting(members):
        marked = tuple(_marked(texts, place, shifted(SLICE, start)) for texts, _ in members[0])
        return marked, tuple(_other(own, place) for _, own in members[0]), size
    return None


def _counting(members: Sequence[Sequence[tuple[Texts, tuple[int, ...]]]]) -> Iterator[tuple[int, int]]:
    """Yield which number of the keys counts the members of a list, all else being equal, and where it begins."""
    first = members[0]
    for place in range(min(len(own) for _, own in first)):
        start = first[0][1][place]
        if all(
            texts == same and own[place] == start + index and _other(own, place) == _other(theirs, place)
            for index, member in enumerate(members)
            for (texts, own), (same, theirs) in zip(member, first, strict=True)
        ):
            yield place, start


def _other(numbers: tuple[int, ...], place: int) -> tuple[int, ...]:
    return numbers[:place] + numbers[place + 1 :]


def _marked(texts: Texts, place: int, mark: str) -> Texts:
    return (*texts[:place], f"{texts[place]}{_MARK}{mark}{_MARK}{texts[place + 1]}", *texts[place + 2 :])


def pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Split text into what is literal, and what stands for the number of a list's member."""
    for place, part in enumerate(re.split(_MARK, text)):
        yield part, place % 2 == 1


def by_prefix(moves: Sequence[Move]) -> Mapping[tuple[Texts, Texts], dict[tuple[int, ...], int] | None]:
    """Collect the numbers of sources, and those of targets, by the texts before them.

    Returns:
        For the texts before a number of a source and before one of a target: which number followed which, given the
        source's numbers up to there. None where that is no function.
    """
    found: dict[tuple[Texts, Texts], dict[tuple[int, ...], int] | None] = {}
    for move in moves:
        texts = move.sources[0]
        for i in range(len(move.numbers)):
            for other, results in zip(move.targets, move.results, strict=True):
                for j in range(len(results)):
                    rows = found.setdefault((texts[: i + 1], other[: j + 1]), {})
                    if rows is not None and rows.setdefault(move.numbers[: i + 1], results[j]) != results[j]:
                        found[texts[: i + 1], other[: j + 1]] = None
    return found
