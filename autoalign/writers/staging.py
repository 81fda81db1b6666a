"""Staging: files that come to be all together, or not at all."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from autoalign.errors import OutputError
from autoalign.transaction import interrupts_held


@contextmanager
def staged(folder: Path, names: Sequence[str], replaced: Collection[str] = ()) -> Iterator[list[Path]]:
    """Give paths to write to, in the folder itself; what is written there gets its names when the block is through.

    If the block raises, an interrupt included, the written files are removed, and so are the folders that were made
    for them. A single file takes the place of an older one at once; several follow one another, the last one last.

    Args:
        folder: Made where it is not there.
        names: Of the files.
        replaced: Names of older files in the folder, which are removed in the end if they are not among ``names``.

    Raises:
        OutputError: A file cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    mark = secrets.token_hex(4)
    paths = [folder / f".{name}.{mark}.tmp" for name in names]
    placed: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield paths
        with interrupts_held():
            for path, name in zip(paths, names, strict=True):
                path.replace(folder / name)
                if name not in replaced:
                    placed.append(folder / name)
            for name in set(replaced) - set(names):
                (folder / name).unlink(missing_ok=True)
    except BaseException as error:
        with interrupts_held():
            for path in (*paths, *placed):
                with suppress(OSError):
                    path.unlink(missing_ok=True)
            for path in made:
                with suppress(OSError):
                    path.rmdir()
        if isinstance(error, OSError) and not isinstance(error, OutputError):
            raise OutputError(
                f"{str(folder / names[0])!r} could not be written: {error}. Nothing is left of it."
            ) from error
        raise
