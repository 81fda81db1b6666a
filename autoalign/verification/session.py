"""Sessions: two models, what the source computed, and calls of the target with other values."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor, nn

from autoalign.alignment import Alignment
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
from autoalign.verification.differences import (
    OutputDifference,
    output_differences,
    relative_difference,
    tolerance_of,
)
from autoalign.verification.run import record, with_sizes

_MIN_LOADED = 0.5  # share of the tensors with values of their own that a loaded target holds
_EXACT = 1e-6  # relative difference of each value of two tensors that count as equal


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

    Args:
        source: The model whose outputs are right.
        target: The other.
        inputs: What each is called with.
        alignment: What is verified.
        tolerance: Of outputs; None for that of their dtypes.
        values: Of the source in place of its own, by key.

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
