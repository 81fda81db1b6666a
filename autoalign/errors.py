"""The errors and warnings of autoalign: one base class, and a kind for each cause."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


class AutoAlignError(Exception):
    """Base of every error that autoalign raises on purpose.

    Its text has a line for what is wrong and one for what to do.

    Attributes:
        details: All of it, where that is longer, such as every tensor that is missing.
    """

    details = ""


class InputError(AutoAlignError, TypeError):
    """A source, target, checkpoint or option is of an unusable kind."""

    @classmethod
    def by_others(cls, what: str, error: Exception, advice: str) -> InputError:
        r"""Return the error for what failed in code of others, with the first line of its message; all is in details.

        >>> print(InputError.by_others("It failed", ValueError("No b.\nIt is not there."), "Nothing was done."))
        It failed: ValueError: No b. Nothing was done.
        """
        text = f"{type(error).__name__}: {str(error).strip() or 'without a message'}"
        made = cls(f"{what}: {text.splitlines()[0].rstrip('.: ')}. {advice}")
        made.details = text
        return made


class TraceError(AutoAlignError, RuntimeError):
    """A module cannot be called on tensors without data."""


class PatternError(AutoAlignError, ValueError):
    """A rule, ``include`` or ``exclude`` pattern is malformed or contradicts another."""


class CheckpointError(AutoAlignError, RuntimeError):
    """A checkpoint cannot be read, or holds no state dict."""


class UnsafeCheckpointError(CheckpointError):
    """A pickled checkpoint needs code that ``weights_only=True`` refuses to run.

    Attributes:
        unsafe_globals: The names that the pickle asks for, such as ``"numpy._core.multiarray.scalar"``.
    """

    def __init__(self, message: str, unsafe_globals: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.unsafe_globals = unsafe_globals


class OutputError(AutoAlignError, OSError):
    """A file cannot be written, or exists and was not to be overwritten."""


class NotInvertibleError(AutoAlignError, ValueError):
    """An operation changed values or lost parts of its inputs, so that it cannot be undone."""


class AlignmentError(AutoAlignError, RuntimeError):
    """An alignment is not what the caller required.

    Attributes:
        alignment: The whole ``Alignment``, to inspect or to load in part; None where there is none.
    """

    def __init__(self, message: str, alignment: Any = None, details: str = "") -> None:
        super().__init__(message)
        self.alignment = alignment
        self.details = details


class IncompatibleTensorsError(AlignmentError):
    """Some target tensor has no source, or some source tensor is not used, where all were required."""


class AmbiguousAlignmentError(AlignmentError):
    """Some target tensor has equally good sources, where a decision was required."""


class NothingLoadedError(AlignmentError):
    """No tensor of the checkpoint could be aligned with the model."""


class UnequalModelsError(AlignmentError):
    """A model would not compute what the source does, whatever way of filling it was tried.

    Attributes:
        verification: The ``Verification``, with the first divergence.
    """

    def __init__(self, message: str, verification: Any) -> None:
        super().__init__(message, verification.alignment)
        self.verification = verification


class PairMismatchError(AlignmentError):
    """A saved alignment was made for other keys or shapes than those it is applied to."""


class RulesError(AutoAlignError, ValueError):
    """Rules do not hold for a state dict, or cannot be expressed in the form of an export."""


class PartialLoadWarning(UserWarning):
    """A load filled only a part of the model, and the rest keeps its values; or a conversion wrote only a part."""


class ChoiceWarning(UserWarning):
    """A part of a checkpoint was not used without having been excluded: a copy, a second tied tensor, a bias."""


class ValueWarning(UserWarning):
    """Loaded tensors have NaN, or values that the model's dtype cannot hold."""


class DependencyError(AutoAlignError, ImportError):
    """An optional package that is needed here is not installed."""

    @classmethod
    def reading(cls, what: str, package: str, extra: str = "formats") -> DependencyError:
        """Return the error for files that are read through a package that is not installed."""
        return cls(
            f"{what} are read through the package {package}, which is not installed. Nothing was read. "
            f"Install it with: pip install 'autoalign[{extra}]'"
        )

    @classmethod
    def of(cls, library: str, consequence: str, requirement: str = "") -> DependencyError:
        """Return the error for a call that needs a library which is not installed.

        >>> print(DependencyError.of("timm", "Nothing was done."))
        timm is not installed. Nothing was done. Install it with: pip install timm
        """
        command = f"pip install {requirement or library.lower()}"
        return cls(f"{library} is not installed. {consequence} Install it with: {command}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the question whether the most similar word was meant, after a space; nothing if none is similar.

    >>> did_you_mean("exlude", ["include", "exclude"])
    " Did you mean 'exclude'?"
    """
    close = most_similar(word, known)
    return f" Did you mean {close!r}?" if close else ""


def most_similar(word: str, known: Iterable[str]) -> str:
    """Return the word of some that one was meant to be; '' if none is similar."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(word, known, n=1)), "")


def kind_of(value: object) -> str:
    """Return of what kind a value is that cannot be used, in words.

    >>> kind_of(3), kind_of([3]), kind_of(AutoAlignError)
    ('int', 'a list of int', 'the class AutoAlignError, which has to be called')
    """
    if value is None:
        return "None"
    if isinstance(value, list | tuple):
        inner = f"of {type(value[0]).__name__}" if value else "of nothing"
        return f"a {type(value).__name__} {inner}"
    if name := getattr(value, "__qualname__", ""):
        return f"the {'class' if isinstance(value, type) else 'function'} {name}, which has to be called"
    return type(value).__name__


def listed(items: Sequence[str], count: int = 3) -> str:
    """Join the first of some texts, for an error or a note.

    >>> listed(["a", "b", "c", "d"])
    'a, b, c, ...'
    """
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")
