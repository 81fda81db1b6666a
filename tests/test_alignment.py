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
from autoalign.alignment import Match


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
    with pytest.raises(AlignmentError, match="1 of 123 source tensors has no use") as info:
        autoalign.align({**source, "other": torch.ones(2)}, target).raise_if_incomplete()
    error = pickle.loads(pickle.dumps(info.value))
    assert str(error) == str(info.value)
    assert error.alignment == info.value.alignment
