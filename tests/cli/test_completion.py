from __future__ import annotations

import shutil
import subprocess

import pytest

from autoalign import cli
from autoalign.cli import options
from autoalign.plan.adaptations import ADAPTS


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["completion", shell]) == cli.COMPLETE
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", options.SHELLS)
def test_the_script_is_one_of_its_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(shell, capsys)
    for word in ("load-check", "convert", "overwrite", *options.ADAPTS):
        assert word in text
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([program, "-n"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["con"], ["convert"]),
        (["convert", "--ov"], ["--overwrite"]),
        (["align", "--adapt", "in"], ["in_channels"]),
        (["rules", "a", "b", "--format", "re"], ["revise_keys"]),
        (["inspect", "here.p"], ["here.pt"]),
        (["convert", "a", "-o", "here.p"], ["here.pt"]),
    ],
)
def test_bash_completes(
    words: list[str], completed: list[str], tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here.pt").write_text("")  # type: ignore[operator]
    line = ["autoalign", *words]
    listed = " ".join(f"'{word}'" for word in line)
    probe = (
        f"COMP_WORDS=({listed}); COMP_CWORD={len(line) - 1}; COMPREPLY=(); _shtab_autoalign 2>/dev/null; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    text = script("bash", capsys) + probe
    done = subprocess.run(["bash"], input=text, capture_output=True, text=True, cwd=str(tmp_path), check=True)
    assert done.stdout.split() == completed


def test_the_choices_are_the_packages_own() -> None:
    assert set(options.ADAPTS) == set(ADAPTS)
