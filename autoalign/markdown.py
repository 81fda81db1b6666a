"""Reports in Markdown, for issues and pull requests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from autoalign.layout import Row, escaped
from autoalign.matches import Plan
from autoalign.report import plain_text, rows_of

_WORDS = re.compile(r"([\\`*_{}\[\]<>#|~])")


def render_markdown(alignment: Plan) -> str:
    """Write an alignment as Markdown: totals, notes, and a table of the folded rows of each kind."""
    head, _, _ = plain_text(replace(alignment, notes=())).partition("\n\n")
    lines = ["```text", *head.split("\n"), "```", *(f"- {words(escaped(note))}" for note in alignment.notes)]
    for title, rows in rows_of(alignment).items():
        if not rows:
            continue
        name, _, meaning = title.partition(": ")
        lines += ["", f"### {name}", "", f"{meaning}:" if meaning else "", "", *table(rows)]
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> list[str]:
    """Write rows as the lines of a table."""
    between = len(rows[0].cells)
    lines = [f"| keys |{' |' * between}", f"| --- |{' --- |' * between}"]
    for row in rows:
        cells = [" → ".join(map(code, row.keys)), *map(words, row.cells)]
        cells[-1] += "".join(f"<br>⚠ {words(warning)}" for warning in row.warnings)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def words(text: str) -> str:
    r"""Write text so that Markdown shows it as it is.

    >>> print(words("a_b [2] | c"))
    a\_b \[2\] \| c
    """
    return _WORDS.sub(r"\\\1", text)


def code(text: str) -> str:
    r"""Write text as code in a table, whatever backticks and bars it has.

    >>> print(code("layers.{0...3}.weight"), code("a`b|c"))
    `layers.{0...3}.weight` ``a`b\|c``
    """
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("|", r"\|")
