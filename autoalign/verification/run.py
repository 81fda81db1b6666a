"""Running: call a model, record what its modules do, and leave it and every source of chance as they were."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from autoalign.errors import InputError
from autoalign.loading.transaction import snapshot
from autoalign.verification.differences import Sums, sums_of

NEVER = 2**62  # a time after all others

_VALUE_ATTRIBUTES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})  # of a tensor, that hold its values
_MAX_NESTING = 8  # levels of lists and mappings in an output
_RECENT = 4  # tensors whose sums are kept
_CHANGED_ROUNDINGS = 32  # by which values are changed to measure how precise others are


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
            stack.callback(snapshot(model, keep_values=True))
        stack.enter_context(quiet(*models))
        yield


@contextmanager
def quiet(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode for a block as ``preserved`` does, which must not change what they hold."""
    with ExitStack() as stack:
        for model in models:
            for module in model.modules():
                stack.callback(setattr, module, "training", module.training)
        devices = range(torch.cuda.device_count()) if _uses_cuda() else ()
        stack.enter_context(torch.random.fork_rng(devices))
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(random.setstate, random.getstate())
        convolutions = getattr(torch.backends.cudnn, "conv", torch.backends.cudnn)
        for owner in (torch.backends.cuda.matmul, convolutions) if _uses_cuda() else ():  # without TF32
            name, exact = ("fp32_precision", "ieee") if hasattr(owner, "fp32_precision") else ("allow_tf32", False)
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, exact)
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(torch.no_grad())
        for model in models:
            stack.callback(restart, model)
            model.eval()
        yield


def restart(module: nn.Module) -> None:
    """Leave evaluation mode and enter it again: modules then drop what they derived of their tensors and kept."""
    module.train()
    module.eval()


def seed_all(seed: int) -> None:
    """Seed what a model may draw from, without starting CUDA."""
    torch.default_generator.manual_seed(seed)
    if _uses_cuda():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed)
    random.seed(seed)


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


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

    def finish(name: str) -> Callable[..., None]:
        own = [key for key in tracer.keys if key.rpartition(".")[0] == name]

        def hook(*_: object) -> None:
            for key in own:
                tracer.use(key)

        return hook

    with preserved(module), ExitStack() as hooks:
        for name, owner in module.named_modules():
            hooks.callback(owner.register_forward_hook(finish(name)).remove)
        with tracer:
            call(module, example_inputs)
    return sorted(tracer.keys, key=lambda key: tracer.first_use.get(key, NEVER))


def call(model: nn.Module, inputs: object, values: Mapping[str, Tensor] | None = None) -> Any:
    """Call a model on inputs as for ``execution_order``, which are copied and taken to its device; chance is seeded.

    ``values`` take the places of the model's own tensors, by key; the model is not changed.

    Raises:
        InputError: The call fails.
    """
    device = next((t.device for t in (*model.parameters(), *model.buffers()) if not t.is_meta), None)
    given = arguments_of(inputs)
    arguments, options = tree_map_only(Tensor, lambda tensor: tensor.detach().to(device, copy=True), given)
    seed_all(0)
    restart(model)
    try:
        if values is None:
            return model(*arguments, **options)
        return functional_call(model, dict(values), arguments, options)
    except Exception as error:
        advice = (
            "It was left as it was. Give what it is called with: a tensor, a tuple of its arguments, or a dict of "
            "keyword arguments."
        )
        raise InputError.by_others(
            f"{type(model).__name__} cannot be called on the example inputs", error, advice
        ) from error


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a module is called with as arguments and keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if not isinstance(inputs, tuple):
        return (inputs,), {}
    if inputs and isinstance(inputs[-1], dict) and all(isinstance(name, str) for name in inputs[-1]):
        return inputs[:-1], inputs[-1]
    return inputs, {}


class UseTracer(TorchFunctionMode):
    """Record, while entered, when each tensor of a state dict is first used, and which functions are called.

    Args:
        tensors: The tensors to watch, by key; several keys may have one tensor.
    """

    def __init__(self, tensors: Mapping[str, object]) -> None:
        super().__init__()
        self.keys = [key for key, tensor in tensors.items() if isinstance(tensor, Tensor)]
        self.first_use: dict[str, int] = {}
        self.functions: list[tuple[int, str]] = []
        self._clock = count()
        self._keys_of: dict[int, list[str]] = {}
        for key in self.keys:
            self._keys_of.setdefault(id(tensors[key]), []).append(key)

    def now(self) -> int:
        """Return a time that is later than all that were returned before."""
        return next(self._clock)

    def use(self, key: str) -> None:
        """Record the use of a tensor."""
        if key not in self.first_use:
            self.first_use[key] = self.now()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "__get__":  # an attribute, of which few are values
            name = getattr(getattr(func, "__self__", None), "__name__", "")
            if name not in _VALUE_ATTRIBUTES:
                return result
        elif next(_tensors_in(result), None) is None:
            return result
        for tensor in _tensors_in((args, kwargs)):
            for key in self._keys_of.get(id(tensor), ()):
                self.use(key)
        self.functions.append((self.now(), name + _settings(args, kwargs or {})))
        return result


def _settings(arguments: Any, options: Mapping[str, Any]) -> str:
    """Write the numbers and texts that a function is given, such as a scale, an eps or a kind of approximation."""
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


@dataclass(slots=True)
class Call:
    """One call of a module."""

    module: str
    index: int  # which call of this module it is, from 0
    start: int  # when it began and ended, on the clock of the recording
    end: int = -1  # -1 where it did not end
    given: list[Tensor] = field(default_factory=list)  # copies of its inputs; empty where none were wanted
    gave: list[Tensor] = field(default_factory=list)  # copies of its outputs
    given_sizes: list[Tensor] = field(default_factory=list)  # of each value, as `with_sizes` measures them
    gave_sizes: list[Tensor] = field(default_factory=list)
    given_sums: Sums | None = None  # of the first floating point tensor
    gave_sums: Sums | None = None


@dataclass(frozen=True, slots=True)
class Recording:
    """One call of a network and what its modules did."""

    calls: tuple[Call, ...]  # of its modules, by their start
    outputs: dict[str, Tensor]  # of the network; the names are paths in what it returns
    first_use: dict[str, int]  # when each key of its state dict was used first
    functions: tuple[tuple[int, str], ...]  # what functions of torch were called and when
    sizes: dict[str, Tensor] = field(default_factory=dict)  # of the outputs' values


def record(
    model: nn.Module, inputs: object, keep: Collection[str], values: Mapping[str, Tensor] | None = None
) -> Recording:
    """Call a model as ``call`` does and record what its modules do; of those to ``keep``, inputs and outputs.

    Use it within ``preserved``.
    """
    own = {key: tensor for key, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    tracer = UseTracer({**own, **(values or {})})
    calls: list[Call] = []
    open_calls: list[Call] = []
    counts: Counter[str] = Counter()

    recent: deque[tuple[Tensor, int, Sums]] = deque(maxlen=_RECENT)  # what one module gives, the next is given

    def summed(tensor: Tensor) -> Sums:
        version = -1 if tensor.is_inference() else tensor._version
        for known, its_version, sums in recent:
            if known is tensor and version == its_version >= 0:
                return sums
        recent.append((tensor, version, sums_of(tensor)))
        return recent[-1][2]

    def kept(name: str, value: Any) -> tuple[list[Tensor], Sums | None]:
        with torch._C.DisableTorchFunction():  # or the tracer would see it
            tensors = list(flat_tensors(value).values())
            copies = [tensor.detach().clone() for tensor in tensors] if name in keep else []
            floats = (tensor for tensor in tensors if tensor.is_floating_point() and not tensor.is_meta)
            return copies, next(map(summed, floats), None)

    def begin(name: str) -> Any:
        def hook(_: nn.Module, arguments: Any, options: Any) -> None:
            this = Call(name, counts[name], tracer.now())
            counts[name] += 1
            this.given, this.given_sums = kept(name, (arguments, options))
            calls.append(this)
            open_calls.append(this)

        return hook

    def finish(name: str) -> Any:
        def hook(_: nn.Module, __: Any, ___: Any, result: Any) -> None:
            while open_calls and open_calls[-1].module != name:
                open_calls.pop()  # one that was left by an exception
            if open_calls:
                this = open_calls.pop()
                this.end = tracer.now()
                this.gave, this.gave_sums = kept(name, result)

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(begin(name), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(finish(name), with_kwargs=True).remove)
        with tracer:
            result = call(model, inputs, values)
    outputs = {name: tensor.detach().clone() for name, tensor in flat_tensors(result).items()}
    return Recording(tuple(calls), outputs, tracer.first_use, tuple(tracer.functions))


def with_sizes(recording: Recording, model: nn.Module, inputs: object, values: Mapping[str, Tensor]) -> Recording:
    """Measure how precisely each value of a recording can be computed, and note it as its size.

    The model is called again with ``values``, those of the recording, rounded a little differently. The size of a value
    is its absolute, or by how much it changes as a share of how much they did: what is left of large values that cancel
    each other is as imprecise as they are. A recording whose calls are other ones then is returned as it is.
    """
    eps = max((torch.finfo(v.dtype).eps for v in values.values() if v.is_floating_point()), default=0.0)
    generator, rounded = torch.Generator().manual_seed(0), dict[int, Tensor]()
    for value in values.values():
        if id(value) not in rounded and value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator).to(value)
            changed = value.detach() * (1 + _CHANGED_ROUNDINGS * eps * noise)
            rounded[id(value)] = nn.Parameter(changed, False) if isinstance(value, nn.Parameter) else changed
    keep = {call.module for call in recording.calls if call.given or call.gave}
    try:
        other = record(model, inputs, keep, {key: rounded.get(id(value), value) for key, value in values.items()})
    except InputError:  # compiled code, which takes no values in place of its own
        return recording
    if [(c.module, c.index) for c in other.calls] != [(c.module, c.index) for c in recording.calls]:
        return recording

    def sizes(own: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
        if not eps or [tensor.shape for tensor in own] != [tensor.shape for tensor in others]:
            return []
        pairs = [(one.double(), two.double()) for one, two in zip(own, others, strict=True)]
        return [
            torch.maximum(a.abs(), (b - a).abs() / (_CHANGED_ROUNDINGS * eps)).nan_to_num().float() for a, b in pairs
        ]

    calls = tuple(
        replace(own, given_sizes=sizes(own.given, two.given), gave_sizes=sizes(own.gave, two.gave))
        for own, two in zip(recording.calls, other.calls, strict=True)
    )
    found = dict(zip(recording.outputs, sizes([*recording.outputs.values()], [*other.outputs.values()]), strict=False))
    return replace(recording, calls=calls, sizes=found)


def flat_tensors(value: Any, name: str = "", depth: int = 0) -> dict[str, Tensor]:
    """Collect the tensors in nested lists, mappings and dataclasses, by their paths.

    >>> list(flat_tensors({"logits": torch.ones(1), "hidden": (torch.ones(1),)}))
    ['logits', 'hidden.0']
    """
    if isinstance(value, Tensor):
        return {name: value}
    items: list[tuple[object, object]]
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(entry.name, getattr(value, entry.name)) for entry in dataclasses.fields(value)]
    else:
        return {}
    found: dict[str, Tensor] = {}
    if depth < _MAX_NESTING:
        for key, item in items:
            found |= flat_tensors(item, f"{name}.{key}" if name else str(key), depth + 1)
    return found
