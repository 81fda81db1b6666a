"""The matchers on perturbed architectures of torchvision and timm, whose truth is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.accuracy.contest import Attempt, attempt_on_keys
from benchmarks.cases.architectures import Choice
from benchmarks.cases.perturbations import ALL, LEVELS, case, on_meta
from benchmarks.peers import Peer


def attempts(peers: Sequence[Peer], count: int, seed: int = 0, choice: Choice = ALL) -> Iterator[Attempt]:
    """Try every matcher on the first cases of a seed, and on the chosen architectures."""
    for index in range(count):
        one = case(index, seed, choice)
        source, target = on_meta(one.source), on_meta(one.target)
        group = f"perturbed, {one.level} {LEVELS[one.level]}"
        for peer in peers:
            yield attempt_on_keys(peer, group, f"{one.architecture}: {one.recipe}", source, target, [one.truth])
