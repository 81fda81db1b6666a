"""Probes decide layouts that nothing else shows, and nothing that calls do not show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoalign
from autoalign.errors import InputError
from autoalign.verification import probe
from autoalign.verification.probe import PROBE
from benchmarks.cases import twins
from tests.matching.test_operation_pairs import DOUBTED_PAIRS, TOLERANCE, Pair, output, randomise
from tests.pairs import relative_difference

NAMES = [
    "Meta Llama without frequencies -> transformers.Llama",
    "transformers.Llama -> torchtune Llama",
    "litgpt (groups of heads) -> transformers.Llama",
    "transformers.GPTNeoX -> separate projections",
    "gated, fused with the gate last -> gated, separate",
    "timm.VisionTransformer -> vit-pytorch, patches with channels last",
]


def doubted(name: str) -> Pair:
    (pair,) = (each for each in DOUBTED_PAIRS if isinstance(each, Pair) and each.name == name)
    return pair


@pytest.mark.parametrize("name", NAMES)
def test_a_layout_that_nothing_shows_is_the_one_with_which_both_compute_the_same(name: str) -> None:
    pair = doubted(name)
    source, target = randomise(pair.source(), pair.inputs, seed=1), pair.target().eval()
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    by_keys = autoalign.align(source.state_dict(), target)
    alignment = autoalign.align(source.state_dict(), target, source_model=source)
    assert by_keys.ambiguous
    assert alignment.ambiguous == ()
    found = {match.target for match in alignment.matches if PROBE in match.evidence}
    assert found == {match.target for match in by_keys.ambiguous}
    assert any(note.startswith("Probed: ") and by_keys.ambiguous[0].warnings[0] in note for note in alignment.notes)
    assert all(torch.equal(tensor, before[key]) for key, tensor in target.state_dict().items())
    target.load_state_dict(alignment.state_dict(), strict=False)
    assert relative_difference(output(target, pair.inputs), output(source, pair.inputs)) < TOLERANCE


PARTS = [*NAMES[:2], NAMES[3], *(pair.name for pair in DOUBTED_PAIRS if pair.name.startswith("gated, separate"))]


@pytest.mark.parametrize("name", PARTS)
def test_of_networks_too_large_to_be_called_the_smallest_modules_are(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = doubted(name)
    source, target = randomise(pair.source(), pair.inputs, seed=1), pair.target().eval()
    sizes = [sum(tensor.numel() for tensor in model.parameters()) for model in (source, target)]
    monkeypatch.setattr(probe, "_MAX_ELEMENTS", max(sizes) // 2)
    alignment = autoalign.load(target, source.state_dict(), source_model=source)
    assert alignment.ambiguous == ()
    assert any(PROBE in match.evidence for match in alignment.matches)
    assert not any("too many elements" in note for note in alignment.notes)
    assert relative_difference(output(target, pair.inputs), output(source, pair.inputs)) < TOLERANCE


class Gated(nn.Module):
    """A gated layer with fused halves, the gate first or last."""

    def __init__(self, fused: str, down: str, *, gate_first: bool, gate: nn.Module) -> None:
        super().__init__()
        self.names, self.gate_first, self.gate = (fused, down), gate_first, gate
        self.stem = nn.Linear(8, 8)
        self.ff = nn.ModuleDict({fused: nn.Linear(8, 40), down: nn.Linear(20, 8)})
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        fused, down = (self.ff[name] for name in self.names)
        first, second = fused(self.stem(x)).chunk(2, -1)
        gate, value = (first, second) if self.gate_first else (second, first)
        return self.head(x + down(self.gate(gate) * value))  # type: ignore[no-any-return]


def gated(gate: nn.Module | None = None) -> tuple[Gated, Gated]:
    gate = gate or nn.SiLU()
    return Gated("w12", "w3", gate_first=True, gate=gate), Gated("proj", "out", gate_first=False, gate=gate)


def test_what_calls_do_not_show_stays_ambiguous() -> None:
    source, target = gated()
    assert autoalign.align(source.state_dict(), target, source_model=source).ambiguous == ()
    source, target = gated(nn.Identity())
    assert autoalign.align(source.state_dict(), target, source_model=source).ambiguous


def test_both_sides_that_are_modules_are_called_where_a_layout_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = gated()
    assert autoalign.align(source, target).ambiguous == ()
    monkeypatch.setattr(probe, "_MAX_ELEMENTS", 9)
    alignment = autoalign.align(source, target)
    assert alignment.ambiguous
    assert "too many elements to be called in passing (627)" in alignment.notes[-1]
    assert "meta" not in alignment.notes[-1]
    target.register_buffer("frequencies", torch.ones(2, device="meta"), persistent=False)
    assert "frequencies is on the meta device, and has no values" in autoalign.align(source, target).notes[-1]


def test_tensors_that_the_code_of_the_checkpoint_lacks_and_models_that_cannot_be_copied_do_no_harm() -> None:
    source, target = gated()
    target.extra = nn.Linear(7, 5)
    checkpoint = {**source.state_dict(), "extra.weight": torch.ones(5, 7), "extra.bias": torch.ones(5)}
    alignment = autoalign.align(checkpoint, target, source_model=source)
    assert alignment.ambiguous == ()
    assert alignment.missing_keys == []
    source.held = torch.ones(2, requires_grad=True) * 2  # which torch does not copy
    assert autoalign.align(checkpoint, target, source_model=source).ambiguous


def test_keys_of_a_checkpoint_may_have_a_prefix() -> None:
    source, target = gated()
    checkpoint = {f"module.{key}": tensor for key, tensor in source.state_dict().items()}
    alignment = autoalign.align(checkpoint, target, source_model=source)
    assert alignment.ambiguous == ()
    (found,) = (match for match in alignment.matches if match.target == "ff.proj.weight")
    assert found.sources == ("module.ff.w12.weight",) * len(found.sources)
    assert {spec.key for spec in alignment.source_specs} == checkpoint.keys()


def test_models_on_the_meta_device_are_called_too() -> None:
    with torch.device("meta"):
        source, target = gated()
    assert autoalign.align(source.state_dict(), target, source_model=source).ambiguous == ()
    assert all(tensor.is_meta for tensor in (*source.parameters(), *target.parameters()))


def test_a_difference_behind_what_is_in_doubt_is_none_of_it() -> None:
    source, target = gated()
    target.add_module("head", nn.Sequential(nn.Tanh(), nn.Linear(8, 3)))
    alignment = autoalign.align(source.state_dict(), target, source_model=source)
    assert "ff.proj.weight" not in alignment.missing_keys


def test_what_no_alternative_lists_is_found_with_the_code_of_both_where_all_is_equal_then() -> None:
    source = twins.Convolutional("c1 c2 f1 f2", channels_last=True)
    target = twins.Convolutional("conv_a conv_b fc out", channels_last=False)
    images = torch.randn(2, 3, 32, 32)
    assert autoalign.align(source.state_dict(), target).ambiguous == ()
    autoalign.load(target, source.state_dict(), source_model=source, example_inputs=images)
    assert torch.allclose(target(images), source(images), atol=1e-5)


def test_a_search_does_not_change_what_rules_say() -> None:
    source = twins.Convolutional("c1 c2 f1 f2", channels_last=True)
    target = twins.Convolutional("conv_a conv_b fc out", channels_last=False)
    rules = {"f1.weight": "fc.weight"}
    alignment = autoalign.align(source.state_dict(), target, source_model=source, rules=rules)
    (ruled,) = (match for match in alignment.matches if match.target == "fc.weight")
    assert str(ruled.operation) == "copy"


def test_the_code_may_be_what_the_configuration_beside_a_checkpoint_describes(tmp_path: Path) -> None:
    pair = doubted("transformers.Llama -> torchtune Llama")
    source: Any = pair.source()
    source.save_pretrained(tmp_path)
    target = pair.target()
    (tmp_path / "configuration_evil.py").write_text("raise SystemExit")
    assert autoalign.align(tmp_path, target).ambiguous
    alignment = autoalign.load(target, tmp_path, source_model="auto")
    assert alignment.missing_keys == []
    assert relative_difference(output(target, pair.inputs), output(source.eval(), pair.inputs)) < TOLERANCE
    assert autoalign.align(source, target, source_model="auto").ambiguous == ()
    with pytest.raises(InputError, match="needs a configuration beside the checkpoint"):
        autoalign.align(source.state_dict(), target, source_model="auto")


def test_where_the_target_alone_can_be_called_it_is_said_what_depends_on_a_layout() -> None:
    inputs = torch.randn(2, 5, 8)
    for gate, pattern in ((nn.SiLU(), r"depend on it by [1-9]\d*%"), (nn.Identity(), r"depend on it by 0%")):
        source, target = gated(gate)
        alignment = autoalign.align(source.state_dict(), target, example_inputs=inputs)
        assert alignment.ambiguous
        assert re.fullmatch(
            rf"Open: the layout of ff\.proj\.weight and 1 more; the outputs {pattern}.", alignment.notes[-1]
        )
    assert not any("Open: " in note for note in autoalign.align(source.state_dict(), target).notes)
