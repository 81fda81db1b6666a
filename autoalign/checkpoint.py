"""Checkpoints: one side of an alignment, whatever it was given as, with its tensors read only when asked for."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from autoalign.containers import Container, containers_of, named_container, preferred
from autoalign.errors import CheckpointError, InputError, UnsafeCheckpointError
from autoalign.specs import TensorSpec

Side: TypeAlias = nn.Module | Mapping[str, object] | str | os.PathLike[str]

_SAFETENSORS_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint(Mapping[str, Tensor]):
    """A state dict whose keys, shapes and dtypes are known and whose tensors are read lazily, without gradients.

    >>> checkpoint = checkpoint_of({"epoch": 3, "model": {"fc.weight": torch.ones(2, 3)}})
    >>> checkpoint
    <Checkpoint: 1 tensors, 6 elements, float32, container 'model'>
    >>> checkpoint["fc.weight"]
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """

    specs: tuple[TensorSpec, ...]
    read: Callable[[str], Tensor]  # from a key of `specs` to its tensor
    path: str | None = None  # of the file; None for what was in memory
    container: str = ""  # dotted path of the state dict that was taken, '' for the top level
    containers: tuple[str, ...] = ("",)  # all that could have been taken
    notes: tuple[str, ...] = ()  # statements for the report
    metadata: Mapping[str, str] = field(default_factory=dict)  # a safetensors file's own
    extras: Mapping[str, object] = field(default_factory=dict)  # what is no tensor, and each module's `_extra_state`
    state_metadata: Mapping[str, Mapping[str, object]] | None = None  # a torch state dict's `_metadata`
    root: Mapping[str, object] | None = None  # the whole of what the containers are in

    @cached_property
    def _spec_of(self) -> dict[str, TensorSpec]:
        return {spec.key: spec for spec in self.specs}

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._spec_of:
            raise KeyError(key)
        return self.read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._spec_of)

    def __len__(self) -> int:
        return len(self.specs)

    __eq__ = object.__eq__  # Mapping's own would compare values
    __hash__ = object.__hash__

    def __contains__(self, key: object) -> bool:  # Mapping's own would read the tensor
        return key in self._spec_of

    def __repr__(self) -> str:
        dtypes = sorted({str(spec.dtype).removeprefix("torch.") for spec in self.specs})
        parts = [f"{len(self)} tensors", f"{sum(spec.numel for spec in self.specs)} elements", "/".join(dtypes)]
        if self.container:
            parts.append(f"container {self.container!r}")
        return f"<Checkpoint{f' {self.path!r}' if self.path else ''}: {', '.join(filter(None, parts))}>"


def open_checkpoint(path: str | os.PathLike[str], *, container: str | None = None) -> Checkpoint:
    """Open a file of torch or safetensors, told apart by content, without reading tensor data where that is possible.

    Files of torch are unpickled with ``weights_only=True``, always, so that no code of theirs runs. Tensors of a
    safetensors file or of a zip file of torch are mapped into memory; an older file of torch is read as a whole.

    Args:
        path: A ``.safetensors``, ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file.
        container: Which of several state dicts in the file to take, by its dotted path, such as ``"ema"``; by
            default the one that ``autoalign.containers.preferred`` names. ``notes`` says which one was taken.

    Raises:
        CheckpointError: The file cannot be read, holds no tensors, or has no such container.
        UnsafeCheckpointError: The file asks for code that ``weights_only=True`` refuses to run.
    """
    file = Path(path)
    if not file.is_file():
        problem = "is a folder; name a file in it" if file.is_dir() else "does not exist"
        raise CheckpointError(f"{str(file)!r} {problem}. Nothing was read.")
    with file.open("rb") as stream:
        head = stream.read(32)
    # a safetensors file starts with the length of its header, which is JSON
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < file.stat().st_size:
        return _open_safetensors(file, container)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _of_mapping(_read_torch(file, zipped=head.startswith(b"PK")), container, str(file))
    content = f"begins with {head!r}" if head else "is empty"
    raise CheckpointError(
        f"{str(file)!r} is neither a file of torch nor of safetensors: it {content}. Nothing was read. "
        "Check that the download is complete and no web page or pointer file."
    )


def checkpoint_of(side: Side, *, container: str | None = None) -> Checkpoint:
    """Take one side of an alignment as a checkpoint; the side itself is not changed.

    Args:
        side: A module, a path, an open checkpoint, or a mapping of tensors or numpy arrays, nested as training scripts
            save it. A module's tied parameters keep an equal ``storage`` in ``specs``.
        container: As in ``open_checkpoint``.

    Raises:
        InputError: The side is of another kind, a mapping without tensors, or a module with uninitialized parameters.
        CheckpointError: As in ``open_checkpoint``.
    """
    if isinstance(side, Checkpoint):
        if container is None or container == side.container:
            return side
        return _of_mapping(side if side.root is None else side.root, container, side.path)
    if isinstance(side, nn.Module):
        state_dict = side.state_dict(keep_vars=True)
        lazy = [key for key, value in state_dict.items() if isinstance(value, Tensor) and is_lazy(value)]
        if lazy:
            raise InputError(
                f"{len(lazy)} tensors of {type(side).__name__} have no shape yet: {', '.join(lazy[:3])}. "
                "Nothing was aligned. Call the model once on an example input, which initializes lazy modules."
            )
        return _of_mapping(state_dict, container)
    if isinstance(side, Mapping):
        return _of_mapping(side, container)
    if isinstance(side, str | os.PathLike):
        return open_checkpoint(side, container=container)
    raise InputError(
        f"Expected an nn.Module, a mapping of tensors, a path or a Checkpoint, not {type(side).__name__}. "
        "Nothing was aligned."
    )


def _of_mapping(root: Mapping[str, object], container: str | None, path: str | None = None) -> Checkpoint:
    containers = containers_of(root)
    if container is not None:
        chosen = named_container(root, container, containers)
    elif containers:
        chosen = preferred(containers)
    elif path is None and not root:
        chosen = Container("", (), {}, None)
    else:
        error = InputError if path is None else CheckpointError
        raise error(
            f"There are no tensors in {path or type(root).__name__!r}; its first keys are {list(root)[:3]}. "
            "Nothing was aligned. Give a state dict, or a mapping or file that holds one."
        )
    entries = {entry.spec.key: entry for entry in chosen.entries}
    notes = []
    if len(containers) > 1 and container is None:
        others = ", ".join(str(other) for other in containers if other is not chosen)
        notes.append(
            f"The container {chosen} was taken, trained weights and well-known names first. "
            f"Pass container= to take another: {others}."
        )
    return Checkpoint(
        specs=tuple(entry.spec for entry in chosen.entries),
        read=lambda key: entries[key].read(),
        path=path,
        container=chosen.path,
        containers=tuple(other.path for other in containers),
        notes=tuple(notes),
        extras=chosen.extras,
        state_metadata=chosen.state_metadata,
        root=root,
    )


def _open_safetensors(file: Path, container: str | None) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    @cache
    def opened() -> Any:
        return safe_open(file, framework="pt")

    try:
        # for torch, the file would be mapped writable, which fails for one that is larger than the memory
        with safe_open(file, framework="numpy") as header:
            headers = [(key, header.get_slice(key)) for key in header.keys()]  # noqa: SIM118, it is no mapping
            metadata = header.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{str(file)!r} could not be read as a file of safetensors: {error}. "
            "It may be truncated or damaged; compare its size with the original's."
        ) from error
    if container:
        raise CheckpointError(f"{str(file)!r} is a flat safetensors file without containers, such as {container!r}.")
    if not headers:
        raise CheckpointError(f"There are no tensors in {str(file)!r}. Nothing was aligned.")
    # the format sorts by dtype and name, which tells nothing; by number, at least the blocks are in their order
    specs = sorted((_header_spec(key, header) for key, header in headers), key=lambda spec: _natural(spec.key))
    return Checkpoint(tuple(specs), lambda key: opened().get_tensor(key), path=str(file), metadata=metadata)


def _header_spec(key: str, header: Any) -> TensorSpec:
    name = header.get_dtype()
    dtype = getattr(torch, _SAFETENSORS_DTYPES.get(name, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{key} {header.get_shape()} has dtype {name}, which this version of torch cannot read.")
    return TensorSpec(key, tuple(header.get_shape()), dtype)


def _natural(key: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", key)]


def _read_torch(file: Path, *, zipped: bool) -> Mapping[str, object]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what fails below or is no concern of ours, such as a pickle protocol
            if zipped and file.suffix != ".safetensors":  # a suffix that torch.load takes at its word
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            else:
                with file.open("rb") as stream:
                    loaded = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the damaged part of a file led to
        raise _read_error(file, error) from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{str(file)!r} holds a {type(loaded).__name__}, not a mapping of tensors. Nothing was aligned. "
            "Save a state dict, such as torch.save(model.state_dict(), path)."
        )
    return loaded


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
    if "TorchScript" in str(error):
        return CheckpointError(
            f"{str(file)!r} is a TorchScript archive, which holds a program. Nothing was read. "
            "If you trust its source, pass torch.jit.load(path).state_dict()."
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
    except ValueError:  # not a zip file; torch's message has the first one's name
        return tuple(re.findall(r"GLOBAL (\S+)", str(error)))[:1]
