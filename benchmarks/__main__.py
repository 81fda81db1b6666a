"""Print the figures as markdown tables; the exit status is 1 if a budget is exceeded."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from benchmarks import accuracy, align_time, import_time
from benchmarks.accuracy import Accuracy
from benchmarks.align_time import Timing


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="measured runs of each subject (default: 15)")
    parser.add_argument(
        "--no-accuracy", action="store_true", help="leave out the benchmark's cases, which take minutes"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    options = parser.parse_args(arguments)

    print(f"{machine()}\n")
    timings = [align_time.measure(subject, options.repeats) for subject in align_time.SUBJECTS]
    print("\n".join(timing_table(timings)), end="\n\n")
    processes = max(3, options.repeats // 3)
    imports = import_time.measure(import_time.IMPORT, processes)
    first_uses = import_time.measure(import_time.FIRST_USE, processes)
    print("\n".join(import_table(imports, first_uses)), end="\n\n")
    scores = accuracy.measure() if accuracy.is_available() and not options.no_accuracy else []
    if scores:
        print("\n".join(accuracy_table(scores)))
    if options.json:
        figures = {
            "machine": machine(),
            "align": [asdict(timing) | {"ratio": timing.ratio} for timing in timings],
            "import_seconds": imports,
            "first_use_seconds": first_uses,
            "accuracy": [asdict(score) for score in scores],
        }
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    is_within_budget = all(timing.is_within_budget for timing in timings) and median(imports) <= import_time.BUDGET
    return 0 if is_within_budget else 1


def machine() -> str:
    """Name the versions and the machine that the figures belong to."""
    packages = ("torch", "numpy", "scipy", "networkx", "rapidfuzz", "torchvision", "timm", "transformers")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return (
        f"Python {platform.python_version()}, {versions}; {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads of torch."
    )


def timing_table(timings: Sequence[Timing]) -> Iterator[str]:
    """Write a line for each subject."""
    yield "| align | tensors | align, ms | load_state_dict, ms | ratio | budget | |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | --- |"
    for timing in timings:
        budget = f"{timing.budget:g}x" if timing.budget is not None else ""
        verdict = "" if timing.budget is None else "ok" if timing.is_within_budget else "OVER"
        yield (
            f"| {timing.name} | {timing.tensors} | {spread(timing.align, 1e3)} | {spread(timing.load_state_dict, 1e3)} "
            f"| {timing.ratio:.1f}x | {budget} | {verdict} |"
        )


def import_table(imports: Sequence[float], first_uses: Sequence[float]) -> Iterator[str]:
    """Write the times of the import and of the first use, a line each."""
    yield "| on top of `import torch` | seconds | budget | |"
    yield "| --- | ---: | ---: | --- |"
    verdict = "ok" if median(imports) <= import_time.BUDGET else "OVER"
    yield f"| `import autoalign` | {spread(imports, 1, digits=3)} | {import_time.BUDGET} | {verdict} |"
    yield f"| the import and a first `align` | {spread(first_uses, 1, digits=3)} | | |"


def accuracy_table(scores: Sequence[Accuracy]) -> Iterator[str]:
    """Write a line for each group of cases."""
    yield "| cases | number | perfect | tensors right | wrong | wrong at 0.9 or more | seconds |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for score in scores:
        yield (
            f"| {score.group} | {score.cases} | {score.perfect / score.cases:.1%} | {score.right / score.gold:.2%} "
            f"| {score.wrong} ({score.wrong / score.gold:.2%}) | {score.sure_wrong} | {score.seconds:.1f} |"
        )


def spread(values: Sequence[float], unit: float, digits: int = 1) -> str:
    """Write the median and, in brackets, the smallest and the largest of some values.

    >>> spread([0.001, 0.004, 0.002], 1e3)
    '2.0 (1.0 to 4.0)'
    """
    scaled = [value * unit for value in values]
    return f"{median(scaled):.{digits}f} ({min(scaled):.{digits}f} to {max(scaled):.{digits}f})"


if __name__ == "__main__":
    sys.exit(main())
