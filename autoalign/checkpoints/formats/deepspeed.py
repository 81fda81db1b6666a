"""Folders of DeepSpeed's ZeRO: the weights in float32, cut out of the vectors that each process saved a part of.

This is what ``zero_to_fp32.py``, which DeepSpeed puts beside its checkpoints, does; that runs what is in the pickles.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoalign.checkpoints.formats.torch_pickle import open_pickled
from autoalign.checkpoints.stored import Contents, StoredTensor, Value, as_opened, reading, region_of, tensor_of
from autoalign.errors import CheckpointError, listed

_OPTIMIZER = re.compile(r"(?:\w+_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_BY_GROUP, _BY_PARAMETER = "single_partition_of_fp32_groups", "fp32_flat_groups"  # stages 1 and 2; stage 3

Piece = tuple[Value, int, int]  # of a vector: where it starts, and how long it is


def is_zero(folder: Path) -> bool:
    """Return True for the folder of one step that holds parts of optimizers that ZeRO split."""
    return any(_OPTIMIZER.fullmatch(path.name) for path in folder.iterdir())


def open_zero(folder: Path) -> Contents:
    """Open such a folder; weights are put together when they are asked for.

    Raises:
        CheckpointError: A part is missing or damaged, or the model was split by tensor parallelism, too.
    """
    names = sorted(path.name for path in folder.iterdir())
    optimizers, models = (
        {(int(found[1] or 0), int(found[2])): folder / name for name in names if (found := pattern.fullmatch(name))}
        for pattern in (_OPTIMIZER, _MODEL)
    )
    advice = f"Merge them with DeepSpeed's own: python {folder.parent}/zero_to_fp32.py {folder.parent} merged"
    if any(model for _, model in optimizers) or (0, 0) not in models:
        problem = "also split by tensor parallelism" if (0, 0) in models else "without its files of model states"
        raise CheckpointError(f"{str(folder)!r} is a checkpoint of ZeRO, {problem}. Nothing was read. {advice}")
    absent = [str(rank) for rank in range(len(optimizers)) if (rank, 0) not in optimizers]
    with reading(folder, "a checkpoint of DeepSpeed's ZeRO"):
        states = [_mapping(open_pickled(path, is_part=True).root) for _, path in sorted(models.items())]
        parts = [_mapping(open_pickled(path).root["optimizer_state_dict"]) for _, path in sorted(optimizers.items())]
        counts = parts[0]["partition_count"]
        count = max(counts) if isinstance(counts, list) else counts
        if absent or count != len(parts):
            raise CheckpointError(
                f"{len(parts)} of the {count} parts of the optimizer are in {str(folder)!r}. Nothing was read. "
                "Complete the download, or name the file of the model's states to read that alone."
            )
        weights = _weights(states, parts)
    note = f"Put together in float32 from {len(parts)} parts of DeepSpeed's ZeRO, as its zero_to_fp32.py does."
    opened = [stat for path in (*models.values(), *optimizers.values()) for stat in as_opened(path)]
    return Contents({"module": weights}, notes=(note,), opened=tuple(opened))


def _weights(states: Sequence[Mapping[str, Any]], parts: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """Return the weights in the order of the module."""
    state = states[0]
    given = state["param_shapes"]
    groups = [_mapping(shapes) for shapes in (given if isinstance(given, list) else [given])]
    cut: dict[str, list[Piece]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    if _BY_GROUP in parts[0]:
        for number, group in enumerate(groups):
            vectors = [part[_BY_GROUP][number] for part in parts]
            start = 0
            for key, shape in group.items():
                shapes[key] = tuple(map(int, shape))
                cut[key] = _pieces(vectors, start, prod(shapes[key]))
                start += prod(shapes[key])
    else:
        start = 0
        for key, shape in ((key, shape) for group in groups for key, shape in group.items()):
            shapes[key] = tuple(map(int, shape))
            share = -(-prod(shapes[key]) // len(parts))  # of each process, the last with some padding
            cut[key] = [piece for part in parts for piece in _pieces(part[_BY_PARAMETER], start, share)]
            start += share
    for key, shape in _mapping(state.get("frozen_param_shapes") or {}).items():
        shapes[key] = tuple(map(int, shape))
        whole = [each["frozen_param_fragments"][key] for each in states]
        vectors = [tensor_of(each).reshape(-1) for each in whole]
        cut[key] = [(vector, 0, len(vector)) for vector in (vectors if _BY_PARAMETER in parts[0] else vectors[:1])]
    for key, pieces in cut.items():
        dtypes = {vector.dtype for vector, _, _ in pieces}
        if len(dtypes) > 1 or sum(length for _, _, length in pieces) < prod(shapes[key]):
            raise ValueError(f"the parts of {key} are not those of a tensor of shape {list(shapes[key])}")
    shared = _mapping(state.get("shared_params") or {})
    found: dict[str, object] = {}
    for key, value in _mapping(state["module"]).items():
        name = shared.get(key, key)
        if name in cut:
            dtype = cut[name][0][0].dtype if cut[name] else torch.float32
            found[key] = StoredTensor(shapes[name], dtype, partial(_joined, cut[name], shapes[name], dtype))
        else:  # a buffer, or a frozen weight of stage 1, which DeepSpeed's own conversion loses
            found[key] = value
    lost = [key for key in cut if key not in found]
    if lost:
        raise ValueError(f"the module has no {listed(lost)}")
    return found


def _pieces(vectors: Sequence[Value], start: int, length: int) -> list[Piece]:
    """Cut a part of vectors that follow each other."""
    found, left = [], length
    for vector in vectors:
        if len(vector.shape) != 1:
            raise ValueError("a part of a group is not a vector")
        size = min(vector.shape[0] - start, left)
        if size > 0:
            found.append((vector, start, size))
            left -= size
        start = max(start - vector.shape[0], 0)
    if left:
        raise ValueError(f"its groups have {left} elements fewer than its parameters")
    return found


def _joined(pieces: Sequence[Piece], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    parts = [region_of(vector, ((start, length),)) for vector, start, length in pieces]
    return torch.cat(parts or [torch.empty(0, dtype=dtype)]).narrow(0, 0, prod(shape)).reshape(shape)


def _mapping(value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"a {type(value).__name__} where a mapping is expected")
    return value
