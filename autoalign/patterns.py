"""What the user says beforehand: rules, and the keys to include and to exclude."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from autoalign.errors import InputError, PatternError

RuleLike = Mapping[str, str] | Iterable[tuple[str, str]]
PatternLike = str | re.Pattern[str] | Iterable[str | re.Pattern[str]] | None


def pinned_pairs(rules: RuleLike, source: Sequence[str], target: Sequence[str]) -> dict[str, str]:
    r"""Find the pairs that the rules fix: target key -> source key.

    A rule is a pair of keys, or a regex with its replacement. These are applied to a source key by ``re.sub``, one
    after another, until it is one of the target's. A key that becomes none of them fixes nothing.

    >>> pinned_pairs({r"^old\.": "new."}, ["old.a", "b"], ["new.a", "b"])
    {'new.a': 'old.a'}

    Raises:
        PatternError: A rule is malformed, names keys that do not exist, or fixes one key twice.
    """
    pairs = list(rules.items()) if isinstance(rules, Mapping) else list(rules)
    if not all(
        isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(p, str) for p in pair) for pair in pairs
    ):
        raise InputError("rules must be a mapping of regex to replacement or pairs of keys. Nothing was aligned.")
    own, other = set(source), set(target)
    pins: dict[str, str] = {}
    renamings: list[tuple[re.Pattern[str], str]] = []
    for first, second in pairs:
        if first in own and second in other:
            _pin(pins, first, second)
        elif first in own:
            raise PatternError(f"The rules fill {second!r}, which is no key of the model. Nothing was aligned.")
        else:
            renamings.append((_compiled(first), second))
    used: set[int] = set()
    fixed: set[int] = set()
    taken = set(pins.values())
    for key in source:
        if key in taken:
            continue
        renamed, trail = key, []
        for number, (pattern, replacement) in enumerate(renamings):
            try:
                renamed, count = pattern.subn(replacement, renamed)
            except (re.error, IndexError) as error:
                raise PatternError(
                    f"The replacement {replacement!r} does not fit {pattern.pattern!r}: {error}."
                ) from error
            if not count:
                continue
            trail.append(number)
            if renamed in other:
                if renamed not in pins:
                    _pin(pins, key, renamed)
                fixed.update(trail)
                break
        used.update(trail)
    for number, (pattern, replacement) in enumerate(renamings):
        if number in used - fixed:
            raise PatternError(
                f"The rule {pattern.pattern!r} -> {replacement!r} gives no key that the model has. Nothing was aligned."
            )
        if number not in used:
            raise PatternError(
                f"The rule {pattern.pattern!r} -> {replacement!r} matches no checkpoint key. Nothing was aligned. "
                "Rules go from checkpoint key to model key; check the spelling or leave the rule out."
            )
    return pins


def _pin(pins: dict[str, str], source: str, target: str) -> None:
    if pins.setdefault(target, source) != source:
        raise PatternError(
            f"The rules fill {target!r} from {pins[target]!r} and {source!r}. Nothing was aligned; keep one of them."
        )


def excluded_keys(
    include: PatternLike, exclude: PatternLike, source: Sequence[str], target: Sequence[str]
) -> tuple[frozenset[str], tuple[str, ...]]:
    """List the keys that take no part: those that match ``exclude``, and those that ``include`` leaves out.

    A pattern of ``include`` chooses among the target's keys, or among the source's where no target key matches it.

    Returns:
        The keys, and a statement for each pattern of ``exclude`` that matches none.

    >>> excluded_keys(None, "fc", ["fc.weight", "conv"], ["conv", "head"])
    (frozenset({'fc.weight'}), ())
    """
    found = {p.pattern: {key for key in (*source, *target) if p.search(key)} for p in _patterns(exclude)}
    out = {key for keys in found.values() for key in keys}
    unused = tuple(f"exclude={pattern!r} matches no key of either side." for pattern, keys in found.items() if not keys)
    wanted = _patterns(include)
    if wanted:
        for keys, patterns in (
            (target, [p for p in wanted if any(p.search(key) for key in target)]),
            (source, [p for p in wanted if not any(p.search(key) for key in target)]),
        ):
            if patterns:
                kept = {key for key in keys if any(pattern.search(key) for pattern in patterns)}
                if not kept:
                    names = ", ".join(repr(pattern.pattern) for pattern in patterns)
                    raise PatternError(f"include={names} matches no key of either side. Nothing was aligned.")
                out.update(key for key in keys if key not in kept)
    return frozenset(out), unused


def _patterns(given: PatternLike) -> list[re.Pattern[str]]:
    if given is None:
        return []
    if isinstance(given, str | re.Pattern):
        given = [given]
    if not isinstance(given, Iterable):
        raise InputError(f"include and exclude take regexes, not {type(given).__name__}. Nothing was aligned.")
    return [_compiled(pattern) for pattern in given]


def _compiled(pattern: str | re.Pattern[str]) -> re.Pattern[str]:
    if not isinstance(pattern, str | re.Pattern):
        raise InputError(f"A pattern must be a string or a compiled regex, not {type(pattern).__name__}.")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise PatternError(f"{pattern!r} is no regular expression: {error}. Nothing was aligned.") from error
