"""explain: every key of either side has its reasons, and the options that it names do what they say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import autoalign
from autoalign.alignment import Alignment
from autoalign.errors import InputError
from autoalign.matching.assignment import WEIGHTS
from autoalign.plan.matches import Candidate, Match
from autoalign.plan.operations import Copy
from autoalign.plan.specs import TensorSpec
from autoalign.reports.explain import Explanation
from tests.alignments import MIXED
from tests.matching.test_operation_pairs import LLAMA
from tests.reference_models.llama import MetaLlama


def shaped(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.fixture(scope="module")
def rotary() -> Alignment:
    return autoalign.align(MetaLlama(frequencies=False).state_dict(), LLAMA().state_dict())


def test_the_explanation_of_a_match(rotary: Alignment) -> None:
    key = "model.layers.1.mlp.down_proj.weight"
    explanation = rotary.explain(key)
    (match,) = (match for match in rotary.matches if match.target == key)
    assert (explanation.status, explanation.side) == ("matched", "target")
    assert explanation.confidence == match.confidence
    assert {cue.name: cue.value for cue in explanation.cues} == match.evidence
    assert {cue.name: cue.weight for cue in explanation.cues} == WEIGHTS
    weighed = [cue.value * (cue.weight or 0) for cue in explanation.cues]
    assert weighed == sorted(weighed, reverse=True)
    text = str(explanation)
    assert "[32, 56] float32 is filled from layers.1.feed_forward.w2.weight [32, 56] float32 by 'copy'" in text
    assert f"together {sum(weighed):.2f} of {sum(WEIGHTS.values()):.2f}" in text
    assert len(text.splitlines()) < 9


def test_the_explanation_of_a_layout_in_doubt(rotary: Alignment) -> None:
    explanation = rotary.explain("model.layers.1.self_attn.q_proj.weight")
    assert explanation.status == "ambiguous"
    assert explanation.rivals == rotary.ambiguous[2].alternatives
    text = str(explanation)
    assert "is proposed but not loaded, from layers.1.attention.wq.weight [32, 32] float32 by 'copy'" in text
    assert explanation.choice == rotary.choices[0]
    assert "one choice decides it with 5 others: alignment.choices[0]" in text
    assert "or one of 5 other layouts" in text
    assert "! right shape, but rotary layouts differ" in text
    assert "'config': {'rotary_interleaved': False, 'head_dim': 64}} for the model" in text
    assert "autoalign.verify(source_model, model, inputs)" in text
    source = rotary.explain("layers.1.attention.wq.weight")
    assert (source.side, source.status) == ("source", "unexpected")
    assert source.why == ("it is proposed for model.layers.1.self_attn.q_proj.weight [32, 32] float32, but not loaded",)


def test_min_confidence_loads_what_the_explanation_says(rotary: Alignment) -> None:
    key = "model.layers.1.self_attn.q_proj.weight"
    (line,) = (line for line in rotary.explain(key).remedies if line.startswith("min_confidence"))
    lowered = float(re.findall(r"[\d.]+", line)[0])
    sides = MetaLlama(frequencies=False).state_dict(), LLAMA().state_dict()
    assert autoalign.align(*sides, min_confidence=lowered).status[key] == "matched"


TWINS = shaped({"stem.weight": (8, 3, 3, 3), "one.weight": (7, 8), "two.weight": (7, 8), "end.weight": (5, 7)})


def test_the_rule_that_is_named_takes_the_rival() -> None:
    target = shaped({"a.weight": (8, 3, 3, 3), "b.weight": (7, 8), "d.weight": (5, 7)})
    alignment = autoalign.align(TWINS, target)
    explanation = alignment.explain("b.weight")
    (line,) = (line for line in explanation.remedies if line.endswith("takes the rival"))
    rules = eval(line.partition("=")[2].partition(" takes")[0])
    (rival,) = explanation.rivals
    changed = autoalign.align(TWINS, target, rules=rules)
    assert changed.mapping[rival.sources[0]] == "b.weight"
    assert "a rule says so" in str(changed.explain("b.weight"))
    assert "would have been its next best use" in str(alignment.explain(rival.sources[0]))


def test_the_exclusion_that_is_named_leaves_the_key_out() -> None:
    model = torchvision.models.resnet18()
    alignment = autoalign.align(model, model)
    (line,) = alignment.explain("layer1.0.conv1.weight").remedies
    assert line == "exclude='layer1.0.conv1.weight' leaves it out"
    pattern = eval(line.partition("=")[2].partition(" leaves")[0])
    excluded = autoalign.align(model, model, exclude=pattern)
    assert excluded.missing_keys == ["layer1.0.conv1.weight"]
    explanation = excluded.explain("layer1.0.conv1.weight")
    assert (explanation.status, explanation.why) == ("excluded", ())


@pytest.mark.parametrize("key", ["fc.weight", "a'b.weight", "fc(1).weight", "kernel:0", "re:x", "x/y"])
def test_the_exclusion_leaves_out_no_key_that_ends_alike(key: str) -> None:
    side = {key: torch.ones(2), f"net.{key}": torch.ones(3), f"{key}.x": torch.ones(4)}
    line = autoalign.align(side, side).explain(key).remedies[-1]
    pattern = eval(line.partition("=")[2].partition(" leaves")[0])
    assert autoalign.align(side, side, exclude=pattern).excluded == {key}


def test_the_adaptation_that_is_named_fills_a_mismatch() -> None:
    source = torchvision.models.resnet18(num_classes=10)
    target = torchvision.models.resnet18(num_classes=4)
    explanation = autoalign.align(source, target).explain("fc.weight")
    assert explanation.status == "mismatched"
    assert explanation.what == "[4, 512] is not filled: its counterpart is fc.weight [10, 512]"
    assert explanation.why == ("no operation makes one shape of the other (dim 0: 10, needs 4)",)
    assert explanation.remedies[0] == "adapt='head' fills it by 'take 4 rows'"
    adapted = autoalign.align(source, target, adapt="head").explain("fc.weight")
    assert adapted.status == "adapted"
    assert "align without adapt= leaves it missing" in adapted.remedies


@pytest.mark.parametrize(
    ("key", "status", "text"),
    [
        ("one.weight", "ambiguous", 'to change it: as proposed: rules=[("twin1.weight", "one.weight")]'),
        ("one.weight", "ambiguous", 'to change it: or: rules=[("twin2.weight", "one.weight")]'),
        ("head.weight", "mismatched", "its counterpart is fc.weight [1000, 16]"),
        ("extra.weight", "missing", "all 6 source tensors of this shape have other counterparts"),
        ("pooler.weight", "excluded", "left out by include or exclude"),
        ("layers.1.qk.weight", "matched", "blocks.0.q.weight [16, 16] float16 + blocks.0.k.weight [16, 16] float16"),
        ("blocks.0.q.weight", "used", "is used for layers.1.qk.weight [32, 16] float32 by 'concatenate(dim 0)'"),
        ("twin2.weight", "unexpected", "ambiguous: 1 unused target tensor has this shape"),
        ("twin2.weight", "unexpected", "rules=[('twin2.weight', 'one.weight')]"),
        ("fc.weight", "unexpected", "its counterpart head.weight has the shape [10, 16]"),
        ("ema.decay", "unexpected", "no target tensor of this shape"),
    ],
)
def test_each_status_has_its_reasons(key: str, status: str, text: str) -> None:
    explanation = MIXED.explain(key)
    assert explanation.status == status
    assert text in str(explanation)


def test_the_margin_is_given_if_scores_are_known() -> None:
    match = Match("t", ("s",), evidence={"name": 1.0, "shape": 1.0}, alternatives=(Candidate(("r",), Copy(), 1.25),))
    specs = tuple(TensorSpec(key, (2,), torch.float32) for key in "sr")
    alignment = Alignment((match,), (), (), specs, (TensorSpec("t", (2,), torch.float32),))
    assert "its confidence is 1.00, +0.35 ahead of the best rival" in str(alignment.explain("t"))


def test_an_unknown_key_is_refused_with_close_ones(rotary: Alignment) -> None:
    with pytest.raises(InputError, match=r"is not a key of the target.*Did you mean 'model\.norm\.weight'"):
        rotary.explain("model.norm.wait")
    with pytest.raises(InputError, match=r"is not a key of the target or of the source\.$"):
        replace(rotary, source_specs=(), target_specs=()).explain("x")


@given(st.data())
def test_every_key_of_either_side_is_explained(rotary: Alignment, data: Any) -> None:
    alignment = data.draw(st.sampled_from([rotary, MIXED]))
    key = data.draw(st.sampled_from([spec.key for spec in (*alignment.source_specs, *alignment.target_specs)]))
    explanation: Explanation = alignment.explain(key)
    assert explanation.key == key
    assert all(line.strip() for line in str(explanation).splitlines())
    if explanation.side == "target" and explanation.status != "excluded":
        assert explanation.status == alignment.status[key]
