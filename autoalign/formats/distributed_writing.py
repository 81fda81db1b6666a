"""Writing folders of ``torch.distributed.checkpoint``, a tensor at a time, through torch's own planner and writer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoalign.errors import CheckpointError
from autoalign.specs import TensorSpec


def write_distributed(
    folder: Path, specs: Sequence[TensorSpec], read: Callable[[str], Tensor], *, threads: int = 1
) -> None:
    """Write tensors to a folder that ``torch.distributed.checkpoint.load`` reads, into sharded models too.

    Each tensor is read when it is written, so that no more than a few are in memory. The metadata is written last: a
    folder without it is no checkpoint.

    >>> import tempfile
    >>> from autoalign.formats.distributed import open_distributed
    >>> folder = Path(tempfile.mkdtemp()) / "step1"
    >>> write_distributed(folder, [TensorSpec("fc.weight", (2,), torch.float32)], lambda key: torch.ones(2))
    >>> open_distributed(folder).root["fc.weight"].read()
    tensor([1., 1.])

    Args:
        folder: Where to write; it must be empty or not there yet.
        specs: Names, shapes and dtypes.
        read: From a name to its tensor, of any device.
        threads: How many files to write at once.

    Raises:
        CheckpointError: The folder holds something, or a tensor is of another shape or dtype than its spec.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{str(folder)!r} is not an empty folder. Nothing was written.")
    known = {spec.key: spec for spec in specs}

    class Planner(DefaultSavePlanner):
        """Plans by tensors without data, and gives those with data when they are written."""

        def resolve_data(self, write_item: Any) -> Tensor:
            spec = known[write_item.index.fqn]
            tensor = read(spec.key).detach()
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                raise CheckpointError(f"{spec} was announced, and {list(tensor.shape)} {tensor.dtype} given.")
            return tensor.contiguous()

    empty = {spec.key: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in specs}
    writer = FileSystemWriter(folder, single_file_per_rank=True, thread_count=threads)
    planner = Planner(flatten_state_dict=False)
    # the steps of torch's `save`, which warns where there is but one process, and hides what `read` raises
    writer.reset()
    planner.set_up_planner(empty, is_coordinator=True)
    writer.set_up_storage_writer(True)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    (plan,) = writer.prepare_global_plan(plans)
    written = writer.write_data(planner.finish_plan(plan), planner).wait()
    writer.finish(metadata, [written])
