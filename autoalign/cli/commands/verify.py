"""``autoalign verify``: run two models and compare what they compute."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from autoalign.cli.options import COMPLETE, INCOMPLETE, TARGET, Commands, add_align, add_format, align_options, command

if TYPE_CHECKING:
    from torch import Tensor


def add(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands,
        "verify",
        "load one model's weights into another and compare what they compute",
        "Build two models, load the weights of the first into the second, run both on the same random inputs, and say "
        "whether they compute the same, or from which module on they do not. The weights are those that --checkpoint "
        f"gives the first model, else its initial ones. {TARGET} Here SOURCE and TARGET have to be models.",
        epilog="exit codes: 0 equal; 1 not equal, or not all is loaded; 2 an error, said on stderr",
    )
    parser.add_argument("source", metavar="SOURCE", help="the model whose weights are loaded into the other")
    parser.add_argument("target", metavar="TARGET", help="the model that they are loaded into")
    parser.add_argument(
        "--input",
        metavar="[NAME=]SHAPE[:DTYPE[:N]]",
        action="append",
        required=True,
        help="an example input, as 1,3,224,224 or input_ids=1,16:int64:1000 (integers below N, 2 by default); "
        "give one for each argument of the models",
    )
    parser.add_argument("--checkpoint", metavar="CKPT", help="loaded into the first model before")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of weights and inputs (default: %(default)s)")
    add_format(parser, ("text", "json"))
    add_align(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    import json

    import torch

    import autoalign
    from autoalign.cli.targets import model_of
    from autoalign.cli.terminal import complain, show

    torch.manual_seed(options.seed)
    inputs = _inputs(options.input)
    source, target = model_of(options.source).eval(), model_of(options.target).eval()
    align = align_options(options)
    if options.checkpoint:
        loaded = autoalign.load(source, options.checkpoint, container=align.pop("container"))
        if loaded.missing_keys:
            complain(
                f"note: the checkpoint fills {len(loaded.matches)} of {len(loaded.target_specs)} tensors of the source"
            )
    found = autoalign.verify(source, target, inputs, **align)
    divergence = found.first_divergence
    if options.format == "json":
        first = divergence and {
            "source_module": divergence.source_module,
            "target_module": divergence.target_module,
            "difference": divergence.difference,
            "cause": divergence.cause,
        }
        result = {"equal": found.equal, "max_difference": found.max_difference, "first_divergence": first}
        show(json.dumps({"source": options.source, "target": options.target, **result}, indent=2), plain=True)
    else:
        show(str(found))
    return COMPLETE if found.equal else INCOMPLETE


def _inputs(texts: list[str]) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """Make random inputs of the shapes that are asked for.

    >>> [tuple(tensor.shape) for tensor in _inputs(["1,3,8,8", "2:int64"])]
    [(1, 3, 8, 8), (2,)]
    """
    from autoalign.errors import InputError

    made = [_input(text) for text in texts]
    names = [name for name, _ in made if name]
    if names and (len(names) < len(made) or len(set(names)) < len(names)):
        raise InputError("Either all --input have names, all different, or none has one. Nothing was done.")
    return dict(made) if names else tuple(tensor for _, tensor in made)


def _input(text: str) -> tuple[str, Tensor]:
    import re

    import torch

    from autoalign.checkpoints.stored import named_dtype
    from autoalign.errors import InputError

    found = re.fullmatch(r"(?:(\w+)=)?([0-9]+(?:,[0-9]+)*)?(?::(\w+)(?::([0-9]+))?)?", text)
    dtype = named_dtype(found[3] or "float32") if found else None
    if found is None or dtype is None or not text:
        raise InputError(
            f"--input {text!r} is no shape, such as 1,3,224,224 or input_ids=1,16:int64. Nothing was done."
        )
    shape = [int(size) for size in found[2].split(",")] if found[2] else []
    if dtype.is_floating_point or dtype.is_complex:
        return found[1] or "", torch.randn(shape, dtype=torch.float32).to(dtype)
    return found[1] or "", torch.randint(0, int(found[4] or 2), shape).to(dtype)
