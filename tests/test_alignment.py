"""An alignment as a value: it is compared, hashed, copied and pickled."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

import autoalign
from autoalign import Alignment, AlignmentError
from autoalign.plan.matches import Match


def sides() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    source = torchvision.models.resnet18().state_dict()
    return {f"module.{key}": tensor for key, tensor in source.items()}, torchvision.models.resnet18().state_dict()


def test_an_alignment_is_pickled_without_its_tensors(tmp_path: Path) -> None:
    source, target = sides()
    save_file(source, tmp_path / "a.safetensors")
    for given in (source, str(tmp_path / "a.safetensors")):
        alignment = autoalign.align(given, target, exclude="fc")
        copied: Alignment = pickle.loads(pickle.dumps(alignment))
        assert copied == alignment
        assert hash(copied) == hash(alignment)
        assert copied.missing_keys == ["fc.weight", "fc.bias"]
        assert str(copied) == str(alignment)
        assert copied.tensors == copied.target_tensors == {}
        applied = copied.applied_to(given, target).state_dict()
        assert all(torch.equal(applied[key], tensor) for key, tensor in alignment.state_dict().items())


def test_an_alignment_is_copied_as_itself() -> None:
    alignment = autoalign.align(*sides())
    assert copy.deepcopy(alignment) is alignment
    assert copy.copy(alignment) is alignment


def test_alignments_of_other_decisions_differ() -> None:
    source, target = sides()
    first, second = autoalign.align(source, target), autoalign.align(source, target, exclude="fc")
    assert first != second
    assert {first: 1}[autoalign.align(source, target)] == 1
    match = Match("a", ("b",), evidence={"name": 1.0})
    assert hash(match) == hash(Match("a", ("b",), evidence={"name": 1.0}))
    assert match != Match("a", ("b",), evidence={"name": 0.5})


def test_an_error_that_holds_an_alignment_is_pickled() -> None:
    source, target = sides()
    with pytest.raises(AlignmentError, match="1 of 123 source tensors is not used") as info:
        autoalign.align({**source, "other": torch.ones(2)}, target).raise_if_incomplete()
    error = pickle.loads(pickle.dumps(info.value))
    assert str(error) == str(info.value)
    assert error.alignment == info.value.alignment


def unlike_sides() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Make two sides with tied, fused, transposed, adapted, mismatched, ambiguous, excluded and unmatched tensors."""
    shared = torch.rand(9, 4)
    source = {
        **{f"{name}.weight": torch.rand(4, 4) for name in "qkv"},
        "stem.weight": torch.rand(4, 3, 2, 2),
        "norm.weight": torch.rand(4),
        "fc.weight": torch.rand(9, 4),
        "embed.weight": shared,
        "decoder.weight": shared,
        "twin1": torch.rand(7, 3),
        "twin2": torch.rand(7, 3),
        "proj.weight": torch.rand(4, 6),
        "other": torch.rand(11),
        "left.weight": torch.rand(5, 4),
    }
    table = torch.rand(9, 4)
    target = {
        "qkv.weight": torch.rand(12, 4),
        "stem.weight": torch.rand(4, 3, 2, 2),
        "norm.weight": torch.rand(4),
        "fc.weight": torch.rand(5, 4),
        "embed.weight": table,
        "decoder.weight": table,
        "one": torch.rand(7, 3),
        "proj.weight": torch.rand(6, 4),
        "extra": torch.rand(13),
        "left.weight": torch.rand(5, 4),
    }
    return source, target


def test_an_alignment_is_equal_to_itself_after_save_and_read(tmp_path: Path) -> None:
    alignment = autoalign.align(*unlike_sides(), adapt="head", exclude="left")
    assert {*alignment.status.values()} >= {"matched", "adapted", "missing"}
    assert alignment.excluded
    alignment.save(tmp_path / "a.json")
    saved = Alignment.read(tmp_path / "a.json")
    again = autoalign.align(*unlike_sides(), adapt="head", exclude="left")  # other memory, and all else the same
    for other in (saved, pickle.loads(pickle.dumps(saved)), copy.deepcopy(saved), again):
        assert other == alignment
        assert hash(other) == hash(alignment)
        assert len({other, alignment}) == 1
        assert other.render() == alignment.render()
    saved.save(tmp_path / "b.json")
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "a.json").read_bytes()


def test_a_loaded_alignment_is_equal_to_itself_after_save_and_read(tmp_path: Path) -> None:
    source, target = sides()
    model = torchvision.models.resnet18()
    alignment = autoalign.load(model, source)
    alignment.save(tmp_path / "a.json")
    assert Alignment.read(tmp_path / "a.json") == alignment == autoalign.align(source, target)


def test_alignments_of_other_ties_differ() -> None:
    source, target = unlike_sides()
    first = autoalign.align(source, target)
    second = autoalign.align({key: tensor.clone() for key, tensor in source.items()}, target)
    assert {spec.key for spec in first.source_specs} == {spec.key for spec in second.source_specs}
    assert first != second
    assert first != first.matches
