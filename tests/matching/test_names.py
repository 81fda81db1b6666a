"""Names: the similarity of words."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from rapidfuzz import fuzz

from autoalign.matching.names import likeness, similar_words, word_similarity, words
from autoalign.matching.vocabulary import RELATED_PAIRS, RIVAL_PAIRS

WORDS = sorted({word for pair in (*RELATED_PAIRS, *RIVAL_PAIRS) for word in pair})
WORDS += ["abc", "abcd", "transform", "transformer", "transformed", "projection", "projections"]


def _similarity(first: str, second: str) -> float:
    short = min(len(first), len(second))
    if first == second:
        return 1.0
    if (first, second) in RIVAL_PAIRS:
        return -0.8
    if (first, second) in RELATED_PAIRS:
        return RELATED_PAIRS[first, second]
    if short >= 3 and (first.startswith(second) or second.startswith(first)):
        return 0.8
    return 0.008 * fuzz.ratio(first, second, score_cutoff=80) if short >= 6 else 0.0


def test_words_are_as_alike_as_one_by_one() -> None:
    random = Random(0)
    for _ in range(20):
        first, second = random.choices(WORDS, k=30), random.choices(WORDS, k=20)
        expected = [[_similarity(a, b) for b in second] for a in first]
        assert np.allclose(word_similarity(first, second), expected, atol=1e-6)


def test_of_many_words_those_alike_alone_are_listed() -> None:
    words = [f"{chr(97 + k % 26)}{chr(97 + k // 26 % 26)}{chr(97 + k // 676)}" for k in range(3_000)]
    assert similar_words(words, words) == {(k, k): 1.0 for k in range(3_000)}


@pytest.mark.parametrize("other", ["embed_tokens", "embeddings", "stem"])
def test_an_embedder_may_be_a_table_or_a_stem(other: str) -> None:
    """As in Gemma's own code, and in transformers' ResNet."""
    assert likeness(words("embedder"), words(other)) >= 0.5


def test_a_role_joined_with_a_word_is_both() -> None:
    assert words("ca_kpos_proj") == ("cross", "attn", "k", "pos", "proj")
    assert words("vnorm") == ("v", "norm")
    assert words("kernel_keeper") == ("weight", "keeper")
