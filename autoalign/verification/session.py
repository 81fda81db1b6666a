"""Sessions: two models, what the source computed, and calls of the target with other values.

Equal outputs prove nothing where the signal of a network fades or saturates on its way, where tensors are equal to each
other (gains of one, biases of zero), or branches scaled to nothing, as with initial values. None of that is so on fresh
values: the output of each layer has about the variance of its input, as in Mishkin and Matas, "All you need is a good
init", ICLR 2016, and no two tensors are alike. Coverage is measured by changing one tensor after another.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from autoalign.alignment import Alignment
from autoalign.errors import InputError
from autoalign.matching.names import kind
from autoalign.plan.matches import Match
from autoalign.verification.compare import (
    Compared,
    Finding,
    compare,
    features_last,
    first_finding,
    module_tolerance,
    owners,
    paired_modules,
)
from autoalign.verification.differences import OutputDifference, output_differences, relative_difference, tolerance_of
from autoalign.verification.run import call, flat_tensors, record, restart, seed_all, with_sizes

_MIN_LOADED = 0.5  # share of the tensors with values of their own that a loaded target holds
_EXACT = 1e-6  # relative difference of each value of two tensors that count as equal
_SEED = 20_161  # of fresh values
_SPREAD = 0.2  # of gains around one and of biases around zero
_TABLE_SPREAD = 0.5  # of what is added to signals, such as position tables and class tokens
_KEPT_DEVIATIONS = (0.5, 2.0)  # of a layer's output, which are not corrected
_CHANGE = 0.5  # of values that are all alike, as a share of them
_LARGE = 8.0  # what values are changed to, so as to see whether a tensor has any effect


@dataclass(frozen=True, slots=True)
class Outcome:
    """One call of the target."""

    differences: tuple[OutputDifference, ...]
    largest: float
    equal: bool  # outputs and all that was compared on the way
    finding: Finding | None
    position: float  # how far both agree; inf where all is equal
    tolerance: float  # of outputs
    compared: Compared


class Session:
    """Two models, a call of the source, and calls of the target with values that the alignment gives.

    The outputs of the source, on its own values or on others, are right up to a tolerance, by default that of dtypes.

    Attributes:
        matches: What the alignment fills the target with, by key.
        proposed: What it proposes beyond that.
        known: Both.
        own: The target's parameters and buffers.
    """

    def __init__(
        self,
        source: nn.Module,
        target: nn.Module,
        inputs: tuple[object, object],
        alignment: Alignment,
        tolerance: float | None,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.models = (source, target)
        self.inputs, self.wanted_tolerance = inputs[1], tolerance
        self.take(alignment)
        self.shapes = {spec.key: spec.shape for spec in alignment.source_specs}
        self.target_shapes = {spec.key: spec.shape for spec in alignment.target_specs}
        self.sizes = {spec.key: spec.numel for spec in alignment.target_specs}
        self.keep = [{key.rpartition(".")[0] for key in shapes} for shapes in (self.shapes, self.target_shapes)]
        names = [dict(model.named_modules(remove_duplicate=False)) for model in self.models]
        for keep, modules in zip(self.keep, names, strict=True):  # of a module with several names, the first is used
            shared = {id(modules[name]) for name in keep if name in modules}
            keep |= {name for name, module in modules.items() if id(module) in shared}
        used = {**tensors_of(source), **(values or {})}
        self.values = {k: t for k, t in source.state_dict(keep_vars=True).items() if isinstance(t, Tensor)} | used
        self.source = with_sizes(record(source, inputs[0], self.keep[0], values), source, inputs[0], used)
        self.last = {
            f"{side}:{name}"
            for side, model in zip(("source", "target"), self.models, strict=True)
            for name in features_last(model)
        }
        called = {call.module for call in self.source.calls}
        self.source_owner = owners(source, self.shapes, called)
        self.own = tensors_of(target)

    def take(self, alignment: Alignment) -> None:
        """Go on with another alignment of the two models."""
        self.alignment = alignment
        self.matches = {match.target: match for match in alignment.matches}
        self.proposed = {match.target: match for match in alignment.ambiguous}
        self.known = {**self.proposed, **self.matches}

    def compared_values(self) -> tuple[dict[str, str], bool]:
        """Find the target's keys that hold other values than the alignment gives, and what they hold, in words.

        Returns:
            These, and whether the target holds most of the alignment's values, and so was loaded.
        """
        tensors = {key: self.value(match) for key, match in self.matches.items() if key in self.own}
        agreeing = {key for key, tensor in tensors.items() if _agree(self.own[key].detach(), tensor)}
        sizes = {self.own[key].numel() for key in tensors.keys() - agreeing} - {1}
        prints: dict[tuple[int, float], list[str]] = {}  # of the tensors that one which disagrees may be
        for key, tensor in tensors.items():
            if tensor.numel() in sizes:
                prints.setdefault(_fingerprint(tensor), []).append(key)
        wrong: dict[str, str] = {}
        counted = loaded = 0
        for key, tensor in tensors.items():
            own, others = self.own[key].detach(), []
            if key not in agreeing:
                others = prints.get(_fingerprint(own), []) if own.numel() in sizes else []
                wrong[key] = self._describe(key, own, tensor, [k for k in others if torch.equal(tensors[k], own)])
            # a constant may be what it was initialised with
            if isinstance(self.own[key], nn.Parameter) and own.numel() > 1 and (tensor != tensor.flatten()[0]).any():
                counted += 1
                loaded += key in agreeing or bool(others)
        return wrong, loaded >= _MIN_LOADED * counted

    def _describe(self, key: str, own: Tensor, tensor: Tensor, like: Sequence[str]) -> str:
        sources = " + ".join(self.matches[key].sources)
        if own.dim() == 2 and own.shape[0] == own.shape[1] and torch.equal(own.T, tensor):
            return f"holds {sources} transposed"
        if like:
            return f"holds what {like[0]} should: {' + '.join(self.matches[like[0]].sources)}, not {sources}"
        apart = relative_difference(own, tensor)
        return f"differs from what {sources} gives" + ("" if apart is None else f" by {apart:.1e}")

    def value(self, match: Match) -> Tensor:
        """Compute the tensor of a match, as a load would give it to the target."""
        own = self.own[match.target]
        tensor = self.alignment.tensor(match, [self.values[key].detach() for key in match.sources])
        return tensor.detach().to(device=own.device, dtype=own.dtype)

    def fills(self, matches: Iterable[Match]) -> dict[str, Tensor]:
        """Compute the tensors of several matches, by the target's keys."""
        return {match.target: self.value(match) for match in matches if match.target in self.own}

    def call(self, matches: Mapping[str, Match], values: Mapping[str, Tensor], wrong: Collection[str] = ()) -> Outcome:
        """Call the target and compare.

        Args:
            matches: Those by which modules are paired, by target key.
            values: Tensors to use in place of the target's own, by key.
            wrong: Target keys whose modules are not excused.
        """
        target = record(self.models[1], self.inputs, self.keep[1], self.tied(values) or None)
        target_owner = owners(self.models[1], self.target_shapes, {call.module for call in target.calls})
        tolerance = self.wanted_tolerance or tolerance_of(self.source.outputs, target.outputs)
        finer = module_tolerance(tolerance, (self.source, target))
        compared = compare(
            Compared(
                self.source,
                target,
                paired_modules(list(matches.values()), self.source_owner, target_owner, self.sizes),
                target_owner,
                self.shapes,
                self.target_shapes,
                self.last,
                finer,
                max(tolerance, finer),
            )
        )
        differences = output_differences(target.outputs, self.source.outputs, self.source.sizes)
        largest = max((item.difference for item in differences), default=inf)
        guilty = {target_owner[key][0] for key in wrong if key in target_owner}
        outputs_equal = largest <= tolerance  # although values on the way may differ: a signal may fade
        judged = replace(compared, tolerance=compared.loose_tolerance) if outputs_equal else compared
        finding = first_finding(judged, guilty)
        equal = outputs_equal and finding is None
        position: float = inf if equal else finding.position if finding is not None else 2**31
        return Outcome(tuple(differences), largest, equal, finding, position, tolerance, compared)

    def tied(self, fills: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return one tensor for tied parameters, and parameters in the places of parameters."""
        first: dict[int, Tensor] = {}
        for key, tensor in fills.items():
            if id(self.own[key]) not in first:
                is_parameter = isinstance(self.own[key], nn.Parameter)
                first[id(self.own[key])] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        return {key: first[id(self.own[key])] for key in fills}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model by all of their names."""
    found: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    return found | dict(model.named_parameters(remove_duplicate=False))


def _agree(own: Tensor, tensor: Tensor) -> bool:
    """Return True if each value is the other's but for rounding."""
    if torch.equal(own, tensor) or not own.is_floating_point():
        return torch.equal(own, tensor)
    return torch.allclose(own, tensor, rtol=_EXACT, atol=0, equal_nan=True)


def _fingerprint(tensor: Tensor) -> tuple[int, float]:
    """Return what all tensors of the same values in any order have in common."""
    return tensor.numel(), float(f"{float(tensor.detach().double().abs().sum()):.9e}")


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
    """Find the target's keys of which a change would have been noticed in a call on ``fills`` that had an outcome.

    The target is called again with the same values, within ``preserved``. Each module whose output was compared is
    called on the inputs that it gets there with one tensor after another changed; tensors of a module whose output was
    not are tried with the innermost around it, up to the network itself. What is left after some seconds counts as not
    noticed.

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
