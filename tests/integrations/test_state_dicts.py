from __future__ import annotations

import pytest
import torch
from torch import nn

from autoalign import IncompatibleTensorsError, NothingLoadedError, PartialLoadWarning, ValueWarning
from autoalign.integrations.state_dicts import aligned_state_dict


class Network(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
        self.head = nn.Linear(5, classes)


def checkpoint() -> dict[str, torch.Tensor]:
    names = {"stem.0": "conv1", "stem.1": "bn1", "stem.2": "conv2", "stem.3": "bn2", "head": "fc"}
    state_dict = Network().state_dict()
    values = {key: torch.rand_like(value) if value.is_floating_point() else value for key, value in state_dict.items()}
    return {f"module.{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": value for key, value in values.items()}


def test_what_load_would_load_is_a_state_dict_that_a_model_takes() -> None:
    given, model = checkpoint(), Network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state_dict, alignment = aligned_state_dict(model, given, strict=True)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert model.load_state_dict(state_dict) == ([], [])
    assert torch.equal(model.head.weight, given["module.fc.weight"])
    assert alignment.mapping["module.bn1.running_var"] == "stem.1.running_var"


def test_counters_that_an_old_checkpoint_lacks_are_not_missing() -> None:
    given = {key: value for key, value in checkpoint().items() if not key.endswith("num_batches_tracked")}
    assert Network().load_state_dict(aligned_state_dict(Network(), given)[0]) == ([], [])


def test_it_warns_and_refuses_as_load_does() -> None:
    given = checkpoint()
    with pytest.warns(PartialLoadWarning, match="2 keep their values: head.weight, head.bias") as warned:
        state_dict, alignment = aligned_state_dict(Network(classes=7), given)
    assert warned[0].filename == __file__
    assert alignment.missing_keys == ["head.weight", "head.bias"]
    assert not any(key.startswith("head") for key in state_dict)
    with pytest.raises(IncompatibleTensorsError, match="Nothing was loaded"):
        aligned_state_dict(Network(classes=7), given, strict=True)
    with pytest.raises(NothingLoadedError, match="Nothing was loaded"):
        aligned_state_dict(nn.LSTM(7, 7), given)
    given["module.fc.weight"][0] = float("nan")
    with pytest.warns(ValueWarning, match="1 tensors of the checkpoint have NaN"):
        aligned_state_dict(Network(), given)
