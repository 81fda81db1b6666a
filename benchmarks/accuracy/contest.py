"""One matcher on one case, with a time limit and a judgement, and the sums over many."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from types import FrameType
from typing import TypeVar

from benchmarks.peers import Peer, StateDict

Result = TypeVar("Result")
Truth = Mapping[str, str | None]
LIMIT = 20.0  # seconds for each call
_QUICK = 0.5  # seconds; what takes less is called again
_REPEATS = 3  # whose median counts


class TimeLimitError(Exception):
    """A call took longer than it may."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What one matcher made of one case."""

    peer: str
    group: str
    case: str
    gold: int  # target tensors that have a source
    right: int
    wrong: int
    seconds: float
    error: str = ""  # what the matcher raised: then it loaded nothing
    skipped: str = ""  # why the matcher was not tried

    @property
    def is_perfect(self) -> bool:
        """Whether all that there is was found, and nothing else; where there is nothing, to refuse is right."""
        return self.right == self.gold and not self.wrong


@dataclass(slots=True)
class Tally:
    """The sums of one matcher over a group."""

    peer: str
    group: str
    cases: int = 0
    perfect: int = 0
    gold: int = 0
    right: int = 0
    wrong: int = 0
    raised: int = 0
    skipped: int = 0
    seconds: list[float] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)  # of raising and skipping, with their numbers

    @property
    def median_seconds(self) -> float:
        return median(self.seconds) if self.seconds else float("nan")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer, where the platform can; only for the main thread.

    Raises:
        TimeLimitError: The time is over.
    """
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(_: int, __: FrameType | None) -> None:
        raise TimeLimitError(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def timed(call: Callable[[], Result], limit: float = LIMIT) -> tuple[Result, float]:
    """Call a matcher, several times where that takes no time, and give its result and the median of its seconds."""
    seconds: list[float] = []
    while not seconds or (seconds[0] < _QUICK and len(seconds) < _REPEATS):
        start = time.perf_counter()
        with time_limit(limit):
            result = call()
        seconds.append(time.perf_counter() - start)
    return result, median(seconds)


def attempt(
    peer: Peer,
    group: str,
    case: str,
    call: Callable[[], Result],
    judge: Callable[[Result], tuple[int, int]],
    *,
    gold: int,
    tensors: int,
    limit: float = LIMIT,
) -> Attempt:
    """Call one matcher and judge what it returns.

    Args:
        peer: The matcher.
        group: The group of the case.
        case: Its name.
        call: Calls the matcher.
        judge: Counts the right and the wrong tensors of a result.
        gold: How many tensors there are to find.
        tensors: The size of the larger side.
        limit: Seconds after which the matcher is taken to have loaded nothing.
    """
    if peer.most_tensors is not None and tensors > peer.most_tensors:
        return Attempt(peer.name, group, case, gold, 0, 0, 0.0, skipped=f"more than {peer.most_tensors:,} tensors")
    start = time.perf_counter()
    try:
        result, seconds = timed(call, limit)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        return Attempt(peer.name, group, case, gold, 0, 0, time.perf_counter() - start, error=text)
    right, wrong = judge(result)
    return Attempt(peer.name, group, case, gold, right, wrong, seconds)


def attempt_on_keys(
    peer: Peer, group: str, case: str, source: StateDict, target: StateDict, truths: Sequence[Truth]
) -> Attempt:
    """Call a matcher on two state dicts, and judge the keys that it pairs by the truth that fits it best.

    There are several truths where a checkpoint holds copies of which any may be taken, and only one.
    """

    def judge(mapping: Mapping[str, str]) -> tuple[int, int]:
        right = max(sum(truth.get(key) == own for key, own in mapping.items()) for truth in truths)
        return right, len(mapping) - right

    gold = max(sum(own is not None for own in truth.values()) for truth in truths)
    return attempt(
        peer,
        group,
        case,
        lambda: peer.match(source, target),
        judge,
        gold=gold,
        tensors=max(len(source), len(target)),
    )


def tallied(attempts: Sequence[Attempt]) -> list[Tally]:
    """Sum up by group and matcher, in the order in which they come."""
    tallies: dict[tuple[str, str], Tally] = {}
    for one in attempts:
        tally = tallies.setdefault((one.group, one.peer), Tally(one.peer, one.group))
        if reason := one.skipped or one.error.split(":")[0]:
            tally.reasons[reason] = tally.reasons.get(reason, 0) + 1
        if one.skipped:
            tally.skipped += 1
            continue
        tally.cases += 1
        tally.perfect += one.is_perfect
        tally.gold += one.gold
        tally.right += one.right
        tally.wrong += one.wrong
        tally.raised += bool(one.error)
        tally.seconds.append(one.seconds)
    return list(tallies.values())


def time_ratios(attempts: Sequence[Attempt], peer: str, own: str = "autoalign") -> list[float]:
    """Divide a peer's time by ours, for each case that both solve without a fault; the least first.

    >>> from dataclasses import replace
    >>> ours = Attempt("autoalign", "pairs", "a", gold=2, right=2, wrong=0, seconds=0.1)
    >>> time_ratios([ours, replace(ours, peer="slow", seconds=0.4), replace(ours, case="b")], "slow")
    [4.0]
    """
    seconds = {(one.group, one.case, one.peer): one.seconds for one in attempts if one.is_perfect and not one.error}
    return sorted(
        taken / seconds[group, case, own]
        for (group, case, name), taken in seconds.items()
        if name == peer and (group, case, own) in seconds
    )
