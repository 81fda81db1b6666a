"""Rendezvous: ranks wait for each other to load a sharded model, and notice where one loads it unsharded instead.

They do so through the store of the process group, so that one which gives up leaves no collective call unanswered.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

from autoalign.errors import AlignmentError

logger = logging.getLogger(__name__)

# Seconds to wait for a rank that has loaded the model unsharded, from the end of that. It must be waited for, since it
# may come yet, as where it has loaded a second network of this kind; and not for long, since it may never come.
_PATIENCE = 10.0
_LONGEST = 600.0  # seconds to wait for it in all, as long as it loads the model unsharded
_SILENCE = 1.0  # seconds before it is said
_PAUSE = 0.02  # seconds between two looks at the store


@contextmanager
def announced_unsharded(model: nn.Module) -> Iterator[None]:
    """Let other ranks know that this one loads a model that is not sharded; without effect where there are none."""
    _announce(model, "unsharded")
    try:
        yield
    finally:
        _announce(model, "finished")


def _announce(model: nn.Module, what: str) -> None:
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    if distributed.get_world_size() > 1 and (store := _store()) is not None:
        with suppress(RuntimeError):  # the process that keeps it may have ended
            store.add(f"{_name(model)}/{what}/{distributed.get_rank()}", 1)


def wait_for_ranks(model: nn.Module, group: Any) -> None:
    """Wait until all ranks of a group are here, or none is missing because it loads the model unsharded.

    A rank that has loaded it unsharded is waited for ten seconds from then on, as is logged. One that is missing for
    another reason is waited for no longer; the group's own calls tell then whether it has ended, or is late.

    Raises:
        AlignmentError: One of them loads the model unsharded.
    """
    import torch

    distributed: Any = torch.distributed
    store = _store()
    if store is None:
        return
    me, ranks = distributed.get_rank(), distributed.get_process_group_ranks(group or distributed.group.WORLD)
    name = f"{_name(model)}/{ranks}"
    try:
        number = store.add(f"{name}/here/{me}", 1)
        since = now = time.monotonic()
        until, is_said = since + _PATIENCE, False
        while missing := [rank for rank in ranks if store.add(f"{name}/here/{rank}", 0) < number]:
            now = time.monotonic()
            if now > until:
                break
            if _are_loading(store, model, missing) and now < since + _LONGEST:
                until = now + _PATIENCE
            elif not is_said and now > since + _SILENCE and (found := _unsharded(store, model, me, missing)):
                is_said = True
                logger.warning(
                    "Waiting %.0f seconds for rank %d, which has loaded a model of these parameters unsharded.",
                    until - now,
                    found[0],
                )
            time.sleep(_PAUSE)
        unsharded = _unsharded(store, model, me, missing)
        # what is decided first holds, since a rank may come now
        decision = store.compare_set(f"{name}/{number}", "", "leave" if unsharded else "load")
    except RuntimeError:  # a store that cannot do this, or whose process has ended
        return
    if bytes(decision) != b"leave":
        return
    problem = f"The other ranks did not wait any longer for rank {me}, which has loaded it unsharded before."
    if unsharded:
        problem = (
            f"Rank {unsharded[0]} has not come to load {type(model).__name__} within {_PATIENCE:.0f} seconds after it "
            "loaded a model of the same parameters that is not sharded."
        )
    raise AlignmentError(f"{problem} Nothing was loaded. Shard the model on all ranks alike.")


def _unsharded(store: Any, model: nn.Module, me: int, missing: Sequence[int]) -> list[int]:
    """List the missing ranks that have loaded the model unsharded more often than this one."""
    counts = {rank: store.add(f"{_name(model)}/unsharded/{rank}", 0) for rank in (me, *missing)}
    return [rank for rank in missing if counts[rank] > counts[me]]


def _are_loading(store: Any, model: nn.Module, ranks: Sequence[int]) -> bool:
    """Return True if one of the ranks loads the model unsharded at this moment."""
    counts = ([store.add(f"{_name(model)}/{what}/{rank}", 0) for what in ("unsharded", "finished")] for rank in ranks)
    return any(begun > finished for begun, finished in counts)


def _store() -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()  # None for MPI


def _name(model: nn.Module) -> str:
    names = sorted(name for name, _ in model.named_parameters())
    return f"autoalign/{hashlib.sha256(repr(names).encode()).hexdigest()}"
