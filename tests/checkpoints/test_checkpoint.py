from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autoalign.checkpoints.checkpoint import Checkpoint, checkpoint_of, open_checkpoint
from autoalign.errors import CheckpointError, InputError, UnsafeCheckpointError
from autoalign.plan.specs import TensorSpec, tied_groups


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


class Attack:
    """Unpickling this without ``weights_only`` creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (str(self.path),)


def assert_equal(checkpoint: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert checkpoint.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(checkpoint[key], tensor.detach(), rtol=0, atol=0)


@pytest.fixture
def state_dict() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return Tied().state_dict()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors", ""])
def test_torch_files_are_known_by_content(
    tmp_path: Path, state_dict: dict[str, Tensor], suffix: str, legacy: bool
) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save(state_dict, path, _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(path)
    assert_equal(checkpoint, state_dict)
    assert checkpoint.path == str(path)
    assert tied_groups(checkpoint.specs) == (("embedding.weight", "head.weight"),)
    assert checkpoint.state_metadata is not None
    assert checkpoint.state_metadata["norm"] == {"version": 2}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ""])
def test_safetensors_files_are_known_by_content(tmp_path: Path, suffix: str) -> None:
    path = str(tmp_path / f"model{suffix}")
    tensors = {
        "half": torch.randn(2, 3).bfloat16(),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "small": torch.ones(3).to(torch.float8_e4m3fn),
        "mask": torch.tensor([True, False]),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    checkpoint = open_checkpoint(path)
    assert checkpoint.metadata == {"format": "pt"}
    assert {spec.key: (spec.shape, spec.dtype) for spec in checkpoint.specs} == {
        key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()
    }
    assert all(torch.equal(checkpoint[key].float(), tensor.float()) for key, tensor in tensors.items())


def test_every_dtype_of_safetensors_and_torch_is_read(tmp_path: Path) -> None:
    from safetensors.torch import _TYPES

    tensors = {name: torch.zeros(1).to(dtype) for name, dtype in _TYPES.items()}
    save_file(tensors, tmp_path / "dtypes.safetensors")
    assert {spec.key: spec.dtype for spec in open_checkpoint(tmp_path / "dtypes.safetensors").specs} == _TYPES


def test_safetensors_keys_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    tensors = {f"layers.{index}.weight": torch.zeros(1, dtype=torch.float16) for index in range(12)}
    tensors["layers.3.bias"] = torch.zeros(1)  # the format puts larger dtypes first
    save_file(tensors, tmp_path / "a.safetensors")
    numbers = [int(key.split(".")[1]) for key in open_checkpoint(tmp_path / "a.safetensors")]
    assert numbers == sorted(numbers)


def test_opening_reads_no_tensor_data(tmp_path: Path) -> None:
    path, size = tmp_path / "a.safetensors", 2**37
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, size // 8], "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)  # 128 GiB, of which the disk holds nothing
    checkpoint = open_checkpoint(path)
    assert checkpoint.specs == (TensorSpec("a", (2, size // 8), torch.float32),)
    assert (len(checkpoint), list(checkpoint), "a" in checkpoint, "b" in checkpoint) == (1, ["a"], True, False)
    assert repr(checkpoint) == f"<Checkpoint {str(path)!r}: 1 tensors, {size // 4} elements, float32>"
    with pytest.raises(KeyError, match="b"):
        checkpoint["b"]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_zip_files_are_mapped_and_code_is_always_refused(
    tmp_path: Path, state_dict: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, legacy: bool
) -> None:
    torch_load = torch.load
    options: dict[str, object] = {}

    def recording_load(file: object, **given: object) -> object:
        options.update(given)
        return torch_load(file, **given)  # type: ignore[arg-type]

    saved = {"model": state_dict, "device": torch.device("cpu")}  # which torch reads itself
    torch.save(saved, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    monkeypatch.setattr(torch, "load", recording_load)
    open_checkpoint(tmp_path / "model.pt")
    assert options["weights_only"] is True
    assert options.get("mmap", False) is not legacy


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_that_a_file_names_does_not_run_and_is_named(tmp_path: Path, legacy: bool) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    saved = {"model": {"weight": torch.ones(1)}, "args": Attack(trace)}
    torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(path)
    assert torch.equal(checkpoint["weight"], torch.ones(1))
    assert "none of it was run; ignored: posix.mkdir in 'args'." in checkpoint.notes[0]
    assert not trace.exists()
    torch.save(Attack(trace), path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UnsafeCheckpointError, match=r"was not read: its pickle asks for .*mkdir.*safe_globals") as info:
        open_checkpoint(path)
    assert [name.rpartition(".")[2] for name in info.value.unsafe_globals] == ["mkdir"]
    assert not trace.exists()
    pickle.loads(pickle.dumps(Attack(trace)))  # the attack is a real one
    assert trace.exists()


def test_all_unsafe_globals_are_named_and_can_be_allowed(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save([{"weight": torch.ones(1)}, Options(), Other()], path)
    with pytest.raises(UnsafeCheckpointError, match=r"Options, .*Other, and weights_only=True") as info:
        open_checkpoint(path)
    assert [name.rpartition(".")[2] for name in info.value.unsafe_globals] == ["Options", "Other"]
    torch.save({"state_dict": {"weight": torch.ones(1)}, "args": Options()}, path)
    with torch.serialization.safe_globals([Options]):
        assert not open_checkpoint(path).notes


class Options:
    pass


class Other:
    pass


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model.pt' does not exist. Nothing was read."):
        open_checkpoint(tmp_path / "model.pt")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder; name a file in it"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html>", "it begins with b'<!DOCTYPE html>'"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "it begins with b'version https://git-lfs"),
    ],
)
def test_other_content(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"neither a file of torch nor of safetensors: {problem}"):
        open_checkpoint(path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("kept", [0.3, 0.95])
def test_truncated_file(tmp_path: Path, kind: str, kept: float) -> None:
    path = tmp_path / "model"
    tensors = {"a": torch.randn(2000), "b": torch.randn(50)}
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"could not be read as a file of .* It may be truncated or damaged"):
        open_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_pickle_that_torch_did_not_write(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps({"a": [1.0]}))
    with pytest.raises(CheckpointError, match="could not be read as a file of torch"):
        open_checkpoint(path)


@pytest.mark.parametrize("saved", [{"epoch": 3}, {}, {"optimizer": {"state": {0: {"exp_avg": torch.zeros(1)}}}}])
def test_file_without_tensors(tmp_path: Path, saved: object) -> None:
    torch.save(saved, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"There are no tensors in .*model.pt'; its first keys are"):
        open_checkpoint(tmp_path / "model.pt")


def test_mappings_without_end_in_a_file(tmp_path: Path) -> None:
    saved: dict[str, object] = {"model": {"weight": torch.ones(1)}}
    saved["self"] = saved
    torch.save(saved, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model.pt' cannot be used. There are more than 64 mappings"):
        open_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("entries", "size", "problem"),
    [
        ('"a": [1, 0, 4], "b": [1, 0, 4]', 4, "is not the bytes"),
        ('"a": [1, 0, 4], "b": [1, 2, 6]', 6, "b .* is not the bytes 2 to 6"),
        ('"a": [1, 0, 4], "b": [1, 8, 12]', 12, "b .* is not the bytes 8 to 12"),
        ('"a": [1, 0, 8]', 8, "is not the bytes"),
        ('"a": [2, 0, 8]', 4, "it announces 8 bytes of tensors and has 4"),
        ('"a": [4611686018427387904, 0, 4]', 4, "is not the bytes"),
        ('"a": [1, 0, 4], "a": [2, 0, 8]', 8, "it lists 'a' twice"),
        ('"a": [-1, 0, 4]', 4, "numbers that are none of a tensor"),
    ],
)
def test_safetensors_with_a_header_that_is_not_true(tmp_path: Path, entries: str, size: int, problem: str) -> None:
    described = re.sub(
        r"\[(\S+), (\d+), (\d+)\]", r'{"dtype": "F32", "shape": [\1], "data_offsets": [\2, \3]}', entries
    )
    header = f"{{{described}}}".encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(CheckpointError, match=f"could not be read as a file of safetensors .*({problem})"):
        open_checkpoint(tmp_path / "a")


@pytest.mark.parametrize("length", [ord("{"), ord("{") * 256 + ord(" ")])
def test_a_header_whose_length_looks_like_json(tmp_path: Path, length: int) -> None:
    header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'.ljust(length)
    (tmp_path / "a").write_bytes(length.to_bytes(8, "little") + header + bytes(4))
    assert open_checkpoint(tmp_path / "a")["a"].item() == 0


def test_a_name_may_look_like_a_part_of_a_header(tmp_path: Path) -> None:
    save_file({'"data_offsets"': torch.ones(1), "data_offsets": torch.ones(1)}, tmp_path / "a")
    assert len(open_checkpoint(tmp_path / "a")) == 2


def test_a_compressed_file_of_torch_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    with pytest.raises(CheckpointError, match=r"is a compressed zip file, as torch writes none, of \d+ bytes when"):
        open_checkpoint(tmp_path / "b.pt")


def test_a_damaged_pickle_in_a_sound_zip_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02\x00")
        archive.writestr("a/version", b"3")
    with pytest.raises(CheckpointError, match="could not be read as a file of torch"):
        open_checkpoint(tmp_path / "a.pt")


def test_file_that_is_no_mapping(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"holds a list, not a mapping of tensors"):
        open_checkpoint(tmp_path / "model.pt")


def test_safetensors_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="There are no tensors in"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_safetensors_has_no_containers(tmp_path: Path) -> None:
    save_file({"ema.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="flat safetensors file without containers, such as 'ema'"):
        open_checkpoint(tmp_path / "model.safetensors", container="ema")


def test_choice_of_a_container_is_stated_and_can_be_made(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"epoch": 3, "ema": {"weight": torch.ones(1)}, "model": {"weight": torch.zeros(1)}}, path)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.container, checkpoint.containers) == ("model", ("ema", "model"))
    assert checkpoint.notes == (
        "The container 'model' (1 tensors) was taken, trained weights and well-known names first. "
        "Pass container= to take another: 'ema' (1 tensors).",
    )
    assert (checkpoint.copies, checkpoint.is_decided) == (("ema",), True)
    named = checkpoint_of(checkpoint, container="model")
    assert (named.container, named.copies, named.notes) == ("model", (), ())
    for other in (open_checkpoint(path, container="ema"), checkpoint_of(checkpoint, container="ema")):
        assert (other.container, other.path, other.notes) == ("ema", str(path), ())
        assert other["weight"].item() == 1
    with pytest.raises(CheckpointError, match=r"No container matches 'swa'.*'ema' \(1 tensors\), 'model'"):
        open_checkpoint(path, container="swa")


def test_single_container_needs_no_note() -> None:
    checkpoint = checkpoint_of({"state_dict": {"weight": torch.ones(2)}})
    assert (checkpoint.container, checkpoint.notes) == ("state_dict", ())


def test_module_keeps_ties_and_hands_out_detached_tensors() -> None:
    module = Tied()
    checkpoint = checkpoint_of(module)
    assert list(checkpoint) == list(module.state_dict())
    assert tied_groups(checkpoint.specs) == (("embedding.weight", "head.weight"),)
    tensor = checkpoint["embedding.weight"]
    assert not tensor.requires_grad
    assert tensor.data_ptr() == module.embedding.weight.data_ptr()
    assert module.embedding.weight.requires_grad


def test_module_with_extra_state() -> None:
    class Quantizer(nn.Linear):
        def get_extra_state(self) -> dict[str, Tensor]:
            return {"scale": torch.ones(1)}

    checkpoint = checkpoint_of(nn.Sequential(Quantizer(2, 2)))
    assert list(checkpoint) == ["0.weight", "0.bias"]
    assert list(checkpoint.extras) == ["0._extra_state"]


def test_module_without_shapes_yet() -> None:
    with pytest.raises(InputError, match=r"2 tensors of Sequential have no shape yet: 0.weight, 0.bias.*Call"):
        checkpoint_of(nn.Sequential(nn.LazyLinear(3)))


def test_mapping_is_not_changed() -> None:
    module = Tied()
    model = dict(module.named_parameters())
    mapping = {"model": model, "array": np.ones(3)}
    before = {key: id(value) for key, value in model.items()}
    checkpoint = checkpoint_of(mapping)
    assert_equal(checkpoint, dict(module.named_parameters()))
    assert {key: id(value) for key, value in model.items()} == before
    assert module.embedding.weight.requires_grad
    assert list(mapping) == ["model", "array"]


def test_open_checkpoint_is_returned_as_it_is() -> None:
    checkpoint = checkpoint_of({"weight": torch.ones(1)})
    assert checkpoint_of(checkpoint) is checkpoint
    assert checkpoint_of(checkpoint, container="") is checkpoint
    assert {checkpoint: 1}[checkpoint] == 1
    assert checkpoint != checkpoint_of({"weight": torch.ones(1)})


def test_path_may_be_a_string_or_path_like(tmp_path: Path, state_dict: dict[str, Tensor]) -> None:
    torch.save(state_dict, tmp_path / "model.pt")
    for path in (str(tmp_path / "model.pt"), tmp_path / "model.pt"):
        assert_equal(checkpoint_of(path), state_dict)


def test_empty_mapping_is_a_side_without_tensors() -> None:
    assert checkpoint_of({}).specs == ()


def test_mapping_without_tensors() -> None:
    with pytest.raises(InputError, match=r"no tensors in 'dict'; its first keys are \['epoch'\]"):
        checkpoint_of({"epoch": 3})


@pytest.mark.parametrize(
    ("side", "kind"),
    [(None, "None"), (3, "int"), ([torch.zeros(1)], "a list of Tensor"), (torch.zeros(1), "Tensor")],
)
def test_other_kinds_of_sides(side: object, kind: str) -> None:
    with pytest.raises(InputError, match=f"not {kind}. Nothing was aligned"):
        checkpoint_of(side)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_tensors_without_values(device: str) -> None:
    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        module = Tied()
    checkpoint = checkpoint_of(module)
    assert [spec.shape for spec in checkpoint.specs] == [tuple(t.shape) for t in module.state_dict().values()]
    assert tied_groups(checkpoint.specs) == (("embedding.weight", "head.weight"),)
    assert checkpoint["norm.bias"].shape == (3,)


def test_a_default_device_does_not_change_what_is_read(tmp_path: Path, state_dict: dict[str, Tensor]) -> None:
    torch.save(state_dict, tmp_path / "a.pt")
    save_file({key: tensor.clone() for key, tensor in state_dict.items()}, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        with torch.device("meta"):
            checkpoint: Checkpoint = open_checkpoint(tmp_path / name)
            assert checkpoint["head.weight"].device.type == "cpu"
        torch.testing.assert_close(checkpoint["head.weight"], state_dict["head.weight"])


def test_current_folder_is_looked_in(
    tmp_path: Path, state_dict: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(state_dict, tmp_path / "model.pt")
    monkeypatch.chdir(tmp_path)
    assert_equal(open_checkpoint(os.path.join(".", "model.pt")), state_dict)  # noqa: PTH118


def test_what_is_no_path_of_a_file() -> None:
    with pytest.raises(InputError, match="Expected a path, not bytes"):
        open_checkpoint(b"a")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="could not be read: File name too long"):
        open_checkpoint("a" * 5000)
