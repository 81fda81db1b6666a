"""Run the tests, and print which share of the package's lines and branches they reach.

``python -m benchmarks.coverage`` takes the options of pytest. SlipCover measures, which no longer counts what was
reached once: the tests take little longer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

LEAST = {"autoalign": 95, "autoalign/matching": 100, "autoalign/plan": 100, "autoalign/rules": 100}  # percent


def table(files: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], bool]:
    """Write a line for each folder, with what is missing where too little is reached; True if enough is everywhere."""
    counts: dict[str, list[int]] = {folder: [0, 0] for folder in LEAST}
    missing: dict[str, list[str]] = {folder: [] for folder in LEAST}
    for name, file in files.items():
        left = [*file["missing_lines"], *(f"{start}->{end}" for start, end in file["missing_branches"])]
        reached = len(file["executed_lines"]) + len(file["executed_branches"])
        folder = str(Path(name).parent)
        for each in {"autoalign", folder}:
            own = counts.setdefault(each, [0, 0])
            own[0] += reached
            own[1] += reached + len(left)
        if left:
            missing.setdefault(folder, []).append(f"  {name}: {', '.join(map(str, left))}")
    lines, is_enough = [], True
    for folder, (reached, total) in sorted(counts.items()):
        lines.append(f"{folder:<24}{100 * reached / max(total, 1):6.2f} % of {total:,} lines and branches")
        if 100 * reached < LEAST.get(folder, 0) * total:
            lines += [f"  fewer than {LEAST[folder]} %", *missing[folder]]
            is_enough = False
    return lines, is_enough


def main(options: Sequence[str]) -> int:
    """Return 0 if the tests pass and reach enough; else the exit code of pytest, or 1."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "coverage.json"
        measure = ["-m", "slipcover", "--branch", "--source", "autoalign", "--json", "--out", str(path)]
        code = subprocess.run([sys.executable, *measure, "-m", "pytest", *options], check=False).returncode
        lines, is_enough = table(json.loads(path.read_text(encoding="utf-8"))["files"])
    print(*lines, sep="\n")
    return code or int(not is_enough)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
