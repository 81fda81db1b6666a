"""Time of ``import autoalign`` on top of ``import torch``, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

BUDGET = 0.15  # seconds, for the import alone

IMPORT = "import autoalign"
# with all that the import puts off
FIRST_USE = "import autoalign; one = torch.ones(1); autoalign.align({'a.weight': one}, {'b.weight': one})"


def measure(statement: str, repeats: int) -> tuple[float, ...]:
    """Time a statement in as many fresh processes, in seconds each, after one unmeasured run."""
    return tuple(_seconds(statement) for _ in range(repeats + 1))[1:]


def _seconds(statement: str) -> float:
    code = f"import time, torch; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)
