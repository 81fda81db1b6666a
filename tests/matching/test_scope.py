"""What takes part: rules, include and exclude, and the choice among copies."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

import autoalign
from autoalign.matching.layers import parts_of
from autoalign.matching.scope import scope_of
from autoalign.plan.matches import Caution
from autoalign.plan.operations import Permute, Transpose
from autoalign.plan.options import PatternLike
from autoalign.plan.specs import TensorSpec
from benchmarks.cases.gold import read

Shapes = dict[str, tuple[int, ...]]


def state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def blocks(template: Mapping[str, tuple[int, ...]], count: int = 3) -> Shapes:
    return {key.replace("#", str(index)): shape for index in range(count) for key, shape in template.items()}


def network(prefix: str) -> Shapes:
    template: Shapes = {"#.conv.weight": (8, 8, 3, 3), "#.conv.bias": (8,), "#.norm.weight": (8,), "#.norm.bias": (8,)}
    return {f"{prefix}{key}": shape for key, shape in blocks(template, 4).items()}


def test_of_two_copies_the_one_that_is_no_average_is_taken_and_said() -> None:
    source = state(network("student.") | network("teacher.") | {"cls.weight": (10, 8), "cls.bias": (10,)})
    alignment = autoalign.align(source, state(network("") | {"cls.weight": (10, 8), "cls.bias": (10,)}))
    assert not alignment.missing_keys
    assert {key.split(".")[0] for match in alignment.matches for key in match.sources} == {"student", "cls"}
    assert "2 copies" in alignment.notes[0]


def test_other_networks_beside_copies_are_left_out() -> None:
    decoder: Shapes = {f"decoder.{n}.conv.weight": (8, 8, 3, 3) for n in range(20)}
    source = state(network("unet.model.") | network("ema.") | decoder)
    own, other = (
        parts_of([TensorSpec(key, tuple(tensor.shape), torch.float32) for key, tensor in side.items()])
        for side in (source, state(network("")))
    )
    scope = scope_of(own, other)
    assert (scope.path[0], scope.copies) == ("unet", (("ema",),))


def test_a_choice_among_copies_is_a_warning_unless_the_model_calls_one_by_its_name() -> None:
    source = state(network("student.") | network("teacher."))
    (note,) = autoalign.align(source, state(network(""))).notes
    assert isinstance(note, Caution)
    assert note.endswith("To choose: exclude='teacher' to take 'student', or exclude='student' to take 'teacher'.")
    for exclude, taken in (("teacher", "student"), ("student", "teacher")):
        chosen = autoalign.align(source, state(network("")), exclude=exclude)
        assert {match.sources[0].split(".")[0] for match in chosen.matches} == {taken}
        assert not any(isinstance(note, Caution) for note in chosen.notes)
    called = autoalign.align(source, state(network("teacher.")))
    assert {match.sources[0].split(".")[0] for match in called.matches} == {"teacher"}
    assert not any(isinstance(note, Caution) for note in called.notes)


def test_between_equal_copies_nothing_is_chosen_until_a_rule_does() -> None:
    source, target = state(network("left.") | network("right.")), state(network(""))
    undecided = autoalign.align(source, target)
    assert not undecided.matches
    assert len(undecided.ambiguous) == len(target)
    pinned = autoalign.align(source, target, rules=[("right.2.conv.bias", "2.conv.bias")])
    assert {match.sources[0].split(".")[0] for match in pinned.matches} == {"right"}
    assert not pinned.missing_keys


def test_each_target_has_one_match_under_rules_that_cross_layers() -> None:
    source, target = state(network("h.")), state(network("g."))
    rules = [("h.0.conv.weight", "g.1.conv.weight"), ("h.2.conv.bias", "g.1.conv.bias")]
    alignment = autoalign.align(source, target, rules=rules)
    targets = [match.target for match in (*alignment.matches, *alignment.ambiguous)]
    assert len(targets) == len(set(targets))
    used = [key for match in alignment.matches for key in match.sources]
    assert len(used) == len(set(used))
    assert alignment.mapping["h.0.conv.weight"] == "g.1.conv.weight"
    assert alignment.mapping["h.2.conv.bias"] == "g.1.conv.bias"


def test_a_renaming_that_meets_another_head_reports_it() -> None:
    source = state({f"module.{key}": shape for key, shape in network("").items()} | {"module.fc.weight": (10, 8)})
    alignment = autoalign.align(source, state(network("") | {"fc.weight": (7, 8)}), rules={r"^module\.": ""})
    assert alignment.missing_keys == ["fc.weight"]
    (mismatch,) = alignment.mismatched_keys
    assert (mismatch.shape, mismatch.source_shape) == ((7, 8), (10, 8))


def test_patterns_may_fill_two_keys_from_one() -> None:
    source = {key: torch.rand(shape) for key, shape in network("shared.").items()}
    target = {
        key.replace("shared", tower): torch.zeros_like(of)
        for tower in ("encoder", "decoder")
        for key, of in source.items()
    }
    rules = [(r"^shared\.", "encoder."), (r"^shared\.", "decoder.")]
    alignment = autoalign.align(source, target, rules=rules)
    for loaded in (alignment.state_dict(), autoalign.Rules.from_json(alignment.rules().to_json()).apply(source)):
        assert loaded.keys() == target.keys()
        assert all(torch.equal(of, source[f"shared.{key.partition('.')[2]}"]) for key, of in loaded.items())
    assert {match.target for match in alignment.inverse().matches} == source.keys()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("0.conv.weight", "0.covn.weight")], "is not a key of the model"),
        ({r"^(\d)\.conv": r"\1.covn"}, "produces no key of the model"),
        ([("0.conv.weight", "0.conv.bias")], "no operation reconciles these shapes"),
        ({"nothing": "x"}, "matches no checkpoint key"),
        ([(f"{n}.conv.weight", "0.conv.weight") for n in (0, 1)], "from '0.conv.weight' and '1.conv.weight'"),
        ({"(": "x"}, "is not a valid regular expression"),
    ],
)
def test_rules_that_cannot_hold_are_refused(rules: object, message: str) -> None:
    with pytest.raises(autoalign.PatternError, match=message):
        autoalign.align(state(network("")), state(network("")), rules=rules)  # type: ignore[arg-type]


MLP = ("mlp.fc1.weight", "mlp.fc2.weight", "net.fc.weight", "head.fc", "layer4.0.fc.bias", "layer40.weight")


@pytest.mark.parametrize(
    ("exclude", "taken"),
    [
        ("fc", MLP[2:5]),  # a component, wherever it stands
        ("mlp", MLP[:2]),
        ("mlp.", MLP[:2]),
        ("0.fc", MLP[4:5]),
        ("layer4", MLP[4:5]),
        ("head.fc", MLP[3:4]),
        (("fc1", "layer40.weight"), (MLP[0], MLP[5])),
        ("re:fc", MLP[:5]),
        (re.compile(r"fc\d"), MLP[:2]),
        (r"re:^layer4\b", MLP[4:5]),
    ],
)
def test_a_plain_pattern_takes_whole_components(exclude: PatternLike, taken: tuple[str, ...]) -> None:
    side = {key: torch.ones(place + 2, 3) for place, key in enumerate(MLP)}
    for alignment in (autoalign.align(side, side, exclude=exclude), autoalign.align({}, side, exclude=exclude)):
        assert alignment.excluded == set(taken)
    assert {match.target for match in autoalign.align(side, side, include=exclude).matches} == set(taken)


def test_the_notes_say_what_each_pattern_took_on_each_side() -> None:
    source = {"m.fc.weight": torch.ones(3, 2), "m.conv.weight": torch.ones(4, 2)}
    target = {"fc.weight": torch.ones(3, 2), "fc.bias": torch.ones(3), "conv.weight": torch.ones(4, 2)}
    assert autoalign.align(source, target, exclude=("fc", "re:bias$")).notes == (
        "exclude='fc' took 2 target and 1 source tensor.",
        "exclude='re:bias$' took 1 target and 0 source tensors.",
    )
    assert autoalign.align(source, target, include=("conv", "m.fc")).notes[:2] == (
        "include='conv' took 1 of 3 target tensors.",
        "include='m.fc' took 1 of 2 source tensors.",
    )


@pytest.mark.parametrize("pattern", ["^fc", r"layer\d", "fc|head", "a*", "(b)", "fc[.]", "", ".", "x$"])
def test_a_plain_pattern_that_looks_like_a_regex_is_refused(pattern: str) -> None:
    sides = state(network("")), state(network("a."))
    with pytest.raises(autoalign.PatternError, match=r"is not a name .* write 're:.*for a regular expression") as info:
        autoalign.align(*sides, exclude=pattern)
    assert repr(f"re:{pattern}") in str(info.value)
    with pytest.raises(autoalign.PatternError, match=r"include=.* is not a name"):
        autoalign.align(*sides, include=pattern)


@pytest.mark.parametrize("pattern", ["re:(", "re:a{2,1}", "re:a{99999999999999999999}", "re:" + "(" * 5000])
def test_a_malformed_regex_is_an_error(pattern: str) -> None:
    with pytest.raises(autoalign.PatternError, match="is not a valid regular expression"):
        autoalign.align(state(network("")), state(network("a.")), exclude=pattern)


def test_an_inclusion_that_matches_nothing_is_an_error() -> None:
    sides = state(network("")), state(network("a."))
    with pytest.raises(autoalign.PatternError, match="include='zzz' matches no key of either side"):
        autoalign.align(*sides, include=("a", "zzz"))


def test_an_exclusion_that_matches_nothing_is_said() -> None:
    alignment = autoalign.align(state(network("")), state(network("a.")), exclude="zzz")
    assert alignment.notes == ("exclude='zzz' matches no key of either side.",)


def test_a_key_that_a_rule_fills_is_filled_once() -> None:
    source = {"a.weight": torch.ones(3, 2), "down": torch.ones(()), "c.weight": torch.ones(4, 3)}
    target = {"net.a.weight": torch.ones(3, 2), "net.down": torch.ones(()), "net.c.weight": torch.ones(4, 3)}
    alignment = autoalign.align(source, target, rules={"down": "net.down"})
    assert sorted(match.target for match in alignment.matches) == sorted(target)


@pytest.mark.parametrize("name", ["blinkdl.rwkv4->hf.rwkv", "x-transformers.llama-like->hf.llama"])
def test_a_rule_leaves_alone_what_it_does_not_concern(name: str) -> None:
    """What rules name keeps its place among the rest, whose order is evidence."""
    case = read(name)
    rules = {
        "blinkdl.rwkv4->hf.rwkv": [("blocks.0.ln0.weight", "rwkv.blocks.0.pre_ln.weight")],
        "x-transformers.llama-like->hf.llama": [
            (f"attn_layers.layers.{2 * i}.1.to_q.weight", f"model.layers.{i}.self_attn.q_proj.weight") for i in range(3)
        ],
    }
    before = autoalign.align(case.source, case.target)
    after = autoalign.align(case.source, case.target, rules=rules[name])
    loaded = {match.target: match.sources for match in after.matches}
    assert {match.target: match.sources for match in before.matches}.items() <= loaded.items()
    others = [match for match in after.matches if "rule" not in match.evidence and match.target in case.expressions]
    assert all(case.is_right(match.target, match) for match in others)


@pytest.mark.parametrize("is_reversed", [False, True])
def test_a_rule_lays_out_a_square_kernel_as_its_kind_does(is_reversed: bool) -> None:
    shapes: Shapes = {"0.weight": (8, 4), "0.bias": (8,), "1.weight": (8, 8), "1.bias": (8,), "2.weight": (3, 8)}
    ours = state({f"net.{key}": shape for key, shape in shapes.items()})
    theirs = state({f"Dense_{key}".replace("weight", "kernel"): shape[::-1] for key, shape in shapes.items()})
    sides, rule = (ours, theirs), ("net.1.weight", "Dense_1.kernel")
    if is_reversed:
        sides, rule = sides[::-1], rule[::-1]
    alignment = autoalign.align(*sides, rules=[rule])
    assert {match.target: match.operation for match in alignment.matches}[rule[1]] == Transpose()


def test_a_rule_permutes_a_kernel_of_another_library() -> None:
    source, target = (
        state({"c.kernel": (3, 3, 4, 8), "c.bias": (8,)}),
        state({"d.weight": (8, 4, 3, 3), "d.bias": (8,)}),
    )
    alignment = autoalign.align(source, target, rules=[("c.kernel", "d.weight")])
    assert {match.target: match.operation for match in alignment.matches}["d.weight"] == Permute((3, 2, 0, 1))


def test_moving_averages_beside_their_tensors_are_taken_and_named() -> None:
    average = "ExponentialMovingAverage"
    shapes = {"conv1/weights": (3, 3, 4, 8), "conv1/biases": (8,), "conv2/weights": (3, 3, 8, 6), "conv2/biases": (6,)}
    slots = {f"{key}/{name}": shape for key, shape in shapes.items() for name in (average, "RMSProp")}
    source = {key: torch.rand(shape) for key, shape in (shapes | slots).items()}
    target = {
        key.replace("/weights", ".weight").replace("/biases", ".bias"): torch.empty(shape[::-1][:2] + shape[:-2])
        for key, shape in shapes.items()
    }
    alignment = autoalign.align(source, target)
    assert {match.sources[0] for match in alignment.matches} == {f"{key}/{average}" for key in shapes}
    assert any(f"exclude='{average}'" in note for note in alignment.notes)
    others = autoalign.align(source, target, exclude=average)
    assert {match.sources[0] for match in others.matches} == shapes.keys()


def test_a_tensor_that_is_called_an_average_of_none_keeps_its_name() -> None:
    source = {"conv.weight": torch.rand(4, 3), "conv.weight.ema": torch.rand(4, 3), "ema": torch.rand(5)}
    target = {"conv.weight": torch.empty(4, 3), "ema": torch.empty(5)}
    matches = autoalign.align(source, target).matches
    assert {match.target: match.sources[0] for match in matches} == {"conv.weight": "conv.weight.ema", "ema": "ema"}
