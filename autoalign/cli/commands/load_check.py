"""``autoalign load-check``: load into the model itself, and look at what it then holds."""

from __future__ import annotations

import argparse

from autoalign.cli.options import TARGET, Commands, add_align, add_report, add_sides, align_options, code_of, command


def add(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands,
        "load-check",
        "load a checkpoint into a model, read every value, and report",
        "Build a model, load a checkpoint into it as autoalign.load does, and report what was loaded. Every value is "
        f"read, and tensors with values that are not finite are named. Nothing is written. {TARGET} "
        "Here it has to be a model.",
    )
    add_sides(parser)
    parser.add_argument("--strict", action="store_true", help="fail unless all of both sides is used")
    add_report(parser)
    add_align(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    import warnings

    import torch

    from autoalign.api import load
    from autoalign.cli.reports import show_alignment
    from autoalign.cli.targets import model_of
    from autoalign.errors import ValueWarning
    from autoalign.reports.rows import escaped

    model = model_of(options.target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ValueWarning)  # the verdict and the notes of the report say the same
        alignment = load(model, options.checkpoint, strict=options.strict, **align_options(options))
    held = model.state_dict()
    odd = [
        match.target
        for match in alignment.matches
        if held[match.target].is_floating_point() and not bool(torch.isfinite(held[match.target].float()).all())
    ]
    verdict = f"Loaded {len(alignment.matches)} of {len(alignment.target_specs)} tensors into {type(model).__name__}"
    if odd:
        named = ", ".join(map(escaped, odd[:5])) + (", ..." if len(odd) > 5 else "")
        verdict += f"; {len(odd)} of them hold values that are not finite: {named}."
    else:
        verdict += "; all their values are finite."
    show_alignment(alignment, options, options.checkpoint, options.target, verdict)
    return code_of(alignment)
