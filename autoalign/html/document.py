"""The report as one HTML file, which needs nothing but itself: a picture of both module trees and what joins them."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from autoalign.errors import InputError
from autoalign.html.data import page_data
from autoalign.layout import escaped
from autoalign.matches import FILLED, Plan
from autoalign.replacing import replace_text
from autoalign.report import percent, plain_text
from autoalign.totals import elements, tensors, totals_of

TITLE = "Alignment report"

_SCRIPTS = ("model", "rows", "layout", "view", "panel", "main")  # in the order in which they need each other
_KIND = {"matched": "sure", "used": "sure"}  # by status: the colour, where it is not the status's own


def document(alignment: Plan, *, title: str = TITLE) -> str:
    """Write an alignment as an HTML document that loads nothing from elsewhere.

    Its policy allows the style and the script that it holds and nothing more; keys are data to it and never markup.
    """
    found = totals_of(alignment)
    style, script = _asset("report.css"), _script()
    notes = "".join(f"<li>{escape(escaped(note))}</li>" for note in alignment.notes)
    return _fill(
        _asset("report.html"),
        {
            "policy": "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
            f"style-src '{_digest(style)}'; script-src '{_digest(script)}'",
            "version": escape(version("autoalign")),
            "title": escape(escaped(title)),
            "lead": escape(found.lead),
            "totals": _total(
                "Target tensors filled", [(s.status, s.tensors) for s in found.target], tensors(found.target)
            )
            + _total("Elements filled", [(s.status, s.elements) for s in found.target], elements(found.target))
            + _total("Source tensors used", [(s.status, s.tensors) for s in found.source], tensors(found.source)),
            "notes": f'<ul class="notes" aria-label="Notes">{notes}</ul>' if notes else "",
            "text": escape(plain_text(alignment, width=120)),
            "data": script_safe(page_data(alignment)),
            "css": style,
            "script": script,
        },
    )


def write(alignment: Plan, path: str | os.PathLike[str], *, title: str = TITLE) -> None:
    """Write the document to a file, which is replaced as a whole or left as it was.

    Raises:
        InputError: The path is no place for a file.
    """
    text = document(alignment, title=title)
    try:
        target = Path(path)
        if not target.parent.is_dir():
            raise InputError(
                f"The report cannot be written to {str(target)!r}: there is no folder {str(target.parent)!r}. "
                "Nothing was written. Make the folder first, or give another path."
            )
        if target.is_dir():
            raise InputError(
                f"The report cannot be written to {str(target)!r}, which is a folder. Nothing was written. "
                "Give the path of a file in it."
            )
        replace_text(target, text)
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"The report cannot be written to {str(path)!r}: {getattr(error, 'strerror', None) or error}. "
            "What was there is unchanged. Give a path that can be written to."
        ) from error


def script_safe(value: object) -> str:
    r"""Write a value as JSON that ends no script element and holds nothing but ASCII.

    >>> script_safe("</script>")
    '"\\u003c/script\\u003e"'
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _total(name: str, parts: Sequence[tuple[str, int]], whole: int) -> str:
    good = sum(count for status, count in parts if status in FILLED or status == "used")
    rects, x = "", 0.0
    for status, count in parts:
        width = 100 * count / whole if whole else 0
        rects += f'<rect class="k-{_KIND.get(status, status)}" x="{x:.3f}" width="{width:.3f}" height="10"/>'
        x += width
    described = ", ".join(f"{status} {count:,}" for status, count in parts)
    return (
        f'<div class="total"><div class="figures"><strong>{escape(percent(good, whole))}</strong>'
        f'<span class="name">{name}: {_short(good, whole)} of {_short(whole)}</span></div>'
        f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{described}">'
        f"<title>{described}</title>{rects}</svg></div>"
    )


def _short(count: int, of: int = 0) -> str:
    """Write a count in a few characters, without its unit if that is the unit of what follows.

    >>> _short(45_395), _short(671_026_419_200), _short(56_000_000_000, 671_026_419_200)
    ('45,395', '671.0 billion', '56.0')
    """
    for unit, name in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if count >= unit:
            return f"{count // (unit // 10) / 10:,}" + ("" if of // unit in range(1, 1000) else f" {name}")
    return f"{count:,}"


def _fill(template: str, values: dict[str, str]) -> str:
    """Put values into a template; what looks like a place in a value is left alone."""
    start, *parts = template.split("{{")
    filled = [start]
    for part in parts:
        name, rest = part.split("}}", 1)
        filled += [values[name], rest]
    return "".join(filled)


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _asset(name: str) -> str:
    return files("autoalign.html").joinpath("page", name).read_text(encoding="utf-8")


@cache
def _script() -> str:
    parts = "\n".join(_asset(f"{name}.js") for name in _SCRIPTS)
    return f'"use strict";\n(() => {{\n{parts}}})();\n'
