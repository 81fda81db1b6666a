"""The matchers on the gold cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from autoalign.plan.matches import Match
from benchmarks.accuracy.contest import Attempt, attempt
from benchmarks.cases.gold import GoldCase, names, read
from benchmarks.peers import Peer


def attempts(peers: Sequence[Peer], limit: int | None = None) -> Iterator[Attempt]:
    """Try every matcher on the gold cases, or on ``limit`` from all over their list."""
    found = names()
    count = len(found) if limit is None else min(limit, len(found))
    for index in range(count):
        case = read(found[index * len(found) // count])
        for peer in peers:
            yield _attempt(peer, case)


def _attempt(peer: Peer, case: GoldCase) -> Attempt:
    size = max(len(case.source), len(case.target))

    def judge(matches: Sequence[Match]) -> tuple[int, int]:
        judged = [case.is_right(match.target, match) for match in matches if match.target in case.expressions]
        return sum(judged), len(judged) - sum(judged)

    def judge_keys(mapping: Mapping[str, str]) -> tuple[int, int]:
        judged = [
            case.is_right_key(key, own)
            for key, own in mapping.items()
            if key in case.expressions and case.source[own].numel() == case.target[key].numel()
        ]
        return sum(judged), len(judged) - sum(judged)

    group = f"gold, {case.group}"
    if peer.name == "autoalign":
        import autoalign

        return attempt(
            peer,
            group,
            case.name,
            lambda: autoalign.align(case.source, case.target).matches,
            judge,
            gold=case.gold_count,
            tensors=size,
        )
    return attempt(
        peer,
        group,
        case.name,
        lambda: peer.match(case.source, case.target),
        judge_keys,
        gold=case.gold_count,
        tensors=size,
    )
