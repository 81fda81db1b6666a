"""What the user says beforehand: rules, and the keys to include and to exclude."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autoalign.errors import InputError, PatternError
from autoalign.plan.keys import components
from autoalign.plan.patterns import TimeLimit, compiled

if TYPE_CHECKING:
    import regex

RuleLike = Mapping[str, str] | Iterable[tuple[str, str]]
PatternLike = str | re.Pattern[str] | Iterable[str | re.Pattern[str]] | None

_MARK = "re:"  # before a regular expression
_SPECIAL = frozenset("^$*+?[]()|\\")  # which a plain pattern does not hold
_UNDONE = "Nothing was aligned."
_LONGEST = 100_000  # characters of a key that renamings make


def checked_rules(rules: RuleLike) -> list[tuple[str, str]]:
    """List the pairs that rules are given as.

    Raises:
        InputError: They are something else.
    """
    given: object = rules.items() if isinstance(rules, Mapping) else rules
    pairs: list[Any] = list(given) if isinstance(given, Iterable) else [given]
    if not all(
        isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(p, str) for p in pair) for pair in pairs
    ):
        raise InputError("rules must be a mapping of regex to replacement or pairs of keys. Nothing was aligned.")
    return [(first, second) for first, second in pairs]


def pinned_pairs(rules: RuleLike, source: Sequence[str], target: Sequence[str]) -> dict[str, str]:
    r"""Find the pairs that the rules fix: target key -> source key.

    A rule is a pair of keys, or a regex with its replacement. These are applied to a source key by ``re.sub``, one
    after another, until it is one of the target's. A key that becomes none of them fixes nothing.

    >>> pinned_pairs({r"^old\.": "new."}, ["old.a", "b"], ["new.a", "b"])
    {'new.a': 'old.a'}

    Raises:
        PatternError: A rule is malformed, names keys that do not exist, or fixes one key twice.
    """
    pairs = checked_rules(rules)
    own, other = set(source), set(target)
    pins: dict[str, str] = {}
    renamings: list[tuple[regex.Pattern[str], str, str]] = []
    for first, second in pairs:
        if first in own and second in other:
            _pin(pins, first, second)
        elif first in own:
            raise PatternError(f"The rules fill {second!r}, which is no key of the model. Nothing was aligned.")
        else:
            renamings.append((_compiled(first), first, second))
    limit = TimeLimit(len(source), _UNDONE)
    used: set[int] = set()
    fixed: set[int] = set()
    taken = set(pins.values())
    for key in source:
        if key in taken:
            continue
        renamed, trail = key, []
        for number, (pattern, text, replacement) in enumerate(renamings):
            renamed, count = limit.subn(pattern, replacement, renamed)
            if len(renamed) > max(_LONGEST, len(key)):
                raise PatternError(f"The rule {text!r} -> {replacement!r} makes keys without end. {_UNDONE}")
            if not count:
                continue
            trail.append(number)
            if renamed in other:
                if renamed not in pins:
                    _pin(pins, key, renamed)
                fixed.update(trail)
                break
        used.update(trail)
    for number, (_, text, replacement) in enumerate(renamings):
        if number in used - fixed:
            raise PatternError(
                f"The rule {text!r} -> {replacement!r} gives no key that the model has. Nothing was aligned."
            )
        if number not in used:
            raise PatternError(
                f"The rule {text!r} -> {replacement!r} matches no checkpoint key. Nothing was aligned. "
                "Rules go from checkpoint key to model key; check the spelling or leave the rule out."
            )
    return pins


def _pin(pins: dict[str, str], source: str, target: str) -> None:
    if pins.setdefault(target, source) != source:
        raise PatternError(
            f"The rules fill {target!r} from {pins[target]!r} and {source!r}. Nothing was aligned; keep one of them."
        )


@dataclass(frozen=True, slots=True)
class _Selector:
    """One pattern of ``include`` or ``exclude``."""

    text: str  # as it was given
    parts: str  # of a plain pattern, as _framed writes a key; empty for a regex
    regex: regex.Pattern[str] | None

    def taken(self, keys: Mapping[str, str], limit: TimeLimit) -> set[str]:
        """Return the keys that it takes, of framed ones by key."""
        if self.regex is None:
            return {key for key, framed in keys.items() if self.parts in framed}
        return {key for key in keys if limit.search(self.regex, key)}


def excluded_keys(
    include: PatternLike, exclude: PatternLike, source: Sequence[str], target: Sequence[str]
) -> tuple[frozenset[str], tuple[str, ...]]:
    """List the keys that take no part: those that ``exclude`` takes, and those that ``include`` leaves out.

    A plain word or dotted path takes the keys that hold it as whole components, wherever they stand; ``re:`` before a
    regular expression, or a compiled one, takes those that it is found in. A pattern of ``include`` chooses among the
    target's keys, or among the source's where it takes no target key.

    Returns:
        The keys, and a statement for each pattern of what it took on each side.

    >>> excluded_keys(None, "fc", ["fc.weight", "mlp.fc1.weight"], ["net.fc.weight", "head"])[1]
    ("exclude='fc' took 1 target and 1 source tensor.",)
    """
    unwanted, wanted = _selectors(exclude, "exclude"), _selectors(include, "include")
    if not unwanted and not wanted:
        return frozenset(), ()
    sides = [{key: _framed(key) for key in side} for side in (target, source)]
    limit = TimeLimit(len(source) + len(target), _UNDONE)
    out: set[str] = set()
    notes = []
    for selector in unwanted:
        taken = [selector.taken(side, limit) for side in sides]
        out.update(*taken)
        if any(taken):
            plural = "s" if len(taken[1]) != 1 else ""
            took = f"{len(taken[0]):,} target and {len(taken[1]):,} source tensor{plural}"
            notes.append(f"exclude={selector.text!r} took {took}.")
        else:
            notes.append(f"exclude={selector.text!r} matches no key of either side.")
    kept: list[set[str]] = [set(), set()]
    for selector in wanted:
        taken = [selector.taken(side, limit) for side in sides]
        chosen = 0 if taken[0] else 1
        if not taken[chosen]:
            raise PatternError(f"include={selector.text!r} matches no key of either side. Nothing was aligned.")
        kept[chosen] |= taken[chosen]
        name = ("target", "source")[chosen]
        notes.append(f"include={selector.text!r} took {len(taken[chosen]):,} of {len(sides[chosen]):,} {name} tensors.")
    for side, chosen_keys in zip(sides, kept, strict=True):
        if chosen_keys:
            out.update(side.keys() - chosen_keys)
    return frozenset(out), tuple(notes)


def pattern_for(path: str, end: str, others: Iterable[str]) -> str:
    r"""Write the pattern that takes a path and none of the others: a plain one, or the regex that ends so.

    >>> pattern_for("teacher", "[.]", ["student"]), pattern_for("fc.bias", "$", ["net.fc.bias"])
    ('teacher', 're:^fc\\.bias$')
    """
    plain = not _is_regex_like(path) and "/" not in path and ":" not in path and all(path.split("."))
    if plain and not any(_framed(path) in _framed(other) for other in others):
        return path
    return f"{_MARK}^{re.escape(path)}{end}"


def _selectors(given: PatternLike, option: str) -> list[_Selector]:
    if given is None:
        return []
    if isinstance(given, str | re.Pattern):
        given = [given]
    if not isinstance(given, Iterable):
        raise InputError(f"{option} takes words or regexes, not {type(given).__name__}. Nothing was aligned.")
    return list(dict.fromkeys(_selector(pattern, option) for pattern in given))


def _selector(pattern: object, option: str) -> _Selector:
    if isinstance(pattern, re.Pattern):
        return _Selector(f"re:{pattern.pattern}", "", _compiled(pattern))
    if isinstance(pattern, str) and pattern.startswith(_MARK):
        return _Selector(pattern, "", _compiled(pattern.removeprefix(_MARK)))
    if not isinstance(pattern, str):
        raise InputError(
            f"{option} takes words or regexes, and one of them is a {type(pattern).__name__}. Nothing was aligned."
        )
    if _is_regex_like(pattern) or not pattern.strip("."):
        raise PatternError(
            f"{option}={pattern!r} is not a name of a module or tensor. Nothing was aligned. A plain pattern, such as "
            f"'fc' or 'layer4.0', means whole components of a key; write {_MARK + pattern!r} for a regular expression."
        )
    return _Selector(pattern, _framed(pattern.strip(".")), None)


def _framed(key: str) -> str:
    """Write a key so that whole components of it are found as text."""
    return f".{'.'.join(components(key))}."


def _is_regex_like(text: str) -> bool:
    return not _SPECIAL.isdisjoint(text)


def _compiled(pattern: str | re.Pattern[str]) -> regex.Pattern[str]:
    try:
        return compiled(pattern)
    except (InputError, PatternError) as error:
        raise type(error)(f"{error} {_UNDONE}") from error
