"""Exit codes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoalign.alignment import Alignment
    from autoalign.api import MatchOptions

COMPLETE, INCOMPLETE, ERROR = 0, 1, 2
INTERRUPTED, BROKEN_PIPE = 130, 141  # as of a process that SIGINT or SIGPIPE has ended

EXIT_CODES = (
    "exit codes: 0 complete: every tensor of the target is filled, but for those that --exclude and --include leave "
    "out; 1 incomplete: some are not, or something differs; 2 an error, said on stderr"
)


def code_of(alignment: Alignment) -> int:
    """Tell whether all of a target that was not left out on purpose is filled."""
    return COMPLETE if set(alignment.missing_keys) <= alignment.excluded else INCOMPLETE


ADAPTS = ("head", "vocab", "pos_embed", "rel_pos", "in_channels")
OUTPUT_FORMATS = ("safetensors", "dcp")  # of ``convert``
REPORTS = ("text", "json", "markdown", "html")
TARGET = (
    "TARGET is another checkpoint, or a model, which is built without its weights: timm:NAME, torchvision:NAME, "
    "transformers:NAME (the base model of a configuration on the Hub or in a folder), transformers:CLASS@NAME, or "
    "package.module:factory, whose code is run. Arguments may follow, such as timm:resnet50(num_classes=10)."
)
PATHS = frozenset({"CKPT", "A", "B", "OUT", "FILE", "TARGET", "SOURCE"})  # what a shell may complete as a path

Commands = Any  # what add_subparsers gives has no public type


def command(
    commands: Commands, name: str, summary: str, description: str, *, epilog: str = EXIT_CODES
) -> argparse.ArgumentParser:
    """Add the parser of a command."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=description, epilog=epilog)
    return parser


def add_sides(parser: argparse.ArgumentParser) -> None:
    """Add the two positional arguments: a checkpoint and a target."""
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint: a file, an index, or a folder, of any format")
    parser.add_argument("target", metavar="TARGET", help="another checkpoint or a model, as explained above")


def add_format(parser: argparse.ArgumentParser, formats: Sequence[str] = REPORTS) -> None:
    """Add the choice of a format of the result."""
    parser.add_argument("--format", choices=formats, default=formats[0], help="of the result (default: %(default)s)")


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add the options of a report of an alignment."""
    add_format(parser)
    parser.add_argument("--all", action="store_true", help="write every row of a text report, however many there are")


def add_align(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``autoalign.align``."""
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


def align_options(options: argparse.Namespace) -> MatchOptions:
    """Turn the options of ``add_align`` into arguments of ``autoalign.align``.

    Raises:
        PatternError: A rule is not of the form A=B.
    """
    from autoalign.errors import PatternError

    rules = []
    for rule in options.rule:
        first, equals, second = rule.rpartition("=")  # a regex may have such signs of its own
        if not (first and equals and second):
            raise PatternError(f"--rule {rule!r} is not of the form A=B. Nothing was aligned.")
        rules.append((first, second))
    return {
        "rules": rules,
        "include": options.include,
        "exclude": options.exclude,
        "adapt": options.adapt,
        "min_confidence": options.min_confidence,
        "container": options.container,
    }
