"""Alignments and comparisons as HTML: a page with both module trees and all evidence, and what notebooks show.

A notebook shows the picture of the page and what the text says, and of other results a few lines and tables.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import autoalign
from autoalign.checkpoints.atomic import replace_text
from autoalign.errors import InputError
from autoalign.plan.keys import NUMBER
from autoalign.plan.matches import FILLED, Match, Plan, Status
from autoalign.plan.operations import Copy, Operation
from autoalign.plan.specs import TensorSpec
from autoalign.reports.changes import VERDICTS, Change, change_rows, headline, left_of, render_changes, share
from autoalign.reports.choices import Choice, choices_of, settling, to_paste
from autoalign.reports.module_tree import Leaf, Tree, build_tree
from autoalign.reports.rows import Row, escaped
from autoalign.reports.text import (
    SCREEN,
    Counterparts,
    Totals,
    counterparts,
    difference,
    elements,
    nearest,
    notes_of,
    percent,
    reason,
    render_text,
    rows_of,
    short_count,
    totals_of,
)

LINKS: tuple[Status, ...] = ("matched", "adapted", "ambiguous", "mismatched")  # between tensors of both sides
_MAX_NEAREST = 200  # rows of a side whose nearest counterpart is sought, which takes a while for each
_SCRIPTS = ("model", "rows", "layout", "view", "panel", "main")  # in the order in which they need each other
_COLOUR = {"matched": "sure", "used": "sure", "equal": "sure", "close": "good", "changed": "low"}  # of a status
_COLOUR |= {"only in the second": "missing"}
_LARGE_CHANGE = 0.1  # of the mean value
_MAX_OPTIONS = 6  # of a choice that are drawn
MAX_ROWS = 30  # of a section
MAX_TENSORS = 5_000  # of both sides, for a picture, which is kept in the notebook's file
_FRAME = "width:100%;height:460px;border:1px solid #8888;border-radius:6px;resize:vertical"

# Colours of the short form are the notebook's own, light or dark; what stands beside a key is paler than the key.
_CELL = "padding:1px 10px 1px 0;text-align:left;vertical-align:top;background:none;border:0"
_NUMBER = "padding:1px 10px 1px 0;text-align:right;background:none;border:0;font-variant-numeric:tabular-nums"
_KEY = "font-family:monospace;overflow-wrap:anywhere;direction:ltr;unicode-bidi:isolate-override"
_PALE = "opacity:0.7"

_Use = tuple[tuple[Hashable, ...], tuple[int, ...]]  # of a tensor: texts without their numbers, and the numbers


@dataclass(frozen=True, slots=True)
class _Link:
    """What joins one target tensor with its sources."""

    status: Status
    match: Match
    change: tuple[str, str, str] | None  # its kind, mean and largest, where values were compared
    signature: tuple[Hashable, ...]  # status, operation without its numbers, and warnings
    numbers: tuple[int, ...]  # of its operation


class _Tables(defaultdict[str, dict[Any, int]]):
    """Values that occur many times, each of which stands in a table once; a dict from the value to its place."""

    def __init__(self) -> None:
        super().__init__(dict)

    def place(self, table: str, value: Hashable) -> int:
        return self[table].setdefault(value, len(self[table]))


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of the page."""

    specs: tuple[TensorSpec, ...]  # in the order of the tree
    tree: Tree
    places: Mapping[str, int]  # of each key among them
    reasons: Mapping[str, str]  # why a tensor is missing or unexpected
    others: Counterparts | None  # of those tensors on the other side; None if there are none


def page_data(alignment: Plan, changes: Sequence[Change] | None = None) -> dict[str, Any]:
    """Return what the page needs of an alignment: columns of small numbers, which a script turns back into trees.

    Keys are written as on a screen, with characters that cannot be seen as their escapes. Tensors are numbered on
    each side in the order of its tree, and everything that occurs many times stands in a table once.
    """
    change_of = {change.target: change for change in changes or ()}
    links = [
        _link("adapted" if m.operation.adapts else "matched", m, change_of.get(m.target)) for m in alignment.matches
    ]
    links += [_link("ambiguous", match) for match in alignment.ambiguous]
    links += [_link("mismatched", Match(item.key, (item.source_key,))) for item in alignment.mismatched]
    tables = _Tables()
    source, target = _side_of(alignment, "source", links), _side_of(alignment, "target", links)
    choice_of = {key: place for place, choice in enumerate(choices_of(alignment)) for key in choice.targets}
    return {
        "notes": [escaped(note) for note in notes_of(alignment)],
        "choices": [
            _choice(choice, place, source.places, target.places) for place, choice in enumerate(choices_of(alignment))
        ],
        "statuses": list(LINKS),
        "source": _side_columns(source, target, tables),
        "target": _side_columns(target, source, tables),
        "links": {
            **_link_columns(links, source.places, target.places, tables),
            "choice": [choice_of.get(link.match.target, -1) if link.status == "ambiguous" else -1 for link in links],
            "change": None if changes is None else [link.change for link in links],
        },
        "names": list(tables["names"]),
        "shapes": [list(shape) for shape in tables["shapes"]],
        "dtypes": list(tables["dtypes"]),
        "operations": [[text, _kinds(text)] for text in tables["operations"]],
        "texts": list(tables["texts"]),
        "evidence": [dict(cues) for cues in tables["evidence"]],
    }


def _link(status: Status, match: Match, change: Change | None = None) -> _Link:
    operation, numbers = _split_numbers(str(match.operation))
    kind = "" if change is None else _change_kind(change)
    measured = None if change is None else (kind, share(change.mean), share(change.largest))
    return _Link(status, match, measured, (status, operation, match.warnings, kind), tuple(numbers))


def _change_kind(change: Change) -> str:
    """Name the colour of a change, one of those of confidence."""
    if change.verdict == "changed":
        return "poor" if change.one_sided or change.mean >= _LARGE_CHANGE else "low"
    return _COLOUR[change.verdict]


def _side_of(alignment: Plan, side: Literal["source", "target"], links: Sequence[_Link]) -> _Side:
    uses: dict[str, list[_Use]] = {}
    if side == "source":
        known, left = alignment.sources, alignment.unexpected_keys
        for link in links:
            text, found = _split_numbers(link.match.target)
            for place, key in enumerate(link.match.sources):
                uses.setdefault(key, []).append(((text, *link.signature), (*found, *link.numbers, place)))
    else:
        known, left = alignment.targets, [key for key, of in alignment.status.items() if of == "missing"]
        for link in links:
            texts, several = zip(*map(_split_numbers, link.match.sources), strict=True)
            use = (*texts, *link.signature), (*chain.from_iterable(several), *link.numbers)
            uses[link.match.target] = [use]
    others = counterparts(alignment, "target" if side == "source" else "source") if left else None
    reasons = {key: reason(known[key], others) for key in left} if others else {}
    specs = [*known.values()]
    leaves = []
    for spec in specs:
        signature: tuple[Hashable, ...] = (spec.shape, spec.dtype)
        numbers: tuple[int, ...] = ()
        for more, own in uses.get(spec.key) or [((reasons.get(spec.key, "tied"),), ())]:
            signature, numbers = (*signature, *more), (*numbers, *own)
        leaves.append(Leaf(escaped(spec.key), signature, numbers))
    tree = build_tree(leaves)
    ordered = tuple(specs[tensor] for tensor in tree.tensors if tensor >= 0)
    return _Side(ordered, tree, {spec.key: place for place, spec in enumerate(ordered)}, reasons, others)


def _split_numbers(text: str) -> tuple[str, list[int]]:
    """Split a text into itself without its numbers, and its numbers.

    >>> _split_numbers("layers.3.mlp.fc1")
    ('layers.#.mlp.fc#', [3, 1])
    """
    return NUMBER.sub("#", text), [int(number) for number in NUMBER.findall(text)]


def _side_columns(side: _Side, opposite: _Side, tables: _Tables) -> dict[str, Any]:
    tree = side.tree
    return {
        "name": [tables.place("names", name) for name in tree.names],
        # A tensor at depth d is written as -1 - d.
        "depth": [depth if tensor < 0 else -1 - depth for depth, tensor in zip(tree.depths, tree.tensors, strict=True)],
        "runs": [[node, len(run)] for node, run in sorted(tree.runs.items())],
        "shape": [tables.place("shapes", spec.shape) for spec in side.specs],
        "dtype": [tables.place("dtypes", spec.dtype_name) for spec in side.specs],
        "left": _rows_left(side, opposite.places, tables),
    }


def _rows_left(side: _Side, opposite: Mapping[str, int], tables: _Tables) -> list[list[int]]:
    """List what is missing or unexpected: the tensor, the reason, and its nearest counterpart with the difference."""
    if side.others is None:
        return []
    nodes = [node for node, tensor in enumerate(side.tree.tensors) if tensor >= 0]
    shown = side.tree.representatives()
    sought = 0
    rows = []
    for key, why in side.reasons.items():
        place = side.places[key]
        row = [place, tables.place("texts", escaped(why))]
        if shown[nodes[place]] == nodes[place] and sought < _MAX_NEAREST:
            sought += 1
            spec = side.specs[place]
            if near := nearest(spec, side.others):
                row += [opposite[near.key], tables.place("texts", difference(near.shape, spec.shape).strip(" ()"))]
        rows.append(row)
    return rows


def _link_columns(
    links: Sequence[_Link], source: Mapping[str, int], target: Mapping[str, int], tables: _Tables
) -> dict[str, Any]:
    def one_or_more(keys: Sequence[str]) -> int | list[int]:
        found = [source[key] for key in keys]
        return found[0] if len(found) == 1 else found

    def operation(of: Operation) -> int:
        return tables.place("operations", escaped(str(of)))

    matches = [link.match for link in links]
    return {
        "status": [LINKS.index(link.status) for link in links],
        "target": [target[match.target] for match in matches],
        "sources": [one_or_more(match.sources) for match in matches],
        "operation": [operation(match.operation) for match in matches],
        "confidence": [round(match.confidence, 4) for match in matches],
        "evidence": [
            tables.place("evidence", tuple((escaped(cue), round(value, 3)) for cue, value in match.evidence.items()))
            for match in matches
        ],
        "warnings": [[tables.place("texts", escaped(warning)) for warning in match.warnings] or 0 for match in matches],
        "alternatives": [
            [[one_or_more(other.sources), operation(other.operation)] for other in match.alternatives] or 0
            for match in matches
        ],
    }


def _choice(choice: Choice, place: int, source: Mapping[str, int], target: Mapping[str, int]) -> dict[str, Any]:
    """Return what an answer takes for what, with the text that makes it, and what else is said of a choice."""
    left = len(choice.options) - _MAX_OPTIONS
    return {
        "options": [
            {
                "paste": to_paste(choice, place, number),
                "pairs": [[[source[key] for key in match.sources], target[match.target]] for match in option.matches],
                "operations": sorted({escaped(str(match.operation)) for match in option.matches}),
            }
            for number, option in enumerate(choice.options[:_MAX_OPTIONS])
        ],
        "more": settling(choice) + ([f"and {left} more in alignment.choices[{place}].options"] if left > 0 else []),
    }


def _kinds(operation: str) -> str:
    """Name the kinds of operations, without their numbers.

    >>> _kinds("transpose + concatenate(dim 0)"), _kinds("reshape[4, 2]")
    ('transpose + concatenate', 'reshape')
    """
    while (shorter := re.sub(r"[(\[][^()\[\]]*[)\]]", "", operation)) != operation:
        operation = shorter
    return operation.strip() or str(Copy())


def document(alignment: Plan, *, title: str | None = None, changes: Sequence[Change] | None = None) -> str:
    """Write an alignment as an HTML document that loads nothing from elsewhere, with changes as a comparison.

    Its policy allows the style and the script that it holds and nothing more; keys are data to it and never markup.
    """
    found = totals_of(alignment)
    style, script = _asset("report.css"), "\n".join(_asset(f"{name}.js") for name in _SCRIPTS)
    script = f'"use strict";\n(() => {{\n{script}}})();\n'
    notes = "".join(f"<li>{escape(escaped(note))}</li>" for note in notes_of(alignment))
    names = _name_of(alignment.tensors), _name_of(alignment.target_tensors)
    sides, unnamed = ("Source", "Target"), ("the checkpoint", "the model")
    if changes is not None:
        sides, unnamed = ("First", "Second"), ("a checkpoint", "another")
    if title is None:
        title = f"{names[0]} → {names[1]}" if any(names) else "Alignment report"
    if changes is None:
        text = render_text(alignment, width=120)
        totals = [
            _total("Target tensors filled", {share.status: share.tensors for share in found.target}),
            _total("Elements filled", {share.status: share.elements for share in found.target}),
            _total("Source tensors used", {share.status: share.tensors for share in found.source}),
        ]
    else:
        text = render_changes(alignment, changes, width=120, limit=SCREEN)
        counts = {verdict: sum(change.verdict == verdict for change in changes) for verdict in VERDICTS}
        left = left_of(alignment)
        uncompared = {"mismatched": "mismatched", "ambiguous": "ambiguous", "only_second": "only in the second"}
        parts = counts | {name: len(left[kind]) for kind, name in uncompared.items()}
        totals = [_total("Tensors of the second equal", {name: count for name, count in parts.items() if count})]
    values = {
        "policy": "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src '{_digest(style)}'; script-src '{_digest(script)}'",
        "version": escape(autoalign.__version__),
        "title": escape(escaped(title)),
        "lead": escape(found.lead if changes is None else headline(alignment, changes)),
        "heads": "".join(
            f"<h2>{side} <span>{escape(escaped(name or default))}</span></h2>"
            for side, name, default in zip(sides, names, unnamed, strict=True)
        ),
        "totals": "".join(totals),
        "notes": f'<ul class="notes" aria-label="Notes">{notes}</ul>' if notes else "",
        "text": escape(text),
        "data": script_safe(page_data(alignment, changes)),
        "css": style,
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], _asset("report.html"))


def _name_of(side: Mapping[str, object]) -> str:
    """Name a side by its file or its model's class; '' where neither is known."""
    module = getattr(side, "module", None)
    return Path(getattr(side, "path", None) or "").name if module is None else type(module).__name__


def write(
    alignment: Plan, path: str | os.PathLike[str], *, title: str | None = None, changes: Sequence[Change] | None = None
) -> None:
    """Write the document to a file, which is replaced as a whole or left as it was."""
    text = document(alignment, title=title, changes=changes)
    try:
        replace_text(Path(path), text)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"The report cannot be written to {str(path)!r}: {getattr(error, 'strerror', None) or error}. "
            "What was there is unchanged. Give the path of a file in a folder that exists."
        ) from error


def script_safe(value: object) -> str:
    r"""Write a value as JSON that ends no script element and holds nothing but ASCII.

    >>> script_safe("</script>")
    '"\\u003c/script\\u003e"'
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _total(name: str, parts: Mapping[str, int]) -> str:
    whole = sum(parts.values())
    good = sum(count for status, count in parts.items() if status in FILLED or status in ("used", "equal"))
    rects, x = "", 0.0
    for status, count in parts.items():
        width = 100 * count / whole if whole else 0
        rects += f'<rect class="k-{_COLOUR.get(status, status)}" x="{x:.3f}" width="{width:.3f}" height="10"/>'
        x += width
    described = ", ".join(f"{status} {count:,}" for status, count in parts.items())
    return (
        f'<div class="total"><div class="figures"><strong>{escape(percent(good, whole))}</strong>'
        f'<span class="name">{name}: {short_count(good, whole)} of {short_count(whole)}</span></div>'
        f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{described}">'
        f"<title>{described}</title>{rects}</svg></div>"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _asset(name: str) -> str:
    return files("autoalign.reports").joinpath("page", name).read_text(encoding="utf-8")


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
        _totals_table(found) if changes is None else "",
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


def _totals_table(found: Totals) -> str:
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
