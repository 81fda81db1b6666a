"""Folders of ``torch.distributed.checkpoint``: a file of metadata, and files with pieces of tensors.

Torch's own reader unpickles the metadata whatever it asks for, and takes a second to be imported; here an outline of
them is read, without any class. The pieces are read by torch, tensor for tensor, with ``weights_only=True``.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoalign.checkpoints.formats.torch_pickle import check_zipped
from autoalign.checkpoints.formats.unpickler import Made, Pairs, check_cost
from autoalign.checkpoints.part import Part
from autoalign.checkpoints.stored import Budget, Contents, StoredTensor, TooCostlyError, as_opened, reading
from autoalign.errors import CheckpointError
from autoalign.plan.regions import Region
from autoalign.plan.specs import TensorSpec

_METADATA = ".metadata"
_KIND = "a folder of torch.distributed.checkpoint"
_MAX_METADATA_BYTES = 2**30
_MAX_EXTRA_BYTES = 2**16  # beside the values of a piece, where torch writes one or two thousand


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a tensor, and where it is."""

    offsets: tuple[int, ...]  # in the tensor
    sizes: tuple[int, ...]
    file: str
    start: int  # in bytes, as the length
    length: int
    transforms: Sequence[str]  # such as compressions


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor."""

    path: tuple[str | int, ...]  # in the state dict that was saved
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Sequence[_Piece]


def is_distributed(folder: Path) -> bool:
    """Return True if a folder holds a checkpoint of ``torch.distributed.checkpoint``."""
    return (folder / _METADATA).is_file()


def open_distributed(folder: Path) -> Contents:
    """Read which tensors a folder holds, nested as they were saved.

    Raises:
        CheckpointError: The metadata is damaged, or names files that are missing or not in the folder.
    """
    with reading(folder, _KIND):
        entries = _read_metadata(folder / _METADATA)
        sizes = _check_pieces(folder, entries)
        budget = Budget((folder / _METADATA).stat().st_size + sum(sizes.values()))
        for entry in entries.values():  # whose pieces may often be the same part of a file
            budget.charge(sum(piece.length for piece in entry.pieces))
        opened = [stat for name in sizes for stat in as_opened(folder / name)]
        return Contents(_nested(folder, entries, budget), opened=tuple(opened))


def _read_metadata(file: Path) -> dict[str, _Entry]:
    size = file.stat().st_size
    if size > _MAX_METADATA_BYTES:
        raise TooCostlyError(f"metadata of {size:,} bytes, of {_MAX_METADATA_BYTES:,} at most")
    metadata = _fields(check_cost(io.BytesIO(file.read_bytes()), size, max_operations=size), "Metadata")
    places = {}
    for index, place in _pairs(metadata["storage_data"]):
        fields = _fields(index, "MetadataIndex")
        if isinstance(fields["fqn"], str) and "offset" in fields:  # else of what is no tensor
            places[fields["fqn"], _numbers(fields["offset"])] = _fields(place, "_StorageInfo")
    planned, found = metadata.get("planner_data"), {}
    paths = {} if planned is None else dict(_pairs(planned))
    for key, made in _pairs(metadata["state_dict_metadata"]):
        if not isinstance(key, str):
            raise ValueError(f"a tensor called {key!r}")
        if getattr(made, "name", "").endswith(" BytesStorageMetadata"):  # pickled values, such as a learning rate
            continue
        fields, pieces = _fields(made, "TensorStorageMetadata"), []
        for chunk in map(_fields, fields["chunks"]):
            offsets, place = _numbers(chunk["offsets"]), places[key, _numbers(chunk["offsets"])]
            where = place["relative_path"], place["offset"], place["length"]
            transforms = place.get("transform_descriptors") or ()
            pieces.append(_Piece(offsets, _numbers(chunk["sizes"]), *where, transforms))
        path = paths.get(key, (key,))
        if not all(isinstance(step, str | int) for step in path):
            raise ValueError(f"{key} was not saved under names")
        (named, *_) = fields["properties"][-1]  # the first of its attributes
        dtype = vars(torch).get(named.removeprefix("torch "))
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{key} has dtype {named}")
        found[key] = _Entry(path, _numbers(fields["size"]), dtype, pieces)
    return found


# What the outline of a pickle holds


def _pairs(found: Any) -> list[tuple[Any, Any]]:
    if not isinstance(found, Pairs):
        raise ValueError("there is no mapping where one should be")
    return list(zip(found[::2], found[1::2], strict=True))


def _fields(found: Any, name: str = "") -> dict[Any, Any]:
    """Return the attributes of an object of a class."""
    if not isinstance(found, Made) or not found.name.endswith(name):
        raise ValueError(f"there is no {name or 'object'} where one should be")
    return dict(_pairs(found[-1]))


def _numbers(found: Any) -> tuple[int, ...]:
    """Return the numbers of a ``torch.Size``."""
    (numbers,) = found
    if not all(type(number) is int and -(2**63) <= number < 2**63 for number in numbers):
        raise ValueError("a size that is not of numbers")
    return tuple(numbers)


def _check_pieces(folder: Path, entries: Mapping[str, _Entry]) -> dict[str, int]:
    """Make sure that every piece of every tensor is there, with as many bytes as it needs.

    Returns:
        The files of the pieces, with their sizes.
    """
    sizes: dict[str, int] = {}
    for key, entry in entries.items():
        if any(size < 0 for size in entry.shape):
            raise ValueError(f"{key} has shape {list(entry.shape)}")
        if sum(prod(piece.sizes) for piece in entry.pieces) != prod(entry.shape):
            raise ValueError(f"the pieces of {key} {list(entry.shape)} do not make it up")
        for piece in entry.pieces:
            name = piece.file
            if name not in sizes:
                if not isinstance(name, str) or Path(name).name != name:
                    raise ValueError(f"a piece of {key} is in {name!r}, which is not in the folder")
                if not (folder / name).is_file():
                    raise ValueError(f"a piece of {key} is in {name!r}, which is missing")
                sizes[name] = (folder / name).stat().st_size
            needed = 0 if piece.transforms else prod(piece.sizes) * entry.dtype.itemsize
            if not type(piece.start) is type(piece.length) is int:
                raise ValueError(f"a piece of {key} is not at a number")
            if not (piece.start >= 0 and needed <= piece.length <= sizes[name] - piece.start):
                raise ValueError(f"a piece of {key} has {piece.length} bytes at {piece.start} of {name!r}")
    return sizes


def _nested(folder: Path, entries: Mapping[str, _Entry], budget: Budget) -> dict[str, object]:
    """Nest the tensors as the state dict was that was saved."""
    root: dict[str, object] = {}
    for key, entry in entries.items():
        *path, name = map(str, entry.path)
        level = root
        for step in path:
            inner = level.setdefault(step, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{step!r} is a tensor and holds {key!r}")
            level = inner
        if name in level:
            raise ValueError(f"two tensors are called {key!r}")
        level[name] = _stored(folder, key, entry, budget)
    return root


def _stored(folder: Path, key: str, entry: _Entry, budget: Budget) -> StoredTensor:
    shape, dtype = entry.shape, entry.dtype
    checked: set[tuple[str, int]] = set()

    def read_region(region: Region) -> Tensor:
        from torch.distributed.checkpoint import metadata
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
        from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
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

        def chunk(starts: Iterable[int], sizes: Iterable[int]) -> metadata.ChunkStorageMetadata:
            return metadata.ChunkStorageMetadata(torch.Size(starts), torch.Size(sizes))

        with reading(folder, _KIND):
            chunks = [chunk(piece.offsets, piece.sizes) for piece in entry.pieces]
            stored = metadata.TensorStorageMetadata(metadata.TensorProperties(dtype), torch.Size(shape), chunks)
            places: dict[metadata.MetadataIndex, _StorageInfo] = {
                metadata.MetadataIndex(key, piece.offsets): _StorageInfo(
                    piece.file, piece.start, piece.length, piece.transforms or None
                )
                for piece in entry.pieces
            }
            whole = metadata.Metadata({key: stored}, storage_data=places)
            wanted = chunk(*zip(*region, strict=True)) if region else chunk((), ())
            tensor = torch.empty(wanted.sizes, dtype=dtype, device="cpu")
            planner = Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
            planner.set_up_planner({key: tensor}, whole)
            reader = Reader(folder)
            reader.set_up_storage_reader(whole, is_coordinator=True)
            items = create_read_items_for_chunk_list(key, stored, [wanted])
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
