"""Files of ``torch.save``: a pickle of whatever a script saved, of which nothing runs.

Zip files are read without torch, which takes longer and refuses classes of others; what torch has to make itself, and
older files, with ``weights_only=True``, always.
"""

from __future__ import annotations

import io
import mmap
import pickle
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch

from autoalign.checkpoints.formats.records import Reading, read_legacy, read_zipped
from autoalign.checkpoints.formats.unpickler import check_cost, count_of
from autoalign.checkpoints.stored import MAX_MEMBERS, Budget, Contents, Place, TooCostlyError, mapped_file
from autoalign.errors import CheckpointError, DependencyError, UnsafeCheckpointError, listed

_MAX_PICKLE_BYTES = 2**27  # of one beside the data of its tensors; a second is enough for two million of them
_MAGIC = 0x1950A86A20F9469CFC6C  # the first value of a file from before torch 1.6, which has five
_END, _END_64, _PLACE_64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"  # how the records at the end of a zip file begin
_TAIL_BYTES = 56 + 20 + 22  # of the three of them
_OWN_RECORDS = ("/version", "/byteorder", "/serialization_id", "/.format_version", "/.storage_alignment")
_TORCHS = ("torch.", "torchao.")  # how the names of classes and functions begin that torch makes
_IS_FOLDER = 0x10  # among the attributes of a member
_SIZES_64 = 1  # the kind of a member's extra field that holds sizes beyond 32 bits


def is_pickled(head: bytes) -> bool:
    """Return True if a file that begins with ``head`` is a pickle, alone or in a zip file."""
    return head.startswith((b"PK\x03\x04", b"\x80"))


def open_pickled(file: Path, *, is_part: bool = False) -> Contents:
    """Unpickle a file without running code of it.

    Tensors of a zip file are mapped into memory; an older file is read as a whole. With ``is_part``, it may be a part
    of a checkpoint that several processes saved, whose tensors are not all there.

    Raises:
        CheckpointError: The file is damaged, or does not hold a mapping.
        UnsafeCheckpointError: It is of a class that only code of others can read.
    """
    if _may_run_code(torch.__version__):
        raise DependencyError(
            f"{str(file)!r} was not read: torch {torch.__version__} may run code in a file, weights_only=True or not. "
            "Install torch 2.7 or later."
        )
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            zipped = stream.read(2) == b"PK"
            if zipped:
                checked = check_zipped(stream, size, Budget(size))
            else:
                _check_legacy(file, size)
            stream.seek(0)
            place = Place.of(file)
            found = _mapped(file, checked) if zipped else None
            # torch.load takes this suffix at its word, and would write to a mapping of swapped bytes
            mapped = zipped and place.is_whole and file.suffix != ".safetensors" and not _is_swapped(place.file)
            loaded, notes = found or (_loaded(place.file if mapped else stream), ())
    except TooCostlyError as error:
        raise CheckpointError(
            f"{str(file)!r} was not read, since it is of a kind that exhausts time or memory: {error}. "
            "If you trust its source, load it with torch.load and pass what that gives."
        ) from error
    except Warning:  # torch's own, which a filter of the caller's turns into an error; filters are the whole process's
        raise
    except pickle.UnpicklingError as error:  # what weights_only=True does not take, or a damaged file
        loaded, notes = _without_code(file, error, zipped=zipped)
    except Exception as error:  # zipfile, torch and damaged pickles raise whatever they were led to
        if "unable to mmap" not in str(error):
            raise _read_error(file, error) from error
        loaded, notes = _without_code(file, error, zipped=zipped)  # which maps what is larger than memory, too
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{str(file)!r} holds a {type(loaded).__name__}, not a mapping of tensors. Nothing was aligned. "
            "Save a state dict, such as torch.save(model.state_dict(), path)."
        )
    if not is_part and "ds_version" in loaded and _is_emptied(loaded.get("module"), loaded.get("param_shapes")):
        raise CheckpointError(
            f"{str(file)!r} is a part of a checkpoint of DeepSpeed's ZeRO, whose tensors are spread over many files. "
            "Nothing was aligned. Name their folder, or merge them with the zero_to_fp32.py that lies beside them."
        )
    return Contents(loaded, notes=notes)


def _loaded(file: Path | BinaryIO) -> Any:
    """Unpickle with torch, which knows the tensors of torchao once that is imported; a path is mapped."""

    def load() -> Any:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=isinstance(file, Path))

    try:
        return load()
    except pickle.UnpicklingError as error:
        if "GLOBAL torchao." not in str(error) or "torchao" in sys.modules or find_spec("torchao") is None:
            raise
    import_module("torchao")
    if not isinstance(file, Path):
        file.seek(0)
    return load()


def _without_code(file: Path, refusal: Exception, *, zipped: bool) -> tuple[Mapping[Any, Any], tuple[str, ...]]:
    """Read a file that names classes or functions of others: its tensors and plain data, with stubs for all else.

    Raises:
        CheckpointError: It is damaged, or holds nothing but such values.
    """
    try:
        loaded, ignored = _read(file, zipped=zipped)
    except Exception as error:
        raise _read_error(file, refusal) from error
    if not isinstance(loaded, Mapping):
        raise _read_error(file, refusal) from refusal
    return loaded, _ignored_notes(ignored)


def _read(file: Path, *, zipped: bool, checked: bytes = b"") -> tuple[object, list[tuple[str, str]]]:
    found, places = read_zipped(file, checked) if zipped else read_legacy(file)
    values = Reading(places)
    return values.value(found), values.ignored


def _ignored_notes(ignored: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    kinds = list(dict.fromkeys(f"{name} in {where!r}" for name, where in ignored))
    note = f"The file names code of others, and none of it was run; ignored: {listed(kinds, 12)}."
    return (note,) if kinds else ()


def _mapped(file: Path, checked: bytes) -> tuple[Mapping[Any, Any], tuple[str, ...]] | None:
    """Read a zip file without torch; None if it holds what torch makes, or may make since the caller said so."""
    try:
        loaded, ignored = _read(file, zipped=True, checked=checked)
    except Exception:  # torch reads it, or says what is wrong
        return None
    given = torch.serialization.get_safe_globals() if ignored else ()
    allowed = {each[1] if isinstance(each, tuple) else f"{each.__module__}.{each.__qualname__}" for each in given}
    if not isinstance(loaded, Mapping) or any(name in allowed or name.startswith(_TORCHS) for name, _ in ignored):
        return None
    return loaded, _ignored_notes(ignored)


def _may_run_code(version: str) -> bool:
    """Return True if a version of torch is older than 2.6, which mended CVE-2025-32434."""
    major, minor, *_ = version.split(".")
    return (int(major), int(minor)) < (2, 6)


def check_zipped(stream: BinaryIO, size: int, budget: Budget) -> bytes:
    """Refuse a zip file of torch that would take more time or memory to read than its size is a reason for.

    Args:
        stream: Of a file of torch, or of a part of another file that is as one.
        size: In bytes.
        budget: What is left for it.

    Returns:
        The pickle that was looked at.

    Raises:
        TooCostlyError: It would take more.
        Exception: It is damaged, and may lead anywhere.
    """
    pickled = check_archive(stream, size)
    if pickled > _MAX_PICKLE_BYTES:
        raise TooCostlyError(
            f"it has a pickle of {pickled:,} bytes beside its tensors, of {_MAX_PICKLE_BYTES:,} at most"
        )
    stream.seek(0)
    reader: Any = torch._C.PyTorchFileReader(stream)  # of several records of one name, what torch takes
    content: bytes = reader.get_record("data.pkl")
    check_cost(io.BytesIO(content), size, budget=budget)
    return content


def check_archive(file: Path | IO[bytes], size: int) -> int:
    """Make sure that what is in a zip file takes no more than the file.

    Returns:
        The largest size of a ``data.pkl``, in whatever case.

    Raises:
        TooCostlyError: It would take more.
        ValueError: As ``members_of``.
    """
    members = members_of(file, size)
    total = sum(info.file_size for info in members)
    if total > size:
        raise TooCostlyError(f"it is a compressed zip file, as torch writes none, of {total} bytes when unpacked")
    if packed := [info.filename for info in members if info.compress_type and info.filename.endswith(_OWN_RECORDS)]:
        raise ValueError(f"{packed[0]} is compressed, which torch reads as whatever is in memory")
    if folders := [info.filename for info in members if info.external_attr & _IS_FOLDER and not info.is_dir()]:
        raise ValueError(f"{folders[0]} is marked as a folder, of which torch reads whatever is in memory")
    return max((info.file_size for info in members if info.filename.lower().endswith("/data.pkl")), default=0)


def members_of(file: Path | IO[bytes], size: int) -> list[zipfile.ZipInfo]:
    """List the members of a zip file in which all readers see the same ones.

    Readers differ in where they look for the directory. Where it is not the one thing before the end, a file may
    hold a harmless one for the reader that checks it and another for the reader that unpacks it.

    Raises:
        TooCostlyError: It has too many.
        ValueError: It does not end as the files of torch do, or is damaged in other ways.
    """
    if isinstance(file, Path):
        with file.open("rb") as stream:
            return members_of(stream, size)
    file.seek(max(size - _TAIL_BYTES, 0))
    count = _member_count(file.read(_TAIL_BYTES), size)
    if count is None:
        raise ValueError("it may be read as two different zip files")
    if count > MAX_MEMBERS:
        raise TooCostlyError(f"it has {count:,} members, of {MAX_MEMBERS:,} at most")
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from error
    if len(members) != count or any(_has_two_sizes(info.extra) for info in members):
        raise ValueError("it may be read as two different zip files")
    return members


def _member_count(tail: bytes, size: int) -> int | None:
    """Return the number of members in a directory that is followed by nothing but the end; None if it is not so."""
    end, place, large = tail[-22:], tail[-42:-22], tail[-98:-42]
    if not end.startswith(_END) or end[20:] != b"\0\0":  # bytes of a comment
        return None
    if not place.startswith(_PLACE_64):
        count, length, start = (_number(end, at, width) for at, width in ((10, 2), (12, 4), (16, 4)))
        return count if start + length == size - 22 else None
    count, length, start = (_number(large, at, 8) for at in (32, 40, 48))
    is_there = large.startswith(_END_64) and _number(place, 8, 8) == size - 98
    return count if is_there and start + length == size - 98 else None


def _has_two_sizes(extra: bytes) -> bool:
    found = 0
    while len(extra) >= 4:
        kind, length = _number(extra, 0, 2), _number(extra, 2, 2)
        found += kind == _SIZES_64
        extra = extra[4 + length :]
    return found > 1


def _number(data: bytes, at: int, width: int) -> int:
    return int.from_bytes(data[at : at + width], "little")


def _check_legacy(file: Path, size: int) -> None:
    """Do what ``check_zipped`` does for a file from before torch 1.6."""
    budget = Budget(size)
    with mapped_file(file, _MAX_PICKLE_BYTES, access=mmap.ACCESS_READ) as start:
        if check_cost(start, size, budget=budget) != _MAGIC:  # which is all that torch would read of it
            return
        for content in ("version", "system", "saved", "storages"):
            value = check_cost(start, size, budget=budget)
            if content != "saved":  # since torch looks at all of it
                count_of(value)


def _is_swapped(file: Path) -> bool:
    """Return True if a zip file of torch was written with the bytes of each number in the other order."""
    reader: Any = torch._C.PyTorchFileReader(str(file))
    if reader.has_record("byteorder"):
        return bool(reader.get_record("byteorder") != sys.byteorder.encode())
    default = torch.serialization.get_default_load_endianness()
    return default is not None and default.name.lower() not in ("native", sys.byteorder)


def _is_emptied(state_dict: object, announced: object) -> bool:
    """Return True if parameters have fewer elements than announced, as in a part of ZeRO; buffers are whole there."""
    if not isinstance(state_dict, Mapping) or not isinstance(announced, list):
        return False
    shapes = {key: shape for group in announced if isinstance(group, Mapping) for key, shape in group.items()}
    return any(
        isinstance(tensor := state_dict.get(key), torch.Tensor) and not tensor.numel() and 0 not in shape
        for key, shape in shapes.items()
        if isinstance(shape, tuple)
    )


def _read_error(file: Path, error: Exception) -> CheckpointError:
    unsafe = _unsafe_globals(file, error)
    if unsafe:
        names = ", ".join(unsafe)
        return UnsafeCheckpointError(
            f"{str(file)!r} was not read: its pickle asks for {names}, and weights_only=True, which is always set, "
            "refuses to run code from a file. If you trust its source, allow these names, as in "
            f"`with torch.serialization.safe_globals([{names}]):` or by torch.serialization.add_safe_globals, "
            "or re-save its tensors as safetensors where that code may run.",
            unsafe,
        )
    reason = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0]
    return CheckpointError(
        f"{str(file)!r} could not be read as a file of torch ({type(error).__name__}: {reason}). Nothing was read. "
        "It may be truncated or damaged; compare its size with the original's."
    )


def _unsafe_globals(file: Path, error: Exception) -> tuple[str, ...]:
    if not isinstance(error, pickle.UnpicklingError):
        return ()
    try:
        return tuple(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file)))
    except Exception:  # not a zip file, or a damaged one; torch's message has the first one's name
        return tuple(re.findall(r"GLOBAL (\S+)", str(error)))[:1]
