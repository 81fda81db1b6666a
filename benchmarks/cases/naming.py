"""Steps of a perturbation that change names and numbers, and leave order and nesting as they are."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random

import torch

from benchmarks.cases.module_trees import Path, template
from benchmarks.cases.words import LEAF_SCHEMES, LEAVES, NORM_LEAVES, SYNONYMS, made_up, with_words, words_of

_LEAF_WORDS = frozenset(word for leaf in LEAVES for word in words_of(leaf))


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the side that is perturbed."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str | None  # the key that it has on the other side; None where that side has no such tensor

    @property
    def key(self) -> str:
        return ".".join(self.path)


def renamed(
    entries: Sequence[Entry], random: Random, *, synonyms: float, made: float, telling: Collection[str] = ()
) -> list[Entry]:
    """Give words other words, each the same one everywhere: synonyms, or such as mean nothing.

    Args:
        entries: The entries.
        random: What decides.
        synonyms: The share of the words with synonyms that get one.
        made: The share of the others that get a word without a meaning.
        telling: Words that must keep a meaning.
    """
    present = dict.fromkeys(word for entry in entries for name in entry.path for word in words_of(name))
    taken = {word.lower() for word in present}
    words: dict[str, str] = {}
    for word in present:
        if word in _LEAF_WORDS:
            continue
        choices = [text for text in SYNONYMS.get(word.lower(), ()) if _is_free(text, taken - {word.lower()})]
        if choices and random.random() < synonyms:
            words[word] = random.choice(choices)
        elif word not in telling and random.random() < made:
            words[word] = _new_word(random, taken)
        taken |= {part.lower() for part in words_of(words.get(word, word))}
    return _with_names(entries, lambda name: name if name in LEAVES else with_words(name, words))


def scrambled(entries: Sequence[Entry], random: Random, *, leaves: bool) -> list[Entry]:
    """Put a meaningless word in the place of every name, the same one for the same name; numbers stay.

    Args:
        entries: The entries.
        random: What decides, also whether the digits at the end of a name stay.
        leaves: Whether the layers' names for their own tensors (weight, bias, ...) are changed too.
    """
    keeps_digits = random.random() < 0.5
    taken: set[str] = set()
    words: dict[str, str] = {}

    def scramble(name: str) -> str:
        if name.isdecimal() or (name in LEAVES and not leaves):
            return name
        found = re.fullmatch(r"(.*?)(\d*)", name, re.DOTALL)
        stem, digits = (found[1], found[2]) if found and keeps_digits else (name, "")
        if stem not in words:
            words[stem] = _new_word(random, taken)
            taken.add(words[stem])
        return words[stem] + digits

    return _with_names(entries, scramble)


def with_leaf_names(entries: Sequence[Entry], random: Random) -> list[Entry]:
    """Name the layers' own tensors by another scheme, norms' gains and biases with names of their own or not."""
    scheme = random.choice(LEAF_SCHEMES)
    of_norms = NORM_LEAVES if random.random() < 0.5 else {}
    norms = {entry.path[:-1] for entry in entries if entry.path[-1] == "running_mean"}
    norms |= {entry.path[:-1] for entry in entries if entry.path[-1] == "weight" and len(entry.shape) == 1}
    return [
        replace(
            entry,
            path=(*entry.path[:-1], (of_norms if entry.path[:-1] in norms else {}).get(name, scheme.get(name, name))),
        )
        for entry in entries
        for name in entry.path[-1:]
    ]


def renumbered(entries: Sequence[Entry], random: Random) -> list[Entry]:
    """Count lists and numbered siblings from 1 where they count from 0, from 0 where from 1, and close gaps.

    Each place of the module tree is decided once for all of its repetitions.
    """
    numbers: dict[tuple[Path, str], set[int]] = defaultdict(set)
    for entry in entries:
        for depth, name in enumerate(entry.path):
            if (found := _numbered(name)) is not None:
                numbers[template(entry.path[:depth]), found[0]].add(found[1])
    new: dict[tuple[Path, str], dict[int, int]] = {}
    for place, present in numbers.items():
        start, way = min(present), random.choice(("keep", "shift", "shift", "close"))
        if len(present) > 1 and start in (0, 1) and way != "keep":
            in_order = sorted(present)
            new[place] = (
                {number: number + 1 - 2 * start for number in in_order}
                if way == "shift"
                else {number: start + rank for rank, number in enumerate(in_order)}
            )

    def path(entry: Entry) -> Path:
        names = []
        for depth, name in enumerate(entry.path):
            found = _numbered(name)
            shifts = new.get((template(entry.path[:depth]), found[0])) if found else None
            names.append(f"{found[0]}{shifts[found[1]]}" if found and shifts else name)
        return tuple(names)

    return [replace(entry, path=path(entry)) for entry in entries]


def _numbered(name: str) -> tuple[str, int] | None:
    """Split a name that is a number or ends in one."""
    found = re.fullmatch(r"(|.*\D)(\d{1,3})", name, re.DOTALL)
    return (found[1], int(found[2])) if found else None


def _with_names(entries: Iterable[Entry], change: Callable[[str], str]) -> list[Entry]:
    return [replace(entry, path=tuple(change(name) for name in entry.path)) for entry in entries]


def _is_free(text: str, taken: Collection[str]) -> bool:
    return not any(word.lower() in taken for word in words_of(text))


def _new_word(random: Random, taken: Collection[str]) -> str:
    while (word := made_up(random)) in taken:
        pass
    return word
