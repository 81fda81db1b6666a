"""Sharded models: their tensors are spread over processes, each of which reads the part that it holds.

The planning and the copies are those of ``torch.distributed.checkpoint``. To it, an alignment is a storage of tensors
with the model's names and shapes; what is asked of that storage is worked out from as little of the checkpoint as the
operations allow (see ``autoalign.regions``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autoalign.adaptations import needs_target
from autoalign.alignment import Alignment, Match
from autoalign.checkpoint import Checkpoint
from autoalign.errors import AlignmentError, CheckpointError, InputError
from autoalign.progress import Step
from autoalign.reading import Findings
from autoalign.regions import Regional, evaluated
from autoalign.stored import Region, narrowed
from autoalign.transaction import is_sharded, local_part, takes_copies


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that hold a model together."""

    group: Any  # a process group of torch; None for the default one

    @property
    def is_first(self) -> bool:
        """Whether this is the one that reports."""
        return int(torch.distributed.get_rank(self.group)) == 0

    def gathered(self, value: object) -> list[Any]:
        """Collect a value of each, on each; all must call this."""
        values: list[Any] = [None] * torch.distributed.get_world_size(self.group)
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, alignment: Alignment | None, error: Exception | None) -> None:
        """Make sure that each has found the same; all must call this.

        Raises:
            AlignmentError: Another one failed, or found something else.
        """
        digest = None
        if alignment is not None:
            found = [(match.target, match.sources, repr(match.operation)) for match in alignment.matches]
            digest = hashlib.sha256(repr(found).encode()).hexdigest()
        outcomes = self.gathered((digest, None if error is None else f"{type(error).__name__}: {error}"))
        if error is not None:  # which is raised by the caller
            return
        failed = [(rank, text) for rank, (_, text) in enumerate(outcomes) if text is not None]
        if failed:
            raise AlignmentError(f"Rank {failed[0][0]} failed, and nothing was loaded on any: {failed[0][1]}")
        different = [rank for rank, (other, _) in enumerate(outcomes) if other != outcomes[0][0]]
        if different:
            raise AlignmentError(
                f"Ranks 0 and {different[0]} aligned the checkpoint in different ways, and nothing was loaded on any. "
                "Make sure that all have the same model, checkpoint and options.",
                alignment,
            )


def ranks_of(model: nn.Module) -> Ranks | None:
    """Tell which processes hold a model together; None for one without sharded tensors."""
    tensors = (*model.parameters(), *model.buffers())
    meshes: list[Any] = [tensor.device_mesh for tensor in tensors if is_sharded(tensor)]  # type: ignore[attr-defined]
    if not meshes:
        return None
    mesh = max(meshes, key=lambda mesh: mesh.size())
    if mesh.size() == torch.distributed.get_world_size():
        return Ranks(None)
    return Ranks(mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group())


def fills_surely(
    model: nn.Module, source: Checkpoint, alignment: Alignment, targets: Mapping[str, Tensor], *, assign: bool
) -> bool:
    """Tell whether this rank's part is filled by reading what is mapped, which once planned cannot fail.

    Else the old values must be kept meanwhile, in case that this or another rank fails.
    """
    keys = [match.target for match in alignment.matches]
    if not takes_copies(model, keys):
        return False
    return assign or (source.is_held and all(local_part(targets[key]).layout == torch.strided for key in keys))


def fill_sharded(
    model: nn.Module,
    source: Checkpoint,
    alignment: Alignment,
    ranks: Ranks,
    findings: Findings,
    step: Step,
    *,
    assign: bool,
) -> None:
    """Load what is matched into a model's sharded tensors; all ranks must call this.

    What can be wrong with a source that is mapped shows while the ranks plan, before any of them changes a value.

    Raises:
        CheckpointError: What was asked of the checkpoint could not be read, on this or another rank.
    """
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    targets = model.state_dict(keep_vars=True)
    filled = {
        match.target: _empty(targets[match.target]) if assign else targets[match.target].detach()
        for match in alignment.matches
    }
    reader = _reader(source, alignment, targets, findings, step)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        state_dict_loader.load(dict(filled), storage_reader=reader, planner=planner, process_group=ranks.group)
    except CheckpointException as error:
        rank, failure = next(iter(error.failures.items()))
        cause = failure[0] if isinstance(failure, tuple) else failure
        if isinstance(cause, KeyboardInterrupt) and rank == torch.distributed.get_rank(ranks.group):
            raise cause from None
        raise CheckpointError(
            f"Rank {rank} could not read its part, and the model was not changed on any: "
            f"{type(cause).__name__}: {cause}"
        ) from cause
    if assign:
        given = {
            key: nn.Parameter(tensor, targets[key].requires_grad) if isinstance(targets[key], nn.Parameter) else tensor
            for key, tensor in filled.items()
        }
        same = {id(targets[key]): tensor for key, tensor in given.items()}
        tied = {key: same[id(target)] for key, target in targets.items() if id(target) in same}
        model.load_state_dict(tied, strict=False, assign=True)
    elif not takes_copies(model, filled.keys()):
        model.load_state_dict(filled, strict=False)


def _empty(target: Tensor) -> Tensor:
    device = target.device
    if target.is_meta:
        sharded: Any = target
        device = torch.device(sharded.device_mesh.device_type if is_sharded(target) else "cpu")
    return torch.empty_like(target, device=device, requires_grad=False)


def _reader(
    source: Checkpoint, alignment: Alignment, targets: Mapping[str, Tensor], findings: Findings, step: Step
) -> Any:
    """Make a storage reader over an alignment."""
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        TensorProperties,
        TensorStorageMetadata,
    )
    from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
    from torch.distributed.checkpoint.storage import StorageReader
    from torch.futures import Future

    specs = {spec.key: spec for spec in alignment.target_specs}
    matches = {match.target: match for match in alignment.matches}
    wholes = {  # what the model keeps of its own; gathered on all ranks, in one order
        key: _whole(targets[key]) for key, match in matches.items() if needs_target(match.operation)
    }

    class Reader(StorageReader):
        def reset(self, checkpoint_id: object = None) -> None:
            pass

        def read_metadata(self, *_: object, **__: object) -> Metadata:
            return Metadata(
                {
                    key: TensorStorageMetadata(
                        TensorProperties(dtype=specs[key].dtype),
                        torch.Size(specs[key].shape),
                        [ChunkStorageMetadata(torch.Size([0] * len(specs[key].shape)), torch.Size(specs[key].shape))],
                    )
                    for key in matches
                }
            )

        def set_up_storage_reader(self, *_: object, **__: object) -> None:
            pass

        def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
            source.require_unchanged()
            for item in plan.items:  # nothing of which is read yet
                match = matches[item.storage_index.fqn]
                result = _evaluated(source, match, wholes, source.region)
                if result.shape != specs[match.target].shape:
                    raise CheckpointError(
                        f"size mismatch for {match.target}: {', '.join(match.sources)} gives {list(result.shape)} "
                        f"where {list(specs[match.target].shape)} was announced."
                    )
                for shape, key in [(source.spec(key).shape, key) for key in match.sources]:
                    if source.is_held and shape:  # an empty region can be had if the tensor can
                        part = source.region(key, tuple((0, 0) for _ in shape))
                        if is_sharded(part):
                            raise InputError(
                                f"{key} of the checkpoint is spread over processes as the model is, and ranks do not "
                                "exchange parts. Give a state dict of whole tensors, or a folder of "
                                "torch.distributed.checkpoint."
                            )
            return plan

        def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
            return plans

        def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
            size = 0
            for done, item in enumerate(plan.items, start=1):
                match = matches[item.storage_index.fqn]
                target = planner.resolve_tensor(item).detach()
                region = tuple(zip(item.storage_offsets, item.lengths, strict=True))
                tensor = _part(source, match, region, wholes, findings, target.dtype)
                if tensor.shape != target.shape:
                    raise CheckpointError(
                        f"size mismatch for {match.target}: {', '.join(match.sources)} gave {list(tensor.shape)} where "
                        f"{list(target.shape)} was announced."
                    )
                target.copy_(tensor)
                planner.commit_tensor(item, target)
                size += target.numel() * target.dtype.itemsize
                step(done, size)
            future: Future[None] = Future()
            future.set_result(None)
            return future

        @classmethod
        def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:  # noqa: ARG003, it is theirs
            return True

    return Reader()


def _whole(tensor: Tensor) -> Tensor:
    part: Any = tensor.detach()
    return part.full_tensor() if is_sharded(part) else part  # type: ignore[no-any-return]


def _part(
    source: Checkpoint,
    match: Match,
    region: Region,
    wholes: Mapping[str, Tensor],
    findings: Findings,
    dtype: torch.dtype,
) -> Tensor:
    """Work out a part of what a match gives."""

    def read(key: str, inner: Region) -> Tensor:
        tensor = source.region(key, inner)
        findings.examine(Match(match.target, (key,)), [tensor], dtype)
        return tensor

    return _evaluated(source, match, wholes, read).read(region)


def _evaluated(
    source: Checkpoint, match: Match, wholes: Mapping[str, Tensor], read: Callable[[str, Region], Tensor]
) -> Regional:
    """Take what a match gives as a tensor of which any region can be had."""
    specs = {key: source.spec(key) for key in match.sources}
    inputs = [Regional(specs[key].shape, specs[key].dtype, partial(read, key)) for key in match.sources]
    own = wholes.get(match.target)
    if own is not None:
        inputs.append(Regional(tuple(own.shape), own.dtype, lambda inner: narrowed(own, inner)))
    (result,) = evaluated(match.operation, inputs)
    return result
