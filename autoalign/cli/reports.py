"""What commands show of alignments, rules and differences, as text, Markdown, JSON or HTML."""

from __future__ import annotations

import tempfile
import webbrowser
from collections.abc import Sequence
from inspect import signature
from math import isfinite
from pathlib import Path
from pprint import pformat
from typing import Any

from autoalign.alignment import Alignment
from autoalign.cli.terminal import COMPLETE, INCOMPLETE, show, show_json, width
from autoalign.loading.values import Changed, Differences
from autoalign.plan.specs import TensorSpec
from autoalign.reports.html import document
from autoalign.reports.rows import Row, escaped, fold, lay_out
from autoalign.reports.text import SCREEN, escape_markdown, markdown_code, markdown_table, render_markdown, render_text
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
        page = Path(tempfile.mkdtemp(prefix="autoalign-"), "report.html")
        page.write_text(document(alignment, title=f"{source} -> {target}"), encoding="utf-8")
        webbrowser.open(page.as_uri())
        show("\n".join([str(page), *([verdict] if verdict else [])]))
    elif form == "json":
        data = alignment.to_dict()
        data["source"]["name"], data["target"]["name"] = source, target
        show_json(data | {"remarks": [verdict] if verdict else []})
    elif form == "html":
        show(document(alignment, title=f"{source} -> {target}"), plain=True)
    elif form == "markdown":
        lines = [f"{markdown_code(escaped(source))} → {markdown_code(escaped(target))}", "", render_markdown(alignment)]
        show("\n".join(lines + (["", verdict] if verdict else [])), plain=True)
    else:
        limit = None if everything else SCREEN
        report = render_text(alignment, width=width(), limit=limit, everything="--all", for_shell=True)
        lines = [f"{escaped(source)} -> {escaped(target)}", "", report]
        show("\n".join(lines + (["", verdict] if verdict else [])))
    return code


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


def difference_lines(found: Differences, first: str, second: str, *, markdown: bool) -> list[str]:
    """Write in what two checkpoints differ."""
    same_kind = [item for item in found.changed if item.first.kind == item.second.kind]
    other_kind = [item for item in found.changed if item.first.kind != item.second.kind]
    sections = {
        f"Only in {escaped(first)}": _rows_of_one_side(found.only_first),
        f"Only in {escaped(second)}": _rows_of_one_side(found.only_second),
        "Other shapes or dtypes, and the largest difference of the values": _changed_rows(other_kind),
        "Values that differ, the largest difference, and its share of the largest value": _changed_rows(same_kind),
    }
    lines = [f"Equal: {found.equal:,} tensors"]
    for title, rows in sections.items():
        if not rows:
            continue
        count = sum(row.tensors for row in rows)
        if markdown:
            lines += ["", f"### {escape_markdown(title)} ({count:,})", "", *markdown_table(rows)]
        else:
            lines += ["", f"{title}: {count:,}"]
            lines += [line.rstrip() for row_lines in lay_out(rows, width()) for line in row_lines]
    return lines


def _rows_of_one_side(specs: Sequence[TensorSpec]) -> list[Row]:
    folds = fold([((escaped(spec.key),), spec.kind) for spec in specs])
    return [Row(row.texts, (row.fields,), len(row.members)) for row in folds]


def _changed_rows(items: Sequence[Changed]) -> list[Row]:
    rows = []
    entries = []
    for item in items:
        kinds = " -> ".join(dict.fromkeys((item.first.kind, item.second.kind)))
        entries.append(((escaped(item.key),), (kinds, item.difference is None)))
    for row in fold(entries):
        members = [items[member] for member in row.members]
        most = max(members, key=lambda item: item.difference or 0.0)
        if most.difference is None:
            values = ""
        elif not most.difference:
            values = "equal values"
        else:
            share = f" ({most.difference / most.magnitude:.2g})" if most.magnitude else ""
            where = f" in {escaped(most.key)}" if len(members) > 1 else ""
            values = f"{most.difference:.3g}{share}{where}"
        rows.append(Row(row.texts, (row.fields[0], values), len(members)))
    return rows


def differences_json(found: Differences) -> dict[str, object]:
    """Return in what two checkpoints differ as JSON."""

    def number(value: float | None) -> float | str | None:  # JSON has no infinity
        return value if value is None or isfinite(value) else str(value)

    return {
        "equal": found.equal,
        "only_first": [tensor_json(spec) for spec in found.only_first],
        "only_second": [tensor_json(spec) for spec in found.only_second],
        "changed": [
            {
                "key": item.key,
                "first": tensor_json(item.first),
                "second": tensor_json(item.second),
                "difference": number(item.difference),
                "magnitude": number(item.magnitude),
            }
            for item in found.changed
        ],
    }


def tensor_json(spec: TensorSpec) -> dict[str, object]:
    """Return a tensor's key, shape and dtype."""
    return {"key": spec.key, "shape": list(spec.shape), "dtype": spec.dtype_name}
