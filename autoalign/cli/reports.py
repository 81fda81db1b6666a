"""What commands show of alignments, rules, differences and checkpoints, as text, Markdown, JSON or HTML."""

from __future__ import annotations

import re
import sys
import tempfile
import webbrowser
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from pprint import pformat
from typing import Any

from autoalign.alignment import Alignment
from autoalign.checkpoints.checkpoint import Checkpoint
from autoalign.checkpoints.containers import TRAINING_WORDS, name_words
from autoalign.checkpoints.formats.detection import kind_of_folder
from autoalign.cli.arguments import in_options
from autoalign.cli.terminal import COMPLETE, INCOMPLETE, show, show_json, terminal_width, width
from autoalign.loading.diff import Difference
from autoalign.plan.adapters import describe_adapters
from autoalign.plan.quantised import describe_schemes
from autoalign.reports.changes import Change, render_changes, render_changes_markdown
from autoalign.reports.html import document
from autoalign.reports.module_tree import copies_of, prefix_of, render_tree, size_text
from autoalign.reports.rows import escape_markdown, escaped, markdown_code, paragraphs
from autoalign.reports.text import SCREEN, render_markdown, render_text
from autoalign.rules.rules import Rules

_MAX_METADATA_CHARACTERS = 60  # of an entry
_MAX_LISTED = 8  # parts of the state of a training


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

    def data() -> dict[str, Any]:
        plain = alignment.to_dict()
        plain["source"]["name"], plain["target"]["name"] = source, target
        for choice in plain["choices"]:
            name_sides(choice, source, target)
        return plain | {"remarks": [verdict] if verdict else []}

    _show(alignment, None, (source, target), form, data, verdict, everything=everything, open_page=open_page)
    return COMPLETE if set(alignment.missing_keys) <= alignment.excluded else INCOMPLETE


def name_sides(choice: Mapping[str, Any], source: str, target: str) -> None:
    """Write both sides into the commands of what to do about a choice."""
    named = {"TARGET": target, "CKPT": source}
    for action in choice["next_actions"]:
        action |= {"command": [named.get(part, part) for part in action["command"]]} if "command" in action else {}


def show_difference(
    found: Difference, first: str, second: str, form: str, *, everything: bool = False, open_page: bool = False
) -> int:
    """Write in what two checkpoints differ; return the exit code."""

    def data() -> dict[str, Any]:
        return {"first": first, "second": second, "equal": found.equal, **found.to_dict()}

    names = first, second
    _show(found.alignment, found.changes, names, form, data, everything=everything, open_page=open_page)
    return COMPLETE if found.equal else INCOMPLETE


def _show(
    alignment: Alignment,
    changes: Sequence[Change] | None,
    names: tuple[str, str],
    form: str,
    data: Callable[[], dict[str, Any]],
    verdict: str = "",
    *,
    everything: bool,
    open_page: bool,
) -> None:
    """Write a report under the names of both sides and above a verdict; ``data`` returns it for JSON."""
    title, below = " -> ".join(names), [verdict] if verdict else []
    if open_page:
        page = Path(tempfile.mkdtemp(prefix="autoalign-"), "report.html")
        page.write_text(document(alignment, title=title, changes=changes), encoding="utf-8")
        webbrowser.open(page.as_uri())
        show("\n".join([str(page), *below]))
    elif form == "json":
        show_json(data())
    elif form == "html":
        show(document(alignment, title=title, changes=changes), plain=True)
    elif form == "markdown":
        head = " → ".join(markdown_code(escaped(name)) for name in names)
        report = render_markdown(alignment) if changes is None else render_changes_markdown(alignment, changes)
        show("\n\n".join([head, report, *below]), plain=True)
    else:
        write = render_text if changes is None else partial(render_changes, changes=changes)
        limit = None if everything else SCREEN
        report = write(alignment, width=width(), limit=limit, everything="--all", for_shell=True)
        show("\n\n".join([escaped(title), in_options(report), *below]))


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
            text, room = str(rules), terminal_width()
            if room is None or max(map(len, text.splitlines())) <= room:
                return text
            return re.sub(r"(?m) +-> ", "\n  -> ", text)


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


def show_checkpoint(checkpoint: Checkpoint, name: str, form: str, *, depth: int | None) -> int:
    """Show what a checkpoint holds."""
    facts = _facts_of(checkpoint)
    if form == "json":
        listed = [{"key": spec.key, "shape": list(spec.shape), "dtype": spec.dtype_name} for spec in checkpoint.specs]
        show_json({"checkpoint": name, **facts, "tensors": listed})
        return COMPLETE
    room = terminal_width() if form == "text" else None
    tree = render_tree(checkpoint.specs, dtype=next(iter(facts["dtypes"]), ""), depth=depth, width=room)
    lines = _fact_lines(facts)
    if form == "markdown":
        head = [markdown_code(escaped(name)), "", *(f"- {escape_markdown(line)}" for line in lines)]
        show("\n".join([*head, "", "```text", *tree, "```"]))
    else:
        facts_shown = [f"  {line}" for line in paragraphs(lines, (room or sys.maxsize) - 2)]
        show("\n".join([escaped(name), *facts_shown, "", *tree]))
    return COMPLETE


def _facts_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Collect what there is to say of a checkpoint as a whole; of its dtypes the most frequent first."""
    prefix, count = prefix_of(checkpoint.specs)
    return {
        "kind": _kind_of(checkpoint),
        "elements": sum(spec.numel for spec in checkpoint.specs),
        "bytes": sum(spec.numel * spec.dtype.itemsize for spec in checkpoint.specs),
        "dtypes": dict(Counter(spec.dtype_name for spec in checkpoint.specs).most_common()),
        "container": checkpoint.container,
        "containers": checkpoint.containers,
        "prefix": prefix,
        "tensors_with_prefix": count,
        "copies": copies_of(checkpoint.specs),
        "quantised": describe_schemes(checkpoint.quantised),
        "adapters": describe_adapters(checkpoint.specs),
        "training": _training_of(checkpoint.root or {}),
        "metadata": dict(checkpoint.metadata),
        "notes": checkpoint.notes,
    }


def _training_of(root: Mapping[str, object]) -> list[str]:
    """List what a file holds of the state of a training: optimizers and the like, and single numbers."""
    found = []
    for name, value in root.items():
        if not isinstance(name, str) or "." in name:  # a key
            continue
        if name_words(name) & TRAINING_WORDS:
            found.append(name)
        elif isinstance(value, int | float):
            found.append(f"{name}={value}")
    return found[:_MAX_LISTED] + (["..."] if len(found) > _MAX_LISTED else [])


def _kind_of(checkpoint: Checkpoint) -> str:
    if checkpoint.path is None:
        return "model"
    path = Path(checkpoint.path)
    if path.is_dir():
        return kind_of_folder(path)
    return checkpoint.format or ("index of shards" if path.is_file() else "several files")


def _fact_lines(facts: dict[str, Any]) -> list[str]:
    dtypes, containers, prefix = facts["dtypes"], facts["containers"], facts["prefix"]
    count = sum(dtypes.values())
    counted = [f"{times:,} {dtype}" for dtype, times in dtypes.items()] if len(dtypes) > 1 else dtypes
    size = f"{facts['elements']:,} elements, {size_text(facts['bytes'])}"
    lines = [f"{facts['kind']}: {count:,} tensors, {size}, {', '.join(counted)}"]
    if len(containers) > 1 or facts["container"]:
        names = {name: escaped(name) or "the top level" for name in (facts["container"], *containers)}
        taken = names.pop(facts["container"])
        lines.append(f"container: {taken}" + (f"; others: {', '.join(names.values())}" if names else ""))
    if prefix:
        some = facts["tensors_with_prefix"]
        lines.append(f"prefix: {escaped(prefix)} of {'all keys' if some == count else f'{some:,} of {count:,} keys'}")
    parts = ("quantised", "adapters", "training")
    lines += [f"{name}: {', '.join(map(escaped, facts[name]))}" for name in parts if facts[name]]
    if facts["copies"]:
        lines.append(f"copies of one network: {', '.join(map(escaped, facts['copies']))}")
    entries = []
    for key, value in facts["metadata"].items():
        text = escaped(value)
        more = "..." if len(text) > _MAX_METADATA_CHARACTERS else ""
        entries.append(f"{escaped(key)}={text[:_MAX_METADATA_CHARACTERS]}{more}")
    if entries:
        lines.append(f"metadata: {', '.join(entries)}")
    return lines + [f"Note: {in_options(escaped(note))}" for note in facts["notes"]]
