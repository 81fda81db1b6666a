r"""Drafts: rules for whole keys, one for all the moves that differ in numbers only.

Moves of the same texts are one draft if arithmetic on the source's numbers gives the target's. Where it does not, a
number that tells the moves apart becomes text, until it does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from autoalign.plan.operations import Copy, Operation, chain
from autoalign.rules.rule import REFERENCE, SLICE, literal, reference
from autoalign.rules.size_free import Pick, Sized, size_free, skeleton
from autoalign.rules.tensor_moves import Move, Rows, Texts, by_prefix, fitted, function_of, pieces

Parts = tuple[str, ...]  # of a key, between its dots
_ANY = r"(\d+)"
_Joint = Mapping[tuple[Texts, Texts], dict[tuple[int, ...], int] | None]


@dataclass(frozen=True, slots=True)
class Draft:
    """A rule for whole keys."""

    sources: tuple[Parts, ...]  # patterns
    plain: Parts  # the first pattern as a replacement: what a target is that keeps the name
    targets: tuple[Parts, ...]  # replacements
    operations: tuple[Operation, ...]  # none: copies
    tied: bool
    moves: tuple[Move, ...]

    @property
    def renames(self) -> bool:
        """Whether one tensor gets a new name, or none, and nothing else happens to it."""
        return len(self.sources) == 1 and len(self.targets) < 2 and not self.operations


@dataclass(frozen=True, slots=True)
class _Sketch:
    """What a rule for several moves captures, and what it makes of that."""

    moves: tuple[Move, ...]
    chosen: frozenset[int]  # the places of the numbers that are captured; others are text
    expressions: tuple[tuple[str, ...], ...]  # for each target those of its numbers
    operations: tuple[Operation, ...]


def drafts_of(moves: Sequence[Move]) -> list[Draft]:
    """Draft rules for moves, which hold for each of them if no other rule takes its keys."""
    joint = by_prefix(moves)
    captured = {texts for (texts, _), rows in joint.items() if rows and fitted(rows)}
    clusters: dict[object, list[Move]] = {}
    for move in moves:
        kinds = tuple(skeleton(operation) for operation, _ in move.samples)
        clusters.setdefault((move.sources, move.targets, kinds, move.picks, move.spread, move.tied), []).append(move)
    found = [sketch for members in clusters.values() for sketch in _sketches(members, joint, captured)]
    return _distinct(found)


def spelled_out(move: Move) -> Draft:
    """Draft a rule for one move alone, key by key."""
    operations = []
    for match in move.matches:
        places = tuple(move.keys.index(key) for key in match.sources)
        shapes = tuple(move.shapes[place] for place in places)
        own = size_free([(match.operation, shapes)], even=move.even) or Sized(shapes, match.operation)
        operations.append(own if places == tuple(range(len(move.keys))) else chain(Pick(places), own))
    return Draft(
        tuple(tuple(map(re.escape, key.split("."))) for key in move.keys),
        tuple(map(literal, move.keys[0].split("."))),
        tuple(tuple(map(literal, match.target.split("."))) for match in move.matches),
        tuple(operations) if any(operation != Copy() for operation in operations) else (),
        move.tied,
        (move,),
    )


def _sketches(members: Sequence[Move], joint: _Joint, captured: set[Texts]) -> list[_Sketch | Draft]:
    """Sketch as few rules as can be for moves of the same texts."""
    sketch = _sketch(members, joint, captured)
    if sketch is not None:
        return [sketch]
    best: list[_Sketch | Draft] | None = None
    for place in range(len(members[0].numbers)):
        groups: dict[int, list[Move]] = {}
        for move in members:
            groups.setdefault(move.numbers[place], []).append(move)
        if len(groups) < 2:
            continue
        found = [each for group in groups.values() for each in _sketches(group, joint, captured)]
        if best is None or len(found) < len(best):
            best = found
        if len(best) == len(groups):
            break
    return best if best is not None else [spelled_out(move) for move in members]


def _operations(members: Sequence[Move]) -> tuple[Operation, ...] | None:
    """Find the operations of a rule for several moves; none of them for copies."""
    found = []
    even = all(move.even for move in members)
    for place, pick in enumerate(members[0].picks):
        own = size_free([move.samples[place] for move in members], even=even, spread=members[0].spread)
        if own is None:
            return None
        found.append(chain(pick, own))
    return tuple(found) if any(operation != Copy() for operation in found) else ()


def _sketch(members: Sequence[Move], joint: _Joint, captured: set[Texts]) -> _Sketch | None:
    """Sketch one rule for all members; None where no arithmetic gives their numbers, or no operation fits all."""
    operations = _operations(members)
    if operations is None:
        return None
    first = members[0]
    texts = first.sources[0]
    columns = list(zip(*(move.numbers for move in members), strict=True))
    expressions: list[tuple[str, ...]] = []
    for which, other in enumerate(first.targets):
        found = []
        for j in range(len(other) - 1):
            text = _expression(texts, other[: j + 1], columns, [move.results[which][j] for move in members], joint)
            if text is None:
                return None
            found.append(text)
        expressions.append(tuple(found))
    used = {int(slot) - 1 for own in expressions for text in own for slot in REFERENCE.findall(text)}
    if not first.targets:
        used = {place for place in range(len(columns)) if texts[: place + 1] in captured}
    varying = {place for place, column in enumerate(columns) if len(set(column)) > 1}
    return _Sketch(tuple(members), frozenset(used | varying), tuple(expressions), operations)


def _expression(
    texts: Texts, other: Texts, columns: Sequence[tuple[int, ...]], values: Sequence[int], joint: _Joint
) -> str | None:
    """Find arithmetic for one number of a target: by all keys that begin alike, or by these alone."""
    places = range(len(columns))
    if text := _simplest([joint.get((texts[: place + 1], other)) for place in places], len(other)):
        return text
    if len(set(values)) == 1:
        return str(values[0])
    starts = [list(zip(*columns[: place + 1], strict=True)) for place in places]
    return _simplest([function_of(zip(own, values, strict=True)) for own in starts], len(other))


def _simplest(tables: Sequence[Rows | None], place: int) -> str | None:
    """Find the simplest arithmetic by which a number follows from those up to one of the source's, best the same."""
    found = [(fitted(rows), abs(up_to - place)) for up_to, rows in enumerate(tables, start=1) if rows]
    return min(((fit[0], distance, fit[1]) for fit, distance in found if fit), default=(0, 0, None))[2]


def _written(sketch: _Sketch, only: Mapping[int, Sequence[int]]) -> Draft:
    """Write a draft; of the numbers that ``only`` holds, it takes these values alone."""
    first, chosen = sketch.moves[0], sketch.chosen
    groups = _group_numbers(first.sources[0], chosen)
    same = [f"\\{place + 1}" if place in chosen else str(number) for place, number in enumerate(first.numbers)]
    return Draft(
        tuple(_pattern(own, first.numbers, chosen, only) for own in first.sources),
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
        count += sum(marked for _, marked in pieces(text))
        if place in chosen:
            count += 1
            groups[place] = count
    return groups


def _pattern(texts: Texts, numbers: Sequence[int], chosen: Collection[int], only: Mapping[int, Sequence[int]]) -> Parts:
    captures = {place: f"({'|'.join(map(str, only[place]))})" if place in only else _ANY for place in chosen}
    written = [captures.get(place, str(number)) for place, number in enumerate(numbers)]
    return _filled(texts, written, re.escape, lambda _: rf"(?P<{SLICE}>\d+)")


def _replacement(texts: Texts, expressions: Sequence[str], groups: Mapping[int, int]) -> Parts:
    written = []
    for expression, following in zip(expressions, texts[1:], strict=True):
        text = REFERENCE.sub(lambda found: f"\\{groups[int(found[1]) - 1]}", expression)
        if REFERENCE.fullmatch(text):
            text = reference(int(text[1:]), following)
        elif REFERENCE.search(text):
            text = f"{{{text}}}"
        written.append(text)
    return _filled(texts, written, literal, lambda piece: f"{{{piece}}}")


def _filled(texts: Texts, numbers: Sequence[str], write: Callable[[str], str], listed: Callable[[str], str]) -> Parts:
    """Put what stands for numbers between texts, and part the whole at its dots."""
    parts = [""]
    for text, number in zip(texts, (*numbers, ""), strict=True):
        for piece, marked in pieces(text):
            first, *others = [listed(piece)] if marked else map(write, piece.split("."))
            parts[-1] += first
            parts += others
        parts[-1] += number
    return tuple(parts)


def _distinct(found: Sequence[_Sketch | Draft]) -> list[Draft]:
    """Tell the sketches apart whose patterns are the same: by the values of a number, or by spelling them out."""
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
        telling = [
            place
            for place in sorted(largest.chosen)
            if sum(len(own[place]) for own in values) == len(frozenset().union(*(own[place] for own in values)))
        ]
        for sketch, own in zip(others, values[1:], strict=True):
            if telling:
                drafts[id(sketch)] = [_written(sketch, {telling[0]: sorted(own[telling[0]])})]
            else:
                drafts[id(sketch)] = [spelled_out(move) for move in sketch.moves]
    return [draft for sketch in found for draft in ([sketch] if isinstance(sketch, Draft) else drafts[id(sketch)])]
