"""Sharded models: their tensors are spread over processes, each of which reads the part that it holds.

Which parts a rank holds is known to the planner of ``torch.distributed.checkpoint``, to which an alignment is a storage
of tensors with the model's names and shapes. They are computed from as little of the checkpoint as the operations
allow (see ``autoalign.plan.regions``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autoalign.alignment import Alignment
from autoalign.checkpoints.checkpoint import Checkpoint
from autoalign.loading.fill import require_shape
from autoalign.loading.mapped import MappedFiles
from autoalign.loading.prepare import Step
from autoalign.loading.transaction import is_sharded, local_part, supports_plain_copy
from autoalign.loading.value_checks import Findings
from autoalign.plan.adaptations import needs_target
from autoalign.plan.matches import Match
from autoalign.plan.operations import Copy
from autoalign.plan.regions import Region, Regional, evaluated, narrowed


def needs_no_rollback(
    model: nn.Module, source: Checkpoint, alignment: Alignment, targets: Mapping[str, Tensor], *, assign: bool
) -> bool:
    """Return True if this rank's part is filled by reading what is mapped, which once planned cannot fail.

    Else the old values must be kept meanwhile, in case this or another rank fails.
    """
    keys = [match.target for match in alignment.matches]
    if not supports_plain_copy(model, keys):
        return False
    return assign or (source.is_resident and all(local_part(targets[key]).layout == torch.strided for key in keys))


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """What this rank reads, and where it goes."""

    source: Checkpoint
    files: MappedFiles  # from which to read what is mapped
    filled: Mapping[str, Tensor]  # the model's own tensors or new ones, by the model's keys, without gradient
    parts: tuple[tuple[Match, Region, Tensor], ...]  # of what a match gives, and the memory that this part of it fills
    wholes: Mapping[str, Tensor]  # what operations need of the model's own values, gathered


def plan_of(
    source: Checkpoint, alignment: Alignment, targets: Mapping[str, Tensor], files: MappedFiles, *, assign: bool
) -> ShardPlan:
    """Plan what this rank reads; all ranks must call this, for a tensor may have to be gathered.

    What can be wrong with a source that is mapped shows here: the part that takes the most memory is read for trial.

    Raises:
        CheckpointError: The checkpoint changed, or gives other shapes than announced.
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        TensorProperties,
        TensorStorageMetadata,
    )

    specs = {spec.key: spec for spec in alignment.target_specs}
    matches = {match.target: match for match in alignment.matches}
    wholes = {  # on all ranks in one order
        key: _whole(targets[key]) for key, match in matches.items() if needs_target(match.operation)
    }
    source.require_unchanged()
    for match in alignment.matches:
        result = _evaluated(source, match, wholes, source.region)
        require_shape(match, result.shape, specs[match.target].shape, "")
        for key in match.sources:
            if source.is_resident and source.spec(key).shape:  # an empty region can be had if the tensor can
                source.region(key, tuple((0, 0) for _ in source.spec(key).shape))
    filled = {key: _empty(targets[key]) if assign else targets[key].detach() for key in matches}
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        key: TensorStorageMetadata(
            TensorProperties(dtype=specs[key].dtype),
            torch.Size(specs[key].shape),
            [ChunkStorageMetadata(torch.Size([0] * len(specs[key].shape)), torch.Size(specs[key].shape))],
        )
        for key in matches
    }
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(filled), Metadata(entries))
    items = planner.create_local_plan().items  # of which torch's planner makes no others when it knows all ranks'
    parts = tuple(
        (
            matches[item.storage_index.fqn],
            tuple(zip(item.storage_offsets, item.lengths, strict=True)),
            planner.resolve_tensor(item).detach(),
        )
        for item in items
    )
    plan = ShardPlan(source, files, filled, parts, wholes)
    if source.is_resident and parts:  # else old values are kept, and it may fail later
        files.find()
        _read_largest(plan)
    return plan


def _read_largest(plan: ShardPlan) -> None:
    """Read the part that takes the most memory, so that where there is too little this shows in time."""
    match, region, target = max(plan.parts, key=lambda part: part[2].nbytes)
    _part(plan, match, region, Findings(), target.dtype)


def fill_parts(plan: ShardPlan, findings: Findings, step: Step) -> None:
    """Read this rank's parts into their places.

    Raises:
        CheckpointError: The checkpoint gives other shapes than announced, or changed meanwhile.
    """
    plan.files.find()
    size = 0
    for done, (match, region, target) in enumerate(plan.parts, start=1):
        is_read = False
        if isinstance(match.operation, Copy):
            tensor = plan.source.region(match.sources[0], region)
            is_read = tensor.shape == target.shape and plan.files.read(tensor, target)
            findings.examine(match, [tensor], target.dtype)
        else:
            tensor = _part(plan, match, region, findings, target.dtype)
        require_shape(match, tensor.shape, target.shape, "")
        if not is_read:
            target.copy_(tensor)
        size += target.nbytes
        step(done, size)


def register(model: nn.Module, plan: ShardPlan, targets: Mapping[str, Tensor], *, assign: bool) -> None:
    """Register with the model what was filled, unless that was its own tensors and nothing else is to be called."""
    if assign:
        given = {
            key: nn.Parameter(tensor, targets[key].requires_grad) if isinstance(targets[key], nn.Parameter) else tensor
            for key, tensor in plan.filled.items()
        }
        same = {id(targets[key]): tensor for key, tensor in given.items()}
        tied = {key: same[id(target)] for key, target in targets.items() if id(target) in same}
        model.load_state_dict(tied, strict=False, assign=True)
    elif not supports_plain_copy(model, plan.filled.keys()):
        model.load_state_dict(dict(plan.filled), strict=False)


def _empty(target: Tensor) -> Tensor:
    device = target.device
    if target.is_meta:
        sharded: Any = target
        device = torch.device(sharded.device_mesh.device_type if is_sharded(target) else "cpu")
    return torch.empty_like(target, device=device, requires_grad=False)


def _whole(tensor: Tensor) -> Tensor:
    part: Any = tensor.detach()
    return part.full_tensor() if is_sharded(part) else part  # type: ignore[no-any-return]


def _part(plan: ShardPlan, match: Match, region: Region, findings: Findings, dtype: torch.dtype) -> Tensor:
    """Compute a part of the tensor of a match."""

    def read(key: str, inner: Region) -> Tensor:
        (tensor,) = plan.files.read_together([plan.source.region(key, inner)])
        findings.examine(Match(match.target, (key,)), [tensor], dtype)
        return tensor

    return _evaluated(plan.source, match, plan.wholes, read).read(region)


def _evaluated(
    source: Checkpoint, match: Match, wholes: Mapping[str, Tensor], read: Callable[[str, Region], Tensor]
) -> Regional:
    """Return the tensor of a match as one of which any region can be computed."""
    specs = {key: source.spec(key) for key in match.sources}
    inputs = [Regional(specs[key].shape, specs[key].dtype, partial(read, key)) for key in match.sources]
    own = wholes.get(match.target)
    if own is not None:
        inputs.append(Regional(tuple(own.shape), own.dtype, lambda inner: narrowed(own, inner)))
    (result,) = evaluated(match.operation, inputs)
    return result
