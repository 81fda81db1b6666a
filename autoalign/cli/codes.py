"""Exit codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoalign.alignment import Alignment

COMPLETE, INCOMPLETE, ERROR = 0, 1, 2
INTERRUPTED, BROKEN_PIPE = 130, 141  # as of a process that SIGINT or SIGPIPE has ended

EXIT_CODES = (
    "exit codes: 0 complete: every tensor of the target is filled, but for those that --exclude and --include leave "
    "out; 1 incomplete: some are not, or something differs; 2 an error, said on stderr"
)


def code_of(alignment: Alignment) -> int:
    """Tell whether all of a target that was not left out on purpose is filled."""
    return COMPLETE if set(alignment.missing_keys) <= alignment.excluded else INCOMPLETE
