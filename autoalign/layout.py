"""The layout of a report: rows of keys and what is said of them, as lines of a limited width and number."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

_COMPONENT = r"(?:[^.{}]|\{[^}]*\})*\."  # of a key, whose lists in braces may hold dots
_BLOCK = re.compile(rf"(?:{_COMPONENT})*?(?=[^.]*[0-9]){_COMPONENT}")


@dataclass(frozen=True, slots=True)
class Row:
    """One or more tensors of a report, folded."""

    keys: tuple[str, ...]  # the source's and the target's, or the only one
    facts: tuple[str, ...]  # what is said of them
    tensors: int
    warnings: tuple[str, ...] = ()
    indent: str = "  "
    heading: str = ""  # a line above the first row of a group

    @property
    def cells(self) -> tuple[str, ...]:
        """What stands beside the keys: of how many tensors it is said, if of several, and what."""
        return (f"{self.tensors:,} x" if self.tensors > 1 else "", *self.facts)


def escaped(text: str) -> str:
    r"""Write characters that would break or disguise a line as their escapes; different texts stay different.

    >>> print(escaped("weight\n"))
    weight\n
    """
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(
        char if char.isprintable() and char != "\\" else char.encode("unicode_escape").decode() for char in text
    )


def under_headings(rows: Sequence[Row]) -> list[Row]:
    """Write what the keys of a block have in common once, above the first of its rows."""
    blocks: dict[tuple[str, ...], list[Row]] = {}
    for position, row in enumerate(rows):
        start = tuple(_block(key) for key in row.keys)
        blocks.setdefault(start if all(start) else (str(position),), []).append(row)
    grouped = []
    for start, members in blocks.items():
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
    """Find the start of keys up to their first number; empty if they have none in common.

    >>> _block("encoder.layers.{0...11}.fc1.weight + encoder.layers.{0...11}.fc2.weight")
    'encoder.layers.{0...11}.'
    """
    starts = {match[0] if (match := _BLOCK.match(key)) else "" for key in text.split(" + ")}
    return starts.pop() if len(starts) == 1 else ""


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
    return lines


def _aligned(key: str, rest: str, column: int, width: int) -> str:
    return f"{key:<{min(column, width - 2 - len(rest))}}  {rest}"


def _wrapped(text: str, width: int, mark: str) -> list[str]:
    whole = re.sub(r"(?<=,) (?=[0-9])| (?=\[)", "\N{NO-BREAK SPACE}", text)  # a shape stays whole, with its key
    lines = textwrap.wrap(
        whole, width, initial_indent=mark, subsequent_indent=" " * 6, break_long_words=False, break_on_hyphens=False
    )
    return [_clip(line.replace("\N{NO-BREAK SPACE}", " "), width) for line in lines]


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
    """Share out lines: small sections get what they need, and large ones equal parts of what remains.

    >>> share_out([50, 2, 30], 22)
    [10, 2, 10]
    """
    budgets = list(sizes)
    for served, index in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        budgets[index] = min(sizes[index], max(lines, 0) // (len(sizes) - served))
        lines -= budgets[index]
    return budgets


def cut(rows: Sequence[Row], table: Sequence[list[str]], budget: int, everything: str) -> list[str]:
    """Keep as many rows as fit, at least one, and say what is left out."""
    if sum(map(len, table)) <= budget:
        return [line for lines in table for line in lines]
    kept = list(table[0])
    count = 1
    while count < len(table) and len(kept) + len(table[count]) < budget:
        kept += table[count]
        count += 1
    left = sum(row.tensors for row in rows[count:])
    if left:
        kept.append(f"  ... and {len(rows) - count:,} more rows, of {left:,} tensors: {everything}")
    return kept
