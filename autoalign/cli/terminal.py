"""What is written where: results on stdout, in colours on a terminal; progress and messages on stderr; exit codes."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from autoalign.reports.rows import paragraphs, printable

COMPLETE, INCOMPLETE, ERROR = 0, 1, 2  # exit codes
JSON_VERSION = 1  # of what commands print; fields may be added without a new one
INTERRUPTED, BROKEN_PIPE = 130, 141  # as shells report a process that SIGINT or SIGPIPE ended

_STYLES = {
    r"^(Matched|Equal):?.*$": "bold green",
    r"^(Adapted|Ambiguous|Values)\b.*:.*$": "bold yellow",
    r"^(Mismatched|Missing|Other|Only)\b.*:.*$": "bold red",
    r"^Unexpected\b.*:.*$": "bold magenta",
    r"^(Note|Warning):.*$": "italic",
    r"^    ! .*$": "yellow",
    r"\[[0-9, ]*\]": "cyan",
    r" -> ": "dim",
}
_DEFAULT_WIDTH = 100


@dataclass(slots=True)
class Settings:
    """What is asked for in one run of the program, by options that every command has."""

    quiet: bool = False
    verbose: bool = False
    display: Any = None  # the progress that is shown now, a rich.progress.Progress


settings = Settings()


def has_colours(stream: TextIO) -> bool:
    """True if colours are to be used: on a terminal that has them, unless NO_COLOR is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def width() -> int:
    """Return the number of characters of a line: the terminal's, or 100 if stdout is not one."""
    return terminal_width() or _DEFAULT_WIDTH


def terminal_width(stream: TextIO | None = None) -> int | None:
    """Return the number of characters of a line of the terminal; None if the stream, by default stdout, is not one."""
    is_terminal = (stream or sys.stdout).isatty()
    return max(shutil.get_terminal_size((_DEFAULT_WIDTH, 0)).columns, 40) if is_terminal else None


def show(text: str, *, plain: bool = False) -> None:
    """Write a result; ``plain`` is for what programs read."""
    stop_display()
    if plain or not has_colours(sys.stdout):
        print(text)
        return
    from rich.console import Console
    from rich.text import Text

    styled = Text(text)
    for pattern, style in _STYLES.items():
        styled.highlight_regex(f"(?m){pattern}", style)
    Console(highlight=False, soft_wrap=True).print(styled)


def show_lines(text: str) -> None:
    """Write a result of lines, wrapped between words on a terminal."""
    show("\n".join(paragraphs(text.splitlines(), terminal_width() or sys.maxsize)))


def show_json(data: Mapping[str, object]) -> None:
    """Write a result as JSON, with the version of its form."""
    show(json.dumps({"version": JSON_VERSION, **data}, indent=2), plain=True)


def complain(message: str) -> None:
    """Write a message on stderr; with ``--quiet`` errors alone."""
    if settings.quiet and message.startswith(("note: ", "warning: ")):
        return
    stop_display()
    shown = printable(f"autoalign: {message}", kept="\n")  # text of any origin; keys in reports are escaped already
    print("\n".join(paragraphs(shown.splitlines(), terminal_width(sys.stderr) or sys.maxsize)), file=sys.stderr)


@contextmanager
def working(description: str) -> Iterator[None]:
    """Show what a command does from its beginning to its first result, on a terminal and unless it is to be quiet."""
    if sys.stderr.isatty() and not settings.quiet:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(20), TimeElapsedColumn()
        settings.display = Progress(*columns, console=Console(stderr=True), transient=True)
        settings.display.add_task(printable(description), total=None)
        settings.display.start()
    try:
        yield
    finally:
        stop_display()


def stop_display() -> None:
    """Remove what shows progress, before anything else is written."""
    if settings.display is not None:
        settings.display.stop()
        settings.display = None


def progress(description: str) -> Callable[[int, int], None]:
    """Return a function that shows what is done, to be called with the number of steps done and of all."""

    def report(done: int, total: int) -> None:
        if settings.display is not None:
            settings.display.update(0, description=description, completed=done, total=total)

    return report
