"""One rule: patterns of keys, the replacements that name their targets, and operations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

from autoalign.errors import InputError, PatternError
from autoalign.plan.keys import common_prefix
from autoalign.plan.matches import Match
from autoalign.plan.operations import Copy, InsertZeros, Operation, Shape, chain, output_shapes, steps_of
from autoalign.plan.patterns import compiled
from autoalign.plan.serialization import Plain, check_operation, from_plain, items, texts, to_plain
from autoalign.rules.replacement import SLICE, Arithmetic, expand, groups_of, tokens_of
from autoalign.rules.size_free import Pick, Portion, at, exact, slice_count

_MAX_ZEROS = 16  # times the elements of all sources
_MAX_SHOWN = 200  # characters of a rule in an error
_REFERENCE = re.compile(r"\\[1-9]|\(\?P=|\(\?\(|^\(\?[a-zA-Z]+\)")


@dataclass(frozen=True, slots=True)
class Rule:
    r"""What becomes of the keys that some patterns match.

    >>> print(Rule((r"^layers\.(\d+)\.attn\.",), (r"encoder.blocks.\1.attention.",)))
    ^layers\.(\d+)\.attn\. -> encoder.blocks.\1.attention.
    """

    sources: tuple[str, ...]  # patterns; several for tensors that are joined, (?P<n>\d+) for a list that is joined
    targets: tuple[str, ...] = ()  # replacements; several for a tensor that is split; none: the tensor is dropped
    operations: tuple[Operation, ...] = ()  # for each target; none: copies
    tied: bool = False  # True if the targets are one tensor of the model, so that filling the first is enough

    def operation(self, place: int) -> Operation:
        """Return the operation that fills a target."""
        return self.operations[place] if self.operations else Copy()

    @property
    def fills(self) -> list[tuple[str, Operation]]:
        """Each target with the operation that fills it."""
        return [(target, self.operation(place)) for place, target in enumerate(self.targets)]

    @property
    def renames(self) -> bool:
        """True if the rule only gives a tensor a new name, or drops it."""
        return (
            len(self.sources) == 1 and (len(self.targets) < 2 or self.tied) and not any(map(_changes, self.operations))
        )

    @property
    def has_arithmetic(self) -> bool:
        """True if a new name holds a number that is computed."""
        tokens = (token for target in self.targets for token in tokens_of(target))
        return any(isinstance(token, Arithmetic) and not token.is_plain for token in tokens)

    @property
    def sides(self) -> tuple[str, str]:
        """The two sides as a person reads them."""
        sources = _braced(self.sources)
        if not self.targets:
            return sources, "(dropped)"
        operations = [operation for _, operation in self.fills]
        if len(set(operations)) == 1:
            note = f"   {operations[0]}" if _changes(operations[0]) else "   (tied)" if self.tied else ""
            return sources, (_braced(self.targets) or '""') + note
        if parts := equal_parts(operations):
            return sources, f"{_braced(self.targets)}   {len(operations)} equal parts (dim {parts.dim})"
        return sources, ", ".join(
            f"{target} = {operation}" if _changes(operation) else target for target, operation in self.fills
        )

    def __str__(self) -> str:
        return " -> ".join(self.sides)


@dataclass(frozen=True, slots=True)
class KeyGroup:
    """The keys that one rule takes together."""

    captured: tuple[str | None, ...]
    rest: str  # of the keys, after the patterns
    keys: list[dict[int, str]]  # for each pattern the keys by their places in a list; -1 outside of lists


def matches_of(rule: Rule, group: KeyGroup, shapes: Mapping[str, Shape]) -> list[Match]:
    """List the tensors that a rule makes of the keys that it takes together.

    Raises:
        InputError: A part is missing, or a size does not fit.
    """
    missing = [source for source, keys in zip(rule.sources, group.keys, strict=True) if not keys]
    if missing:
        raise InputError(f"there is no {', '.join(missing)} beside it")
    members = sorted(group.keys[0])
    if any(sorted(keys) != members for keys in group.keys) or members not in ([-1], list(range(len(members)))):
        raise InputError("the members of a list are not complete")
    sources = tuple(keys[member] for member in members for keys in group.keys)
    result = []
    for target, operation in rule.fills:
        picked = sources
        first, *rest = steps_of(operation) or (operation,)
        if isinstance(first, Pick):
            picked, operation = tuple(sources[place] for place in first.places), chain(*rest)
        own = [shapes[key] for key in picked]
        count = slice_count(operation, own)
        for index in [None] if count is None else range(count):
            sliced = operation if index is None else at(operation, index)
            name = expand(target, group.captured, index) + group.rest
            result.append(Match(name, picked, _checked(exact(sliced, own), tuple(own))))
    return result


@lru_cache(maxsize=4096)
def _checked(operation: Operation, shapes: tuple[Shape, ...]) -> Operation:
    """Return an operation if it makes one tensor of those of these shapes; else torch raises the reason."""
    if not _changes(operation) and len(shapes) == 1:
        return operation
    if _zeros(operation) > _MAX_ZEROS * sum(map(prod, shapes)):
        raise InputError(f"'{operation}' makes many times more zeros than there are elements")
    if not operation.adapts and len(output_shapes(operation, shapes)) != 1:
        raise InputError(f"'{operation}' does not make one tensor of {len(shapes)}")
    return operation


def _zeros(operation: Operation) -> int:
    """Count the zeros that an operation makes."""
    own = prod(operation.shape) if isinstance(operation, InsertZeros) else 0
    return own + sum(map(_zeros, operation.parts))


def equal_parts(operations: Sequence[Operation]) -> Portion | None:
    """Return the first of operations that take all equal parts of a tensor, in order; else None."""
    first = operations[0]
    if not isinstance(first, Portion):
        return None
    parts = [Portion(first.dim, place, 1, len(operations)) for place in range(len(operations))]
    return first if list(operations) == parts else None


def check_rule(rule: Rule) -> None:
    """Raise a PatternError unless a rule is well-formed."""
    named = f"The rule {rule.sources!r} -> {rule.targets!r}"[:_MAX_SHOWN]
    if not all(isinstance(part, tuple) for part in (rule.sources, rule.targets, rule.operations)) or not all(
        isinstance(pattern, str) for pattern in (*rule.sources, *rule.targets)
    ):
        raise PatternError(f"{named} must have tuples of patterns, of replacements and of operations.")
    if not rule.sources or (rule.operations and len(rule.operations) != len(rule.targets)):
        raise PatternError(f"{named} needs a pattern, and as many operations as targets or none.")
    for operation in rule.operations:
        try:
            check_operation(operation)
        except TypeError as error:
            raise PatternError(f"{named} has a malformed operation: {error}.") from error
    counts = set()
    for source in rule.sources:
        pattern = compiled(source)
        if set(pattern.groupindex) - {SLICE} or _REFERENCE.search(source.replace(r"\\", "")):
            raise PatternError(
                f"{source!r} has named groups, references or flags, which the patterns of rules cannot have."
            )
        counts.add(pattern.groups)
    for target in rule.targets:
        used = {group for token in tokens_of(target) for group in groups_of(token)}
        if len(counts) > 1 or max(used, default=0) > max(counts):
            raise PatternError(f"The replacement {target!r} refers to what {', '.join(rule.sources)} does not capture.")


def rule_to_plain(rule: Rule) -> Plain:
    """Write a rule as plain data."""
    data: Plain = {"sources": list(rule.sources), "targets": list(rule.targets)}
    if rule.operations:
        data["operations"] = list(map(to_plain, rule.operations))
    return data | ({"tied": True} if rule.tied else {})


def rule_from_plain(data: Mapping[str, Any]) -> Rule:
    """Read a rule from plain data."""
    tied = data.get("tied", False)
    if not isinstance(tied, bool):
        raise TypeError("tied is neither true nor false")
    operations = tuple(map(from_plain, items(data.get("operations", []))))
    return Rule(texts(data["sources"]), texts(data["targets"]), operations, tied=tied)


def _braced(names: Sequence[str]) -> str:
    """Write several names as one, with what differs in braces.

    >>> _braced(["a.q.w", "a.k.w"])
    'a.{q, k}.w'
    """
    if len(names) < 2:
        return "".join(names)
    start = common_prefix(names)
    rests = [name[len(start) :] for name in names]
    end = common_prefix(rest[::-1] for rest in rests)[::-1]
    return f"{start}{{{', '.join(rest[: len(rest) - len(end)] for rest in rests)}}}{end}"


def _changes(operation: Operation) -> bool:
    return not isinstance(operation, Copy)
