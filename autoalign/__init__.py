"""Load any PyTorch checkpoint into any implementation of the same network.

The names of the package are imported when they are first used, so that ``import autoalign`` costs nothing.

.. include:: loading/CHANGELOG.md
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names for type checkers and editors
    from autoalign.alignment import Alignment as Alignment
    from autoalign.api import align as align
    from autoalign.api import convert as convert
    from autoalign.api import load as load
    from autoalign.checkpoints.checkpoint import Checkpoint as Checkpoint
    from autoalign.checkpoints.checkpoint import open_checkpoint as open_checkpoint
    from autoalign.errors import AlignmentError as AlignmentError
    from autoalign.errors import AmbiguousAlignmentError as AmbiguousAlignmentError
    from autoalign.errors import AutoAlignError as AutoAlignError
    from autoalign.errors import CheckpointError as CheckpointError
    from autoalign.errors import ChoiceWarning as ChoiceWarning
    from autoalign.errors import DependencyError as DependencyError
    from autoalign.errors import IncompatibleTensorsError as IncompatibleTensorsError
    from autoalign.errors import InputError as InputError
    from autoalign.errors import NothingLoadedError as NothingLoadedError
    from autoalign.errors import NotInvertibleError as NotInvertibleError
    from autoalign.errors import OutputError as OutputError
    from autoalign.errors import PairMismatchError as PairMismatchError
    from autoalign.errors import PartialLoadWarning as PartialLoadWarning
    from autoalign.errors import PatternError as PatternError
    from autoalign.errors import RulesError as RulesError
    from autoalign.errors import TraceError as TraceError
    from autoalign.errors import UnequalModelsError as UnequalModelsError
    from autoalign.errors import UnsafeCheckpointError as UnsafeCheckpointError
    from autoalign.errors import ValueWarning as ValueWarning
    from autoalign.integrations import hf as hf
    from autoalign.loading.diff import Difference as Difference
    from autoalign.loading.diff import diff as diff
    from autoalign.loading.identify import Identification as Identification
    from autoalign.loading.identify import KnownArchitecture as KnownArchitecture
    from autoalign.loading.identify import identify as identify
    from autoalign.plan.matches import Candidate as Candidate
    from autoalign.plan.matches import Match as Match
    from autoalign.plan.matches import Mismatch as Mismatch
    from autoalign.plan.matches import Verified as Verified
    from autoalign.plan.options import AlignOptions as AlignOptions
    from autoalign.reports.changes import Block as Block
    from autoalign.reports.changes import Change as Change
    from autoalign.reports.choices import Choice as Choice
    from autoalign.reports.choices import Option as Option
    from autoalign.reports.explain import Explanation as Explanation
    from autoalign.rules.rule import Rule as Rule
    from autoalign.rules.rules import Rules as Rules
    from autoalign.verification.causes import Divergence as Divergence
    from autoalign.verification.dataflow import dataflow as dataflow
    from autoalign.verification.run import execution_order as execution_order
    from autoalign.verification.verify import Verification as Verification
    from autoalign.verification.verify import verify as verify

__version__ = "0.2.0"

_MODULES = {
    "alignment": ("Alignment",),
    "api": ("align", "convert", "load"),
    "checkpoints.checkpoint": ("Checkpoint", "open_checkpoint"),
    "errors": (
        *("AlignmentError", "AmbiguousAlignmentError", "AutoAlignError", "CheckpointError"),
        *("ChoiceWarning", "DependencyError", "IncompatibleTensorsError", "InputError"),
        *("NothingLoadedError", "NotInvertibleError", "OutputError"),
        *("PairMismatchError", "PartialLoadWarning", "PatternError"),
        *("RulesError", "TraceError", "UnequalModelsError", "UnsafeCheckpointError", "ValueWarning"),
    ),
    "integrations": ("hf",),
    "loading.diff": ("Difference", "diff"),
    "loading.identify": ("Identification", "KnownArchitecture", "identify"),
    "plan.matches": ("Candidate", "Match", "Mismatch", "Verified"),
    "plan.options": ("AlignOptions",),
    "reports.changes": ("Block", "Change"),
    "reports.choices": ("Choice", "Option"),
    "reports.explain": ("Explanation",),
    "rules.rule": ("Rule",),
    "rules.rules": ("Rules",),
    "verification.causes": ("Divergence",),
    "verification.dataflow": ("dataflow",),
    "verification.run": ("execution_order",),
    "verification.verify": ("Verification", "verify"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(["__version__", *_MODULE_OF])


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:  # or type checkers would take any name for one of the package's

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
