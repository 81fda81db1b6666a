"""Calibration: from the optimisation's own confidence to one that was held by matches with known truth.

``calibration.json`` is a table of knots: a confidence as the optimisation gives it, and the least share of right ones
(the lower end of Wilson's interval at 95 %) among the matches about there. ``python -m benchmarks.calibration`` remakes
it. It only ever lowers a confidence, so that what is said is at most what was seen.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

import numpy as np

from autoalign.evidence import Floats

FILE = "calibration.json"


def calibrated(confidence: Floats) -> Floats:
    """Turn the optimisation's confidence into a calibrated one, each in [0, 1].

    >>> bool((calibrated(np.linspace(0, 1, 9, dtype=np.float32)) <= np.linspace(0, 1, 9) + 1e-6).all())
    True
    """
    raw, held = _knots()
    return np.asarray(np.interp(confidence, raw, held), dtype=np.float32)


def uncalibrated(confidence: Floats) -> Floats:
    """Turn a calibrated confidence back, to calibrate anew.

    >>> print(np.round(uncalibrated(calibrated(np.float32([0.2, 0.7, 0.97]))), 3))
    [0.2  0.7  0.97]
    """
    raw, held = _knots()
    return np.asarray(np.interp(confidence, held, raw), dtype=np.float32)


@cache
def _knots() -> tuple[Floats, Floats]:
    knots = json.loads(files("autoalign").joinpath(FILE).read_text(encoding="utf-8"))["knots"]
    raw, held = zip(*((knot["raw"], knot["held"]) for knot in knots), strict=True)
    return np.asarray(raw, dtype=np.float64), np.asarray(held, dtype=np.float64)
