"""Load any PyTorch checkpoint into any implementation of the same network.

The names of the package are imported when they are first used, so that ``import autoalign`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoalign.alignment import Alignment
    from autoalign.api import AlignOptions, align, convert, load, verify
    from autoalign.checkpoints.checkpoint import Checkpoint, open_checkpoint
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
    from autoalign.plan.matches import Candidate, Match, Mismatch
    from autoalign.reports.explain import Explanation
    from autoalign.rules.rule import Rule
    from autoalign.rules.rules import Rules
    from autoalign.verification.causes import Divergence
    from autoalign.verification.run import execution_order
    from autoalign.verification.verify import Verification

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
    "load": "api",
    "verify": "api",
    "convert": "api",
    "AlignOptions": "api",
    "Alignment": "alignment",
    "Candidate": "plan.matches",
    "Match": "plan.matches",
    "Mismatch": "plan.matches",
    "Checkpoint": "checkpoints.checkpoint",
    "open_checkpoint": "checkpoints.checkpoint",
    "Divergence": "verification.causes",
    "Verification": "verification.verify",
    "Explanation": "reports.explain",
    "execution_order": "verification.run",
    "Rule": "rules.rule",
    "Rules": "rules.rules",
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
