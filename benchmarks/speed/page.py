"""Measure the page: ``python -m benchmarks.speed.page`` prints its size, the time to write it and until it can be used.

Needs chromium and chromedriver.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver

from autoalign.alignment import Alignment
from autoalign.plan.matches import Match
from autoalign.plan.specs import TensorSpec
from benchmarks.figures.picture import chromium

COUNTS = (500, 5_000, 45_000)
SHARED = ("blocks that repeat", "no two blocks alike")


def alignment(count: int, *, repeats: bool) -> Alignment:
    """Make an alignment of ``count`` copies, of blocks that fold into one or of such that do not."""
    import torch

    source, target, matches = [], [], []
    for k in range(count):
        layer, expert, part = k // 500, k // 2 % 250, k % 2
        shape = (64, 32 if repeats else k % 1000 + 1)
        source.append(TensorSpec(f"model.layers.{layer}.mlp.experts.{expert}.w{part + 1}.weight", shape, torch.float32))
        target.append(
            TensorSpec(f"decoder.blocks.{layer}.moe.{expert}.{('up', 'down')[part]}.weight", shape, torch.float32)
        )
        evidence = {cue: round(k * step % 101 / 100, 3) for step, cue in enumerate(("name", "order", "structure"), 3)}
        matches.append(Match(target[-1].key, (source[-1].key,), confidence=0.9 + k % 10 / 100, evidence=evidence))
    return Alignment(tuple(matches), (), (), tuple(source), tuple(target))


def measure(driver: webdriver.Chrome, page: Path, subject: Alignment) -> tuple[float, float, float, float, float]:
    """Return the megabytes of a page, and seconds: to write it, to open it, to show all tensors, and to search."""
    with _timed() as writing:
        subject.to_html(page)
    driver.get("about:blank")
    with _timed() as opening:
        driver.get(page.as_uri())
        assert driver.execute_script("return document.documentElement.dataset.ready") == "true"
    with _timed() as showing:
        driver.execute_script(
            "document.getElementById('detail-tensors').click(); document.getElementById('fold').click()"
        )
    with _timed() as searching:
        driver.execute_script(
            "const box = document.getElementById('search'); box.value = '.7.'; box.dispatchEvent(new Event('change'))"
        )
    return page.stat().st_size / 1e6, writing[0], opening[0], showing[0], searching[0]


@contextmanager
def _timed() -> Iterator[list[float]]:
    started = time.perf_counter()
    seconds: list[float] = []
    yield seconds
    seconds.append(time.perf_counter() - started)


def main() -> int:
    """Measure and print a markdown table."""
    columns = ("matches", "of", "page", "to write", "to open", "all tensors", "search")
    print(f"| {' | '.join(columns)} |\n| ---: | --- |{' ---: |' * 5}")
    with tempfile.TemporaryDirectory() as scratch, chromium(Path(scratch) / "profile") as driver:
        for count in COUNTS:
            for kind in SHARED:
                subject = alignment(count, repeats=kind == SHARED[0])
                size, *seconds = measure(driver, Path(scratch) / "report.html", subject)
                print(f"| {count:,} | {kind} | {size:.2f} MB | " + " | ".join(f"{one:.2f} s" for one in seconds) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
