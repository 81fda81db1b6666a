"""The matchers on perturbed architectures of torchvision and timm, whose truth is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.contest import Attempt, attempt_on_keys
from benchmarks.peers import Peer
from benchmarks.perturbations import LEVELS, case, on_meta

MOST_TENSORS = 400  # so that the slow peers can be tried


def attempts(peers: Sequence[Peer], count: int, seed: int = 0) -> Iterator[Attempt]:
    """Try every matcher on the first cases of a seed."""
    for index in range(count):
        one = case(index, seed, most_tensors=MOST_TENSORS)
        source, target = on_meta(one.source), on_meta(one.target)
        group = f"perturbed, {one.level} {LEVELS[one.level]}"
        for peer in peers:
            yield attempt_on_keys(peer, group, f"{one.architecture}: {one.recipe}", source, target, [one.truth])
