"""Pairs of state dicts with the same values, one of which is made of the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from autoalign import Alignment, Rules, align
from autoalign.plan.matches import Candidate, Match

Tensors = dict[str, Tensor]


def meta(tensors: Tensors) -> Tensors:
    return {key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()}


def is_equal(loaded: Tensors, wanted: Tensors) -> bool:
    return loaded.keys() == wanted.keys() and all(torch.equal(loaded[key], tensor) for key, tensor in wanted.items())


def aligned_both_ways(first: Tensors, second: Tensors, path: Path) -> list[Alignment]:
    """Align both ways, in either order of keys; all is loaded, restored, and reproduced by what is exported."""
    found = []
    for own, other in ((first, second), (second, first)):
        for source in (own, dict(sorted(own.items()))):
            alignment = align(source, meta(other))
            assert is_equal(alignment.state_dict(), other)
            inverse = alignment.inverse()
            restored = {
                match.target: match.operation.apply([other[key] for key in match.sources]) for match in inverse.matches
            }
            assert is_equal({key: tensor for key, (tensor,) in restored.items()}, own)
            assert is_equal(Rules.from_json(alignment.rules().to_json()).apply(source), other)
            namespace: dict[str, Callable[..., Tensors]] = {}
            exec(alignment.rules().to_python(), namespace)
            assert is_equal(namespace["checkpoint_filter_fn"](dict(source), None), other)
            alignment.save(path)
            assert Alignment.read(path).matches == alignment.matches
            assert str(alignment)
            found.append(alignment)
    return found


def is_named(source: Tensors, target: Tensors) -> bool:
    """True if all that is loaded is right, and the truth of all else is among the proposals."""
    alignment = align(source, meta(target))
    ways: dict[str, list[Match | Candidate]] = {of.target: [of, *of.alternatives] for of in alignment.ambiguous}
    return all(torch.equal(tensor, target[key]) for key, tensor in alignment.state_dict().items()) and all(
        any(
            torch.equal(way.operation.apply([source[key] for key in way.sources])[0], target[name])
            for way in ways[name]
        )
        for name in target.keys() - alignment.state_dict().keys()
    )


def linear(name: str, rows: int, columns: int) -> Tensors:
    return {f"{name}.weight": torch.rand(rows, columns), f"{name}.bias": torch.rand(rows)}
