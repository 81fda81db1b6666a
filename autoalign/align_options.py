"""The options of ``align``, which ``load``, ``convert`` and ``verify`` take too, as a type and as a check."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TypedDict

from autoalign.adaptations import Adapt
from autoalign.errors import InputError
from autoalign.patterns import PatternLike, RuleLike

_CLOSE = 60  # likeness, of 100, from which on another name may be what was meant


class MatchOptions(TypedDict, total=False):
    """The options of ``align`` that need no call of a module, as ``verify`` hands them on."""

    rules: RuleLike
    include: PatternLike
    exclude: PatternLike
    adapt: Adapt | Iterable[Adapt]
    min_confidence: float
    container: str | None


class AlignOptions(MatchOptions, TypedDict, total=False):
    """The options of ``align``, for functions that hand them on.

    A type checker knows each option and its type, and an editor completes them:

        from typing import Unpack

        def my_load(model: nn.Module, path: str, **options: Unpack[autoalign.AlignOptions]) -> None:
            autoalign.load(model, path, **options)
    """

    example_inputs: object


class NoOptions(TypedDict):
    """No options: what a function takes as ``**unknown`` that refuses them itself, as type checkers do."""


def check_options(function: Callable[..., object], given: Mapping[str, object], undone: str) -> None:
    """Refuse options that ``align`` does not have.

    >>> check_options(sorted, {"exclude": "fc"}, "Nothing was sorted.")
    >>> check_options(sorted, {"revers": True}, "Nothing was sorted.")
    Traceback (most recent call last):
    autoalign.errors.InputError: sorted() got an unexpected keyword argument 'revers'; did you mean 'reverse'? Nothing \
was sorted.

    Args:
        function: What was called; its own parameters may be what was meant.
        given: The options that are no parameters of its own.
        undone: What was not done.

    Raises:
        InputError: Names each such option with the nearest one that there is.
    """
    known = AlignOptions.__annotations__.keys()
    unknown = [name for name in given if name not in known]
    if not unknown:
        return
    from rapidfuzz import fuzz, process

    own = [name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind < 4]
    names = list(dict.fromkeys((*own, *known)))
    parts = []
    for name in unknown:
        close = process.extractOne(name, names, scorer=fuzz.ratio, score_cutoff=_CLOSE)
        parts.append(f"{name!r}; did you mean {close[0]!r}?" if close else f"{name!r}.")
    plural = "an unexpected keyword argument" if len(parts) == 1 else "unexpected keyword arguments"
    raise InputError(f"{function.__name__}() got {plural} {' '.join(parts)} {undone}")
