"""``autoalign diff``: what two checkpoints differ in, under the same keys."""

from __future__ import annotations

import argparse
from math import isfinite
from typing import TYPE_CHECKING

from autoalign.cli.options import COMPLETE, INCOMPLETE, Commands, add_format, command

if TYPE_CHECKING:
    from autoalign.loading.diff import Changed, Differences
    from autoalign.plan.specs import TensorSpec


def add(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands,
        "diff",
        "compare two checkpoints key by key",
        "Compare two checkpoints under the same keys: which are in one only, which have another shape or dtype, and "
        "which hold other values, with the largest difference. Tensors are read one by one. To compare under other "
        "keys, convert one of them first.",
        epilog="exit codes: 0 no difference; 1 some difference; 2 an error, said on stderr",
    )
    parser.add_argument("first", metavar="A", help="a checkpoint of any format")
    parser.add_argument("second", metavar="B", help="another")
    parser.add_argument("--container", metavar="NAME", help="which of several state dicts in A to take, such as ema")
    parser.add_argument("--other-container", metavar="NAME", help="which of several in B")
    add_format(parser, ("text", "json", "markdown"))
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    import json

    from autoalign.checkpoints.checkpoint import checkpoint_of
    from autoalign.cli.targets import side_of
    from autoalign.cli.terminal import complain, progress, show
    from autoalign.loading.diff import differences

    first = checkpoint_of(side_of(options.first, values=True), container=options.container)
    second = checkpoint_of(side_of(options.second, values=True), container=options.other_container)
    with progress("Comparing") as report:
        found = differences(first, second, report)
    if not set(first) & set(second):
        complain("note: the two have no key in common; autoalign align shows which of them correspond")
    if options.format == "json":
        show(json.dumps({"first": options.first, "second": options.second, **_as_dict(found)}, indent=2), plain=True)
    else:
        show("\n".join(_lines(found, options.first, options.second, markdown=options.format == "markdown")))
    return COMPLETE if found.none else INCOMPLETE


def _lines(found: Differences, first: str, second: str, *, markdown: bool) -> list[str]:
    from autoalign.cli.terminal import width
    from autoalign.reports.rows import Row, escaped, fold, lay_out
    from autoalign.reports.text import table, words

    def folded(specs: tuple[TensorSpec, ...]) -> list[Row]:
        entries = [((escaped(spec.key),), spec.kind) for spec in specs]
        return [Row(row.texts, (row.fields,), len(row.members)) for row in fold(entries)]

    def compared(items: list[Changed]) -> list[Row]:
        rows = []
        for row in fold([((escaped(item.key),), (_kinds(item), item.difference is None)) for item in items]):
            members = [items[member] for member in row.members]
            most = max(members, key=lambda item: item.difference or 0.0)
            values = "" if most.difference is None else _difference(most)
            where = f" in {escaped(most.key)}" if len(members) > 1 and most.difference else ""
            rows.append(Row(row.texts, (row.fields[0], values + where), len(members)))
        return rows

    same_kind = [item for item in found.changed if item.first.kind == item.second.kind]
    other_kind = [item for item in found.changed if item.first.kind != item.second.kind]
    parts = {
        f"Only in {escaped(first)}": folded(found.only_first),
        f"Only in {escaped(second)}": folded(found.only_second),
        "Other shapes or dtypes, and the largest difference of the values": compared(other_kind),
        "Values that differ, the largest difference, and its share of the largest value": compared(same_kind),
    }
    lines = [f"Equal: {found.equal:,} tensors"]
    for title, rows in parts.items():
        if not rows:
            continue
        count = sum(row.tensors for row in rows)
        if markdown:
            lines += ["", f"### {words(title)} ({count:,})", "", *table(rows)]
        else:
            laid_out = [line.rstrip() for lines_of_row in lay_out(rows, width()) for line in lines_of_row]
            lines += ["", f"{title}: {count:,}", *laid_out]
    return lines


def _kinds(item: Changed) -> str:
    first, second = item.first.kind, item.second.kind
    return first if first == second else f"{first} -> {second}"


def _difference(item: Changed) -> str:
    if not item.difference:
        return "equal values"
    share = f" ({item.difference / item.magnitude:.2g})" if item.magnitude else ""
    return f"{item.difference:.3g}{share}"


def _as_dict(found: Differences) -> dict[str, object]:
    def plain(spec: TensorSpec) -> dict[str, object]:
        return {"key": spec.key, "shape": list(spec.shape), "dtype": spec.dtype_name}

    def number(value: float | None) -> float | str | None:  # JSON has no infinity
        return value if value is None or isfinite(value) else str(value)

    return {
        "equal": found.equal,
        "only_first": [plain(spec) for spec in found.only_first],
        "only_second": [plain(spec) for spec in found.only_second],
        "changed": [
            {
                "key": item.key,
                "first": plain(item.first),
                "second": plain(item.second),
                "difference": number(item.difference),
                "magnitude": number(item.magnitude),
            }
            for item in found.changed
        ],
    }
