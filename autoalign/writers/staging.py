"""Staging: files that come to be all together, or not at all, even if the process is killed."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from autoalign.errors import OutputError
from autoalign.formats.unfinished import staging_name
from autoalign.transaction import interrupts_held


@contextmanager
def staging_folder(path: Path) -> Iterator[None]:
    """Make a folder that is known to be in use until it is removed in the end, with what is in it."""
    path.mkdir()
    lock = None
    try:
        with suppress(OSError):  # as where the file system has no locks
            lock = _locked(path)
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Remove what processes that are no more left in hidden folders of ``staging_name``.

    Args:
        folder: Where they are.
        pattern: A regular expression of the names of their outputs.
    """
    hidden = re.compile(rf"\.{pattern}\.[0-9a-f]{{8}}\.tmp", re.ASCII)
    with suppress(OSError):
        for path in [path for path in folder.iterdir() if hidden.fullmatch(path.name)]:
            with suppress(OSError):  # in use, or not to be removed
                lock = _locked(path)
                try:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                finally:
                    os.close(lock)


def _locked(path: Path) -> int:
    """Lock a file or folder; the system unlocks it when the process ends.

    Raises:
        OSError: Another process has locked it, or the system has no such locks, as Windows.
    """
    try:
        import fcntl
    except ImportError as error:
        raise OSError(str(error)) from error
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def staged(
    folder: Path, names: Sequence[str], replaced: Collection[str] = (), pattern: str = ""
) -> Iterator[list[Path]]:
    """Give paths to write to, in a hidden folder; what is written there gets its names when the block is through.

    If the block raises, an interrupt included, the written files are removed, and so are the folders that were made
    for them. If the process is killed, ``unfinished`` tells which files count: all that were there, or all new ones.

    Args:
        folder: Made where it is not there.
        names: Of the files. The last is put in its place last; of the others none may be there already.
        replaced: Names of older files in the folder, which are removed in the end if they are not among ``names``.
        pattern: A regular expression of such names, whose abandoned hidden folders are removed first; '' for none.

    Raises:
        OutputError: A file cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    hidden = folder / staging_name(names[-1], secrets.token_hex(4))
    placed: list[Path] = []  # new ones, to be removed if not all get there
    gone = set(replaced) - set(names)
    indices = {name for name in gone if name.endswith(".index.json")}  # which count as long as they are there
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with staging_folder(hidden):
            if pattern:
                remove_abandoned(folder, pattern)
            yield [hidden / name for name in names]
            with interrupts_held():
                for name in names:
                    (hidden / name).replace(folder / name)
                    if name not in replaced:
                        placed.append(folder / name)
                for name in indices:
                    (folder / name).unlink(missing_ok=True)
                placed.clear()
                for name in gone - indices:
                    with suppress(OSError):  # the next output of this name removes it
                        (folder / name).unlink()
    except BaseException as error:
        with interrupts_held():
            for path in placed:
                with suppress(OSError):
                    path.unlink()
            for path in made:
                with suppress(OSError):
                    path.rmdir()
        if isinstance(error, OSError) and not isinstance(error, OutputError):
            raise OutputError(
                f"{str(folder / names[0])!r} could not be written: {error}. Nothing is left of it."
            ) from error
        raise
