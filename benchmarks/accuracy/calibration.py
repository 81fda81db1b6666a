"""Fit the calibration of the confidence: ``python -m benchmarks.accuracy.calibration --from DIR --write``.

DIR is a folder that ``python -m benchmarks.accuracy.reliability --count 2000 --out DIR`` has filled: matches with known
truth over perturbed architectures and gold cases. What the optimisation itself did not decide (equal
keys, plain renamings, what rules fix, layouts in doubt) is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

import autoalign
from autoalign.matching.confidence import CALIBRATION_FILE, uncalibrated

EDGES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9995, 0.9999, 1.000001)  # of the raw confidence
FIXED = (0.45, 0.85)  # confidences that stand for a reason
_LEAST = 200  # matches from which a range counts
_Z = 1.96
_STEP = 1e-6  # by which the table rises at least, so that it can be turned round


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, print and, if asked to, write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.calibration", description=__doc__)
    parser.add_argument("--from", type=Path, required=True, dest="folder", help="that the reliability benchmark wrote")
    parser.add_argument("--write", action="store_true", help="write the table into the package")
    options = parser.parse_args(arguments)
    table = fitted(options.folder)
    text = json.dumps(table, indent=1) + "\n"
    print(text, end="")
    if options.write:
        (Path(autoalign.__file__).parent / "matching" / CALIBRATION_FILE).write_text(text, encoding="utf-8")
    return 0


def fitted(folder: Path) -> dict[str, object]:
    """Fit the table to the matches in a folder."""
    arrays = np.load(folder / "matches.npz")
    decided = ~np.isnan(arrays["cues"][:, list(arrays["cue_names"]).index("pattern")]) & arrays["is_loaded"]
    for value in FIXED:
        decided &= ~np.isclose(arrays["confidence"], value, atol=1e-4)
    raw, right = uncalibrated(arrays["confidence"][decided]), arrays["is_right"][decided]
    return {
        "made by": "python -m benchmarks.accuracy.calibration",
        "matches": int(decided.sum()),
        "knots": knots(raw, right),
    }


def knots(raw: np.ndarray, right: np.ndarray) -> list[dict[str, float]]:
    """Measure the least share of right matches in each range of the raw confidence.

    >>> table = knots(np.full(1000, 0.97), np.arange(1000) >= 10)
    >>> [(knot["raw"], round(knot["held"], 2)) for knot in table]
    [(0.0, 0.0), (0.5, 0.5), (0.97, 0.97), (1.0, 0.97)]
    """
    table = [(0.0, 0.0, 0), (EDGES[0], EDGES[0], 0)]
    for low, high in pairwise(EDGES):
        inside = (raw >= low) & (raw < high)
        if (count := int(inside.sum())) >= _LEAST:
            middle = float(raw[inside].mean())
            table.append((middle, min(middle, wilson(int(right[inside].sum()), count)), count))
    table.append((1.0, max(held for _, held, _ in table), 0))
    for place in range(len(table) - 2, -1, -1):  # it never falls
        raw_value, held, count = table[place]
        table[place] = (raw_value, min(held, table[place + 1][1] - _STEP), count)
    return [
        {"raw": round(raw_value, 6), "held": round(max(held, 0.0), 6), "matches": count}
        for raw_value, held, count in table
    ]


def wilson(right: int, count: int) -> float:
    """Give the lower end of Wilson's interval at 95 % for a share.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.

    >>> round(wilson(999, 1000), 4)
    0.9944
    """
    share = right / count
    spread = _Z * np.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return float((share + _Z**2 / (2 * count) - spread) / (1 + _Z**2 / count))


if __name__ == "__main__":
    sys.exit(main())
