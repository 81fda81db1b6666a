"""The figures as pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_FEWEST = 20  # matches in a bin whose share says something


class Reliable(Protocol):
    """A bin of matches by confidence."""

    @property
    def count(self) -> int: ...
    @property
    def share(self) -> float: ...
    @property
    def mean_confidence(self) -> float: ...


def plot_reliability(bins: Sequence[Reliable], path: Path) -> None:
    """Draw the share of right matches over the mean confidence of each bin, with the number of matches beside it."""
    filled = [one for one in bins if one.count >= _FEWEST]
    sparse = [one for one in bins if 0 < one.count < _FEWEST]
    with _axes(path) as axes:
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, label="as sure as right")
        axes.plot([one.mean_confidence for one in filled], [one.share for one in filled], marker="o", label="autoalign")
        axes.plot(
            [one.mean_confidence for one in sparse],
            [one.share for one in sparse],
            "o",
            color="0.7",
            markerfacecolor="none",
            label=f"fewer than {_FEWEST} matches",
        )
        for one in [*filled, *sparse]:
            axes.annotate(
                f"{one.count:,}", (one.mean_confidence, one.share), (4, -10), textcoords="offset points", fontsize=7
            )
        axes.set(xlabel="confidence, mean of a bin", ylabel="share of right matches", xlim=(0, 1.02), ylim=(0, 1.02))
        axes.legend(loc="lower right")


def plot_accuracy(levels: Sequence[str], shares: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw the share of right tensors of every matcher over the levels of difficulty."""
    with _axes(path) as axes:
        for name, values in shares.items():
            axes.plot(levels, values, marker="o", linewidth=2.5 if name == "autoalign" else 1.2, label=name)
        axes.set(xlabel="difficulty of the perturbation", ylabel="tensors right", ylim=(-0.02, 1.02))
        axes.legend(fontsize=8)


def plot_scaling(points: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """Draw the time of every matcher over the number of tensors, both on logarithmic scales."""
    with _axes(path) as axes:
        for name, values in points.items():
            counts, seconds = zip(*values, strict=True)
            axes.plot(counts, seconds, marker="o", linewidth=2.5 if name == "autoalign" else 1.2, label=name)
        axes.set(xlabel="tensors of the source", ylabel="seconds", xscale="log", yscale="log")
        axes.legend(fontsize=8)


@contextmanager
def _axes(path: Path) -> Iterator[Axes]:
    """Yield the axes of a figure that is written at the end, without a display and without a global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.grid(color="0.9", linewidth=0.6)
    yield axes
    figure.savefig(path, dpi=120)
