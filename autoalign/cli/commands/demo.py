"""``autoalign demo``: a demonstration that needs no files."""

from __future__ import annotations

import argparse

from autoalign.cli.options import COMPLETE, INCOMPLETE, Commands, command


def add(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands,
        "demo",
        "load torchvision's RegNet into timm's and compare what they compute",
        "Save torchvision's regnet_y_400mf with random weights, load the file into timm's regnety_004, "
        "whose keys have other names, and compare what the two compute. Nothing is downloaded.",
        epilog="exit codes: 0 all is loaded and equal; 1 something is missing or differs; 2 an error, said on stderr",
    )
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Run the command."""
    from rich.console import Console

    from autoalign.cli.demo import SOURCE, TARGET, TOLERANCE, demonstrate
    from autoalign.cli.terminal import show

    with Console(stderr=True).status(f"Loading {SOURCE} into {TARGET}"):
        demonstration = demonstrate()
    verdict = "equal" if demonstration.equal else "NOT equal"
    show(
        f"{SOURCE} -> {TARGET}\n\n{demonstration.alignment}\n\n"
        f"Largest relative difference of the outputs: {demonstration.difference:.1e} "
        f"({verdict}, at a tolerance of {TOLERANCE:.0e})"
    )
    return COMPLETE if demonstration.equal else INCOMPLETE
