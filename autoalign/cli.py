"""The command line: ``autoalign COMMAND``, also ``python -m autoalign``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from autoalign import __version__
from autoalign.errors import AutoAlignError

COMPLETE, INCOMPLETE, ERROR = 0, 1, 2  # exit codes

_EXIT_CODES = "exit codes: 0 all is loaded and equal; 1 something is missing or differs; 2 an error, said on stderr"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Without the program's name; by default the process's own.

    Returns:
        The exit code: 0 if all is loaded and equal, 1 if something is missing or differs, 2 on an error.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except AutoAlignError as error:
        print(f"autoalign: error: {error}", file=sys.stderr)
        return ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="autoalign",
        description="Load any PyTorch checkpoint into any implementation of the same network.",
        epilog=_EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"autoalign {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="load torchvision's RegNet into timm's and compare what they compute",
        description="Save torchvision's regnet_y_400mf with random weights, load the file into timm's regnety_004, "
        "whose keys have other names, and compare what the two compute. Nothing is downloaded.",
        epilog=_EXIT_CODES,
    )
    demo.set_defaults(run=_demo)


def _demo(_: argparse.Namespace) -> int:
    from rich.console import Console  # late, as all that --help and --version do not need

    from autoalign.demo import SOURCE, TARGET, TOLERANCE, demonstrate

    with Console(stderr=True).status(f"Loading {SOURCE} into {TARGET}"):
        demonstration = demonstrate()
    print(f"{SOURCE} -> {TARGET}\n\n{demonstration.alignment}\n")
    verdict = "equal" if demonstration.equal else "NOT equal"
    print(
        f"Largest relative difference of the outputs: {demonstration.difference:.1e} "
        f"({verdict}, at a tolerance of {TOLERANCE:.0e})"
    )
    return COMPLETE if demonstration.equal else INCOMPLETE
