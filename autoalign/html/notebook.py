"""The short form of a report that a notebook shows: totals and folded rows, without style sheet or script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from autoalign.layout import Row, escaped
from autoalign.matches import Plan
from autoalign.report import percent, rows_of
from autoalign.totals import Totals, elements, totals_of

ROWS = 30  # of a section

# Colours are the notebook's own, whether it is light or dark; what is said of a key is paler than the key.
_CELL = "padding:1px 10px 1px 0;text-align:left;vertical-align:top;background:none;border:0"
_NUMBER = "padding:1px 10px 1px 0;text-align:right;background:none;border:0;font-variant-numeric:tabular-nums"
_KEY = "font-family:monospace;overflow-wrap:anywhere;direction:ltr;unicode-bidi:isolate-override"
_PALE = "opacity:0.7"


def notebook_html(alignment: Plan) -> str:
    """Write an alignment as a fragment of HTML that needs neither scripts nor a network.

    Sections open without scripts; matched rows are closed where others need attention, and long sections are cut.
    """
    found = totals_of(alignment)
    sections = {title: rows for title, rows in rows_of(alignment).items() if rows}
    parts = [
        f"<div><strong>{escape(repr(alignment))}</strong></div>",
        f"<div>{escape(found.lead)}</div>",
        _totals(found),
        *(f"<div>Note: {escape(escaped(note))}</div>" for note in alignment.notes),
        *(
            _section(title, rows, opened=len(sections) == 1 or not title.startswith("Matched"))
            for title, rows in sections.items()
        ),
    ]
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
    left = len(rows) - ROWS
    more = f"<div>… and {left:,} more rows: print the alignment, or write it with to_html</div>" if left > 0 else ""
    body = "".join(map(_row, rows[:ROWS]))
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
    *cells_before, verdict = (escape(cell) for cell in row.cells)
    said = "".join(f'<td style="{_CELL};{_PALE};white-space:nowrap">{cell}</td>' for cell in cells_before)
    said += f'<td style="{_CELL};{_PALE}">{verdict}{warnings}</td>'
    return f'<tr style="background:none">{"".join(cells)}{said}</tr>'
