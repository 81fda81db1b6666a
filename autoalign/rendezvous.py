"""Rendezvous: ranks wait for each other to load a sharded model, and notice where one loads it unsharded instead.

They do so through the store of the process group, so that one which gives up leaves no collective call unanswered.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import nn

from autoalign.errors import AlignmentError

_PATIENCE = 30.0  # seconds to wait for a rank that has loaded the model unsharded
_PAUSE = 0.02  # seconds between two looks at the store


def announce_unsharded(model: nn.Module) -> None:
    """Let the other ranks know that this one loads a model that is not sharded; without effect where there are none."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    if distributed.get_world_size() > 1 and (store := _store()) is not None:
        with suppress(RuntimeError):  # the process that keeps it may have ended
            store.add(f"{_name(model)}/unsharded/{distributed.get_rank()}", 1)


def wait_for_ranks(model: nn.Module, group: Any) -> None:
    """Wait until all ranks of a group are here, or none is missing because it loads the model unsharded.

    A rank that is missing for another reason is waited for no longer than for that; the group's own calls tell then
    whether it has ended, or is late.

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
        until = time.monotonic() + _PATIENCE
        while missing := [rank for rank in ranks if store.add(f"{name}/here/{rank}", 0) < number]:
            if time.monotonic() > until:
                break
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
            f"Rank {unsharded[0]} has not come to load {type(model).__name__} in {_PATIENCE:.0f} seconds, but has "
            "loaded a model of the same parameters that is not sharded."
        )
    raise AlignmentError(f"{problem} Nothing was loaded. Shard the model on all ranks alike.")


def _unsharded(store: Any, model: nn.Module, me: int, missing: Sequence[int]) -> list[int]:
    """List the missing ranks that have loaded the model unsharded more often than this one."""
    counts = {rank: store.add(f"{_name(model)}/unsharded/{rank}", 0) for rank in (me, *missing)}
    return [rank for rank in missing if counts[rank] > counts[me]]


def _store() -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()  # None for MPI


def _name(model: nn.Module) -> str:
    names = sorted(name for name, _ in model.named_parameters())
    return f"autoalign/{hashlib.sha256(repr(names).encode()).hexdigest()}"
