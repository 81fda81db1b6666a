"""Models are put back if anything fails, and locked while they change."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from autoalign.api import load
from autoalign.loading import fill as copying
from autoalign.loading.transaction import can_copy_in_place, cannot_fail, converted, local_part, model_lock, transaction


def change(model: Any, error: BaseException | None = None) -> None:
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias = nn.Parameter(torch.zeros(9))
        model[1].running_mean.data = torch.zeros(7)
        del model[1].running_var
        model.append(nn.Linear(1, 1))
    if error is not None:
        raise error


def network() -> Any:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def test_everything_is_put_back() -> None:
    model = network()
    before = {key: (id(t), t.data_ptr(), t.clone()) for key, t in model.state_dict(keep_vars=True).items()}
    with pytest.raises(KeyboardInterrupt, match="now"), transaction(model, keep_values=True):
        change(model, KeyboardInterrupt("now"))
    after = {key: (id(t), t.data_ptr(), t) for key, t in model.state_dict(keep_vars=True).items()}
    assert {key: entry[:2] for key, entry in after.items()} == {key: entry[:2] for key, entry in before.items()}
    assert all(torch.equal(after[key][2], before[key][2]) for key in before)


def test_changes_stay_where_nothing_is_raised() -> None:
    model = network()
    with transaction(model, keep_values=True):
        change(model)
    assert len(model) == 3
    assert model[0].bias.shape == (9,)


def test_without_values_registrations_are_put_back() -> None:
    model = network()
    bias, weight = model[0].bias, model[0].weight.detach().clone()
    with pytest.raises(ValueError, match="now"), transaction(model, keep_values=False):
        change(model, ValueError("now"))
    assert model[0].bias is bias
    assert len(model) == 2
    assert not torch.equal(model[0].weight, weight)


def test_tied_and_meta_tensors_are_put_back() -> None:
    model = network()
    model.append(nn.Linear(2, 3))
    model[2].weight = model[0].weight
    model.register_buffer("empty", torch.zeros(3, device="meta"))
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match="now"), transaction(model, keep_values=True):
        change(model, ValueError("now"))
    assert model[2].weight is model[0].weight
    assert torch.equal(model[0].weight, before)


def test_a_conversion_is_undone_with_its_gradients() -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    model[0].register_buffer(
        "scaled", model[0].weight * 2, persistent=False
    )  # no leaf, whose gradient may be asked for
    model[0].weight.grad = torch.ones(3, 2)
    before = {key: (t, t.data_ptr(), t.dtype) for key, t in model.state_dict(keep_vars=True).items()}
    grad = model[0].weight.grad
    memory = grad.data_ptr()
    with pytest.raises(ValueError, match="now"), transaction(model, keep_values=False, keep_memory=True):  # noqa: PT012
        converted(model, torch.float64, None)
        assert {t.dtype for t in model.state_dict().values()} == {torch.float64, torch.int64}
        raise ValueError("now")
    assert all(model.state_dict(keep_vars=True)[key] is tensor for key, (tensor, *_) in before.items())
    assert all((t.data_ptr(), t.dtype) == (place, dtype) for t, place, dtype in before.values())
    assert model[0].weight.grad is grad
    assert (grad.dtype, grad.data_ptr()) == (torch.float32, memory)
    assert model[0].bias.grad is None


def test_tensors_on_meta_stay_there_and_integers_stay_integers() -> None:
    model = network().append(nn.Linear(1, 1, device="meta"))
    converted(model, torch.float64, "cpu")
    assert model[1].num_batches_tracked.dtype == torch.int64
    assert model[2].weight.is_meta
    converted(model, None, "meta")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model[0].weight.dtype == torch.float64


def test_what_is_materialised_is_lazy_again() -> None:
    model: Any = nn.Sequential(nn.LazyLinear(3, dtype=torch.float64), nn.LazyBatchNorm1d(device="meta"))
    model[0].weight = UninitializedParameter(requires_grad=False, dtype=torch.float64)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="now"), transaction(model, keep_values=True):  # noqa: PT012
        model[0].initialize_parameters(torch.ones(2, 5, dtype=torch.float64))
        model[1].initialize_parameters(torch.ones(2, 3))
        assert model[0].weight.shape == (3, 5)
        raise ValueError("now")
    weight, mean = model[0].weight, model[1].running_mean
    assert (type(weight), weight.requires_grad, weight.dtype) == (UninitializedParameter, False, torch.float64)
    assert (type(mean), mean.device.type) == (UninitializedBuffer, "meta")
    assert model[1].weight.requires_grad


def test_a_sparse_buffer_is_put_back() -> None:
    model: Any = nn.Module()
    model.register_buffer("adjacent", torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match="now"), transaction(model, keep_values=True):  # noqa: PT012
        model.adjacent.mul_(2)
        raise ValueError("now")
    assert torch.equal(model.adjacent.to_dense(), torch.eye(3))


def test_of_a_sharded_tensor_this_processs_part_is_put_back() -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    distributed: Any = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model: Any = nn.ParameterDict({"whole": torch.ones(2), "sharded": torch.ones(4), "last": torch.ones(2)})
        model.sharded = nn.Parameter(distribute_tensor(torch.ones(4), DeviceMesh("cpu", [0]), [Shard(0)]))
        model.last = nn.Parameter(model.pop("last"))  # after the one that is sharded
        with pytest.raises(ValueError, match="now"), transaction(model, keep_values=True):  # noqa: PT012
            for parameter in model.parameters():
                local_part(parameter).zero_()
            raise ValueError("now")
        assert isinstance(model.sharded, DTensor)
        assert all(torch.equal(local_part(parameter), torch.ones(parameter.shape)) for parameter in model.parameters())
        assert type(local_part(model.sharded)) is Tensor
    finally:
        distributed.destroy_process_group()


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.state = {"scales": [1.0]}

    def get_extra_state(self) -> dict[str, list[float]]:
        return self.state

    def set_extra_state(self, state: dict[str, list[float]]) -> None:
        self.state = state


def test_what_extra_states_hold_is_put_back() -> None:
    model: Any = nn.Sequential(Nested(), Stateful(2, 2))  # of which the second has none to keep
    with pytest.raises(ValueError, match="now"), transaction(model, keep_values=True):  # noqa: PT012
        model[0].state["scales"].append(2.0)
        raise ValueError("now")
    assert model[0].state == {"scales": [1.0]}


def test_interrupt_waits_for_the_end_of_the_block() -> None:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    finished = False
    try:
        with pytest.raises(KeyboardInterrupt), transaction(network(), keep_values=False):  # noqa: PT012
            os.kill(os.getpid(), signal.SIGINT)
            finished = True
        assert finished
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)


def loadable(model: nn.Module) -> bool:
    state_dict = {key: torch.ones(t.shape, dtype=t.dtype) for key, t in model.state_dict().items()}
    return cannot_fail(model, model.state_dict(keep_vars=True), state_dict)


@pytest.mark.parametrize(
    "model",
    [network(), nn.LSTM(2, 3), nn.MultiheadAttention(4, 2), nn.Transformer(4, 2, 1, 1, 8, batch_first=True)],
    ids=lambda model: type(model).__name__,
)
def test_modules_of_torch_cannot_fail(model: nn.Module) -> None:
    assert loadable(model)


class Overriding(nn.Linear):
    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)


class Stateful(nn.Linear):
    def set_extra_state(self, state: object) -> None:
        raise RuntimeError(state)


def hooked(register: str) -> nn.Module:
    layer = nn.Linear(2, 2)
    getattr(layer, register)(lambda *_: None)
    return layer


def expanded() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.register_buffer("same", torch.ones(1).expand(2))
    return layer


def inferred() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(2, 2)


@pytest.mark.parametrize(
    "layer",
    [
        hooked("register_load_state_dict_pre_hook"),
        hooked("register_load_state_dict_post_hook"),
        Overriding(2, 2),
        expanded(),
        inferred(),
    ],
    ids=["pre hook", "post hook", "override", "expanded", "inference"],
)
def test_what_can_fail_deep_inside_is_found(layer: nn.Module) -> None:
    assert not loadable(nn.Sequential(nn.Linear(2, 2), nn.Sequential(layer)))


def test_tied_and_lone_tensors_and_hooks_of_fsdp_cannot_fail() -> None:
    def hook(*_: object) -> None:
        raise AssertionError

    hook.__module__ = "torch.distributed.fsdp._fully_shard"
    layer: Any = nn.Linear(2, 2)
    layer.register_load_state_dict_pre_hook(hook)
    layer.register_load_state_dict_post_hook(hook)
    layer.register_buffer("scale", torch.ones(1).as_strided((1,), (0,)))
    other = tied(layer)
    other.register_buffer("scale", layer.scale)
    assert loadable(nn.Sequential(layer, other))


def test_a_setter_of_extra_state_can_fail() -> None:
    model = nn.Sequential(Stateful(2, 2))
    assert not cannot_fail(model, dict(model.named_parameters()), {})


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, True),
        (torch.float64, True),
        (torch.float8_e5m2, False),
        (torch.int64, False),
        (torch.complex64, False),
    ],
)
def test_unusual_conversions_can_fail(dtype: torch.dtype, expected: bool) -> None:
    model = nn.Linear(2, 2)
    tensors: dict[str, Tensor] = {"weight": torch.ones(2, 2, dtype=dtype)}
    assert cannot_fail(model, model.state_dict(), tensors) is expected


class Own(Tensor):
    """A subclass may do anything where it is copied."""


@pytest.mark.parametrize("tensor", [torch.ones(2, 2).as_subclass(Own), torch.eye(2).to_sparse()], ids=["own", "sparse"])
def test_copies_of_other_kinds_of_tensors_can_fail(tensor: Tensor) -> None:
    assert not can_copy_in_place(tensor, torch.ones(2, 2))
    assert not can_copy_in_place(torch.ones(2, 2), tensor)


def test_keys_that_are_no_tensors_of_the_model_can_fail() -> None:
    model = nn.Linear(2, 2)
    kernel = torch.ones(2, 2)
    assert not cannot_fail(model, {"kernel": kernel}, {"kernel": kernel})


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="has no such signals")
def test_other_signals_wait_as_interrupts_do() -> None:
    def leave(number: int, _frame: object) -> None:
        raise SystemExit(number)

    numbers = signal.SIGUSR1, signal.SIGUSR2
    previous = [signal.signal(number, leave) for number in numbers]
    finished = False
    try:
        with pytest.raises(SystemExit) as raised, transaction(network(), keep_values=False):  # noqa: PT012
            for number in numbers:
                os.kill(os.getpid(), number)
            finished = True
        assert finished
        assert raised.value.code == signal.SIGUSR2  # raised while the first was handled
        assert isinstance(raised.value.__context__, SystemExit)
        assert [signal.getsignal(number) for number in numbers] == [leave, leave]
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


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
