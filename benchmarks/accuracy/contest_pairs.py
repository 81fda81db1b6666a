"""The matchers on pairs of one network in two libraries, with equal outputs as the proof.

A matcher is right on a pair if the target then computes what the source does. Its single tensors are compared with
those of a matcher that was so proved right; where none was, the pair has no gold tensors.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.accuracy.contest import Attempt, timed
from benchmarks.peers import Peer
from tests.pairs import FUSED_PAIRS, TIMM_TRANSFORMERS, TORCHVISION_TIMM, Pair, output, randomise, relative_difference

TOLERANCE = 1e-3  # of the largest output; a misplaced tensor changes it by several times that

GROUPS = {
    "pairs, torchvision <-> timm": TORCHVISION_TIMM,
    "pairs, timm <-> transformers": TIMM_TRANSFORMERS,
    "pairs, fused <-> split": FUSED_PAIRS,
}


@dataclass(frozen=True, slots=True)
class _Loaded:
    peer: str
    aligned: Mapping[str, Tensor]
    is_equal: bool
    seconds: float
    error: str = ""
    skipped: str = ""


def attempts(peers: Sequence[Peer], limit: int | None = None) -> Iterator[Attempt]:
    """Try every matcher on the pairs, or on ``limit`` of each group, from the second on, which are smaller."""
    for group, pairs in GROUPS.items():
        for pair in pairs if limit is None else pairs[1 : 1 + limit]:
            yield from _attempts(peers, group, pair)


def _attempts(peers: Sequence[Peer], group: str, pair: Pair) -> Iterator[Attempt]:
    source_model = randomise(pair.source(), pair.image_size, seed=1)
    target_model = pair.target().eval()
    wanted = output(source_model, pair.image_size)
    source = source_model.state_dict()
    initial = deepcopy(target_model.state_dict())  # with the versions of its modules
    loads = [_load(peer, source, target_model, initial, wanted, pair.image_size) for peer in peers]
    proved = next((load.aligned for load in loads if load.is_equal), None)
    counted = [key for key in initial if not re.search(pair.absent, key)]
    for load in loads:
        right = wrong = 0
        if proved is not None:
            judged = [_is_same(load.aligned[key], proved.get(key)) for key in load.aligned if key in set(counted)]
            right, wrong = sum(judged), len(judged) - sum(judged)
        gold = len(counted) if proved is not None else 0
        if load.is_equal and (right != gold or wrong):  # by another tensor of the same effect
            right, wrong = gold, 0
        if not load.is_equal and right == gold:  # nothing is known, or what is absent was filled
            wrong = max(wrong, 1)
        yield Attempt(load.peer, group, pair.name, gold, right, wrong, load.seconds, load.error, load.skipped)


def _load(
    peer: Peer,
    source: Mapping[str, Tensor],
    model: nn.Module,
    initial: dict[str, Tensor],
    wanted: Tensor,
    image_size: int,
) -> _Loaded:
    if peer.most_tensors is not None and max(len(source), len(initial)) > peer.most_tensors:
        return _Loaded(peer.name, {}, False, 0.0, skipped=f"more than {peer.most_tensors:,} tensors")
    start = time.perf_counter()
    try:
        aligned, seconds = timed(lambda: peer.aligned(source, initial))
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        return _Loaded(peer.name, {}, False, time.perf_counter() - start, error=text)
    values = deepcopy(initial)
    values.update(aligned)
    model.load_state_dict(values)
    return _Loaded(peer.name, aligned, relative_difference(output(model, image_size), wanted) < TOLERANCE, seconds)


def _is_same(tensor: Tensor, proved: Tensor | None) -> bool:
    return proved is not None and tensor.shape == proved.shape and torch.equal(tensor, proved.to(tensor.dtype))
