"""The program: its parser, and what becomes of errors, interrupts and warnings."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from autoalign import __version__
from autoalign.cli.commands.align import add as align
from autoalign.cli.commands.completion import add as completion
from autoalign.cli.commands.convert import add as convert
from autoalign.cli.commands.demo import add as demo
from autoalign.cli.commands.diff import add as diff
from autoalign.cli.commands.inspect import add as inspect
from autoalign.cli.commands.load_check import add as load_check
from autoalign.cli.commands.rules import add as rules
from autoalign.cli.commands.verify import add as verify
from autoalign.cli.options import BROKEN_PIPE, ERROR, EXIT_CODES, INCOMPLETE, INTERRUPTED
from autoalign.cli.terminal import complain
from autoalign.errors import (
    AmbiguousAlignmentError,
    AutoAlignError,
    ChoiceWarning,
    IncompatibleTensorsError,
    PartialLoadWarning,
)

COMMANDS = (inspect, align, load_check, convert, rules, diff, verify, demo, completion)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Without the program's name; by default the process's own.

    Returns:
        The exit code, as ``--help`` explains them; 130 after a Ctrl-C, and 141 where the reader of the output has gone.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever the terminal's encoding lacks
    try:
        options = parser().parse_args(arguments)
        with _warnings_shown():
            code = int(options.run(options))
            sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
        return BROKEN_PIPE
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except (IncompatibleTensorsError, AmbiguousAlignmentError) as error:
        complain(f"incomplete: {error}")
        return INCOMPLETE
    except (AutoAlignError, OSError) as error:
        complain(f"error: {error}")
        return ERROR
    return code


def parser() -> argparse.ArgumentParser:
    """Make the parser of all commands; that imports nothing but what it is made of."""
    made = argparse.ArgumentParser(
        prog="autoalign",
        description="Load any PyTorch checkpoint into any implementation of the same network.",
        epilog=f"{EXIT_CODES}. Results are on stdout, all else is on stderr.",
    )
    made.add_argument("--version", action="version", version=f"autoalign {__version__}")
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    made.set_defaults(whole=made)
    return made


@contextmanager
def _warnings_shown() -> Iterator[None]:
    """Show warnings as notes of this program, without the lines of code that they come from."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        complain(f"warning: {message}")

    with warnings.catch_warnings():
        for category in (PartialLoadWarning, ChoiceWarning):
            warnings.simplefilter("ignore", category)  # the report says all of it
        warnings.showwarning = show
        yield


def _discard(stream: TextIO) -> None:
    """Let nothing more be written to a stream that nobody reads, at the end of the process least of all."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
