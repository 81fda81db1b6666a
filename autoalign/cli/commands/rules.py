"""``autoalign rules``: an alignment as rules, in the forms that others read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from inspect import signature
from pprint import pformat
from typing import Any

from autoalign.cli.options import TARGET, Commands, add_align, add_format, add_sides, align_options, code_of, command

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
    from autoalign.api import align
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
    show(_written(alignment.rules(), options.format, options.name), plain=options.format != "text")
    return code_of(alignment)


def _written(rules: Any, form: str, name: str) -> str:
    match form:
        case "json":
            return str(rules.to_json())
        case "python":
            return str(rules.to_python(name)).rstrip("\n")
        case "key_mapping":
            return pformat(rules.to_key_mapping(), width=100, sort_dicts=False)
        case "revise_keys":
            return pformat(rules.to_revise_keys(), width=100)
        case "transformers":
            return _source(rules.to_transformers())
        case _:
            return str(rules)


def _source(conversions: Sequence[Any]) -> str:
    """Write objects of transformers as the Python that makes them, which their repr does not say."""
    lines, names = [], set()
    for conversion in conversions:
        operations = getattr(conversion, "operations", [])
        patterns = [_original(conversion, side) for side in ("source_patterns", "target_patterns")]
        arguments = [repr(side[0] if len(side) == 1 else side) for side in patterns]
        if operations:
            arguments.append(f"operations=[{', '.join(map(_call, operations))}]")
        names |= {type(part).__name__ for part in (conversion, *operations)}
        lines.append(f"    {type(conversion).__name__}({', '.join(arguments)}),")
    imported = f"from transformers.core_model_loading import {', '.join(sorted(names))}\n\n" if names else ""
    return "\n".join([f"{imported}conversions = [", *lines, "]"])


def _original(conversion: Any, side: str) -> list[str]:
    return list(getattr(conversion, f"_original_{side}", None) or getattr(conversion, side))


def _call(operation: Any) -> str:
    usual = {name: known.default for name, known in signature(type(operation)).parameters.items()}
    given = {name: getattr(operation, name) for name in usual if hasattr(operation, name)}
    told = [f"{name}={value!r}" for name, value in given.items() if value != usual[name] or name.startswith("dim")]
    return f"{type(operation).__name__}({', '.join(told)})"
