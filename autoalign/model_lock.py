"""Model locks: one thread at a time changes a model, or any other model that shares a module or a tensor with it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from autoalign.copying import memory_of
from autoalign.transaction import is_sharded, local_part, tensors_of_module

_Owner = tuple[int, int]  # a process, since a fork copies what is noted here, and a thread of it

_owners: dict[tuple[str, int], _Owner] = {}  # who has locked which module or memory
_released = threading.Condition()  # guards `_owners`


@contextmanager
def model_lock(model: nn.Module) -> Iterator[None]:
    """Wait until no other thread has locked anything of a model, and lock all of it until the block ends.

    The model's modules and the memory of its tensors are locked at once. So wrappers of one network, and networks with
    some tensors in common, wait for each other, and no two threads can wait for each other in a circle. A thread may
    lock a model again. Other code that changes the model is not kept from it.
    """
    me = os.getpid(), threading.get_ident()
    tensors = (local_part(tensor) if is_sharded(tensor) else tensor for tensor in tensors_of_module(model))
    parts = {("module", id(module)) for module in model.modules()}
    parts |= {("memory", memory) for tensor in tensors if (memory := memory_of(tensor)) is not None}
    locked: set[tuple[str, int]] = set()
    try:
        with _released:
            _released.wait_for(lambda: all(_can_lock(part, me) for part in parts))
            locked = {part for part in parts if _owners.get(part) != me}
            _owners.update(dict.fromkeys(locked, me))
        yield
    finally:
        with _released:
            for part in locked:
                _owners.pop(part, None)
            _released.notify_all()


def _can_lock(part: tuple[str, int], me: _Owner) -> bool:
    owner = _owners.get(part, me)
    return owner == me or owner[0] != me[0]
