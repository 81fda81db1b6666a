"""Transactions: change a module so that an error in the middle leaves it as it was."""

from __future__ import annotations

import copy
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_LOADING_METHODS = ("load_state_dict", "_load_from_state_dict", "set_extra_state")


@contextmanager
def transaction(model: nn.Module, *, keep_values: bool) -> Iterator[None]:
    """Put a module back as it was if the block raises, an interrupt included.

    What is put back: which submodules, parameters and buffers are registered, and with ``keep_values`` also the values
    of all tensors and the extra states. Without ``keep_values`` no tensor is copied, so the block may either register
    other tensors or change values by copies that cannot fail (see ``cannot_fail``). Ctrl-C is then held back until the
    block is through, so that the model is never left between two states.

    Args:
        model: The module that the block changes.
        keep_values: Keep a copy of all values, on the CPU, for as long as the block runs.
    """
    restore = snapshot(model, keep_values=keep_values)
    try:
        if keep_values:
            yield
        else:
            with _interrupts_held():
                yield
    except BaseException:
        restore()
        raise


def snapshot(model: nn.Module, *, keep_values: bool) -> Callable[[], None]:
    """Note what a module holds, and return what puts it back: registries, and with ``keep_values`` values too.

    Tensors that have not changed are not written to, so that what autograd saved of them stays valid.

    Args:
        model: The module that will be changed.
        keep_values: Keep a copy of all values, on the CPU, and of the extra states.
    """
    registries: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (registry, dict(registry))
        for module in model.modules()
        for registry in (module._parameters, module._buffers, module._modules)
        if isinstance(registry, dict)  # a compiled TorchScript module shows a view of its own
    ]
    values = _values(model) if keep_values else []
    extra_states = _extra_states(model) if keep_values else []

    def restore() -> None:
        with _interrupts_held(), torch.no_grad():
            for registry, entries in registries:
                registry.clear()
                registry.update(entries)
            for tensor, memory, value in values:
                tensor.data = memory  # undoes an assignment to `.data`, which may have changed the shape
                if not _holds(memory, value):
                    memory.copy_(value)
            for module, state in extra_states:
                module.set_extra_state(state)

    return restore


def cannot_fail(model: nn.Module, targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether loading these tensors in place is nothing but copies that torch is sure to carry out.

    >>> layer = nn.Linear(2, 1)
    >>> cannot_fail(layer, layer.state_dict(), {"bias": torch.zeros(1)})
    True

    Args:
        model: The module to load into.
        targets: Its state dict.
        tensors: What is loaded, of the targets' shapes.
    """
    loadable = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    loadable.update(name for name, _ in model.named_buffers(remove_duplicate=False))
    return (
        tensors.keys() <= loadable
        and not any(_has_own_loading_code(module) for module in model.modules())
        and all(_copies_surely(tensor, targets[key]) for key, tensor in tensors.items())
    )


def _has_own_loading_code(module: nn.Module) -> bool:
    methods = (getattr(module, name) for name in _LOADING_METHODS)
    return (
        bool(module._load_state_dict_pre_hooks)
        or bool(module._load_state_dict_post_hooks)
        or any(method.__module__.partition(".")[0] != "torch" for method in methods)
    )


def _copies_surely(tensor: Tensor, target: Tensor) -> bool:
    dtypes = (tensor.dtype, target.dtype)
    return (
        all(type(side) in (Tensor, nn.Parameter) and side.layout == torch.strided for side in (tensor, target))
        and (dtypes[0] == dtypes[1] or all(dtype.is_floating_point and dtype.itemsize > 1 for dtype in dtypes))
        and _is_writable(target)
    )


def _is_writable(tensor: Tensor) -> bool:
    """Whether torch copies into the tensor: not if it is expanded, or made in inference mode and this is outside."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return tensor.layout != torch.strided or all(
        stride or size <= 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _values(model: nn.Module) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [
        (tensor, tensor.detach(), tensor.detach().to("cpu", copy=True))
        for tensor in (*model.parameters(), *model.buffers())
        if not tensor.is_meta and _is_writable(tensor)  # nothing else has a value that a load could change
    ]


def _holds(memory: Tensor, value: Tensor) -> bool:
    try:
        return torch.equal(memory.cpu(), value)
    except (NotImplementedError, RuntimeError):  # a layout or dtype that is not compared
        return False


def _extra_states(model: nn.Module) -> list[tuple[nn.Module, object]]:
    return [
        (module, copy.deepcopy(module.get_extra_state()))
        for module in model.modules()
        if type(module).set_extra_state is not nn.Module.set_extra_state
        and type(module).get_extra_state is not nn.Module.get_extra_state
    ]


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold back Ctrl-C until the block is through, in the one thread that it can reach."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held: list[object] = []
    signal.signal(signal.SIGINT, lambda _number, _frame: held.append(None))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)
