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

_SUFFIXES = frozenset({".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".pt", ".pth", ".safetensors"})
_CONFIG = "config.json"  # which stands before the weights, and readers find beside them
_MAX_RATIO = 16  # of what is unpacked to the archive
_FREE_BYTES = 2**26  # that may be unpacked from any


def is_archive(head: bytes) -> bool:
    """Return True if a file that begins with ``head`` is a tar archive, maybe packed by gzip."""
    return head.startswith(b"\x1f\x8b\x08") or head[257:262] == b"ustar"


class _Copied(OrderedDict[str, object]):
    """What was read of files in a temporary folder, which is removed when nothing refers to this any more."""

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


def open_archive(file: Path, open_member: Callable[[Path], Contents]) -> Contents:
    """Open the checkpoints in an archive.

    Args:
        file: The archive.
        open_member: What opens each of them.

    Raises:
        CheckpointError: It is damaged, holds no checkpoint, or one that cannot be read.
    """
    root = _Copied()
    names: list[str] = []
    notes: list[str] = []
    with reading(file, "an archive"):
        for number, (name, stream) in enumerate(_files(file)):
            path = PurePosixPath(name)
            names.append(name)
            if name.removeprefix("./") == _CONFIG:
                with (root.folder / _CONFIG).open("wb") as target:
                    shutil.copyfileobj(stream, target)
            if path.suffix not in _SUFFIXES or name_words(path.name) & TRAINING_WORDS:
                continue
            copy = root.folder / f"{number}{path.suffix}"
            with copy.open("wb") as target:
                shutil.copyfileobj(stream, target)
            contents = open_member(copy)
            root[path.stem if path.stem not in root else name] = contents.root
            notes += contents.notes
    if not root:
        raise CheckpointError(
            f"{str(file)!r} is an archive, and none of its {len(names)} files is a checkpoint: "
            f"{listed([repr(name[:100]) for name in names])}. Nothing was read. Unpack it, and name the file to read."
        )
    config, more = folder_config(root.folder)
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
