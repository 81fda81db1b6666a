"""What ``inspect`` shows of a checkpoint: its format, size, containers, quantisation, adapters and modules."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoalign.checkpoints.checkpoint import Checkpoint
from autoalign.checkpoints.containers import TRAINING_WORDS, name_words
from autoalign.checkpoints.formats.detection import format_of
from autoalign.cli.arguments import in_options
from autoalign.cli.terminal import COMPLETE, show, show_json, terminal_width
from autoalign.plan.adapters import describe_adapters
from autoalign.plan.quantised import describe_schemes
from autoalign.reports.module_tree import copies_of, prefix_of, render_tree, size_text
from autoalign.reports.rows import escape_markdown, escaped, markdown_code, paragraphs

_MAX_METADATA_CHARACTERS = 60  # of an entry
_MAX_LISTED = 8  # parts of the state of a training


def show_checkpoint(checkpoint: Checkpoint, name: str, form: str, *, depth: int | None) -> int:
    """Show what a checkpoint holds."""
    facts = _facts_of(checkpoint)
    if form == "json":
        listed = [{"key": spec.key, "shape": list(spec.shape), "dtype": spec.dtype_name} for spec in checkpoint.specs]
        show_json({"checkpoint": name, **facts, "tensors": listed})
        return COMPLETE
    width = terminal_width() if form == "text" else None
    tree = render_tree(checkpoint.specs, dtype=next(iter(facts["dtypes"]), ""), depth=depth, width=width)
    lines = _fact_lines(facts)
    if form == "markdown":
        head = [markdown_code(escaped(name)), "", *(f"- {escape_markdown(line)}" for line in lines)]
        show("\n".join([*head, "", "```text", *tree, "```"]))
    else:
        facts_shown = [f"  {line}" for line in paragraphs(lines, (width or sys.maxsize) - 2)]
        show("\n".join([escaped(name), *facts_shown, "", *tree]))
    return COMPLETE


def _facts_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Collect what there is to say of a checkpoint as a whole; of its dtypes the most frequent first."""
    path = Path(checkpoint.path) if checkpoint.path else None
    prefix, count = prefix_of(checkpoint.specs)
    return {
        "kind": "model" if path is None else _kind_of(path),
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


def _kind_of(path: Path) -> str:
    if path.is_dir():
        return "folder"
    return (format_of(path) or "index of shards") if path.is_file() else "several files"


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
