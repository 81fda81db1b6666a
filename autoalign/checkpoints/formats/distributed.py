"""Folders of ``torch.distributed.checkpoint``: a file of metadata, and files with pieces of tensors.

Torch's own reader unpickles the metadata whatever it asks for; here it gets torch's own records, stubs for the rest,
such as the plan that Megatron keeps there. The pieces are read by torch, tensor for tensor, with ``weights_only=True``.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from autoalign.checkpoints.formats.records import finder
from autoalign.checkpoints.formats.torch_pickle import check_zipped
from autoalign.checkpoints.formats.unpickler import unpickle
from autoalign.checkpoints.part import Part
from autoalign.checkpoints.stored import Budget, Contents, StoredTensor, TooCostlyError, as_opened, reading
from autoalign.errors import CheckpointError
from autoalign.plan.regions import Region
from autoalign.plan.specs import TensorSpec

_METADATA = ".metadata"
_KIND = "a folder of torch.distributed.checkpoint"
_MAX_METADATA_BYTES = 2**30
_MAX_EXTRA_BYTES = 2**16  # beside the values of a piece, where torch writes one or two thousand


def is_distributed(folder: Path) -> bool:
    """Return True if a folder holds a checkpoint of ``torch.distributed.checkpoint``."""
    return (folder / _METADATA).is_file()


def open_distributed(folder: Path) -> Contents:
    """Read which tensors a folder holds, nested as they were saved.

    Raises:
        CheckpointError: The metadata is damaged, or names files that are missing or not in the folder.
    """
    with reading(folder, _KIND):
        metadata = _read_metadata(folder / _METADATA)
        sizes = _check_pieces(folder, metadata)
        budget = Budget((folder / _METADATA).stat().st_size + sum(sizes.values()))
        for place in metadata.storage_data.values():  # of which many may be the same part of a file
            budget.charge(max(place.length, 0))
        opened = [stat for name in sizes for stat in as_opened(folder / name)]
        return Contents(_nested(folder, metadata, budget), opened=tuple(opened))


def _read_metadata(file: Path) -> Any:
    size = file.stat().st_size
    if size > _MAX_METADATA_BYTES:
        raise TooCostlyError(f"metadata of {size:,} bytes, of {_MAX_METADATA_BYTES:,} at most")
    metadata = unpickle(file.read_bytes(), size, _finder(), max_operations=size)
    if type(metadata).__name__ != "Metadata":
        raise ValueError(f"there is a {type(metadata).__name__} where metadata should be")
    return metadata


def _finder() -> Callable[[str, str], Any]:
    """Return a function from the names of a module and of something in it to what stands for that."""
    from torch.distributed.checkpoint import filesystem, metadata

    stub = finder()

    def found(module: str, name: str) -> Any:
        if module == metadata.__name__ and name in _RECORDS:
            return getattr(metadata, name)
        if module == filesystem.__name__ and name == "_StorageInfo":
            return filesystem._StorageInfo
        return _ALLOWED.get((module, name)) or stub(module, name)

    return found


_RECORDS = frozenset(
    {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    }
)
_ALLOWED: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib", "WindowsPath"): PureWindowsPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
    ("pathlib._local", "WindowsPath"): PureWindowsPath,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
}


def _check_pieces(folder: Path, metadata: Any) -> dict[str, int]:
    """Make sure that every piece of every tensor is there, with as many bytes as it needs.

    Returns:
        The files of the pieces, with their sizes.
    """
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

    sizes: dict[str, int] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(key, str):
            raise ValueError(f"a tensor called {key!r}")
        if not isinstance(entry, TensorStorageMetadata):
            continue
        dtype = entry.properties.dtype
        if any(size < 0 for size in entry.size) or not isinstance(dtype, torch.dtype):
            raise ValueError(f"{key} has shape {list(entry.size)} and dtype {dtype}")
        if sum(prod(chunk.sizes) for chunk in entry.chunks) != prod(entry.size):
            raise ValueError(f"the pieces of {key} {list(entry.size)} do not make it up")
        for chunk in entry.chunks:
            place = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            name = place.relative_path
            if name not in sizes:
                if not isinstance(name, str) or Path(name).name != name:
                    raise ValueError(f"a piece of {key} is in {name!r}, which is not in the folder")
                if not (folder / name).is_file():
                    raise ValueError(f"a piece of {key} is in {name!r}, which is missing")
                sizes[name] = (folder / name).stat().st_size
            packed = bool(getattr(place, "transform_descriptors", None))  # as compressed pieces are
            needed = 0 if packed else prod(chunk.sizes) * dtype.itemsize
            if not (place.offset >= 0 and needed <= place.length <= sizes[name] - place.offset):
                raise ValueError(f"a piece of {key} has {place.length} bytes at {place.offset} of {name!r}")
    return sizes


def _nested(folder: Path, metadata: Any, budget: Budget) -> dict[str, object]:
    """Nest the tensors as the state dict was that was saved."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    root: dict[str, object] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):  # pickled values, such as a learning rate
            continue
        *path, name = map(str, (metadata.planner_data or {}).get(key, (key,)))
        level = root
        for step in path:
            inner = level.setdefault(step, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{step!r} is a tensor and holds {key!r}")
            level = inner
        if name in level:
            raise ValueError(f"two tensors are called {key!r}")
        level[name] = _stored(folder, metadata, key, entry, budget)
    return root


def _stored(folder: Path, metadata: Any, key: str, entry: Any, budget: Budget) -> StoredTensor:
    shape, dtype = tuple(entry.size), entry.properties.dtype
    checked: set[tuple[str, int]] = set()

    def read_region(region: Region) -> Tensor:
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
        from torch.distributed.checkpoint.planner import LoadPlan
        from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

        class Planner(DefaultLoadPlanner):
            """Fills the one tensor."""

            def lookup_tensor(self, index: object) -> Tensor:  # noqa: ARG002, there is only one
                return tensor

        class Reader(FileSystemReader):
            """Checks a piece before torch loads it."""

            def _slice_file(self, file: Any, place: Any) -> Any:
                piece = Part(file, place.offset, place.length)
                if (place.relative_path, place.offset) not in checked:
                    _check_piece(piece, place, self, prod(shape) * dtype.itemsize, budget)
                    checked.add((place.relative_path, place.offset))
                    piece.seek(0)
                return piece

        starts, sizes = torch.Size([start for start, _ in region]), torch.Size([length for _, length in region])
        with reading(folder, _KIND):
            tensor = torch.empty(sizes, dtype=dtype, device="cpu")
            planner = Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
            planner.set_up_planner({key: tensor}, metadata)
            reader = Reader(folder)
            reader.set_up_storage_reader(metadata, is_coordinator=True)
            items = create_read_items_for_chunk_list(key, entry, [ChunkStorageMetadata(starts, sizes)])
            reader.read_data(LoadPlan(items), planner).wait()
        return tensor

    return StoredTensor(shape, dtype, lambda: read_region(tuple((0, size) for size in shape)), read_region=read_region)


def _check_piece(piece: Any, place: Any, reader: Any, needed: int, budget: Budget) -> None:
    """Refuse a piece that would take more than its size, or than the whole of its tensor if it is compressed.

    Raises:
        TooCostlyError: It would.
        Exception: It is damaged.
    """
    size = place.length
    if transforms := getattr(place, "transform_descriptors", None):
        unpacked = reader.transforms.transform_load_stream(None, transforms, piece)
        content = bytearray()
        while block := unpacked.read(2**20):
            content += block
            if len(content) > needed + _MAX_EXTRA_BYTES:
                raise TooCostlyError(f"a piece of a tensor of {needed:,} bytes is larger when unpacked")
        piece, size = io.BytesIO(content), len(content)
    check_zipped(piece, size, budget)


def write_distributed(
    folder: Path, specs: Sequence[TensorSpec], read: Callable[[str], Tensor], *, threads: int = 1
) -> None:
    """Write tensors to a folder that ``torch.distributed.checkpoint.load`` reads, into sharded models too.

    Each tensor is read when it is written, so that no more than a few are in memory. The metadata is written last: a
    folder without it is not a checkpoint.

    >>> import tempfile
    >>> from autoalign.checkpoints.formats.distributed import open_distributed
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
