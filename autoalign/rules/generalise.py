r"""From the matches of single tensors to rules for whole families of keys.

A move is one group of source tensors with the targets that are made of them. Moves whose keys are the same but for
their numbers become one draft of a rule if arithmetic on the source's numbers gives the target's. Where it does not,
numbers become text, until it does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from autoalign.plan.adaptations import needs_target
from autoalign.plan.keys import NUMBER
from autoalign.plan.matches import Match, Plan
from autoalign.plan.operations import Copy, Operation, Split, Stack, Unstack, chain, steps_of
from autoalign.rules.rule import REFERENCE, SLICE, Rows, fitted, function_of, literal, reference, shifted
from autoalign.rules.size_free import Pick, Sample, Sized, size_free, skeleton

Texts = tuple[str, ...]  # a key without its numbers: the text before, between and after them
Numbers = tuple[int, ...]
Parts = tuple[str, ...]  # of a key, between its dots
_MIN_LIST = 5  # tensors that are joined; fewer are named parts rather than members of a list
_MAX_NUMBERS = 24  # of a key that are set apart, its last ones; those before them are text
_MARK = "\0"  # around the number of a list's member


@dataclass(frozen=True, slots=True)
class Move:
    """Source tensors, and the target tensors that are made of them alone."""

    keys: tuple[str, ...]  # of the sources, in the operations' order
    matches: tuple[Match, ...]  # none: the tensors are dropped
    picks: tuple[Operation, ...]  # for each match, from the sources to its own; Copy for all of them
    samples: tuple[Sample, ...]  # for each match its operation, with the shapes of its own sources
    tied: bool  # True if all targets share one storage
    sources: tuple[Texts, ...]  # one for each pattern; a list of experts has one
    targets: tuple[Texts, ...]  # one for each replacement; of a list, those of its first slice
    numbers: Numbers  # in the sources' patterns
    results: tuple[Numbers, ...]  # in each target
    spread: bool  # True if the targets are those of every slice in turn

    @property
    def names(self) -> tuple[str, ...]:
        """The keys of the targets."""
        return tuple(match.target for match in self.matches)

    @property
    def even(self) -> bool:
        """True if a tensor is split into equal parts."""
        samples = self.samples[: len(self.targets)]
        splits = [step for operation, _ in samples for step in steps_of(operation) if isinstance(step, Split)]
        lengths = {split.length for split in splits}
        starts = {split.start for split in splits}
        return len(lengths) == 1 and len(starts) > 1 and all(start % min(lengths) == 0 for start in starts)


@dataclass(frozen=True, slots=True)
class Draft:
    """A rule for whole keys."""

    sources: tuple[Parts, ...]  # patterns
    plain: Parts  # the first pattern as a replacement: the target that keeps the name
    targets: tuple[Parts, ...]  # replacements
    operations: tuple[Operation, ...]  # none: copies
    tied: bool
    moves: tuple[Move, ...]

    @property
    def renames(self) -> bool:
        """True if one tensor gets a new name, or none, and is not changed."""
        return len(self.sources) == 1 and len(self.targets) < 2 and not self.operations


def moves_of(plan: Plan) -> tuple[list[Move], list[Match]]:
    """Split a plan into moves, in the source's order, and matches that keep values of the target, as no rule can."""
    storage = {spec.key: spec.storage for spec in plan.target_specs}
    kept = [match for match in plan.matches if needs_target(match.operation)]
    together = _together([match for match in plan.matches if not needs_target(match.operation)])
    moves: list[Move] = []
    done: set[str] = set()
    for spec in plan.source_specs:
        if spec.key in done:
            continue
        matches = tuple(together.get(spec.key, ()))
        keys = tuple(dict.fromkeys(key for match in matches for key in match.sources)) or (spec.key,)
        done.update(keys)
        picks = tuple(
            Copy() if match.sources == keys else Pick(tuple(map(keys.index, match.sources))) for match in matches
        )
        samples = tuple(
            (chain(match.operation), tuple(plan.sources[key].shape for key in match.sources)) for match in matches
        )
        storages = {storage.get(match.target) for match in matches}
        tied = len(matches) > 1 and len(storages) == 1 and None not in storages
        names = [match.target for match in matches]
        operations = [operation for operation, _ in samples]
        is_stacked = any(isinstance(step, Stack) for operation in operations for step in steps_of(operation))
        is_list = len(keys) > 1 and (is_stacked or len(keys) >= _MIN_LIST)
        sources, numbers = (_listed(keys) if is_list else None) or _aligned(keys)
        spread = _spread(names, operations) if len(keys) == 1 else None
        targets, results = spread or _columns([_parts(name) for name in names])
        moves.append(
            Move(keys, matches, picks, samples, tied, sources, targets, numbers, results, spread=spread is not None)
        )
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


_Split = tuple[Texts, Numbers]  # a key


def _parts(key: str) -> _Split:
    parts = NUMBER.split(key)
    if (beyond := len(parts) - 2 * _MAX_NUMBERS) > 1:
        parts[:beyond] = ["".join(parts[:beyond])]
    return tuple(parts[0::2]), tuple(map(int, parts[1::2]))


def _columns(keys: Sequence[_Split]) -> tuple[tuple[Texts, ...], tuple[Numbers, ...]]:
    return tuple(texts for texts, _ in keys), tuple(numbers for _, numbers in keys)


def _aligned(keys: Sequence[str]) -> tuple[tuple[Texts, ...], Numbers]:
    """Set apart the numbers that several keys have in common; others are text, which distinguishes the keys."""
    texts, numbers = _columns(list(map(_parts, keys)))
    if len(keys) == 1:
        return texts, numbers[0]
    shared = [place for place, column in enumerate(zip(*numbers, strict=False)) if len(set(column)) == 1]
    kept = (_without(own, theirs, shared) for own, theirs in zip(texts, numbers, strict=True))
    return tuple(kept), tuple(numbers[0][place] for place in shared)


def _without(texts: Texts, numbers: Numbers, kept: Sequence[int]) -> Texts:
    """Make text of the numbers that are not to be set apart."""
    result = [texts[0]]
    for place, (number, text) in enumerate(zip(numbers, texts[1:], strict=True)):
        if place in kept:
            result.append(text)
        else:
            result[-1] += f"{number}{text}"
    return tuple(result)


def _listed(keys: Sequence[str]) -> tuple[tuple[Texts, ...], Numbers] | None:
    """Read keys as those of a list of modules, member by member, each with the same patterns."""
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
) -> tuple[tuple[Texts, ...], tuple[Numbers, ...]] | None:
    """Read targets as those of a list of modules, slice by slice."""
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
        mark = shifted(SLICE, start)
        return _columns([(_marked(texts, place, mark), _other(own, place)) for texts, own in members[0]])
    return None


def _counting(members: Sequence[Sequence[_Split]]) -> Iterator[tuple[int, int]]:
    """Yield the place of the number by which the members of a list are counted, all else being equal, and its start."""
    first = members[0]
    for place in range(min(len(own) for _, own in first)):
        start = first[0][1][place]
        if all(
            texts == same and own[place] == start + index and _other(own, place) == _other(theirs, place)
            for index, member in enumerate(members)
            for (texts, own), (same, theirs) in zip(member, first, strict=True)
        ):
            yield place, start


def _other(numbers: Numbers, place: int) -> Numbers:
    return numbers[:place] + numbers[place + 1 :]


def _marked(texts: Texts, place: int, mark: str) -> Texts:
    return (*texts[:place], f"{texts[place]}{_MARK}{mark}{_MARK}{texts[place + 1]}", *texts[place + 2 :])


_Functions = Mapping[tuple[Texts, Texts], dict[Numbers, int] | None]


def _functions(moves: Sequence[Move]) -> _Functions:
    """Collect the numbers of sources up to some place and those of targets that follow, by the texts before them.

    None stands for what is no function.
    """
    found: dict[tuple[Texts, Texts], list[tuple[Numbers, int]]] = {}
    for move in moves:
        for i in range(1, len(move.numbers) + 1):
            for other, results in zip(move.targets, move.results, strict=True):
                for j, result in enumerate(results, start=1):
                    found.setdefault((move.sources[0][:i], other[:j]), []).append((move.numbers[:i], result))
    return {texts: function_of(rows) for texts, rows in found.items()}


@dataclass(frozen=True, slots=True)
class _Sketch:
    """What a rule for several moves captures, and what it computes from that."""

    moves: tuple[Move, ...]
    chosen: frozenset[int]  # the places of the numbers that are captured; others are text
    expressions: tuple[tuple[str, ...], ...]  # for each target those of its numbers
    operations: tuple[Operation, ...]


def drafts_of(moves: Sequence[Move]) -> list[Draft]:
    """Draft rules for moves, which hold for each of them if no other rule takes its keys."""
    functions = _functions(moves)
    captured = {texts for (texts, _), rows in functions.items() if rows and fitted(rows)}
    clusters: dict[object, list[Move]] = {}
    for move in moves:
        ways = tuple((pick, skeleton(own)) for pick, (own, _) in zip(move.picks, move.samples, strict=True))
        alike = move.sources, move.targets, ways[: len(move.targets)], move.spread, move.tied
        clusters.setdefault(alike, []).append(move)
    found = [sketch for members in clusters.values() for sketch in _sketches(members, functions, captured)]
    return _distinct(found)


def spelled_out(move: Move) -> Draft:
    """Draft a rule for one move alone, key by key."""
    operations = [
        chain(pick, size_free([sample], even=move.even) or Sized(sample[1], sample[0]))
        for pick, sample in zip(move.picks, move.samples, strict=True)
    ]
    return Draft(
        tuple(tuple(map(re.escape, key.split("."))) for key in move.keys),
        tuple(map(literal, move.keys[0].split("."))),
        tuple(tuple(map(literal, name.split("."))) for name in move.names),
        tuple(operations) if any(operation != Copy() for operation in operations) else (),
        move.tied,
        (move,),
    )


def _sketches(members: Sequence[Move], functions: _Functions, captured: set[Texts]) -> list[_Sketch | Draft]:
    """Sketch as few rules as can be for moves of the same texts."""
    sketch = _sketch(members, functions, captured)
    if sketch is not None:
        return [sketch]
    best: list[_Sketch | Draft] | None = None
    for place in range(len(members[0].numbers)):
        groups: dict[int, list[Move]] = {}
        for move in members:
            groups.setdefault(move.numbers[place], []).append(move)
        if len(groups) < 2:
            continue
        found = [each for group in groups.values() for each in _sketches(group, functions, captured)]
        if best is None or len(found) < len(best):
            best = found
        if len(best) == len(groups):
            break
    return best if best is not None else [spelled_out(move) for move in members]


def _sketch(members: Sequence[Move], functions: _Functions, captured: set[Texts]) -> _Sketch | None:
    """Sketch one rule for all members; None where no arithmetic gives their numbers, or no operation fits all."""
    first = members[0]
    operations = []
    even = all(move.even for move in members)
    for place in range(len(first.targets)):
        own = size_free([move.samples[place] for move in members], even=even, spread=first.spread)
        if own is None:
            return None
        operations.append(chain(first.picks[place], own))
    texts = first.sources[0]
    columns = list(zip(*(move.numbers for move in members), strict=True))
    expressions: list[tuple[str, ...]] = []
    for which, other in enumerate(first.targets):
        found = []
        for j in range(len(other) - 1):
            values = [move.results[which][j] for move in members]
            text = _expression(texts, other[: j + 1], columns, values, functions)
            if text is None:
                return None
            found.append(text)
        expressions.append(tuple(found))
    used = {int(slot) - 1 for own in expressions for text in own for slot in REFERENCE.findall(text)}
    if not first.targets:
        used = {place for place in range(len(columns)) if texts[: place + 1] in captured}
    varying = {place for place, column in enumerate(columns) if len(set(column)) > 1}
    needed = tuple(operations) if any(operation != Copy() for operation in operations) else ()
    return _Sketch(tuple(members), frozenset(used | varying), tuple(expressions), needed)


def _expression(
    texts: Texts, other: Texts, columns: Sequence[Numbers], values: Sequence[int], functions: _Functions
) -> str | None:
    """Find arithmetic for one number of a target: by all keys that begin alike, or by these alone."""
    places = range(len(columns))
    if text := _simplest([functions.get((texts[: place + 1], other)) for place in places], len(other)):
        return text
    if len(set(values)) == 1:
        return str(values[0])
    starts = [list(zip(*columns[: place + 1], strict=True)) for place in places]
    return _simplest([function_of(zip(own, values, strict=True)) for own in starts], len(other))


def _simplest(tables: Sequence[Rows | None], place: int) -> str | None:
    """Find the simplest arithmetic by which a number follows from those up to one of the source's, best the same."""
    found = [(fitted(rows), abs(up_to - place)) for up_to, rows in enumerate(tables, start=1) if rows]
    return min(((fit[0], distance, fit[1]) for fit, distance in found if fit), default=(0, 0, None))[2]


def _distinct(found: Sequence[_Sketch | Draft]) -> list[Draft]:
    """Distinguish the sketches whose patterns are the same: by the values of a number, or by spelling them out."""
    same: dict[object, list[_Sketch]] = {}
    for sketch in found:
        if isinstance(sketch, _Sketch):
            first = sketch.moves[0]
            fixed = tuple(None if place in sketch.chosen else number for place, number in enumerate(first.numbers))
            same.setdefault((first.sources[0], fixed), []).append(sketch)
    drafts: dict[int, list[Draft]] = {}
    for rivals in same.values():
        # what has a counterpart is the general case, which other networks of the kind have more of
        largest, *others = sorted(rivals, key=lambda sketch: (not sketch.expressions, -len(sketch.moves)))
        drafts[id(largest)] = [_written(largest, {})]
        values = [
            [frozenset(column) for column in zip(*(move.numbers for move in rival.moves), strict=True)]
            for rival in (largest, *others)
        ]
        distinguishing = [
            place
            for place in sorted(largest.chosen)
            if sum(len(own[place]) for own in values) == len(frozenset().union(*(own[place] for own in values)))
        ]
        for sketch, own in zip(others, values[1:], strict=True):
            if distinguishing:
                place = distinguishing[0]
                drafts[id(sketch)] = [_written(sketch, {place: sorted(own[place])})]
            else:
                drafts[id(sketch)] = [spelled_out(move) for move in sketch.moves]
    return [draft for sketch in found for draft in ([sketch] if isinstance(sketch, Draft) else drafts[id(sketch)])]


def _written(sketch: _Sketch, only: Mapping[int, Sequence[int]]) -> Draft:
    """Write a draft; of the numbers that ``only`` holds, it takes these values alone."""
    first, chosen = sketch.moves[0], sketch.chosen
    groups = _group_numbers(first.sources[0], chosen)
    captures = {place: f"({'|'.join(map(str, only[place]))})" if place in only else r"(\d+)" for place in chosen}
    patterns = [captures.get(place, str(number)) for place, number in enumerate(first.numbers)]
    same = [f"\\{place + 1}" if place in chosen else str(number) for place, number in enumerate(first.numbers)]
    return Draft(
        tuple(_filled(own, patterns, re.escape, lambda _: rf"(?P<{SLICE}>\d+)") for own in first.sources),
        _replacement(first.sources[0], same, groups),
        tuple(_replacement(own, texts, groups) for own, texts in zip(first.targets, sketch.expressions, strict=True)),
        sketch.operations,
        first.tied,
        sketch.moves,
    )


def _group_numbers(texts: Texts, chosen: Collection[int]) -> dict[int, int]:
    """Number the groups of a pattern, that of a list's member among them."""
    groups, count = {}, 0
    for place, text in enumerate(texts):
        count += text.count(_MARK) // 2
        if place in chosen:
            count += 1
            groups[place] = count
    return groups


def _replacement(texts: Texts, expressions: Sequence[str], groups: Mapping[int, int]) -> Parts:
    written = []
    for expression, following in zip(expressions, texts[1:], strict=True):
        text = REFERENCE.sub(lambda found: f"\\{groups[int(found[1]) - 1]}", expression)
        if REFERENCE.fullmatch(text):
            text = reference(int(text[1:]), following)
        elif REFERENCE.search(text):
            text = f"{{{text}}}"
        written.append(text)
    return _filled(texts, written, literal, lambda member: f"{{{member}}}")


def _filled(texts: Texts, numbers: Sequence[str], write: Callable[[str], str], listed: Callable[[str], str]) -> Parts:
    """Put numbers between texts, and split the whole at its dots."""
    parts = [""]
    for text, number in zip(texts, (*numbers, ""), strict=True):
        for place, piece in enumerate(text.split(_MARK)):
            first, *others = [listed(piece)] if place % 2 else map(write, piece.split("."))
            parts[-1] += first
            parts += others
        parts[-1] += number
    return tuple(parts)
