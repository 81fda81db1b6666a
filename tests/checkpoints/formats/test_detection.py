from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

import autoalign
from autoalign.checkpoints.checkpoint import open_checkpoint
from autoalign.checkpoints.formats.detection import kind_of_folder
from autoalign.errors import CheckpointError
from tests.checkpoints.formats.test_damage import (
    write_legacy,
    write_metadata,
    write_optimizer_of_zero,
    write_part_of_layer,
)


def state_dict(layers: int = 12) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {f"layers.{index}.weight": torch.randn(4, 4) for index in range(layers)} | {"head.bias": torch.ones(4)}


def save_sharded(folder: Path, *, safe: bool) -> dict[str, Tensor]:
    """Save as the Hub's library does, in shards of 256 bytes."""
    tensors = state_dict()
    save_torch_state_dict(tensors, folder, max_shard_size=256, safe_serialization=safe)
    return tensors


def assert_equal(path: Path, expected: dict[str, Tensor]) -> None:
    checkpoint = open_checkpoint(path)
    assert list(checkpoint) == sorted(expected, key=list(checkpoint).index)
    assert all(torch.equal(checkpoint[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "torch"])
def test_sharded_checkpoints_are_read_by_folder_and_by_index(tmp_path: Path, safe: bool) -> None:
    tensors = save_sharded(tmp_path, safe=safe)
    (index,) = tmp_path.glob("*.index.json")
    assert len(list(tmp_path.iterdir())) > 3
    for path in (tmp_path, index):
        assert_equal(path, tensors)
        numbers = [int(key.split(".")[1]) for key in open_checkpoint(path) if key.startswith("layers")]
        assert numbers == sorted(numbers)
        assert open_checkpoint(path).path == str(path)
    with pytest.raises(CheckpointError, match="is a flat sharded checkpoint without containers, such as 'ema'"):
        open_checkpoint(index, container="ema")


def test_shards_without_an_index_are_read_if_all_are_there(tmp_path: Path) -> None:
    tensors = save_sharded(tmp_path, safe=True)
    (index,) = tmp_path.glob("*.index.json")
    index.unlink()
    assert_equal(tmp_path, tensors)
    sorted(tmp_path.iterdir())[1].unlink()
    with pytest.raises(CheckpointError, match=r"Only \d+ of the \d+ files of 'model-00001-of-000\d\d.safetensors' are"):
        open_checkpoint(tmp_path)


def test_a_folder_of_transformers(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=2, intermediate_size=8, vocab_size=5)
    model, other = BertModel(config), BertModel(config)
    for name, size in (("one", "1GB"), ("many", "1KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        alignment = autoalign.load(other, tmp_path / name, strict=True)
        assert alignment.coverage == 1
        assert open_checkpoint(tmp_path / name).config["num_attention_heads"] == 2
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    tensors = save_sharded(tmp_path / "blobs", safe=True)
    for number, path in enumerate(sorted((tmp_path / "blobs").iterdir())):
        path.rename(tmp_path / "blobs" / str(number))
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{number}")
    assert_equal(tmp_path / "snapshot", tensors)
    (tmp_path / "snapshot" / "model.safetensors.index.json").unlink()
    (tmp_path / "snapshot" / "model.safetensors.index.json").symlink_to("model.safetensors.index.json")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "snapshot" / "model.safetensors.index.json")


def write_index(folder: Path, weight_map: object) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


@pytest.mark.parametrize("name", ["../secret.safetensors", "/secret.safetensors", "..", "a/../../x", ".", "a/b"])
def test_an_index_that_leads_out_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    with pytest.raises(CheckpointError, match=r"and only files in its own folder are read|are missing"):
        open_checkpoint(write_index(folder, {"a": name}))


@pytest.mark.parametrize("name", ["x" * 300, "\x00"])
def test_an_index_that_lists_a_name_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"1 of the 1 files that .* lists are missing: 'x{0,100}") as info:
        open_checkpoint(write_index(tmp_path, {"a": name}))
    assert len(str(info.value)) < len(str(tmp_path)) + 300


def test_keys_of_very_long_numbers_are_sorted_by_them(tmp_path: Path) -> None:
    keys = [f"layers.{'9' * 5000}.w", f"layers.1{'0' * 5000}.w", "layers.9.w", "layers.10.w"]
    save_file({key: torch.ones(1) for key in keys}, tmp_path / "a.safetensors")
    assert list(open_checkpoint(tmp_path / "a.safetensors")) == [keys[2], keys[3], keys[0], keys[1]]


def test_an_index_that_lists_what_is_not_there(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "b": torch.ones(1), "c": torch.ones(1)}, tmp_path / "1.safetensors")
    with pytest.raises(CheckpointError, match=r"1 of the 2 files that .* lists are missing: '2.safetensors'. Nothing"):
        open_checkpoint(write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}))
    with pytest.raises(CheckpointError, match=r"1 tensors that .* lists are not in their files: 'x'"):
        open_checkpoint(write_index(tmp_path, {"a": "1.safetensors", "x": "1.safetensors"}))
    checkpoint = open_checkpoint(write_index(tmp_path, {"a": "1.safetensors", "b": "1.safetensors"}))
    assert (list(checkpoint), len(checkpoint.notes)) == (["a", "b"], 1)
    assert checkpoint.notes[0] == "1 tensors that the index does not list were left out: 'c'."


def test_a_shard_that_is_a_pipe_or_another_index(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="are missing: 'pipe'"):
        open_checkpoint(write_index(tmp_path, {"a": "pipe"}))
    with pytest.raises(CheckpointError, match="neither a file of torch nor of safetensors"):
        open_checkpoint(write_index(tmp_path, {"a": "model.safetensors.index.json"}))
    with pytest.raises(CheckpointError, match="is neither a file nor a folder"):
        open_checkpoint(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"weight_map": {}}', "it has no weight_map"),
        ('{"weight_map": {"a": 3}}', "it has no weight_map"),
        ('{"weight_map": ["a"]}', "it has no weight_map"),
        ('{"hidden_size": 8}', "it has no weight_map"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "it lists 'a' twice"),
        ('{"weight_map": ', "Expecting value"),
        ('{"weight_map": ' + "[" * 100_000, "recursion"),
    ],
)
def test_a_damaged_index(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    for given in (path, tmp_path):
        with pytest.raises(
            CheckpointError, match=f"could not be read as the index of a sharded checkpoint .*{problem}"
        ):
            open_checkpoint(given)


def test_the_model_is_found_beside_what_a_training_script_saves(tmp_path: Path) -> None:
    tensors = state_dict()
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save({"state": {0: {"exp_avg": torch.ones(1)}}}, tmp_path / "optimizer.pt")
    torch.save(torch.optim.Adam, tmp_path / "training_args.bin")
    torch.save({"cpu": torch.get_rng_state()}, tmp_path / "rng_state.pth")
    (tmp_path / "config.json").write_text('{"n_head": 4}')
    (tmp_path / "vocab.txt").write_text("a")
    assert_equal(tmp_path, tensors)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.config, checkpoint.notes) == ({"n_head": 4}, ())


def test_the_plain_variant_of_the_first_format_is_taken_and_the_others_are_named(tmp_path: Path) -> None:
    tensors = state_dict()
    save_file(tensors, tmp_path / "model.safetensors")
    save_file({key: tensor.half() for key, tensor in tensors.items()}, tmp_path / "model.fp16.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    save_file({"a": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    assert_equal(tmp_path, tensors)
    (note,) = open_checkpoint(tmp_path).notes
    assert note == (
        "'model.safetensors' of the folder was taken. To take another, give its path: 'model.fp16.safetensors', "
        "'consolidated.safetensors', 'pytorch_model.bin'."
    )


def test_several_models_are_not_chosen_from(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save(state_dict(), tmp_path / name)
    with pytest.raises(
        CheckpointError, match=r"is a folder; name a file in it: it holds 2 checkpoints, such as 'a.pt'"
    ):
        open_checkpoint(tmp_path)


def test_a_single_file_of_any_name_and_format(tmp_path: Path) -> None:
    tensors = {"fc/kernel": torch.ones(2, 3)}
    np.savez(tmp_path / "weights", **{key: tensor.numpy() for key, tensor in tensors.items()})  # type: ignore[arg-type]
    assert_equal(tmp_path, tensors)


def test_folders_of_folders_are_said_to_be_such(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "vae").mkdir()
    with pytest.raises(CheckpointError, match="None of its own is a checkpoint; the folders in it are 'unet', 'vae'"):
        open_checkpoint(tmp_path)


def test_an_adapter_keeps_its_configuration(tmp_path: Path) -> None:
    lora = {
        "base_model.model.fc.lora_A.weight": torch.ones(2, 4),
        "base_model.model.fc.lora_B.weight": torch.zeros(4, 2),
    }
    save_file(lora, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "base_model_name_or_path": "base"}')
    assert_equal(tmp_path, lora)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        checkpoint = open_checkpoint(path)
        assert checkpoint.config["r"] == 2
        (note,) = autoalign.align(checkpoint, {"fc.bias": torch.ones(2)}).notes[1:]
        assert note.startswith("1 layers are given as LoRA matrices, which are changes to a network's weights")


def test_a_checkpoint_of_lightning(tmp_path: Path) -> None:
    saved: dict[str, Any] = {
        "epoch": 1,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": {"model.0.weight": torch.ones(2, 2), "model.0.bias": torch.zeros(2)},
        "loops": {"fit_loop": {"state_dict": {}}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2, 2)}}}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"width": 2, "n_head": 1},
    }
    torch.save(saved, tmp_path / "last.ckpt")
    checkpoint = open_checkpoint(tmp_path / "last.ckpt")
    assert (checkpoint.container, dict(checkpoint.config)) == ("state_dict", {"width": 2, "n_head": 1})
    model = nn.Sequential(nn.Linear(2, 2))
    assert autoalign.load(model, checkpoint, strict=True).coverage == 1


def test_parts_of_zero_are_named_and_merged_ones_are_read(tmp_path: Path) -> None:
    part: dict[str, Any] = {"module": {"fc.weight": torch.empty(0)}, "ds_version": "0.16"}
    part["param_shapes"] = [{"fc.weight": torch.Size((2, 2))}]
    torch.save(part, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"is a part of a checkpoint of DeepSpeed's ZeRO.*zero_to_fp32.py"):
        open_checkpoint(tmp_path / "a.pt")
    buffers = {"norm.running_mean": torch.ones(2), "steps": torch.tensor(3)}  # which are whole in every part
    torch.save({**part, "module": {**part["module"], **buffers}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"is a part of a checkpoint of DeepSpeed's ZeRO.*zero_to_fp32.py"):
        open_checkpoint(tmp_path / "a.pt")
    torch.save({**part, "module": {"fc.weight": torch.ones(2, 2)}}, tmp_path / "b.pt")
    assert open_checkpoint(tmp_path / "b.pt").container == "module"
    folder = tmp_path / "run"
    (folder / "global_step10").mkdir(parents=True)
    (folder / "zero_to_fp32.py").touch()
    with pytest.raises(
        CheckpointError, match="'global_step10'; it is one of DeepSpeed's, whose parts its zero_to_fp32"
    ):
        open_checkpoint(folder)


def test_an_index_with_one_key_twice_is_refused_at_once(tmp_path: Path) -> None:
    entries = ",".join(f'"k{number}": "a"' for number in (*range(100_000), 0))
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{entries}}}}}')
    start = time.process_time()
    with pytest.raises(CheckpointError, match=r"it lists 'k0' twice"):
        open_checkpoint(tmp_path)
    assert time.process_time() - start < 5


def test_an_index_that_leads_elsewhere_does_not_hide_a_model_beside_it(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "other.bin.index.json").write_text('{"weight_map": {"w": "elsewhere/a.bin"}}')
    assert list(open_checkpoint(tmp_path)) == ["w"]
    with pytest.raises(CheckpointError, match="only files in its own folder are read"):
        open_checkpoint(tmp_path / "other.bin.index.json")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, memory is set aside for what is mapped")
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_a_file_may_be_larger_than_memory(tmp_path: Path, name: str) -> None:
    """Which is sparse here: its values are zeros that take no place."""
    count, path = 2**10, tmp_path / name
    if name == "a.pt":
        one = partial(torch.from_file, str(tmp_path / "data"), shared=True, size=2**29, dtype=torch.bfloat16)
        with torch.serialization.skip_data():
            torch.save({f"layers.{number}.weight": one().view(2**14, 2**15) for number in range(count)}, path)
    else:
        spec = {"dtype": "BF16", "shape": [2**14, 2**15]}
        places = [[number * 2**30, (number + 1) * 2**30] for number in range(count)]
        header = {f"layers.{number}.weight": spec | {"data_offsets": place} for number, place in enumerate(places)}
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + count * 2**30)
    assert path.stat().st_size > count * 2**30 > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    checkpoint = open_checkpoint(path)
    assert len(checkpoint) == count
    tensor = checkpoint[f"layers.{count - 1}.weight"]
    assert tensor[-1].tolist() == [0] * 2**15
    tensor[-1, 0] = 1  # which stays in memory
    assert checkpoint[f"layers.{count - 1}.weight"][-1, :2].tolist() == [1, 0]
    assert open_checkpoint(path)[f"layers.{count - 1}.weight"][-1, :2].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("write", "kind"),
    [
        (write_metadata, "folder of torch.distributed"),
        (write_optimizer_of_zero, "folder of DeepSpeed's ZeRO"),
        (write_part_of_layer, "folder of model-parallel parts"),
        (write_legacy, "folder"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_what_folders_are_called(tmp_path: Path, write: Callable[[Path], Path], kind: str) -> None:
    write(tmp_path)
    assert kind_of_folder(tmp_path) == kind
