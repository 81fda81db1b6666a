"""Namesakes: layers that both sides call the same."""

from __future__ import annotations

import tracemalloc

from autoalign.matching.same_names import namesakes


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
