"""The program: which command is run, and what is printed of errors, interrupts and warnings."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from autoalign.cli.options import BROKEN_PIPE, COMPLETE, ERROR, INCOMPLETE, INTERRUPTED, PATHS, build_parser
from autoalign.cli.terminal import complain
from autoalign.errors import (
    AmbiguousAlignmentError,
    AutoAlignError,
    ChoiceWarning,
    IncompatibleTensorsError,
    PartialLoadWarning,
)


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
        parser = build_parser()
        options = parser.parse_args(arguments)
        if options.command == "completion":
            _print_completion(parser, options.shell)
            code = COMPLETE
        else:
            from autoalign.cli.commands import COMMANDS  # which imports torch

            with _warnings_shown():
                code = COMMANDS[options.command](options)
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
    """Send what is still written to a stream that nobody reads to nowhere, above all at the end of the process."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _print_completion(parser: argparse.ArgumentParser, shell: str) -> None:
    """Print the script that makes a shell complete commands, options and paths."""
    import shtab

    parsers = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:  # the short help, since shells show one line
                action.choices[choice.dest].description = choice.help
            parsers += action.choices.values()
    for each in parsers:
        for action in each._actions:
            if action.metavar in PATHS:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell))
