"""The program: help, exit codes, errors, interrupts and completion."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import autoalign
from autoalign import cli
from autoalign.cli.terminal import BROKEN_PIPE, INTERRUPTED
from tests.cli.factories import Network

NAMES = [
    *("inspect", "identify", "align", "explain", "load-check", "convert"),
    *("rules", "diff", "verify", "demo", "completion"),
]


def program(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "autoalign", *arguments]


def probe(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_version_and_help_need_no_torch() -> None:
    assert (
        probe(
            "import sys, contextlib, io\nfrom autoalign.cli import main\n"
            "for arguments in (['--version'], ['--help'], ['convert', '--help'], ['completion', 'bash'], []):\n"
            "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main(arguments)\n"
            "print(sorted({'torch', 'numpy', 'rich', 'safetensors'} & set(sys.modules)))"
        )
        == "[]"
    )


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(program("--version"), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["autoalign", autoalign.__version__]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["alin"], "No such command 'alin'. Did you mean 'align'? See: autoalign --help"),
        (["nothing-like-it"], "No such command 'nothing-like-it'. See: autoalign --help"),
        (["demo", "--unknown"], "No such option: --unknown. See: autoalign demo --help"),
        (["align", "--exlude=fc"], "No such option: --exlude. Did you mean --exclude? See: autoalign align --help"),
        (
            ["align", "a"],
            "An argument is missing. Usage: autoalign align [OPTIONS] CKPT... TARGET. See: autoalign align --help",
        ),
        (["convert", "a", "--to", "b"], "Missing option '--output' / '-o'. See: autoalign convert --help"),
        (["rules", "a", "b", "--format", "x"], "Invalid value for '--format': 'x' is not one of 'text', 'json', "),
        (["align", "a", "b", "--adapt", "hed"], "Invalid value for '--adapt': 'hed' is not one of 'head', 'vocab', "),
        (["align", "a", "b", "--min-confidence", "x"], "Invalid value for '--min-confidence': "),
    ],
)
def test_wrong_arguments_are_an_error(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == cli.ERROR
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith(f"autoalign: error: {said}")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], *([name] for name in NAMES)])
def test_help_explains_the_exit_codes(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*arguments, "--help"]) == cli.COMPLETE
    shown = " ".join(capsys.readouterr().out.split())
    assert "exit codes: 0 " in shown
    assert "2 an error, reported on stderr" in shown


def test_the_program_alone_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == cli.main(["--help"]) == cli.COMPLETE
    shown = capsys.readouterr().out
    assert shown[: len(shown) // 2] == shown[len(shown) // 2 :]
    commands = shown[len(shown) // 2 :].partition("Commands:")[2]
    assert re.findall(r"^  ([a-z-]+)  ", commands, re.MULTILINE) == NAMES


def test_options_of_every_command_may_stand_before_it(capsys: pytest.CaptureFixture[str], checkpoint: str) -> None:
    command = ["rules", checkpoint, "tests.cli.factories:Network(classes=9, renamed=True)"]
    assert cli.main(command) == cli.INCOMPLETE
    assert capsys.readouterr().err.startswith("autoalign: note: the rules fill 8 of 10 tensors")
    for quiet in (["-q", *command], [*command, "--quiet"]):
        assert cli.main(quiet) == cli.INCOMPLETE
        assert capsys.readouterr().err == ""


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

    monkeypatch.setattr("autoalign.checkpoints.checkpoint.checkpoint_of", refused)
    assert cli.main(["inspect", "tests.cli.factories:Network"]) == cli.ERROR
    assert capsys.readouterr().err == "autoalign: error: [Errno 13] Permission denied: 'a.pt'\n"


def test_warnings_are_notes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def warned(*_: object, **__: object) -> None:
        import warnings

        warnings.simplefilter("always")
        warnings.warn("old \x1b format", stacklevel=1)
        raise autoalign.InputError("no more")

    monkeypatch.setattr("autoalign.checkpoints.checkpoint.checkpoint_of", warned)
    assert cli.main(["inspect", "tests.cli.factories:Network"]) == cli.ERROR
    assert capsys.readouterr().err == "autoalign: warning: old \\x1b format\nautoalign: error: no more\n"


def test_an_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autoalign.checkpoints.checkpoint.checkpoint_of", interrupted)
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


@pytest.mark.parametrize(
    ("command", "opened"),
    [
        (["inspect", "a.pt"], "Opening a.pt"),
        (["diff", "a.pt", "b.pt"], "Opening a.pt, b.pt"),
        (["verify", "m:f", "m:f", "--input", "1", "--checkpoint", "a.pt"], "Opening a.pt"),
    ],
)
def test_what_is_opened_is_named_at_once(command: list[str], opened: str, monkeypatch: pytest.MonkeyPatch) -> None:
    described = []

    def working(text: str) -> AbstractContextManager[None]:
        described.append(text)
        return nullcontext()

    monkeypatch.setattr("autoalign.cli.arguments.working", working)
    assert cli.main(command) == cli.ERROR  # there is no such file
    assert described == [opened]


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


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_one_of_its_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(shell, capsys)
    assert f"_AUTOALIGN_COMPLETE=complete_{shell}" in text
    assert text.startswith("#compdef autoalign\n") == (shell == "zsh")  # or a file of fpath is none of a completion
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([program, "-n"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("con", ["convert"]),
        ("convert --ov", ["--overwrite"]),
        ("align a b --adapt in", ["in_channels"]),
        ("rules a b --format re", ["revise_keys"]),
        ("inspect here.p", []),  # files are bash's own to complete
        ("inspect timm:res", ["resnet18", "resnet50"]),
        ("convert a.pt --to timm:vit", ["vit_tiny"]),
        ("align a b --source-model timm:vit", ["vit_tiny"]),
    ],
)
def test_bash_completes(line: str, completed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = tmp_path / "autoalign" / f"timm-{version('timm')}.txt"
    names.parent.mkdir()
    names.write_text("resnet18\nresnet50\nvit_tiny")
    (tmp_path / "autoalign-program").write_text(f'#!/bin/sh\nexec {sys.executable} -m autoalign "$@"\n')
    (tmp_path / "autoalign-program").chmod(0o755)
    probe = (
        f"COMP_LINE='autoalign {line}'; COMP_POINT=${{#COMP_LINE}}; COMPREPLY=(); "
        f"_autoalign_completion {tmp_path}/autoalign-program; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash"],
        input=script("bash", capsys) + probe,
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        check=True,
    )
    assert (done.stdout.split(), done.stderr) == (completed, "")
