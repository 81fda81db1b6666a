"""Operations are undone bit for bit, whatever they are composed of."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import autoalign
from autoalign.alignment import Alignment
from autoalign.plan.adaptations import TakeRows
from autoalign.plan.matches import Match, Verified
from autoalign.plan.operations import (
    Concatenate,
    Copy,
    Flip,
    Grouped,
    InsertZeros,
    Operation,
    Parallel,
    Permute,
    Reshape,
    Shape,
    Split,
    Stack,
    Transpose,
    Unstack,
    chain,
    output_shapes,
)
from autoalign.plan.regions import joined, place_of
from autoalign.plan.specs import specs_of

shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


@st.composite
def whole(draw: st.DrawFn, shape: Shape) -> Operation:
    """An operation that keeps every element of a tensor of this shape."""
    kinds: list[Operation] = [Copy(), Flip(draw(st.integers(0, len(shape) - 1))), Reshape((prod(shape),))]
    kinds += [Reshape((*shape, 1)), Permute(tuple(draw(st.permutations(range(len(shape))))))]
    if len(shape) == 2:
        kinds.append(Transpose())
    return draw(st.sampled_from(kinds))


@st.composite
def views(draw: st.DrawFn, shape: Shape, depth: int = 2) -> list[Operation]:
    """Operations that take a tensor of this shape apart, in the order of the parts."""
    first = draw(whole(shape))
    (inner,) = output_shapes(first, [shape])
    dim = draw(st.integers(0, len(inner) - 1))
    if depth == 0 or inner[dim] == 1:
        return [first]
    if draw(st.booleans()) and len(inner) > 1:
        parts: list[Operation] = [Unstack(dim, index) for index in range(inner[dim])]
    else:
        cuts = sorted({0, inner[dim], *draw(st.lists(st.integers(1, inner[dim] - 1), max_size=2))})
        parts = [Split(dim, start, end - start) for start, end in pairwise(cuts)]
    return [chain(first, part, rest) for part in parts for rest in [draw(whole(output_shapes(part, [inner])[0]))]]


def alignment(source: dict[str, torch.Tensor], matches: list[Match]) -> Alignment:
    """The alignment of these matches, with a target that holds just what they load."""
    loaded = {
        match.target: match.operation.apply([source[key] for key in match.sources])[0].clone() for match in matches
    }
    return Alignment(tuple(matches), (), (), specs_of(source), specs_of(loaded), tensors=source, target_tensors=loaded)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_was_taken_apart_comes_back_bit_for_bit(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    source = {"whole": torch.randn(shape)}
    matches = []
    for place, view in enumerate(data.draw(views(shape))):
        after = data.draw(whole(output_shapes(view, [shape])[0]))
        matches.append(Match(f"part{place}", ("whole",), chain(view, after)))
    taken = alignment(source, data.draw(st.permutations(matches)))
    assert torch.equal(taken.inverse().state_dict()["whole"], source["whole"])
    again = taken.inverse().inverse().state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in taken.state_dict().items())


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_was_joined_comes_back_bit_for_bit(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    parts = data.draw(views(shape))
    join = joined(shape, parts)
    assert join is not None
    tensors = [view.apply([torch.randn(shape)])[0] for view in parts]
    before = [data.draw(whole(tuple(tensor.shape))) for tensor in tensors]
    inputs = [
        step.trace([tensor.shape])[0].restore.apply([tensor])[0] for step, tensor in zip(before, tensors, strict=True)
    ]
    source = {f"part{place}": tensor for place, tensor in enumerate(inputs)}
    back = [step.trace([tensor.shape])[0].restore for step, tensor in zip(before, tensors, strict=True)]
    undo = [step.trace([tensor.shape])[0].restore for step, tensor in zip(back, inputs, strict=True)]
    restored = alignment(source, [Match("whole", tuple(source), chain(Parallel(tuple(undo)), join))]).inverse()
    assert all(torch.equal(tensor, source[key]) for key, tensor in restored.state_dict().items())
    assert set(restored.state_dict()) == set(source)


def test_what_comes_back_is_as_sure_as_the_least_sure_of_its_parts() -> None:
    parts = {"q": (0.9, ("a", "b")), "v": (0.7, ("b", "c"))}
    taken = [
        Match(key, ("qv",), Split(0, 2 * place, 2), confidence, warnings=warnings)
        for place, (key, (confidence, warnings)) in enumerate(parts.items())
    ]
    (back,) = alignment({"qv": torch.randn(4)}, taken).inverse().matches
    assert (back.confidence, back.warnings) == (0.7, ("a", "b", "c"))


def test_experts_and_zeros_come_back() -> None:
    source = {f"{role}{expert}": torch.randn(2, 3) for expert in range(3) for role in ("gate", "up")}
    stacked = Match("experts", tuple(source), chain(Grouped(2, Concatenate(0)), Stack(0)))
    back = alignment(source, [stacked]).inverse().state_dict()
    assert all(torch.equal(back[key], tensor) for key, tensor in source.items())
    biases = {"q": torch.randn(2), "v": torch.randn(2)}
    fused = alignment(biases, [Match("qkv", ("q", "v"), chain(InsertZeros(1, (2,)), Concatenate(0)))])
    assert fused.state_dict()["qkv"][2:4].tolist() == [0, 0]
    back = fused.inverse().state_dict()
    assert all(torch.equal(back[key], tensor) for key, tensor in biases.items())


def test_what_is_lost_is_missing_in_the_inverse() -> None:
    source = {"a": torch.randn(4, 2), "b": torch.randn(4)}
    partly = alignment(source, [Match("part", ("a",), Split(0, 0, 3)), Match("rows", ("b",), TakeRows(0, 2))])
    assert partly.inverse().missing_keys == ["a", "b"]
    with pytest.raises(autoalign.NotInvertibleError, match="changes values"):
        TakeRows(0, 2).trace([(4,)])


def test_parts_that_leave_a_gap_or_overlap_are_not_joined() -> None:
    assert joined((4,), [Split(0, 0, 1), Split(0, 2, 2)]) is None
    assert joined((4,), [Split(0, 0, 3), Split(0, 2, 2)]) is None
    assert joined((2, 2), [Unstack(0, 0)]) is None
    assert sorted([Split(0, 2, 2), Split(0, 0, 2)], key=place_of)[0] == Split(0, 0, 2)


def test_the_inverse_of_a_whole_network_is_its_checkpoint() -> None:
    source = {
        f"layers.{layer}.attn.qkv.{leaf}": torch.randn(shape)
        for layer in range(3)
        for leaf, shape in (("weight", (24, 8)), ("bias", (24,)))
    }
    target = {
        f"h.{layer}.attention.{role}.{leaf}": torch.zeros(shape)
        for layer in range(3)
        for role in ("query", "key", "value")
        for leaf, shape in (("weight", (8, 8)), ("bias", (8,)))
    }
    found = autoalign.align(source, target)
    trained = replace(found, target_tensors={key: tensor.clone() for key, tensor in found.state_dict().items()})
    back = trained.inverse()
    assert not back.missing_keys
    assert all(torch.equal(back.state_dict()[key], tensor) for key, tensor in source.items())


@pytest.mark.parametrize("assign", [False, True])
def test_the_inverse_of_a_load_is_the_model_as_it_is_now(assign: bool) -> None:
    checkpoint = {"net.0.weight": torch.randn(6, 4), "net.1.weight": torch.randn(2, 6)}
    first, second = torch.nn.Linear(4, 6, bias=False), torch.nn.Linear(6, 2, bias=False)
    alignment = autoalign.load(torch.nn.Sequential(first, second), checkpoint, assign=assign)
    with torch.no_grad():
        first.weight.add_(1)
    back = alignment.inverse().state_dict()
    assert torch.equal(back["net.0.weight"], first.weight)
    assert torch.equal(back["net.1.weight"], checkpoint["net.1.weight"])


def test_what_takes_a_part_of_what_it_joins_cannot_be_undone() -> None:
    source, target = (
        {key: torch.zeros(shape) for key, shape in side}
        for side in ([("a", (2,)), ("b", (2,)), ("c", (3,))], [("ab", (3,)), ("d", (3,))])
    )
    matches = (Match("ab", ("a", "b"), chain(Concatenate(0), Split(0, 0, 3))), Match("d", ("c",)))
    inverse = Alignment(matches, (), (), specs_of(source), specs_of(target)).inverse()
    assert inverse.mapping == {"d": "c"}
    assert Verified(False, 0.5, 0.0, ()).describe([]) == "NOT equal; the outputs differ by 5.0e-01"
    with pytest.raises(ValueError, match="takes 2 inputs, not 3"):
        Parallel((Copy(), Copy())).runs("abc")


@pytest.mark.parametrize(
    ("shape", "views"),
    [
        ((4,), [Copy(), Split(0, 0, 2)]),
        ((2, 3), [Transpose(), Flip(0)]),
        ((4, 4), [Split(0, 0, 2), Split(1, 0, 2)]),
        (
            (4, 4),
            [
                chain(Split(0, 0, 2), Split(1, 0, 2)),
                chain(Split(0, 0, 2), Split(1, 2, 2)),
                chain(Split(0, 2, 2), Flip(0)),
            ],
        ),
    ],
)
def test_parts_that_do_not_make_up_a_tensor_are_not_joined(shape: Shape, views: list[Operation]) -> None:
    assert joined(shape, views) is None
