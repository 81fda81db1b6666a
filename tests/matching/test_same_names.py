"""Sides that list the same tensors under the same names, a few layers aside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import autoalign
from autoalign.checkpoints.checkpoint import checkpoint_of
from autoalign.matching import match as aligning
from autoalign.matching.repeats import with_same_names

_CHANNELS = (3, 4, 6, 6, 8)
_SHARED: dict[str, tuple[int, ...]] = {f"features.{n}.weight": (_CHANNELS[n + 1], _CHANNELS[n], 3, 3) for n in range(4)}
_SHARED |= {f"features.{n}.bias": (_CHANNELS[n + 1],) for n in range(4)}


def _side(more: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in (_SHARED | more).items()}


_CLASSIFIERS = (
    {
        "classifier.0.weight": (16, 72),
        "classifier.0.bias": (16,),
        "classifier.3.weight": (5, 16),
        "classifier.3.bias": (5,),
    },
    {"pre.fc.weight": (16, 8, 3, 3), "pre.fc.bias": (16,), "head.fc.weight": (5, 16), "head.fc.bias": (5,)},
)


@pytest.mark.parametrize("pair", [_CLASSIFIERS, _CLASSIFIERS[::-1]])
def test_the_rest_is_matched_as_the_optimisation_would(
    pair: tuple[dict[str, tuple[int, ...]], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = map(_side, pair)
    alignment = autoalign.align(source, target)
    assert not alignment.missing_keys
    assert not alignment.unexpected_keys
    monkeypatch.setattr(aligning, "with_same_names", lambda *_: None)
    expected = autoalign.align(source, target)
    assert [(match.target, match.sources, match.operation) for match in alignment.matches] == [
        (match.target, match.sources, match.operation) for match in expected.matches
    ]


@pytest.mark.parametrize(
    ("own", "other"),
    [
        ({"a.weight": (5, 8)}, {"b.weight": (8, 5)}),  # which must be transposed
        ({"a.weight": (5, 8)}, {"a.weight": (6, 8)}),
        ({"a.weight": (6, 6, 3, 3)}, {"b.weight": (6, 6, 3, 3)}),  # as others have
        ({"a.weight": (5, 8), "b.weight": (5, 8)}, {"a.weight": (5, 8), "c.weight": (5, 8)}),
        ({"a.weight": (5, 8), "b.weight": (5, 8)}, {"d.weight": (5, 8), "c.weight": (5, 8)}),
        ({"a.kernel": (3, 3, 4, 6)}, {"b.kernel": (3, 3, 4, 6)}),  # as many elements as others have, in another layout
        (
            {"a.weight": (5, 8), "b.weight": (9, 8), "a.bias": (5,)},
            {"a.weight": (5, 8), "b.weight": (9, 8), "b.bias": (5,)},
        ),
        ({"patch.weight": (16, 3, 4, 4)}, {"projection.weight": (16, 48)}),  # in which order is not known
        ({"a.weight": (5, 8)}, {"a.weight": (5, 8), "b.weight": (6, 8)}),
    ],
)
def test_what_is_not_certain_is_left_to_the_optimisation(
    own: dict[str, tuple[int, ...]], other: dict[str, tuple[int, ...]]
) -> None:
    specs = [checkpoint_of(_side(side)).specs for side in (own, other)]
    assert with_same_names(*specs) is None
