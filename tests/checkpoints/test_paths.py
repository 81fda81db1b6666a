"""What is given in place of a path: patterns, lists, a home folder, open files."""

from __future__ import annotations

import gc
import io
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

import autoalign
from autoalign.checkpoints.checkpoint import checkpoint_of, open_checkpoint
from autoalign.errors import CheckpointError, InputError


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {f"layers.{index}.weight": torch.randn(index + 1, 4) for index in range(12)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of two tensors each, with an index and a configuration beside them."""
    items = list(tensors().items())
    for number in range(6):
        save_file(dict(items[2 * number : 2 * number + 2]), tmp_path / f"part{number + 5}.safetensors")
    (tmp_path / "part.index.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"heads": 2}')
    return tmp_path


def assert_all(checkpoint: autoalign.Checkpoint) -> None:
    assert list(checkpoint) == list(tensors())
    assert all(torch.equal(checkpoint[key], tensor) for key, tensor in tensors().items())


def test_patterns_and_lists_of_files_are_one_checkpoint(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"))
    pattern = f"{folder}/part*"
    several: list[Any] = [
        pattern,
        files,
        [*map(str, files), files[0]],
        [f"{folder}/part[5-7].*", f"{folder}/part[!5-7]*s"],
    ]
    for given in several:
        checkpoint = open_checkpoint(given)
        assert_all(checkpoint)
        assert checkpoint.config == {"heads": 2}
        assert len(checkpoint.opened) == 6
    assert open_checkpoint(pattern).path == pattern
    assert open_checkpoint(files).path == f"{files[0]} and 5 more"
    assert_all(checkpoint_of(files))
    assert len(open_checkpoint([files[1]])) == len(open_checkpoint(f"{folder}/part5*")) == 2


def test_mappings_of_one_name_in_several_files_become_one(tmp_path: Path) -> None:
    first, second = dict(list(tensors().items())[:5]), dict(list(tensors().items())[5:])
    torch.save({"model": first, "epoch": 3, "args": {"x": 1}}, tmp_path / "a.pt")
    torch.save({"model": second, "epoch": 4, "args": {"y": 2}}, tmp_path / "b.pt")
    checkpoint = open_checkpoint(f"{tmp_path}/?.pt", container="model")
    assert_all(checkpoint)
    torch.save({"model": {"layers.0.weight": torch.ones(1)}}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.weight is in two files of .*, such as 'c.pt'"):
        open_checkpoint(f"{tmp_path}/?.pt")


def test_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert_all(open_checkpoint("~/part*.safetensors"))
    checkpoint = open_checkpoint(Path("~/part5.safetensors"))
    assert checkpoint.path == str(folder / "part5.safetensors")
    with pytest.raises(CheckpointError, match=r"'~nobody-here/x\.pt' does not exist"):
        open_checkpoint("~nobody-here/x.pt")


def test_a_name_with_the_characters_of_a_pattern(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "a[1].safetensors")
    save_file({"other": torch.ones(1)}, tmp_path / "a1.safetensors")
    assert_all(open_checkpoint(tmp_path / "a[1].safetensors"))


class Unseekable(io.BytesIO):
    def tell(self) -> int:
        raise OSError("not seekable")


def test_open_files(folder: Path) -> None:
    content = save(tensors())
    stream = io.BytesIO(content)
    checkpoint = open_checkpoint(stream)
    assert_all(checkpoint)
    assert (checkpoint.path, stream.tell(), checkpoint.config) == ("<BytesIO>", 0, {})
    (folder / "all.bin").write_bytes(b"1234" + content)
    with (folder / "all.bin").open("rb") as file:  # from where it stands on
        file.read(4)
        assert_all(open_checkpoint(file))
        assert file.tell() == 4
    with (folder / "part5.safetensors").open("rb") as file:
        checkpoint = open_checkpoint(file)
        assert [path for path, _ in checkpoint.opened] == [folder / "part5.safetensors"]  # no copy
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(4, index + 1, bias=False) for index in range(12))
    autoalign.load(model, io.BytesIO(content), strict=True)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in tensors().items())


def test_what_torch_saved_to_memory_keeps_its_versions() -> None:
    stream = io.BytesIO()
    torch.save(nn.BatchNorm1d(3).state_dict(), stream)
    stream.seek(0)
    metadata = open_checkpoint(stream).state_metadata
    assert metadata is not None
    assert metadata[""]["version"] == 2


def test_a_temporary_copy_lasts_as_long_as_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    checkpoint = open_checkpoint(io.BytesIO(save(tensors())))
    alignment = autoalign.align(checkpoint, tensors())
    del checkpoint
    gc.collect()
    assert any(tmp_path.iterdir())
    assert torch.equal(alignment.state_dict()["layers.3.weight"], tensors()["layers.3.weight"])
    del alignment
    gc.collect()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ("none-*.pt", CheckpointError, r"No file is 'none-\*.pt'. Nothing was read"),
        ("*.json", CheckpointError, r"None of the 2 files that match .* is a checkpoint"),
        ([], InputError, "Expected a path, not list"),
        (["a", 1], InputError, "Expected a path, not list"),
        (["part5.safetensors", "x.pt"], CheckpointError, "'x.pt' does not exist"),
        (io.StringIO("a"), InputError, "<StringIO> is open as text, not as bytes"),
        (io.BytesIO(), CheckpointError, "is empty"),
        (Unseekable(b"a"), CheckpointError, "<Unseekable> could not be read: not seekable"),
    ],
)
def test_what_cannot_be_opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: Any, error: type[Exception], text: str
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(error, match=text):
        open_checkpoint(given)
