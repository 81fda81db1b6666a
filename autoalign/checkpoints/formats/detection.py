"""Which checkpoint a path is: a file's format by its content, the shards of an index, the model's file in a folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from autoalign.checkpoints.atomic import unfinished
from autoalign.checkpoints.containers import TRAINING_WORDS, name_words
from autoalign.checkpoints.formats.archives import is_archive, open_archive
from autoalign.checkpoints.formats.deepspeed import is_zero, open_zero
from autoalign.checkpoints.formats.distributed import is_distributed, open_distributed
from autoalign.checkpoints.formats.gguf import is_gguf, open_gguf
from autoalign.checkpoints.formats.hdf5 import is_hdf5, open_hdf5
from autoalign.checkpoints.formats.megatron import open_parts, parts_of
from autoalign.checkpoints.formats.msgpack import is_msgpack, open_msgpack
from autoalign.checkpoints.formats.npz import is_npz, open_npz
from autoalign.checkpoints.formats.safetensors import is_safetensors, open_safetensors
from autoalign.checkpoints.formats.torch_pickle import is_pickled, members_of, open_pickled
from autoalign.checkpoints.formats.torchscript import is_torchscript, open_torchscript
from autoalign.checkpoints.stored import Contents, StoredTensor, as_opened, reading, unique_names
from autoalign.errors import CheckpointError, listed, most_similar
from autoalign.plan.keys import natural

FORMATS: dict[str, Callable[[Path], Contents]] = {
    "safetensors": open_safetensors,
    "torch": open_pickled,
    "TorchScript": open_torchscript,
    "npz": open_npz,
    "GGUF": open_gguf,
    "HDF5": open_hdf5,
    "msgpack": open_msgpack,
    "archive": lambda file: open_archive(file, _open_member, _open_unpacked),
}  # the first is the first that is taken where a folder has several

_HEAD_BYTES = 2**12  # of a file that are looked at
_MAX_INDEX_BYTES = 2**26
_MAX_NAME_LENGTH = 100  # of one in an error
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\..*)")
_INDEX = re.compile(r"\.index(?P<variant>\.\w+)?\.json")
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # of the Hub: its owner and its name
_MODEL = re.compile(r"(timm|torchvision|transformers):\w")
_STATE_WORDS = TRAINING_WORDS | {"args", "random", "training"}  # of what training scripts save beside a model


def open_path(path: Path) -> Contents:
    """Open a folder, an index or a file.

    Raises:
        CheckpointError: It is not there, is damaged or of no known format, or a folder with no or several checkpoints.
        DependencyError: The package that reads its format is not installed.
    """
    if path.is_dir():
        return open_folder(path)
    if not path.is_file():
        if path.exists():
            raise CheckpointError(f"{str(path)!r} is neither a file nor a folder. Nothing was read.")
        raise CheckpointError(f"{str(path)!r} does not exist. Nothing was read.{meant_by(str(path))}")
    # the length that a file of safetensors begins with may look like JSON
    if head_of(path).lstrip().startswith(b"{") and format_of(path) is None:
        return open_index(path)
    return open_file(path)


def meant_by(text: str) -> str:
    """Return the question what may have been meant by a path that is not there, after a space; or nothing.

    >>> meant_by("microsoft/resnet-50")
    " Did you mean 'hf://microsoft/resnet-50'?"
    """
    if _MODEL.match(text):
        return " It names a model: build it, and give the model itself."
    path, near = Path(text), list[str]()
    with suppress(OSError, ValueError):
        near = [other.name for other in path.parent.iterdir()]
    if name := most_similar(path.name, near):
        return f" Did you mean {str(path.with_name(name))!r}?"
    if _REPOSITORY.fullmatch(text) and not path.parent.exists():
        return f" Did you mean 'hf://{text}'?"
    return ""


def open_file(file: Path) -> Contents:
    """Open a file of any of ``FORMATS``.

    Raises:
        CheckpointError: The file cannot be read, is damaged or of none of the formats.
        DependencyError: The package that reads its format is not installed.
    """
    name = format_of(file)
    if name is not None:
        opened = as_opened(file)
        return replace(FORMATS[name](file), opened=opened)
    head = head_of(file)[:32]
    content = f"begins with {head!r}" if head else "is empty"
    raise CheckpointError(
        f"{str(file)!r} is neither a file of torch nor of safetensors: it {content}. Nothing was read. "
        f"Other formats that are known are {', '.join(list(FORMATS)[2:])}. "
        "Check that the download is complete, and not a web page or a pointer file."
    )


def format_of(file: Path) -> str | None:
    """Return which of ``FORMATS`` a file is of, if any.

    Raises:
        CheckpointError: The file cannot be read.
    """
    head = head_of(file)
    if is_gguf(head):  # first, since to safetensors its magic is the length of a header
        return "GGUF"
    if is_safetensors(head, file.stat().st_size):
        return "safetensors"
    if is_npz(head):
        return "npz"
    if is_hdf5(head):
        return "HDF5"
    if is_pickled(head):
        names = _members(file)
        is_torch = not names or any(name.lower().endswith("data.pkl") for name in names)
        return "TorchScript" if is_torchscript(names) else "torch" if is_torch else "archive"
    if is_archive(head):
        return "archive"
    return "msgpack" if is_msgpack(head) else None


def _open_unpacked(folder: Path) -> Contents | None:
    """Open a folder of an archive if its files are parts of one checkpoint, or shards of one."""
    parted = open_parted(folder)
    sharded = [each for each in _candidates(folder) if len(each.files) > 1 or _INDEX.search(each.name)]
    return sharded[0].open() if parted is None and len(sharded) == 1 else parted


def _open_member(file: Path) -> Contents:
    is_archive = format_of(file) == "archive"
    return open_archive(file, _open_innermost, _open_unpacked) if is_archive else open_file(file)


def _open_innermost(file: Path) -> Contents:
    if format_of(file) == "archive":
        raise CheckpointError("It holds archives in archives, which are not opened. Nothing was read. Unpack it.")
    return open_file(file)


def head_of(file: Path) -> bytes:
    """Read the beginning of a file.

    Raises:
        CheckpointError: The file cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return stream.read(_HEAD_BYTES)
    except OSError as error:
        raise CheckpointError(f"{str(file)!r} could not be read: {error}.") from error


def _members(file: Path) -> list[str]:
    try:
        return [info.filename for info in members_of(file, file.stat().st_size)]
    except Exception:  # no zip file, or a damaged one, which fails as what it is taken for
        return []


def open_index(file: Path) -> Contents:
    """Open the files that an index lists; each must hold what the index says.

    Raises:
        CheckpointError: The index is damaged or lists what is not there, or one of its files is damaged.
    """
    files_of, folder = index_of(file), file.parent
    names = sorted(set(files_of.values()), key=natural)
    missing = [name for name in names if not _is_file(folder / name)]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of the {len(names)} files that {str(file)!r} lists are missing: {_quoted(missing)}. "
            "Nothing was read. Complete the download, or name one of the files to read that alone."
        )
    return _open_shards(str(file), [folder / name for name in names], files_of)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def index_of(file: Path) -> dict[str, str]:
    """Read an index: the name of the file of each tensor, in the index's folder.

    Raises:
        CheckpointError: The file is not an index, is damaged, or leads out of its folder.
    """
    files_of = _listed(file)
    outside = sorted({name for name in {*files_of.values()} if Path(name).name != name or name == ".." or "\\" in name})
    if outside:
        raise CheckpointError(
            f"The index {str(file)!r} lists {_quoted(outside)}, and only files in its own folder are read. "
            "Nothing was read."
        )
    return files_of


def _listed(file: Path) -> dict[str, str]:
    """Read an index as it is, wherever it leads."""
    with reading(file, "the index of a sharded checkpoint"):
        if file.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError(f"it has more than {_MAX_INDEX_BYTES} bytes")
        found = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique_names)
        files_of = found.get("weight_map") if isinstance(found, dict) else None
        names = list(files_of.values()) if isinstance(files_of, dict) else []
        if not files_of or not names or not all(isinstance(name, str) for name in names):
            raise ValueError("it has no weight_map with the file of each tensor")
        return dict(files_of)


def open_files(name: str, files: Sequence[Path]) -> Contents:
    """Open several files, or folders, as one checkpoint.

    Mappings of one name, such as the ``model`` of each, become one; of other values the first counts.

    Raises:
        CheckpointError: A tensor is in two of them, or one of them cannot be read.
    """
    return _open_shards(name, files, None)


def _open_shards(path: str, files: Sequence[Path], files_of: Mapping[str, str] | None) -> Contents:
    root: dict[str, object] = {}
    unlisted: list[str] = []
    notes: dict[str, None] = {}
    metadata: dict[str, str] = {}
    config: dict[str, object] = {}
    opened: list[tuple[Path, os.stat_result]] = []
    for file in files:
        contents = open_path(file) if files_of is None else open_file(file)
        opened += contents.opened
        if files_of is None:
            if key := _merge(root, contents.root):
                raise CheckpointError(f"{key} is in two files of {path!r}, such as {file.name!r}. Nothing was read.")
        else:
            root |= {key: value for key, value in contents.root.items() if files_of.get(key) == file.name}
            unlisted += [key for key in contents.root if key not in files_of]
        notes.update(dict.fromkeys(contents.notes))
        metadata |= contents.metadata
        config |= contents.config
    absent = [key for key in files_of or () if key not in root]
    if absent:
        raise CheckpointError(
            f"{len(absent)} tensors that {path!r} lists are not in their files: {_quoted(absent)}. "
            "Nothing was read. The index and the files may be of different checkpoints."
        )
    if unlisted:
        notes[f"{len(unlisted)} tensors that the index does not list were left out: {_quoted(unlisted)}."] = None
    if files[0].is_file() and format_of(files[0]) == "safetensors":  # whose files are not in the order of the model
        root = dict(sorted(root.items(), key=lambda item: natural(item[0])))
    flat = "" if any(isinstance(value, Mapping) for value in root.values()) else "sharded checkpoint"
    return Contents(root, flat, metadata, config, tuple(notes), tuple(opened))


def _merge(root: dict[str, object], more: Mapping[str, object]) -> str:
    """Add what is in one mapping to another; return the key of a tensor that both have, else ''."""
    for name, value in more.items():
        known = root.get(name)
        if isinstance(value, Mapping) and isinstance(known, dict | None):
            root[name] = merged = dict(known or {})
            if key := _merge(merged, value):
                return f"{name}.{key}"
        elif known is not None and isinstance(value, Tensor | StoredTensor):
            return name
        else:
            root.setdefault(name, value)
    return ""


def _quoted(names: Sequence[str]) -> str:
    return listed([repr(name if len(name) <= _MAX_NAME_LENGTH else f"{name[:_MAX_NAME_LENGTH]}...") for name in names])


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A checkpoint in a folder."""

    name: str
    kind: str  # one of ``FORMATS``
    files: tuple[Path, ...]  # an index alone, or all the files

    def open(self) -> Contents:
        if _INDEX.search(self.name):
            return open_index(self.files[0])
        return open_file(self.files[0]) if len(self.files) == 1 else open_files(str(self.files[0].parent), self.files)


def open_folder(folder: Path) -> Contents:
    """Open the checkpoint in a folder: a distributed one, a sharded one, or the one file that is a model's.

    Of the same model in several formats the first of ``FORMATS`` is taken, of several variants the plain one. What is
    not taken is named in a note.

    Raises:
        CheckpointError: There is none, there are several, or it cannot be read.
        DependencyError: The package that reads its format is not installed.
    """
    if (contents := open_parted(folder)) is not None:
        return contents
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


def open_parted(folder: Path) -> Contents | None:
    """Open a folder whose files are parts of one checkpoint; None for a folder of another kind.

    Raises:
        CheckpointError: A part is missing, damaged or unlike the others.
    """
    if is_distributed(folder):
        return open_distributed(folder)
    for step in filter(None, (folder, _latest(folder))):
        if parts := parts_of(step):
            return open_parts(step, parts, open_file)
        if is_zero(step):
            return open_zero(step)
    return None


def kind_of_folder(folder: Path) -> str:
    """Return what to call a folder with a checkpoint, by whose files are parts of one."""
    if is_distributed(folder):
        return "folder of torch.distributed"
    steps = [step for step in (folder, _latest(folder)) if step is not None]
    if any(map(parts_of, steps)):
        return "folder of model-parallel parts"
    return "folder of DeepSpeed's ZeRO" if any(map(is_zero, steps)) else "folder"


def _latest(folder: Path) -> Path | None:
    """Return the folder of the last step of a training, where one names it."""
    for name, start in (("latest", ""), ("latest_checkpointed_iteration.txt", "iter_")):
        file = folder / name
        if file.is_file() and file.stat().st_size <= _MAX_NAME_LENGTH:
            text = file.read_text(encoding="utf-8", errors="replace").strip()
            inner = folder / (f"{start}{int(text):07}" if start and text.isdigit() else text)
            if inner.parent == folder and inner.name not in ("", "..") and inner.is_dir():
                return inner
    return None


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
        shards = set(_listed(files[name]).values())
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
    groups = _grouped(list(kinds_of))
    return found + [_Candidate(names[0], kinds_of[names[0]], tuple(files[name] for name in names)) for names in groups]


def _grouped(names: Sequence[str]) -> list[list[str]]:
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
