"""The short way for consistent renamings is taken only where it is right."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import HealthCheck, Phase, given, settings

import autoalign
from autoalign.matching.layers import parts_of
from autoalign.matching.repeats import is_renamed
from autoalign.plan.specs import specs_of
from tests.strategies import Case, conv_cases, perturbed, real_cases, renamed, tensors, transformer_cases

some = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def proven(source: Mapping[str, tuple[int, ...]], target: Mapping[str, tuple[int, ...]]) -> bool:
    return is_renamed(parts_of(specs_of(tensors(source))), parts_of(specs_of(tensors(target))))


@some
@given(perturbed() | renamed(real_cases) | transformer_cases() | conv_cases())
def test_what_is_proven_is_the_truth(case: Case) -> None:
    if proven(case.source, case.target):
        assert dict(zip(case.target, case.source, strict=True)) == case.truth


BLOCK = {
    "norm1.weight": (8,),
    "attn.q.weight": (8, 8),
    "attn.k.weight": (8, 8),
    "norm2.weight": (8,),
    "up.weight": (32, 8),
}


def blocks(prefix: str, names: Mapping[str, str], numbers: range) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}{number}.{names.get(key, key)}": shape for number in numbers for key, shape in BLOCK.items()} | {
        "head.weight": (5, 8)
    }


HUGGING_FACE = {"attn.q.weight": "attention.query.weight", "attn.k.weight": "attention.key.weight"}
EXCHANGED = {"attn.q.weight": "attn.k.weight", "attn.k.weight": "attn.q.weight"}
UNTOLD = {"attn.q.weight": "attn.first.weight", "attn.k.weight": "attn.second.weight"}


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (blocks("blocks.", {}, range(4)), blocks("layers.", HUGGING_FACE, range(4)), True),
        (blocks("blocks.", {}, range(4)), blocks("layers.", EXCHANGED, range(4)), False),
        (blocks("blocks.", {}, range(4)), blocks("layers.", UNTOLD, range(4)), False),
        (blocks("blocks.", {}, range(4)), blocks("refine.", {}, range(1, 5)), False),  # one of a short list may be last
        (blocks("blocks.", {}, range(8)), blocks("group.", {}, range(1, 9)), True),
        (blocks("blocks.", {}, range(8)), blocks("group.", {}, range(9, 1, -1)), False),
    ],
)
def test_names_must_tell_siblings_of_one_shape_apart(
    source: dict[str, tuple[int, ...]], target: dict[str, tuple[int, ...]], expected: bool
) -> None:
    assert proven(source, target) is expected
    assert proven(target, source) is expected


def test_wrappers_and_a_consistent_renaming_are_seen_through() -> None:
    source, target = blocks("blocks.", {}, range(12)), blocks("stack.", HUGGING_FACE, range(12))
    wrapped = {f"module.model.{key}": shape for key, shape in source.items()}
    assert proven(wrapped, target)
    alignment = autoalign.align(tensors(wrapped), tensors(target))
    assert alignment.mapping == dict(zip(wrapped, target, strict=True))
    assert min(match.confidence for match in alignment.matches) > 0.9
