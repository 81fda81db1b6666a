"""Proof: what makes equal outputs one: fresh values on which every tensor matters, and the coverage that was reached.

The signal of a network with initial values may fade or saturate on its way, many of its tensors are equal to each
other (gains of one, biases of zero), and branches may be scaled to nothing. None of that is so on fresh values: the
output of each layer has about the variance of its input, as in Mishkin and Matas, "All you need is a good init", ICLR
2016, and no two tensors are alike. Coverage is measured by changing one tensor after another.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from autoalign.errors import InputError
from autoalign.matching.names import kind
from autoalign.verification.differences import relative_difference
from autoalign.verification.run import call, flat_tensors, restart, seed_all
from autoalign.verification.session import Outcome, Session, tensors_of

_SEED = 20_161  # of fresh values
_SPREAD = 0.2  # of gains around one and of biases around zero
_TABLE_SPREAD = 0.5  # of what is added to signals, such as position tables and class tokens
_KEPT_DEVIATIONS = (0.5, 2.0)  # of a layer's output, which are not corrected
_CHANGE = 0.5  # of values that are all alike, as a share of them
_LARGE = 8.0  # what values are changed to, so as to see whether a tensor has any effect


def fresh_values(model: nn.Module, inputs: object, keys: Collection[str]) -> dict[str, Tensor] | None:
    """Make values for keys of a model's state dict that carry its signal on these inputs. Use it within ``preserved``.

    Parameters and running statistics get values; other buffers, which are constants, do not.

    Returns:
        The values, by key, the same tensor for tied keys; None if the model gives no finite outputs with them.
    """
    generator = torch.Generator().manual_seed(_SEED)
    own = {key: tensor for key, tensor in tensors_of(model).items() if key in keys and is_decisive(key, tensor)}
    made: dict[int, Tensor] = {}
    for key, tensor in own.items():
        if id(tensor) not in made:
            value = _fresh(key, tensor.detach(), generator).to(tensor)
            made[id(tensor)] = nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value
    values = {key: made[id(tensor)] for key, tensor in own.items()}
    biases = {id(value): (value, value.clone()) for key, value in values.items() if _role(key) == "bias"}
    drawn = {id(value) for value in made.values()}
    with ExitStack() as hooks:
        for module in model.modules():
            hooks.callback(module.register_forward_hook(_scaler(drawn), with_kwargs=True).remove)
        for bias, _ in biases.values():
            bias.zero_()  # a signal should not vanish beside it
        try:
            outputs = flat_tensors(call(model, inputs, values))
        except InputError:  # it is called on its own values before, so that these are at fault
            return None
    for bias, value in biases.values():
        bias.copy_(value)
    return values if all(bool(tensor.isfinite().all()) for tensor in outputs.values()) else None


def _role(key: str) -> str:
    return kind(key.rpartition(".")[2])[0]


def is_decisive(key: str, tensor: Tensor) -> bool:
    """Return True for parameters and running statistics, and False for constants such as tables of positions."""
    is_plain = tensor.is_floating_point() and tensor.layout == torch.strided and tensor.numel() > 0
    return is_plain and (isinstance(tensor, nn.Parameter) or _role(key) in ("mean", "var"))


def _fresh(key: str, own: Tensor, generator: torch.Generator) -> Tensor:
    """Draw values for one tensor."""
    values = torch.randn(own.shape, generator=generator).clamp(-3, 3)
    role = _role(key)
    if role == "var":
        return 0.5 + torch.rand(own.shape, generator=generator)
    if role == "mean":
        return _SPREAD * values
    if own.numel() == 1:  # a scale or a temperature, whose size may matter
        return (1 + _SPREAD * values) * (float(own) or _TABLE_SPREAD)
    if own.squeeze().dim() < 2:
        is_gain = role == "weight" or (role != "bias" and bool((own > 0).all()))
        return 1 + _SPREAD * values if is_gain else _SPREAD * values
    if role != "weight" and own.shape[0] == 1:
        return _TABLE_SPREAD * values
    return values / sqrt(own[0].numel())


def _scaler(drawn: set[int]) -> Any:
    """Return a hook that scales a layer when it is first called, so that its output deviates by about one.

    It scales the statistics of a norm that has them, so that they are those of its input, and the weight of any other.
    """
    is_done = False

    def hook(module: nn.Module, arguments: Any, options: Any, result: Any) -> Any:
        nonlocal is_done
        own = {
            n: t for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None and id(t) in drawn
        }
        if is_done or not own.keys() & {"weight", "running_var"} or not isinstance(result, Tensor):
            return None
        is_done = True
        deviation = float(result.float().std()) if result.numel() > 1 else 1.0
        low, high = _KEPT_DEVIATIONS
        if low < deviation < high or not 0 < deviation < inf:
            return None
        if {"running_mean", "running_var"} <= own.keys():
            own["running_mean"].mul_(deviation)
            own["running_var"].mul_(deviation**2)
        elif "weight" in own:
            own["weight"].div_(deviation)
        return module.forward(*arguments, **options)

    return hook


def is_countable(key: str) -> bool:
    """Return False for counters, which no call in evaluation mode uses."""
    return _role(key) != "count"


def noticed(
    session: Session, outcome: Outcome, fills: Mapping[str, Tensor], seconds: float
) -> tuple[set[str], set[str]]:
    """Find the target's keys of which a change would have been noticed in a call that was compared.

    The target is called again with the same values. Each module whose output was compared is called on the inputs that
    it gets there with one tensor after another changed; tensors of a module whose output was not are tried with the
    innermost around it, up to the network itself.

    Args:
        session: The session of the call; use it within ``preserved``.
        outcome: What came of it.
        fills: The target's values in it, by key.
        seconds: For how long to measure; what is left then counts as not noticed.

    Returns:
        These keys, and those whose values have no effect, however large a change of them: as a bias before a softmax.
    """
    values = session.tied({key: tensor.clone() for key, tensor in fills.items()})
    end = time.monotonic() + seconds
    model, owners = session.models[1], outcome.compared.owners
    compared = {event.call.module for event in outcome.compared.events if event.ending and event.difference is not None}
    waiting: dict[str, list[str]] = {}
    for key in values:
        name = owners[key][0]
        while name and name not in compared:
            name = name.rpartition(".")[0]
        if key in outcome.compared.target.first_use and is_countable(key):
            waiting.setdefault(name, []).append(key)
    found, idle, effective = set[str](), set[str](), set[str]()
    is_measuring = False

    def before(given: list[Any]) -> Any:
        def hook(_: nn.Module, arguments: Any, options: Any) -> None:
            if not is_measuring:
                with suppress(Exception):  # some cannot be copied
                    given[:] = [copy.deepcopy((arguments, options))]

        return hook

    def after(keys: Sequence[str], given: list[Any]) -> Any:
        def hook(module: nn.Module, *_: Any) -> None:
            nonlocal is_measuring
            if not is_measuring and given:
                is_measuring = True
                with suppress(Exception):  # some cannot be called again
                    measure(module, keys, given.pop())
                is_measuring = False

        return hook

    def measure(module: nn.Module, keys: Sequence[str], inputs: Any) -> None:
        base = _outputs(module, inputs)

        def shows(key: str, changed: Tensor) -> bool:
            kept = values[key].clone()
            values[key].copy_(changed)
            try:
                return _differ(base, _outputs(module, inputs), outcome.compared.loose_tolerance)
            finally:
                values[key].copy_(kept)

        for key in keys:
            if key in found or time.monotonic() > end:
                continue
            if shows(key, _changed(values[key])):
                found.add(key)
            else:
                spread = torch.linspace(-_LARGE, _LARGE, values[key].numel()).reshape(values[key].shape)
                is_idle = not any(shows(key, large.to(values[key])) for large in (spread, -spread))
                (idle if is_idle else effective).add(key)

    with ExitStack() as hooks:
        for name, keys in waiting.items():
            module, given = model.get_submodule(name), list[Any]()
            hooks.callback(module.register_forward_pre_hook(before(given), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after(keys, given)).remove)
        with suppress(InputError):  # what was called more than once may have changed
            call(model, session.inputs, values)
    return found, idle - found - effective


def _outputs(module: nn.Module, inputs: Any) -> list[Tensor]:
    arguments, options = copy.deepcopy(inputs)
    seed_all(0)
    restart(module)
    return list(flat_tensors(module(*arguments, **options)).values())


def _changed(tensor: Tensor) -> Tensor:
    """Put the values of a tensor in another order, or change them where they are all alike."""
    rolled = tensor.flatten().roll(1).reshape(tensor.shape)
    if not tensor.is_floating_point() or not torch.equal(rolled, tensor):
        return rolled
    return torch.where(tensor == 0, 1, (1 + _CHANGE) * tensor)


def _differ(outputs: Sequence[Tensor], others: Sequence[Tensor], tolerance: float) -> bool:
    """Return True if the first of two modules' outputs differ, of which each is compared by itself."""
    apart = (relative_difference(other, own, own.abs()) for own, other in zip(outputs, others, strict=False))
    return len(outputs) != len(others) or any(one is None or one > tolerance for one in apart)
