"""The options of ``align``: their types, their flags on the command line, and the error for unknown ones; no torch."""

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, TypedDict, get_args

from autoalign.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

RuleLike = Mapping[str, str] | Iterable[tuple[str, str]]
PatternLike = str | re.Pattern[str] | Iterable[str | re.Pattern[str]] | None
Adapt = Literal["head", "vocab", "pos_embed", "rel_pos", "in_channels"]
ADAPTS: tuple[Adapt, ...] = get_args(Adapt)


class Flag(NamedTuple):
    """An option as the command line has it; one without a flag is an option of the library alone."""

    help: str
    name: str = ""  # --NAME by default, with hyphens
    metavar: str | None = None  # MODEL where models are to be completed


class MatchOptions(TypedDict, total=False):
    """The options of ``align`` that need no call of a module; those of ``verify``."""

    rules: Annotated[
        RuleLike,
        Flag("known beforehand: a key or regex of the checkpoint = the target's key or a replacement", "--rule", "A=B"),
    ]
    include: Annotated[PatternLike, Flag("only keys that it takes take part", metavar="PATTERN")]
    exclude: Annotated[
        PatternLike,
        Flag(
            "keys of either side that take no part: a word or dotted path takes the keys that hold it as whole "
            "components, re:REGEX those that the regular expression is found in",
            metavar="PATTERN",
        ),
    ]
    adapt: Annotated[
        Adapt | Iterable[Adapt],
        Flag(f"changes of values to allow: {', '.join(ADAPTS)} (default: none)", metavar="KIND"),
    ]
    min_confidence: Annotated[
        float, Flag("list less sure matches as ambiguous and do not load them (default: 0.5)", metavar="P")
    ]
    container: Annotated[
        str | None, Flag("which of several state dicts in the checkpoint to take, such as ema", metavar="NAME")
    ]
    dequantise: Annotated[bool, Flag("fill plain tensors from quantised ones (the default), or leave these out, named")]
    merge_adapter: Annotated[bool, Flag("add the LoRA in the checkpoint to the weights that it changes")]


class AlignOptions(MatchOptions, TypedDict, total=False):
    """The options of ``align``, for functions that pass them on; type checkers and editors then know each.

    def my_load(model: nn.Module, path: str, **options: typing.Unpack[autoalign.AlignOptions]) -> None:
        autoalign.load(model, path, **options)
    """

    example_inputs: object
    source_model: Annotated[
        "nn.Module | str | None",
        Flag(
            "the code that the checkpoint belongs to, named as a TARGET is, or auto, for what the configuration "
            "beside it describes; it is compared with the target's",
            metavar="MODEL",
        ),
    ]


class NoOptions(TypedDict):
    """No options: the type of ``**unknown``, which type checkers refuse as ``align`` does."""


def check_options(
    function: Callable[..., object],
    given: Mapping[str, object],
    consequence: str,
    known: Collection[str] = AlignOptions.__annotations__,
) -> None:
    """Refuse options that are not ``known``, naming the most similar one of them or of the function called.

    >>> check_options(sorted, {"exclude": "fc"}, "Nothing was sorted.")
    >>> check_options(sorted, {"revers": True}, "Nothing was sorted.")
    Traceback (most recent call last):
    autoalign.errors.InputError: sorted() got an unexpected keyword argument 'revers'. Did you mean 'reverse'? Nothing \
was sorted.
    """
    unknown = [name for name in given if name not in known]
    if not unknown:
        return
    own = [name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind < 4]
    names = list(dict.fromkeys((*own, *known)))
    parts = [f"{name!r}.{did_you_mean(name, names)}" for name in unknown]
    plural = "an unexpected keyword argument" if len(parts) == 1 else "unexpected keyword arguments"
    raise InputError(f"{function.__name__}() got {plural} {' '.join(parts)} {consequence}")
