"""``autoalign convert``: write a checkpoint anew in a target's names."""

from __future__ import annotations

import argparse

from autoalign.cli.options import (
    OUTPUT_FORMATS,
    TARGET,
    Commands,
    add_align,
    add_report,
    align_options,
    code_of,
    command,
)


def add(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands,
        "convert",
        "write a checkpoint anew in a target's names, as safetensors or a distributed checkpoint",
        "Write a checkpoint anew in a target's names, shapes and layout, tensor by tensor. The output appears when it "
        f"is complete. {TARGET}",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint: a file, an index, or a folder, of any format")
    parser.add_argument("--to", metavar="TARGET", dest="target", required=True, help="what to write it for")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="NAME.safetensors, or a folder")
    parser.add_argument(
        "--output-format",
        choices=OUTPUT_FORMATS,
        default=OUTPUT_FORMATS[0],
        help="dcp is a folder of torch.distributed.checkpoint, new or empty (default: %(default)s)",
    )
    parser.add_argument("--dtype", help="what floating-point tensors become, such as bfloat16 (default: as they are)")
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default="50GB",
        help="of a file of safetensors; what is larger is sharded (%(default)s)",
    )
    parser.add_argument(
        "--metadata", metavar="KEY=VALUE", action="append", default=[], help="an entry for the file's metadata"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that is there")
    parser.add_argument("--strict", action="store_true", help="write nothing unless all of both sides is used")
    add_report(parser)
    add_align(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from autoalign.api import convert
    from autoalign.cli.reports import show_alignment
    from autoalign.cli.targets import side_of
    from autoalign.cli.terminal import progress
    from autoalign.errors import InputError
    from autoalign.reports.rows import escaped

    metadata = {}
    for entry in options.metadata:
        key, equals, value = entry.partition("=")
        if not equals:
            raise InputError(f"--metadata {entry!r} is not of the form KEY=VALUE. Nothing was written.")
        metadata[key] = value
    target = side_of(options.target, values=bool(options.adapt))  # which may keep values of the target's own
    with progress("Writing") as report:
        alignment = convert(
            side_of(options.checkpoint, values=True),
            target,
            options.output,
            format=options.output_format,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            metadata=metadata,
            strict=options.strict,
            overwrite=options.overwrite,
            progress=report,
            **align_options(options),
        )
    verdict = f"Wrote {len(alignment.matches)} tensors to {escaped(options.output)}."
    show_alignment(alignment, options, options.checkpoint, options.target, verdict)
    return code_of(alignment)
