"""Values that are read from a mapped file into place."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import autoalign
from autoalign.loading import fill as copying
from autoalign.loading import mapped, values
from autoalign.loading.mapped import mapped_files

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what is mapped")

Save = Callable[[dict[str, Tensor], Path], None]
SAVES: list[Save] = [save_file, torch.save]


def _network(dtype: torch.dtype = torch.float32) -> nn.Module:
    layers = (layer for width in (40, 56, 72) for layer in (nn.Linear(width, width + 16), nn.LayerNorm(width + 16)))
    return nn.Sequential(*layers).to(dtype)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have small tensors read as large ones are, in threads, and list how many bytes each call reads."""
    monkeypatch.setattr(copying, "_MIN_PARALLEL_BYTES", 1)
    monkeypatch.setattr(copying, "_MAX_READ_AHEAD_BYTES", 0)
    monkeypatch.setattr(values, "nan_count", lambda *_: 0)  # which reads too
    monkeypatch.setattr(mapped, "_CHUNK_BYTES", 5000)
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
def test_another_dtype_is_read_in_chunks(tmp_path: Path, counts: list[int], save: Save) -> None:
    state_dict, path = _saved(save, tmp_path / "file")
    model = _network(torch.float64)
    autoalign.load(model, path)
    assert _equal(model, state_dict)
    assert sum(counts) == sum(tensor.nbytes for tensor in state_dict.values())


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    order=st.permutations(range(4)),
    steps=st.lists(st.integers(1, 3), min_size=4, max_size=4),
    chunk=st.integers(8, 200),
    gap=st.integers(0, 64),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_view_is_read_as_it_would_be_copied(
    tmp_path: Path, shape: list[int], order: list[int], steps: list[int], chunk: int, gap: int
) -> None:
    path = tmp_path / "file"
    sizes = [size * step for size, step in zip(shape, steps, strict=False)]
    torch.arange(prod(sizes), dtype=torch.int64).numpy().tofile(path)
    view = torch.from_file(str(path), size=prod(sizes), dtype=torch.int64).view(sizes)
    for dim, step in enumerate(steps[: len(shape)]):
        view = view[(slice(None),) * dim + (slice(step - 1, None, step),)]
    view = view.permute([dim for dim in order if dim < len(shape)])
    patches = mock.patch.multiple(mapped, _CHUNK_BYTES=chunk, _MAX_GAP_BYTES=gap)
    with patches, mapped_files([path]) as files:
        files.find()
        for dtype in (torch.int64, torch.float64):
            target = torch.zeros(view.shape, dtype=dtype)
            assert files.read(view, target)
            assert torch.equal(target, view.to(dtype))
        (held, other) = files.read_together([view, view[:1]])
        assert torch.equal(held, view)
        assert torch.equal(other, view[:1])
        assert held.data_ptr() != view.data_ptr()
        assert sum(int(piece.sum()) for piece in files.pieces(view)) == int(view.sum())


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
    with mapped_files([path]) as files:
        files.find()
        assert files.read(source, target)
    assert torch.equal(target, torch.ones(1000))
    torch.full((1000,), 2.0).numpy().tofile(tmp_path / "new")
    (tmp_path / "new").replace(path)
    with mapped_files([path]) as files:
        files.find()
        assert not files.read(source, target)
        assert not files.read(torch.ones(1000), target)
    assert torch.equal(target, torch.ones(1000))


def test_a_default_device_does_not_keep_values_from_being_read(tmp_path: Path) -> None:
    state_dict, path = _saved(save_file, tmp_path / "file")
    models = [_network(), _network(torch.float64)]
    with torch.device("meta"):
        for model in models:
            autoalign.load(model, path)
    assert all(_equal(model, state_dict) for model in models)


def test_negated_and_conjugated_views_are_not_taken_by_their_bytes(tmp_path: Path, counts: list[int]) -> None:
    values = {"a": torch.rand(50, 40), "b": torch.rand(30, 20, dtype=torch.complex64)}
    torch.save({"a": torch._neg_view(values["a"]), "b": values["b"].conj()}, tmp_path / "file")
    model = nn.Module()
    for name, tensor in values.items():
        model.register_buffer(name, torch.zeros_like(tensor))
    autoalign.load(model, tmp_path / "file")
    assert torch.equal(model.get_buffer("a"), -values["a"])
    assert torch.equal(model.get_buffer("b"), values["b"].conj().resolve_conj())
    assert sum(counts) == sum(tensor.nbytes for tensor in values.values())


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


_CUT = """
import os, sys, warnings
import autoalign, torch
from autoalign.loading import fill, load
from safetensors.torch import save_file
from torch import nn

def network(width, **options):
    return nn.Sequential(*(nn.Linear(width, width, **options) for _ in range(6)))

def cut_at(module, name):
    real = getattr(module, name)

    def cutting(*arguments, **options):
        os.truncate(path, 3000)
        return real(*arguments, **options)

    setattr(module, name, cutting)
    return lambda: setattr(module, name, real)

path = sys.argv[1]
for width in (100, 600):  # of which one is read before anything is changed
    for save in (save_file, torch.save):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            # before anything is read, and when the model is being filled
            for module, step in ((load, "_mapped_paths"), (fill, "copy_all")):
                save({f"net.{key}": torch.ones_like(t) for key, t in network(width).state_dict().items()}, path)
                model = network(width, dtype=dtype)
                old = [parameter.detach().clone() for parameter in model.parameters()]
                undo = cut_at(module, step)
                try:
                    autoalign.load(model, path)
                    found = "loaded"
                    assert all(bool((parameter == 1).all()) for parameter in model.parameters())
                except autoalign.CheckpointError as error:
                    found = "mixed" if "holds old and new values" in str(error) else "unchanged"
                    now = zip(old, model.parameters(), strict=True)
                    assert found == "mixed" or all(torch.equal(*pair) for pair in now)
                undo()
                print(width, step, found)
"""


def test_a_cut_file_does_not_end_the_process(tmp_path: Path) -> None:
    """Whatever is copied, cast or looked at is read from the file, of whatever size it is."""
    run = subprocess.run(
        [sys.executable, "-c", _CUT, str(tmp_path / "file")], capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, (run.returncode, run.stderr[-500:])
    found = {
        "100 _mapped_paths unchanged",
        "100 copy_all loaded",
        "600 _mapped_paths unchanged",
        "600 copy_all mixed",
    }
    assert set(run.stdout.splitlines()) == found
