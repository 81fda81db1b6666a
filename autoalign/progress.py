"""Progress of a load: a bar on the screen for what takes long, or a function of the caller's."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

Progress = Callable[[int, int], object]  # called with the tensors that are done and all of them
Step = Callable[[int, int], object]  # called with the tensors that are done, and their bytes

PATIENCE = 2.0  # seconds without a bar


@contextmanager
def progress_of(progress: Progress | bool | None, tensors: int, size: int, since: float) -> Iterator[Step]:
    """Report how far a load has come, for as long as the block runs.

    Args:
        progress: True for a bar on stderr, None for one if stderr is a terminal and the load takes more than two
            seconds, False for none, or a function of the tensors that are done and of all.
        tensors: How many tensors are loaded.
        size: How many bytes they have.
        since: When the load began, by ``time.perf_counter``.
    """
    if callable(progress):
        call = progress
        yield lambda done, _size: call(done, tensors)
        return
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield lambda _done, _size: None
        return
    bar: Any = None
    failed = False

    def step(done: int, done_size: int) -> None:
        nonlocal bar, failed
        if failed:
            return
        try:
            if bar is None and (progress or time.perf_counter() - since > PATIENCE):
                bar = _bar(transient=progress is None)
                bar.start()
                bar.add_task("Loading", total=size, tensors=tensors, done=done)
            if bar is not None:
                bar.update(0, completed=done_size, done=done)
        except Exception:  # stderr may be closed, or no thread be left: no reason not to load
            failed = True

    try:
        yield step
    finally:
        if bar is not None:
            with suppress(Exception):
                bar.stop()


def _bar(*, transient: bool) -> Any:
    from rich.console import Console  # late, as all that a load without a bar does not need
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[done]}/{task.fields[tensors]} tensors"),
        TimeRemainingColumn(),
    )

    class Screen(Console):
        def on_broken_pipe(self) -> None:  # rich would close stdout and end the process
            self.quiet = True

    return Progress(*columns, console=Screen(stderr=True), transient=transient)
