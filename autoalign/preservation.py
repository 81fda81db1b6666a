"""Preservation: run models in evaluation mode and leave them, and every source of chance, as they were."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from autoalign.transaction import snapshot


@contextmanager
def preserved(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode for a block, without gradients, and put all back, whatever happens in it.

    What is put back: the mode of every submodule, what is registered in it, the values of parameters and buffers
    (a copy is kept on the CPU) and extra states; the random states of torch on the CPU and on CUDA devices in use, of
    numpy and of Python. In the block matrices are multiplied in full precision on CUDA devices in use, and
    attention runs module by module, so that hooks see all of it. Whoever sets hooks in the block removes them.

    >>> dropout = nn.Dropout()
    >>> with preserved(dropout):
    ...     print(dropout.training)
    False
    >>> dropout.training
    True
    """
    with ExitStack() as stack:
        for model in models:
            for module in model.modules():
                stack.callback(setattr, module, "training", module.training)
            stack.callback(snapshot(model, keep_values=True))
        stack.callback(_random_states())
        stack.callback(_exact_arithmetic())
        fast_path = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        stack.enter_context(torch.no_grad())
        torch.backends.mha.set_fastpath_enabled(False)
        for model in models:
            model.eval()
        yield


def seed_all(seed: int) -> None:
    """Seed what a model may draw from, without starting CUDA."""
    torch.default_generator.manual_seed(seed)
    if _uses_cuda():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed)
    random.seed(seed)


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _exact_arithmetic() -> Callable[[], None]:
    """Turn TF32 off where CUDA is in use, and return what puts its settings back."""
    if not _uses_cuda():
        return lambda: None
    backends: list[tuple[Any, str, Any]] = []
    for owner in (torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv", torch.backends.cudnn)):
        name, exact = ("fp32_precision", "ieee") if hasattr(owner, "fp32_precision") else ("allow_tf32", False)
        backends.append((owner, name, getattr(owner, name)))
        setattr(owner, name, exact)

    def restore() -> None:
        for owner, name, value in backends:
            setattr(owner, name, value)

    return restore


def _random_states() -> Callable[[], None]:
    """Note the states of all random generators, and return what puts them back."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if _uses_cuda() else []

    def restore() -> None:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return restore
