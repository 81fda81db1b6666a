"""Alignments as text and Markdown: totals, folded rows of what is matched and what is not and why, error messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import Literal

from autoalign.errors import AmbiguousAlignmentError, IncompatibleTensorsError, NothingLoadedError, listed
from autoalign.matching.layers import squeeze
from autoalign.plan.adapters import describe_adapters
from autoalign.plan.keys import stem
from autoalign.plan.matches import FILLED, Match, Plan, Status
from autoalign.plan.operations import Shape
from autoalign.plan.quantised import ADVICE, Members
from autoalign.plan.specs import TensorSpec
from autoalign.reports.choices import answers, choices_of, reasons
from autoalign.reports.rows import (
    Row,
    blocks_of,
    escape_markdown,
    escaped,
    fold,
    lay_out,
    markdown_code,
    paragraphs,
    render_sections,
)

SCREEN = 40  # lines
STATUSES: tuple[Status, ...] = ("matched", "adapted", "mismatched", "ambiguous", "missing")  # as of the sections
_NARROW = 64  # characters of a line, in which the columns of numbers stand closer
_MAX_ROWS_OF_CHOICE = 4
_FIRST_KEYS = 5  # that a message names
_SEE_DETAILS = "error.details lists all."
_MESSAGE_WIDTH = 160  # characters; what shows an error message wraps it
_MIN_SIMILARITY = 40.0  # of 100; names that are less similar say nothing about each other


@dataclass(frozen=True, slots=True)
class Share:
    """The tensors of one status, of one side."""

    status: str
    tensors: int
    elements: int


@dataclass(frozen=True, slots=True)
class Totals:
    """How many tensors and elements of either side have which status; those without any are left out."""

    target: tuple[Share, ...]
    source: tuple[Share, ...]  # used and unexpected
    excluded: int  # of both sides

    @property
    def filled(self) -> str:
        """A sentence on what is filled from what."""
        filled = sum(share.tensors for share in self.target if share.status in FILLED)
        used = sum(share.tensors for share in self.source if share.status == "used")
        target, source = (sum(share.tensors for share in shares) for shares in (self.target, self.source))
        return f"{filled:,} of {target:,} target tensors are filled from {used:,} of {source:,} source tensors."

    @property
    def lead(self) -> str:
        """A sentence or two on what is filled from what, and what was excluded."""
        return self.filled + (f" {self.excluded:,} of the others were excluded." if self.excluded else "")


def totals_of(alignment: Plan) -> Totals:
    """Count the tensors and elements of each status."""
    status, unexpected = alignment.status, set(alignment.unexpected_keys)
    target: dict[str, list[int]] = {}
    for spec in alignment.target_specs:
        target.setdefault(status[spec.key], []).append(spec.numel)
    source: dict[str, list[int]] = {}
    for spec in alignment.source_specs:
        source.setdefault("unexpected" if spec.key in unexpected else "used", []).append(spec.numel)
    both = (*alignment.target_specs, *alignment.source_specs)
    excluded = sum(spec.key in alignment.excluded for spec in both)
    return Totals(_shares(STATUSES, target), _shares(("used", "unexpected"), source), excluded)


def elements(shares: Iterable[Share]) -> int:
    """Count the elements of all statuses."""
    return sum(share.elements for share in shares)


def _shares(statuses: Iterable[str], sizes: dict[str, list[int]]) -> tuple[Share, ...]:
    return tuple(Share(status, len(sizes[status]), sum(sizes[status])) for status in statuses if status in sizes)


def percent(part: int, whole: int) -> str:
    """Write a share, rounded down, so that 100 % means all.

    >>> percent(9999, 10000), percent(1, 10**6), percent(0, 0)
    ('99.9 %', '< 0.1 %', '-')
    """
    if not whole:
        return "-"
    tenths = floor(1000 * part / whole)
    return "< 0.1 %" if part and not tenths else f"{tenths / 10:.1f} %"


def short_count(count: int, of: int = 0) -> str:
    """Write a count in a few characters, without its unit if that is the unit of what follows.

    >>> short_count(45_395), short_count(671_026_419_200), short_count(56_000_000_000, 671_026_419_200)
    ('45,395', '671.0 billion', '56.0')
    """
    for unit, name in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if count >= unit:
            return f"{count // (unit // 10) / 10:,}" + ("" if of // unit in range(1, 1000) else f" {name}")
    return f"{count:,}"


def render_text(
    alignment: Plan,
    *,
    width: int = 100,
    limit: int | None = SCREEN,
    everything: str = "print(alignment.render(limit=None))",
    for_shell: bool = False,
) -> str:
    """Write an alignment as plain text; see ``Alignment.render``. Control characters in keys are escaped.

    Lines that say that some rows are left out tell how to get ``everything``; with ``for_shell``, rules are written as
    options of the command line.
    """
    found = rows_of(alignment, most=None if limit is None else _MAX_ROWS_OF_CHOICE, for_shell=for_shell)
    notes = paragraphs((f"Note: {escaped(note)}" for note in notes_of(alignment)), width)
    return render_sections([*_totals(alignment, width), *notes], found, width, limit, everything)


def _totals(alignment: Plan, width: int = 100) -> list[str]:
    found = totals_of(alignment)
    column = 20 if width > _NARROW else 15
    lines = [*paragraphs([found.filled], width), f"{'':<10}{'tensors':>10}{'elements':>{column}}"]
    target = found.target if "matched" in alignment.status.values() else (Share("matched", 0, 0), *found.target)
    for side, shares in (("target", target), ("source", found.source)):
        for share in shares:
            if share.status != "used":
                part = percent(share.elements, elements(shares))
                lines.append(
                    f"{share.status:<10}{share.tensors:>10,}{share.elements:>{column},}{part:>9} of the {side}"
                )
    if found.excluded:
        lines.append(f"excluded, of the missing and unexpected: {found.excluded:,}")
    return lines


def notes_of(alignment: Plan) -> list[str]:
    """List what was verified, and the notes but for those that stand with a choice."""
    said = {text for choice in choices_of(alignment) for text in choice.settled_by}
    verified = alignment.verified
    found = [] if verified is None else [f"Verified: {verified.describe(match.target for match in alignment.matches)}."]
    return found + [note for note in alignment.notes if note not in said]


def rows_of(
    alignment: Plan, *, most: int | None = _MAX_ROWS_OF_CHOICE, for_shell: bool = False
) -> dict[str, list[Row]]:
    """List the folded rows of each section of a report, by its title; a section may have none.

    Of a choice there are ``most`` rows; with ``for_shell``, its rules are options of the command line.
    """
    copied = [match for match in alignment.matches if not match.operation.adapts]
    adapted = [match for match in alignment.matches if match.operation.adapts]
    return {
        "Matched: source -> target, tensors x shape, lowest confidence, operation": _matched_rows(alignment, copied),
        "Adapted: filled with changed values, as the call allows": _matched_rows(alignment, adapted),
        "Mismatched: the counterpart has another shape": _mismatched_rows(alignment),
        "Ambiguous: proposed, but not loaded; to choose": _ambiguous_rows(alignment, most=most, for_shell=for_shell),
        "Missing: not filled": _missing_rows(alignment),
        "Unexpected: in the source and not used": _unexpected_rows(alignment),
    }


def _matched_rows(alignment: Plan, filled: Sequence[Match]) -> list[Row]:
    rows = []
    for target, sources, matches, (shape, operation) in _folded_matches(alignment, filled):
        keys = (target,) if sources == target else (sources, target)
        lowest = min(match.confidence for match in matches)
        facts = (shape, f"{lowest:.2f}", operation)
        rows.append(Row(keys, facts, len(matches), tuple(map(escaped, matches[0].warnings))))
    return rows


def _ambiguous_rows(
    alignment: Plan, *, most: int | None = _MAX_ROWS_OF_CHOICE, both: bool = False, for_shell: bool = False
) -> list[Row]:
    """Write the proposals that were not loaded, choice by choice, ``most`` rows of each; with ``both`` all shapes."""
    by_target = {match.target: match for match in alignment.ambiguous}
    result = []
    for place, choice in enumerate(choices_of(alignment)):
        proposed = [by_target[target] for target in choice.targets]
        rows = []
        for target, sources, matches, (shape, operation) in _folded_matches(alignment, proposed):
            if both:
                shapes = dict.fromkeys(str(list(alignment.sources[key].shape)) for key in matches[0].sources)
                operation = f"{matches[0].operation} of {', '.join(shapes)}"
            lowest = min(match.confidence for match in matches)
            facts = (shape, f"{operation}, confidence {lowest:.2f}")
            rows.append(Row((sources, target), facts, len(matches), choice=place))
        *first, last = [row for members in blocks_of(rows).values() for row in members][:most]
        how = answers(choice, place, for_shell=for_shell)
        if more := len(choice.targets) - sum(row.tensors for row in (*first, last)):
            how.insert(0, f"and {more:,} more: alignment.choices[{place}].targets")
        why = tuple(map(escaped, reasons(choice)))
        result += [*first, replace(last, warnings=why, advice=tuple(how), more=more)]
    return result


def _mismatched_rows(alignment: Plan) -> list[Row]:
    target = alignment.targets
    entries = [
        ((escaped(item.key), escaped(item.source_key)), (item.shape, item.source_shape, target[item.key].dtype))
        for item in alignment.mismatched
    ]
    rows = []
    for row in fold(entries):
        item, (key, source_key) = alignment.mismatched[row.members[0]], row.texts
        verdict = f"nearest: {source_key} {list(item.source_shape)}{difference(item.source_shape, item.shape)}"
        rows.append(Row((key,), (target[item.key].kind, verdict), len(row.members)))
    return rows


def _missing_rows(alignment: Plan) -> list[Row]:
    specs = [spec for spec in alignment.target_specs if alignment.status[spec.key] == "missing"]
    if not specs:
        return []
    others = counterparts(alignment, "source")
    rows = []
    for row in fold([((escaped(spec.key),), (spec.shape, spec.dtype, reason(spec, others))) for spec in specs]):
        first, why = specs[row.members[0]], [escaped(row.fields[2])]
        if near := nearest(first, others):
            why.append(f"nearest: {escaped(near.key)} {list(near.shape)}{difference(near.shape, first.shape)}")
        rows.append(Row(row.texts, (first.kind, "; ".join(why)), len(row.members)))
    return rows


def _unexpected_rows(alignment: Plan, *, both: bool = False) -> list[Row]:
    """Write what the source has and the target does not use, with ``both`` the shapes of counterparts too."""
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
        entries.append(((escaped(spec.key), *map(escaped, target)), (spec.shape, spec.dtype, why)))
    rows = []
    for row in fold(entries):
        (key, *target), first, (_, _, why) = row.texts, specs[row.members[0]], row.fields
        verdict = " ".join([escaped(why), *target])
        if both and target:
            verdict += f" {list(alignment.targets[related[first.key][1]].shape)}"
        if not target and (near := nearest(first, others)):
            verdict += f"; nearest: {escaped(near.key)} {list(near.shape)}"
        rows.append(Row((key,), (first.kind, verdict), len(row.members)))
    return rows


def _folded_matches(
    alignment: Plan, matches: Sequence[Match]
) -> Iterator[tuple[str, str, list[Match], tuple[str, str]]]:
    """Yield the folded targets and sources of matches, these matches, and their shape and operation in words."""
    source, target = alignment.sources, alignment.targets
    entries = []
    for match in matches:
        spec, origin = target[match.target], source[match.sources[0]]
        agreeing = spec.shape, spec.dtype, origin.shape, origin.dtype, match.operation, match.warnings
        entries.append(((escaped(match.target), _folded(match.sources)), agreeing))
    for row in fold(entries):
        first = matches[row.members[0]]
        spec, origin = target[first.target], source[first.sources[0]]
        operation = str(first.operation)
        if len(first.sources) == 1 and origin.shape != spec.shape:
            operation += f" of {list(origin.shape)}"
        if origin.dtype != spec.dtype:
            operation += f", {origin.dtype_name} to {spec.dtype_name}"
        keys, sources = row.texts
        yield keys, sources, [matches[member] for member in row.members], (str(list(spec.shape)), operation)


def _folded(sources: Sequence[str]) -> str:
    if len(sources) == 1:
        return escaped(sources[0])
    return " + ".join(row.texts[0] for row in fold([((escaped(key),), None) for key in dict.fromkeys(sources)]))


def _listed(rows: Sequence[Row]) -> list[str]:
    return [line for lines in lay_out(rows, _MESSAGE_WIDTH) for line in lines] if rows else []


@dataclass(frozen=True, slots=True)
class Counterparts:
    """What one side of an alignment has for a key that is left on the other side."""

    side: Literal["source", "target"]
    excluded: frozenset[str]
    own_codes: Members  # the quantised tensors of the side that has the key
    codes: Members  # those of this side
    uses: dict[str, str]  # from each key that is used to what it is used for, in words
    by_shape: dict[Shape, dict[str, list[str]]]  # keys by shape without dimensions of one, and by what became of them
    free: dict[str, list[TensorSpec]]  # what is not used, by key without numbers


def counterparts(alignment: Plan, side: Literal["source", "target"]) -> Counterparts:
    """Collect what one side has for the keys that are left on the other side."""
    uses: dict[str, str] = {}
    for match in alignment.matches:
        if side == "target":
            how = "adapted" if match.operation.adapts else "filled"
            uses[match.target] = f"{how} from {' + '.join(match.sources)}"
        else:
            for key in match.sources:
                uses.setdefault(key, f"{'adapted' if match.operation.adapts else 'used'} for {match.target}")
    own_codes, codes = alignment.quantised if side == "target" else reversed(alignment.quantised)
    by_shape: dict[Shape, dict[str, list[str]]] = {}
    free: dict[str, list[TensorSpec]] = {}
    for spec in alignment.source_specs if side == "source" else alignment.target_specs:
        if spec.key in uses:
            kind = "used"
        elif spec.key in codes:
            kind = "quantised"
        elif spec.key in alignment.excluded:
            kind = "excluded"
        else:
            kind = "free"
            free.setdefault(stem(spec.key), []).append(spec)
        by_shape.setdefault(squeeze(spec.shape), {}).setdefault(kind, []).append(spec.key)
    return Counterparts(side, alignment.excluded, own_codes, codes, uses, by_shape, free)


def reason(spec: TensorSpec, others: Counterparts) -> str:
    """Return why a tensor is left, given the other side: the same for all of one shape that are not excluded."""
    if spec.key in others.excluded:
        return "excluded"
    if member := others.own_codes.get(spec.key):
        return f"quantised as {member.group.scheme}, and its elements are not values"
    if member := others.codes.get(spec.key):
        return f"the {others.side}'s is quantised as {member.group.scheme}"
    keys = others.by_shape.get(squeeze(spec.shape))
    if keys is None:
        return f"no {others.side} tensor of this shape"
    if free := keys.get("free"):
        have = f"unused {others.side} tensor{' has' if len(free) == 1 else 's have'} this shape"
        return f"ambiguous: {len(free)} {have}"
    if used := keys.get("used"):
        if len(used) == 1:
            return f"the only {others.side} tensor of this shape, {used[0]}, is {others.uses[used[0]]}"
        return f"all {len(used)} {others.side} tensors of this shape have other counterparts"
    return f"the {others.side} tensors of this shape are {'quantised' if 'quantised' in keys else 'excluded'}"


def nearest(spec: TensorSpec, others: Counterparts) -> TensorSpec | None:
    """Find the free tensor of the other side with the most similar name, unless none is similar.

    An excluded tensor and a quantised one have none.
    """
    if spec.key in others.excluded or spec.key in others.own_codes:
        return None
    from rapidfuzz import process
    from rapidfuzz.fuzz import ratio

    # First among kinds of blocks, then among the blocks: names are compared as often as there are kinds.
    found = process.extractOne(stem(spec.key), list(others.free), scorer=ratio, score_cutoff=_MIN_SIMILARITY)
    if found is None:
        return None
    block = others.free[found[0]]
    _, _, position = process.extractOne(spec.key, [other.key for other in block], scorer=ratio)
    return block[position]


def difference(shape: Shape, needed: Shape) -> str:
    """Describe in which dimension a shape differs from what is needed; empty unless it is one of several.

    >>> difference((1000, 512), (10, 512))
    ' (dim 0: 1000, needs 10)'
    """
    differing = [dim for dim, sizes in enumerate(zip(shape, needed, strict=False)) if sizes[0] != sizes[1]]
    if len(shape) != len(needed) or len(shape) == 1 or len(differing) != 1:
        return ""
    (dim,) = differing
    return f" (dim {dim}: {shape[dim]}, needs {needed[dim]})"


def incomplete_error(alignment: Plan, *, missing: bool = True, unexpected: bool = True) -> IncompatibleTensorsError:
    """Name the keys that are missing and unexpected; the details are all of them, with reasons."""
    what, details = [], []
    lost, left = alignment.missing_keys, alignment.unexpected_keys
    if missing and lost:
        have = "has" if len(lost) == 1 else "have"
        count = f"{len(lost)} of {len(alignment.target_specs)} target tensors {have} no compatible source"
        what.append(f"{count}: {_first(lost)}.")
        rows = [*_mismatched_rows(alignment), *_ambiguous_rows(alignment, both=True), *_missing_rows(alignment)]
        details += [f"{count}:", *_listed(rows)]
    if unexpected and left:
        are = "is" if len(left) == 1 else "are"
        count = f"{len(left)} of {len(alignment.source_specs)} source tensors {are} not used"
        what.append(f"{count}: {_first(left)}.")
        details += [f"{count}:", *_listed(_unexpected_rows(alignment, both=True))]
    if left_out := alignment.unused_schemes:
        what.append(f"Left out: {', '.join(left_out)}. {ADVICE}")
    advice = f"Pass rules= to name counterparts, if there are any. {_SEE_DETAILS}"
    return IncompatibleTensorsError(f"{' '.join(what)}\n{advice}", alignment, "\n".join(details))


def ambiguous_error(alignment: Plan) -> AmbiguousAlignmentError:
    """Name the target keys that have no clear source; the details are the proposals."""
    keys = [match.target for match in alignment.ambiguous]
    have = "has" if len(keys) == 1 else "have"
    count = f"{len(keys)} of {len(alignment.target_specs)} target tensors {have} no clear source"
    advice = f"Pass rules of what you choose, or load with the alignment that decided returns. {_SEE_DETAILS}"
    details = "\n".join([f"{count}:", *_listed(_ambiguous_rows(alignment, both=True))])
    return AmbiguousAlignmentError(f"{count}: {_first(keys)}. They are not loaded.\n{advice}", alignment, details)


def nothing_error(alignment: Plan) -> NothingLoadedError:
    """Report that nothing is matched; the details are the first keys of both sides."""
    details = []
    for side, specs in (("target", alignment.target_specs), ("source", alignment.source_specs)):
        rows = [Row((escaped(spec.key),), (spec.kind,), 1) for spec in specs[:_FIRST_KEYS]]
        details += [f"The first of the {len(specs)} {side} tensors:", *_listed(rows)] if rows else []
    what = " ".join([f"None of {len(alignment.target_specs)} target tensors has a source.", *alignment.notes])
    if not (alignment.unused_schemes or describe_adapters(alignment.source_specs)):
        what += "\nCheck that both are the same network, or pass what is known as rules=."
    return NothingLoadedError(what, alignment, "\n".join(details))


def _first(keys: Sequence[str]) -> str:
    return listed([escaped(key) for key in keys[: _FIRST_KEYS + 1]], _FIRST_KEYS)


def render_markdown(alignment: Plan) -> str:
    """Write an alignment as Markdown: totals, notes, and a table of the folded rows of each kind."""
    notes = [f"- {escape_markdown(escaped(note))}" for note in notes_of(alignment)]
    return markdown_sections(["```text", *_totals(alignment), "```", *notes], rows_of(alignment, most=None))


def markdown_sections(head: Sequence[str], found: Mapping[str, Sequence[Row]]) -> str:
    """Write a report as Markdown: the lines of its head, and a table for each section that has rows."""
    lines = list(head)
    for title, rows in found.items():
        if rows:
            name, _, meaning = title.partition(": ")
            lines += ["", f"### {name}", "", f"{meaning}:" if meaning else "", "", *markdown_table(rows)]
    return "\n".join(lines)


def markdown_table(rows: Sequence[Row]) -> list[str]:
    """Write rows as the lines of a table."""
    between = len(rows[0].cells)
    lines = [f"| keys |{' |' * between}", f"| --- |{' --- |' * between}"]
    for row in rows:
        cells = [" → ".join(map(markdown_code, row.keys)), *map(escape_markdown, row.cells)]
        cells[-1] += "".join(f"<br>⚠ {escape_markdown(warning)}" for warning in row.warnings)
        cells[-1] += "".join(f"<br>{escape_markdown(line)}" for line in row.advice)
        lines.append(f"| {' | '.join(cells)} |")
    return lines
