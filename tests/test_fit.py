"""The fit of the weights: its examples are moves of known truth, and cases of a library are left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from autoalign.matching import cues
from autoalign.matching.confidence import WEIGHTS_FILE, fitted_weights
from benchmarks import fit


@pytest.fixture(scope="module")
def examples() -> list[fit.Example]:
    return list(fit.collected("resnet18->", 9, 2, 9, processes=1))


def test_moves_of_known_truth_are_collected(examples: list[fit.Example]) -> None:
    assert {one.libraries for one in examples} >= {frozenset({"torchvision", "transformers"})}
    moves = [one for one in examples if one.of == fit.CUES]
    assert sum(one.is_right for one in moves) > 0.9 * len(moves)
    assert all(one.values.keys() == cues.weights().keys() for one in moves)
    assert {one.values["bias"] for one in examples} == {1.0}


def test_what_related_and_unrelated_networks_have_in_common_is_collected(examples: list[fit.Example]) -> None:
    pairs = [one for one in examples if one.of == fit.RELATION]
    assert {one.is_right for one in pairs} == {True, False}
    assert all(one.values.keys() == fitted_weights("relation").keys() for one in pairs)


def test_weights_are_fitted_to_what_was_right(examples: list[fit.Example]) -> None:
    weights = fit.fitted(examples)
    assert weights["cues"].keys() == cues.weights().keys()
    turned = [replace(one, is_right=not one.is_right) for one in examples]
    assert fit.fitted(turned)["cues"]["bias"] < 0 < weights["cues"]["bias"]


def test_a_case_is_scored_by_weights_that_have_not_seen_its_libraries(examples: list[fit.Example]) -> None:
    name = "torchvision.resnet18->transformers.resnet18"
    others = [one for one in examples if one.libraries.isdisjoint({"torchvision", "transformers"})]
    assert 0 < len(others) < len(examples)
    known = fit.weights_without(examples, [name])
    (score,) = fit.left_out(known, [name], with_sorted_keys=True, processes=1)
    assert score.is_perfect
    with pytest.raises(ValueError, match="no examples"):
        fit.fitted([])


def test_the_weights_of_the_package_are_those_of_the_fit() -> None:
    text = (Path(cues.__file__).parent / WEIGHTS_FILE).read_text(encoding="utf-8")
    assert "python -m benchmarks.fit" in text
