"""The syntax of keys: components, numbers, stems, common prefixes and natural order; patterns of callers and files.

Patterns have the syntax of ``re`` and a time limit: ``re`` cannot be interrupted, and some patterns never end, such as
``(a|a)*$`` over a key of 60 letters. ``regex`` can be.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache, partial
from math import prod
from time import thread_time
from typing import TYPE_CHECKING, Any, TypeVar

from autoalign.errors import InputError, PatternError

if TYPE_CHECKING:
    import regex


LEVELS = 64  # components that are told apart in a key
# A longer number, or one with a leading zero, is text: it could not be written back from its value.
NUMBER = re.compile(r"(?<![0-9])(0|[1-9][0-9]{0,8})(?![0-9])")
NUMBERED = re.compile(r"(.*?)(0|[1-9][0-9]{0,8})([^0-9]*)", re.DOTALL)  # a name with one; its last
_OUTPUT = re.compile(r":\d+$")  # of a TensorFlow variable, as in "kernel:0"
_DIGITS = re.compile(r"\d{1,18}")
_NUMBER = re.compile(r"([0-9]+)")

_KeyT = TypeVar("_KeyT", str, tuple[str, ...])
_SECONDS_PER_CALL = 3.0  # of matching, and
_SECONDS_PER_KEY = 1e-4  # in addition
_MAX_PARTS = 100_000  # of a pattern, with each repetition written out, as ``regex`` does
_MAX_SHOWN = 100  # characters of a pattern or key in an error
_COUNT = re.compile(r"\{([0-9]+)")
_TOKEN = re.compile(
    r"(?P<whole>\\N\{[^}]*\}|\\x..|\\u.{4}|\\U.{8}|\\[0-9]{1,3}|\\.|\(\?P=\w+\)|\(\?#[^)]*\)|\(\?[a-zA-Z]+\))"
    r"|(?P<open>\((?:\?(?:P<\w+>|\(\w+\)|<?[=!]|>|[a-zA-Z]*(?:-[a-zA-Z]+)?:))?)"
    r"|(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])"
    r"|(?P<count>\{(?:(?P<least>[0-9]+)(?:,[0-9]*)?|,[0-9]*)\}|[*+?])"
    r"|(?P<other>.)",
    re.DOTALL,
)
_MAX_RUN = 64  # parts in a row: ``regex`` builds tables of long text in cubic time, which no limit interrupts
_SEPARATOR = r"(?<=[\s\S]|\A)"  # always holds
_FLAGS = ("ASCII", "IGNORECASE", "MULTILINE", "DOTALL", "VERBOSE")


@lru_cache(maxsize=65536)
def natural(key: str) -> tuple[str | int, ...]:
    """Split a key for sorting, so that ``layers.10`` comes after ``layers.9``, however long numbers are.

    >>> sorted(["layers.10", "layers.9", "layers.a"], key=natural)
    ['layers.9', 'layers.10', 'layers.a']
    """
    text, *rest = _NUMBER.split(key)
    parts: list[str | int] = [text]
    for number, text in zip(rest[::2], rest[1::2], strict=True):
        parts += len(known := number.lstrip("0")), known, text
    return tuple(parts)


def components(key: str) -> tuple[str, ...]:
    """Split a key into the names of its nested modules and its tensor.

    >>> components("encoder.layer.0.attn.qkv.weight")
    ('encoder', 'layer', '0', 'attn', 'qkv', 'weight')

    Of a key of more than ``LEVELS`` components the first ones are left together as one.
    """
    return tuple((_OUTPUT.sub("", key) if ":" in key else key).replace("/", ".").rsplit(".", LEVELS - 1))


def split_key(key: str) -> tuple[str, str]:
    """Split a key, or the name of a module, into that of the module around it and its own.

    >>> split_key("encoder.layer.0"), split_key("weight"), split_key("encoder/layer/kernel"), split_key("a.b/c")
    (('encoder.layer', '0'), ('', 'weight'), ('encoder/layer', 'kernel'), ('a.b', 'c'))
    """
    module, _, name = key.rpartition(".")
    if "/" in name:
        inner, _, name = name.rpartition("/")
        module = f"{module}.{inner}" if module else inner
    return module, name


@lru_cache(maxsize=65536)
def numbers(component: str) -> tuple[int, ...]:
    """List the numbers in a component.

    >>> numbers("block1-0"), numbers("conv")
    ((1, 0), ())
    """
    return tuple(int(digits) for digits in _DIGITS.findall(component))


@lru_cache(maxsize=65536)
def stem(component: str) -> str:
    """Replace every number of a component, or of a key, by ``#``.

    >>> stem("layer12")
    'layer#'
    """
    return _DIGITS.sub("#", component)


def common_prefix(names: Iterable[_KeyT]) -> _KeyT:
    """Return what all names begin with, of which there is at least one: texts, or keys split into components.

    >>> common_prefix(["blocks.0.fc1", "blocks.0.fc2"]), common_prefix([("layer", "0"), ("layer", "1")])
    ('blocks.0.fc', ('layer',))
    """
    known: Any = list(names)
    prefix: _KeyT = os.path.commonprefix(known)  # noqa: RUF071, of texts, not of paths
    return prefix


def template(path: Iterable[str]) -> tuple[str, ...]:
    """Replace every number of a path by ``#``.

    >>> template(("layer", "3", "conv1"))
    ('layer', '#', 'conv#')
    """
    return tuple(map(stem, path))


def common_module(paths: Collection[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the path of the innermost module that holds all of these tensors.

    >>> common_module([("net", "0", "weight"), ("net", "0", "bias"), ("net", "norm")])
    ('net',)
    """
    return common_prefix(path[:-1] for path in paths) if paths else ()


def compiled(pattern: str | re.Pattern[str]) -> regex.Pattern[str]:
    r"""Compile a pattern for a ``TimeLimit``; what it matches is what it matches with ``re``.

    >>> compiled(r"^layers\.(\d+)\.").match("layers.3.weight")[1]
    '3'
    """
    if isinstance(pattern, str):
        return _compiled(pattern, 0)
    if not isinstance(pattern.pattern, str):
        raise InputError(f"{pattern.pattern!r} is a regular expression over bytes, not text.")
    return _compiled(pattern.pattern, pattern.flags & ~re.DEBUG)


@lru_cache(maxsize=4096)
def _compiled(text: str, flags: int) -> regex.Pattern[str]:
    import regex

    shown = _short(text)
    try:
        known = re.compile(text, flags)
        if prod(max(int(count), 1) for count in _COUNT.findall(text)) > _MAX_PARTS and _length(text) > _MAX_PARTS + len(
            text
        ):
            raise PatternError(
                f"The regular expression {shown} repeats parts in each other more than {_MAX_PARTS:,} times."
            )
        written = text if known.flags & re.VERBOSE else _rewritten(text)
        return regex.compile(written, sum(getattr(regex, flag) for flag in _FLAGS if flags & getattr(re, flag)))
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise PatternError(f"{shown} is not a valid regular expression: {error}.") from error


def _length(text: str) -> int:
    """Count the parts of a pattern with its repetitions written out."""
    lengths, last = [0], 0
    for token in _TOKEN.finditer(text):
        if token["open"]:
            lengths.append(0)
        elif token["other"] == ")" and len(lengths) > 1:
            last = lengths.pop()
            lengths[-1] += last
        elif token["least"]:
            lengths[-1] += last * (int(token["least"]) - 1)
            last *= int(token["least"])
        elif not token["count"]:
            last = 1
            lengths[-1] += last
    return sum(lengths)


def _rewritten(text: str) -> str:
    """Rewrite a pattern so that ``regex`` reads it as ``re`` does: braces that are no counts, and brackets in a set."""
    tokens = list(_TOKEN.finditer(text))
    parts, run = [], 0
    for place, token in enumerate(tokens):
        part = token[0]
        if token["set"]:
            part = "[" + re.sub(r"(\\.)|\[", lambda found: found[1] or r"\[", part[1:], flags=re.DOTALL)
        parts.append(r"\{" if part == "{" else part)
        run += 1
        follows = tokens[place + 1]["count"] if place + 1 < len(tokens) else "end"
        if run >= _MAX_RUN and not follows and not token["open"] and token["other"] not in ("|", "^"):
            parts.append(_SEPARATOR)
            run = 0
    return "".join(parts)


class TimeLimit:
    """A limit on the time that all matching of one call takes, by the number of keys; errors say what is undone."""

    def __init__(self, keys: int, undone: str, *, seconds: float | None = None) -> None:
        self._left = _SECONDS_PER_CALL + _SECONDS_PER_KEY * keys if seconds is None else seconds
        self._undone = undone

    def search(self, pattern: regex.Pattern[str], text: str) -> regex.Match[str] | None:
        """Search as ``re`` does, or raise a PatternError when the time is over."""
        return self._timed(pattern.search, pattern, text)

    def match(self, pattern: regex.Pattern[str], text: str) -> regex.Match[str] | None:
        """Match at the start as ``re`` does, or raise a PatternError when the time is over."""
        return self._timed(pattern.match, pattern, text)

    def subn(self, pattern: regex.Pattern[str], replacement: str, text: str) -> tuple[str, int]:
        """Replace as ``re`` does, or raise a PatternError when the time is over or the replacement does not fit."""
        import regex

        try:
            changed: tuple[str, int] = self._timed(partial(pattern.subn, replacement), pattern, text)
        except (regex.error, IndexError) as error:
            raise PatternError(
                f"The replacement {_short(replacement)} does not fit {_short(pattern.pattern)}: {error}. {self._undone}"
            ) from error
        return changed

    def _timed(self, call: Callable[..., Any], pattern: regex.Pattern[str], text: str) -> Any:
        since = thread_time()
        try:
            if self._left > 0:
                return call(text, timeout=self._left)
        except (TimeoutError, MemoryError):
            pass
        finally:
            self._left -= thread_time() - since
        raise PatternError(
            f"The regular expression {_short(pattern.pattern)} takes too long on {_short(text)}. {self._undone} "
            "Write it without repetitions of what can match in several ways, such as (a|a)*."
        )


def _short(text: str) -> str:
    return repr(text) if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]!r}..."
