"""How much memory a call takes, for tests that measure it in a process of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path


def resident() -> int:
    """Return the bytes that this process has in memory and no file backs; Linux alone tells."""
    status = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


def peak_of(call: Callable[[], object]) -> int:
    """Return how many bytes more than before it a call has in memory at most, read every millisecond."""
    peaks, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peaks[0] = max(peaks[0], resident())
            time.sleep(0.001)

    before = resident()
    thread = threading.Thread(target=watch)
    thread.start()
    call()
    done.set()
    thread.join()
    return peaks[0] - before
