"""The program: its parser, which command is run, and what is printed of errors, interrupts and warnings.

It imports nothing that takes time, so that ``--help`` is instant.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from autoalign import __version__
from autoalign.cli.terminal import BROKEN_PIPE, COMPLETE, ERROR, INCOMPLETE, INTERRUPTED, complain
from autoalign.errors import (
    AmbiguousAlignmentError,
    AutoAlignError,
    ChoiceWarning,
    IncompatibleTensorsError,
    PartialLoadWarning,
)

ADAPTS = ("head", "vocab", "pos_embed", "rel_pos", "in_channels")
OUTPUT_FORMATS = ("safetensors", "dcp")  # of ``convert``
RULE_FORMATS = ("text", "json", "key_mapping", "revise_keys", "transformers", "python")
SHELLS = ("bash", "zsh", "fish")
PATHS = frozenset({"CKPT", "A", "B", "OUT", "TARGET", "SOURCE"})  # arguments that a shell may complete as a path

_EXIT_CODES = (
    "exit codes: 0 complete: every tensor of the target is filled, but for those that --exclude and --include leave "
    "out; 1 incomplete: some are not, or something differs; 2 an error, reported on stderr"
)
_TARGET = (
    "TARGET is another checkpoint, or a model, which is built without its weights: timm:NAME, torchvision:NAME, "
    "transformers:NAME (the base model of a configuration on the Hub or in a folder), transformers:CLASS@NAME, or "
    "package.module:factory, whose code is run. Arguments may follow, such as timm:resnet50(num_classes=10)."
)
_CHECKPOINT = "a checkpoint: a file, an index, or a folder, of any format; or several files or a pattern of them"

_Commands = Any  # what add_subparsers returns has no public type


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the program; the name of the command is stored as ``command``."""
    parser = argparse.ArgumentParser(
        prog="autoalign",
        description="Load any PyTorch checkpoint into any implementation of the same network.",
        epilog=f"{_EXIT_CODES}. Results are on stdout, all else is on stderr.",
    )
    parser.add_argument("--version", action="version", version=f"autoalign {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for add in (_inspect, _align, _load_check, _convert, _rules, _diff, _verify, _demo, _completion):
        add(commands)
    return parser


def _inspect(commands: _Commands) -> None:
    parser = _command(
        commands,
        "inspect",
        "show what a checkpoint holds",
        "Show the tree of modules of a checkpoint of any format, with repeated blocks folded, and with shapes, dtypes "
        "and sizes; which container of several is taken; and prefixes that a wrapper may have put before the names. No "
        "tensor data is read. A model may be named in place of a checkpoint, as in: autoalign inspect timm:resnet50.",
        epilog="exit codes: 0 shown; 2 an error, reported on stderr",
    )
    parser.add_argument("checkpoint", metavar="CKPT", nargs="+", help=f"{_CHECKPOINT}; or a model")
    parser.add_argument("--depth", metavar="N", type=int, help="levels of modules to show (default: all)")
    parser.add_argument("--container", metavar="NAME", help="which of several state dicts to show, such as ema")
    _add_format(parser, ("text", "json", "markdown"))


def _align(commands: _Commands) -> None:
    parser = _command(
        commands,
        "align",
        "report what would be loaded from where, and what would not",
        "Align a checkpoint with a target and report what would be loaded from where, what would not, and why. No "
        f"tensor data is read and nothing is written. {_TARGET}",
    )
    _add_sides(parser)
    _add_report(parser)
    _add_matching(parser)


def _load_check(commands: _Commands) -> None:
    parser = _command(
        commands,
        "load-check",
        "load a checkpoint into a model, read every value, and report",
        "Build a model, load a checkpoint into it as autoalign.load does, and report what was loaded. Every value is "
        f"read, and tensors with values that are not finite are named. Nothing is written. {_TARGET} "
        "Here it has to be a model.",
    )
    _add_sides(parser)
    parser.add_argument("--strict", action="store_true", help="fail unless all of both sides is used")
    _add_report(parser)
    _add_matching(parser)


def _convert(commands: _Commands) -> None:
    parser = _command(
        commands,
        "convert",
        "rewrite a checkpoint in a target's names, as safetensors or a distributed checkpoint",
        "Rewrite a checkpoint in a target's names, shapes and layout, tensor by tensor. The output appears when it "
        f"is complete. {_TARGET}",
    )
    parser.add_argument("checkpoint", metavar="CKPT", nargs="+", help=_CHECKPOINT)
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
    _add_report(parser)
    _add_matching(parser)


def _rules(commands: _Commands) -> None:
    parser = _command(
        commands,
        "rules",
        "print the renamings and operations that lead from a checkpoint to a target",
        "Print the shortest list of renamings and operations that leads from the checkpoint's keys to the target's, to "
        "read, or for others: key_mapping (of from_pretrained in transformers), revise_keys (mmengine), transformers "
        "(WeightRenaming and WeightConverter), or python: a function that needs torch alone. "
        f"{_TARGET}",
    )
    _add_sides(parser)
    _add_format(parser, RULE_FORMATS)
    parser.add_argument(
        "--name", default="checkpoint_filter_fn", help="of the function, with --format python (default: %(default)s)"
    )
    _add_matching(parser)


def _diff(commands: _Commands) -> None:
    parser = _command(
        commands,
        "diff",
        "compare two checkpoints key by key",
        "Compare two checkpoints under the same keys: which are in one only, which have another shape or dtype, and "
        "which hold other values, with the largest difference. Tensors are read one by one. To compare under other "
        "keys, convert one of them first.",
        epilog="exit codes: 0 no difference; 1 some difference; 2 an error, reported on stderr",
    )
    parser.add_argument("first", metavar="A", help="a checkpoint of any format")
    parser.add_argument("second", metavar="B", help="another")
    parser.add_argument("--container", metavar="NAME", help="which of several state dicts in A to take, such as ema")
    parser.add_argument("--other-container", metavar="NAME", help="which of several in B")
    _add_format(parser, ("text", "json", "markdown"))


def _verify(commands: _Commands) -> None:
    parser = _command(
        commands,
        "verify",
        "load one model's weights into another and compare what they compute",
        "Build two models, load the weights of the first into the second, run both on the same random inputs, and say "
        "whether they compute the same, or from which module on they do not. The weights are those that --checkpoint "
        f"gives the first model, else its initial ones. {_TARGET} Here SOURCE and TARGET have to be models.",
        epilog="exit codes: 0 equal; 1 not equal, or not all is loaded; 2 an error, reported on stderr",
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
    _add_format(parser, ("text", "json"))
    _add_matching(parser, with_code=False)


def _demo(commands: _Commands) -> None:
    _command(
        commands,
        "demo",
        "load torchvision's RegNet into timm's and compare what they compute",
        "Save torchvision's regnet_y_400mf with random weights, load the file into timm's regnety_004, "
        "whose keys have other names, and compare what the two compute. Nothing is downloaded.",
        epilog="exit codes: 0 all is loaded and equal; 1 it is not; 2 an error, reported on stderr",
    )


def _completion(commands: _Commands) -> None:
    parser = _command(
        commands,
        "completion",
        "print a script that completes commands and options in a shell",
        "Print a script that completes commands, options and paths. "
        'bash: put eval "$(autoalign completion bash)" into ~/.bashrc. '
        "zsh: autoalign completion zsh > DIR/_autoalign, with a DIR of your fpath. "
        "fish: autoalign completion fish > ~/.config/fish/completions/autoalign.fish.",
    )
    parser.add_argument("shell", choices=SHELLS, help="which shell the script is for")


def _command(
    commands: _Commands, name: str, summary: str, description: str, *, epilog: str = _EXIT_CODES
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=description, epilog=epilog)
    return parser


def _add_sides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", nargs="+", help=_CHECKPOINT)
    parser.add_argument("target", metavar="TARGET", help="another checkpoint or a model, as explained above")


def _add_format(parser: argparse.ArgumentParser, formats: Sequence[str]) -> None:
    parser.add_argument("--format", choices=formats, default=formats[0], help="of the result (default: %(default)s)")


def _add_report(parser: argparse.ArgumentParser) -> None:
    _add_format(parser, ("text", "json", "markdown", "html"))
    parser.add_argument("--all", action="store_true", help="write every row of a text report, however many there are")


def _add_matching(parser: argparse.ArgumentParser, *, with_code: bool = True) -> None:
    group = parser.add_argument_group("alignment", "Each of the first four may be given several times.")
    group.add_argument(
        "--rule",
        metavar="A=B",
        action="append",
        default=[],
        help="what is known beforehand: a key or regex of the checkpoint, and the target's key or a replacement",
    )
    group.add_argument("--include", metavar="PATTERN", action="append", help="only keys that it takes take part")
    group.add_argument(
        "--exclude",
        metavar="PATTERN",
        action="append",
        help="keys of either side that take no part: a word or dotted path takes the keys that hold it as whole "
        "components, re:REGEX those that the regular expression is found in",
    )
    group.add_argument(
        "--adapt", choices=ADAPTS, action="append", default=[], help="changes of values to allow (default: none)"
    )
    group.add_argument(
        "--min-confidence",
        metavar="P",
        type=float,
        default=0.5,
        help="list less sure matches as ambiguous and do not load them (default: %(default)s)",
    )
    group.add_argument(
        "--container", metavar="NAME", help="which of several state dicts in the checkpoint to take, such as ema"
    )
    if with_code:
        group.add_argument(
            "--source-model",
            metavar="MODEL",
            help="the code that the checkpoint belongs to, named as a TARGET is, or auto, for what the configuration "
            "beside it describes; it is compared with the target's",
        )
    group.add_argument(
        "--no-dequantise", dest="dequantise", action="store_false", help="leave quantised tensors out, named"
    )
    group.add_argument(
        "--merge-adapter", action="store_true", help="add the LoRA in the checkpoint to the weights that it changes"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, by default that of the process's own arguments.

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
        with suppress(OSError, ValueError):  # what is still written, above all at the end of the process, goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
