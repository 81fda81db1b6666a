"""Checkpoints in several files, as Hugging Face shards them: an index, which is JSON, says which tensor is where."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from autoalign.errors import CheckpointError
from autoalign.formats.file import format_of, head_of, open_file
from autoalign.stored import Contents, as_opened, natural

_LARGEST = 2**26  # bytes of an index
_LONGEST = 100  # characters of a name in an error


def is_index(file: Path) -> bool:
    """Whether a file is JSON, as an index is; the length that a file of safetensors begins with may look like it."""
    return head_of(file).lstrip().startswith(b"{") and format_of(file) is None


def open_index(file: Path) -> Contents:
    """Open the files that an index lists; each must lie in the index's folder and hold what the index says.

    Raises:
        CheckpointError: The index is damaged or lists what is not there, or one of its files is damaged.
    """
    listed = index_of(file)
    folder = file.parent
    outside = sorted({name for name in listed.values() if Path(name).name != name})
    if outside:
        raise CheckpointError(
            f"The index {str(file)!r} lists {_few(outside)}, and only files in its own folder are read. "
            "Nothing was read."
        )
    names = sorted(set(listed.values()), key=natural)
    missing = [name for name in names if not _is_file(folder / name)]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of the {len(names)} files that {str(file)!r} lists are missing: {_few(missing)}. "
            "Nothing was read. Complete the download, or name one of the files to read that alone."
        )
    return _joined(file, [folder / name for name in names], listed)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def open_shards(files: Sequence[Path]) -> Contents:
    """Open files that are parts of one checkpoint and have no index.

    Raises:
        CheckpointError: One of them is damaged, or a tensor is in two of them.
    """
    return _joined(files[0].parent, files, None)


def index_of(file: Path) -> dict[str, str]:
    """Read an index: the name of the file of each tensor.

    Raises:
        CheckpointError: The file is no index, or is damaged.
    """
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST} bytes")
        found = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_mapping)
        listed = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
            raise ValueError("it has no weight_map with the file of each tensor")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{str(file)!r} could not be read as the index of a sharded checkpoint: {error}. Nothing was read."
        ) from error
    return listed


def _mapping(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"it lists {_few(sorted(name for name, count in counts.items() if count > 1))} twice")
    return found


def _joined(path: Path, files: Sequence[Path], listed: dict[str, str] | None) -> Contents:
    root: dict[str, object] = {}
    unlisted: list[str] = []
    notes: dict[str, None] = {}
    metadata: dict[str, str] = {}
    config: dict[str, object] = {}
    opened: list[tuple[Path, os.stat_result]] = []
    for file in files:
        opened += as_opened(file)
        contents = open_file(file)
        for key, value in contents.root.items():
            if listed is None and key in root:
                raise CheckpointError(
                    f"{key} is in two files of {str(path)!r}, such as {file.name!r}. Nothing was read."
                )
            if listed is None or listed.get(key) == file.name:
                root[key] = value
            elif key not in listed:
                unlisted.append(key)
        notes.update(dict.fromkeys(contents.notes))
        metadata |= contents.metadata
        config |= contents.config
    absent = [key for key in listed or () if key not in root]
    if absent:
        raise CheckpointError(
            f"{len(absent)} tensors that {str(path)!r} lists are not in their files: {_few(absent)}. "
            "Nothing was read. The index and the files may be of different checkpoints."
        )
    if unlisted:
        notes[f"{len(unlisted)} tensors that the index does not list were left out: {_few(unlisted)}."] = None
    if format_of(files[0]) == "safetensors":  # whose files are not in the order of the model
        root = dict(sorted(root.items(), key=lambda item: natural(item[0])))
    return Contents(root, "sharded checkpoint", metadata, config, tuple(notes), tuple(opened))


def _few(names: Iterable[str]) -> str:
    first, *more = names = [repr(name if len(name) <= _LONGEST else f"{name[:_LONGEST]}...") for name in names]
    return ", ".join([first, *more[:2]]) + (", ..." if len(more) > 2 else "")
