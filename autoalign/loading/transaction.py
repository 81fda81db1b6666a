"""Transactions: change a module so that an error in the middle leaves it as it was."""

from __future__ import annotations

import copy
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from autoalign.checkpoints.atomic import interrupts_held

_LOADING_METHODS = ("load_state_dict", "_load_from_state_dict", "set_extra_state")


@contextmanager
def transaction(model: nn.Module, *, keep_values: bool, keep_memory: bool = False) -> Iterator[None]:
    """Put a module back as it was if the block raises, an interrupt included.

    What is put back: which submodules, parameters and buffers are registered, and with ``keep_values`` also the values
    of all tensors and the extra states. Without ``keep_values`` no tensor is copied, so the block may either register
    other tensors or change values by copies that cannot fail (see ``cannot_fail``). Ctrl-C is then held back until the
    block is through, so that the model is never left between two states.

    Args:
        model: The module that the block changes.
        keep_values: Keep a copy of all values, on the CPU, for as long as the block runs; of a sharded tensor, of
            this process's part of it.
        keep_memory: Keep the memory of all tensors, for a block that gives them other memory, as a conversion
            to another dtype or device does.
    """
    restore = snapshot(model, keep_values=keep_values, keep_memory=keep_memory)
    try:
        if keep_values:
            yield
        else:
            with interrupts_held():
                yield
    except BaseException:
        restore()
        raise


def snapshot(model: nn.Module, *, keep_values: bool, keep_memory: bool = False) -> Callable[[], None]:
    """Record what a module holds, and return a function that puts it back; arguments are those of ``transaction``.

    Tensors that have not changed are not written to, so that what autograd saved of them stays valid.
    """
    registries: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (registry, dict(registry))
        for module in model.modules()
        for registry in (module._parameters, module._buffers, module._modules)
        if isinstance(registry, dict)  # a compiled TorchScript module shows a view of its own
    ]
    for _, entries in registries:  # what is materialised in place cannot be put back, but its like can
        for name, tensor in entries.items():
            if is_lazy(tensor):
                kind: Any = type(tensor)
                entries[name] = kind(requires_grad=tensor.requires_grad, device=tensor.device, dtype=tensor.dtype)
    memories = [_aliases(tensor) for tensor in tensors_of_module(model)] if keep_memory else []
    values = _values(model) if keep_values else []
    extra_states = [
        (module, copy.deepcopy(module.get_extra_state()))
        for module in (model.modules() if keep_values else ())
        if type(module).set_extra_state is not nn.Module.set_extra_state
        and type(module).get_extra_state is not nn.Module.get_extra_state
    ]

    def restore() -> None:
        with interrupts_held(), torch.no_grad():
            for registry, entries in registries:
                registry.clear()
                registry.update(entries)
            for tensor, alias, grad, grad_alias in memories:
                tensor.grad = None  # which has the dtype of what was undone
                tensor.data = alias
                if grad is not None and grad_alias is not None:
                    grad.data = grad_alias
                    tensor.grad = grad
            for tensor, memory, value in values:
                if memory is None:
                    local_part(tensor).copy_(value)
                    continue
                tensor.data = memory  # undoes an assignment to `.data`, which may have changed the shape
                if not _is_equal(memory, value):
                    memory.copy_(value)
            for module, state in extra_states:
                module.set_extra_state(state)

    return restore


def converted(model: nn.Module, dtype: torch.dtype | None, device: torch.device | str | int | None) -> None:
    """Convert a model's tensors to a device, and to a dtype if of floating point; those on meta stay there."""

    def convert(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return tensor
        return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

    model._apply(convert)  # type: ignore[no-untyped-call]


def cannot_fail(model: nn.Module, targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    """Return True if loading these tensors in place is nothing but copies that torch is sure to carry out.

    >>> layer = nn.Linear(2, 1)
    >>> cannot_fail(layer, layer.state_dict(), {"bias": torch.zeros(1)})
    True
    """
    return supports_plain_copy(model, tensors.keys()) and all(
        can_copy_in_place(t, targets[key]) for key, t in tensors.items()
    )


def supports_plain_copy(model: nn.Module, keys: Collection[str]) -> bool:
    """Return True if loading these keys means to copy into tensors of the model, and nothing else."""
    loadable = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    loadable.update(name for name, _ in model.named_buffers(remove_duplicate=False))
    return (
        loadable.issuperset(keys)
        and not any(_has_own_loading_code(module) for module in model.modules())
        and not torch.__future__.get_swap_module_params_on_conversion()
    )


def _has_own_loading_code(module: nn.Module) -> bool:
    """Return True if a module has methods or hooks of loading that are not torch's own."""
    methods = (getattr(module, name) for name in _LOADING_METHODS)
    hooks = (*module._load_state_dict_pre_hooks.values(), *module._load_state_dict_post_hooks.values())
    return any(  # those of FSDP2 free whole parameters, as its hook of `state_dict` does too
        not str(hook.__module__).startswith("torch.distributed.fsdp.") for hook in hooks
    ) or any(method.__module__.partition(".")[0] != "torch" for method in methods)


def can_copy_in_place(tensor: Tensor, target: Tensor) -> bool:
    """Return True if torch is sure to copy one tensor into another of the same shape."""
    dtypes = (tensor.dtype, target.dtype)
    return (
        all(type(side) in (Tensor, nn.Parameter) and side.layout == torch.strided for side in (tensor, target))
        and (dtypes[0] == dtypes[1] or all(dtype.is_floating_point and dtype.itemsize > 1 for dtype in dtypes))
        and _is_writable(target)
    )


def _is_writable(tensor: Tensor) -> bool:
    """Return True if torch copies into a tensor: not if expanded, nor if made in inference mode and this is outside."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return tensor.layout != torch.strided or all(
        stride or size <= 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def tensors_of_module(model: nn.Module) -> list[Tensor]:
    """List the parameters and buffers of a module that have a shape."""
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if not is_lazy(tensor)]


def _aliases(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return a tensor and its gradient, each followed by an alias that keeps its memory."""
    grad = tensor.grad if tensor.is_leaf else None
    return tensor, tensor.detach(), grad, None if grad is None else grad.detach()


def _values(model: nn.Module) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """Copy the values of a model's tensors, with the memory that they are in; None for that of a sharded tensor."""
    return [
        (tensor, None if is_sharded(tensor) else tensor.detach(), local_part(tensor).to("cpu", copy=True))
        for tensor in tensors_of_module(model)
        if not tensor.is_meta and _is_writable(tensor)  # nothing else has a value that a load could change
    ]


def _is_equal(memory: Tensor, value: Tensor) -> bool:
    try:
        return torch.equal(memory.cpu(), value)
    except (NotImplementedError, RuntimeError):  # a layout or dtype that is not compared
        return False


def memory_of(tensor: Tensor) -> int | None:
    """Identify the storage of a tensor; None for a subclass without one of its own."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError, ValueError):  # the last of a lazy one
        return None


def is_sharded(tensor: object) -> bool:
    """Return True if a tensor is spread over several processes, as those of FSDP2 and of tensor parallelism are."""
    distributed = sys.modules.get("torch.distributed.tensor")  # without which there is none, and which takes long
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, and all of any other, without gradient."""
    part: Any = tensor.detach()
    return part.to_local() if is_sharded(part) else part  # type: ignore[no-any-return]


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
            _released.wait_for(lambda: all(_owners.get(part, me) == me or _owners[part][0] != me[0] for part in parts))
            locked = {part for part in parts if _owners.get(part) != me}
            _owners.update(dict.fromkeys(locked, me))
        yield
    finally:
        with _released:
            for part in locked:
                _owners.pop(part, None)
            _released.notify_all()
