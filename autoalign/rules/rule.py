r"""One rule: patterns of keys, the replacements that name their targets, and operations.

In a replacement ``\1`` is a capture, and braces hold arithmetic on captured numbers, written as Python does:
``stages.{\1 - 1}.blocks.{\2 // 2}``, or a table, ``{(0, 0, 1)[\1]}``. ``n`` is the number of a slice or of a list's
member. A backslash before a brace or a backslash takes it literally. ``fitted`` finds the arithmetic: ``blocks.7``
becomes ``layers.7`` (as it is), ``stages.0`` was ``layer1`` (an offset), a flat list meets a nested one (quotient and
remainder, or a table where stages are uneven). It is exact on all numbers seen, or there is none.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

from autoalign.errors import InputError, PatternError
from autoalign.plan.keys import common_prefix, compiled
from autoalign.plan.matches import Match
from autoalign.plan.operations import Copy, InsertZeros, Operation, Shape, chain, output_shapes, steps_of
from autoalign.plan.serialization import Plain, check_operation, from_plain, items, texts, to_plain
from autoalign.rules.size_free import Pick, Portion, at, exact, slice_count

_MAX_ZEROS = 16  # times the elements of all sources
_MAX_SHOWN = 200  # characters of a rule in an error
_UNUSABLE = re.compile(r"\\[1-9]|\(\?P=|\(\?\(|^\(\?[a-zA-Z]+\)")  # references and flags
REFERENCE = re.compile(r"\\([1-9][0-9]{0,5})")
SLICE = "n"  # the name of the number of a slice, or of a list's member
_TOKEN = re.compile(r"\\([1-9][0-9]{0,5})|\{([^{}]*)\}|\\([\\{}])|([^\\{]+)", re.DOTALL)
_MAX_DIGITS = 18  # of a captured number
_MAX_NUMBER = 10**_MAX_DIGITS
_MAX_DEPTH = 64  # of operators in each other
_MAX_QUOTED = 60  # characters of malformed arithmetic
_MIN_NUMBERS = 3  # distinct ones before more than an offset is fitted
_MAX_UNIT = 64  # of a quotient or remainder
_NODES = (ast.BinOp, ast.UnaryOp, ast.USub, ast.Tuple, ast.Subscript, ast.Load)
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

    text: str  # between the braces
    tree: ast.expr  # with names g1, g2, ... for the captures

    @property
    def groups(self) -> tuple[int, ...]:
        """The captures that it reads."""
        return tuple(sorted({int(group) for group in REFERENCE.findall(self.text)}))

    @property
    def is_plain(self) -> bool:
        """True if it is one capture, unchanged."""
        return isinstance(self.tree, ast.Name)

    def value(self, captured: Mapping[str, int]) -> int:
        """Compute the number, which must be one that may stand in a key."""
        result = _evaluate(self.tree, captured)
        if result < 0:
            raise InputError(f"{{{self.text}}} gives {result}")
        return result


Token = str | int | Arithmetic  # text, the number of a capture, or arithmetic on captures


@lru_cache(maxsize=4096)
def tokens_of(replacement: str) -> tuple[Token, ...]:
    r"""Parse a replacement.

    >>> tokens_of(r"stages.\1.x")
    ('stages.', 1, '.x')
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


def groups_of(token: Token) -> tuple[int, ...]:
    """List the captures that a token reads."""
    return (token,) if isinstance(token, int) else token.groups if isinstance(token, Arithmetic) else ()


def literal(text: str) -> str:
    """Escape text for a replacement."""
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
    """Return a captured number, or raise an InputError."""
    if len(digits) > _MAX_DIGITS or not digits.isdecimal():
        raise InputError(f"{digits[:_MAX_QUOTED]!r} is not a number of at most {_MAX_DIGITS} digits")
    return int(digits)


def _arithmetic(text: str) -> Arithmetic:
    shown = text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}..."
    try:
        tree = ast.parse(REFERENCE.sub(r"g\1", text), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two where it is too deep
        raise PatternError(f"{{{shown}}} is not arithmetic on captured numbers.") from None
    level, depth = [tree], 0
    while level:
        level, depth = [child for node in level for child in ast.iter_child_nodes(node)], depth + 1  # type: ignore[misc]
    if depth > _MAX_DEPTH:
        raise PatternError(f"{{{shown}}} is longer than arithmetic on captured numbers may be.")
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            known = type(node.value) is int
        elif isinstance(node, ast.Name):
            known = node.id == SLICE or re.fullmatch("g[0-9]+", node.id) is not None
        else:
            known = isinstance(node, (*_NODES, *_OPERATORS))
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
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, captured)
        case ast.BinOp(left=left, op=sign, right=right):
            try:
                result = _OPERATORS[type(sign)](_evaluate(left, captured), _evaluate(right, captured))
            except ZeroDivisionError:
                raise InputError("a division by zero") from None
            if abs(result) > _MAX_NUMBER:
                raise InputError(f"a number over {_MAX_NUMBER}")
            return result
        case ast.Subscript(value=ast.Tuple(elts=items), slice=index):
            place = _evaluate(index, captured)
            if not 0 <= place < len(items):
                raise InputError(f"the table of {len(items)} numbers has no place {place}")
            return _evaluate(items[place], captured)
    raise InputError(f"{ast.unparse(node)} is not a number")


Rows = Mapping[tuple[int, ...], int]  # numbers of a source up to some place, the same for all -> number of its target


def function_of(pairs: Iterable[tuple[tuple[int, ...], int]]) -> dict[tuple[int, ...], int] | None:
    """Collect which number follows from which; None where it does not always."""
    table: dict[tuple[int, ...], int] = {}
    return table if all(table.setdefault(numbers, value) == value for numbers, value in pairs) else None


def fitted(rows: Rows) -> tuple[int, str] | None:
    r"""Find the simplest arithmetic that gives each number of the target from the last numbers of the source.

    >>> fitted({(1,): 0, (2,): 1, (3,): 2})
    (1, '\\1 - 1')
    >>> fitted({(0,): 0, (1,): 0, (2,): 1, (3,): 1, (4,): 2})
    (2, '\\1 // 2')
    >>> fitted({(0, 0): 0, (0, 1): 1, (1, 0): 2, (1, 1): 3, (1, 2): 4, (2, 0): 5})
    (4, '(0, 2, 5)[\\1] + \\2')
    >>> fitted({(0,): 3, (1,): 3}) is None
    True

    Returns:
        How complex it is (0 is the simplest) and the arithmetic; None if there is none, or the number does not vary.
    """
    if len(set(rows.values())) < 2:
        return None
    place = len(next(iter(rows)))
    own = function_of((numbers[-1:], value) for numbers, value in rows.items())
    if own and (found := next(_of_one({number: value for (number,), value in own.items()}, f"\\{place}"), None)):
        return found
    both = function_of((numbers[-2:], value) for numbers, value in rows.items()) if place > 1 else None
    return next(_of_two(both, f"\\{place - 1}", f"\\{place}"), None) if both and len(both) >= _MIN_NUMBERS else None


def _of_one(pairs: Mapping[int, int], name: str) -> Iterator[tuple[int, str]]:
    distances = {value - number for number, value in pairs.items()}
    if len(distances) == 1:
        (distance,) = distances
        yield int(distance != 0), shifted(name, distance)
    if len(pairs) < _MIN_NUMBERS:
        return
    first, last = min(pairs), max(pairs)
    for unit in range(2, min(last - first + 1, _MAX_UNIT) + 1):
        for offset in sorted(range(1 - unit, unit), key=abs):
            base = f"({shifted(name, offset)})" if offset else name
            quotients = {value - (number + offset) // unit for number, value in pairs.items()}
            if len(quotients) == 1:
                yield 2, shifted(f"{base} // {unit}", quotients.pop())
            remainders = {value - (number + offset) % unit for number, value in pairs.items()}
            if len(remainders) == 1:
                yield 2, shifted(f"{base} % {unit}", remainders.pop())
    slope, rest = divmod(pairs[last] - pairs[first], last - first)
    if not rest and slope > 1:
        starts = {value - slope * number for number, value in pairs.items()}
        if len(starts) == 1:
            yield 2, shifted(f"{slope}*{name}", starts.pop())
    if last - first + 1 == len(pairs):
        yield 5, f"({', '.join(str(pairs[number]) for number in range(first, last + 1))})[{shifted(name, -first)}]"


def _of_two(pairs: Rows, outer: str, inner: str) -> Iterator[tuple[int, str]]:
    bases: dict[int, set[int]] = {}
    for (number, member), value in pairs.items():
        bases.setdefault(number, set()).add(value - member)
    if any(len(base) > 1 for base in bases.values()) or len(bases) < 2:
        return
    starts = {number: base.pop() for number, base in bases.items()}
    first, last = min(starts), max(starts)
    slope, rest = divmod(starts[last] - starts[first], last - first)
    if not rest and slope > 0 and all(start == starts[first] + slope * (n - first) for n, start in starts.items()):
        yield 3, shifted(f"{slope}*{outer} + {inner}", starts[first] - slope * first)
    elif last - first + 1 == len(starts):
        table = ", ".join(str(starts[number]) for number in range(first, last + 1))
        yield 4, f"({table})[{shifted(outer, -first)}] + {inner}"


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
        return len(self.sources) == 1 and (len(self.targets) < 2 or self.tied) and set(self.operations) <= {Copy()}

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
            note = f"   {operations[0]}" if operations[0] != Copy() else "   (tied)" if self.tied else ""
            return sources, (_braced(self.targets) or '""') + note
        if parts := equal_parts(operations):
            return sources, f"{_braced(self.targets)}   {len(operations)} equal parts (dim {parts.dim})"
        return sources, ", ".join(
            f"{target} = {operation}" if operation != Copy() else target for target, operation in self.fills
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
    """List the tensors that a rule makes of the keys that it takes together."""
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
        own = tuple(shapes[key] for key in picked)
        count = slice_count(operation, own)
        for index in [None] if count is None else range(count):
            sliced = operation if index is None else at(operation, index)
            name = expand(target, group.captured, index) + group.rest
            result.append(Match(name, picked, _checked(exact(sliced, own), own)))
    return result


@lru_cache(maxsize=4096)
def _checked(operation: Operation, shapes: tuple[Shape, ...]) -> Operation:
    """Return an operation if it makes one tensor of those of these shapes; else torch raises the reason."""
    if operation == Copy() and len(shapes) == 1:
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
        if set(pattern.groupindex) - {SLICE} or _UNUSABLE.search(source.replace(r"\\", "")):
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
