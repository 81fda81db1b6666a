from __future__ import annotations

import json
import os
import re
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

import autoalign
from autoalign import cli
from autoalign.alignment import Alignment
from autoalign.cli.reports import conversions_source
from tests.cli.factories import RENAMED, Network

WIDER = "tests.cli.factories:Network(classes=9, renamed=True)"
HOSTILE = ["a\x1b[2J.weight", "\u202eevil.weight", "[red]x[/red].weight", "new\nline.weight", "b|`c.weight"]
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def hostile(tmp_path: Path) -> str:
    save_file(
        {key: torch.rand(place + 2, 3) for place, key in enumerate(HOSTILE)},
        tmp_path / "hostile.safetensors",
        {"key\x1b]0;": "value\x9b"},
    )
    return str(tmp_path / "hostile.safetensors")


def test_align_reports_and_its_exit_code_is_1_if_incomplete(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["align", checkpoint, RENAMED]) == cli.COMPLETE
    output, errors = capsys.readouterr()
    assert output.startswith(f"{checkpoint} -> {RENAMED}\n\n10 of 10 target tensors are filled")
    assert errors == ""
    assert cli.main(["align", checkpoint, WIDER]) == cli.INCOMPLETE
    assert "Mismatched: the counterpart has another shape" in capsys.readouterr().out
    assert cli.main(["align", checkpoint, WIDER, "--exclude", "head", "--exclude", "re:^out"]) == cli.COMPLETE
    assert cli.main(["align", checkpoint, WIDER, "--adapt", "head"]) == cli.COMPLETE


def write_sparse(folder: Path, shards: int, per_shard: int) -> None:
    """Write files of safetensors in FP8 that take no place, of 27 MB a tensor."""
    files_of = {}
    for shard in range(1, shards + 1):
        name, header, size = f"model-{shard:05}-of-{shards:05}.safetensors", {}, 0
        for number in range(per_shard):
            key = f"model.layers.{shard}.experts.{number}.weight"
            for suffix, dtype, side in (("", "F8_E4M3", 5120), ("_scale_inv", "F32", 40)):
                end = size + side * side * (4 if dtype == "F32" else 1)
                header[key + suffix] = {"dtype": dtype, "shape": [side, side], "data_offsets": [size, end]}
                files_of[key + suffix], size = name, end
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + size)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files_of}))


def write_sparse_gguf(path: Path) -> None:
    """Write a file of GGUF that takes no place, of 1 GB a tensor."""
    gguf: Any = pytest.importorskip("gguf")
    writer, size = gguf.GGUFWriter(path, "llama"), 2**30 // 32 * 34
    for number in range(100):
        shape = [2**15, 2**15 // 32 * 34]
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor_info(f"blk.{number}.ffn_up.weight", shape, np.dtype("uint8"), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + 100 * size + 32)


def test_inspect_of_100_gigabytes_reads_no_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shards").mkdir()
    write_sparse(tmp_path / "shards", shards=20, per_shard=225)
    one = partial(torch.from_file, str(tmp_path / "data"), shared=True, size=2**29, dtype=torch.bfloat16)
    model = {f"layers.{number}.weight": one().view(2**13, 2**16) for number in range(100)}
    saved = {"state_dict": model, "epoch": 3, "optimizer": {"state": {}}, "args": {"lr": 0.1}}
    with torch.serialization.skip_data():  # the file has the places of the values, and no values
        torch.save(saved, tmp_path / "a.pt")
    write_sparse_gguf(tmp_path / "a.gguf")
    wanted = {
        "a.gguf": ("GGUF: 100 tensors, ", "quantised: 100 tensors quantised as GGUF Q8_0 (weight)"),
        "shards": ("folder: 9,000 tensors, ", "quantised: 4500 tensors quantised as FP8 in blocks (weight with"),
        "a.pt": ("torch: 100 tensors, 53,687,091,200 elements, 107.4 GB", "training: epoch=3, optimizer"),
    }
    for name, texts in wanted.items():
        path = tmp_path / name
        files = path.iterdir() if path.is_dir() else [path]
        assert sum(file.stat().st_size for file in files) > 100e9
        start = time.process_time()
        assert cli.main(["inspect", str(path), "--depth", "1"]) == cli.COMPLETE
        assert time.process_time() - start < 1
        output = capsys.readouterr().out
        assert all(text in output for text in texts)


def test_inspect_shows_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = {f"fc{n}.lora_{name}.weight": torch.ones(n, n) for n in (2, 4) for name in "AB"}
    save_file(saved | {"fc3.lokr_w1": torch.ones(3)}, tmp_path / "a.safetensors")
    assert cli.main(["inspect", str(tmp_path / "a.safetensors")]) == cli.COMPLETE
    assert "adapters: LoRA of 2 layers, rank 2 to 4, LoKr of 1 layers" in capsys.readouterr().out
    save_file({"ip_adapter.1.to_k_ip.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    assert cli.main(["inspect", str(tmp_path / "a.safetensors"), "--format", "json"]) == cli.COMPLETE
    assert json.loads(capsys.readouterr().out)["adapters"] == ["an IP-Adapter"]


def test_several_files_are_one_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state_dict = Network().state_dict()
    files = [f"{tmp_path}/{name}.safetensors" for name in ("layer1", "layer2", "layer3", "layer4", "out")]
    for path in files:
        save_file({key: value for key, value in state_dict.items() if key.startswith(Path(path).stem)}, path)
    for given in (files, [f"{tmp_path}/*"]):
        assert cli.main(["align", *given, RENAMED]) == cli.COMPLETE
        assert capsys.readouterr().out.startswith(f"{' '.join(given)} -> {RENAMED}\n\n10 of 10 target tensors are")
        assert cli.main(["load-check", *given, RENAMED]) == cli.COMPLETE
        assert cli.main(["convert", *given, "--to", RENAMED, "-o", f"{tmp_path}/out/"]) == cli.COMPLETE
        (tmp_path / "out" / "model.safetensors").unlink()
        (tmp_path / "out").rmdir()
        capsys.readouterr()
        assert cli.main(["inspect", *given]) == cli.COMPLETE
        assert "several files: 10 tensors" in capsys.readouterr().out


def test_align_takes_the_options_of_the_call(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, object] = {}

    def align(source: object, target: object, **options: object) -> Alignment:
        seen.update(options, source=source, target=target)
        return Alignment((), (), (), (), ())

    monkeypatch.setattr(autoalign, "align", align)
    flags = ["--rule", "(?<=a)b=c", "--rule", "x=y", "--include", "i", "--exclude", "e1", "--exclude", "e2"]
    flags += ["--adapt", "head", "--adapt", "vocab", "--min-confidence", "0.9", "--container", "ema", "--no-dequantise"]
    flags += ["--merge-adapter"]
    flags += ["--source-model", RENAMED]
    assert cli.main(["align", checkpoint, checkpoint, *flags]) == cli.COMPLETE
    capsys.readouterr()
    assert isinstance(seen.pop("source_model"), Network)
    assert seen == {
        "source": checkpoint,
        "target": checkpoint,
        "rules": [("(?<=a)b", "c"), ("x", "y")],
        "include": ["i"],
        "exclude": ["e1", "e2"],
        "adapt": ["head", "vocab"],
        "min_confidence": 0.9,
        "container": "ema",
        "dequantise": False,
        "merge_adapter": True,
    }


@pytest.mark.parametrize("rule", ["nonsense", "=b", "a="])
def test_a_rule_without_two_sides_is_an_error(rule: str, checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["align", checkpoint, RENAMED, "--rule", rule]) == cli.ERROR
    assert (
        capsys.readouterr().err == f"autoalign: error: --rule {rule!r} is not of the form A=B. Nothing was aligned.\n"
    )


def test_align_gives_json(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["align", checkpoint, WIDER, "--format", "json"]) == cli.INCOMPLETE
    found = json.loads(capsys.readouterr().out)
    assert found["missing_keys"] == ["head.weight", "head.bias"]
    filled = [f"fc{number}.{leaf}" for number in range(1, 5) for leaf in ("weight", "bias")]
    assert [match["target"] for match in found["matches"]] == filled
    assert found["matches"][0]["sources"] == ["layer1.weight"]
    assert found["mismatched"] == [["head.weight", "out.weight"], ["head.bias", "out.bias"]]
    assert (found["source"]["name"], found["target"]["name"]) == (checkpoint, WIDER)


def test_the_json_says_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, keys in (("source", ("twin1", "twin2")), ("target", ("one", "two"))):
        save_file({f"{key}.weight": torch.zeros(3, 4) for key in keys}, tmp_path / f"{name}.safetensors")
    sides = [str(tmp_path / f"{name}.safetensors") for name in ("source", "target")]
    assert cli.main(["align", *sides, "--format", "json"]) == cli.INCOMPLETE
    found = json.loads(capsys.readouterr().out)
    (choice,) = found["choices"]
    *options, proof = choice["next_actions"]
    assert found["version"] == 1
    assert proof["command"] == ["autoalign", "verify", "SOURCE", sides[1], "--checkpoint", sides[0], "--input", "SHAPE"]
    for number, action in enumerate(options):
        assert cli.main(["align", *sides, *action["arguments"], "--format", "json"]) == cli.COMPLETE
        wanted = [fill["sources"] for fill in choice["options"][number]["fills"]]
        assert [match["sources"] for match in json.loads(capsys.readouterr().out)["matches"]] == wanted
    assert cli.main(["explain", *sides, "two.weight", "--format", "json"]) == cli.COMPLETE
    explained = json.loads(capsys.readouterr().out)
    assert (explained["version"], explained["status"]) == (1, "ambiguous")
    assert explained["choice"]["next_actions"] == choice["next_actions"]
    assert cli.main(["explain", *sides, "two.weight"]) == cli.COMPLETE
    shown = capsys.readouterr().out
    assert shown.startswith("two.weight (target): ambiguous\n")
    assert "  to change it: as proposed: --rule " in shown
    assert "rules=" not in shown
    assert cli.main(["explain", *sides, "two.wieght"]) == cli.ERROR
    assert "Did you mean 'two.weight'" in capsys.readouterr().err


def test_the_json_of_a_command_is_a_saved_alignment(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["load-check", checkpoint, WIDER, "--format", "json"])
    (tmp_path / "a.json").write_text(capsys.readouterr().out)
    model = Network(classes=9, renamed=True)
    assert Alignment.read(tmp_path / "a.json") == autoalign.align(checkpoint, model)
    with pytest.warns(autoalign.PartialLoadWarning, match="head"):
        assert len(autoalign.load(model, checkpoint, alignment=Alignment.read(tmp_path / "a.json")).matches) == 8


def test_align_cuts_long_reports_unless_all_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({f"layer_{chr(97 + i)}.weight": torch.zeros(i + 1, 3) for i in range(26 * 2)}, tmp_path / "a.safetensors")
    path = str(tmp_path / "a.safetensors")
    cli.main(["align", path, path])
    assert capsys.readouterr().out.rstrip().endswith("tensors: --all")
    cli.main(["align", path, path, "--all"])
    output = capsys.readouterr().out
    assert "--all" not in output
    assert len(output.splitlines()) > 52


def test_html_is_what_the_alignment_writes(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("autoalign.cli.reports.document", lambda _, title, **__: f"<p>größe {title}</p>")
    assert cli.main(["align", checkpoint, RENAMED, "--format", "html"]) == cli.COMPLETE
    assert capsys.readouterr().out == f"<p>größe {checkpoint} -> {RENAMED}</p>\n"


def test_a_report_is_opened_in_a_browser(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert cli.main(["load-check", checkpoint, RENAMED, "--open"]) == cli.COMPLETE
    path, verdict = capsys.readouterr().out.splitlines()
    assert opened == [Path(path).as_uri()]
    assert Path(path).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert verdict.startswith("Loaded 10 of 10 tensors")


def test_load_check_loads_and_looks_at_the_values(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["load-check", checkpoint, RENAMED]) == cli.COMPLETE
    output, errors = capsys.readouterr()
    assert output.endswith("\nLoaded 10 of 10 tensors into Network; all their values are finite.\n")
    assert errors == ""
    tensors = load_file(checkpoint)
    tensors["layer2.bias"][1] = float("nan")
    save_file(tensors, checkpoint)
    assert cli.main(["load-check", checkpoint, RENAMED]) == cli.COMPLETE
    assert "1 of them hold values that are not finite: fc2.bias." in capsys.readouterr().out
    assert cli.main(["load-check", checkpoint, WIDER]) == cli.INCOMPLETE
    assert capsys.readouterr().err == ""  # the report says it all
    assert cli.main(["load-check", checkpoint, WIDER, "--strict"]) == cli.INCOMPLETE
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("autoalign: incomplete: 2 of 10 target tensors have no compatible source: head.weight, ")
    what_next = "Leave out --strict to load the 8 that match. Pass --rule to name counterparts, if there are any."
    assert errors.splitlines()[1] == f"{what_next} --verbose lists all."
    assert cli.main(["-v", "load-check", checkpoint, WIDER, "--strict"]) == cli.INCOMPLETE
    assert "  head.weight  [9, 7] float32  nearest: out.weight [3, 7]" in capsys.readouterr().err
    assert cli.main(["load-check", checkpoint, checkpoint]) == cli.ERROR
    assert "is a path, not a model" in capsys.readouterr().err


def test_convert_writes_in_the_names_of_the_target(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out.safetensors")
    command = ["convert", checkpoint, "--to", RENAMED, "-o", out, "--dtype", "float16", "--metadata", "by=us=them"]
    assert cli.main(command) == cli.COMPLETE
    output, errors = capsys.readouterr()
    assert output.endswith(f"\nWrote 10 tensors to {out}.\n")
    assert errors == ""
    wanted = autoalign.align(checkpoint, Network(renamed=True)).state_dict()
    found = load_file(out)
    assert all(torch.equal(found[key], value.half()) for key, value in wanted.items())
    assert autoalign.open_checkpoint(out).metadata == {"license": "MIT", "by": "us=them", "format": "pt"}
    assert cli.main(command) == cli.ERROR
    assert "exists. Nothing was written. Pass --overwrite to replace it" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite", "--max-shard-size", "60"]) == cli.COMPLETE
    assert (tmp_path / "out.safetensors.index.json").is_file()
    assert not Path(out).exists()


def test_convert_that_is_incomplete_says_so(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["convert", checkpoint, "--to", WIDER, "-o", str(out), "--strict"]) == cli.INCOMPLETE
    assert not out.exists()
    assert "Nothing was written.\nLeave out --strict to write the 8 that match." in capsys.readouterr().err
    assert cli.main(["convert", checkpoint, "--to", WIDER, "-o", str(out)]) == cli.INCOMPLETE
    assert len(load_file(out / "model.safetensors")) == 8
    assert cli.main(["convert", checkpoint, "--to", WIDER, "-o", "x", "--metadata", "nonsense"]) == cli.ERROR
    assert "--metadata 'nonsense' is not of the form KEY=VALUE" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
def test_convert_writes_a_distributed_checkpoint(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "step1"
    command = ["convert", checkpoint, "--to", RENAMED, "-o", str(out), "--output-format", "dcp"]
    assert cli.main([*command, "--format", "json"]) == cli.COMPLETE
    assert json.loads(capsys.readouterr().out)["matches"]
    found: dict[str, torch.Tensor] = {key: torch.empty_like(t) for key, t in Network(renamed=True).state_dict().items()}
    load_distributed(found, checkpoint_id=out, no_dist=True)
    wanted = autoalign.align(checkpoint, Network(renamed=True)).state_dict()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert cli.main([*command, "--overwrite"]) == cli.ERROR
    assert "is not a new or empty folder. Nothing was written." in capsys.readouterr().err
    assert cli.main([*command, "-o", str(tmp_path / "step2"), "--metadata", "by=us"]) == cli.ERROR
    assert "has no metadata of its own. Nothing was written." in capsys.readouterr().err
    assert not (tmp_path / "step2").exists()


def test_convert_keeps_values_that_only_the_target_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = "transformers:BertModel(vocab_size=6, hidden_size=12, num_hidden_layers=1, num_attention_heads=2)"
    own = {"vocab_size": 4, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers = pytest.importorskip("transformers")
    save_file(transformers.BertModel(transformers.BertConfig(**own)).state_dict(), tmp_path / "bert.safetensors")
    out = tmp_path / "out.safetensors"
    command = ["convert", str(tmp_path / "bert.safetensors"), "--to", target, "-o", str(out), "--adapt", "vocab"]
    assert cli.main(command) == cli.COMPLETE
    capsys.readouterr()
    assert load_file(out)["embeddings.word_embeddings.weight"].shape == (6, 12)


@pytest.mark.parametrize("form", ["text", "markdown", "json"])
def test_keys_cannot_break_the_terminal(form: str, hostile: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["inspect", hostile],
        ["align", hostile, hostile],
        ["align", hostile, "timm:resnet18"],
        ["diff", hostile, "tests.cli.factories:Network"],
        ["load-check", hostile, "timm:resnet18"],
    ):
        if command[0] == "load-check" and form != "text":
            continue
        cli.main([*command, "--format", form])
        output, errors = capsys.readouterr()
        assert all(line.isprintable() for line in (output + errors).split("\n"))
        if form == "markdown":  # a key has no line of its own, whatever is in it
            assert "new\nline" not in output


def test_rules_are_printed_in_the_forms_of_others(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for form in ("text", "json", "key_mapping", "revise_keys", "transformers", "python"):
        assert cli.main(["rules", checkpoint, RENAMED, "--format", form, "--name", "renamed"]) == cli.COMPLETE
        found[form], errors = capsys.readouterr()
        assert errors == ""
    assert "layer" in found["text"]
    json.loads(found["json"])
    names: dict[str, object] = {}
    exec(found["transformers"], names)
    assert len(names["conversions"]) == len(eval(found["key_mapping"])) > 0  # type: ignore[arg-type]
    exec(found["python"], names)
    renamed = names["renamed"](load_file(checkpoint), Network(renamed=True))  # type: ignore[operator]
    assert renamed.keys() == Network(renamed=True).state_dict().keys()


def test_rules_need_a_name_of_a_function(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rules", checkpoint, RENAMED, "--format", "python", "--name", "a b"]) == cli.ERROR
    assert "--name 'a b' is not a valid name of a Python function" in capsys.readouterr().err


def test_verify_runs_both_models(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["verify", "tests.cli.factories:Network", RENAMED, "--input", "7,2"]
    assert cli.main(command) == cli.COMPLETE
    capsys.readouterr()
    assert cli.main([*command, "--format", "json"]) == cli.COMPLETE
    found = json.loads(capsys.readouterr().out)
    assert (found["equal"], found["coverage"], found["uncovered"]) == (True, 1.0, [])
    assert cli.main(["verify", "tests.cli.factories:Network", WIDER, "--input", "7,2"]) == cli.INCOMPLETE


@pytest.mark.parametrize("shape", ["1,3,", "x", "1,3:nonsense", "", "1:int64:x"])
def test_inputs_have_shapes(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", RENAMED, RENAMED, "--input", shape]) == cli.ERROR
    assert f"--input {shape!r} is not a valid shape, such as 1,3,224,224" in capsys.readouterr().err


def test_conversions_of_transformers_are_written_as_python() -> None:
    loading = pytest.importorskip("transformers.core_model_loading")
    made = [
        loading.WeightRenaming(r"^a\.(\d+)\.", r"b.\1."),
        loading.WeightConverter(["q", "k"], ["qkv"], operations=[loading.Concatenate(1), loading.Transpose(0, 1)]),
    ]
    source = conversions_source(made)
    names: dict[str, Any] = {}
    exec(source, names)
    renaming, converter = names["conversions"]
    assert (renaming.source_patterns, renaming.target_patterns) == (made[0].source_patterns, made[0].target_patterns)
    assert (converter.source_patterns, converter.target_patterns) == (["q", "k"], ["qkv"])
    joined, turned = converter.operations
    assert (joined.dim, turned.dim0, turned.dim1) == (1, 0, 1)
    assert conversions_source(names["conversions"]) == source


def comparable(report: str) -> str:
    """Leave out what may differ from machine to machine: confidences and the difference of the outputs."""
    return re.sub(r"  [01]\.\d\d  |(?<=outputs: )\S+", "", report)


def test_the_demonstration_loads_everything_and_computes_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    random_state = torch.get_rng_state()
    assert cli.main(["demo"]) == cli.COMPLETE
    assert torch.equal(torch.get_rng_state(), random_state)
    report, errors = capsys.readouterr()
    assert errors == ""
    assert re.search(r"^matched +384 +[\d,]+  100\.0 % of the target$", report, re.MULTILINE)
    assert "trunk_output.block1 -> s1" in report
    (ending,) = re.findall(r"ends in `([^`]*)`", README)
    assert comparable(ending) in comparable(report)
    difference = re.search(r"^Largest relative difference of the outputs: (\S+) \(equal", report, re.MULTILINE)
    assert difference
    assert float(difference[1]) <= 1e-3


@pytest.mark.parametrize("other", ["s2.b1.conv2.bn.running_var", "nan"])
def test_the_demonstration_notices_a_tensor_in_the_wrong_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    load = autoalign.load

    def load_wrongly(model: nn.Module, path: object) -> Alignment:
        alignment = load(model, path)  # type: ignore[arg-type]
        state_dict = model.state_dict()
        wrong = torch.full((), torch.nan) if other == "nan" else state_dict[other]
        state_dict["s2.b1.conv1.bn.running_var"].copy_(wrong)
        return alignment

    monkeypatch.setattr(autoalign, "load", load_wrongly)
    assert cli.main(["demo"]) == cli.INCOMPLETE
    assert "(NOT equal, at a tolerance of 1e-03)" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["timm", "torchvision"])
def test_the_demonstration_says_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(["demo"]) == cli.ERROR
    report, errors = capsys.readouterr()
    assert report == ""
    assert errors == (
        f"autoalign: error: The demonstration needs timm and torchvision, and {missing} is not installed. "
        "Nothing was loaded. Install them with: pip install timm torchvision\n"
    )


def test_inspect_shows_a_folded_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = {f"module.blocks.{i}.{leaf}": torch.zeros(2, 3) for i in range(12) for leaf in ("q.weight", "k.weight")}
    torch.save(
        {"model": {**blocks, "module.steps": torch.tensor(3)}, "ema": blocks, "epoch": 3}, tmp_path / "training.pt"
    )
    assert cli.main(["inspect", str(tmp_path / "training.pt")]) == cli.COMPLETE
    output, errors = capsys.readouterr()
    assert errors == ""
    head, _, tree = output.partition("\n\n")
    assert "  torch: 25 tensors, 145 elements, 584 B, 24 float32, 1 int64\n" in head
    assert "  container: model; others: ema\n" in head
    assert "  prefix: module. of all keys\n" in head
    assert tree == textwrap.dedent(
        """\
        module                   584 B  25 tensors
          steps                         [] int64
          blocks.{0...11}  12 x   48 B  2 tensors
            q                     24 B  weight [2, 3]
            k                     24 B  weight [2, 3]
        """
    )


def test_inspect_gives_json_and_markdown_and_stops_at_a_depth(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", checkpoint, "--format", "json"]) == cli.COMPLETE
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "safetensors"
    assert found["metadata"] == {"license": "MIT"}
    assert {"key": "layer1.weight", "shape": [4, 2], "dtype": "float32"} in found["tensors"]
    assert cli.main(["inspect", "timm:resnet18", "--format", "markdown", "--depth", "1"]) == cli.COMPLETE
    output = capsys.readouterr().out
    assert "- model: 122 tensors" in output
    assert re.search(r"^layer1 +.* 24 tensors$|^layer1\.\{0,1\} ", output, re.MULTILINE)
    assert "conv2" not in output


def test_what_is_shown_fits_a_narrow_terminal_without_broken_words(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(checkpoint).parent)
    monkeypatch.setenv("NO_COLOR", "1")
    norms = "torchvision:resnet18"
    for command in (
        ["inspect", norms],
        ["align", "net.safetensors", WIDER],
        ["align", norms, "timm:resnet18", "--all"],
        ["explain", "net.safetensors", WIDER, "head.weight"],
        ["explain", norms, "timm:resnet18", "fc.weight"],
        ["diff", "net.safetensors", RENAMED],
        ["rules", "net.safetensors", RENAMED],
        ["verify", RENAMED, RENAMED, "--input", "1,2"],
    ):
        torch.manual_seed(0)
        cli.main(command)
        wide = capsys.readouterr().out
        with monkeypatch.context() as narrow:
            narrow.setattr(sys.stdout, "isatty", lambda: True, raising=False)
            narrow.setenv("COLUMNS", "60")
            torch.manual_seed(0)
            cli.main(command)
        shown = capsys.readouterr().out
        lines = [line for line in shown.splitlines() if not line.startswith(("net.safetensors ->", norms))]
        assert max(map(len, lines)) <= 60, command
        words = [set(re.findall(r"[^\s,]*[a-z][^\s,]*", text)) for text in (shown, wide)]
        assert {word for word in words[0] - words[1] if "…" not in word} == set(), command


def test_inspect_names_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = {f"{side}.{key}": value for side in ("student", "teacher") for key, value in Network().state_dict().items()}
    save_file(both, tmp_path / "both.safetensors")
    cli.main(["inspect", str(tmp_path / "both.safetensors")])
    assert "  copies of one network: student, teacher\n" in capsys.readouterr().out


def test_diff_compares_values_across_names(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["diff", checkpoint, checkpoint]) == cli.COMPLETE
    output, errors = capsys.readouterr()
    assert (output.splitlines()[2], errors) == ("10 equal", "")
    other = autoalign.align(checkpoint, Network(renamed=True)).state_dict()
    key = next(key for key in other if key.endswith("bias"))
    torch.save({**other, key: other[key] * 1.5}, tmp_path / "b.pth")
    paths = [checkpoint, str(tmp_path / "b.pth")]
    assert cli.main(["diff", *paths]) == cli.INCOMPLETE
    assert capsys.readouterr().out.splitlines()[2].startswith("9 equal, 1 changed (")
    assert cli.main(["diff", *paths, "--tolerance", "0.6"]) == cli.COMPLETE
    assert "9 equal, 1 close" in capsys.readouterr().out
    assert cli.main(["diff", *paths, "--format", "json"]) == cli.INCOMPLETE
    found = json.loads(capsys.readouterr().out)
    assert (found["equal"], found["counts"]) == (False, {"equal": 9, "close": 0, "changed": 1})
    assert [item["second"] for item in found["tensors"] if item["verdict"] == "changed"] == [key]
    assert cli.main(["diff", *paths, "--format", "markdown"]) == cli.INCOMPLETE
    assert "### Changed" in capsys.readouterr().out
    assert cli.main(["diff", *paths, "--format", "html"]) == cli.INCOMPLETE
    assert "only in the second" in capsys.readouterr().out


def test_diff_of_two_containers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = Network().state_dict()
    torch.save({"model": own, "ema": {key: value + 1 for key, value in own.items()}}, tmp_path / "two.pt")
    path = str(tmp_path / "two.pt")
    assert cli.main(["diff", path, path, "--container", "model", "--other-container", "ema"]) == cli.INCOMPLETE
    assert "10 changed" in capsys.readouterr().out


def test_convert_without_a_target_is_a_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = Network().state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in own.items()}}, tmp_path / "a.pth")
    paths = [str(tmp_path / name) for name in ("a.pth", "a.safetensors", "b.safetensors")]
    assert cli.main(["convert", paths[0], "-o", paths[1]]) == cli.COMPLETE
    assert cli.main(["convert", paths[0], "-o", paths[2], "--unwrap"]) == cli.COMPLETE
    assert "Wrote 10 tensors" in capsys.readouterr().out
    assert load_file(paths[1]).keys() == {f"module.{key}" for key in own}
    assert all(torch.equal(value, own[key]) for key, value in load_file(paths[2]).items())
