"""Rows of a report: keys that differ only in numbers, or only in their last names, are folded and laid out in lines.

``layers.0.q.weight`` to ``layers.11.q.weight`` become ``layers.{0...11}.q.weight``, and ``bn.weight`` and ``bn.bias``
become ``bn.{weight,bias}``. Where a row holds several keys, as a source and its target, the lists in braces are
parallel: the k-th of one belongs to the k-th of the other.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from math import prod
from typing import Generic, NamedTuple, TypeVar

from autoalign.plan.keys import NUMBER

_Fields = TypeVar("_Fields", bound=Hashable)
_Template = tuple[tuple[str, ...], ...]  # for each key of a row, the text around its numbers

_LEAF = re.compile(r"(.*\.)([^.{}0-9]+)", re.DOTALL)
_COMPONENT = r"(?:[^.{}]|\{[^}]*\})*\."  # of a key, whose lists in braces may hold dots
_BLOCK = re.compile(rf"(?:{_COMPONENT})*?(?=[^.]*[0-9]){_COMPONENT}")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~])")
_MAX_PARTS = 6  # of a list of numbers, before the rest is left to an ellipsis
_MAX_LEAVES = 3  # of a list of names


@dataclass(frozen=True, slots=True)
class Fold(Generic[_Fields]):
    """Several rows, written as one."""

    texts: tuple[str, ...]  # one for each key of a row
    fields: _Fields  # equal for all members
    members: tuple[int, ...]  # positions of the folded rows, ascending


class _Box(NamedTuple):
    """Rows of one template whose indices take all combinations of some ranges."""

    ranges: tuple[tuple[int, ...], ...]  # the values of each index
    members: tuple[int, ...]


def fold(rows: Sequence[tuple[tuple[str, ...], _Fields]]) -> list[Fold[_Fields]]:
    """Fold rows of keys, without losing which key belongs to which.

    Only rows with equal fields are folded. A row has its keys, the first of which no other row has, and whatever else
    must agree. Each is a member of exactly one of the folded rows, which are in the order of first members.

    >>> rows = [((f"h.{i}.{leaf}", f"layers.{i + 1}.{leaf}"), None) for i in range(12) for leaf in ("weight", "bias")]
    >>> [row.texts for row in fold(rows)]
    [('h.{0...11}.{weight,bias}', 'layers.{1...12}.{weight,bias}')]
    """
    groups: dict[tuple[_Template, _Fields], dict[int, tuple[int, ...]]] = {}
    for position, (keys, fields) in enumerate(rows):
        template, numbers = [], []
        for key in keys:
            parts = NUMBER.split(key)  # text, number, text, ..., text
            template.append(tuple(parts[0::2]))
            numbers += parts[1::2]
        groups.setdefault((tuple(template), fields), {})[position] = tuple(map(int, numbers))
    folds = [
        Fold(texts, fields, members)
        for (template, fields), numbers_of in groups.items()
        for texts, members in _fold_numbers(template, numbers_of)
    ]
    return sorted(_fold_leaves(folds), key=lambda row: row.members[0])


def _fold_numbers(
    template: _Template, numbers_of: dict[int, tuple[int, ...]]
) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Return the texts and members of each folded row of one template, given the numbers of the rows."""
    columns = list(zip(*numbers_of.values(), strict=True))
    indices: dict[tuple[int, ...], int] = {}  # numbers that move in step over all rows are one index
    slots: list[tuple[int, int]] = []  # for each number its index, and its distance from that index
    values: list[tuple[int, ...]] = []  # for each index its value in each row
    for column in columns:
        first = column[0]
        movement = tuple([number - first for number in column])
        if movement not in indices:
            indices[movement] = len(values)
            values.append(column)
        index = indices[movement]
        slots.append((index, first - values[index][0]))

    appearing = iter(slots)
    orders = [[index for index, _ in (next(appearing) for _ in texts[1:])] for texts in template]
    ranges = [tuple(sorted(set(column))) for column in values]
    identifying = list(dict.fromkeys(index for index in orders[0] if len(ranges[index]) > 1))
    # Nested indices that another key nests otherwise would read as parallel ones: then only the innermost is folded.
    nestings = [[index for index in dict.fromkeys(order) if index in identifying] for order in orders]
    foldable = identifying if all(n == sorted(n, key=identifying.index) for n in nestings) else identifying[-1:]
    if foldable == identifying and prod(map(len, ranges)) == len(numbers_of):  # the usual case, which is fast
        return [(_write_range_of(template, slots, _Box(tuple(ranges), ())), tuple(numbers_of))]
    singles = zip(*([(value,) for value in column] for column in values), strict=True)
    boxes = [_Box(each, (position,)) for each, position in zip(singles, numbers_of, strict=True)]
    for index in reversed(foldable):  # innermost first: stages of different depth then fold to one row each
        boxes = _fold_index(boxes, index, frozenset(identifying))
    return [(_write_range_of(template, slots, box), box.members) for box in boxes]


def _fold_index(boxes: list[_Box], index: int, identifying: frozenset[int]) -> list[_Box]:
    """Join the boxes that differ in one index and in what follows it."""
    others = identifying - {index}
    buckets: dict[tuple[tuple[int, ...], ...], list[_Box]] = {}
    for box in boxes:
        fixed = tuple(box.ranges[other] for other in others)
        buckets.setdefault(fixed, []).append(box)
    joined = []
    for bucket in buckets.values():
        bucket.sort(key=lambda box: box.ranges[index])
        run = [bucket[0]]
        moving = None
        for previous, box in pairwise(bucket):
            step = _step(previous, box)
            if step is None or (moving is not None and step != moving):
                joined.append(_join(run, moving or frozenset()))
                run, moving = [box], None
            else:
                run.append(box)
                moving = step
        joined.append(_join(run, moving or frozenset()))
    return joined


def _step(previous: _Box, box: _Box) -> frozenset[int] | None:
    """Return the indices that grow from one box to the next; None if one of them falls or is a range already."""
    moving = []
    for index, (before, after) in enumerate(zip(previous.ranges, box.ranges, strict=True)):
        if before != after:
            if len(before) > 1 or len(after) > 1 or before > after:
                return None
            moving.append(index)
    return frozenset(moving)


def _join(run: list[_Box], moving: frozenset[int]) -> _Box:
    ranges = tuple(
        tuple(box.ranges[index][0] for box in run) if index in moving else values
        for index, values in enumerate(run[0].ranges)
    )
    return _Box(ranges, tuple(sorted(member for box in run for member in box.members)))


def _write_range_of(template: _Template, slots: list[tuple[int, int]], box: _Box) -> tuple[str, ...]:
    """Write the keys of a box, with each index as its range."""
    numbers = (write_range([value + distance for value in box.ranges[index]]) for index, distance in slots)
    texts = []
    for first, *others in template:
        texts.append(first + "".join(next(numbers) + text for text in others))
    return tuple(texts)


def write_range(values: list[int]) -> str:
    """Write ascending numbers, each run of three or more as its ends.

    >>> print(write_range([3]), write_range([0, 1, 2, 3]), write_range([0, 2, 3]), write_range([0, 4, 8, 12]))
    3 {0...3} {0,2,3} {0,4,...,12}
    """
    if len(values) == 1:
        return str(values[0])
    steps = {after - before for before, after in pairwise(values)}
    if len(values) > 3 and len(steps) == 1 and steps != {1}:
        return f"{{{values[0]},{values[1]},...,{values[-1]}}}"
    grouped = groupby(enumerate(values), lambda pair: pair[1] - pair[0])  # which stays the same within a run
    runs = [[value for _, value in run] for _, run in grouped]
    parts = [part for run in runs for part in ([f"{run[0]}...{run[-1]}"] if len(run) > 2 else map(str, run))]
    if len(parts) > _MAX_PARTS:
        parts[_MAX_PARTS - 1 : -1] = ["..."]
    return "{" + ",".join(parts) + "}"


def in_braces(names: Sequence[str], limit: int) -> str:
    """List names in braces, at most ``limit`` of them before an ellipsis; one is written as it is.

    >>> in_braces(["weight", "bias"], 3), in_braces("abcde", 3)
    ('{weight,bias}', '{a,b,c,...}')
    """
    if len(names) == 1:
        return names[0]
    return "{" + ",".join([*names[:limit], *(["..."] if len(names) > limit else [])]) + "}"


def _fold_leaves(folds: list[Fold[_Fields]]) -> list[Fold[_Fields]]:
    """Fold rows whose keys differ in their last names only."""
    families: dict[Hashable, list[tuple[Fold[_Fields], list[str]]]] = {}
    for row in folds:
        split = [_LEAF.fullmatch(text) for text in row.texts]
        found = [match for match in split if match]
        if len(found) == len(split):
            parents = tuple(match[1] for match in found)
            families.setdefault((parents, row.fields), []).append((row, [match[2] for match in found]))
        else:
            families[row.members] = [(row, [])]
    return [_join_leaves(family) if len(family) > 1 else family[0][0] for family in families.values()]


def _join_leaves(family: list[tuple[Fold[_Fields], list[str]]]) -> Fold[_Fields]:
    family = sorted(family, key=lambda item: item[0].members[0])
    texts = []
    for text, leaves in zip(family[0][0].texts, zip(*(leaves for _, leaves in family), strict=True), strict=True):
        if len(set(leaves)) > 1:
            text = text[: len(text) - len(leaves[0])] + in_braces(leaves, _MAX_LEAVES)
        texts.append(text)
    members = tuple(sorted(member for row, _ in family for member in row.members))
    return Fold(tuple(texts), family[0][0].fields, members)


@dataclass(frozen=True, slots=True)
class Row:
    """One or more tensors of a report, folded."""

    keys: tuple[str, ...]  # the source's and the target's, or the only one
    facts: tuple[str, ...]  # what stands beside the keys, such as shape and operation
    tensors: int
    warnings: tuple[str, ...] = ()
    indent: str = "  "
    heading: str = ""  # a line above the first row of a group
    advice: tuple[str, ...] = ()  # what to do, a line each, which may be longer than others
    choice: int = -1  # the place of the choice that the row is of; rows of one stay together
    more: int = 0  # tensors of the same choice that have no row

    @property
    def cells(self) -> tuple[str, ...]:
        """What stands beside the keys: the number of tensors, if there are several, and the facts."""
        return (f"{self.tensors:,} x" if self.tensors > 1 else "", *self.facts)


def printable(text: str, *, kept: str = "") -> str:
    r"""Escape what could break or disguise a line: all that is not printable, but for what is to be kept.

    >>> print(printable("a\x1b[31m\nb\u202e", kept="\n"))
    a\x1b[31m
    b\u202e
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in kept else char.encode("unicode_escape").decode() for char in text
    )


def escaped(text: str) -> str:
    r"""Escape what is not printable, and backslashes, so that different texts stay different.

    >>> print(escaped("weight\n"))
    weight\n
    """
    return printable(text.replace("\\", r"\\"))


def escape_markdown(text: str) -> str:
    r"""Write text so that Markdown shows it as it is.

    >>> print(escape_markdown("a_b [2] | c"))
    a\_b \[2\] \| c
    """
    return _MARKDOWN.sub(r"\\\1", text)


def markdown_code(text: str) -> str:
    r"""Write text as code in a table, whatever backticks and bars it has.

    >>> print(markdown_code("layers.{0...3}.weight"), markdown_code("a`b|c"))
    `layers.{0...3}.weight` ``a`b\|c``
    """
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("|", r"\|")


def blocks_of(rows: Sequence[Row]) -> dict[tuple[int, tuple[str, ...]], list[Row]]:
    """Group the rows which ``under_headings`` writes together, by what the keys of each group have in common."""
    blocks: dict[tuple[int, tuple[str, ...]], list[Row]] = {}
    for position, row in enumerate(rows):
        start = tuple(_block(key) for key in row.keys)
        blocks.setdefault((row.choice, start if all(start) else (str(position),)), []).append(row)
    return blocks


def under_headings(rows: Sequence[Row]) -> list[Row]:
    """Write what the keys of a block have in common once, above the first of its rows."""
    grouped = []
    for (_, start), members in blocks_of(rows).items():
        if len(members) == 1:
            grouped += members
            continue
        heading = "  " + " -> ".join(part.removesuffix(".") for part in start)
        for row in members:
            rests = [_without(part, key) for key, part in zip(row.keys, start, strict=True)]
            keys = tuple(dict.fromkeys(rests))  # one if both sides agree
            grouped.append(replace(row, keys=keys, indent=" " * 4, heading=heading if row is members[0] else ""))
    return grouped


def _without(start: str, text: str) -> str:
    return " + ".join(key.removeprefix(start) for key in text.split(" + "))


def _block(text: str) -> str:
    """Return the start of keys up to their first number; empty if they have none in common.

    >>> _block("encoder.layers.{0...11}.fc1.weight + encoder.layers.{0...11}.fc2.weight")
    'encoder.layers.{0...11}.'
    """
    starts = {match[0] if (match := _BLOCK.match(key)) else "" for key in text.split(" + ")}
    return starts.pop() if len(starts) == 1 else ""


def key_block(key: str) -> str:
    """Return the block of a network that a tensor is in: all up to the first number, or else its module.

    >>> key_block("encoder.layers.11.fc.weight"), key_block("head.fc.bias"), key_block("cls_token")
    ('encoder.layers.11', 'head.fc', 'cls_token')
    """
    return _block(key).removesuffix(".") or key.rpartition(".")[0] or key


def lay_out(rows: Sequence[Row], width: int) -> list[list[str]]:
    """Write each row as its lines: one if it fits, with its cells in columns, else two or more."""
    widths = [max(map(len, column)) for column in zip(*(row.cells for row in rows), strict=True)]
    facts = []
    for row in rows:
        aligned = [row.cells[0].rjust(widths[0]), *map(str.ljust, row.cells[1:-1], widths[1:-1])]
        facts.append("  ".join(cell for cell, wide in zip(aligned, widths, strict=False) if wide))
    keys = [row.indent + " -> ".join(row.keys) for row in rows]
    column = max((len(key) for key, fact in zip(keys, facts, strict=True) if len(key + fact) + 8 <= width), default=0)
    return [_write(row, fact, column, width) for row, fact in zip(rows, facts, strict=True)]


def _write(row: Row, facts: str, column: int, width: int) -> list[str]:
    """Write one row; what does not fit beside its keys stands below them."""
    lines = [_clip(row.heading, width)] if row.heading else []
    *above, key = row.keys
    verdict = row.cells[-1]
    if above and len(row.indent + " -> ".join(row.keys) + facts + verdict) + 4 > width:
        lines += [_clip(row.indent + part, width) for part in above]
        key = f"{row.indent}  -> {key}"
    else:
        key = row.indent + " -> ".join(row.keys)
    room = width - len(key) - 2
    if len(facts) + 2 + len(verdict) <= room:
        lines.append(_aligned(key, f"{facts}  {verdict}", column, width))
    elif len(facts) <= room:
        lines += [_aligned(key, facts.rstrip(), column, width), *_wrapped(verdict, width, " " * 6)]
    else:
        lines += [_clip(key, width), *_wrapped(f"{facts.lstrip()}  {verdict}", width, " " * 6)]
    for warning in row.warnings:
        lines += _wrapped(warning, width, "    ! ")
    for text in row.advice:
        lines += _filled(text, width, " " * 4)
    return lines


def _aligned(key: str, rest: str, column: int, width: int) -> str:
    return f"{key:<{min(column, width - 2 - len(rest))}}  {rest}"


def _wrapped(text: str, width: int, mark: str) -> list[str]:
    whole = re.sub(r"(?<=,) (?=[0-9])| (?=\[)", "\N{NO-BREAK SPACE}", text)  # a shape stays whole, with its key
    return [_clip(line.replace("\N{NO-BREAK SPACE}", " "), width) for line in _filled(whole, width, mark)]


def _filled(text: str, width: int, mark: str, rest: str = " " * 6) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=mark, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def _clip(text: str, width: int) -> str:
    """Shorten a text in its middle.

    >>> _clip("encoder.layers.weight", 9)
    'enco…ight'
    """
    if len(text) <= width:
        return text
    kept = max(width - 1, 2)
    return f"{text[: kept - kept // 2]}…{text[-(kept // 2) :]}"


def share_out(sizes: Sequence[int], lines: int) -> list[int]:
    """Distribute lines: small sections get what they need, and large ones equal parts of what remains.

    >>> share_out([50, 2, 30], 22)
    [10, 2, 10]
    """
    budgets = list(sizes)
    for served, index in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        budgets[index] = min(sizes[index], max(lines, 0) // (len(sizes) - served))
        lines -= budgets[index]
    return budgets


def cut(rows: Sequence[Row], table: Sequence[list[str]], budget: int, everything: str) -> list[str]:
    """Return the lines of as many rows as fit, at least one, and a line on those that are left out.

    Of the rows of a choice all are there, or none.
    """
    if sum(map(len, table)) <= budget:
        return [line for lines in table for line in lines]
    units: dict[tuple[int, int], list[int]] = {}
    for place, row in enumerate(rows):
        units.setdefault((row.choice, place if row.choice < 0 else 0), []).append(place)
    kept: list[str] = []
    count = 0
    for places in units.values():
        lines = [line for place in places for line in table[place]]
        if count and len(kept) + len(lines) >= budget:
            break
        kept += lines
        count += len(places)
    left = sum(row.tensors + row.more for row in rows[count:])
    if left:
        kept.append(f"  ... and {len(rows) - count:,} more rows, of {left:,} tensors: {everything}")
    return kept


def paragraphs(texts: Iterable[str], width: int) -> list[str]:
    """Wrap texts of a line each, of which all but the first lines are indented, between words."""
    return [line for text in texts for line in _filled(text, width, "", "  ")]


def render_sections(
    head: Sequence[str], found: Mapping[str, Sequence[Row]], width: int, limit: int | None, everything: str
) -> str:
    """Write a report: the lines of its head, and each section that has rows, cut so that all keeps to the limit."""
    lines = list(head)
    sections = {title: under_headings(rows) for title, rows in found.items() if rows}
    tables = {title: lay_out(rows, width) for title, rows in sections.items()}
    sizes = [sum(map(len, table)) for table in tables.values()]
    budgets = sizes if limit is None else share_out(sizes, limit - len(lines) - 2 * len(tables))
    for (title, table), budget in zip(tables.items(), budgets, strict=True):
        lines += ["", *paragraphs([title], width), *cut(sections[title], table, budget, everything)]
    return "\n".join(map(str.rstrip, lines))
