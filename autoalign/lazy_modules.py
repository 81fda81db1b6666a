"""Lazy modules: tensors of a model that have no shape before they are loaded are given those of the checkpoint.

There are no shapes to match by, so a source is found by name alone: under the same key, under a key that differs by the
prefix that the others differ by, or in the module that corresponds to the tensor's own by what else was matched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from autoalign.alignment import Alignment
from autoalign.checkpoint import Checkpoint, of_module
from autoalign.module_state import source_modules, translated
from autoalign.specs import TensorSpec


def shaped(model: nn.Module, lazy: Mapping[str, Tensor], known: Mapping[str, TensorSpec]) -> Checkpoint:
    """Take a model as a checkpoint in which lazy tensors have the shapes of known ones; others are left out."""
    state_dict = {
        key: torch.empty(known[key].shape, dtype=lazy[key].dtype, device="meta") if key in known else value
        for key, value in model.state_dict(keep_vars=True).items()
        if key in known or key not in lazy
    }
    return of_module(model, state_dict)


def named_sources(
    lazy: Mapping[str, Tensor], source: Checkpoint, alignment: Alignment | None = None
) -> dict[str, TensorSpec]:
    """Find the source of each lazy tensor by its name; those without one are left out.

    Args:
        lazy: The tensors without a shape, by key.
        source: The checkpoint.
        alignment: Of the rest of the model, by which modules of other names correspond.
    """
    specs = {spec.key: spec for spec in source.specs}
    used = {key for match in alignment.matches for key in match.sources} if alignment else set()
    free = {key: spec for key, spec in specs.items() if key not in used}
    modules = source_modules(alignment) if alignment else {}
    added, taken = _prefixes(lazy, free)
    found = {}
    for key in lazy:
        names = (translated(key, modules), key, added + key.removeprefix(taken))
        name = next((name for name in names if name in free), None)
        if name is not None:
            found[key] = free.pop(name)
    return found


def _prefixes(keys: Mapping[str, Tensor], others: Mapping[str, TensorSpec]) -> tuple[str, str]:
    """Find what most of these keys lack before others, or have before others: the wrapper of one side."""
    counts: Counter[tuple[str, str]] = Counter()
    for key in keys:
        for other in others:
            if other.endswith(f".{key}"):
                counts[other.removesuffix(key), ""] += 1
            elif key.endswith(f".{other}"):
                counts["", key.removesuffix(other)] += 1
    return counts.most_common(1)[0][0] if counts else ("", "")
