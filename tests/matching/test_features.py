"""Features: similarity of names, and layers of equal name."""

from __future__ import annotations

import tracemalloc
from random import Random

import numpy as np
import pytest

from autoalign.matching.features import name_scores, namesakes
from autoalign.matching.vocabulary import RELATED_PAIRS

WORDS = sorted({word for pair in RELATED_PAIRS for word in pair} | {"abc", "abcd", "transformer", "transformed"})


def test_names_of_many_words_score_as_those_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(0)
    source, target = ([tuple(random.choices(WORDS, k=random.randint(1, 4))) for _ in range(50)] for _ in range(2))
    few = name_scores(source, target)
    monkeypatch.setattr("autoalign.matching.features._MAX_TABLE_CELLS", 1)
    assert np.allclose(name_scores(source, target), few, atol=1e-6)
    assert few.max() > 0.5


def test_a_name_below_many_modules_says_nothing_and_costs_little() -> None:
    source, target = ([(f"{side}{index}x", name) for index in range(300) for name in ("one", "two")] for side in "ab")
    tracemalloc.start()
    try:
        assert namesakes(source, target) == []
        assert tracemalloc.get_traced_memory()[1] < 2e6  # all 90,000 pairs of modules take ten times as much
    finally:
        tracemalloc.stop()


def test_of_prefixes_those_before_most_names_are_taken_off() -> None:
    source = [("net", "head"), *(("net", "body", f"layer{index}x") for index in range(6))]
    target = [("body", f"layer{index}x") for index in range(6)]
    assert namesakes(source, target) == [(index + 1, index) for index in range(6)]


def test_layers_that_moved_to_the_next_stage_are_no_namesakes() -> None:
    paths = [("stages", str(stage), name) for stage in range(3) for name in ("conv", "norm", "down")]
    source, target = [("net", *path) for path in paths], [("model", *path) for path in paths]
    alike = [(place, place) for place in range(9)]
    assert namesakes(source, target, fits=lambda *_: True) == alike
    without = [pair for pair in alike if paths[pair[0]][2] != "down"]
    found = namesakes(source, target, fits=lambda i, j: i == j + 3 if paths[i][2] == "down" else i == j)
    assert sorted(found) == without
