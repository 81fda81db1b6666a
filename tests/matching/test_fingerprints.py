"""What ``align`` says of some gold cases stays as it is, to the last digit that is shown, unless a change is meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import fingerprints
from benchmarks.fingerprints import changed_parts, fingerprint, kept, main

KEPT = kept()
ADVICE = (
    "Show all that is said of it: python -m benchmarks.fingerprints --show {!r}, here and before the change. "
    "If the change is meant, keep the new fingerprints: python -m benchmarks.fingerprints --keep"
)


@pytest.mark.parametrize("name", KEPT)
def test_what_is_said_of_a_case_stays_as_it_is(name: str) -> None:
    after = fingerprint(name)
    assert after == KEPT[name], f"{name}: {changed_parts(KEPT[name], after)} changed. {ADVICE.format(name)}"


def test_the_command_says_what_changed_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "hf.bert-encoder->torch.nn.TransformerEncoder"
    path = tmp_path / "fingerprints.json"
    path.write_text(json.dumps({}))
    monkeypatch.setattr(fingerprints, "FILE", path)
    assert main(["--add", name]) == 0
    (right,) = kept().values()
    filled, sure, texts = right.split("-")
    path.write_text(json.dumps({name: f"{filled}-{sure[::-1]}-{texts}"}))
    capsys.readouterr()
    assert main([]) == 1
    assert capsys.readouterr().out == f"{name}: how sure it is\n1 of 1 changed.\n"
    assert main(["--keep"]) == 0
    assert main([]) == 0
    capsys.readouterr()
    assert main(["--show", "bert"]) == 0
    assert "layers.0.norm1.weight <- ('layer.0.attention.output.LayerNorm.weight',) copy" in capsys.readouterr().out
