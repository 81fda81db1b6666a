"""Folders: the checkpoint in one, as Hugging Face, torch's distributed checkpoints and training scripts leave it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from autoalign.containers import TRAINING_WORDS, name_words
from autoalign.errors import CheckpointError
from autoalign.formats.distributed import is_distributed, open_distributed
from autoalign.formats.file import FORMATS, format_of, open_file
from autoalign.formats.sharded import index_of, open_index, open_shards
from autoalign.formats.unfinished import unfinished
from autoalign.stored import Contents

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\..*)")
_INDEX = re.compile(r"\.index(?P<variant>\.\w+)?\.json")
_STATE_WORDS = TRAINING_WORDS | {"args", "random", "training"}  # of what training scripts save beside a model


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A checkpoint in a folder."""

    name: str
    kind: str  # one of ``FORMATS``
    files: tuple[Path, ...]  # an index alone, or all the files

    def open(self) -> Contents:
        if _INDEX.search(self.name):
            return open_index(self.files[0])
        return open_file(self.files[0]) if len(self.files) == 1 else open_shards(self.files)


def open_folder(folder: Path) -> Contents:
    """Open the checkpoint in a folder: a distributed one, a sharded one, or the one file that is a model's.

    Of the same model in several formats the first of ``FORMATS`` is taken, of several variants the plain one. What is
    not taken is named in a note.

    Raises:
        CheckpointError: There is none, there are several, or it cannot be read.
        DependencyError: The package that reads its format is not installed.
    """
    if is_distributed(folder):
        return open_distributed(folder)
    found = sorted(_candidates(folder), key=_rank)
    if not found:
        raise CheckpointError(_nothing_message(folder))
    first, *rest = found
    rivals = [other.name for other in rest if _rank(other)[:-1] == _rank(first)[:-1]]
    if rivals:
        raise CheckpointError(
            f"{str(folder)!r} is a folder; name a file in it: it holds {len(found)} checkpoints, such as "
            f"{first.name!r} and {rivals[0]!r}. Nothing was read."
        )
    contents = first.open()
    if not rest:
        return contents
    others = ", ".join(repr(other.name) for other in rest[:3])
    note = f"{first.name!r} of the folder was taken. To take another, give its path: {others}."
    return replace(contents, notes=(note, *contents.notes))


def _rank(candidate: _Candidate) -> tuple[int, bool, int, str]:
    """Rank the checkpoints of a folder; those with equal numbers are rivals."""
    stem = _INDEX.sub(r"\g<variant>", candidate.name)
    return (
        list(FORMATS).index(candidate.kind),
        "model" not in name_words(stem),
        stem.count("."),  # model.fp16.safetensors is a variant
        stem,
    )


def _candidates(folder: Path) -> list[_Candidate]:
    try:
        names = sorted(path.name for path in folder.iterdir())
        # hidden ones are parts of what is being written or downloaded
        files = {name: folder / name for name in names if not name.startswith(".") and (folder / name).is_file()}
    except OSError as error:
        raise CheckpointError(f"{str(folder)!r} could not be read: {error}.") from error
    found: list[_Candidate] = []
    taken: set[str] = set()
    for name in [name for name in files if _INDEX.search(name)]:
        shards = set(index_of(files[name]).values())
        kinds = [kind for shard in shards & files.keys() if (kind := format_of(files[shard]))]
        found.append(_Candidate(name, kinds[0] if kinds else "safetensors", (files[name],)))
        taken |= shards
    taken |= unfinished(names, taken)
    kinds_of = {
        name: kind
        for name, path in files.items()
        if name not in taken
        and not name_words(name.partition(".")[0]) & _STATE_WORDS
        and (kind := format_of(path)) is not None
    }
    groups = _together(list(kinds_of))
    return found + [_Candidate(names[0], kinds_of[names[0]], tuple(files[name] for name in names)) for names in groups]


def _together(names: Sequence[str]) -> list[list[str]]:
    """Group the files of which each says that it is one of so many."""
    groups: dict[object, list[str]] = {}
    for name in names:
        shard = _SHARD.fullmatch(name)
        groups.setdefault(shard.group("stem", "count", "suffix") if shard else name, []).append(name)
    for group, members in groups.items():
        if isinstance(group, tuple) and len(members) != int(group[1]):
            raise CheckpointError(
                f"Only {len(members)} of the {int(group[1])} files of {members[0]!r} are in the folder. Nothing was "
                "read. Complete the download, or name one of the files to read that alone."
            )
    return list(groups.values())


def _nothing_message(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    inner = [name for name in names if not name.startswith(".") and (folder / name).is_dir()]
    message = f"{str(folder)!r} is a folder; name a file in it. None of its own is a checkpoint"
    if inner:
        message += f"; the folders in it are {', '.join(map(repr, inner[:5]))}"
    if "zero_to_fp32.py" in names or any("zero_pp_rank" in name for name in names):
        message += "; it is one of DeepSpeed's, whose parts its zero_to_fp32.py merges"
    return f"{message}. Nothing was read."
