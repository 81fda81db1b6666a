"""Reports: an alignment as plain text that fits a screen for a model of any size, and as the text of errors."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from math import floor

from autoalign.alignment import Alignment, Match
from autoalign.folding import fold
from autoalign.leftovers import counterparts, difference, nearest, reason
from autoalign.specs import TensorSpec

SCREEN = 40  # lines

_COMPONENT = r"(?:[^.{}]|\{[^}]*\})*\."  # of a key, whose lists in braces may hold dots
_BLOCK = re.compile(rf"(?:{_COMPONENT})*?(?=[^.]*[0-9]){_COMPONENT}")
_MESSAGE_WIDTH = 160  # characters; what shows an error message wraps it


@dataclass(frozen=True, slots=True)
class _Row:
    """One or more tensors of a report, folded."""

    keys: tuple[str, ...]  # the source's and the target's, or the only one
    cells: tuple[str, ...]  # what is said of them
    tensors: int
    warnings: tuple[str, ...] = ()
    indent: str = "  "
    heading: str = ""  # a line above the first row of a group


def render(alignment: Alignment, *, width: int = 100, limit: int | None = SCREEN) -> str:
    """Write an alignment as plain text: totals, what was matched how, and what was not and why.

    Rows of repeated blocks and of siblings are folded where all that is said of them agrees; of their confidences the
    lowest is shown. Control characters in keys are escaped. The text depends on nothing but the alignment.

    Args:
        alignment: What to report.
        width: Characters of a line; a key that is longer is shortened in its middle.
        limit: Lines to aim at; sections that are too long for it are cut, and say so. None writes every row.
    """
    sections = {
        "Matched: source -> target, tensors x shape, lowest confidence, operation": _matched_rows(alignment),
        "Mismatched: the counterpart has another shape": _mismatched_rows(alignment),
        "Ambiguous: proposed, but not loaded": _ambiguous_rows(alignment),
        "Missing: not filled": _missing_rows(alignment),
        "Unexpected: in the source and not used": _unexpected_rows(alignment),
    }
    sections = {title: _under_headings(rows) for title, rows in sections.items() if rows}
    tables = {title: _lay_out(rows, width) for title, rows in sections.items()}
    lines = _totals(alignment)
    for note in alignment.notes:
        lines += textwrap.wrap(f"Note: {_escaped(note)}", width, subsequent_indent="  ")
    sizes = [sum(map(len, table)) for table in tables.values()]
    budgets = sizes if limit is None else _share(sizes, limit - len(lines) - 2 * len(tables))
    for (title, table), budget in zip(tables.items(), budgets, strict=True):
        lines += ["", title, *_cut(sections[title], table, budget, "autoalign.report.render(alignment, limit=None)")]
    return "\n".join(lines)


def incomplete_message(alignment: Alignment) -> str:
    """Name the keys of either side that are left, why and with the nearest counterparts, and the next step."""
    missing, unexpected = len(alignment.missing_keys), len(alignment.unexpected_keys)
    lines = []
    if missing:
        lines.append(
            f"{missing} of {len(alignment.target_specs)} target tensors {_have(missing)} no compatible source."
        )
        lines += _listed([*_mismatched_rows(alignment), *_ambiguous_rows(alignment), *_missing_rows(alignment)])
    if unexpected:
        lines.append(f"{unexpected} of {len(alignment.source_specs)} source tensors {_have(unexpected)} no use.")
        lines += _listed(_unexpected_rows(alignment))
    lines.append("Pass rules= to name counterparts, if there are any.")
    return "\n".join(lines)


def ambiguous_message(alignment: Alignment) -> str:
    """Name the target keys for which no source is clearly right, with the proposals, and the next step."""
    count, first = len(alignment.ambiguous), alignment.ambiguous[0]
    return "\n".join(
        [
            f"{count} of {len(alignment.target_specs)} target tensors {_have(count)} no clear source.",
            *_listed(_ambiguous_rows(alignment)),
            f"They are not loaded. Name the sources, as in rules=[({first.sources[0]!r}, {first.target!r})].",
        ]
    )


def _have(count: int) -> str:
    return "has" if count == 1 else "have"


def _totals(alignment: Alignment) -> list[str]:
    source, target = _specs(alignment)
    keys: dict[str, list[str]] = {"matched": [], "mismatched": [], "ambiguous": [], "missing": []}
    for key, status in alignment.status.items():
        keys[status].append(key)
    unexpected = alignment.unexpected_keys
    lines = [
        f"{len(alignment.matches):,} of {len(target):,} target tensors are filled from "
        f"{len(source) - len(unexpected):,} of {len(source):,} source tensors.",
        f"{'':<10}{'tensors':>10}{'elements':>20}",
    ]
    for title, members in keys.items():
        if members or title == "matched":
            lines.append(_total(title, members, target) + " of the target")
    if unexpected:
        lines.append(_total("unexpected", unexpected, source) + " of the source")
    excluded = len(alignment.excluded)
    if excluded:
        lines.append(f"excluded, of the missing and unexpected: {excluded:,}")
    return lines


def _total(title: str, keys: Sequence[str], specs: dict[str, TensorSpec]) -> str:
    elements, whole = sum(specs[key].numel for key in keys), sum(spec.numel for spec in specs.values())
    return f"{title:<10}{len(keys):>10,}{elements:>20,}{_percent(elements, whole):>9}"


def _percent(part: int, whole: int) -> str:
    """Write a share, rounded down, so that 100 % means all.

    >>> _percent(9999, 10000), _percent(1, 10**6), _percent(0, 0)
    ('99.9 %', '< 0.1 %', '-')
    """
    if not whole:
        return "-"
    tenths = floor(1000 * part / whole)
    return "< 0.1 %" if part and not tenths else f"{tenths / 10:.1f} %"


def _matched_rows(alignment: Alignment) -> list[_Row]:
    specs = _specs(alignment)
    entries = [((_escaped(m.target), _folded(m.sources)), _agreeing(m, *specs)) for m in alignment.matches]
    rows = []
    for row in fold(entries):
        matches = [alignment.matches[member] for member in row.members]
        (target, sources), (shape, operation) = row.texts, _described(matches[0], *specs)
        keys = (target,) if sources == target else (sources, target)
        lowest = min(match.confidence for match in matches)
        cells = (_times(matches), shape, f"{lowest:.2f}", operation)
        rows.append(_Row(keys, cells, len(matches), tuple(map(_escaped, matches[0].warnings))))
    return rows


def _ambiguous_rows(alignment: Alignment) -> list[_Row]:
    specs = _specs(alignment)
    entries = []
    for match in alignment.ambiguous:
        rivals = [_folded(rival.sources) for rival in match.alternatives[:1] if rival.sources != match.sources]
        entries.append(((_escaped(match.target), _folded(match.sources), *rivals), _agreeing(match, *specs)))
    rows = []
    for row in fold(entries):
        matches = [alignment.ambiguous[member] for member in row.members]
        (target, sources, *rivals), (shape, operation) = row.texts, _described(matches[0], *specs)
        lowest = min(match.confidence for match in matches)
        others = [str(other.operation) for other in matches[0].alternatives[:1]]
        why = f"rival: {rivals[0]}" if rivals else f"or {others[0]}" if others else "below min_confidence"
        verdict = f"{operation}, confidence {lowest:.2f}, {why}"
        cells = (_times(matches), shape, verdict)
        rows.append(_Row((sources, target), cells, len(matches), tuple(map(_escaped, matches[0].warnings))))
    return rows


def _mismatched_rows(alignment: Alignment) -> list[_Row]:
    _, target = _specs(alignment)
    entries = [
        ((_escaped(item.key), _escaped(item.source_key)), (item.shape, item.source_shape, target[item.key].dtype))
        for item in alignment.mismatched
    ]
    rows = []
    for row in fold(entries):
        item, (key, source_key) = alignment.mismatched[row.members[0]], row.texts
        verdict = f"nearest: {source_key} {list(item.source_shape)}{difference(item.source_shape, item.shape)}"
        rows.append(_Row((key,), (_times(row.members), _kind(target[item.key]), verdict), len(row.members)))
    return rows


def _missing_rows(alignment: Alignment) -> list[_Row]:
    specs = [spec for spec in alignment.target_specs if alignment.status[spec.key] == "missing"]
    if not specs:
        return []
    others = counterparts(alignment, "source")
    rows = []
    for row in fold([((_escaped(spec.key),), (spec.shape, spec.dtype, reason(spec, others))) for spec in specs]):
        first = specs[row.members[0]]
        why = [_escaped(reason(first, others))]
        if near := nearest(first, others):
            why.append(f"nearest: {_escaped(near.key)} {list(near.shape)}{difference(near.shape, first.shape)}")
        rows.append(_Row(row.texts, (_times(row.members), _kind(first), "; ".join(why)), len(row.members)))
    return rows


def _unexpected_rows(alignment: Alignment) -> list[_Row]:
    unused = set(alignment.unexpected_keys)
    specs = [spec for spec in alignment.source_specs if spec.key in unused]
    if not specs:
        return []
    others = counterparts(alignment, "target")
    related = {key: ("proposed for", match.target) for match in alignment.ambiguous for key in match.sources}
    related |= {item.source_key: ("of another shape than", item.key) for item in alignment.mismatched}
    entries = []
    for spec in specs:
        why, *target = related.get(spec.key, (reason(spec, others),))
        entries.append(((_escaped(spec.key), *map(_escaped, target)), (spec.shape, spec.dtype, why)))
    rows = []
    for row in fold(entries):
        (key, *target), first, (_, _, why) = row.texts, specs[row.members[0]], row.fields
        verdict = " ".join([_escaped(why), *target])
        if not target and (near := nearest(first, others)):
            verdict += f"; nearest: {_escaped(near.key)} {list(near.shape)}"
        rows.append(_Row((key,), (_times(row.members), _kind(first), verdict), len(row.members)))
    return rows


def _specs(alignment: Alignment) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    source = {spec.key: spec for spec in alignment.source_specs}
    return source, {spec.key: spec for spec in alignment.target_specs}


def _agreeing(match: Match, source: dict[str, TensorSpec], target: dict[str, TensorSpec]) -> Hashable:
    """Collect what must agree for two matches to be folded."""
    spec, origin = target[match.target], source[match.sources[0]]
    rivals = tuple(rival.operation for rival in match.alternatives[:1] if rival.sources == match.sources)
    return spec.shape, spec.dtype, origin.shape, origin.dtype, match.operation, rivals, match.warnings


def _described(match: Match, source: dict[str, TensorSpec], target: dict[str, TensorSpec]) -> tuple[str, str]:
    """Write the shape that a match fills, and by what operation from what."""
    spec, origin = target[match.target], source[match.sources[0]]
    operation = str(match.operation)
    if len(match.sources) == 1 and origin.shape != spec.shape:
        operation += f" of {list(origin.shape)}"
    if origin.dtype != spec.dtype:
        operation += f", {_dtype(origin)} to {_dtype(spec)}"
    return str(list(spec.shape)), operation


def _kind(spec: TensorSpec) -> str:
    return f"{list(spec.shape)} {_dtype(spec)}"


def _dtype(spec: TensorSpec) -> str:
    return str(spec.dtype).removeprefix("torch.")


def _folded(sources: Sequence[str]) -> str:
    if len(sources) == 1:
        return _escaped(sources[0])
    return " + ".join(row.texts[0] for row in fold([((_escaped(key),), None) for key in sources]))


def _times(members: Sequence[object]) -> str:
    return f"{len(members):,} x" if len(members) > 1 else ""


def _escaped(text: str) -> str:
    r"""Write characters that would break or disguise a line as their escapes; different texts stay different.

    >>> print(_escaped("weight\n"))
    weight\n
    """
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(
        char if char.isprintable() and char != "\\" else char.encode("unicode_escape").decode() for char in text
    )


def _under_headings(rows: Sequence[_Row]) -> list[_Row]:
    """Write what the keys of a block have in common once, above the first of its rows."""
    blocks: dict[tuple[str, ...], list[_Row]] = {}
    for position, row in enumerate(rows):
        start = tuple(_block(key) for key in row.keys)
        blocks.setdefault(start if all(start) else (str(position),), []).append(row)
    grouped = []
    for start, members in blocks.items():
        if len(members) == 1:
            grouped += members
            continue
        heading = "  " + " -> ".join(part.removesuffix(".") for part in start)
        for row in members:
            keys = tuple(dict.fromkeys(key.replace(part, "") for key, part in zip(row.keys, start, strict=True)))
            grouped.append(replace(row, keys=keys, indent=" " * 4, heading=heading if row is members[0] else ""))
    return grouped


def _block(text: str) -> str:
    """Find the start of keys up to their first number; empty if they have none in common.

    >>> _block("encoder.layers.{0...11}.fc1.weight + encoder.layers.{0...11}.fc2.weight")
    'encoder.layers.{0...11}.'
    """
    starts = {match[0] if (match := _BLOCK.match(key)) else "" for key in text.split(" + ")}
    return starts.pop() if len(starts) == 1 else ""


def _lay_out(rows: Sequence[_Row], width: int) -> list[list[str]]:
    """Write each row as its lines: one if it fits, with its cells in columns, else two or more."""
    widths = [max(map(len, column)) for column in zip(*(row.cells for row in rows), strict=True)]
    facts = []
    for row in rows:
        aligned = [row.cells[0].rjust(widths[0]), *map(str.ljust, row.cells[1:-1], widths[1:-1])]
        facts.append("  ".join(cell for cell, wide in zip(aligned, widths, strict=False) if wide))
    keys = [row.indent + " -> ".join(row.keys) for row in rows]
    column = max((len(key) for key, fact in zip(keys, facts, strict=True) if len(key + fact) + 8 <= width), default=0)
    return [_write(row, fact, column, width) for row, fact in zip(rows, facts, strict=True)]


def _write(row: _Row, facts: str, column: int, width: int) -> list[str]:
    """Write one row; what does not fit beside its keys stands below them."""
    lines = [_clip(row.heading, width)] if row.heading else []
    *above, key = row.keys
    verdict = row.cells[-1]
    if above and len(row.indent + " -> ".join(row.keys) + facts + verdict) + 4 > width:
        lines += [_clip(row.indent + part, width) for part in above]
        key = f"{row.indent}  -> {key}"
    else:
        key = row.indent + " -> ".join(row.keys)
    room = width - len(key) - 2
    if len(facts) + 2 + len(verdict) <= room:
        lines.append(_aligned(key, f"{facts}  {verdict}", column, width))
    elif len(facts) <= room:
        lines += [_aligned(key, facts.rstrip(), column, width), *_wrapped(verdict, width, " " * 6)]
    else:
        lines += [_clip(key, width), *_wrapped(f"{facts.lstrip()}  {verdict}", width, " " * 6)]
    for warning in row.warnings:
        lines += _wrapped(warning, width, "    ! ")
    return lines


def _aligned(key: str, rest: str, column: int, width: int) -> str:
    return f"{key:<{min(column, width - 2 - len(rest))}}  {rest}"


def _wrapped(text: str, width: int, mark: str) -> list[str]:
    whole = re.sub(r"(?<=,) (?=[0-9])| (?=\[)", "\N{NO-BREAK SPACE}", text)  # a shape stays whole, with its key
    lines = textwrap.wrap(
        whole, width, initial_indent=mark, subsequent_indent=" " * 6, break_long_words=False, break_on_hyphens=False
    )
    return [_clip(line.replace("\N{NO-BREAK SPACE}", " "), width) for line in lines]


def _clip(text: str, width: int) -> str:
    """Shorten a text in its middle.

    >>> _clip("encoder.layers.weight", 9)
    'enco…ight'
    """
    if len(text) <= width:
        return text
    kept = max(width - 1, 2)
    return f"{text[: kept - kept // 2]}…{text[-(kept // 2) :]}"


def _share(sizes: Sequence[int], lines: int) -> list[int]:
    """Share out lines: small sections get what they need, and large ones equal parts of what remains.

    >>> _share([50, 2, 30], 22)
    [10, 2, 10]
    """
    budgets = list(sizes)
    for served, index in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        budgets[index] = min(sizes[index], max(lines, 0) // (len(sizes) - served))
        lines -= budgets[index]
    return budgets


def _cut(rows: Sequence[_Row], table: Sequence[list[str]], budget: int, everything: str) -> list[str]:
    """Keep as many rows as fit, at least one, and say what is left out."""
    if sum(map(len, table)) <= budget:
        return [line for lines in table for line in lines]
    kept = list(table[0])
    count = 1
    while len(kept) + len(table[count]) < budget:
        kept += table[count]
        count += 1
    left = sum(row.tensors for row in rows[count:])
    if left:
        kept.append(f"  ... and {len(rows) - count:,} more rows, of {left:,} tensors: {everything}")
    return kept


def _listed(rows: Sequence[_Row]) -> list[str]:
    return _cut(rows, _lay_out(rows, _MESSAGE_WIDTH), SCREEN // 2, "print the error's attribute `alignment`")
