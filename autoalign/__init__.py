"""Load any PyTorch checkpoint into any implementation of the same network.

The names of the package are imported when they are first used, so that ``import autoalign`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoalign.align_options import AlignOptions
    from autoalign.alignment import Alignment
    from autoalign.api import align
    from autoalign.causes import Divergence
    from autoalign.checkpoint import Checkpoint, open_checkpoint
    from autoalign.converting import convert
    from autoalign.errors import (
        AlignmentError,
        AmbiguousAlignmentError,
        AutoAlignError,
        CheckpointError,
        ChoiceWarning,
        DependencyError,
        IncompatibleTensorsError,
        InputError,
        NothingLoadedError,
        NotInvertibleError,
        OutputError,
        PairMismatchError,
        PartialLoadWarning,
        PatternError,
        RulesError,
        UnsafeCheckpointError,
        ValueWarning,
    )
    from autoalign.execution import execution_order
    from autoalign.explanation import Explanation
    from autoalign.loading import load
    from autoalign.matches import Candidate, Match, Mismatch
    from autoalign.rules import Rule, Rules
    from autoalign.verification import Verification
    from autoalign.verifying import verify

__version__ = "0.1.0"

__all__ = [
    "AlignOptions",
    "Alignment",
    "AlignmentError",
    "AmbiguousAlignmentError",
    "AutoAlignError",
    "Candidate",
    "Checkpoint",
    "CheckpointError",
    "ChoiceWarning",
    "DependencyError",
    "Divergence",
    "Explanation",
    "IncompatibleTensorsError",
    "InputError",
    "Match",
    "Mismatch",
    "NotInvertibleError",
    "NothingLoadedError",
    "OutputError",
    "PairMismatchError",
    "PartialLoadWarning",
    "PatternError",
    "Rule",
    "Rules",
    "RulesError",
    "UnsafeCheckpointError",
    "ValueWarning",
    "Verification",
    "__version__",
    "align",
    "convert",
    "execution_order",
    "load",
    "open_checkpoint",
    "verify",
]

_MODULES = {
    "align": "api",
    "AlignOptions": "align_options",
    "Alignment": "alignment",
    "Candidate": "matches",
    "Match": "matches",
    "Mismatch": "matches",
    "Checkpoint": "checkpoint",
    "open_checkpoint": "checkpoint",
    "convert": "converting",
    "load": "loading",
    "Divergence": "causes",
    "Verification": "verification",
    "verify": "verifying",
    "Explanation": "explanation",
    "execution_order": "execution",
    "Rule": "rules",
    "Rules": "rules",
}  # and all others are in errors


if not TYPE_CHECKING:  # or type checkers would take any name for one of the package's

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__
