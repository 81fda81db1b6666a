"""Values that are read from a mapped file into place."""

from __future__ import annotations

import os
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import autoalign
from autoalign import copying, mapped
from autoalign.mapped import mapped_files

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what is mapped")

Save = Callable[[dict[str, Tensor], Path], None]
SAVES: list[Save] = [save_file, torch.save]


def _network(dtype: torch.dtype = torch.float32) -> nn.Module:
    layers = (layer for width in (40, 56, 72) for layer in (nn.Linear(width, width + 16), nn.LayerNorm(width + 16)))
    return nn.Sequential(*layers).to(dtype)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have even small tensors read, and list how many bytes each call reads."""
    monkeypatch.setattr(copying, "_PARALLEL", 1)
    monkeypatch.setattr(mapped, "_LEAST", 1)
    found: list[int] = []
    real = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        found.append(real(descriptor, [buffers[0][:1000]], offset))  # in pieces, as a system may
        return found[-1]

    monkeypatch.setattr(os, "preadv", preadv)
    return found


def _saved(save: Save, path: Path, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Path]:
    state_dict = {key.replace("0.", "first."): tensor for key, tensor in _network(dtype).state_dict().items()}
    save(state_dict, path)
    return state_dict, path


def _equal(model: nn.Module, state_dict: dict[str, Tensor]) -> bool:
    loaded = zip(model.state_dict().values(), state_dict.values(), strict=True)
    return all(torch.equal(own, other.to(own.dtype)) for own, other in loaded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("save", SAVES)
def test_the_values_of_a_file_are_read_into_the_model(
    tmp_path: Path, counts: list[int], save: Save, dtype: torch.dtype
) -> None:
    state_dict, path = _saved(save, tmp_path / "a name with spaces", dtype)
    model = _network(dtype)
    versions = [parameter._version for parameter in model.parameters()]
    autoalign.load(model, path)
    assert _equal(model, state_dict)
    assert sum(counts) == sum(tensor.nbytes for tensor in state_dict.values())
    assert all(now._version > before for now, before in zip(model.parameters(), versions, strict=True))


@pytest.mark.parametrize("save", SAVES)
def test_another_dtype_is_copied(tmp_path: Path, counts: list[int], save: Save) -> None:
    state_dict, path = _saved(save, tmp_path / "file")
    model = _network(torch.float64)
    autoalign.load(model, path)
    assert _equal(model, state_dict)
    assert not counts


def test_what_was_changed_in_memory_is_copied_from_there(tmp_path: Path, counts: list[int]) -> None:
    _, path = _saved(torch.save, tmp_path / "file")
    state_dict = torch.load(path, mmap=True, weights_only=True)
    for tensor in state_dict.values():
        tensor.add_(1)
    model = _network()
    autoalign.load(model, state_dict)
    assert _equal(model, state_dict)
    assert not counts


def test_swapped_bytes_are_not_read_as_they_are(tmp_path: Path, counts: list[int]) -> None:
    _, path = _saved(torch.save, tmp_path / "file")
    other = "big" if sys.byteorder == "little" else "little"
    with zipfile.ZipFile(path) as given, zipfile.ZipFile(tmp_path / "swapped", "w") as written:
        for info in given.infolist():
            content = other.encode() if info.filename.endswith("/byteorder") else given.read(info)
            written.writestr(info.filename, content)
    expected = torch.load(tmp_path / "swapped", weights_only=True)
    assert not torch.equal(expected["first.weight"], torch.load(path, weights_only=True)["first.weight"])
    model = _network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", autoalign.ValueWarning)  # such values may well be no numbers
        autoalign.load(model, tmp_path / "swapped")
    for own, value in zip(model.state_dict().values(), expected.values(), strict=True):
        assert torch.equal(own.view(torch.int32), value.view(torch.int32))
    assert not counts


@pytest.mark.usefixtures("counts")
@pytest.mark.parametrize("result", [0, OSError("no such device")])
def test_what_cannot_be_read_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: int | OSError) -> None:
    def preadv(*_: object) -> int:
        if isinstance(result, OSError):
            raise result
        return result

    monkeypatch.setattr(os, "preadv", preadv)
    state_dict, path = _saved(save_file, tmp_path / "file")
    model = _network()
    autoalign.load(model, path)
    assert _equal(model, state_dict)


@pytest.mark.usefixtures("counts")
def test_a_file_that_was_replaced_is_not_read(tmp_path: Path) -> None:
    path, target = tmp_path / "file", torch.zeros(1000)
    torch.ones(1000).numpy().tofile(path)
    source = torch.from_file(str(path), size=1000)
    with mapped_files() as files:
        assert files.read(source, target)
    assert torch.equal(target, torch.ones(1000))
    torch.full((1000,), 2.0).numpy().tofile(tmp_path / "new")
    (tmp_path / "new").replace(path)
    with mapped_files() as files:
        assert not files.read(source, target)
        assert not files.read(torch.ones(1000), target)
    assert torch.equal(target, torch.ones(1000))


def test_negated_and_conjugated_views_are_not_read_by_their_bytes(tmp_path: Path, counts: list[int]) -> None:
    values = {"a": torch.rand(50, 40), "b": torch.rand(30, 20, dtype=torch.complex64)}
    torch.save({"a": torch._neg_view(values["a"]), "b": values["b"].conj()}, tmp_path / "file")
    model = nn.Module()
    for name, tensor in values.items():
        model.register_buffer(name, torch.zeros_like(tensor))
    autoalign.load(model, tmp_path / "file")
    assert torch.equal(model.get_buffer("a"), -values["a"])
    assert torch.equal(model.get_buffer("b"), values["b"].conj().resolve_conj())
    assert not counts


@pytest.mark.usefixtures("counts")
def test_a_path_may_hold_what_ends_a_line(tmp_path: Path) -> None:
    folder = tmp_path / "a\u2028b c"
    folder.mkdir()
    state_dict, path = _saved(torch.save, folder / "file")
    model = _network()
    autoalign.load(model, path)
    assert _equal(model, state_dict)


@pytest.mark.parametrize("how", ["cut", "overwritten"])
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.usefixtures("counts")
def test_a_file_that_is_written_to_while_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Save, how: str
) -> None:
    """Other values would be loaded in silence, and what a mapping has lost ends the process."""
    _, path = _saved(save, tmp_path / "file")
    os.utime(path, (0, 0))
    real = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if path.stat().st_mtime == 0:
            if how == "cut":
                os.truncate(path, 100)
            else:
                path.write_bytes(b"\x7f" * path.stat().st_size)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(autoalign.CheckpointError, match=r"(shorter|was changed).* holds old and new values. Load"):
        autoalign.load(_network(), path)
