"""Real architectures: a model that is loaded from another library's weights must compute what that library computes.

A tensor in the wrong place shows in the output, since every tensor of the source has values of its own and each of
them matters to it.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from operator import attrgetter

import pytest

import autoalign
from autoalign.errors import PartialLoadWarning
from tests.pairs import FUSED_PAIRS, TIMM_TRANSFORMERS, TORCHVISION_TIMM, Pair, output, randomise, relative_difference

TOLERANCE = 1e-3  # of the largest logit; a misplaced tensor changes them by several times that


def _assert_forward_equal_after_load(pair: Pair) -> None:
    source = randomise(pair.source(), pair.image_size, seed=1)
    target = pair.target().eval()
    absent = [key for key in target.state_dict() if re.search(pair.absent, key)]
    with pytest.warns(PartialLoadWarning, match=re.escape(absent[0])) if absent else nullcontext():
        alignment = autoalign.load(target, source.state_dict())
    assert alignment.missing_keys == absent
    assert relative_difference(output(target, pair.image_size), output(source, pair.image_size)) < TOLERANCE


@pytest.mark.parametrize("pair", TORCHVISION_TIMM, ids=attrgetter("name"))
def test_torchvision_and_timm_compute_the_same_after_a_load(pair: Pair) -> None:
    _assert_forward_equal_after_load(pair)


@pytest.mark.parametrize("pair", TIMM_TRANSFORMERS, ids=attrgetter("name"))
def test_timm_and_transformers_compute_the_same_after_a_load(pair: Pair) -> None:
    _assert_forward_equal_after_load(pair)


@pytest.mark.parametrize("pair", FUSED_PAIRS, ids=attrgetter("name"))
def test_fused_and_separate_projections_compute_the_same_after_a_load(pair: Pair) -> None:
    _assert_forward_equal_after_load(pair)


def test_the_comparison_notices_two_exchanged_tensors() -> None:
    (pair,) = (pair for pair in TORCHVISION_TIMM if pair.name == "torchvision.resnet18 -> timm.resnet18")
    source = randomise(pair.source(), pair.image_size, seed=1)
    target = pair.target().eval()
    state_dict = source.state_dict()
    first, second = "layer4.1.bn1.weight", "layer4.1.bn2.weight"
    state_dict[first], state_dict[second] = state_dict[second], state_dict[first]
    target.load_state_dict(state_dict)
    assert relative_difference(output(target, pair.image_size), output(source, pair.image_size)) > 10 * TOLERANCE
