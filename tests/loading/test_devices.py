"""Devices: real copies where there is CUDA, and the same logic on fake tensors everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autoalign.api import load
from autoalign.errors import InputError


def _cuda_is_faked() -> bool:
    """Return True if fake tensors on CUDA take values; those of torch 2.7 ask for a driver."""
    try:
        with FakeTensorMode():
            torch.empty(1, device="cuda").copy_(torch.ones(1))
    except RuntimeError:
        return False
    return True


needs_fake_cuda = pytest.mark.skipif(not _cuda_is_faked(), reason="this torch asks for a driver on fake tensors")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def network(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    with torch.device(device):  # fake tensors cannot be moved by Module.to
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, dtype=dtype), nn.BatchNorm2d(4, dtype=dtype), nn.Linear(4, 2, dtype=dtype)
        )


def renamed(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"0": "stem.conv", "1": "stem.norm", "2": "head"}
    return {names[key[0]] + key[1:]: tensor for key, tensor in state_dict.items()}


@pytest.fixture
def fake_mode() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as mode:
        yield mode


@needs_fake_cuda
@pytest.mark.usefixtures("fake_mode")
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("mine", "theirs"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_device_and_dtype_of_the_model_are_kept_on_fake_tensors(mine: str, theirs: str, assign: bool) -> None:
    model = network(mine)
    source = network(theirs, torch.bfloat16)
    parameters = [id(p) for p in model.parameters()]
    alignment = load(model, renamed(source.state_dict()), assign=assign, strict=True)
    assert {t.device.type for t in model.state_dict().values()} == {mine}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert ([id(p) for p in model.parameters()] == parameters) is not assign
    assert {t.device.type for t in alignment.state_dict().values()} == {theirs}


@needs_fake_cuda
def test_meta_model_takes_the_device_of_the_checkpoint_on_fake_tensors() -> None:
    model = network("meta")
    with FakeTensorMode():
        load(model, network("cuda"), assign=True, strict=True)
    assert {t.device.type for t in model.state_dict().values()} == {"cuda"}


@needs_fake_cuda
@pytest.mark.usefixtures("fake_mode")
def test_failing_hook_restores_a_model_of_fake_tensors() -> None:
    model = network("cuda")
    state = {key: (id(t), t.shape, t.device) for key, t in model.state_dict(keep_vars=True).items()}

    def fail(module: Any, _: object) -> None:
        module[0] = nn.Identity()
        raise ValueError("from a hook")

    model.register_load_state_dict_post_hook(fail)
    with pytest.raises(ValueError, match="from a hook"):
        load(model, network())
    assert {key: (id(t), t.shape, t.device) for key, t in model.state_dict(keep_vars=True).items()} == state


def test_a_model_on_two_devices_is_filled_on_both() -> None:
    model = network()
    model[2].to("meta")
    source = network()
    with pytest.raises(InputError, match=r"2 tensors of the model are on the meta device.*: 2.weight, 2.bias"):
        load(model, source)
    first = model[0].weight
    load(model, source, assign=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))
    assert model[0].weight is not first


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("mine", "theirs"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_values_cross_devices(mine: str, theirs: str, assign: bool) -> None:
    model, source = network(mine), network(theirs, torch.bfloat16)
    pointers = [p.data_ptr() for p in model.parameters()]
    load(model, renamed(source.state_dict()), assign=assign, strict=True)
    assert {t.device.type for t in model.state_dict().values()} == {mine}
    for loaded, given in zip(model.state_dict().values(), source.state_dict().values(), strict=True):
        torch.testing.assert_close(loaded, given.to(mine, loaded.dtype), rtol=0, atol=0)
    assert ([p.data_ptr() for p in model.parameters()] == pointers) is not assign


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_file_saved_from_cuda_is_loaded_into_either_device(tmp_path: Path, kind: str) -> None:
    source, path = network("cuda"), tmp_path / "model"
    save: Any = save_file if kind == "safetensors" else torch.save
    save(source.state_dict(), path)
    for device in ("cpu", "cuda"):
        model = network(device)
        load(model, path, strict=True)
        for loaded, given in zip(model.state_dict().values(), source.state_dict().values(), strict=True):
            torch.testing.assert_close(loaded, given.to(device), rtol=0, atol=0)


@pytest.mark.cuda
@needs_cuda
def test_failing_hook_restores_a_model_on_cuda() -> None:
    model = network("cuda")
    before = {key: (t.data_ptr(), t.clone()) for key, t in model.state_dict().items()}

    def fail(*_: object) -> None:
        raise ValueError("from a hook")

    model.register_load_state_dict_post_hook(fail)
    with pytest.raises(ValueError, match="from a hook"):
        load(model, network())
    for key, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[key][0]
        torch.testing.assert_close(tensor, before[key][1], rtol=0, atol=0)


@pytest.mark.cuda
@needs_cuda
def test_loading_a_plain_model_takes_no_second_copy_on_cuda() -> None:
    model = nn.Sequential(*(nn.Linear(512, 512 + index, bias=False, device="cuda") for index in range(8)))
    source = {key: torch.ones(tensor.shape) for key, tensor in model.state_dict().items()}
    load(model, source)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    load(model, source)
    assert torch.cuda.max_memory_allocated() - before < 512 * 520 * 4 * 2
    assert all(bool((p == 1).all()) for p in model.parameters())
