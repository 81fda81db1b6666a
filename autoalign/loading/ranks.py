"""Ranks: the processes that hold a sharded model together, and how they agree on what is loaded.

They wait for each other through the store of the process group, so that one which gives up leaves no collective call
unanswered, and notice where one loads the model unsharded instead. They agree before anything is changed and once more
when all is filled, so that what fails on one fails on all.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from autoalign.alignment import Alignment
from autoalign.checkpoints.atomic import interrupts_held
from autoalign.checkpoints.checkpoint import Checkpoint
from autoalign.errors import AlignmentError, InputError
from autoalign.loading.fill import is_out_of_memory
from autoalign.loading.mapped import MappedFiles
from autoalign.loading.transaction import is_sharded
from autoalign.plan.regions import Region

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
        they are held back until ``held`` is closed, since a rank that leaves would keep the others waiting.

        Args:
            work: Returns something for this rank and something that all are to know. If it waits for other ranks, it
                does so first.
            held: Holds signals back.
            undone: What an error says of the model.
            is_changed: Whether the model may be changed then, so that an error of this rank says so too.
            stops: Whether signals take effect meanwhile.

        Returns:
            The first for this rank, and the second of each rank.

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
    _announce(model, "unsharded")
    try:
        yield
    finally:
        _announce(model, "finished")


def _announce(model: nn.Module, what: str) -> None:
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    if distributed.get_world_size() > 1 and (store := _store()) is not None:
        with suppress(RuntimeError):  # the process that keeps it may have ended
            store.add(f"{_name(model)}/{what}/{distributed.get_rank()}", 1)


def wait_for_ranks(model: nn.Module, group: Any) -> None:
    """Wait until all ranks of a group are here, or none is missing because it loads the model unsharded.

    A rank that has loaded it unsharded is waited for ten seconds from then on, as is logged. One that is missing for
    another reason is waited for no longer; the group's own calls tell then whether it has ended, or is late.

    Raises:
        AlignmentError: One of them loads the model unsharded.
    """
    distributed: Any = torch.distributed
    store = _store()
    if store is None:
        return
    me, ranks = distributed.get_rank(), distributed.get_process_group_ranks(group or distributed.group.WORLD)
    name = f"{_name(model)}/{ranks}"
    try:
        number = store.add(f"{name}/here/{me}", 1)
        since = now = time.monotonic()
        until, is_logged = since + _PATIENCE_SECONDS, False
        while missing := [rank for rank in ranks if store.add(f"{name}/here/{rank}", 0) < number]:
            now = time.monotonic()
            if now > until:
                break
            if _are_loading(store, model, missing) and now < since + _MAX_WAIT_SECONDS:
                until = now + _PATIENCE_SECONDS
            elif not is_logged and now > since + _SILENT_SECONDS and (found := _unsharded(store, model, me, missing)):
                is_logged = True
                logger.warning(
                    "Waiting %.0f seconds for rank %d, which has loaded a model of these parameters unsharded.",
                    until - now,
                    found[0],
                )
            time.sleep(_POLL_SECONDS)
        unsharded = _unsharded(store, model, me, missing)
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


def _unsharded(store: Any, model: nn.Module, me: int, missing: Sequence[int]) -> list[int]:
    """List the missing ranks that have loaded the model unsharded more often than this one."""
    counts = {rank: store.add(f"{_name(model)}/unsharded/{rank}", 0) for rank in (me, *missing)}
    return [rank for rank in missing if counts[rank] > counts[me]]


def _are_loading(store: Any, model: nn.Module, ranks: Sequence[int]) -> bool:
    """Return True if one of the ranks loads the model unsharded at this moment."""
    counts = ([store.add(f"{_name(model)}/{what}/{rank}", 0) for what in ("unsharded", "finished")] for rank in ranks)
    return any(begun > finished for begun, finished in counts)


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

    Raises:
        CheckpointError: The checkpoint changed since it was opened, or while it was read.
        InputError: Tensors of the checkpoint are spread over processes themselves.
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
    regions = []
    for place in range(count):
        row, region = place * (rows - 1) // (count - 1), [(place * (last - length) // (count - 1), length)]
        for size in reversed(outer):
            row, index = divmod(row, size)
            region.insert(0, (index, 1))
        regions.append(tuple(region))
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
