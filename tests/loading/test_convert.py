from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import autoalign
from autoalign.api import convert
from autoalign.errors import (
    CheckpointError,
    IncompatibleTensorsError,
    InputError,
    NothingLoadedError,
    OutputError,
    PartialLoadWarning,
)
from autoalign.loading.convert import shard_size


class Attention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        for name in ("qkv",) if fused else ("query", "key", "value"):
            self.add_module(name, nn.Linear(8, 24 if fused else 8))
        self.add_module("proj" if fused else "dense", nn.Linear(8, 8))


class Network(nn.Module):
    """Two blocks and a head, with fused or separate projections."""

    def __init__(self, fused: bool, classes: int = 5) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.blocks = nn.ModuleList(Attention(fused) for _ in range(2))
        self.head = nn.Linear(8, classes)


def source_file(folder: Path, **metadata: str) -> Path:
    torch.manual_seed(0)
    path = folder / "source.safetensors"
    save_file(Network(fused=False).state_dict(), path, metadata or None)
    return path


def meta(model: type[nn.Module], **options: object) -> nn.Module:
    with torch.device("meta"):
        return model(**options)


def expected(path: Path) -> dict[str, Tensor]:
    """What loading gives, which is tested on its own."""
    return autoalign.align(path, Network(fused=True)).state_dict()


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


def test_a_checkpoint_is_written_in_the_names_of_a_target_on_meta(tmp_path: Path) -> None:
    path = source_file(tmp_path, author="them", format="np")
    progress: list[tuple[int, int]] = []
    alignment = convert(
        path,
        meta(Network, fused=True),
        tmp_path / "out.safetensors",
        metadata={"license": "MIT"},
        progress=lambda *counts: progress.append(counts),
    )
    assert not alignment.missing_keys
    assert same(load_file(tmp_path / "out.safetensors"), expected(path))
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"author": "them", "license": "MIT", "format": "pt"}
    assert names_in(tmp_path) == ["out.safetensors", "source.safetensors"]
    assert progress == [(done, 12) for done in range(1, 13)]
    model = Network(fused=True)
    model.load_state_dict(load_file(tmp_path / "out.safetensors"))  # strictly


def test_a_large_output_is_sharded_as_by_hugging_face(tmp_path: Path) -> None:
    path = source_file(tmp_path)
    out = tmp_path / "new" / "folder"
    convert(path, meta(Network, fused=True), out, max_shard_size=1000)
    shards = [name for name in names_in(out) if name.endswith(".safetensors")]
    assert shards == [f"model-0000{number}-of-0000{len(shards)}.safetensors" for number in range(1, len(shards) + 1)]
    assert names_in(out) == sorted([*shards, "model.safetensors.index.json"])
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = {name: load_file(out / name) for name in shards}
    assert index["weight_map"] == {key: name for name, tensors in held.items() for key in tensors}
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for ts in held.values() for tensor in ts.values())}
    for tensors in held.values():
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 1000
    assert same(dict(autoalign.open_checkpoint(out)), expected(path))
    convert(out, meta(Network, fused=False), tmp_path / "back.safetensors", strict=True)
    assert same(load_file(tmp_path / "back.safetensors"), load_file(path))


def test_transformers_reads_a_sharded_output(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertModel(config)
    renamed = {f"net.{key.replace('attention', 'attn')}": value for key, value in model.state_dict().items()}
    config.save_pretrained(tmp_path)
    convert(renamed, model, tmp_path, max_shard_size="4KB", strict=True)
    read = transformers.BertModel.from_pretrained(tmp_path)
    assert same(dict(read.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("dtype", [torch.float16, "bfloat16"])
def test_floating_point_tensors_are_converted(tmp_path: Path, dtype: torch.dtype | str) -> None:
    source = {"bn.weight": torch.full((4,), 1 / 3), "bn.num_batches_tracked": torch.tensor(7)}
    convert(source, source, tmp_path / "out.safetensors", dtype=dtype)
    found = load_file(tmp_path / "out.safetensors")
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert torch.equal(found["bn.weight"], source["bn.weight"].to(wanted))
    assert found["bn.num_batches_tracked"].dtype == torch.int64
    assert found["bn.num_batches_tracked"] == 7


def test_each_of_two_tied_keys_is_written(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["embed"].weight
    source = {"wte.weight": torch.rand(9, 4)}
    convert(source, model, tmp_path / "out.safetensors", rules=[("wte.weight", "embed.weight")])
    assert {key: tensor.tolist() for key, tensor in load_file(tmp_path / "out.safetensors").items()} == {
        key: source["wte.weight"].tolist() for key in ("embed.weight", "head.weight")
    }


def test_what_is_matched_is_written_and_the_rest_is_said(tmp_path: Path) -> None:
    path, out = source_file(tmp_path), tmp_path / "out.safetensors"
    with pytest.warns(PartialLoadWarning, match=r"Writing 10 of 12 .*2 are not in the output: head.weight, head.bias"):
        alignment = convert(path, meta(Network, fused=True, classes=9), out)
    assert alignment.missing_keys == ["head.weight", "head.bias"]
    assert load_file(out).keys() == {match.target for match in alignment.matches}
    convert(path, meta(Network, fused=True), out, exclude="head", overwrite=True)  # which is no surprise
    with pytest.raises(
        IncompatibleTensorsError, match=r"(?s)2 of 12 target.*Nothing was written.\nPass strict=False to write the 10"
    ):
        convert(path, meta(Network, fused=True, classes=9), tmp_path / "strict.safetensors", strict=True)
    assert names_in(tmp_path) == ["out.safetensors", "source.safetensors"]


def test_nothing_to_write_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NothingLoadedError, match=r"with the 2 tensors of Linear. Nothing was written."):
        convert({"x": torch.ones(7, 7, 7)}, nn.Linear(2, 3), tmp_path / "out.safetensors")
    assert names_in(tmp_path) == []


def test_an_output_that_is_there_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    path, out = source_file(tmp_path), tmp_path / "out"
    convert(path, meta(Network, fused=True), out, max_shard_size=1000)
    before = names_in(out)
    (out / "config.json").write_text("{}")
    with pytest.raises(
        OutputError, match=r"model-00001-of-0000\d.safetensors' exists. Nothing was written. Pass overw"
    ):
        convert(path, meta(Network, fused=True), out)
    assert names_in(out) == sorted([*before, "config.json"])
    convert(path, meta(Network, fused=True), out, overwrite=True)
    assert names_in(out) == ["config.json", "model.safetensors"]  # with no index or shard that contradicts it
    assert same(dict(autoalign.open_checkpoint(out)), expected(path))


def test_a_file_is_converted_over_itself(tmp_path: Path) -> None:
    path = source_file(tmp_path)
    wanted = {key: value.clone() for key, value in expected(path).items()}
    convert(path, meta(Network, fused=True), path, overwrite=True)
    assert same(load_file(path), wanted)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_broken_run_leaves_everything_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    path, out = source_file(tmp_path), tmp_path / "out"
    convert(path, meta(Network, fused=False), out)
    before = (out / "model.safetensors").read_bytes()

    def stop(done: int, _: int) -> None:
        if done == 5:
            raise error("stopped")

    for place in (out, tmp_path / "new"):
        with pytest.raises(error, match="stopped"):
            convert(path, meta(Network, fused=True), place, max_shard_size=800, overwrite=True, progress=stop)
    assert names_in(tmp_path) == ["out", "source.safetensors"]
    assert names_in(out) == ["model.safetensors"]
    assert (out / "model.safetensors").read_bytes() == before


def test_a_checkpoint_without_values_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"on the meta device and has no values. Nothing was written."):
        convert(meta(Network, fused=True), Network(fused=True), tmp_path / "out.safetensors")
    assert names_in(tmp_path) == []


def test_a_file_that_was_cut_off_after_it_was_opened_writes_nothing(tmp_path: Path) -> None:
    path = source_file(tmp_path)
    checkpoint = autoalign.open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="was changed after it was opened"):
        convert(checkpoint, Network(fused=True), tmp_path / "out.safetensors")
    assert names_in(tmp_path) == ["source.safetensors"]


def test_values_that_only_the_target_has_are_kept_where_it_has_them(tmp_path: Path) -> None:
    source = {"embed.weight": torch.rand(4, 3), "fc.weight": torch.rand(2, 3)}
    target = {"embed.weight": torch.rand(6, 3), "fc.weight": torch.empty(2, 3)}
    convert(source, target, tmp_path / "out.safetensors", adapt="vocab")
    found = load_file(tmp_path / "out.safetensors")["embed.weight"]
    assert torch.equal(found, torch.cat([source["embed.weight"], target["embed.weight"][4:]]))
    on_meta = {key: value.to("meta") for key, value in target.items()}
    with pytest.raises(InputError, match=r"embed.weight is on the meta device and has no values that 'take 4 rows"):
        convert(source, on_meta, tmp_path / "other.safetensors", adapt="vocab")
    assert names_in(tmp_path) == ["out.safetensors"]


def test_states_that_are_no_tensors_are_named(tmp_path: Path) -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> object:
            return {"step": 3}

        def set_extra_state(self, state: object) -> None: ...

    alignment = convert(Stateful(2, 2), nn.Linear(2, 2), tmp_path)
    assert names_in(tmp_path) == ["model.safetensors"]
    (note,) = alignment.notes
    assert note == "1 extra states of modules are not tensors and are not written: _extra_state."


def test_counters_that_a_checkpoint_is_too_old_for_are_not_missing(tmp_path: Path) -> None:
    source = {key: value for key, value in nn.BatchNorm2d(3).state_dict().items() if "num" not in key}
    with pytest.warns(PartialLoadWarning, match="1 are not in the output: num_batches_tracked"):
        convert(source, dict(nn.BatchNorm2d(3).state_dict()), tmp_path / "mapping.safetensors")
    alignment = convert(source, nn.BatchNorm2d(3), tmp_path / "module.safetensors", strict=True)
    assert any("1 num_batches_tracked are not written" in note for note in alignment.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "onnx"}, r"format='onnx' cannot be written. Nothing was written. Choose safetensors"),
        ({"dtype": "int8"}, r"dtype='int8' is not a floating-point dtype"),
        ({"dtype": "nonsense"}, r"dtype='nonsense' is not a floating-point dtype"),
        ({"max_shard_size": 0}, r"max_shard_size=0 is not a number of bytes"),
        ({"max_shard_size": "5 bananas"}, r"max_shard_size='5 bananas' is not a number of bytes"),
        ({"metadata": 3}, r"metadata= takes a mapping of texts, not int. Nothing was written"),
        ({"metadata": {"epoch": 3}}, r"The metadata of 'epoch' is not a text"),
        ({"output_path": "out.pt"}, r"'out.pt' would be a safetensors file; name it \*.safetensors"),
    ],
)
def test_wrong_arguments_are_errors(tmp_path: Path, options: dict[str, object], message: str) -> None:
    options = {"output_path": tmp_path / "out.safetensors", **options}
    with pytest.raises(InputError, match=message):
        convert(nn.Linear(2, 2), nn.Linear(2, 2), **options)  # type: ignore[arg-type]
    assert names_in(tmp_path) == []


def test_sizes_are_read_as_hugging_face_does() -> None:
    assert [shard_size(text) for text in ("200MB", "1kb", "3", "2 TiB")] == [200_000_000, 1000, 3, 2 * 1024**4]


_PEAK = """
import sys, torch
from autoalign import align, convert
from tests.memory import peak_of

with torch.device("meta"):
    target = {f"blocks.{i}.{name}": torch.empty(size) for i in range(6) for name, size in
        [("q.weight", (1024, 1024)), ("k.weight", (1024, 1024)), ("v.weight", (1024, 1024)),
         ("up.weight", (1024, 4096))]}
source = sys.argv[1]
align(source, target)  # imports what it needs
options = {"strict": True, "dtype": "float16", "max_shard_size": "50MB"}
print(peak_of(lambda: convert(source, target, sys.argv[2] + "/out", **options)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_little_more_than_the_largest_tensor_is_in_memory(tmp_path: Path) -> None:
    tensors = {}
    for block in range(6):
        tensors[f"h.{block}.qkv.weight"] = torch.ones(3072, 1024)
        tensors[f"h.{block}.up.kernel"] = torch.ones(4096, 1024)  # transposed
    largest, total = 2**24, sum(tensor.nbytes for tensor in tensors.values())
    save_file(tensors, tmp_path / "source.safetensors")
    del tensors
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path / "source.safetensors"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert total > 2 * (largest + 2**26)
    assert int(done.stdout) < largest + 2**26
    assert len(names_in(tmp_path / "out")) == 2 + 1


def test_a_distributed_checkpoint_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    checkpoint = {f"{name}.weight": torch.randn(4, 4) for name in "qkv"} | {"norm.weight": torch.randn(4)}
    target = {"qkv.weight": torch.empty(12, 4), "ln.weight": torch.empty(4)}
    folder = tmp_path / "step1"
    alignment = autoalign.convert(checkpoint, target, folder, format="dcp", dtype="bfloat16")
    written = autoalign.open_checkpoint(folder)
    assert set(written) == {match.target for match in alignment.matches} == set(target)
    assert torch.equal(written["qkv.weight"], torch.cat([checkpoint[f"{name}.weight"] for name in "qkv"]).bfloat16())
    with pytest.raises(autoalign.OutputError, match="not a new or empty folder"):
        autoalign.convert(checkpoint, target, folder, format="dcp", overwrite=True)
    with pytest.raises(autoalign.InputError, match="has no metadata of its own"):
        autoalign.convert(checkpoint, target, tmp_path / "step2", format="dcp", metadata={"by": "us"})

    def fail(done: int, _all: int) -> None:
        raise KeyboardInterrupt(done)

    with pytest.raises(KeyboardInterrupt, match="1"):
        autoalign.convert(checkpoint, target, tmp_path / "step2", format="dcp", progress=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["step1"]


def test_a_distributed_checkpoint_is_written_to_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "step").mkdir()
    monkeypatch.chdir(tmp_path / "step")
    autoalign.convert({"a": torch.ones(2)}, {"a": torch.empty(2)}, ".", format="dcp")
    assert torch.equal(autoalign.open_checkpoint(tmp_path / "step")["a"], torch.ones(2))


_STEPS = """
import os, signal, sys, warnings
from pathlib import Path
import torch
import autoalign

warnings.simplefilter("error")
torch.set_num_threads(1)
root = Path(sys.argv[1])
target = {f"layers.{number}.weight": torch.empty(2, number + 1, device="meta") for number in range(6)}
old, new = ({f"net.{key}": torch.full(value.shape, fill) for key, value in target.items()} for fill in (1.0, 2.0))
CALLS = ("replace", "rename", "unlink", "rmdir", "mkdir")
os.fsync = lambda _: None  # which takes long and is for when the machine stops


def write(values, folder, size, **options):
    autoalign.convert(values, target, folder / "o.safetensors", max_shard_size=size, **options)


def killed(place, *arguments, **options):
    process = os.fork()
    if process:
        return bool(os.waitpid(process, 0)[1])
    def step(call):
        def counted(*given, **named):
            nonlocal place
            place -= 1
            if place < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*given, **named)
        return counted
    for name in CALLS:
        setattr(os, name, step(getattr(os, name)))
    try:
        write(*arguments, **options)
    finally:
        os._exit(0)


def opened(path):
    values = {float(value) for tensor in autoalign.open_checkpoint(path).values() for value in tensor.unique()}
    assert len(values) == 1, (sorted(os.listdir(path)), values)
    return values.pop()


for before in ("nothing", "100GB", "40", "40 without index"):
    for after in ("100GB", "40"):
        found, place = [], 0
        while True:
            folder = root / f"{before} {after} {place}"
            folder.mkdir()
            if before != "nothing":
                write(old, folder, before.split()[0])
            if "without" in before:
                (folder / "o.safetensors.index.json").unlink()
            if not killed(place, new, folder, after, overwrite=True):
                break
            try:
                found.append(opened(folder))
            except autoalign.CheckpointError as error:
                assert before == "nothing" and "None of its own is a checkpoint" in str(error), error
                found.append(1.0)
            index = folder / "o.safetensors.index.json"
            if index.exists():
                opened(index)
            write(new, folder, after, overwrite=before != "nothing" or 2.0 in found)
            assert opened(folder) == 2
            own = sorted(os.listdir(folder))
            assert not any(name.startswith(".") for name in own), own
            assert len(own) == {"100GB": 1, "40": 6}[after], own
            place += 1
        assert found == sorted(found) and 1 in found and (2 in found), (before, after, found)
        print(before, after, found)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks and kills")
def test_a_killed_run_leaves_all_of_the_old_output_or_all_of_the_new(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _STEPS, str(tmp_path)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 8


@pytest.mark.parametrize("before", ["100GB", "1KB"])
@pytest.mark.parametrize("after", ["100GB", "1KB"])
def test_a_step_that_fails_leaves_all_of_the_old_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    out, target = tmp_path / "out", meta(Network, fused=True)
    older, newer = ({k: v + more for k, v in Network(fused=True).state_dict().items()} for more in (0, 1))
    convert(older, target, out, max_shard_size=before)
    names = names_in(out)
    convert(newer, target, tmp_path / "new", max_shard_size=after)
    replace = os.replace
    for allowed in range(len(names_in(tmp_path / "new"))):
        left = allowed

        def failing(source: Path, target: Path) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise PermissionError("not now")
            replace(source, target)

        monkeypatch.setattr(os, "replace", failing)
        with pytest.raises(OutputError, match=r"not now. Nothing is left of it."):
            convert(newer, target, out, max_shard_size=after, overwrite=True)
        assert names_in(out) == names
        assert same(dict(autoalign.open_checkpoint(out)), older)
    monkeypatch.undo()
    convert(newer, target, out, max_shard_size=after, overwrite=True)
    assert same(dict(autoalign.open_checkpoint(out)), newer)
    assert len(names_in(out)) == len(names_in(tmp_path / "new"))


def test_what_a_killed_run_left_of_a_distributed_checkpoint_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".step1.0123abcd.tmp").mkdir()
    (tmp_path / ".step1.0123abcd.tmp" / "__0_0.distcp").write_bytes(b"half")
    convert({"a": torch.ones(2)}, {"a": torch.empty(2)}, tmp_path / "step1", format="dcp")
    assert names_in(tmp_path) == ["step1"]


def test_an_error_keeps_the_note_on_extra_states(tmp_path: Path) -> None:
    source = {"a.weight": torch.ones(3), "a._extra_state": {"scale": 2}}
    with pytest.raises(NothingLoadedError) as caught:
        convert(source, {"b.weight": torch.ones(5, 7)}, tmp_path / "out")
    assert any(note.startswith("1 extra states of modules") for note in caught.value.alignment.notes)


def test_a_copy_without_a_target_has_its_own_names_and_ties(tmp_path: Path) -> None:
    weight = torch.rand(4, 3)
    side = {"module._orig_mod.embed.weight": weight, "module._orig_mod.head.weight": weight, "module.n.0.w": weight + 1}
    torch.save({"model": side, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}, tmp_path / "a.pth")
    alignment = convert(tmp_path / "a.pth", None, tmp_path / "a.safetensors")
    assert any("embed.weight = module._orig_mod.head.weight" in note for note in alignment.notes)
    written = load_file(tmp_path / "a.safetensors")
    assert written.keys() == side.keys()
    assert all(torch.equal(written[key], value) for key, value in side.items())
    convert(tmp_path / "a.pth", None, tmp_path / "b.safetensors", unwrap=True, exclude="n", dtype="bfloat16")
    assert {key: value.dtype for key, value in load_file(tmp_path / "b.safetensors").items()} == {
        "embed.weight": torch.bfloat16,
        "head.weight": torch.bfloat16,
    }


def test_copies_that_cannot_be_made(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(InputError, match=r"rules= needs a target\. Nothing was written"):
        convert({"a": torch.ones(2)}, None, path, rules={"a": "b"})
    with pytest.raises(InputError, match="unwrap= is for a copy under its own names"):
        convert({"a": torch.ones(2)}, {"b": torch.ones(2)}, path, unwrap=True)
    both = {"a.weight": torch.ones(2), "_orig_mod.a.weight": torch.ones(2)}
    with pytest.raises(InputError, match=r"'_orig_mod\.a\.weight' would be 'a\.weight', which another is too"):
        convert(both, None, path, unwrap=True)
    with pytest.raises(InputError, match="not a plain tensor of all its values"):
        convert({"a": torch.ones(2).to_sparse()}, None, path)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_undecided_copies_is_refused(tmp_path: Path) -> None:
    nets = {name: {"a.weight": torch.rand(3, 2), "b.weight": torch.rand(2, 2)} for name in ("G_A", "G_B")}
    with pytest.raises(InputError, match=r"Nothing tells which of several copies to take: .* Choose by container="):
        convert(nets, None, tmp_path / "a.safetensors")
    convert(nets, None, tmp_path / "a.safetensors", container="G_B")
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a.weight"], nets["G_B"]["a.weight"])
