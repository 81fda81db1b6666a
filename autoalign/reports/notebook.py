"""What notebooks show: alignments and comparisons with the picture of the page, and results of a few lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from autoalign.plan.matches import Plan
from autoalign.reports.changes import Change, change_rows, headline
from autoalign.reports.html import document
from autoalign.reports.rows import Row, escaped
from autoalign.reports.text import Totals, elements, notes_of, percent, rows_of, totals_of

MAX_ROWS = 30  # of a section
MAX_TENSORS = 5_000  # of both sides, for a picture, which is kept in the notebook's file
_FRAME = "width:100%;height:460px;border:1px solid #8888;border-radius:6px;resize:vertical"

# Colours of the short form are the notebook's own, light or dark; what stands beside a key is paler than the key.
_CELL = "padding:1px 10px 1px 0;text-align:left;vertical-align:top;background:none;border:0"
_NUMBER = "padding:1px 10px 1px 0;text-align:right;background:none;border:0;font-variant-numeric:tabular-nums"
_KEY = "font-family:monospace;overflow-wrap:anywhere;direction:ltr;unicode-bidi:isolate-override"
_PALE = "opacity:0.7"


def notebook_html(alignment: Plan, changes: Sequence[Change] | None = None) -> str:
    """Write an alignment as a fragment of HTML, with changes as a comparison: its picture, and what the text says.

    The picture is the page in a frame of its own that reaches nothing else. The rest needs no scripts, and a section
    opens without them; matched rows are closed where others need attention, and long sections are cut.
    """
    found = totals_of(alignment)
    title, lead, rows = repr(alignment), found.lead, rows_of(alignment)
    if changes is not None:
        title, lead, rows = "Difference", headline(alignment, changes), change_rows(alignment, changes)
    sections = {name: each for name, each in rows.items() if each}
    calm = "Equal" if changes is not None else "Matched"
    parts = [
        f"<div><strong>{escape(title)}</strong></div>",
        f"<div>{escape(lead)}</div>",
        _totals(found) if changes is None else "",
        *(f"<div>Note: {escape(escaped(note))}</div>" for note in notes_of(alignment)),
        *(
            _section(name, each, opened=len(sections) == 1 or not name.startswith(calm))
            for name, each in sections.items()
        ),
    ]
    if 0 < len(alignment.source_specs) + len(alignment.target_specs) <= MAX_TENSORS:
        page = escape(document(alignment, changes=changes))
        frame = f'<iframe sandbox="allow-scripts" allow="clipboard-write" srcdoc="{page}" style="{_FRAME}"></iframe>'
        parts.insert(1, frame)
    return f'<div class="autoalign">{"".join(parts)}</div>'


def short_html(title: str, lines: Iterable[str], tables: Mapping[str, Iterable[Sequence[str]]]) -> str:
    """Write a result of a few lines as a fragment of HTML: its title, lines, and tables with their headings."""
    parts = [f"<div><strong>{escape(title)}</strong></div>", *(f"<div>{escape(line)}</div>" for line in lines)]
    for heading, rows in tables.items():
        cells = ("".join(f'<td style="{_CELL};{_KEY}">{escape(cell)}</td>' for cell in row) for row in rows)
        body = "".join(f'<tr style="background:none">{row}</tr>' for row in cells)
        if body:
            parts.append(f'<div style="{_PALE}">{escape(heading)}</div>')
            parts.append(f'<table style="border:0"><tbody>{body}</tbody></table>')
    return f'<div class="autoalign">{"".join(parts)}</div>'


def _totals(found: Totals) -> str:
    rows = "".join(
        f'<tr><td style="{_CELL}">{share.status}</td><td style="{_NUMBER}">{share.tensors:,}</td>'
        f'<td style="{_NUMBER}">{share.elements:,}</td>'
        f'<td style="{_NUMBER}">{percent(share.elements, elements(shares))} of the {side}</td></tr>'
        for side, shares in (("target", found.target), ("source", found.source))
        for share in shares
        if share.status != "used"
    )
    heads = "".join(
        f'<th scope="col" style="{style}">{name}</th>'
        for name, style in (("", _CELL), ("tensors", _NUMBER), ("elements", _NUMBER), ("", _NUMBER))
    )
    return f'<table style="margin:6px 0;border:0"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'


def _section(title: str, rows: Sequence[Row], *, opened: bool) -> str:
    count = sum(row.tensors for row in rows)
    left = len(rows) - MAX_ROWS
    more = f"<div>… and {left:,} more rows: print the alignment, or write it with to_html</div>" if left > 0 else ""
    body = "".join(map(_row, rows[:MAX_ROWS]))
    return (
        f"<details{' open' if opened else ''}><summary>{escape(title)} ({count:,})</summary>"
        f'<table style="margin:2px 0 6px 16px;border:0"><tbody>{body}</tbody></table>{more}</details>'
    )


def _row(row: Row) -> str:
    *others, key = row.keys
    cells = [f'<td style="{_CELL};{_KEY}">{escape(other)}</td>' for other in others]
    cells.append(f'<td style="{_CELL};{_KEY}">{"→ " if others else ""}{escape(key)}</td>')
    if not others:
        cells[0] = cells[0].replace("<td ", '<td colspan="2" ', 1)
    warnings = "".join(f"<div>⚠ {escape(warning)}</div>" for warning in row.warnings)
    warnings += "".join(f"<div>{escape(line)}</div>" for line in row.advice)
    *cells_before, verdict = (escape(cell) for cell in row.cells)
    facts = "".join(f'<td style="{_CELL};{_PALE};white-space:nowrap">{cell}</td>' for cell in cells_before)
    facts += f'<td style="{_CELL};{_PALE}">{verdict}{warnings}</td>'
    return f'<tr style="background:none">{"".join(cells)}{facts}</tr>'
