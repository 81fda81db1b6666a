"""What is given in place of a path, as local files: ``~`` and patterns, lists of files, addresses, open files."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TypeAlias

from autoalign.checkpoints.formats.archives import open_copy
from autoalign.checkpoints.formats.detection import format_of, open_files, open_path
from autoalign.checkpoints.remote import downloaded, is_remote
from autoalign.checkpoints.stored import Contents
from autoalign.errors import CheckpointError, InputError
from autoalign.plan.keys import natural

Given: TypeAlias = str | os.PathLike[str] | IO[bytes] | Sequence[str | os.PathLike[str]]


def is_given(value: object) -> bool:
    """Return True if a value may name or be a file.

    >>> import io
    >>> is_given("*.safetensors"), is_given(["a.pt", "b.pt"]), is_given(io.BytesIO()), is_given(b"a"), is_given([1])
    (True, True, True, False, False)
    """
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(item, str | os.PathLike) for item in value)
    return isinstance(value, str | os.PathLike) or (hasattr(value, "read") and hasattr(value, "seek"))


def open_given(given: Given) -> tuple[Contents, tuple[Path, ...], str]:
    """Open what is given.

    Returns:
        What it holds; the local files or the folder, none for what was in memory; and what to call it.

    Raises:
        CheckpointError: It cannot be read, or no file is of this name or pattern.
        InputError: It is not a path.
        DependencyError: A package is needed that is not installed.
    """
    if not is_given(given):
        raise InputError(f"Expected a path, not {type(given).__name__}. Nothing was read.")
    if isinstance(given, Sequence) and len(given) == 1:
        given = given[0]
    if isinstance(given, str | os.PathLike):
        paths = local_paths(given)
        name = str(given) if is_remote(given) or len(paths) > 1 else str(paths[0])
    elif isinstance(given, Sequence):
        paths = tuple(dict.fromkeys(path for each in given for path in local_paths(each)))
        name = str(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    else:
        name = str(getattr(given, "name", f"<{type(given).__name__}>"))
        named = _path_of(given)
        if named is None:
            return _open_stream(given, name), (), name
        paths = (named,)
    return open_path(paths[0]) if len(paths) == 1 else open_files(name, paths), paths, name


def is_file(text: str) -> bool:
    """Return True for an address, and where there is such a file or folder, or one that such a pattern takes.

    >>> is_file("timm:resnet50")
    False
    """
    if is_remote(text):
        return True
    expanded = os.path.expanduser(text)  # noqa: PTH111, which fails for users that are not known
    return os.path.lexists(text) or os.path.lexists(expanded) or bool(glob.glob(expanded))  # noqa: PTH207


def local_paths(given: str | os.PathLike[str]) -> tuple[Path, ...]:
    """List the files or the folder that a path, a pattern or an address stands for.

    Of several files that a pattern takes, those that are checkpoints are listed, in natural order.

    Raises:
        CheckpointError: There is none for the pattern.
    """
    if is_remote(given):
        return (downloaded(str(given)),)
    if os.path.lexists(given):
        return (Path(given),)
    text = os.path.expanduser(given)  # noqa: PTH111, which fails for users that are not known
    if not glob.has_magic(text) or os.path.lexists(text):
        return (Path(text),)
    found = sorted(map(Path, glob.glob(text, recursive=True)), key=lambda path: natural(str(path)))  # noqa: PTH207
    kept = found if len(found) == 1 else [path for path in found if path.is_file() and format_of(path)]
    if not kept:
        what = (
            f"None of the {len(found)} files that match {text!r} is a checkpoint" if found else f"No file is {text!r}"
        )
        raise CheckpointError(f"{what}. Nothing was read.")
    return tuple(kept)


def _path_of(stream: IO[bytes]) -> Path | None:
    """Return the path of an open file that stands at its beginning, if it is there and the same."""
    name = getattr(stream, "name", None)
    try:
        if not isinstance(name, str) or stream.tell():
            return None
        return Path(name) if os.path.samestat(Path(name).stat(), os.fstat(stream.fileno())) else None
    except (OSError, ValueError, AttributeError):  # it has no descriptor, or the file was moved
        return None


def _open_stream(stream: IO[bytes], name: str) -> Contents:
    """Copy what is left of an open file to a temporary one, and open that; the stream is left as it was."""
    try:
        place = stream.tell()
        start = stream.read(0)
        if not isinstance(start, bytes):
            raise InputError(f"{name} is open as text, not as bytes. Nothing was read. Open it with mode 'rb'.")
        contents = open_copy(stream, name, open_path)
        stream.seek(place)
    except (OSError, ValueError) as error:  # closed, or a pipe
        raise CheckpointError(f"{name} could not be read: {error}. Nothing was read.") from error
    return contents
