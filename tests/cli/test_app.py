"""The program: help, exit codes, errors, interrupts and completion."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import autoalign
from autoalign import cli
from autoalign.cli import app
from autoalign.cli.commands import COMMANDS
from autoalign.cli.terminal import BROKEN_PIPE, INTERRUPTED
from autoalign.plan.adaptations import ADAPTS
from tests.cli.factories import Network

NAMES = ["inspect", "align", "load-check", "convert", "rules", "diff", "verify", "demo", "completion"]


def program(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "autoalign", *arguments]


def probe(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_version_and_help_need_no_torch() -> None:
    assert (
        probe(
            "import sys, contextlib, io\nfrom autoalign.cli import main\n"
            "for arguments in (['--version'], ['--help'], ['convert', '--help'], ['completion', 'bash']):\n"
            "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main(arguments)\n"
            "print(sorted({'torch', 'numpy', 'rich', 'safetensors'} & set(sys.modules)))"
        )
        == "[]"
    )


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(program("--version"), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["autoalign", autoalign.__version__]


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["demo", "--unknown"], ["align", "a"], ["convert", "a"]])
def test_wrong_arguments_are_an_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    output, errors = capsys.readouterr()
    assert output == ""
    assert "usage: autoalign" in errors


@pytest.mark.parametrize("arguments", [[], *([name] for name in NAMES)])
def test_help_explains_the_exit_codes(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert {*COMMANDS, "completion"} == set(NAMES)
    with pytest.raises(SystemExit, match="0"):
        cli.main([*arguments, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "exit codes: 0 " in shown
    assert "2 an error, reported on stderr" in shown
    if not arguments:
        assert all(f" {name} " in shown for name in NAMES)


def test_an_error_is_one_message_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a\x1b[31mb.pt"
    path.write_bytes(b"nonsense")
    assert cli.main(["inspect", str(path)]) == cli.ERROR
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("autoalign: error: ")
    assert errors.count("\n") == 1
    assert "\x1b" not in errors


def test_errors_of_the_system_are_no_tracebacks_either(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "a.pt")

    monkeypatch.setattr("autoalign.cli.inspection.checkpoint_of", refused)
    assert cli.main(["inspect", "tests.cli.factories:Network"]) == cli.ERROR
    assert capsys.readouterr().err == "autoalign: error: [Errno 13] Permission denied: 'a.pt'\n"


def test_warnings_are_notes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def warned(*_: object, **__: object) -> None:
        import warnings

        warnings.simplefilter("always")
        warnings.warn("old \x1b format", stacklevel=1)
        raise autoalign.InputError("no more")

    monkeypatch.setattr("autoalign.cli.inspection.checkpoint_of", warned)
    assert cli.main(["inspect", "tests.cli.factories:Network"]) == cli.ERROR
    assert capsys.readouterr().err == "autoalign: warning: old \\x1b format\nautoalign: error: no more\n"


def test_an_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autoalign.cli.inspection.checkpoint_of", interrupted)
    assert cli.main(["inspect", "tests.cli.factories:Network"]) == INTERRUPTED
    assert capsys.readouterr() == ("", "autoalign: interrupted\n")


@pytest.mark.skipif(os.name != "posix", reason="signals of posix")
def test_ctrl_c_in_the_middle_of_a_conversion_leaves_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(Network().state_dict(), tmp_path / "source.safetensors")
    code = (
        "import sys, signal, os\nfrom autoalign.loading import convert as converting\nfrom autoalign.cli import main\n"
        "read = converting.read_match\n"
        "def reading(*arguments):\n"
        "    print(*os.listdir('.'), flush=True); sys.stdin.readline()\n"
        "    return read(*arguments)\n"
        "converting.read_match = reading\n"
        "to = 'tests.cli.factories:Network(renamed=True)'\n"
        "sys.exit(main(['convert', 'source.safetensors', '--to', to, '-o', 'o']))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert sorted(process.stdout.readline().split()) == ["o", "source.safetensors"]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert errors.strip() == "autoalign: interrupted"
    assert os.listdir(tmp_path) == ["source.safetensors"]  # noqa: PTH208


def test_a_reader_that_goes_is_no_error(tmp_path: Path) -> None:
    save_file({f"layers.{i}.weight": torch.zeros(1) for i in range(4000)}, tmp_path / "many.safetensors")
    process = subprocess.Popen(
        program("inspect", "--format", "json", str(tmp_path / "many.safetensors")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1) == b"{"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == BROKEN_PIPE
    process.stderr.close()


def test_what_an_encoding_lacks_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"größe.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert cli.main(["inspect", str(tmp_path / "a.safetensors")]) == cli.COMPLETE
    assert rb"gr\xf6\xdfe" in written.getvalue()


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["completion", shell]) == cli.COMPLETE
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", app.SHELLS)
def test_the_script_is_one_of_its_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(shell, capsys)
    for word in ("load-check", "convert", "overwrite", *app.ADAPTS):
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
    assert set(app.ADAPTS) == set(ADAPTS)
