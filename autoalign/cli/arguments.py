"""What commands are made of: ``command``, and the types of arguments, with the sides that they name.

Options come from signatures of the library. A side is a path or a model such as ``timm:resnet50(num_classes=10)``.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import warnings
from ast import literal_eval
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from enum import StrEnum
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer

from autoalign.cli.terminal import settings, stop_display, working
from autoalign.errors import InputError, PatternError
from autoalign.plan.options import Flag

if TYPE_CHECKING:
    from torch import nn

    from autoalign.checkpoints.checkpoint import Side

_TEXT = r"""r?'(?:[^'\\\n]|\\.)*'|r?"(?:[^"\\\n]|\\.)*\""""
_VALUE = rf"""{_TEXT}|\[(?:[^]'"\n]|{_TEXT})*\]|\w+(?:\.\d+)?"""  # of Python
Command = TypeVar("Command", bound=Callable[..., int])
app = typer.Typer(name="autoalign", add_completion=False, rich_markup_mode=None)

EXIT_CODES = (
    "exit codes: 0 complete: every tensor of the target is filled, but for those that --exclude and --include leave "
    "out; 1 incomplete: some are not, or something differs; 2 an error, reported on stderr"
)
_MODEL = (
    "a model, which is built without its weights: timm:NAME, torchvision:NAME, transformers:NAME (the base model of "
    "a configuration on the Hub or in a folder), transformers:CLASS@NAME, or package.module:factory, whose code is "
    "run. Arguments may follow, such as timm:resnet50(num_classes=10)"
)
_CHECKPOINT = (
    "a checkpoint of any format: a file, an index, a folder, hf://OWNER/NAME or https://...; or several files or a "
    "pattern of them"
)


def complete_models(incomplete: str) -> list[str]:
    """List the models of a library that a text such as ``timm:res`` begins; of anything else a shell completes files.

    >>> complete_models("resnet.pt")
    []
    """
    library, colon, start = incomplete.partition(":")
    return [f"{library}:{name}" for name in (model_names(library) if colon else ()) if name.startswith(start)]


def model_names(library: str) -> list[str]:
    """List the names of a library's models, which are kept in a file, since importing a library takes seconds."""
    with suppress(PackageNotFoundError, OSError):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "autoalign"
        file = folder / f"{library}-{version(library)}.txt"
        if not file.exists():
            from autoalign.checkpoints.named_models import LIBRARIES, names_in

            if library not in LIBRARIES:
                return []
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(names_in(library)), encoding="utf-8")
        return file.read_text(encoding="utf-8").splitlines()
    return []


def side(metavar: str, text: str) -> Any:
    """Return an argument that names a checkpoint or a model."""
    return typer.Argument(metavar=metavar, help=text, autocompletion=complete_models, show_default=False)


Checkpoints = Annotated[list[str], side("CKPT", _CHECKPOINT)]
CheckpointsOrModel = Annotated[list[str], side("CKPT", f"{_CHECKPOINT}; or {_MODEL}")]
Target = Annotated[str, side("TARGET", f"another checkpoint, or {_MODEL}")]
Model = Annotated[str, side("TARGET", _MODEL)]
Form = Annotated[Literal["text", "json"], typer.Option("--format", help="of the result")]
TableForm = Annotated[Literal["text", "json", "markdown"], typer.Option("--format", help="of the result")]
ReportForm = Annotated[Literal["text", "json", "markdown", "html"], typer.Option("--format", help="of the result")]
Everything = Annotated[bool, typer.Option("--all", help="write every row of a text report, however many there are")]
OpenPage = Annotated[bool, typer.Option("--open", help="write the report as HTML and open it in a browser")]
Container = Annotated[str | None, typer.Option(metavar="NAME", help="which of several state dicts, such as ema")]
Strict = Annotated[bool, typer.Option("--strict", help="fail, and do nothing, unless all of both sides is used")]


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no warnings, notes and progress")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="the details of errors")]


def command(*, exits: str = EXIT_CODES) -> Callable[[Command], Command]:
    """Return a decorator that makes a function a command; see the docstring of ``autoalign.cli``."""

    def add(function: Command) -> Command:
        @wraps(function)
        def run(quiet: bool, verbose: bool, **given: Any) -> int:
            settings.quiet |= quiet
            settings.verbose |= verbose
            known = {name: value for name, value in given.items() if value is not None}  # defaults are the library's
            if "rules" in known:
                known["rules"] = pairs_of(known["rules"])
            if known.get("source_model") not in (None, "auto"):
                known["source_model"] = model_of(known["source_model"], values=False)
            sides = known.get("checkpoint") or [known[name] for name in ("first", "second") if name in known]
            with working(f"Opening {sides if isinstance(sides, str) else ', '.join(sides)}" if sides else "Working"):
                return function(**known)

        run.__annotations__ = {}
        common = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=hint)
            for name, hint in (("quiet", Quiet), ("verbose", Verbose))
        ]
        run.__signature__ = inspect.Signature([*_parameters(function), *common])  # type: ignore[attr-defined]
        app.command(short_help=(function.__doc__ or "").partition("\n")[0], epilog=exits)(run)
        return function

    return add


def _parameters(function: Callable[..., int]) -> Iterable[inspect.Parameter]:
    """Yield the parameters of a command: its own, and one for each option of an unpacked ``TypedDict``."""
    for own in inspect.signature(function, eval_str=True).parameters.values():
        if own.kind is not own.VAR_KEYWORD:
            yield own.replace(kind=own.KEYWORD_ONLY)
            continue
        (options,) = get_args(own.annotation)
        for name, hint in options.__annotations__.items():
            if get_origin(hint) is Annotated and isinstance(flag := hint.__metadata__[0], Flag):
                yield inspect.Parameter(name, own.KEYWORD_ONLY, default=None, annotation=_option(flag, hint))


def _option(flag: Flag, hint: Any) -> Any:
    """Return the type of an option for typer, given that of the library."""
    parts = list(_parts(hint.__origin__))
    choices = next((get_args(part) for part in parts if get_origin(part) is Literal), ())
    kind: Any = StrEnum("Choice", {choice: choice for choice in choices}) if choices else str
    kind = next((part for part in (bool, float) if part in parts), kind)
    if any(isinstance(origin := get_origin(part), type) and issubclass(origin, Iterable) for part in parts):
        kind = list[kind]
    names = (flag.name,) if flag.name else ()
    models = complete_models if flag.metavar == "MODEL" else None
    option = typer.Option(*names, metavar=flag.metavar, help=flag.help, show_default=False, autocompletion=models)
    return Annotated[kind | None, option]


def _parts(hint: Any) -> Iterable[Any]:
    yield hint
    if get_origin(hint) is not Literal:
        for part in get_args(hint):
            yield from _parts(part)


def side_of(given: str | Sequence[str], *, values: bool = False) -> Side:
    """Return an argument, or several that are one checkpoint, as one side of an alignment.

    It is a path if there is such a file or folder, or one that such a pattern takes, else a model. With ``values``, a
    model is built with its initial values, and not on the meta device.
    """
    from autoalign.checkpoints.paths import is_file
    from autoalign.checkpoints.remote import is_remote

    texts = [given] if isinstance(given, str) else given
    if any(map(is_remote, texts)):
        stop_display()  # a download shows its own
    if len(texts) > 1:
        return texts
    return texts[0] if is_file(texts[0]) else _built(texts[0], values=values, or_path=True)


def model_of(text: str, *, values: bool = True, hint: str = "") -> nn.Module:
    """Build a model, with its initial values or on the meta device; the ``hint`` is for what is none."""
    from torch import nn

    from autoalign.checkpoints.paths import is_file
    from autoalign.checkpoints.remote import is_remote

    model = None if is_file(text) and not is_remote(text) else _built(text, values=values)
    if not isinstance(model, nn.Module):
        what = "a path" if model is None else f"a {type(model).__name__}"
        raise InputError(f"{text!r} is {what}, not a model such as timm:resnet50. Nothing was done.{hint}")
    return model


def _built(text: str, *, values: bool, or_path: bool = False) -> nn.Module | Mapping[str, object]:
    from autoalign.checkpoints.named_models import build

    with redirect_stdout(sys.stderr), warnings.catch_warnings():  # what its code prints is not a result
        warnings.simplefilter("ignore")  # of how a library will initialise weights in future
        return build(text, values=values, or_path=or_path)


def pairs_of(rules: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs that ``--rule A=B`` gives.

    >>> pairs_of(["(?<=a)b=c"])
    [('(?<=a)b', 'c')]
    """
    pairs = []
    for rule in rules:
        first, equals, second = rule.rpartition("=")  # a regex may contain equals signs
        if not (first and equals and second):
            raise PatternError(f"--rule {rule!r} is not of the form A=B. Nothing was aligned.")
        pairs.append((first, second))
    return pairs


def in_options(text: str) -> str:
    """Return what the library says in the words of the command line: with options where it names its arguments.

    >>> in_options("Pass strict=False, or rules=[('a', 'b c')]; exclude='fc' leaves it out.")
    "Leave out --strict, or --rule 'a=b c'; --exclude fc leaves it out."
    """
    known = {
        option.name: (max(option.opts, key=len), next(iter(option.secondary_opts), ""))
        for command in typer.main.get_group(app).commands.values()
        for option in command.params
        if option.param_type_name == "option"
    }

    def replaced(found: re.Match[str]) -> str:
        option, negated = known[found[2]]
        try:
            value = literal_eval(found[3]) if found[3] else True
        except ValueError:  # a name, such as that of a choice
            return found[0]
        if value is True:
            return f"{found[1]}{option}"
        if value is False:
            return f"{found[1]}{negated}" if negated else f"{'Leave out' if found[1] else 'no'} {option}"
        values = value if isinstance(value, list) else [value]
        given = ("=".join(each) if isinstance(each, tuple) else str(each) for each in values)
        return found[1] + " ".join(f"{option} {quote(each)}" for each in given)

    text = re.sub(rf"(Pass |)(?<![\w.])({'|'.join(map(str, known))})=({_VALUE})?", replaced, text)
    return text.replace("error.details", "--verbose")
