"""Sharded models: their tensors are spread over processes, each of which reads the part that it holds.

Which parts a rank holds is known to the planner of ``torch.distributed.checkpoint``, to which an alignment is a storage
of tensors with the model's names and shapes. They are computed from as little of the checkpoint as the operations
allow (see ``autoalign.plan.regions``).

Ranks wait for each other through the store of the process group, so that one which gives up leaves no collective call
unanswered, and notice where one loads the model unsharded instead. They agree before anything is changed and once more
when all is filled, so that what fails on one fails on all.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from autoalign.alignment import Alignment
from autoalign.checkpoints.atomic import interrupts_held
from autoalign.checkpoints.checkpoint import Checkpoint
from autoalign.errors import AlignmentError, InputError
from autoalign.loading.fill import Step, is_out_of_memory, require_shape
from autoalign.loading.mapped import MappedFiles
from autoalign.loading.transaction import is_sharded, local_part, supports_plain_copy
from autoalign.loading.values import Findings
from autoalign.plan.adaptations import needs_target
from autoalign.plan.dequantise import is_dequantised
from autoalign.plan.matches import Match
from autoalign.plan.operations import Copy
from autoalign.plan.regions import Region, Regional, evaluated, narrowed

logger = logging.getLogger(__name__)

_ROW_LENGTH = 64  # elements in a row that are compared between ranks
_MAX_ROWS = 2**12  # such rows of all tensors together, with no less than two of each
_MAX_ROWS_OF_TENSOR = 16
_MAX_WHOLE_TENSORS = 16  # compared where each is read as a whole for that
_PIECE_BYTES = 2**12  # in a row of a file that are compared then, at as many places of all files as there are rows

# To wait for a rank that has loaded the model unsharded, from the end of that. It must be waited for, since it may come
# yet, as where it has loaded a second network of this kind; and not for long, since it may never come.
_PATIENCE_SECONDS = 10.0
_MAX_WAIT_SECONDS = 600.0  # for it in all, as long as it loads the model unsharded
_SILENT_SECONDS = 1.0  # before it is logged
_POLL_SECONDS = 0.02

Own = TypeVar("Own")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that hold a model together."""

    group: Any  # a process group of torch; None for the default one

    @property
    def is_first(self) -> bool:
        """True for the one that reports."""
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

        All ranks must call this. Signals such as Ctrl-C take effect while the work is done, if ``stops``. From then on
        they are held back until ``held`` is closed, since a rank that leaves would keep the others waiting. Errors of
        other ranks are an AlignmentError, and so are those of this one for want of memory, or where ``is_changed``, the
        model may be changed then; ``undone`` says what became of it.

        ``work`` returns something for this rank and something that all are to know. If it waits for other ranks, it
        does so first. Returned are the first for this rank, and the second of each rank.
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


def ranks_of(model: nn.Module) -> Ranks | None:
    """Return the processes that hold a model together; None for one without sharded tensors."""
    tensors = (*model.parameters(), *model.buffers())
    meshes: list[Any] = [tensor.device_mesh for tensor in tensors if is_sharded(tensor)]  # type: ignore[attr-defined]
    if not meshes:
        return None
    mesh = max(meshes, key=lambda mesh: mesh.size())
    if mesh.size() == torch.distributed.get_world_size():
        return Ranks(None)
    return Ranks(mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group())


@contextmanager
def announced_unsharded(model: nn.Module) -> Iterator[None]:
    """Let other ranks know that this one loads a model that is not sharded; without effect where there are none."""

    def announce(what: str) -> None:
        if torch.distributed.get_world_size() > 1 and (store := _store()) is not None:
            with suppress(RuntimeError):  # the process that keeps it may have ended
                store.add(f"{_name(model)}/{what}/{torch.distributed.get_rank()}", 1)

    announce("unsharded")
    try:
        yield
    finally:
        announce("finished")


def wait_for_ranks(model: nn.Module, group: Any) -> None:
    """Wait until all ranks of a group are here, or none is missing because it loads the model unsharded.

    A rank that has loaded it unsharded is waited for ten seconds from then on, as is logged. One that is missing for
    another reason is waited for no longer; the group's own calls tell then whether it has ended, or is late.
    """
    distributed: Any = torch.distributed
    store = _store()
    if store is None:
        return
    me, ranks = distributed.get_rank(), distributed.get_process_group_ranks(group or distributed.group.WORLD)
    start = _name(model)
    name = f"{start}/{ranks}"

    def count(what: str, rank: int) -> int:
        return int(store.add(f"{start}/{what}/{rank}", 0))

    def unsharded_of(ranks: Sequence[int]) -> list[int]:
        """List the ranks that have loaded the model unsharded more often than this one."""
        own = count("unsharded", me)
        return [rank for rank in ranks if count("unsharded", rank) > own]

    try:
        number = store.add(f"{name}/here/{me}", 1)
        since = now = time.monotonic()
        until, is_logged = since + _PATIENCE_SECONDS, False
        while missing := [rank for rank in ranks if store.add(f"{name}/here/{rank}", 0) < number]:
            now = time.monotonic()
            if now > until:
                break
            is_loading = any(count("unsharded", rank) > count("finished", rank) for rank in missing)
            if is_loading and now < since + _MAX_WAIT_SECONDS:
                until = now + _PATIENCE_SECONDS
            elif not is_logged and now > since + _SILENT_SECONDS and (found := unsharded_of(missing)):
                is_logged = True
                logger.warning(
                    "Waiting %.0f seconds for rank %d, which has loaded a model of these parameters unsharded.",
                    until - now,
                    found[0],
                )
            time.sleep(_POLL_SECONDS)
        unsharded = unsharded_of(missing)
        # what is decided first holds, since a rank may come now
        decision = store.compare_set(f"{name}/{number}", "", "leave" if unsharded else "load")
    except RuntimeError:  # a store that cannot do this, or whose process has ended
        return
    if bytes(decision) != b"leave":
        return
    problem = f"The other ranks did not wait any longer for rank {me}, which has loaded it unsharded before."
    if unsharded:
        problem = (
            f"Rank {unsharded[0]} has not come to load {type(model).__name__} within {_PATIENCE_SECONDS:.0f} seconds "
            "after it loaded a model of the same parameters that is not sharded."
        )
    raise AlignmentError(f"{problem} Nothing was loaded. Shard the model on all ranks alike.")


def _store() -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()  # None for MPI


def _name(model: nn.Module) -> str:
    names = sorted(name for name, _ in model.named_parameters())
    return f"autoalign/{hashlib.sha256(repr(names).encode()).hexdigest()}"


def digests(source: Checkpoint, alignment: Alignment, files: MappedFiles) -> tuple[str, str]:
    """Summarise what is loaded from where, and a sample of the values there; both are to be the same on all ranks.

    The sample is all of a tensor of up to 1,024 numbers, and of a larger one rows of up to 64 numbers at places spread
    evenly over it: 16 of each, and at least two where there are more than 256 tensors. Where a tensor is read as a
    whole for that, as of an npz file, it is of the 16 smallest tensors, with the sizes of all files and 4 KiB at 4,096
    places spread over their bytes. Checkpoints that differ in nothing but a few rows of a large tensor may pass.
    """
    source.require_unchanged()
    found = [(match.target, match.sources, repr(match.operation)) for match in alignment.matches]
    keys = sorted({key for match in alignment.matches for key in match.sources})
    if not source.is_resident:
        keys = sorted(keys, key=lambda key: source.spec(key).numel)[:_MAX_WHOLE_TENSORS]
    for key in keys:
        shape = source.spec(key).shape
        if source.is_resident and is_sharded(source.region(key, tuple((0, 0) for _ in shape))):
            raise InputError(
                f"{key} of the checkpoint is spread over processes as the model is, and ranks do not exchange parts. "
                "Nothing was loaded. Give a state dict of whole tensors, or a folder of torch.distributed.checkpoint."
            )
    files.find()  # which are mapped now
    sample = hashlib.sha256()
    count = max(2, min(_MAX_ROWS_OF_TENSOR, _MAX_ROWS // max(1, len(keys))))
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
    if prod(shape) <= _MAX_ROWS_OF_TENSOR * _ROW_LENGTH:
        return [tuple((0, length) for length in shape)]
    *outer, last = shape
    length, rows = min(last, _ROW_LENGTH), prod(outer)
    regions: list[Region] = []
    for place in range(count):
        indices = np.unravel_index(place * (rows - 1) // (count - 1), outer)
        row = ((int(index), 1) for index in indices)
        regions.append((*row, (place * (last - length) // (count - 1), length)))
    return list(dict.fromkeys(regions))


def _sample_files(paths: Sequence[Path], update: Callable[[bytes], None]) -> None:
    """Pass on the sizes of files, and bytes at places spread evenly over them; all of what is small."""
    count = max(2, _MAX_ROWS // max(1, len(paths)))
    for path in paths:
        with suppress(OSError), path.open("rb") as stream:  # deleted, but still there for what has it open
            size = os.fstat(stream.fileno()).st_size
            update(f"{path.name} {size}".encode())
            last = max(0, size - _PIECE_BYTES)
            for start in sorted({place * last // (count - 1) for place in range(count)}):
                stream.seek(start)
                update(stream.read(_PIECE_BYTES))


def require_same(found: Sequence[tuple[str, str]], alignment: Alignment) -> None:
    """Raise AlignmentError unless all ranks have the same digests."""
    for place, problem in enumerate(("aligned the checkpoint in different ways", "have checkpoints of other values")):
        different = [rank for rank, digest in enumerate(found) if digest[place] != found[0][place]]
        if different:
            raise AlignmentError(
                f"Ranks 0 and {different[0]} {problem}, and nothing was loaded on any. "
                "Make sure that all have the same model, checkpoint and options.",
                alignment,
            )


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
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        TensorProperties,
        TensorStorageMetadata,
    )

    specs = alignment.targets
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
    """Read this rank's parts into their places."""
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
        tensor = plan.files.read_part(plan.source.region(key, inner))
        findings.examine(replace(match, sources=(key,)), [tensor], dtype)
        return tensor

    result = _evaluated(plan.source, match, plan.wholes, read).read(region)
    if is_dequantised(match.operation):
        list(findings.examined(match, [(region, result)], dtype))
    return result


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
