from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autoalign.api import load
from autoalign.loading import fill as copying
from autoalign.loading.transaction import model_lock


def tied(other: nn.Linear) -> nn.Linear:
    layer = nn.Linear(2, 2)
    layer.weight = other.weight
    return layer


def viewing(other: nn.Linear) -> nn.Linear:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(other.weight.detach()[:, :])
    return layer


def waits(model: nn.Module) -> bool:
    """Return whether another thread can not enter now."""
    entered = threading.Event()

    def enter() -> None:
        with model_lock(model):
            entered.set()

    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    return not entered.wait(0.2)


@pytest.mark.parametrize("other", [lambda layer: layer, nn.Sequential, tied, viewing])
def test_models_that_share_something_exclude_each_other(other: Callable[[nn.Linear], nn.Module]) -> None:
    layer = nn.Linear(2, 2)
    with model_lock(nn.Sequential(layer, nn.Linear(2, 2))):
        assert waits(other(layer))
    assert not waits(other(layer))


def test_other_models_do_not_wait() -> None:
    with model_lock(nn.Linear(2, 2)), model_lock(nn.Linear(2, 2).to("meta")):
        assert not waits(nn.Linear(2, 2))
        assert not waits(nn.Linear(2, 2).to("meta"))


def test_a_thread_may_enter_again_and_an_error_lets_others_in() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="now"), model_lock(nn.Sequential(layer)):  # noqa: PT012
        with model_lock(layer):
            pass
        assert waits(layer)
        raise ValueError("now")
    assert not waits(layer)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no forks")
def test_a_forked_process_does_not_wait_for_what_a_thread_of_the_other_has_begun() -> None:
    layer = nn.Linear(2, 2)
    begun, done = threading.Event(), threading.Event()

    def change() -> None:
        with model_lock(layer):
            begun.set()
            done.wait()

    thread = threading.Thread(target=change)
    thread.start()
    begun.wait()
    child = os.fork()
    if not child:
        os._exit(int(waits(layer)))
    assert os.waitpid(child, 0)[1] == 0
    done.set()
    thread.join()


def test_threads_that_load_into_one_model_do_not_leave_it_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = copying._copy_values

    def slow_copy(target: Tensor, source: Tensor) -> None:
        time.sleep(0.01 * random.random())
        copy(target, source)

    monkeypatch.setattr(copying, "_copy_values", slow_copy)
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(8)])
    sources = [{f"net.{k}": torch.full_like(v, float(n)) for k, v in model.state_dict().items()} for n in range(8)]
    models = [model, nn.Sequential(model)] * 4
    together = threading.Barrier(8, timeout=60)
    left: list[set[float]] = []

    def fill(number: int) -> None:
        for _ in range(3):
            together.wait()
            load(models[number], sources[number])
            if together.wait() == 0:
                left.append({float(value) for p in model.parameters() for value in torch.unique(p.detach())})

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(values) for values in left] == [1, 1, 1]
