"""The words in the names of modules and tensors, what kind of value a name stands for, and how similar words are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from autoalign.matching.vocabulary import (
    KINDS,
    LAYER_TYPES,
    ORDINALS,
    PREFIXES,
    RELATED_PAIRS,
    RIVAL_PAIRS,
    SPELLINGS,
    WHOLE_NAMES,
    WRAPPERS,
)
from autoalign.plan.keys import numbers

_PARAMETER_PREFIXES = {"weight": "weight", "bias": "bias", "w": "weight", "b": "bias"}
_MAX_OF_OTHER_WORDS = 0.9  # similarity of names that are not the same words in the same order
_MIN_LETTERS_TO_COMPARE = 6  # of a word: shorter ones may differ by one letter and in everything else
_MIN_SPELLING_RATIO = 80  # percent, see rapidfuzz
_MAX_PAIRS_AT_ONCE = 2**22  # of words whose spelling is compared
_PREFIX_SIMILARITY = 0.8  # of words of which one begins the other
_RIVAL_SIMILARITY = -0.8
_UP_TO_NUMBER = re.compile(r"^\D*")
_SIZES = re.compile(r"\d+(x\d+)+|(?<=[a-z])[123]d(?![a-z])", re.IGNORECASE)
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_KNOWN: dict[str, dict[str, float]] = {}  # word -> the words that the vocabulary relates to it -> similarity
for _related in (RELATED_PAIRS, dict.fromkeys(RIVAL_PAIRS, _RIVAL_SIMILARITY)):
    for (_word, _other), _value in _related.items():
        _KNOWN.setdefault(_word, {})[_other] = _value


@lru_cache(maxsize=65536)
def words(component: str) -> tuple[str, ...]:
    """List the words of one component in the vocabulary's canonical spelling, without its numbers.

    A wrapper's own module, such as ``_orig_mod``, has none.

    >>> words("SelfAttention"), words("in_proj_weight"), words("fc1"), words("to_k"), words("12")
    (('self', 'attn'), ('qkv', 'weight'), ('in',), ('to', 'k'), ())
    """
    if component in WRAPPERS:
        return ()
    pieces = [piece.lower() for piece in _WORDS.findall(component)]
    found: list[str] = []
    position = 0
    while position < len(pieces):
        for length in range(5, 0, -1):  # a spelling may span pieces, as in "w1" or "layer_norm"
            joined = "".join(pieces[position : position + length])
            if joined in SPELLINGS and (length == 1 or pieces[position] != "to"):  # "to_k" is no token
                found += SPELLINGS[joined]
                position += length
                break
        else:
            piece = pieces[position]
            head = next((word for word in PREFIXES if piece.startswith(word)), "")
            if head and piece[len(head) :] in SPELLINGS:  # as in "kpos" and "prenorm"
                found += head, *SPELLINGS[piece[len(head) :]]
            elif not piece.isdigit():
                found.append(piece)
            position += 1
    return tuple(found)


@lru_cache(maxsize=4096)
def role_words(path: tuple[str, ...]) -> frozenset[str]:
    """Return the words in the last three names of a path, which tell what a tensor is for.

    >>> sorted(role_words(("encoder", "embed_positions", "weight")))
    ['embed', 'encoder', 'pos', 'weight']
    """
    return frozenset(word for component in path[-3:] for word in words(component))


@lru_cache(maxsize=65536)
def ordinal(component: str) -> tuple[int, ...]:
    """Return the place of a layer among those like it, as the words of a component tell it, or nothing.

    >>> [ordinal(name) for name in ("norm_before", "self_attn", "attn", "cross_attn", "pre_mlp_norm", "norm")]
    [(2,), (7,), (8,), (12,), (14,), ()]
    """
    found = words(component)
    beside = ("post" in found) - ("pre" in found)
    stages = [ORDINALS[word] for word in found if word in ORDINALS]
    if not stages:
        return (2 if beside < 0 else 4 * max(ORDINALS.values()),) if beside else ()
    return (4 * max(stages) + 2 * beside - ("self" in found),)


@lru_cache(maxsize=65536)
def counts(component: str) -> tuple[int, ...]:
    """List the numbers of a component that may tell a place: not the sizes of kernels, nor how many dimensions.

    >>> counts("conv2_3x3"), counts("conv1d_4"), counts("layer1")
    ((2,), (4,), (1,))
    """
    return numbers(_SIZES.sub("", component))


def all_counts(path: tuple[str, ...]) -> tuple[int, ...]:
    """List these numbers of all components of a path."""
    return tuple([number for name in path for number in counts(name)])


def is_its_norm(path: tuple[str, ...], before: tuple[str, ...]) -> bool:
    """True for a norm beside a convolution, which is the one that it follows where siblings are in order."""
    return path[:-1] == before[:-1] and "norm" in words(path[-1]) and "conv" in words(before[-1])


def shared_with_companions(path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], tuple[object, ...]]]:
    """Yield the module of a layer with its number and all that follows, and with what its name says beside its type.

    >>> list(shared_with_companions(("net", "norms", "2")))
    [(('net',), ('2',))]
    >>> list(shared_with_companions(("net", "pw_bn1", "bn")))
    [(('net',), ('1',)), (('net',), ((1,), 'pointwise'))]
    """
    if len(path) > 1 and path[-1] and not numbers(path[-1]) and LAYER_TYPES.issuperset(words(path[-1])):
        path = path[:-1]
    depth = next((depth for depth in reversed(range(len(path))) if numbers(path[depth])), -1)
    if depth >= 0 and not path[depth].isdecimal():
        yield path[:depth], (_UP_TO_NUMBER.sub("", path[depth]), *path[depth + 1 :])
    elif depth > 0 and not numbers(path[depth - 1]):
        yield path[: depth - 1], path[depth:]
    if told := sorted({*words(path[-1])} - LAYER_TYPES):
        yield path[:-1], (numbers(path[-1]), *told)


@lru_cache(maxsize=65536)
def kind(component: str) -> tuple[str, str]:
    """Return the kind of values that a tensor's name stands for (weight, bias, ..., else other), and the rest of it.

    >>> kind("in_proj_weight"), kind("running_mean"), kind("gamma"), kind("cls_token"), kind("weight_ih_l0")
    (('weight', 'in_proj'), ('mean', ''), ('weight', ''), ('other', 'cls_token'), ('weight', 'ih_l0'))
    """
    if component in WHOLE_NAMES:
        return WHOLE_NAMES[component]
    head, _, rest = component.partition("_")
    if rest and head.lower() in _PARAMETER_PREFIXES:
        return _PARAMETER_PREFIXES[head.lower()], rest
    rest, _, tail = component.rpartition("_")
    canonical = words(tail)
    if len(canonical) == 1 and canonical[0] in KINDS and not tail[-1:].isdigit():
        return KINDS[canonical[0]], rest
    return "other", component


def word_similarity(first: Sequence[str], second: Sequence[str]) -> NDArray[np.float32]:
    """Compute how similar in meaning each word of one list is to each word of the other, in [-1, 1].

    Rivals, such as "q" and "k", are negative. Words that the vocabulary does not relate are compared by spelling.
    """
    table = np.zeros((len(first), len(second)), dtype=np.float32)
    for (row, column), value in similar_words(first, second).items():
        table[row, column] = value
    return table


def similar_words(first: Sequence[str], second: Sequence[str]) -> dict[tuple[int, int], float]:
    """Return the entries of ``word_similarity`` that are not zero, by their places.

    >>> similar_words(["q", "proj"], ["k", "projection"])
    {(1, 1): 0.8, (0, 0): -0.8}
    """
    places = _places(first), _places(second)
    found = _spelled_alike(first, second)
    for short, long in (places, places[::-1]):
        for word, rows in long.items():
            for end in range(3, len(word)):
                if columns := short.get(word[:end]):
                    pairs = product(columns, rows) if short is places[0] else product(rows, columns)
                    found.update(dict.fromkeys(pairs, _PREFIX_SIMILARITY))
    for word, rows in places[0].items():
        for other, value in _KNOWN.get(word, {}).items():
            found.update(dict.fromkeys(product(rows, places[1].get(other, ())), value))
        found.update(dict.fromkeys(product(rows, places[1].get(word, ())), 1.0))
    return found


def _places(listed: Sequence[str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, word in enumerate(listed):
        places.setdefault(word, []).append(place)
    return places


def _spelled_alike(first: Sequence[str], second: Sequence[str]) -> dict[tuple[int, int], float]:
    long = [
        [place for place, word in enumerate(listed) if len(word) >= _MIN_LETTERS_TO_COMPARE]
        for listed in (first, second)
    ]
    found: dict[tuple[int, int], float] = {}
    if not (long[0] and long[1]):
        return found
    from rapidfuzz import fuzz, process

    others = [second[place] for place in long[1]]
    step = max(_MAX_PAIRS_AT_ONCE // len(others), 1)
    for start in range(0, len(long[0]), step):
        rows = long[0][start : start + step]
        words_here = [first[row] for row in rows]
        spelled = process.cdist(
            words_here, others, scorer=fuzz.ratio, score_cutoff=_MIN_SPELLING_RATIO, dtype=np.float32
        )
        for row, column in np.argwhere(spelled).tolist():
            found[rows[row], long[1][column]] = float(np.float32(spelled[row, column]) * np.float32(0.008))
    return found


@lru_cache(maxsize=65536)
def likeness(first: tuple[str, ...], second: tuple[str, ...]) -> float:
    """Compute the similarity of two names by their words: 1 if they are the same, at most 0.9 in another order.

    >>> likeness(words("image_encoder"), words("visual_encoder")), likeness(("a", "to", "b"), ("b", "to", "a"))
    (1.0, 0.9)
    """
    if first == second or not first or not second:
        return float(first == second != ())
    return min(float(word_similarity(first, second).sum() / np.sqrt(len(first) * len(second))), _MAX_OF_OTHER_WORDS)
