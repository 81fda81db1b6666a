from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import autoalign
from autoalign import cli
from autoalign.alignment import Alignment
from autoalign.cli import demo

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


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


def test_the_demonstration_notices_a_tensor_in_the_wrong_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_wrongly(model: nn.Module, path: object) -> Alignment:
        alignment = autoalign.load(model, path)  # type: ignore[arg-type]
        state_dict = model.state_dict()
        state_dict["s2.b1.conv1.bn.running_var"].copy_(state_dict["s2.b1.conv2.bn.running_var"])
        return alignment

    monkeypatch.setattr(demo, "load", load_wrongly)
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


def test_a_demonstration_that_gives_no_number_is_not_equal() -> None:
    alignment = Alignment((), (), (), (), ())
    assert demo.Demonstration(alignment, 0.0).equal
    assert not demo.Demonstration(alignment, float("nan")).equal
