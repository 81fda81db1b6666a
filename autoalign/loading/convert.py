"""Conversion: write a checkpoint anew in the names and shapes of another implementation, tensor by tensor."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from autoalign.alignment import Alignment
from autoalign.checkpoints.atomic import (
    output_pattern,
    remove_abandoned,
    staged,
    staging_folder,
    staging_name,
    unfinished,
)
from autoalign.checkpoints.checkpoint import Checkpoint, Side, checkpoint_of
from autoalign.checkpoints.formats.detection import index_of
from autoalign.checkpoints.formats.safetensors import dense, header, in_file_order, write_safetensors
from autoalign.checkpoints.stored import named_dtype
from autoalign.errors import CheckpointError, InputError, OutputError, listed
from autoalign.loading.fill import Progress, require_shape, require_values
from autoalign.loading.prepare import prepared, warn_of_choices, warn_of_unfilled
from autoalign.matching.match import match_tensors
from autoalign.matching.scope import excluded_keys
from autoalign.matching.vocabulary import WRAPPERS
from autoalign.plan.adaptations import needs_target
from autoalign.plan.adapters import AddTo
from autoalign.plan.dequantise import is_dequantised
from autoalign.plan.matches import Match
from autoalign.plan.operations import output_shapes
from autoalign.plan.regions import divided, put_together
from autoalign.plan.specs import TensorSpec, tied_groups

logger = logging.getLogger(__name__)

Format = Literal["safetensors", "dcp"]
FORMATS: tuple[Format, ...] = get_args(Format)

_SUFFIX = ".safetensors"
_OTHER_SUFFIXES = frozenset(
    {".bin", ".ckpt", ".gguf", ".h5", ".json", ".msgpack", ".npz", ".onnx", ".pt", ".pth", ".zip"}
)
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(|[kmgt]i?)b?", re.IGNORECASE)
_UNDONE = "Nothing was written."
_MAX_PATH_LENGTH = 200  # in an error


def convert_checkpoint(
    checkpoint: Side,
    target: Side | None,
    output_path: str | os.PathLike[str],
    align_options: Mapping[str, Any],
    *,
    format: Format,  # noqa: A002, the field's own word
    dtype: torch.dtype | str | None,
    max_shard_size: int | str,
    metadata: Mapping[str, str] | None,
    strict: bool,
    overwrite: bool,
    unwrap: bool,
    progress: Progress | None,
) -> Alignment:
    """Write a checkpoint anew; see ``autoalign.convert``. ``align_options`` are those of ``match_tensors``."""
    if format not in FORMATS:
        raise InputError(f"format={format!r} cannot be written. {_UNDONE} Choose {', '.join(FORMATS)}.")
    cast = named_dtype(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(cast, torch.dtype) and cast.is_floating_point):
        raise InputError(f"dtype={dtype!r} is not a floating-point dtype, such as 'bfloat16'. {_UNDONE}")
    limit = shard_size(max_shard_size)
    if unwrap and target is not None:
        raise InputError(f"unwrap= is for a copy under its own names, and a target has names. {_UNDONE} Leave one out.")
    if progress is not None and not callable(progress):
        raise InputError(f"progress= takes a function, not {type(progress).__name__}. {_UNDONE}")
    is_folder = format == "dcp"
    if is_folder and metadata:
        raise InputError(f"A folder of torch.distributed.checkpoint has no metadata of its own. {_UNDONE}")
    path = _checked_path(output_path)
    folder, stem = (Path(os.path.abspath(path)), "") if is_folder else _place(path)  # noqa: PTH100
    if is_folder and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputError(f"{str(folder)!r} is not a new or empty folder. {_UNDONE} Name another output.")
    older = {} if is_folder else _older(folder, stem)
    kept = [name for name, is_left_over in older.items() if not is_left_over]
    if kept and not overwrite:
        raise OutputError(
            f"{str(folder / kept[0])!r} exists. {_UNDONE} Pass overwrite=True to replace it, or name another output."
        )
    source = checkpoint_of(checkpoint, container=align_options.get("container"))
    module, name = None, repr(str(output_path))
    if target is None:
        alignment = _with_own_names(source, align_options, unwrap=unwrap)
    else:
        wanted = checkpoint_of(target)
        module, name = wanted.module, repr(wanted) if wanted.module is None else type(wanted.module).__name__
        alignment = Alignment.of(match_tensors(source, wanted, **{**align_options, "container": None}))
    taken = alignment.tensors if isinstance(alignment.tensors, Checkpoint) else source
    if states := [key for key in taken.extras if key.rpartition(".")[2] == "_extra_state"]:
        note = f"{len(states)} extra states of modules are not tensors and are not written: {', '.join(states[:3])}."
        alignment = replace(alignment, notes=(*alignment.notes, note))
    fate = "are not written"
    ready = prepared(alignment, module, name, strict=strict, undone=_UNDONE, verb="write", counters_fate=fate)
    source, alignment = ready.source, ready.alignment
    specs = [*_output_specs(alignment, cast), *_unchanged(alignment, source, align_options, cast)]
    shards = [] if is_folder else shards_of(specs, limit)
    described = _metadata(source.metadata, metadata)
    for shard in shards:
        header(shard, described)  # raises what it does before anything is written
    warn_of_choices(f"Writing {ready.summary}", alignment)
    warn_of_unfilled(f"Writing {ready.summary}", alignment, "are not in the output")
    source.require_unchanged()
    matches = {match.target: match for match in alignment.matches}
    done = 0

    def read(spec: TensorSpec) -> torch.Tensor:
        nonlocal done
        match = matches.get(spec.key)
        tensor = alignment.target_tensors[spec.key] if match is None else read_match(alignment, match, spec)
        done += 1
        if done == len(specs):
            source.require_unchanged(_UNDONE)  # while it was read
        if progress is not None:
            progress(done, len(specs))
        return tensor

    if is_folder:
        _write_folder(specs, read, folder)
    else:
        _write(shards, read, described, folder, stem, older)
    logger.info("Wrote %s to %s.", ready.summary, folder)
    return alignment


def _with_own_names(source: Checkpoint, options: Mapping[str, Any], *, unwrap: bool) -> Alignment:
    """Return the alignment that copies a checkpoint under its own names, or those without wrappers."""
    if others := sorted(options.keys() - {"container", "include", "exclude"}):
        raise InputError(f"{others[0]}= needs a target. {_UNDONE} Name one, or leave it out.")
    if not source.is_decided:
        copies = listed([source.container, *source.copies])
        raise InputError(f"Nothing tells which of several copies to take: {copies}. {_UNDONE} Choose by container=.")
    excluded, notes = excluded_keys(options.get("include"), options.get("exclude"), list(source), [])
    specs = [spec for spec in source.specs if spec.key not in excluded]
    if coded := [spec for spec in specs if spec.encoding]:
        raise InputError(
            f"{coded[0]} is in a form that the output does not have, as are {len(coded)} in all. {_UNDONE} "
            "Name a target, for which they are dequantised."
        )
    names = unwrapped(spec.key for spec in specs) if unwrap else {spec.key: spec.key for spec in specs}
    if len(set(names.values())) < len(names):
        (key, name) = next((k, n) for k, n in names.items() if k != n and list(names.values()).count(n) > 1)
        raise InputError(f"Without wrappers {key!r} would be {name!r}, which another is too. {_UNDONE}")
    if tied := tied_groups(specs):
        notes = (*notes, f"Tied tensors are written under each of their keys: {listed([' = '.join(k) for k in tied])}.")
    return Alignment(
        matches=tuple(Match(names[spec.key], (spec.key,)) for spec in specs),
        ambiguous=(),
        mismatched=(),
        source_specs=source.all_specs,
        target_specs=tuple(replace(spec, key=names[spec.key]) for spec in specs),
        excluded=frozenset(excluded),
        notes=(*source.notes, *notes),
        tensors=source,
    )


def unwrapped(keys: Iterable[str]) -> dict[str, str]:
    """Map keys to those without wrappers: modules of torch's wrappers, and outer ones that hold all others.

    >>> unwrapped(["module._orig_mod.net.fc.weight", "module._orig_mod.net.head.weight"])
    {'module._orig_mod.net.fc.weight': 'fc.weight', 'module._orig_mod.net.head.weight': 'head.weight'}
    >>> unwrapped(["module.fc.weight", "module.fc.bias"])
    {'module.fc.weight': 'fc.weight', 'module.fc.bias': 'fc.bias'}
    """
    names = {key: ".".join(part for part in key.split(".") if part not in WRAPPERS) for key in keys}
    while names:
        heads, rests = zip(*(name.partition(".")[::2] for name in names.values()), strict=True)
        is_named = heads[0] != "module"  # as DistributedDataParallel calls it, around a single layer too
        if len({*heads}) > 1 or heads[0].isdecimal() or not all("." in rest if is_named else rest for rest in rests):
            break
        names = dict(zip(names, rests, strict=True))
    return names


def shard_size(size: int | str) -> int:
    """Parse a number of bytes as Hugging Face's libraries do.

    >>> shard_size("5GB"), shard_size("1.5 GiB"), shard_size(100)
    (5000000000, 1610612736, 100)
    """
    found = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if found:
        unit = found[2].lower()
        base = 1024 if unit.endswith("i") else 1000
        size = int(float(found[1]) * base ** (" kmgt".index(unit[0]) if unit else 0))
    if not isinstance(size, int) or size < 1:
        raise InputError(f"max_shard_size={size!r} is not a number of bytes, such as 5_000_000 or '5GB'. {_UNDONE}")
    return size


def shards_of(specs: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Divide tensors, in their order, into files of at most ``limit`` bytes of data, or of one tensor.

    >>> specs = [TensorSpec(key, (4,), torch.float32) for key in "abc"]
    >>> [[spec.key for spec in shard] for shard in shards_of(specs, 32)]
    [['a', 'b'], ['c']]
    """
    shards: list[list[TensorSpec]] = []
    left = 0
    for spec in specs:
        size = spec.numel * spec.dtype.itemsize
        if not shards or size > left:
            shards.append([])
            left = limit
        shards[-1].append(spec)
        left -= size
    return [in_file_order(shard) for shard in shards]


def _checked_path(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"Expected a path to write to, not {type(path).__name__}. {_UNDONE}")
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # such as of a name that is too long, or that has a null byte
        shown = getattr(error, "strerror", None) or error
        raise OutputError(f"{str(path)[:_MAX_PATH_LENGTH]!r} cannot be written to: {shown}. {_UNDONE}") from error
    return Path(path)


def _place(path: Path) -> tuple[Path, str]:
    """Return the folder of an output and the stem of the names of its files."""
    if path.is_dir() or path.suffix.lower() not in {_SUFFIX, *_OTHER_SUFFIXES}:
        return path, "model"
    if path.suffix != _SUFFIX:
        raise InputError(f"{str(path)!r} would be a safetensors file; name it *.safetensors. {_UNDONE}")
    return path.parent, path.stem


def _older(folder: Path, stem: str) -> dict[str, bool]:
    """List what an output of this name would replace or be confused with: by file, whether a killed process left it."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{str(folder)!r} exists and is not a folder. {_UNDONE}")
    ours = re.compile(output_pattern(stem), re.ASCII)
    try:
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise OutputError(f"{str(folder)!r} cannot be written to: {error}. {_UNDONE}") from error
    index = f"{stem}{_SUFFIX}.index.json"
    left_over: Collection[str] = ()
    with suppress(CheckpointError):  # of an index that leads nowhere
        left_over = unfinished(names, index_of(folder / index).values() if index in names else ())
    return {name: name in left_over for name in names if ours.fullmatch(name)}


def _output_specs(alignment: Alignment, cast: torch.dtype | None) -> list[TensorSpec]:
    specs = []
    for match in alignment.matches:
        has_values = is_dequantised(match.operation)
        dtypes = (alignment.sources[key].dtype for key in match.sources)
        dtype = torch.float32 if has_values else reduce(torch.promote_types, dtypes)
        if isinstance(match.operation, AddTo):
            dtype = alignment.targets[match.target].dtype
        is_copy = any(key in alignment.quantised[0] for key in match.sources) and not has_values
        is_value = dtype.is_floating_point and not is_copy
        shape = alignment.targets[match.target].shape
        specs.append(TensorSpec(match.target, shape, cast if cast and is_value else dtype))
    return specs


def _unchanged(
    alignment: Alignment, source: Checkpoint, options: Mapping[str, Any], cast: torch.dtype | None
) -> list[TensorSpec]:
    """List the target's own tensors that an adapter does not change, which make a whole with those that it does."""
    if not any(isinstance(match.operation, AddTo) for match in alignment.matches):
        return []
    out = {match.target for match in alignment.matches}
    out |= excluded_keys(options.get("include"), options.get("exclude"), list(source), list(alignment.targets))[0]
    return [
        replace(spec, dtype=cast)
        if cast and spec.dtype.is_floating_point and spec.key not in alignment.quantised[1]
        else spec
        for spec in alignment.target_specs
        if spec.key not in out and not spec.encoding and not alignment.target_tensors[spec.key].is_meta
    ]


def _metadata(source: Mapping[str, str], given: Mapping[str, str] | None) -> dict[str, str]:
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"metadata= takes a mapping of texts, not {type(given).__name__}. {_UNDONE}")
    entries = {**source, **(given or {}), "format": "pt"}
    odd = [key for key, value in entries.items() if not (isinstance(key, str) and isinstance(value, str))]
    if odd:
        raise InputError(f"The metadata of {odd[0]!r} is not a text, as safetensors requires. {_UNDONE}")
    return entries


def read_match(alignment: Alignment, match: Match, spec: TensorSpec) -> torch.Tensor:
    """Read the tensor of a match; its values are there and it has the shape of the target."""
    if is_dequantised(match.operation) and not needs_target(match.operation):
        sources = [alignment.tensors[key] for key in match.sources]
        require_shape(match, output_shapes(match.operation, [each.shape for each in sources])[0], spec.shape, _UNDONE)
        tensor = put_together(divided(match.operation, sources), spec.shape, spec.dtype)
    else:
        tensor = alignment.tensor(match)
    require_values(match, tensor, _UNDONE)
    require_shape(match, tensor.shape, spec.shape, _UNDONE)
    return tensor


def _write_folder(specs: Sequence[TensorSpec], read: Callable[[TensorSpec], torch.Tensor], folder: Path) -> None:
    from autoalign.checkpoints.formats.distributed import write_distributed

    known = {spec.key: spec for spec in specs}
    made = folder.parent / staging_name(folder.name, secrets.token_hex(4))
    try:
        made.parent.mkdir(parents=True, exist_ok=True)
        with staging_folder(made):
            remove_abandoned(folder.parent, re.escape(folder.name))
            write_distributed(made, specs, lambda key: dense(key, read(known[key])).to(known[key].dtype))
            if folder.exists():
                folder.rmdir()  # an empty one
            made.rename(folder)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{str(folder)!r} could not be written: {error}. Nothing is left of it.") from error


def _write(
    shards: Sequence[Sequence[TensorSpec]],
    read: Callable[[TensorSpec], torch.Tensor],
    metadata: Mapping[str, str],
    folder: Path,
    stem: str,
    older: Collection[str],
) -> None:
    names = [f"{stem}{_SUFFIX}"]
    if len(shards) > 1:
        start = f"{stem}-{secrets.token_hex(4)}" if older else stem
        names = [f"{start}-{number:05}-of-{len(shards):05}{_SUFFIX}" for number in range(1, len(shards) + 1)]
        names.append(f"{stem}{_SUFFIX}.index.json")
    with staged(folder, names, older, output_pattern(stem)) as paths:
        for place, path in enumerate(paths):
            with path.open("xb") as stream:
                if place < len(shards):
                    write_safetensors(stream, shards[place], read, metadata)
                else:  # the index, as Hugging Face's libraries write it
                    files = {spec.key: name for shard, name in zip(shards, names, strict=False) for spec in shard}
                    total = sum(spec.numel * spec.dtype.itemsize for shard in shards for spec in shard)
                    index = {"metadata": {"total_size": total}, "weight_map": files}
                    stream.write(json.dumps(index, indent=2, sort_keys=True).encode() + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
