"""Recording: what the modules of a network are given and give in one call of it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autoalign.verification.run import UseTracer, call

_MOST_NESTED = 8  # levels of lists and mappings in an output
_ROUNDINGS = 100  # by which the sums of tensors that are called the same may differ, within these bounds
_FINEST, _COARSEST = 1e-5, 1e-2


@dataclass(frozen=True, slots=True)
class Sums:
    """What is kept of a tensor to recognise its values in any layout: sums of powers, which do not depend on order."""

    numel: int
    signed: tuple[float, ...]  # of the values and of their cubes
    absolute: tuple[float, ...]  # of the absolute values to the power of 1, 2, 3 and 4
    precision: float  # relative difference of sums that are called the same

    def like(self, other: Sums) -> bool:
        """Tell whether two tensors have the same values, in any order, as far as sums tell."""
        allowed = max(self.precision, other.precision)
        scales = [max(pair) for pair in zip(self.absolute, other.absolute, strict=True)]
        sums = [*zip(self.absolute, other.absolute, strict=True), *zip(self.signed, other.signed, strict=True)]
        return self.numel == other.numel and all(
            abs(own - theirs) <= allowed * scale or (own == theirs)
            for (own, theirs), scale in zip(sums, [*scales, scales[0], scales[2]], strict=True)
        )


@dataclass(slots=True)
class Call:
    """One call of a module."""

    module: str
    index: int  # which call of this module it is, from 0
    start: int  # when it began and ended, on the clock of the recording
    end: int = -1  # -1 where it did not end
    given: list[Tensor] = field(default_factory=list)  # copies of its inputs; empty where none were wanted
    gave: list[Tensor] = field(default_factory=list)  # copies of its outputs
    given_sums: Sums | None = None  # of the first floating point tensor
    gave_sums: Sums | None = None


@dataclass(frozen=True, slots=True)
class Recording:
    """One call of a network."""

    calls: tuple[Call, ...]  # of its modules, by their start
    outputs: dict[str, Tensor]  # of the network; the names are paths in what it returns
    first_use: dict[str, int]  # when each key of its state dict was used first
    functions: tuple[tuple[int, str], ...]  # what functions of torch were called and when


def record(
    model: nn.Module, inputs: object, keep: Collection[str], values: Mapping[str, Tensor] | None = None
) -> Recording:
    """Call a model and record what its modules do. Use it within ``preserved``.

    Args:
        model: The network.
        inputs: As for ``execution.call``.
        keep: The names of the modules whose inputs and outputs are kept.
        values: Tensors to use in place of the model's own, by key; the model is not changed.

    Raises:
        InputError: The call fails.
    """
    own = {key: tensor for key, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    tracer = UseTracer({**own, **(values or {})})
    calls: list[Call] = []
    open_calls: list[Call] = []
    counts: Counter[str] = Counter()

    def kept(name: str, value: Any) -> tuple[list[Tensor], Sums | None]:
        tracer.paused = True
        tensors = list(flat_tensors(value).values())
        copies = [tensor.detach().clone() for tensor in tensors] if name in keep else []
        sums = next((sums_of(tensor) for tensor in tensors if tensor.is_floating_point() and not tensor.is_meta), None)
        tracer.paused = False
        return copies, sums

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

    handles = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(begin(name), with_kwargs=True))
            handles.append(module.register_forward_hook(finish(name), with_kwargs=True))
        with tracer:
            result = call(model, inputs, values)
    finally:
        for handle in handles:
            handle.remove()
    outputs = {name: tensor.detach().clone() for name, tensor in flat_tensors(result).items()}
    return Recording(tuple(calls), outputs, tracer.first_use, tuple(tracer.functions))


def flat_tensors(value: Any, name: str = "", depth: int = 0) -> dict[str, Tensor]:
    """Collect the tensors in nested lists, mappings and dataclasses, by their paths.

    >>> import torch
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
    if depth < _MOST_NESTED:
        for key, item in items:
            found |= flat_tensors(item, f"{name}.{key}" if name else str(key), depth + 1)
    return found


def sums_of(tensor: Tensor) -> Sums:
    """Sum up the powers of a tensor's values in double precision.

    >>> import torch
    >>> sums = sums_of(torch.tensor([1.0, -2.0]))
    >>> sums.signed, sums.absolute, sums.like(sums_of(torch.tensor([[-2.0], [1.0]])))
    ((-1.0, -7.0), (3.0, 5.0, 9.0, 17.0), True)
    """
    values = tensor.detach().double().flatten()
    squares, sizes = values.square(), values.abs()
    cubes = squares * sizes
    absolute = [float(power.sum()) for power in (sizes, squares, cubes, squares.square())]
    signed = float(values.sum()), float((squares * values).sum())
    precision = min(max(_ROUNDINGS * torch.finfo(tensor.dtype).eps, _FINEST), _COARSEST)
    return Sums(values.numel(), signed, tuple(absolute), precision)
