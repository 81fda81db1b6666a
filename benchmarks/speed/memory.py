"""The memory of this process: the largest resident so far, and the anonymous now."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def peak_bytes() -> int:
    """Read the peak of resident memory since this program was started; 0 where the platform does not tell.

    Linux' ``ru_maxrss`` would include the process that started this one, from before the program was replaced.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        return int(found[1]) * 1024 if found else 0
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def anonymous_bytes() -> int | None:
    """Read the resident memory that no file backs; None where the platform does not tell."""
    return _resident("RssAnon")


def mapped_bytes() -> int | None:
    """Read the resident memory that is of mapped files; None where the platform does not tell."""
    return _resident("RssFile")


def _resident(kind: str) -> int | None:
    status = Path("/proc/self/status")
    found = re.search(rf"{kind}:\s+(\d+) kB", status.read_text(encoding="utf-8")) if status.is_file() else None
    return int(found[1]) * 1024 if found else None
