r"""Wording: rules that differ in one word only, which stays as it is, become one rule that captures the word."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from autoalign.indices import REFERENCE, reference
from autoalign.rules import Rule

_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]+(?![A-Za-z(])|(?<=\\\.)[A-Za-z]+(?![A-Za-z(])")
_LONGEST = 1000  # characters of a pattern that is joined with others
_MOST = 8  # words in one rule; more would be no easier to read than several rules
_Frame = tuple[str, str, str | None, str]  # a pattern around a word, and a replacement around it; None: dropped


def worded(rules: Sequence[Rule]) -> list[Rule]:
    r"""Join rules of one pattern and one replacement that differ in a word.

    >>> rules = [Rule((rf"^attn\.{word}\.",), (f"attention.{word}_proj.",)) for word in "qkv"]
    >>> print(*worded(rules))
    ^attn\.(q|k|v)\. -> attention.\1_proj.
    """
    result = list(rules)
    while True:
        groups: dict[tuple[_Frame, Rule], list[tuple[int, str]]] = {}
        for place, rule in enumerate(result):
            for frame, word in _frames(rule):
                groups.setdefault((frame, Rule((), (), rule.operations, tied=rule.tied)), []).append((place, word))
        joined = max(groups.items(), key=lambda item: len(item[1]), default=None)
        if joined is None or len(joined[1]) < 2:
            return result
        (frame, shared), members = joined
        members = members[:_MOST]
        written = _written(frame, [word for _, word in members])
        last = members[-1][0]
        result[last] = Rule((written[0],), written[1], shared.operations, tied=shared.tied)
        for place, _ in reversed(members[:-1]):
            del result[place]


def _frames(rule: Rule) -> Iterator[tuple[_Frame, str]]:
    """Yield the words that a rule keeps, with what stands around each."""
    if len(rule.sources) != 1 or len(rule.targets) > 1 or len(rule.sources[0]) > _LONGEST:
        return
    (source,) = rule.sources
    for found in _WORD.finditer(source):
        word, first, last = found[0], source[: found.start()], source[found.end() :]
        if not rule.targets:
            yield (first, last, None, ""), word
        for target in rule.targets:
            for other in re.finditer(rf"(?<![A-Za-z]){word}(?![A-Za-z])", target):
                before, after = target[: other.start()], target[other.end() :]
                if before.count("{") == before.count("}"):
                    yield (first, last, before, after), word


def _written(frame: _Frame, words: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    first, last, before, after = frame
    source = f"{first}({'|'.join(words)}){last}"
    if before is None:
        return source, ()
    group = len(re.findall(r"(?<!\\)\((?!\?:)", first)) + 1
    moved = [
        REFERENCE.sub(lambda found: f"\\{int(found[1]) + (int(found[1]) >= group)}", text) for text in (before, after)
    ]
    return source, (f"{moved[0]}{reference(group, moved[1])}{moved[1]}",)
