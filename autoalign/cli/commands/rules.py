"""``autoalign rules``: an alignment as rules, in the forms that others read."""

from __future__ import annotations

import argparse

from autoalign.cli.codes import code_of
from autoalign.cli.options import TARGET, Commands, add_align, add_format, add_sides, align_options, command

FORMATS = ("text", "json", "key_mapping", "revise_keys", "transformers", "python")


def add(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands,
        "rules",
        "print the renamings and operations that lead from a checkpoint to a target",
        "Print the shortest list of renamings and operations that leads from the checkpoint's keys to the target's, to "
        "read, or for others: key_mapping (of from_pretrained in transformers), revise_keys (mmengine), transformers "
        "(WeightRenaming and WeightConverter), or python: a function that needs torch alone. "
        f"{TARGET}",
    )
    add_sides(parser)
    add_format(parser, FORMATS)
    parser.add_argument(
        "--name", default="checkpoint_filter_fn", help="of the function, with --format python (default: %(default)s)"
    )
    add_align(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from autoalign.aligning import align
    from autoalign.cli.targets import side_of
    from autoalign.cli.terminal import complain, show
    from autoalign.errors import InputError

    if not options.name.isidentifier():
        raise InputError(f"--name {options.name!r} is no name of a Python function. Nothing was done.")
    alignment = align(side_of(options.checkpoint), side_of(options.target), **align_options(options))
    missing = set(alignment.missing_keys) - alignment.excluded
    if missing:
        complain(
            f"note: the rules fill {len(alignment.matches)} of {len(alignment.target_specs)} tensors of the target; "
            "autoalign align says why."
        )
    rules = getattr(alignment, "rules", None)
    if rules is None:
        raise InputError("This version infers no rules. Nothing was done.")
    show(_written(rules(), options.format, options.name), plain=options.format != "text")
    return code_of(alignment)


def _written(rules: object, form: str, name: str) -> str:
    from pprint import pformat
    from typing import Any

    found: Any = rules
    match form:
        case "json":
            return str(found.to_json())
        case "python":
            return str(found.to_python(name)).rstrip("\n")
        case "key_mapping":
            return pformat(found.to_key_mapping(), width=100, sort_dicts=False)
        case "revise_keys":
            return pformat(found.to_revise_keys(), width=100)
        case "transformers":
            return pformat(found.to_transformers(), width=100)
        case _:
            return str(found)
