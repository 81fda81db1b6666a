"""Zip and tar archives with checkpoints in them, such as those of Stable-Baselines3 and NeMo.

Their files are read where they stand. What is compressed, and files of GGUF, whose library opens paths alone, are
copied to a temporary folder first, which is removed when nothing refers to its contents any more. An archive is a
mapping of its files, each without its suffix, so that one of them is chosen as any state dict is.
"""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO

from autoalign.checkpoints.config import folder_config
from autoalign.checkpoints.containers import TRAINING_WORDS, name_words
from autoalign.checkpoints.stored import MAX_MEMBERS, Contents, Copies, Member, Place, TooCostlyError, reading
from autoalign.errors import CheckpointError, listed

_SUFFIXES = frozenset({".bin", ".ckpt", ".distcp", ".gguf", ".h5", ".msgpack", ".npz", ".pt", ".pth", ".safetensors"})
_ARCHIVES = frozenset({".keras", ".nemo", ".tar", ".tgz", ".zip"})
_BESIDE = frozenset({".metadata", "config.json", "latest", "params.json"})  # what readers of checkpoints look at
_VARIABLES = "pytorch_variables.pth"  # what Stable-Baselines3 trains beside a policy
_MAX_RATIO = 16  # of what is unpacked to the archive
_FREE_BYTES = 2**26  # that may be unpacked from any
_PACKED = (b"\x1f\x8b\x08", b"BZh", b"\xfd7zXZ\0")  # how files of gzip, bzip2 and xz begin
_HEADER, _HEADER_BYTES = b"PK\x03\x04", 30  # of a member of a zip file: its begin, and how long it is before the name
_IS_ENCRYPTED = 1  # among the flags of a member


def is_archive(head: bytes) -> bool:
    """Return True if a file that begins with ``head`` is a tar archive, maybe packed by gzip, bzip2 or xz."""
    return head.startswith(_PACKED) or _is_plain_tar(head)


def _is_plain_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def open_copy(stream: IO[bytes], name: str, open_member: Callable[[Path], Contents]) -> Contents:
    """Open a temporary copy of what a stream holds from its place on; ``open_member`` opens files."""
    copies, path = Copies(), Path(name or "stream")
    contents = open_member(Member.of(path.parent, {path.name: copies.add(stream)}, copies) / path.name)
    return replace(contents, opened=())


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
    with reading(file, "an archive"):
        members = _Members(file)
        archive = Member.of(file, members.places, members.copies)
        paths = {archive / name: name.suffix for name in map(PurePosixPath, members.places)}
        models = [path for path, suffix in paths.items() if suffix in _SUFFIXES]
        inner = [path for path, suffix in paths.items() if suffix in _ARCHIVES]
        for folder in sorted({above for model in models for above in model.relative_to(archive).parents}):
            if (contents := open_parted(archive / folder)) is not None:
                return replace(contents, notes=(*contents.notes, *members.notes), opened=())
        root: dict[str, object] = {}
        notes: list[str] = []
        for model in models:
            if name_words(model.name) & TRAINING_WORDS or model.name == _VARIABLES:
                continue
            contents = open_member(model)
            root[model.stem if model.stem not in root else str(model.relative_to(archive))] = contents.root
            notes += contents.notes
    if not root and len(inner) == 1:
        contents = open_member(inner[0])
        return replace(contents, notes=(*contents.notes, *members.notes), opened=())
    if not root:
        raise CheckpointError(
            f"{str(file)!r} is an archive, and none of its {len(members.names)} files is a checkpoint: "
            f"{listed([repr(name[:100]) for name in members.names])}. Nothing was read. Unpack it, and name the file "
            "to read."
        )
    config, more = folder_config(models[0].parent)
    return Contents(root, config=config, notes=(*notes, *members.notes, *more))


class _Members:
    """The files of an archive.

    Attributes:
        names: Of all.
        places: Where those are that may be of a checkpoint, by path.
        copies: Of what cannot be read where it stands.

    Raises:
        TooCostlyError: There are too many, or they are too large for the archive.
    """

    def __init__(self, file: Path) -> None:
        self.whole, self.places, self.names = Place.of(file), dict[str, Place](), list[str]()
        self.copies, self.unpacked = Copies(), 0  # bytes
        with file.open("rb") as stream:
            head = stream.read(512)
            stream.seek(0)
            if head.startswith(b"PK"):
                self._list_zip(stream)
            else:
                self._list_tar(stream, "r:" if _is_plain_tar(head) else "r|*")

    @property
    def notes(self) -> tuple[str, ...]:
        """A note on what was copied."""
        what = f"{self.copies.size:,} bytes of the archive were copied out of it first"
        return (f"{what}: only plain files are read where they stand.",) if self.copies.count else ()

    def _list_zip(self, stream: IO[bytes]) -> None:
        with zipfile.ZipFile(stream) as archive:
            for info in archive.infolist():
                if info.is_dir() or (path := self._path_of(info.filename)) is None:
                    continue
                stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
                if stored and not info.flag_bits & _IS_ENCRYPTED:
                    stream.seek(info.header_offset)
                    header = stream.read(_HEADER_BYTES)
                    if not header.startswith(_HEADER):
                        raise ValueError(f"{path[:100]!r} is not where it was announced")
                    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:], "little")
                    self._add(path, info.header_offset + _HEADER_BYTES + lengths, info.file_size)
                else:
                    self._charge(info.file_size)
                    with archive.open(info) as content:
                        self._copy(path, content)

    def _list_tar(self, stream: IO[bytes], mode: str) -> None:
        try:
            opened = tarfile.open(fileobj=stream, mode=mode)  # type: ignore[call-overload]  # noqa: SIM115
        except tarfile.ReadError as error:
            raise CheckpointError(
                f"{str(self.whole.file)!r} is compressed, and what is in it is not a tar archive ({error}). Nothing "
                "was read. Unpack it, and name what comes out."
            ) from error
        with opened as archive:
            for member in archive:
                if mode != "r:":
                    self._charge(member.size)
                if not member.isfile() or (path := self._path_of(member.name)) is None:
                    continue
                if mode == "r:" and not member.issparse():
                    self._add(path, member.offset_data, member.size)
                elif content := archive.extractfile(member):
                    self._copy(path, content)

    def _path_of(self, name: str) -> str | None:
        """Return the path of a file that may be of a checkpoint, in the archive."""
        self.names.append(name)
        if len(self.names) > MAX_MEMBERS:
            raise TooCostlyError(f"it holds more than {MAX_MEMBERS:,} files")
        path = PurePosixPath(name.lstrip("/"))
        is_wanted = path.suffix in _SUFFIXES | _ARCHIVES or path.name in _BESIDE or path.name.endswith(".index.json")
        if not is_wanted or ".." in path.parts:
            return None
        if str(path) in self.places:
            raise ValueError(f"it holds two files {str(path)[:100]!r}")
        return str(path)

    def _add(self, path: str, start: int, size: int) -> None:
        if start + size > self.whole.size:
            raise ValueError(f"{path[:100]!r} is not all in it")
        self.places[path] = Place(self.whole.file, self.whole.start + start, size)

    def _charge(self, size: int) -> None:
        self.unpacked += size
        if self.unpacked > _FREE_BYTES + _MAX_RATIO * self.whole.size:
            raise TooCostlyError("it is many times larger when it is unpacked")

    def _copy(self, path: str, content: IO[bytes]) -> None:
        self.places[path] = self.copies.add(content)
