r"""A rule: patterns, replacements with arithmetic on captured numbers, and operations.

A replacement is text with references to what its pattern captured: ``\1``, or arithmetic on captured numbers in braces,
written as Python does: ``stages.{\1 - 1}.blocks.{\2 // 2}``, or ``{(0, 0, 1)[\1]}`` where only a table tells. ``n`` is
the number of a slice or of a list's member. A backslash before a brace or a backslash takes it literally.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from math import prod
from typing import TYPE_CHECKING, Any

from autoalign.errors import InputError, PatternError
from autoalign.plan import serialization as serial
from autoalign.plan.matches import Match
from autoalign.plan.operations import Copy, InsertZeros, Operation, Shape, chain, output_shapes, steps_of
from autoalign.plan.patterns import compiled
from autoalign.rules.size_free import Pick, Portion, at, exact, slice_count

if TYPE_CHECKING:
    pass
_MOST_ZEROS = 16  # times the elements of all sources
_SHOWN_TEXT = 200  # characters of what was wrong
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
    tied: bool = False  # whether the targets are one tensor of the model, so that filling the first is enough

    def operation(self, place: int) -> Operation:
        """What fills a target."""
        return self.operations[place] if self.operations else Copy()

    @property
    def fills(self) -> list[tuple[str, Operation]]:
        """Each target with the operation that fills it."""
        return [(target, self.operation(place)) for place, target in enumerate(self.targets)]

    @property
    def renames(self) -> bool:
        """Whether the rule does no more than give a tensor a new name, or drop it."""
        return (
            len(self.sources) == 1 and (len(self.targets) < 2 or self.tied) and not any(map(_changes, self.operations))
        )

    @property
    def has_arithmetic(self) -> bool:
        """Whether a new name holds a number that is computed."""
        tokens = (token for target in self.targets for token in tokens_of(target))
        return any(isinstance(token, Arithmetic) and not token.is_plain for token in tokens)

    def __str__(self) -> str:
        return " -> ".join(self.sides)

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


@dataclass(frozen=True, slots=True)
class _Instance:
    """The keys that one rule takes together."""

    captured: tuple[str | None, ...]
    rest: str  # of the keys, beyond the patterns
    keys: list[dict[int, str]]  # for each pattern the keys by their places in a list; -1 outside of lists


def _made(rule: Rule, instance: _Instance, shapes: Mapping[str, Shape]) -> list[Match]:
    lacking = [source for source, keys in zip(rule.sources, instance.keys, strict=True) if not keys]
    if lacking:
        raise InputError(f"there is no {', '.join(lacking)} beside it")
    members = sorted(instance.keys[0])
    if any(sorted(keys) != members for keys in instance.keys) or members not in ([-1], list(range(len(members)))):
        raise InputError("the members of a list are not complete")
    sources = tuple(keys[member] for member in members for keys in instance.keys)
    result = []
    for target, operation in rule.fills:
        picked = sources
        first, *rest = steps_of(operation) or (operation,)
        if isinstance(first, Pick):
            picked, operation = tuple(sources[p] for p in first.places), chain(*rest)
        own = [shapes[key] for key in picked]
        count = slice_count(operation, own)
        for index in [None] if count is None else range(count):
            sliced = operation if index is None else at(operation, index)
            name = expand(target, instance.captured, index) + instance.rest
            result.append(Match(name, picked, _tried(exact(sliced, own), tuple(own))))
    return result


@lru_cache(maxsize=4096)
def _tried(operation: Operation, shapes: tuple[Shape, ...]) -> Operation:
    """Give an operation back if it takes tensors of these shapes and makes one of them; else torch says why not."""
    if not _changes(operation) and len(shapes) == 1:
        return operation
    if _zeros(operation) > _MOST_ZEROS * sum(map(prod, shapes)):
        raise InputError(f"'{operation}' makes many times more zeros than there are elements")
    if not operation.adapts and len(output_shapes(operation, shapes)) != 1:
        raise InputError(f"'{operation}' does not make one tensor of {len(shapes)}")
    return operation


def _zeros(operation: Operation) -> int:
    """Count the elements that an operation makes of nothing."""
    own = prod(operation.shape) if isinstance(operation, InsertZeros) else 0
    return own + sum(map(_zeros, operation.parts))


def equal_parts(operations: Sequence[Operation]) -> Portion | None:
    """Give the first of operations that take all equal parts of a tensor, in order; else None."""
    first = operations[0]
    if not isinstance(first, Portion):
        return None
    parts = [Portion(first.dim, place, 1, len(operations)) for place in range(len(operations))]
    return first if list(operations) == parts else None


def _braced(texts: Sequence[str]) -> str:
    """Write several texts as one, with what differs in braces.

    >>> _braced(["a.q.w", "a.k.w"])
    'a.{q, k}.w'
    """
    if len(texts) < 2:
        return "".join(texts)
    start = _shared(texts)
    end = min(_shared([text[::-1] for text in texts]), min(map(len, texts)) - start)
    middles = [text[start : len(text) - end] for text in texts]
    return f"{texts[0][:start]}{{{', '.join(middles)}}}{texts[0][len(texts[0]) - end :]}"


def _shared(texts: Sequence[str]) -> int:
    """Count the characters with which all texts begin."""
    return sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False)))


def _changes(operation: Operation) -> bool:
    return not isinstance(operation, Copy)


def _check(rule: Rule) -> None:
    named = f"The rule {rule.sources!r} -> {rule.targets!r}"[:_SHOWN_TEXT]
    if not all(isinstance(part, tuple) for part in (rule.sources, rule.targets, rule.operations)) or not all(
        isinstance(pattern, str) for pattern in (*rule.sources, *rule.targets)
    ):
        raise PatternError(f"{named} must have tuples of patterns, of replacements and of operations.")
    if not rule.sources or (rule.operations and len(rule.operations) != len(rule.targets)):
        raise PatternError(f"{named} needs a pattern, and as many operations as targets or none.")
    for operation in rule.operations:
        try:
            serial.check_operation(operation)
        except TypeError as error:
            raise PatternError(f"{named} has an operation that is malformed: {error}.") from error
    groups = set()
    for source in rule.sources:
        pattern = compiled(source)
        if set(pattern.groupindex) - {SLICE} or _REFERENCE.search(source.replace(r"\\", "")):
            raise PatternError(
                f"{source!r} has named groups, references or flags, which the patterns of rules cannot have."
            )
        groups.add(pattern.groups)
    for target in rule.targets:
        used = {
            group
            for token in tokens_of(target)
            for group in ((token,) if isinstance(token, int) else token.groups if isinstance(token, Arithmetic) else ())
        }
        if len(groups) > 1 or max(used, default=0) > max(groups):
            raise PatternError(f"The replacement {target!r} refers to what {', '.join(rule.sources)} does not capture.")


def _rule_from_plain(data: Mapping[str, Any]) -> Rule:
    tied = data.get("tied", False)
    if not isinstance(tied, bool):
        raise TypeError("tied is neither true nor false")
    operations = tuple(map(serial.from_plain, serial.items(data.get("operations", []))))
    return Rule(serial.texts(data["sources"]), serial.texts(data["targets"]), operations, tied=tied)


# A longer number, or one with a leading zero, is text: it could not be written back from its value.
NUMBER = re.compile(r"(?<![0-9])(0|[1-9][0-9]{0,8})(?![0-9])")
NUMBERED = re.compile(r"(.*?)(0|[1-9][0-9]{0,8})([^0-9]*)", re.DOTALL)  # a name with one; its last
_TOKEN = re.compile(r"\\([1-9][0-9]{0,5})|\{([^{}]*)\}|\\([\\{}])|([^\\{]+)", re.DOTALL)
REFERENCE = re.compile(r"\\([1-9][0-9]{0,5})")
SLICE = "n"
_DIGITS = 18  # of a captured number
_LARGEST = 10**_DIGITS
_DEEPEST = 64  # operators in each other
_SHOWN_CHARACTERS = 60  # characters of what is malformed

_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """A number that is computed from captured ones."""

    text: str  # as it stands in braces
    tree: ast.expr  # with names g1, g2, ... for what was captured

    @property
    def groups(self) -> tuple[int, ...]:
        """The captures that it reads."""
        return tuple(sorted({int(group) for group in REFERENCE.findall(self.text)}))

    @property
    def is_plain(self) -> bool:
        """Whether it is one capture as it is."""
        return isinstance(self.tree, ast.Name)

    def value(self, captured: Mapping[str, int]) -> int:
        """Compute it; every result is a number that may stand in a key."""
        result = _evaluate(self.tree, captured)
        if result < 0:
            raise InputError(f"{{{self.text}}} gives {result}")
        return result


Token = str | int | Arithmetic  # text, the number of a capture, or arithmetic on captures


@lru_cache(maxsize=4096)
def tokens_of(replacement: str) -> tuple[Token, ...]:
    r"""Read a replacement.

    >>> tokens_of(r"stages.\1.x")
    ('stages.', 1, '.x')

    Raises:
        PatternError: It is malformed.
    """
    tokens: list[Token] = []
    place = 0
    while place < len(replacement):
        found = _TOKEN.match(replacement, place)
        if found is None:
            raise PatternError(f"The replacement {replacement!r} is malformed at {replacement[place:]!r}.")
        group, expression, escaped, text = found.groups()
        if group:
            tokens.append(int(group))
        elif expression is not None:
            tokens.append(_arithmetic(expression))
        elif tokens and isinstance(tokens[-1], str):
            tokens[-1] += escaped or text
        else:
            tokens.append(escaped or text)
        place = found.end()
    return tuple(tokens)


def literal(text: str) -> str:
    """Write text so that a replacement takes it as it is."""
    return re.sub(r"[\\{}]", lambda found: "\\" + found[0], text)


def reference(group: int, following: str = "") -> str:
    r"""Write a reference to a capture, which must not run into a digit that follows.

    >>> reference(1, "0")
    '{\\1}'
    """
    return f"{{\\{group}}}" if following[:1].isdigit() else f"\\{group}"


def shifted(base: str, by: int) -> str:
    r"""Write a capture plus a number.

    >>> shifted(r"\1", -2)
    '\\1 - 2'
    """
    return base if not by else f"{base} {'+' if by > 0 else '-'} {abs(by)}"


def expand(replacement: str, captured: tuple[str | None, ...], index: int | None = None) -> str:
    r"""Fill a replacement with what was captured.

    >>> expand(r"stages.{\1 - 1}.\2", ("3", "attn"))
    'stages.2.attn'

    Raises:
        InputError: A number is outside what the arithmetic holds for.
    """
    parts = []
    for token in tokens_of(replacement):
        if isinstance(token, str):
            parts.append(token)
        elif isinstance(token, int):
            parts.append(captured[token - 1] or "")
        else:
            numbers = {f"g{group}": number_of(captured[group - 1] or "0") for group in token.groups}
            if index is not None:
                numbers[SLICE] = index
            parts.append(str(token.value(numbers)))
    return "".join(parts)


def number_of(digits: str) -> int:
    """Read a captured number.

    Raises:
        InputError: It is not one, or longer than arithmetic is done on.
    """
    if len(digits) > _DIGITS or not digits.isdecimal():
        raise InputError(f"{digits[:_SHOWN_CHARACTERS]!r} is not a number of at most {_DIGITS} digits")
    return int(digits)


def _arithmetic(text: str) -> Arithmetic:
    shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
    try:
        tree = ast.parse(REFERENCE.sub(r"g\1", text), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # of which the last two are of what is too deep
        raise PatternError(f"{{{shown}}} is not arithmetic on captured numbers.") from None
    level, depth = [tree], 0
    while level:
        level, depth = [child for node in level for child in ast.iter_child_nodes(node)], depth + 1  # type: ignore[misc]
    if depth > _DEEPEST:
        raise PatternError(f"{{{shown}}} is longer than arithmetic on captured numbers may be.")
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            known = type(node.value) is int
        elif isinstance(node, ast.Name):
            known = node.id == SLICE or re.fullmatch("g[0-9]+", node.id) is not None
        else:
            known = isinstance(node, (ast.BinOp, ast.Tuple, ast.Subscript, ast.Load, *_OPERATORS))
        if not known:
            raise PatternError(f"{{{shown}}} is not arithmetic on captured numbers.")
    return Arithmetic(text, tree)


def _evaluate(node: ast.expr, captured: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name):
            if name not in captured:
                raise InputError(f"{name} is not captured")
            return captured[name]
        case ast.BinOp(left=left, op=sign, right=right):
            try:
                result = _OPERATORS[type(sign)](_evaluate(left, captured), _evaluate(right, captured))
            except ZeroDivisionError:
                raise InputError("a division by zero") from None
            if abs(result) > _LARGEST:
                raise InputError(f"a number over {_LARGEST}")
            return result
        case ast.Subscript(value=ast.Tuple(elts=items), slice=index):
            place = _evaluate(index, captured)
            if not 0 <= place < len(items):
                raise InputError(f"the table of {len(items)} numbers has no place {place}")
            return _evaluate(items[place], captured)
    raise InputError(f"{ast.unparse(node)} is no number")
