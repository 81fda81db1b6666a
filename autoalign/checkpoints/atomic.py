"""Files that appear whole or not at all, and which files count where a process was killed; interrupts held back."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from autoalign.errors import OutputError


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold back Ctrl-C, and all other signals with a handler in Python, until the block is done.

    Signals reach the main thread alone; in others there is nothing to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    # of the least number last, which are Ctrl-C and a hang-up: if they come meanwhile, the others are back in place
    handlers = {number: signal.getsignal(number) for number in sorted(signal.valid_signals(), reverse=True)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in handlers:
            signal.signal(number, lambda number, _frame: held.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _raise_signals(list(dict.fromkeys(held)))


def _raise_signals(numbers: list[int]) -> None:
    """Raise all of them, even if the handler of one raises an error."""
    if numbers:
        try:
            signal.raise_signal(numbers[0])
        finally:
            _raise_signals(numbers[1:])


def replace_text(path: Path, text: str) -> None:
    """Write a text file under another name, then rename it, so that it is never there in part.

    A file that it replaces passes on its permissions.
    """
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


_STAGING = re.compile(r"\.(?P<stem>.+)\.safetensors(?:\.index\.json)?\.[0-9a-f]{8}\.tmp")
_SHARD = r"(?P<mark>-[0-9a-f]{8})?-\d{5}-of-(?P<count>\d{5})"


def staging_name(name: str, mark: str) -> str:
    """Return the name of the hidden folder of an output.

    >>> staging_name("model.safetensors", "0123abcd")
    '.model.safetensors.0123abcd.tmp'

    Args:
        name: Of the file that is put in its place last.
        mark: Eight hexadecimal digits, which no other output has.
    """
    return f".{name}.{mark}.tmp"


def output_pattern(stem: str) -> str:
    """Return the regular expression of the names of an output's files; shards that replace others have a mark."""
    return rf"{re.escape(stem)}({_SHARD})?\.safetensors(\.index\.json)?"


def unfinished(names: Collection[str], listed: Collection[str]) -> set[str]:
    """List the files of a folder that are left of unfinished outputs.

    >>> new = ["model-0123abcd-00001-of-00002.safetensors"]
    >>> old = ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    >>> unfinished([*new, *old, ".model.safetensors.index.json.0123abcd.tmp"], old[:1])
    {'model-0123abcd-00001-of-00002.safetensors'}

    Args:
        names: All in the folder.
        listed: The shards that indices in the folder list.
    """
    left: set[str] = set()
    for stem in {found["stem"] for found in map(_STAGING.fullmatch, names) if found}:
        whole = f"{stem}.safetensors"
        has_index = f"{whole}.index.json" in names
        shard = re.compile(rf"{re.escape(stem)}{_SHARD}\.safetensors", re.ASCII)
        groups: dict[tuple[str | None, str], list[str]] = {}
        for name in set(names) - set(listed):
            if part := shard.fullmatch(name):
                groups.setdefault((part["mark"], part["count"]), []).append(name)
        for (mark, count), parts in groups.items():
            if mark or has_index or whole in names or len(parts) < int(count):
                left.update(parts)
        if has_index and whole in names:  # before the one is removed, or the other
            left.add(whole)
    return left


@contextmanager
def staging_folder(path: Path) -> Iterator[None]:
    """Make a folder that is locked while it is in use, and removed in the end."""
    path.mkdir()
    lock = None
    try:
        with suppress(OSError):  # where the file system has no locks
            lock = _locked(path)
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Remove the hidden folders of ``staging_name`` that no running process has locked.

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
    """Yield paths to write to, in a hidden folder; the files get their names when the block is done.

    If the block raises, an interrupt included, the written files are removed, and so are the folders that were made
    for them. If the process is killed, ``unfinished`` finds which files count: all that were there, or all new ones.

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
