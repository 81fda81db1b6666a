"""Accelerate's own functions, on a model of transformers whose weights have other names."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from autoalign import DependencyError, PartialLoadWarning
from autoalign.integrations.accelerate import load_checkpoint_and_dispatch
from tests.integrations.test_hf import CONFIG, Encoder

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")


@pytest.fixture
def given(tmp_path: Path) -> tuple[dict[str, torch.Tensor], Path]:
    values = {key: torch.rand_like(value) for key, value in Encoder().state_dict().items()}
    torch.save(values, tmp_path / "own.pth")
    return values, tmp_path / "own.pth"


def empty() -> Any:
    with accelerate.init_empty_weights():
        return transformers.BertModel(CONFIG).eval()


@pytest.mark.parametrize(
    "device_map", [None, "auto", "sequential", {"": "cpu"}, {"embeddings": "cpu", "encoder": "disk", "pooler": "cpu"}]
)
def test_a_model_without_values_is_filled_and_spread(
    given: tuple[dict[str, torch.Tensor], Path], device_map: Any, tmp_path: Path
) -> None:
    values, path = given
    model = load_checkpoint_and_dispatch(
        empty(),
        path,
        device_map,
        offload_folder=tmp_path / "offloaded",
        no_split_module_classes=["BertLayer"],
        dtype="float32",
    )
    plain = transformers.BertModel(CONFIG).eval()
    plain.load_state_dict(load_checkpoint_and_dispatch(empty(), values).state_dict())
    assert torch.equal(plain.pooler.dense.weight, values["pooler.weight"])
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).last_hidden_state, plain(ids).last_hidden_state)


def test_what_gets_nothing_is_warned_of(given: tuple[dict[str, torch.Tensor], Path]) -> None:
    values = {key: value for key, value in given[0].items() if not key.startswith("pooler")}
    with pytest.warns(PartialLoadWarning, match="2 stay on meta, without values: pooler.dense.weight"):
        load_checkpoint_and_dispatch(empty(), values)


def test_without_accelerate_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(DependencyError, match="pip install accelerate"):
        load_checkpoint_and_dispatch(torch.nn.Linear(1, 1), {})
