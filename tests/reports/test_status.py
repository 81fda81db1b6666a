"""An alignment as a status: what share is loaded, and what is raised where all was wanted."""

from __future__ import annotations

import re

import pytest
import torch

import autoalign
from autoalign.alignment import Alignment
from autoalign.errors import AmbiguousAlignmentError, IncompatibleTensorsError, NothingLoadedError
from autoalign.plan.matches import Match
from autoalign.plan.specs import TensorSpec
from tests.alignments import MIXED


def spec(key: str, *shape: int) -> TensorSpec:
    return TensorSpec(key, shape, torch.float32)


PARTLY = Alignment(
    (Match("a.weight", ("x.weight",)),),
    (),
    (),
    (spec("x.weight", 3), spec("y", 7)),
    (spec("a.weight", 3), spec("b", 9)),
)
WHOLE = Alignment((Match("a", ("x",)),), (), (), (spec("x", 3),), (spec("a", 3),))


def test_coverage_is_told_by_elements_and_by_tensors() -> None:
    assert PARTLY.coverage == 3 / 12
    assert PARTLY.coverage_of_tensors == 1 / 2
    assert (WHOLE.coverage, WHOLE.coverage_of_tensors) == (1, 1)
    nothing = Alignment((), (), (), (), ())
    assert (nothing.coverage, nothing.coverage_of_tensors) == (1, 1)


def test_nothing_is_raised_where_all_is_matched() -> None:
    WHOLE.raise_if_missing()
    WHOLE.raise_if_unexpected()
    WHOLE.raise_if_incomplete()
    WHOLE.raise_if_ambiguous()
    WHOLE.raise_if_nothing_matched()


def test_missing_keys_are_raised_with_both_shapes() -> None:
    with pytest.raises(IncompatibleTensorsError, match="5 of 16 target tensors have no compatible source") as caught:
        MIXED.raise_if_missing()
    text = str(caught.value)
    assert re.search(r"head\.weight +\[10, 16\] float32 +nearest: fc\.weight \[1000, 16\]", text)
    assert re.search(
        r"twin1\.weight -> one\.weight +\[7, 16\] +copy of \[7, 16\], confidence 0\.50, rival: twin2.* of \[7, 16\]",
        text,
    )
    assert "source tensors are not used" not in text
    assert caught.value.alignment is MIXED


def test_unexpected_keys_are_raised_with_both_shapes() -> None:
    with pytest.raises(IncompatibleTensorsError, match="5 of 19 source tensors are not used") as caught:
        MIXED.raise_if_unexpected()
    text = str(caught.value)
    assert re.search(r"twin1\.weight +\[7, 16\] float32 +proposed for one\.weight \[7, 16\]", text)
    assert re.search(r"fc\.weight +\[1000, 16\] float32 +of another shape than head\.weight \[10, 16\]", text)
    assert "compatible source" not in text


def test_only_the_side_that_lacks_something_raises() -> None:
    extra = Alignment((Match("a", ("x",)),), (), (), (spec("x", 3), spec("y", 4)), (spec("a", 3),))
    extra.raise_if_missing()
    with pytest.raises(IncompatibleTensorsError, match="1 of 2 source tensors is not used"):
        extra.raise_if_unexpected()
    lacking = Alignment((Match("a", ("x",)),), (), (), (spec("x", 3),), (spec("a", 3), spec("b", 4)))
    lacking.raise_if_unexpected()
    with pytest.raises(IncompatibleTensorsError, match="1 of 2 target tensors has no compatible source"):
        lacking.raise_if_missing()


def test_a_fused_proposal_is_raised_with_the_shapes_of_its_sources() -> None:
    source = {f"net.{name}.weight": torch.ones(size, 8) for name, size in (("gate_proj", 6), ("up_proj", 6))}
    alignment = autoalign.align(source, {"net.net.0.proj.weight": torch.ones(12, 8)}, min_confidence=1.0)
    with pytest.raises(AmbiguousAlignmentError, match=re.escape("concatenate(dim 0) of [6, 8]")):
        alignment.raise_if_ambiguous()


def test_nothing_matched_is_raised_with_the_first_keys_of_both_sides() -> None:
    alignment = autoalign.align({"conv.weight": torch.ones(9, 2, 3, 3)}, {"fc.weight": torch.ones(4, 5)})
    with pytest.raises(NothingLoadedError, match="None of 1 target tensors has a source") as caught:
        alignment.raise_if_nothing_matched()
    text = str(caught.value)
    assert re.search(r"The first of the 1 target tensors:\n  fc\.weight +\[4, 5\] float32\n", text)
    assert re.search(r"The first of the 1 source tensors:\n  conv\.weight +\[9, 2, 3, 3\] float32\n", text)
    assert caught.value.alignment is alignment
