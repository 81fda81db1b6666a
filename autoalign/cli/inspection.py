"""The commands that only look at checkpoints: ``inspect``, what one holds, and ``diff``, in what two differ."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path

from autoalign.checkpoints.checkpoint import Checkpoint, checkpoint_of
from autoalign.checkpoints.formats.detection import format_of
from autoalign.cli.targets import side_of
from autoalign.cli.terminal import COMPLETE, INCOMPLETE, complain, progress, show, show_json, width
from autoalign.loading.values import Changed, Differences, differences
from autoalign.plan.quantised import describe_schemes
from autoalign.plan.specs import TensorSpec
from autoalign.reports.module_tree import copies_of, prefix_of, render_tree, size_text
from autoalign.reports.rows import Row, escaped, fold, lay_out
from autoalign.reports.text import escape_markdown, markdown_code, markdown_table

_MAX_METADATA_CHARACTERS = 60  # of an entry


@dataclass(frozen=True, slots=True)
class _Facts:
    """A checkpoint as a whole."""

    kind: str  # of a file, by its content
    elements: int
    bytes: int
    dtypes: dict[str, int]  # to the number of tensors, the most frequent first
    container: str
    containers: tuple[str, ...]
    prefix: str
    tensors_with_prefix: int
    copies: tuple[str, ...]
    metadata: dict[str, str]
    notes: tuple[str, ...]


def run_inspect(options: argparse.Namespace) -> int:
    """Show what a checkpoint holds."""
    checkpoint = checkpoint_of(side_of(options.checkpoint), container=options.container)
    facts = _facts_of(checkpoint)
    if options.format == "json":
        listed = [_tensor_json(spec) for spec in checkpoint.specs]
        show_json({"checkpoint": options.checkpoint, **asdict(facts), "tensors": listed})
        return COMPLETE
    tree = render_tree(checkpoint.specs, dtype=next(iter(facts.dtypes), ""), depth=options.depth)
    lines = _fact_lines(facts)
    if options.format == "markdown":
        head = [markdown_code(escaped(options.checkpoint)), "", *(f"- {escape_markdown(line)}" for line in lines)]
        show("\n".join([*head, "", "```text", *tree, "```"]))
    else:
        show("\n".join([escaped(options.checkpoint), *(f"  {line}" for line in lines), "", *tree]))
    return COMPLETE


def _facts_of(checkpoint: Checkpoint) -> _Facts:
    path = Path(checkpoint.path) if checkpoint.path else None
    prefix, count = prefix_of(checkpoint.specs)
    return _Facts(
        kind="model" if path is None else "folder" if path.is_dir() else format_of(path) or "index of shards",
        elements=sum(spec.numel for spec in checkpoint.specs),
        bytes=sum(spec.numel * spec.dtype.itemsize for spec in checkpoint.specs),
        dtypes=dict(Counter(spec.dtype_name for spec in checkpoint.specs).most_common()),
        container=checkpoint.container,
        containers=checkpoint.containers,
        prefix=prefix,
        tensors_with_prefix=count,
        copies=copies_of(checkpoint.specs),
        metadata=dict(checkpoint.metadata),
        notes=(*checkpoint.notes, *(f"{what}." for what in describe_schemes(checkpoint.quantised))),
    )


def _fact_lines(facts: _Facts) -> list[str]:
    count = sum(facts.dtypes.values())
    counted = [f"{times:,} {dtype}" for dtype, times in facts.dtypes.items()] if len(facts.dtypes) > 1 else facts.dtypes
    size = f"{facts.elements:,} elements, {size_text(facts.bytes)}"
    lines = [f"{facts.kind}: {count:,} tensors, {size}, {', '.join(counted)}"]
    if len(facts.containers) > 1 or facts.container:
        names = {name: escaped(name) or "the top level" for name in (facts.container, *facts.containers)}
        taken = names.pop(facts.container)
        lines.append(f"container: {taken}" + (f"; others: {', '.join(names.values())}" if names else ""))
    if facts.prefix:
        which = "all keys" if facts.tensors_with_prefix == count else f"{facts.tensors_with_prefix:,} of {count:,} keys"
        lines.append(f"prefix: {escaped(facts.prefix)} of {which}")
    if facts.copies:
        lines.append(f"copies of one network: {', '.join(map(escaped, facts.copies))}")
    if facts.metadata:
        entries = []
        for key, value in facts.metadata.items():
            text = escaped(value)
            more = "..." if len(text) > _MAX_METADATA_CHARACTERS else ""
            entries.append(f"{escaped(key)}={text[:_MAX_METADATA_CHARACTERS]}{more}")
        lines.append(f"metadata: {', '.join(entries)}")
    return lines + [f"Note: {escaped(note)}" for note in facts.notes]


def _tensor_json(spec: TensorSpec) -> dict[str, object]:
    return {"key": spec.key, "shape": list(spec.shape), "dtype": spec.dtype_name}


def run_diff(options: argparse.Namespace) -> int:
    """Show in what two checkpoints differ under the same keys."""
    first = checkpoint_of(side_of(options.first, values=True), container=options.container)
    second = checkpoint_of(side_of(options.second, values=True), container=options.other_container)
    with progress("Comparing") as report:
        found = differences(first, second, report)
    if not set(first) & set(second):
        complain("note: the two have no key in common; autoalign align shows which of them correspond")
    if options.format == "json":
        show_json({"first": options.first, "second": options.second, **_differences_json(found)})
    else:
        show("\n".join(_difference_lines(found, options.first, options.second, markdown=options.format == "markdown")))
    return COMPLETE if found.none else INCOMPLETE


def _difference_lines(found: Differences, first: str, second: str, *, markdown: bool) -> list[str]:
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
    for row in fold([((escaped(item.key),), (_kinds(item), item.difference is None)) for item in items]):
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


def _kinds(item: Changed) -> str:
    first, second = item.first.kind, item.second.kind
    return first if first == second else f"{first} -> {second}"


def _differences_json(found: Differences) -> dict[str, object]:
    def number(value: float | None) -> float | str | None:  # JSON has no infinity
        return value if value is None or isfinite(value) else str(value)

    return {
        "equal": found.equal,
        "only_first": [_tensor_json(spec) for spec in found.only_first],
        "only_second": [_tensor_json(spec) for spec in found.only_second],
        "changed": [
            {
                "key": item.key,
                "first": _tensor_json(item.first),
                "second": _tensor_json(item.second),
                "difference": number(item.difference),
                "magnitude": number(item.magnitude),
            }
            for item in found.changed
        ],
    }
