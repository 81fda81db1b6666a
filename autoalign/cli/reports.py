"""What commands show of alignments, rules and differences, as text, Markdown, JSON or HTML."""

from __future__ import annotations

import tempfile
import webbrowser
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from pprint import pformat
from typing import Any

from autoalign.alignment import Alignment
from autoalign.cli.arguments import in_options
from autoalign.cli.terminal import COMPLETE, INCOMPLETE, show, show_json, width
from autoalign.loading.diff import Difference
from autoalign.reports.changes import render_changes, render_changes_markdown
from autoalign.reports.html import document
from autoalign.reports.rows import escaped, markdown_code
from autoalign.reports.text import SCREEN, render_markdown, render_text
from autoalign.rules.rules import Rules


def show_alignment(
    alignment: Alignment,
    checkpoint: Sequence[str],
    target: str,
    form: str,
    *,
    verdict: str = "",
    everything: bool = False,
    open_page: bool = False,
) -> int:
    """Write the report of an alignment in the format that was asked for and the verdict below it; return the exit code.

    It is 0 if all of the target is filled that was not left out on purpose.
    """
    source = " ".join(checkpoint)
    code = COMPLETE if set(alignment.missing_keys) <= alignment.excluded else INCOMPLETE
    if open_page:
        page = _opened(document(alignment, title=f"{source} -> {target}"))
        show("\n".join([page, *([verdict] if verdict else [])]))
    elif form == "json":
        data = alignment.to_dict()
        data["source"]["name"], data["target"]["name"] = source, target
        named = {"TARGET": target, "CKPT": source}
        for action in (action for choice in data["choices"] for action in choice["next_actions"]):
            action |= {"command": [named.get(part, part) for part in action["command"]]} if "command" in action else {}
        show_json(data | {"remarks": [verdict] if verdict else []})
    elif form == "html":
        show(document(alignment, title=f"{source} -> {target}"), plain=True)
    elif form == "markdown":
        lines = [f"{markdown_code(escaped(source))} → {markdown_code(escaped(target))}", "", render_markdown(alignment)]
        show("\n".join(lines + (["", verdict] if verdict else [])), plain=True)
    else:
        limit = None if everything else SCREEN
        report = render_text(alignment, width=width(), limit=limit, everything="--all", for_shell=True)
        lines = [f"{escaped(source)} -> {escaped(target)}", "", in_options(report)]
        show("\n".join(lines + (["", verdict] if verdict else [])))
    return code


def _opened(text: str) -> str:
    """Show a page in a browser, and return the path of its file."""
    page = Path(tempfile.mkdtemp(prefix="autoalign-"), "report.html")
    page.write_text(text, encoding="utf-8")
    webbrowser.open(page.as_uri())
    return str(page)


def rules_text(rules: Rules, form: str, name: str) -> str:
    """Write rules in one of the forms of the command ``rules``."""
    match form:
        case "json":
            return rules.to_json()
        case "python":
            return rules.to_python(name).rstrip("\n")
        case "key_mapping":
            return pformat(rules.to_key_mapping(), width=100, sort_dicts=False)
        case "revise_keys":
            return pformat(rules.to_revise_keys(), width=100)
        case "transformers":
            return conversions_source(rules.to_transformers())
        case _:
            return str(rules)


def conversions_source(conversions: Sequence[Any]) -> str:
    """Write conversions of transformers as the Python that makes them, which their repr is not."""
    lines, names = [], set()
    for conversion in conversions:
        operations = getattr(conversion, "operations", [])
        arguments = []
        for name in ("source_patterns", "target_patterns"):
            patterns = list(getattr(conversion, f"_original_{name}", None) or getattr(conversion, name))
            arguments.append(repr(patterns[0] if len(patterns) == 1 else patterns))
        if operations:
            arguments.append(f"operations=[{', '.join(map(_call_source, operations))}]")
        names |= {type(part).__name__ for part in (conversion, *operations)}
        lines.append(f"    {type(conversion).__name__}({', '.join(arguments)}),")
    imported = f"from transformers.core_model_loading import {', '.join(sorted(names))}\n\n" if names else ""
    return "\n".join([f"{imported}conversions = [", *lines, "]"])


def _call_source(operation: Any) -> str:
    defaults = {name: parameter.default for name, parameter in signature(type(operation)).parameters.items()}
    given = {name: getattr(operation, name) for name in defaults if hasattr(operation, name)}
    shown = [f"{name}={value!r}" for name, value in given.items() if value != defaults[name] or name.startswith("dim")]
    return f"{type(operation).__name__}({', '.join(shown)})"


def show_difference(
    found: Difference, first: str, second: str, form: str, *, everything: bool = False, open_page: bool = False
) -> int:
    """Write in what two checkpoints differ; return the exit code."""
    title, parts = f"{first} -> {second}", (found.alignment, found.changes)
    if open_page:
        show(_opened(document(found.alignment, title=title, changes=found.changes)))
    elif form == "json":
        show_json({"first": first, "second": second, "equal": found.equal, **found.to_dict()})
    elif form == "html":
        show(document(found.alignment, title=title, changes=found.changes), plain=True)
    elif form == "markdown":
        lines = [f"{markdown_code(escaped(first))} → {markdown_code(escaped(second))}", ""]
        show("\n".join([*lines, render_changes_markdown(*parts)]), plain=True)
    else:
        limit = None if everything else SCREEN
        report = render_changes(*parts, width=width(), limit=limit, everything="--all", for_shell=True)
        show("\n".join([escaped(title), "", in_options(report)]))
    return COMPLETE if found.equal else INCOMPLETE
