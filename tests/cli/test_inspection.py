"""The commands that only look: inspect and diff."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoalign import cli
from tests.cli.factories import RENAMED, Network


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


def test_inspect_names_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = {f"{side}.{key}": value for side in ("student", "teacher") for key, value in Network().state_dict().items()}
    save_file(both, tmp_path / "both.safetensors")
    cli.main(["inspect", str(tmp_path / "both.safetensors")])
    assert "  copies of one network: student, teacher\n" in capsys.readouterr().out


def test_diff_lists_keys_kinds_and_values(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["diff", checkpoint, checkpoint]) == cli.COMPLETE
    assert capsys.readouterr() == ("Equal: 10 tensors\n", "")
    other = load_file(checkpoint)
    del other["out.bias"]
    other["layer1.bias"][2] += 0.5
    other["layer2.bias"] = other["layer2.bias"].double()
    other["out.weight"] = torch.zeros(3, 6)
    other["new"] = torch.zeros(1)
    save_file(other, tmp_path / "b.safetensors")
    paths = [checkpoint, str(tmp_path / "b.safetensors")]
    assert cli.main(["diff", *paths]) == cli.INCOMPLETE
    output, errors = capsys.readouterr()
    assert errors == ""
    said = re.sub(r" +", " ", output)
    assert said.startswith("Equal: 6 tensors\n")
    assert f"Only in {checkpoint}: 1\n out.bias [3] float32\n" in said
    assert "b.safetensors: 1\n new [1] float32\n" in said
    assert " layer2.bias [5] float32 -> [5] float64 equal values\n" in said
    assert " out.weight [3, 7] float32 -> [3, 6] float32\n" in said
    assert re.search(r" layer1.bias \[4\] float32 0.5 \(0?\.?[\d.]+\)\n", said)
    assert cli.main(["diff", *paths, "--format", "json"]) == cli.INCOMPLETE
    found = json.loads(capsys.readouterr().out)
    assert [item["key"] for item in found["changed"]] == ["layer1.bias", "layer2.bias", "out.weight"]
    assert [item["difference"] for item in found["changed"]] == [pytest.approx(0.5), 0.0, None]
    assert cli.main(["diff", *paths, "--format", "markdown"]) == cli.INCOMPLETE
    assert "| `layer1.bias` |" in capsys.readouterr().out


def test_diff_of_two_containers_and_of_nothing_in_common(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Network().state_dict()
    moved = {key: value + 1 for key, value in own.items()}
    torch.save({"model": own, "ema": moved}, tmp_path / "two.pt")
    path = str(tmp_path / "two.pt")
    assert cli.main(["diff", path, path, "--other-container", "ema"]) == cli.INCOMPLETE
    assert (
        "Values that differ, the largest difference, and its share of the largest value: 10" in capsys.readouterr().out
    )
    assert cli.main(["diff", checkpoint, RENAMED]) == cli.INCOMPLETE
    assert "note: the two have no key in common; autoalign align shows" in capsys.readouterr().err
