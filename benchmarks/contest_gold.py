"""The matchers on the gold cases that may lie beside this project."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from benchmarks.contest import Attempt, attempt
from benchmarks.gold import GoldCase, paths, read, scorer
from benchmarks.peers import Peer


def attempts(peers: Sequence[Peer], limit: int | None = None) -> Iterator[Attempt]:
    """Try every matcher on the gold cases, or on ``limit`` from all over their list; none where they are absent."""
    found = paths()
    count = len(found) if limit is None else min(limit, len(found))
    for index in range(count):
        case = read(found[index * len(found) // count])
        for peer in peers:
            yield _attempt(peer, case)


def _attempt(peer: Peer, case: GoldCase) -> Attempt:
    counted, group = case.expressions, f"gold, {case.group}"
    size = max(len(case.source), len(case.target))

    def by_value(aligned: Mapping[str, Tensor]) -> tuple[int, int]:
        judged = [case.is_value_right(key, tensor) for key, tensor in aligned.items() if key in counted]
        return sum(judged), len(judged) - sum(judged)

    def by_key(mapping: Mapping[str, frozenset[str]]) -> tuple[int, int]:
        judged = [
            (expression := counted[key]) is not None and used == scorer().gold_sources(expression)
            for key, used in mapping.items()
            if key in counted
        ]
        return sum(judged), len(judged) - sum(judged)

    if case.on_meta:
        return attempt(peer, group, case.name, lambda: _used(peer, case), by_key, gold=case.gold_count, tensors=size)
    return attempt(
        peer,
        group,
        case.name,
        lambda: peer.aligned(case.source, case.target),
        by_value,
        gold=case.gold_count,
        tensors=size,
    )


def _used(peer: Peer, case: GoldCase) -> dict[str, frozenset[str]]:
    """The source keys that each target key is filled from."""
    if peer.name == "autoalign":
        import autoalign

        matches = autoalign.align(case.source, case.target).matches
        return {match.target: frozenset(match.sources) for match in matches}
    return {key: frozenset([own]) for key, own in peer.match(case.source, case.target).items()}
