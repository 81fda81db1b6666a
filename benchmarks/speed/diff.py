"""Measure ``diff`` of two files against reading both: ``python -m benchmarks.speed.diff [BYTES]`` prints the ratios.

The second file has the first's values under other names, with query, key and value apart: all equal, or all moved. To
read is to let safetensors map each file and to look at every value once. Both are taken in turn, from the disk and from
memory. It exits with 1 if a comparison from the disk is over its budget.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file

import autoalign
from benchmarks.speed.files import bring, drop, network, renamed

TIME_BUDGET = 1.2  # times the time to read both files from the disk
_FIRST, _EQUAL, _MOVED = "first.safetensors", "equal.safetensors", "moved.safetensors"


@torch.no_grad()
def write(folder: Path, file_bytes: int) -> None:
    """Write the three files."""
    model, generator = network(file_bytes), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(generator=generator)
    save_file(model.state_dict(), folder / _FIRST)
    save_file(renamed(model.state_dict(), apart=True), folder / _EQUAL)
    for parameter in model.parameters():
        parameter.mul_(1.01)
    save_file(renamed(model.state_dict(), apart=True), folder / _MOVED)


def read(*files: Path) -> None:
    """Look at every value of some files once."""
    for file in files:
        for tensor in load_file(file).values():
            tensor.sum()


def measure(file_bytes: int, repeats: int) -> Iterator[tuple[str, bool, float]]:
    """Yield, for equal and for moved values, from the disk and not, how many times the time to read both it takes."""
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), file_bytes)
        for second in (_EQUAL, _MOVED):
            files = Path(name, _FIRST), Path(name, second)
            for from_disk in (True, False):
                seconds = [_seconds(call, files, from_disk) for _ in range(repeats) for call in (read, autoalign.diff)]
                yield second.partition(".")[0], from_disk, median(seconds[1::2]) / median(seconds[::2])


def _seconds(call: Callable[..., object], files: tuple[Path, Path], from_disk: bool) -> float:
    for file in files:
        (drop if from_disk else bring)(file)
    start = time.perf_counter()
    call(*files)
    return time.perf_counter() - start


def main() -> int:
    """Measure and print."""
    over = False
    for way, from_disk, ratio in measure(int(sys.argv[1]) if len(sys.argv) > 1 else 2_000_000_000, repeats=5):
        over |= from_disk and ratio > TIME_BUDGET
        print(f"{way}, from {'disk' if from_disk else 'memory'}: {ratio:.2f} times the time to read both")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
