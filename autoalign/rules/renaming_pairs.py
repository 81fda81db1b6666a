r"""Few pairs of regular expression and replacement for given pairs of keys, as ``rules`` of ``align`` has them.

A pair of keys suggests patterns: without the last names that both have, and with the numbers captured that vary. Of
those that give no other key of the source one of the target's names, the one that does most of the pairs is taken.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from autoalign.plan.keys import NUMBER, common_prefix, stem

Pair = tuple[str, str]  # a key or a regular expression, and a key or what ``re.sub`` puts in its place

_SPECIAL = re.compile(r"([.^$*+?{}\[\]\\|()])")
_ANY, _DOT = r"(\d+)", r"\."
_GROUP = re.compile(r"(?<!\\)\([^)]*\)")
_MAX_LETTERS = 1000  # of keys that patterns are sought for; longer ones are named as they are
_MAX_VARYING = 4  # numbers in a key of which all selections are tried


class Renamer:
    """What is known of two sides for renaming keys of one to keys of the other.

    ``is_harmless`` is True for a source and a target key that may be paired in any case.
    """

    def __init__(self, source: Iterable[str], target: Iterable[str], is_harmless: Callable[[str, str], bool]) -> None:
        self.source = sorted((stem(key), key) for key in source)
        self.target = frozenset(target)
        self.is_harmless = is_harmless

    def pairs(self, wanted: Mapping[str, str]) -> tuple[Pair, ...]:
        r"""Write as few pairs as are found that rename some keys, source -> target, and no others to a target key.

        >>> keys = {f"h.{i}.n{k}.{leaf}": f"layers.{i}.ln_{k}.{leaf}" for i in range(3) for k in "ab" for leaf in "wb"}
        >>> wanted = {key: new for key, new in keys.items() if "na" in key}
        >>> print(*Renamer(keys, keys.values(), lambda *_: False).pairs(wanted))
        ('^h\\.(\\d+)\\.na\\.', 'layers.\\1.ln_a.')
        """
        slots = _slots(wanted)
        left = dict(wanted)
        pairs: list[Pair] = []
        while left:
            key, new = next(iter(left.items()))
            best, covered = (key, new), {key}
            known = slots[_texts(key), _texts(new)] if max(len(key), len(new)) <= _MAX_LETTERS else None
            for renaming in _renamings(key, new, known) if known is not None else ():
                pair, done = renaming.pair, self._made(renaming, wanted)
                if done is None and (narrow := renaming.narrowed(left)):
                    pair, done = narrow.pair, self._made(narrow, wanted)
                done = (done or set()) & left.keys()
                if len(done) > max(len(covered), 1) or (len(done) == len(covered) > 1 and len(pair[0]) < len(best[0])):
                    best, covered = pair, done
            pairs.append(best)
            for own in covered:
                del left[own]
        pairs.sort(key=lambda pair: -len(pair[0]))  # the more particular ones first: what is renamed begins otherwise
        result, used = self._in_order(pairs)
        is_right = wanted.items() <= result.items() and all(
            self.is_harmless(*pair) for pair in result.items() if pair[0] not in wanted
        )
        return tuple(used) if is_right else tuple(wanted.items())

    def _made(self, renaming: _Renaming, wanted: Mapping[str, str]) -> set[str] | None:
        """Collect the keys that are renamed as they may; None if another key gets a name of the target."""
        match, made = re.compile(renaming.pair[0]).match, set()
        for key in self._below("#".join(renaming.texts)):
            if (found := match(key)) and (new := renaming.new(found)) in self.target:
                if wanted.get(key) != new and (key in wanted or not self.is_harmless(key, new)):
                    return None
                made.add(key)
        return made

    def _below(self, start: str) -> Iterator[str]:
        """Yield the source keys that begin with a text, whatever their numbers."""
        text = stem(start)
        for place in range(bisect_left(self.source, (text,)), len(self.source)):
            if not self.source[place][0].startswith(text):
                return
            yield self.source[place][1]

    def _in_order(self, pairs: Sequence[Pair]) -> tuple[dict[str, str], list[Pair]]:
        """Rename keys by all pairs, one after another, until each is one of the target's, as ``align`` does.

        Returned are the keys that become one, and the pairs that make one of a key.
        """
        keys = {key for _, key in self.source}
        made = {own: other for own, other in pairs if own in keys}
        regexes = [(re.compile(own), other) for own, other in pairs if own not in keys]
        used = set(made.items())
        first: dict[str, int] = {}  # of these, by key
        for place, (regex, _) in enumerate(regexes):
            for key in self._below(_text(regex.pattern)):
                if key not in made and regex.match(key):
                    first.setdefault(key, place)
        for key, place in first.items():
            name = key
            for regex, other in regexes[place:]:
                name, count = regex.subn(other, name)
                if count and name in self.target:
                    made[key] = name
                    used.add((regex.pattern, other))
                    break
        return made, [pair for pair in pairs if pair in used]


def _text(pattern: str) -> str:
    """Write a pattern with all that it captures as ``#``."""
    return re.sub(r"\\(.)", r"\1", _GROUP.sub("#", pattern[1:].removesuffix("$")))


_Texts = tuple[str, ...]


def _texts(key: str) -> _Texts:
    return tuple(NUMBER.split(key)[0::2])


def _slots(wanted: Mapping[str, str]) -> dict[tuple[_Texts, _Texts], tuple[tuple[int, ...], tuple[int, ...]]]:
    """Find which numbers vary, for the texts of each kind of pairs of keys that differ in numbers only.

    These are the places of the source's numbers that vary; and for each number of the target the place of the one of
    these that it is most often equal to, -1 if none varies.
    """
    groups: dict[tuple[_Texts, _Texts], list[tuple[list[str], list[str]]]] = {}
    for own, other in wanted.items():
        groups.setdefault((_texts(own), _texts(other)), []).append((NUMBER.findall(own), NUMBER.findall(other)))
    result = {}
    for texts, rows in groups.items():
        columns, others = (list(zip(*side, strict=True)) for side in zip(*rows, strict=True))
        varying = tuple(place for place, column in enumerate(columns) if len(set(column)) > 1)
        equal = [[sum(map(str.__eq__, columns[place], column)) for place in varying] for column in others]
        result[texts] = varying, tuple(varying[counts.index(max(counts))] if counts else -1 for counts in equal)
    return result


@dataclass(frozen=True, slots=True)
class _Renaming:
    """A pattern for the beginnings of keys, as texts around numbers, and what it puts in their place."""

    texts: Sequence[str]
    numbers: Sequence[str]  # patterns
    other: Sequence[str | int]  # texts, and the numbers of groups
    end: str  # a dot, or empty if it is for whole keys

    @property
    def pair(self) -> Pair:
        """The pattern and the replacement."""
        escaped = [_SPECIAL.sub(r"\\\1", text) for text in self.texts]
        pattern = "".join([text + number for text, number in zip(escaped, [*self.numbers, ""], strict=True)])
        parts = [f"\\{part}" if isinstance(part, int) else part.replace("\\", r"\\") for part in self.other]
        return f"^{pattern}{_DOT if self.end else '$'}", "".join(parts) + self.end

    def new(self, match: re.Match[str]) -> str:
        """Return what a key becomes."""
        parts = [match[part] if isinstance(part, int) else part for part in self.other]
        return "".join(parts) + self.end + match.string[match.end() :]

    def narrowed(self, wanted: Mapping[str, str]) -> _Renaming | None:
        """Capture only the numbers of the keys that are wanted; None if nothing is captured."""
        match = re.compile(self.pair[0]).match
        found = [of.groups() for key, other in wanted.items() if (of := match(key)) and self.new(of) == other]
        if not found or not found[0]:
            return None
        values = iter([sorted(set(column), key=int) for column in zip(*found, strict=True)])
        return replace(self, numbers=[f"({'|'.join(next(values))})" if it == _ANY else it for it in self.numbers])


def _renamings(key: str, new: str, slots: tuple[Sequence[int], Sequence[int]]) -> Iterator[_Renaming]:
    """Yield renamings for a pair of keys, from the most general to the most particular."""
    own, other = key.split("."), new.split(".")
    shared = len(common_prefix([tuple(own[:0:-1]), tuple(other[:0:-1])]))
    varying, same = slots
    for count in range(shared, -1, -1):
        sides = ".".join(own[: len(own) - count]), ".".join(other[: len(other) - count])
        (texts, values), (others, wanted) = ((NUMBER.split(side)[0::2], NUMBER.findall(side)) for side in sides)
        inside = [place for place in varying if place < len(values)]
        sizes = range(len(inside), -1, -1) if len(inside) <= _MAX_VARYING else (len(inside), 0)
        for chosen in (places for size in sizes for places in combinations(inside, size)):
            if not count and not chosen:
                continue  # the two keys themselves
            parts: list[str | int] = [others[0]]
            for value, place, text in zip(wanted, same, others[1:], strict=False):
                is_same = place in chosen and values[place] == value
                parts += [chosen.index(place) + 1 if is_same else value, text]
            numbers = [_ANY if place in chosen else value for place, value in enumerate(values)]
            yield _Renaming(texts, numbers, parts, "." if count else "")
