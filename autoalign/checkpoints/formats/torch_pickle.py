"""Files of ``torch.save``: a pickle of whatever a script saved, read with ``weights_only=True``, always."""

from __future__ import annotations

import mmap
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from autoalign.checkpoints.formats.unpickler import MAX_PICKLE_BYTES, check_cost, check_zipped, count_of
from autoalign.checkpoints.stored import Budget, Contents, TooCostlyError
from autoalign.errors import CheckpointError, DependencyError, UnsafeCheckpointError

_MAGIC = 0x1950A86A20F9469CFC6C  # the first value of a file from before torch 1.6, which has five


def is_pickled(head: bytes) -> bool:
    """Return True if a file that begins with ``head`` is a pickle, alone or in a zip file."""
    return head.startswith((b"PK\x03\x04", b"\x80"))


def open_pickled(file: Path) -> Contents:
    """Unpickle a file without running code of it.

    Tensors of a zip file are mapped into memory; an older file is read as a whole.

    Raises:
        CheckpointError: The file is damaged, or holds something else than a mapping.
        UnsafeCheckpointError: The file asks for code that ``weights_only=True`` refuses to run.
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
                check_zipped(stream, size, Budget(size))
            else:
                _check_legacy(stream, size)
            stream.seek(0)
            # torch.load takes this suffix at its word, and would write to a mapping of swapped bytes
            mapped = zipped and file.suffix != ".safetensors" and not _is_swapped(file)
            loaded = torch.load(file if mapped else stream, map_location="cpu", weights_only=True, mmap=mapped)
    except TooCostlyError as error:
        raise CheckpointError(
            f"{str(file)!r} was not read, since it is of a kind that exhausts time or memory: {error}. "
            "If you trust its source, load it with torch.load and pass what that gives."
        ) from error
    except Warning:  # torch's own, which a filter of the caller's turns into an error; filters are the whole process's
        raise
    except Exception as error:  # zipfile, torch and damaged pickles raise whatever they were led to
        raise _read_error(file, error) from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{str(file)!r} holds a {type(loaded).__name__}, not a mapping of tensors. Nothing was aligned. "
            "Save a state dict, such as torch.save(model.state_dict(), path)."
        )
    if "ds_version" in loaded and _is_emptied(loaded.get("module"), loaded.get("param_shapes")):
        raise CheckpointError(
            f"{str(file)!r} is a part of a checkpoint of DeepSpeed's ZeRO, whose tensors are spread over many files. "
            "Nothing was aligned. Merge them with the zero_to_fp32.py that lies beside them."
        )
    return Contents(loaded)


def _may_run_code(version: str) -> bool:
    """Return True if a version of torch is older than 2.6, which mended CVE-2025-32434."""
    major, minor, *_ = version.split(".")
    return (int(major), int(minor)) < (2, 6)


def _check_legacy(stream: BinaryIO, size: int) -> None:
    """Do what ``check_zipped`` does for a file from before torch 1.6."""
    budget = Budget(size)
    with mmap.mmap(stream.fileno(), min(size, MAX_PICKLE_BYTES), access=mmap.ACCESS_READ) as start:
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
