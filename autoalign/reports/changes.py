"""Changes: how far corresponding tensors of two checkpoints are apart, folded by blocks, as text and JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from autoalign.plan.matches import Plan
from autoalign.plan.specs import TensorSpec
from autoalign.reports.rows import Row, escape_markdown, escaped, fold, key_block, paragraphs, render_sections
from autoalign.reports.text import markdown_sections, rows_of

Verdict = Literal["equal", "close", "changed"]
VERDICTS: tuple[Verdict, ...] = ("equal", "close", "changed")  # the worst last
_MAX_NAMED = 3  # blocks in the first line
_MAX_PARENTS = 2  # modules of the first side that a block is made of


@dataclass(frozen=True, slots=True)
class Change:
    """How far one tensor of the second checkpoint is from what corresponds to it in the first."""

    target: str  # its key
    sources: tuple[str, ...]  # keys of the first
    verdict: Verdict  # equal bit for bit, close within the tolerance, or changed
    elements: int
    mean: float = 0.0  # mean |second - first| as a share of mean |first|
    largest: float = 0.0  # largest |second - first| as a share of the largest |first|; inf with any one-sided value
    one_sided: int = 0  # elements that are NaN or infinite in one of the two only


@dataclass(frozen=True, slots=True)
class Block:
    """The changes in one block of a network, such as ``layers.10``, or in one module outside of blocks."""

    first: str
    second: str
    changes: tuple[Change, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst of its tensors'."""
        return max((change.verdict for change in self.changes), key=VERDICTS.index)

    @property
    def mean(self) -> float:
        """The mean of its tensors' mean changes, each weighed by its elements."""
        return sum(each.mean * each.elements for each in self.changes) / max(sum(c.elements for c in self.changes), 1)

    @property
    def largest(self) -> float:
        """The largest of its tensors' largest changes."""
        return max(change.largest for change in self.changes)


def blocks_of(changes: Iterable[Change]) -> list[Block]:
    """Group changes by the block of the second checkpoint that they are in, in its order.

    >>> changes = [Change(f"h.{i}.fc.bias", (f"layers.{i}.bias",), "changed", 2, i / 10) for i in range(2)]
    >>> [(block.first, block.second, block.mean) for block in blocks_of(changes)]
    [('layers.0', 'h.0', 0.0), ('layers.1', 'h.1', 0.1)]
    """
    groups: dict[str, list[Change]] = {}
    for change in changes:
        groups.setdefault(key_block(change.target), []).append(change)
    return [Block(_parents(group), second, tuple(group)) for second, group in groups.items()]


def _parents(changes: Sequence[Change]) -> str:
    names = list(dict.fromkeys(key_block(key) for change in changes for key in change.sources))
    return " + ".join(names[:_MAX_PARENTS]) + (" + ..." if len(names) > _MAX_PARENTS else "")


def _folded(blocks: Sequence[Block]) -> list[Block]:
    """Join neighbouring blocks of one verdict whose mean changes are alike."""
    entries = [((escaped(b.second), escaped(b.first)), (b.verdict, f"{b.mean:.0e}")) for b in blocks]
    return [
        Block(first, second, tuple(change for member in row.members for change in blocks[member].changes))
        for row in fold(entries)
        for second, first in [row.texts]
    ]


def share(value: float) -> str:
    """Write a relative change.

    >>> [share(value) for value in (0.0312, 1.124, 2e-7, 0.0, float("inf"))]
    ['3.1 %', '112 %', '< 0.001 %', '0 %', 'not finite']
    """
    if not isfinite(value):
        return "not finite"
    percent = 100 * value
    if 0 < percent < 0.001:
        return "< 0.001 %"
    return f"{percent:,.0f} %" if percent >= 99.5 else f"{percent:.2g} %"


def left_of(alignment: Plan) -> dict[str, list[TensorSpec]]:
    """List what was not compared, but for what was excluded, by why."""
    proposed = {key for match in alignment.ambiguous for key in match.sources}
    proposed |= {item.source_key for item in alignment.mismatched}
    unused = set(alignment.unexpected_keys) - alignment.excluded - proposed
    found: dict[str, list[TensorSpec]] = {"ambiguous": [], "mismatched": [], "only_first": [], "only_second": []}
    found["only_first"] += (spec for spec in alignment.source_specs if spec.key in unused)
    for spec in alignment.target_specs:
        status = alignment.status[spec.key]
        if status in ("ambiguous", "mismatched", "missing") and spec.key not in alignment.excluded:
            found["only_second" if status == "missing" else status].append(spec)
    return found


def headline(alignment: Plan, changes: Sequence[Change]) -> str:
    """Write in a line what is equal, what changed most, and what was not compared."""
    counts = {verdict: sum(change.verdict == verdict for change in changes) for verdict in VERDICTS}
    parts = [f"{count:,} {verdict}" for verdict, count in counts.items() if count] or ["nothing to compare"]
    moved = sorted((b for b in _folded(blocks_of(changes)) if b.verdict == "changed"), key=lambda b: -b.mean)
    if moved:
        named = [f"{block.second} by {share(block.mean)}" for block in moved[:_MAX_NAMED]]
        rest = len(moved) - _MAX_NAMED
        parts[-1] += f" ({', '.join(named)}{f', {rest} more' if rest > 0 else ''})"
    words = ("ambiguous", "of other shapes", "only in the first", "only in the second")
    parts += [f"{len(specs):,} {word}" for word, specs in zip(words, left_of(alignment).values(), strict=True) if specs]
    return ", ".join(parts + ([f"{len(alignment.excluded):,} excluded"] if alignment.excluded else []))


def change_rows(alignment: Plan, changes: Sequence[Change], *, for_shell: bool = False) -> dict[str, list[Row]]:
    """List the folded rows of each section of a comparison, by its title; a section may have none."""
    found: dict[Verdict, list[Row]] = {verdict: [] for verdict in VERDICTS}
    for block in _folded(blocks_of(changes)):
        found[block.verdict].append(_row(block))
    left = {title.partition(":")[0]: rows for title, rows in rows_of(alignment, for_shell=for_shell).items()}
    specs = left_of(alignment)
    return {
        "Changed: first -> second, tensors, mean change / mean value, largest change / largest value": found["changed"],
        "Close: as near as rounding leaves them": found["close"],
        "Ambiguous: not compared, since nothing says clearly what corresponds": left["Ambiguous"],
        "Of other shapes: not compared": left["Mismatched"],
        "Only in the first": _rows_of(specs["only_first"]),
        "Only in the second": _rows_of(specs["only_second"]),
        "Equal: bit for bit": found["equal"],
    }


def _row(block: Block) -> Row:
    keys = tuple(dict.fromkeys((block.first, block.second)))
    changed = sum(change.verdict == "changed" for change in block.changes)
    odd = sum(change.one_sided for change in block.changes)
    rest = [f"largest {share(block.largest)}"]
    if 0 < changed < len(block.changes):
        rest.append(f"{changed:,} changed")
    if odd:
        rest.append(f"{odd:,} values are NaN or infinite on one side only")
    facts = ("",) if block.verdict == "equal" else (f"mean {share(block.mean)}", "; ".join(rest))
    return Row(keys, facts, len(block.changes))


def _rows_of(specs: Sequence[TensorSpec]) -> list[Row]:
    folds = fold([((escaped(spec.key),), spec.kind) for spec in specs])
    return [Row(row.texts, (row.fields,), len(row.members)) for row in folds]


def render_changes(
    alignment: Plan,
    changes: Sequence[Change],
    *,
    width: int,
    limit: int | None,
    everything: str = "print(difference.render(limit=None))",
    for_shell: bool = False,
) -> str:
    """Write a comparison as plain text, as ``render_text`` does an alignment."""
    head = [headline(alignment, changes), *(f"Note: {escaped(note)}" for note in alignment.notes)]
    found = change_rows(alignment, changes, for_shell=for_shell)
    return render_sections(paragraphs(head, width), found, width, limit, everything)


def render_changes_markdown(alignment: Plan, changes: Sequence[Change]) -> str:
    """Write a comparison as Markdown."""
    texts = [headline(alignment, changes), "", *(f"- {escaped(note)}" for note in alignment.notes)]
    return markdown_sections(list(map(escape_markdown, texts)), change_rows(alignment, changes))


def changes_to_plain(alignment: Plan, changes: Sequence[Change]) -> dict[str, Any]:
    """Write a comparison as plain data, as JSON has it; what is not finite is a text, since JSON has no such number."""

    def number(value: float) -> float | str:
        return value if isfinite(value) else str(value)

    def measured(of: Block | Change) -> dict[str, Any]:
        return {"verdict": of.verdict, "mean": number(of.mean), "largest": number(of.largest)}

    left = left_of(alignment)
    sources = {match.target: list(match.sources) for match in alignment.ambiguous}
    sources |= {item.key: [item.source_key] for item in alignment.mismatched}
    return {
        "summary": headline(alignment, changes),
        "counts": {verdict: sum(change.verdict == verdict for change in changes) for verdict in VERDICTS},
        "blocks": [
            {"first": b.first, "second": b.second, "tensors": len(b.changes), **measured(b)} for b in blocks_of(changes)
        ],
        "tensors": [
            {"second": c.target, "first": list(c.sources), **measured(c), "one_sided": c.one_sided} for c in changes
        ],
        **{
            name: [
                {"key": spec.key, "shape": list(spec.shape), "dtype": spec.dtype_name}
                | ({"first": sources[spec.key]} if name in ("ambiguous", "mismatched") else {})
                for spec in specs
            ]
            for name, specs in left.items()
        },
        "excluded": sorted(alignment.excluded),
        "notes": list(alignment.notes),
    }
