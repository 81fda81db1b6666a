from __future__ import annotations

import io
import re

import pytest

from autoalign.cli.terminal import complain, progress, show, width, working

REPORT = "Matched: source -> target\n  a.weight -> b.weight  [64, 3]  [bold]0.99[/bold]\nMissing: not filled"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_stdout(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return stream


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = terminal_stdout(monkeypatch)
    show(REPORT)
    assert "\x1b[" in stdout.getvalue()
    assert re.sub(r"\x1b\[[0-9;]*m", "", stdout.getvalue()) == REPORT + "\n"  # and markup is none


def test_what_programs_read_has_no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = terminal_stdout(monkeypatch)
    show(REPORT, plain=True)
    assert stdout.getvalue() == REPORT + "\n"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colours_can_be_turned_off(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = terminal_stdout(monkeypatch)
    monkeypatch.setenv(name, value)
    show(REPORT)
    assert stdout.getvalue() == REPORT + "\n"


def test_a_pipe_has_no_colours(capsys: pytest.CaptureFixture[str]) -> None:
    show(REPORT)
    assert capsys.readouterr().out == REPORT + "\n"
    assert width() == 100


def test_lines_are_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = terminal_stdout(monkeypatch)
    monkeypatch.setenv("COLUMNS", "77")
    assert stdout.isatty()
    assert width() == 77


def test_complaints_cannot_break_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    complain("error: 'a\x1b[2J' exists.")
    assert capsys.readouterr().err == r"autoalign: error: 'a\x1b[2J' exists." + "\n"


def test_complaints_are_wrapped_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("COLUMNS", "40")
    complain("error: the first line of what is wrong.\nWhat to do.")
    assert stream.getvalue() == "autoalign: error: the first line of what\n  is wrong.\nWhat to do.\n"


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with working("Opening a.pt"):
        progress("Writing")(1, 2)
    assert capsys.readouterr() == ("", "")
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with working("Opening [a].pt"):
        assert "Opening [a].pt" in stream.getvalue()  # at once, and before there is a number of steps
        progress("Writing")(1, 2)
        show("a result")  # for which it goes
        seen = stream.getvalue()
    assert stream.getvalue() == seen
    assert "Writing" in seen
