"""One gold case: two state dicts on the meta device, and what is right for every target key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from autoalign.plan.dequantise import Dequantise
from autoalign.plan.matches import Candidate, Match
from autoalign.plan.operations import Copy, Operation, Reshape
from benchmarks.cases.gold.expressions import Expression, evaluate, is_layout, operation_of, source_keys

_MOST_ELEMENTS = 2_000_000_000  # of both sides; above it, a match is judged by the source keys that it reads


@dataclass(frozen=True, slots=True)
class GoldCase:
    """A source, a target and their truth. Source tensors get values only where keys do not settle what is right."""

    name: str
    family: str  # of architectures
    group: str  # rename, partial, operations, layout or scale
    source: Mapping[str, Tensor]
    target: Mapping[str, Tensor]
    expressions: Mapping[str, Expression | None]  # of each target key that counts; None: the source has nothing for it
    first_of: Mapping[str, str]  # for a tied source key, the key of the same tensor that comes first
    has_values: bool  # False if it is too large for them
    values: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def libraries(self) -> frozenset[str]:
        """Both libraries, as the name has them."""
        return frozenset(side.split(".")[0] for side in self.name.split("->"))

    @property
    def gold_count(self) -> int:
        """How many target tensors the source has something for."""
        return sum(expression is not None for expression in self.expressions.values())

    def is_right(self, key: str, way: Match | Candidate) -> bool:
        """True if a match of ``align(source, target)``, or one of its alternatives, gives the gold tensor of a key."""
        return self._is_right(key, way.sources, way.operation)

    def is_right_key(self, key: str, source_key: str) -> bool:
        """True if a source tensor, in the shape of the target tensor, is the gold tensor."""
        shape = self.target[key].shape
        if self.source[source_key].numel() != shape.numel():
            return False
        return self._is_right(key, (source_key,), Reshape(tuple(shape)))

    def _is_right(self, key: str, sources: Sequence[str], operation: Operation) -> bool:
        expression = self.expressions[key]
        if expression is None:
            return False
        if isinstance(operation, Dequantise):  # gold names the codes; their companions come along
            sources, operation = sources[:1], Copy()
        if {self._first(source) for source in sources} != {self._first(source) for source in source_keys(expression)}:
            return False
        is_whole = operation_of(expression) in ("copy", "reshape") and not is_layout(expression)
        if not self.has_values or (is_whole and isinstance(operation, Copy | Reshape)):
            return True
        wanted = evaluate(expression, self._value, self.target[key].shape)
        (tensor,) = operation.apply([self._value(source) for source in sources])
        return torch.equal(tensor, wanted)

    def _first(self, key: str) -> str:
        return self.first_of.get(key, key)

    def _value(self, key: str) -> Tensor:
        first = self._first(key)
        if first not in self.values:
            shape = self.source[first].shape
            start = len(self.values) * _MOST_ELEMENTS  # no two elements of a case are equal
            self.values[first] = torch.arange(start, start + shape.numel()).reshape(shape)
        return self.values[first]


def from_data(data: Mapping[str, Any], *, with_sorted_keys: bool = False) -> GoldCase:
    """Make a case of what its file holds, with tied tensors one tensor, as they are in a model.

    Args:
        data: The file's content.
        with_sorted_keys: Whether the source's keys are in alphabetical order, as safetensors files have them.
    """
    entries = sorted(data["source"]) if with_sorted_keys else data["source"]
    source = {key: _on_meta(shape, dtype) for key, shape, dtype in entries}
    target = {key: _on_meta(shape, dtype) for key, shape, dtype, _ in data["target"]}
    first_of: dict[str, str] = {}
    for first, *aliases in data.get("tied_source", []):
        source.update(dict.fromkeys(aliases, source[first]))
        first_of.update(dict.fromkeys(aliases, first))
    expressions: dict[str, Expression | None] = {key: expression for key, _, _, expression in data["target"]}
    filled_by: dict[str, str] = {}
    for key, expression in expressions.items():  # what one tensor fills is one tensor of the model
        if isinstance(expression, str):
            target[key] = target[filled_by.setdefault(expression, key)]
    for key in data.get("dont_care", []):
        expressions.pop(key, None)
    return GoldCase(
        data["name"],
        data["family"],
        group_of(data),
        source,
        target,
        expressions,
        first_of,
        elements(data) <= _MOST_ELEMENTS,
    )


def group_of(data: Mapping[str, Any]) -> str:
    """Return what makes a case hard.

    Returns:
        ``scale`` (large language models), ``layout`` (elements change places in a way that no shape shows),
        ``operations`` (tensors are fused, split, transposed, stacked), ``partial`` (one side lacks what the other has)
        or ``rename`` (names, nesting and order alone).
    """
    expressions: list[Expression] = [expression for *_, expression in data["target"] if expression is not None]
    if data["name"].startswith("scale."):
        return "scale"
    if any(map(is_layout, expressions)):
        return "layout"
    if any(operation_of(expression) not in ("copy", "reshape") for expression in expressions):
        return "operations"
    return "partial" if data["kind"] == "partial" else "rename"


def elements(data: Mapping[str, Any]) -> int:
    """Count the elements of all tensors on both sides."""
    return sum(prod(entry[1]) for side in ("source", "target") for entry in data[side])


def faults(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield what contradicts itself in a file's content: keys that occur twice or are not there, shapes that differ."""
    for side in ("source", "target"):
        counts = Counter(entry[0] for entry in data[side])
        yield from (f"{side} key {key!r} occurs {count} times" for key, count in counts.items() if count > 1)
    case = from_data(data)
    for key, expression in case.expressions.items():
        if expression is not None and (fault := _fault(case, key, expression)):
            yield f"{key!r} {fault}"


def _fault(case: GoldCase, key: str, expression: Expression) -> str:
    wanted = tuple(case.target[key].shape)
    try:
        if absent := [source for source in source_keys(expression) if source not in case.source]:
            return f"is made of {absent[0]!r}, which is not a source key"
        shape = tuple(evaluate(expression, case.source.__getitem__, wanted).shape)
    except (RuntimeError, IndexError, KeyError, ValueError) as error:
        return f"cannot be computed: {error}"
    return "" if shape == wanted else f"has the shape {wanted}, its expression {shape}"


def _on_meta(shape: Sequence[int], dtype: str) -> Tensor:
    return torch.empty(tuple(shape), dtype=getattr(torch, dtype), device="meta")
