"""Comparing: how far two tensors are apart that should be equal, whatever their layouts, and what outputs belong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod

import torch
from torch import Tensor, nn

from autoalign.matching.candidates import squeeze
from autoalign.matching.names import kind
from autoalign.plan.matches import Match
from autoalign.plan.operations import Copy, Operation, Reshape, Shape
from autoalign.verification.recording import Call

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of outputs


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """Two outputs that belong together."""

    source: str  # the path in what the source model returns; "" where that is a tensor
    target: str
    difference: float


def relative_difference(got: Tensor, want: Tensor) -> float | None:
    """Tell the largest difference of two tensors as a share of the largest value that is wanted.

    Tensors of other shapes with as many elements are compared as sets of values: one may have channels last, or a
    grid flattened. Two that are both not a number, or equally infinite, are equal.

    >>> relative_difference(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0]))
    0.25
    >>> relative_difference(torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(2, 3).T)
    0.0

    Returns:
        The difference; infinite where nothing but zeros was wanted; None where the numbers of elements differ.
    """
    if got.numel() != want.numel() or got.is_meta or want.is_meta:
        return None
    if not got.numel():
        return 0.0
    first, second = _comparable(got).to(want.device), _comparable(want)
    if first.dtype != second.dtype:
        first, second = first.double(), second.double()
    if squeeze(first.shape) != squeeze(second.shape):
        first, second = first.flatten().sort().values, second.flatten().sort().values
    first, second = first.flatten(), second.flatten()
    same = (first == second) | (first.isnan() & second.isnan())
    if bool(same.all()):
        return 0.0
    largest = float((first - second).abs().masked_fill(same, 0).max())
    scale = float(second.abs().masked_fill(~second.isfinite(), 0).max())
    return largest / scale if largest == largest and scale else inf


def _comparable(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_floating_point():
        return tensor if tensor.dtype == torch.float64 else tensor.float()
    return tensor.double()


def tolerance_of(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """Choose a tolerance by the least precise floating point type among outputs."""
    dtypes = {tensor.dtype for tensor in (*tensors.values(), *others.values())}
    return max((TOLERANCES.get(dtype, 0.0) for dtype in dtypes), default=0.0) or TOLERANCES[torch.float32]


def output_differences(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> list[OutputDifference]:
    """Pair the outputs of two models and compare them: by name first, the others in order, where they have one size.

    >>> output_differences({"logits": torch.ones(2)}, {"": torch.ones(2), "1": torch.ones(3)})
    [OutputDifference(source='', target='logits', difference=0.0)]
    """
    pairs = [(name, name) for name in want if name in got and got[name].numel() == want[name].numel()]
    free = [name for name in got if name not in dict(pairs)]
    for name in want:
        if name not in dict(pairs):
            sizes = [other for other in free if got[other].numel() == want[name].numel()]
            alike = [other for other in sizes if squeeze(got[other].shape) == squeeze(want[name].shape)]
            for other in (alike or sizes)[:1]:
                pairs.append((name, other))
                free.remove(other)
    found = [(first, second, relative_difference(got[second], want[first])) for first, second in pairs]
    return [OutputDifference(first, second, apart) for first, second, apart in found if apart is not None]


_LARGEST = 2**26  # elements of a tensor whose rows are followed through an operation


@dataclass(frozen=True, slots=True)
class Pair:
    """A module of the target and the one of the source that does the same."""

    target: str
    source: str
    match: Match  # of the tensor that tells so
    sources: tuple[str, ...]  # the modules that hold its sources
    whole: bool  # whether the tensors are those of one layer, so that outputs are a function of inputs and them
    mixed: tuple[str, ...] = ()  # the target's keys in this module that come from other modules than ``source``

    @property
    def is_mixed(self) -> bool:
        """Whether the tensors of one layer come from several."""
        return self.whole and bool(self.mixed)


def owners(model: nn.Module, keys: Collection[str], called: Collection[str]) -> dict[str, tuple[str, bool]]:
    """Find, for each key, the module that uses it: its own, or the innermost around it that is called.

    Returns:
        The name of the module as ``named_modules`` gives it, and whether the tensor is the module's own.
    """
    first_name: dict[int, str] = {}
    name_of = {name: first_name.setdefault(id(m), name) for name, m in model.named_modules(remove_duplicate=False)}
    found = {}
    for key in keys:
        parts = key.split(".")[:-1]
        depth = len(parts)
        while depth and name_of.get(".".join(parts[:depth])) not in called:
            depth -= 1
        found[key] = name_of.get(".".join(parts[:depth]), ""), depth == len(parts)
    return found


def paired_modules(
    matches: Sequence[Match],
    source_owner: Mapping[str, tuple[str, bool]],
    target_owner: Mapping[str, tuple[str, bool]],
    sizes: Mapping[str, int],
) -> dict[str, Pair]:
    """Pair the modules of the target with those of the source: by most of their tensors, and the largest in doubt."""
    groups: dict[str, list[Match]] = {}
    for match in matches:
        if match.target in target_owner and all(key in source_owner for key in match.sources):
            groups.setdefault(target_owner[match.target][0], []).append(match)
    result = {}
    for module, members in groups.items():
        kinds = [_is_of_layers(match, source_owner, target_owner) for match in members]
        layer = [match for match, is_layers in zip(members, kinds, strict=True) if is_layers]
        chosen = layer or [match for match, is_layers in zip(members, kinds, strict=True) if is_layers is False]
        if not chosen:
            continue
        votes = Counter(owner for match in chosen for owner in {source_owner[key][0] for key in match.sources})
        best = max(
            chosen, key=lambda m: (max(votes[source_owner[key][0]] for key in m.sources), sizes.get(m.target, 0))
        )
        source = max((source_owner[key][0] for key in best.sources), key=lambda owner: votes[owner])
        if not layer and 2 * votes[source] <= len(chosen):
            continue  # parameters that stand alone in different modules are no evidence for any of them
        known = {source_owner[key][0] for key in best.sources}
        mixed = tuple(m.target for m in chosen if not known & {source_owner[key][0] for key in m.sources})
        sources = tuple(source_owner[key][0] for key in best.sources)
        result[module] = Pair(module, source, best, sources, bool(layer), mixed)
    return result


def _is_of_layers(
    match: Match, source_owner: Mapping[str, tuple[str, bool]], target_owner: Mapping[str, tuple[str, bool]]
) -> bool | None:
    """Tell whether a match fills a weight or the like of a layer from such of layers; None where nothing tells.

    False is for a parameter that stands alone and is filled from one such.
    """
    if not target_owner[match.target][1] or not all(source_owner[key][1] for key in match.sources):
        return None
    found = {_is_layers(key) for key in (match.target, *match.sources)}
    return None if len(found) > 1 or (found == {False} and len(match.sources) > 1) else found.pop()


def _is_layers(key: str) -> bool:
    values, rest = kind(key.rpartition(".")[2])
    return values != "other" and not rest


def features(operation: Operation, source: Sequence[Shape], target: Shape, count: int) -> tuple[Tensor, int] | None:
    """Follow the output features of a layer through the operation that made its weight.

    >>> from autoalign.plan.operations import Split
    >>> features(Split(0, 2, 2), [(6, 3)], (2, 3), 2)
    (tensor([2, 3]), 0)

    Args:
        operation: From the weights of the source's layers to that of the target's.
        source: The shapes of the source's weights.
        target: The shape of the target's weight.
        count: The output features of the target's layer.

    Returns:
        For each feature, its place among those of all source layers together; and which dimension of the source's
        weights counts them. None where every feature is its namesake, or nothing can be told.
    """
    if isinstance(operation, Copy | Reshape) or operation.adapts or sum(map(prod, source)) > _LARGEST:
        return None
    offsets = [sum(map(prod, source[:place])) for place in range(len(source))]
    numbered = [torch.arange(1, prod(s) + 1).reshape(s) + start for s, start in zip(source, offsets, strict=True)]
    (elements,) = operation.apply(numbered)
    dims = [dim for dim, size in enumerate(target) if size == count]
    for dim in dims:
        rows = elements.movedim(dim, 0).reshape(count, -1) - 1
        for counted in range(min(map(len, source))):
            found = _followed(rows, source, offsets, counted)
            if found is not None:
                return found, counted
    return None


def _followed(rows: Tensor, source: Sequence[Shape], offsets: Sequence[int], counted: int) -> Tensor | None:
    """Find the one feature of the source that each row consists of; None where a row has several or made-up values."""
    if bool((rows < 0).any()):
        return None
    place, before = torch.full_like(rows, -1), 0
    for shape, start in zip(source, offsets, strict=True):
        inside = (rows >= start) & (rows < start + prod(shape))
        step = prod(shape[counted + 1 :])
        place = torch.where(inside, (rows - start) // step % shape[counted] + before, place)
        before += shape[counted]
    return place[:, 0] if bool((place == place[:, :1]).all()) else None


def feature_rows(call: Call, count: int, last: bool) -> Tensor | None:
    """Lay the first output of a layer out as [features, all else].

    Args:
        call: The call whose output it is.
        count: The number of features.
        last: Whether features are to be looked for in the last dimension first, or in the second.
    """
    if not call.gave:
        return None
    output = call.gave[0]
    dims = [output.dim() - 1, 1] if last else [1, output.dim() - 1]
    for dim in dims:
        if 0 <= dim < output.dim() and output.shape[dim] == count:
            return output.movedim(dim, 0).reshape(count, -1)
    return None
