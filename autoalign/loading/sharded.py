"""Sharded models: their tensors are spread over processes, each of which reads the part that it holds.

The ranks agree before anything is changed and once more when all is filled, so that what fails on one fails on all.
Which parts a rank holds is told by the planner of ``torch.distributed.checkpoint``, to which an alignment is a storage
of tensors with the model's names and shapes; they are worked out from as little of the checkpoint as the operations
allow (see ``autoalign.plan.regions``).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from autoalign.alignment import Alignment
from autoalign.checkpoints.atomic import interrupts_held
from autoalign.checkpoints.checkpoint import Checkpoint
from autoalign.errors import AlignmentError, CheckpointError, InputError
from autoalign.loading.fill import MappedFiles, is_out_of_memory
from autoalign.loading.prepare import Step
from autoalign.loading.read import Findings
from autoalign.loading.transaction import is_sharded, local_part, takes_copies
from autoalign.plan.adaptations import needs_target
from autoalign.plan.matches import Match
from autoalign.plan.operations import Copy
from autoalign.plan.regions import Region, Regional, evaluated, narrowed

_RUN = 64  # elements in a row that are compared between ranks
_RUNS = 2**12  # such rows of all tensors together, with no less than two and no more than 16 of each
_FEW = 16  # tensors that are compared where each is read as a whole for that
_MOST_RUNS = 16
_PIECE = 2**12  # bytes of a file in a row that are compared then, at as many places of all files

Own = TypeVar("Own")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that hold a model together."""

    group: Any  # a process group of torch; None for the default one

    @property
    def is_first(self) -> bool:
        """Whether this is the one that reports."""
        return int(torch.distributed.get_rank(self.group)) == 0

    def each(
        self,
        work: Callable[[], tuple[Own, Found]],
        held: ExitStack,
        *,
        undone: str = "nothing was loaded on any",
        is_changed: bool = False,
        stops: bool = True,
    ) -> tuple[Own, list[Found]]:
        """Do something on each rank; if it fails on one, in whatever way, all raise.

        All ranks must call this. Signals such as Ctrl-C take effect while the work is done. From then on they are held
        back, since a rank that leaves would keep the others waiting.

        Args:
            work: What to do. It gives something for this rank and something that all are to know. If it waits for other
                ranks, it does so first.
            held: Holds signals back until it is closed.
            undone: What is said of the model if it fails.
            is_changed: Whether the model may be changed then, as the rank itself is to say too.
            stops: Whether signals take effect meanwhile, or stay held back.

        Returns:
            What it gave for this rank, and what it gave on each for all to know.

        Raises:
            AlignmentError: It failed on another rank, or there is no connection to one; or it failed here, for want of
                memory or when the model may be changed.
            BaseException: It failed here in another way.
        """
        own: Any = None
        found: Any = None
        failure: BaseException | None = None
        try:
            if stops:
                held.close()
            own, found = work()
        except BaseException as error:  # the others must know of an interrupt too
            failure = error
        if stops:
            held.enter_context(interrupts_held())
        outcomes: list[Any] = [None] * torch.distributed.get_world_size(self.group)
        mine = None if failure is None else f"{type(failure).__name__}: {failure}", found
        lost: RuntimeError | None = None
        try:
            torch.distributed.all_gather_object(outcomes, mine, group=self.group)
        except RuntimeError as error:
            lost = error
        if failure is not None:
            if isinstance(failure, Exception) and (is_changed or is_out_of_memory(failure)):
                rank = torch.distributed.get_rank(self.group)
                raise AlignmentError(f"Rank {rank} (this one) failed, and {undone}: {mine[0]}") from failure
            raise failure
        if lost is not None:
            raise AlignmentError(
                f"The ranks lost each other, and {undone}: {str(lost).splitlines()[0]}. Make sure that none has ended, "
                "and that all load into the model and have sharded it alike."
            ) from lost
        failed = [(rank, text) for rank, (text, _) in enumerate(outcomes) if text is not None]
        if failed:
            raise AlignmentError(f"Rank {failed[0][0]} failed, and {undone}: {failed[0][1]}")
        return own, [found for _, found in outcomes]


def digests(source: Checkpoint, alignment: Alignment, files: MappedFiles) -> tuple[str, str]:
    """Summarise what is loaded from where, and a sample of the values there; both are to be the same on all ranks.

    The sample is all of a tensor of up to 1,024 numbers, and of a larger one rows of up to 64 numbers at places spread
    evenly over it: 16 of each, and at least two where there are more than 256 tensors. Where a tensor is read as a
    whole for that, as of an npz file, it is of the 16 smallest tensors, with the sizes of all files and 4 KiB at 4,096
    places spread over their bytes. Checkpoints that differ in nothing but a few rows of a large tensor may pass.

    Args:
        source: The checkpoint.
        alignment: What is loaded from where.
        files: From which to read what is mapped.

    Raises:
        CheckpointError: The checkpoint changed since it was opened, or while it was read.
        InputError: Tensors of the checkpoint are spread over processes themselves.
    """
    source.require_unchanged()
    found = [(match.target, match.sources, repr(match.operation)) for match in alignment.matches]
    keys = sorted({key for match in alignment.matches for key in match.sources})
    if not source.is_resident:
        keys = sorted(keys, key=lambda key: source.spec(key).numel)[:_FEW]
    for key in keys:
        shape = source.spec(key).shape
        if source.is_resident and is_sharded(source.region(key, tuple((0, 0) for _ in shape))):
            raise InputError(
                f"{key} of the checkpoint is spread over processes as the model is, and ranks do not exchange parts. "
                "Nothing was loaded. Give a state dict of whole tensors, or a folder of torch.distributed.checkpoint."
            )
    files.find()  # which are mapped now
    sample = hashlib.sha256()
    count = max(2, min(_MOST_RUNS, _RUNS // max(1, len(keys))))
    for key in keys:
        shape = source.spec(key).shape
        regions = _spread(shape, count) if source.is_resident else [tuple((0, length) for length in shape)]
        sample.update(key.encode())
        for part in files.read_together([source.region(key, region) for region in regions]):
            if part.layout == torch.strided and not part.is_meta and not part.is_quantized:
                flat = part.detach().cpu().resolve_conj().resolve_neg().reshape(-1)
                sample.update(flat.contiguous().view(torch.uint8).numpy().tobytes())
    if not source.is_resident:
        _sample_files([path for path, _ in source.opened], sample.update)
    source.require_unchanged()
    return hashlib.sha256(repr(found).encode()).hexdigest(), sample.hexdigest()


def _spread(shape: Sequence[int], count: int) -> list[Region]:
    """Choose parts of a tensor that lie spread evenly over it: all of a small one.

    >>> _spread((2, 3), 5)
    [((0, 2), (0, 3))]
    >>> _spread((3, 1000), 2)
    [((0, 1), (0, 64)), ((2, 1), (936, 64))]
    """
    if prod(shape) <= _MOST_RUNS * _RUN:
        return [tuple((0, length) for length in shape)]
    *outer, last = shape
    length, rows = min(last, _RUN), prod(outer)
    regions = []
    for place in range(count):
        row, region = place * (rows - 1) // (count - 1), [(place * (last - length) // (count - 1), length)]
        for size in reversed(outer):
            row, index = divmod(row, size)
            region.insert(0, (index, 1))
        regions.append(tuple(region))
    return list(dict.fromkeys(regions))


def _sample_files(paths: Sequence[Path], update: Callable[[bytes], None]) -> None:
    """Take the sizes of files, and bytes at places spread evenly over them; all of what is small."""
    count = max(2, _RUNS // max(1, len(paths)))
    for path in paths:
        with suppress(OSError), path.open("rb") as stream:  # deleted, but still there for what has it open
            size = os.fstat(stream.fileno()).st_size
            update(f"{path.name} {size}".encode())
            last = max(0, size - _PIECE)
            for start in sorted({place * last // (count - 1) for place in range(count)}):
                stream.seek(start)
                update(stream.read(_PIECE))


def require_same(found: Sequence[tuple[str, str]], alignment: Alignment) -> None:
    """Make sure that all ranks have the same digests.

    Raises:
        AlignmentError: One has others.
    """
    for place, problem in enumerate(("aligned the checkpoint in different ways", "have checkpoints of other values")):
        different = [rank for rank, digest in enumerate(found) if digest[place] != found[0][place]]
        if different:
            raise AlignmentError(
                f"Ranks 0 and {different[0]} {problem}, and nothing was loaded on any. "
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
    return assign or (source.is_resident and all(local_part(targets[key]).layout == torch.strided for key in keys))


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """What this rank reads, and where it goes."""

    filled: Mapping[str, Tensor]  # the model's own tensors or new ones, by the model's keys, without gradient
    parts: tuple[tuple[Match, Region, Tensor], ...]  # of what a match gives, and the memory that this part of it fills
    wholes: Mapping[str, Tensor]  # what operations need of the model's own values, gathered


def plan_of(
    source: Checkpoint, alignment: Alignment, targets: Mapping[str, Tensor], files: MappedFiles, *, assign: bool
) -> ShardPlan:
    """Decide what this rank reads; all ranks must call this, for a tensor may have to be gathered.

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
        if result.shape != specs[match.target].shape:
            raise CheckpointError(
                f"size mismatch for {match.target}: {', '.join(match.sources)} gives {list(result.shape)} "
                f"where {list(specs[match.target].shape)} was announced."
            )
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
    plan = ShardPlan(filled, parts, wholes)
    if source.is_resident and parts:  # else old values are kept, and it may fail later
        files.find()
        _read_for_trial(source, plan, files)
    return plan


def _read_for_trial(source: Checkpoint, plan: ShardPlan, files: MappedFiles) -> None:
    """Read the part that takes the most memory, so that where there is too little this shows in time."""
    match, region, target = max(plan.parts, key=lambda part: part[2].nbytes)
    _part(source, match, region, plan.wholes, Findings(), target.dtype, files)


def fill_parts(source: Checkpoint, plan: ShardPlan, findings: Findings, step: Step, files: MappedFiles) -> None:
    """Read this rank's parts into their places.

    Raises:
        CheckpointError: The checkpoint gives other shapes than announced, or changed meanwhile.
    """
    files.find()
    size = 0
    for done, (match, region, target) in enumerate(plan.parts, start=1):
        is_read = False
        if isinstance(match.operation, Copy):
            tensor = source.region(match.sources[0], region)
            is_read = tensor.shape == target.shape and files.read(tensor, target)
            findings.examine(match, [tensor], target.dtype)
        else:
            tensor = _part(source, match, region, plan.wholes, findings, target.dtype, files)
        if tensor.shape != target.shape:
            raise CheckpointError(
                f"size mismatch for {match.target}: {', '.join(match.sources)} gave {list(tensor.shape)} where "
                f"{list(target.shape)} was announced."
            )
        if not is_read:
            target.copy_(tensor)
        size += target.nbytes
        step(done, size)


def register(model: nn.Module, plan: ShardPlan, targets: Mapping[str, Tensor], *, assign: bool) -> None:
    """Give the model what was filled, where that takes more than to have filled its own tensors."""
    if assign:
        given = {
            key: nn.Parameter(tensor, targets[key].requires_grad) if isinstance(targets[key], nn.Parameter) else tensor
            for key, tensor in plan.filled.items()
        }
        same = {id(targets[key]): tensor for key, tensor in given.items()}
        tied = {key: same[id(target)] for key, target in targets.items() if id(target) in same}
        model.load_state_dict(tied, strict=False, assign=True)
    elif not takes_copies(model, plan.filled.keys()):
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


def _part(
    source: Checkpoint,
    match: Match,
    region: Region,
    wholes: Mapping[str, Tensor],
    findings: Findings,
    dtype: torch.dtype,
    files: MappedFiles,
) -> Tensor:
    """Work out a part of what a match gives."""

    def read(key: str, inner: Region) -> Tensor:
        (tensor,) = files.read_together([source.region(key, inner)])
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
