"""``autoalign align``: the report of an alignment; nothing is loaded."""

from __future__ import annotations

import argparse

from autoalign.cli.options import TARGET, Commands, add_align, add_report, add_sides, align_options, code_of, command


def add(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands,
        "align",
        "report what would be loaded from where, and what would not",
        "Align a checkpoint with a target and report what would be loaded from where, what would not, and why. No "
        f"tensor data is read and nothing is written. {TARGET}",
    )
    add_sides(parser)
    add_report(parser)
    add_align(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from autoalign.api import align
    from autoalign.cli.reports import show_alignment
    from autoalign.cli.targets import side_of

    alignment = align(side_of(options.checkpoint), side_of(options.target), **align_options(options))
    show_alignment(alignment, options, options.checkpoint, options.target)
    return code_of(alignment)
