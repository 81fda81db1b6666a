"""Zip and tar archives with checkpoints in them, such as those of Stable-Baselines3 and NeMo.

What may be a checkpoint is copied to a temporary folder, which is removed when nothing refers to its contents any more.
An archive is a mapping of its files, each without its suffix, so that one of them is chosen as any state dict is.
"""

from __future__ import annotations

import shutil
import tarfile
import tempfile
import weakref
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO

from autoalign.checkpoints.config import folder_config
from autoalign.checkpoints.containers import TRAINING_WORDS, name_words
from autoalign.checkpoints.stored import MAX_MEMBERS, Contents, TooCostlyError, reading
from autoalign.errors import CheckpointError, listed

_SUFFIXES = frozenset({".bin", ".ckpt", ".distcp", ".gguf", ".h5", ".msgpack", ".npz", ".pt", ".pth", ".safetensors"})
_ARCHIVES = frozenset({".keras", ".nemo", ".tar", ".tgz", ".zip"})
_BESIDE = frozenset({".metadata", "config.json", "latest", "params.json"})  # what readers of checkpoints look at
_MAX_RATIO = 16  # of what is unpacked to the archive
_FREE_BYTES = 2**26  # that may be unpacked from any


def is_archive(head: bytes) -> bool:
    """Return True if a file that begins with ``head`` is a tar archive, maybe packed by gzip."""
    return head.startswith(b"\x1f\x8b\x08") or head[257:262] == b"ustar"


class _Copied(OrderedDict[str, object]):
    """What was read of files in a temporary folder, which is removed when nothing refers to this any more."""

    inner: object = None  # another, which an archive in this one was copied to

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="autoalign-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


def open_copy(stream: IO[bytes], open_member: Callable[[Path], Contents]) -> Contents:
    """Open a temporary copy of what a stream holds from its place on; ``open_member`` opens files."""
    root = _Copied()
    with (root.folder / "stream").open("wb") as target:
        shutil.copyfileobj(stream, target)
    contents = open_member(root.folder / "stream")
    root.update(contents.root)
    vars(root).update(getattr(contents.root, "__dict__", {}))  # torch's `_metadata`
    return replace(contents, root=root)


def open_archive(
    file: Path, open_member: Callable[[Path], Contents], open_parted: Callable[[Path], Contents | None]
) -> Contents:
    """Open the checkpoints in an archive.

    Args:
        file: The archive.
        open_member: What opens each of them.
        open_parted: What opens a folder whose files are one checkpoint, as shards are; None for another folder.

    Raises:
        CheckpointError: It is damaged, holds no checkpoint, or one that cannot be read.
    """
    root = _Copied()
    names: list[str] = []
    copies: list[Path] = []
    inner: list[Path] = []  # archives
    with reading(file, "an archive"):
        for name, stream in _files(file):
            names.append(name)
            path = PurePosixPath(name.lstrip("/"))
            is_model = path.suffix in _SUFFIXES
            is_beside = path.name in _BESIDE or path.name.endswith(".index.json")
            if ".." in path.parts or not (is_model or is_beside or path.suffix in _ARCHIVES):
                continue
            copy = root.folder / path
            copy.parent.mkdir(parents=True, exist_ok=True)
            with copy.open("xb") as target:  # since what is mapped must not be written to again
                shutil.copyfileobj(stream, target)
            copies += [copy] if is_model else []
            inner += [copy] if path.suffix in _ARCHIVES else []
        folders = sorted({above for copy in copies for above in copy.relative_to(root.folder).parents})
        for folder in folders:
            if (contents := open_parted(root.folder / folder)) is not None:
                root.update(contents.root)
                return replace(contents, root=root, opened=())
        notes: list[str] = []
        for copy in copies:
            if name_words(copy.name) & TRAINING_WORDS:
                continue
            contents = open_member(copy)
            root[copy.stem if copy.stem not in root else str(copy.relative_to(root.folder))] = contents.root
            notes += contents.notes
    if not root and len(inner) == 1:
        contents = open_member(inner[0])
        root.update(contents.root)
        root.inner = contents.root
        return replace(contents, root=root, opened=())
    if not root:
        raise CheckpointError(
            f"{str(file)!r} is an archive, and none of its {len(names)} files is a checkpoint: "
            f"{listed([repr(name[:100]) for name in names])}. Nothing was read. Unpack it, and name the file to read."
        )
    config, more = folder_config(copies[0].parent)
    return Contents(root, config=config, notes=(*notes, *more))


def _files(file: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the files of an archive in turn, each with a stream of its bytes that holds until the next.

    Raises:
        TooCostlyError: There are too many, or they are too large for the archive.
    """
    left = _FREE_BYTES + _MAX_RATIO * file.stat().st_size

    def charged(count: int, size: int) -> None:
        nonlocal left
        left -= size
        if count >= MAX_MEMBERS or left < 0:
            raise TooCostlyError("it holds too many files, or is many times larger when it is unpacked")

    with file.open("rb") as start:
        is_zip = start.read(2) == b"PK"
    if is_zip:
        with zipfile.ZipFile(file) as archive:
            for count, info in enumerate(archive.infolist()):
                charged(count, info.file_size)
                if not info.is_dir():
                    with archive.open(info) as stream:
                        yield info.filename, stream
        return
    with tarfile.open(file, "r|*") as packed:
        for count, member in enumerate(packed):
            charged(count, member.size)
            content = packed.extractfile(member) if member.isfile() else None
            if content is not None:
                yield member.name, content
