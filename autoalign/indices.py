r"""Keys and the numbers in them: what a rule captures, and what it makes of it.

A replacement is text with references to what its pattern captured: ``\1``, or arithmetic on captured numbers in braces,
written as Python does: ``stages.{\1 - 1}.blocks.{\2 // 2}``, or ``{(0, 0, 1)[\1]}`` where only a table tells. ``n`` is
the number of a slice or of a list's member. A backslash before a brace or a backslash takes it literally.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from autoalign.errors import InputError, PatternError

# A longer number, or one with a leading zero, is text: it could not be written back from its value.
NUMBER = re.compile(r"(?<![0-9])(0|[1-9][0-9]{0,8})(?![0-9])")
NUMBERED = re.compile(r"(.*?)(0|[1-9][0-9]{0,8})([^0-9]*)", re.DOTALL)  # a name with one; its last
_TOKEN = re.compile(r"\\([1-9][0-9]{0,5})|\{([^{}]*)\}|\\([\\{}])|([^\\{]+)", re.DOTALL)
REFERENCE = re.compile(r"\\([1-9][0-9]{0,5})")
SLICE = "n"
_DIGITS = 18  # of a captured number
_LARGEST = 10**_DIGITS
_DEEPEST = 64  # operators in each other
_SHOWN = 60  # characters of what is malformed

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
        raise InputError(f"{digits[:_SHOWN]!r} is not a number of at most {_DIGITS} digits")
    return int(digits)


def _arithmetic(text: str) -> Arithmetic:
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
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
