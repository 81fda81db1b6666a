"""Preservation: run models in evaluation mode and leave them, and every source of chance, as they were."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from autoalign.errors import InputError
from autoalign.loading.transaction import snapshot


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


_VIEWS = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})  # attributes of a tensor that give its values


def execution_order(module: nn.Module, example_inputs: object) -> list[str]:
    """List the keys of a module's state dict in the order in which a call uses them first.

    The module is called once in evaluation mode, without gradients, and left as it was. A tensor that no operation
    takes by itself, as in compiled code, counts as used when its module is through. Tensors that the call does not
    use come last, in their order of registration; tied tensors come together.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.last, self.first = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    ...     def forward(self, x):
    ...         return self.last(self.first(x))
    >>> execution_order(Block(), torch.ones(1, 2))
    ['first.weight', 'last.weight', 'last.bias']

    Args:
        module: What is called.
        example_inputs: What it is called with: a tensor or a list, as its only argument; a tuple of its arguments,
            whose last may be a dict of keyword arguments; a dict of keyword arguments.

    Raises:
        InputError: The call fails.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"Expected an nn.Module to call, not {type(module).__name__}. Nothing was called.")
    tracer = UseTracer(module.state_dict(keep_vars=True))
    handles = [owner.register_forward_hook(_finished(tracer, name)) for name, owner in module.named_modules()]
    with preserved(module):
        try:
            with tracer:
                call(module, example_inputs)
        finally:
            for handle in handles:
                handle.remove()
    return sorted(tracer.keys, key=lambda key: tracer.first_use.get(key, tracer.never))


def call(model: nn.Module, inputs: object, values: Mapping[str, Tensor] | None = None) -> Any:
    """Call a model on inputs of any form, which are copied and taken to its device; chance is seeded.

    Args:
        model: What is called.
        inputs: As for ``execution_order``.
        values: Tensors to use in place of the model's own, by key; the model is not changed.

    Raises:
        InputError: The call fails.
    """
    device = next((t.device for t in (*model.parameters(), *model.buffers()) if not t.is_meta), None)
    placed = _placed(inputs, device)
    seed_all(0)
    try:
        arguments, options = _arguments(placed)
        if values is None:
            return model(*arguments, **options)
        return functional_call(model, dict(values), arguments, options)
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot be called on the example inputs: {type(error).__name__}: {error}. "
            "It was left as it was. Give what it is called with: a tensor, a tuple of its arguments, or a dict of "
            "keyword arguments."
        ) from error


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if not isinstance(inputs, tuple):
        return (inputs,), {}
    if inputs and isinstance(inputs[-1], dict) and all(isinstance(name, str) for name in inputs[-1]):
        return inputs[:-1], inputs[-1]
    return inputs, {}


def _placed(value: Any, device: torch.device | None) -> Any:
    """Copy nested inputs, the tensors among them onto a device."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_placed(item, device) for item in value))
    if type(value) in (tuple, list):
        return type(value)(_placed(item, device) for item in value)
    if isinstance(value, Mapping):
        return {name: _placed(item, device) for name, item in value.items()}
    return value


class UseTracer(TorchFunctionMode):
    """While it is entered, notes when each tensor of a state dict is first used, and what functions are called.

    Args:
        tensors: The tensors to watch, by key; several keys may have one tensor.
    """

    def __init__(self, tensors: Mapping[str, object]) -> None:
        super().__init__()
        self.keys = [key for key, tensor in tensors.items() if isinstance(tensor, Tensor)]
        self.first_use: dict[str, int] = {}
        self.functions: list[tuple[int, str]] = []
        self.paused = False
        self.never = 2**62  # a time after all others
        self._clock = count()
        self._keys_of: dict[int, list[str]] = {}
        for key in self.keys:
            self._keys_of.setdefault(id(tensors[key]), []).append(key)

    def now(self) -> int:
        """Give a time that is later than all that were given before."""
        return next(self._clock)

    def use(self, key: str) -> None:
        """Note a use of a tensor."""
        if key not in self.first_use:
            self.first_use[key] = self.now()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.paused:
            return result
        name = getattr(func, "__name__", "")
        if name == "__get__":  # an attribute, of which few are values
            name = getattr(getattr(func, "__self__", None), "__name__", "")
            if name not in _VIEWS:
                return result
        elif next(_tensors_in(result), None) is None:
            return result
        for tensor in _tensors_in((args, kwargs)):
            for key in self._keys_of.get(id(tensor), ()):
                self.use(key)
        self.functions.append((self.now(), name + _settings(args, kwargs or {})))
        return result


def _settings(arguments: Any, options: Mapping[str, Any]) -> str:
    """Write the numbers and words that a function is given, such as a scale, an eps or a kind of approximation."""
    given = [repr(value) for value in arguments if isinstance(value, str | float)]
    given += [f"{name}={value!r}" for name, value in options.items() if isinstance(value, str | float)]
    return f"({', '.join(given)})" if given else ""


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)


def _finished(tracer: UseTracer, name: str) -> Any:
    own = [key for key in tracer.keys if key.rpartition(".")[0] == name]

    def hook(*_: object) -> None:
        for key in own:
            tracer.use(key)

    return hook
