"""The program: which command is run, and what is printed of errors, interrupts and warnings.

It imports nothing that takes time, so that ``--help`` is instant.
"""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Annotated, Any, Literal

import typer

from autoalign import __version__
from autoalign.cli import commands  # noqa: F401, which adds its commands
from autoalign.cli.arguments import Quiet, Verbose, app, command, in_options
from autoalign.cli.terminal import BROKEN_PIPE, ERROR, INCOMPLETE, INTERRUPTED, complain, settings
from autoalign.errors import (
    AmbiguousAlignmentError,
    AutoAlignError,
    ChoiceWarning,
    IncompatibleTensorsError,
    PartialLoadWarning,
)

_COMPLETION = "_AUTOALIGN_COMPLETE"  # of the environment, by which a shell asks for words
_BASH = """\
_autoalign_completion() {
    local IFS=$'\\n' line=${COMP_LINE:0:COMP_POINT}
    local word=${line##* } before
    local words=(${line// /$'\\n'})  # not those of bash, which ends words at colons
    [[ -n $word ]] && before=$((${#words[@]} - 1)) || before=${#words[@]}
    COMPREPLY=($(COMP_WORDS=$line COMP_CWORD=$before _AUTOALIGN_COMPLETE=complete_bash "$1"))
    [[ $word == *:* ]] && COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*:}"}"}")
}
complete -o default -F _autoalign_completion autoalign
"""
_ZSH = """\
#compdef autoalign
_autoalign() {
    eval "$(_TYPER_COMPLETE_ARGS="${words[1,$CURRENT]}" _AUTOALIGN_COMPLETE=complete_zsh ${words[1]})"
}
[[ $zsh_eval_context[-1] == loadautofunc ]] && _autoalign "$@" || compdef _autoalign autoalign
"""
_EPILOG = (
    "exit codes: 0 complete or equal; 1 incomplete or different; 2 an error, reported on "
    "stderr. Results are on stdout, all else is on stderr."
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"autoalign {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True, epilog=_EPILOG)
def program(
    context: typer.Context,
    quiet: Quiet = False,
    verbose: Verbose = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    """Load any PyTorch checkpoint into any implementation of the same network."""
    settings.quiet, settings.verbose = quiet, verbose
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


@command(exits="exit codes: 0 printed; 2 an error, reported on stderr")
def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="which shell the script is for")],
) -> int:
    """Print a script that completes commands, options, paths and models in a shell.

    bash: put eval "$(autoalign completion bash)" into ~/.bashrc. zsh: autoalign completion zsh > DIR/_autoalign, with a
    DIR of your fpath. fish: autoalign completion fish > ~/.config/fish/completions/autoalign.fish.
    """
    return _complete(f"source_{shell}")


def _complete(instruction: str) -> int:
    """Answer a shell: print the words that complete a line, or with ``source_SHELL`` the script that asks for them."""
    if instruction in (own := {"source_bash": _BASH, "source_zsh": _ZSH}):
        print(own[instruction], end="")
        return 0
    from typer import completion as shells

    shells.get_completion_inspect_parameters()  # which makes the shells known
    return shells.shell_complete(typer.main.get_command(app), {}, "autoalign", _COMPLETION, instruction)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, by default that of the process's own arguments.

    Returns:
        The exit code, as ``--help`` explains them; 130 after a Ctrl-C, and 141 where the reader of the output has gone.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever the terminal's encoding lacks
    try:
        if arguments is None and (instruction := os.environ.get(_COMPLETION)):
            return _complete(instruction)
        group = typer.main.get_command(app)
        with _warnings_shown():
            given = list(sys.argv[1:] if arguments is None else arguments)
            with group.make_context("autoalign", given) as context:
                code: int = group.invoke(context)
        sys.stdout.flush()
    except typer.Exit as error:
        return error.exit_code
    except typer.TyperException as error:
        complain(f"error: {_usage_text(error)}")
        return ERROR
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # what is still written, above all at the end of the process, goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except (IncompatibleTensorsError, AmbiguousAlignmentError) as error:
        return _failed("incomplete", error, INCOMPLETE)
    except (AutoAlignError, OSError) as error:
        return _failed("error", error, ERROR)
    return code


def _failed(what: str, error: Exception, code: int) -> int:
    """Write an error, and its details where they are asked for; return the exit code."""
    details = getattr(error, "details", "") if settings.verbose else ""
    complain(in_options("\n".join([f"{what}: {error}", *([details] if details else [])])))
    return code


def _usage_text(error: Any) -> str:
    """Return what is wrong with a command line in a sentence, with the most similar word and where to look."""
    context = getattr(error, "ctx", None)
    text = error.format_message().replace("Value error, ", "").strip()  # the last are words of pydantic
    if similar := getattr(error, "possibilities", ()):
        text = f"{error.message}. Did you mean {similar[0]}?"
    elif context and text.startswith("Missing argument"):  # it guesses which where one may be several
        usage = " ".join([context.command_path, *context.command.collect_usage_pieces(context)])
        text = f"An argument is missing. Usage: {re.sub('[{}]', '', usage)}"
    text += "" if text.endswith(("?", ".")) else "."
    return f"{text} See: {context.command_path if context else 'autoalign'} --help"


@contextmanager
def _warnings_shown() -> Iterator[None]:
    """Show warnings as notes of this program, without the lines of code that they come from."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        complain(in_options(f"warning: {message}"))

    with warnings.catch_warnings():
        for category in (PartialLoadWarning, ChoiceWarning):
            warnings.simplefilter("ignore", category)  # the report says all of it
        warnings.showwarning = show
        yield
