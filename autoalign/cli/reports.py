"""Alignments as results of commands, in the format that was asked for."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from autoalign.alignment import Alignment
from autoalign.cli.terminal import show, width
from autoalign.reports.rows import escaped
from autoalign.reports.serialization import as_dict
from autoalign.reports.text import SCREEN, code, plain_text, render_markdown


def show_alignment(alignment: Alignment, options: argparse.Namespace, source: str, target: str, *more: str) -> None:
    """Write the report of an alignment, which ends with the statements in ``more``."""
    if options.format == "json":
        show(
            json.dumps({"source": source, "target": target, **as_dict(alignment), "remarks": more}, indent=2),
            plain=True,
        )
    elif options.format == "markdown":
        lines = [f"{code(escaped(source))} → {code(escaped(target))}", "", render_markdown(alignment)]
        show("\n".join([*lines, *(f"\n{statement}" for statement in more)]), plain=True)
    elif options.format == "html":
        show(_html(alignment, f"{source} -> {target}"), plain=True)
    else:
        limit = None if options.all else SCREEN
        report = plain_text(alignment, width=width(), limit=limit, everything="--all")
        show("\n".join([f"{escaped(source)} -> {escaped(target)}", "", report, *(f"\n{line}" for line in more)]))


def _html(alignment: Alignment, title: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.html")
        alignment.to_html(path, title=title)
        return path.read_text(encoding="utf-8")
