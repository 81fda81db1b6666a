"""Checkpoints that several processes of tensor parallelism saved, and files of single layers, of Megatron and its kin.

* GPT-NeoX and DeepSpeed's pipelines: ``layer_02-model_01-model_states.pt``, the layer and the part of it.
* Megatron: ``mp_rank_01/model_optim_rng.pt``. Meta: ``consolidated.01.pth``.

Parts are joined where a configuration states the width of the network: a matrix whose columns are as many was split by
rows, one whose rows are as many by columns, and so was what else is named so in its module. What all parts have alike
is there once. What is still open is an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from autoalign.checkpoints.config import folder_config, saved_config
from autoalign.checkpoints.stored import Contents, StoredTensor, Value, as_opened, reading, tensor_of
from autoalign.errors import CheckpointError, listed
from autoalign.plan.keys import natural, split_key

_LAYER = re.compile(r"layer_(\d+)-(?:model_(\d+)-)?model_states\.pt")
_RANK = re.compile(r"mp_rank_(\d+)(_\d+)?")
_META = re.compile(r"consolidated\.(\d+)\.pth")
_FILES = ("model_optim_rng.pt", "model_rng.pt")
_STATES = "mp_rank_00_model_states.pt"  # beside files of layers, with the arguments of GPT-NeoX
_WIDTHS = ("hidden_size", "hidden-size", "dim", "n_embd", "d_model")
_STATED = re.compile(r"""^\s*["']?(hidden[-_]size|activation)["']?\s*:\s*["']?(\w+)""", re.MULTILINE)  # in YAML, too
_MAX_CONFIG_BYTES = 2**16
_BY_ROWS = re.compile(r"(?:^|\.)(?:query_key_value|linear_qkv|dense_h_to_4h|linear_fc1|w[13qkv])\.weight$")
_BY_COLUMNS = re.compile(r"(?:^|\.)(?:dense|linear_proj|dense_4h_to_h|linear_fc2|w[2o])\.weight$")
_SAMPLE = 2**12  # elements that are compared before all are

Parts = Mapping[tuple[str, int], Path]  # by the prefix of their keys and their number


def parts_of(folder: Path) -> Parts:
    """List the files of such a checkpoint; none for a folder of another kind.

    Raises:
        CheckpointError: The stages of a pipeline of Megatron number their layers each from zero.
    """
    found: dict[tuple[str, int], Path] = {}
    for path in sorted(folder.iterdir()):
        inner = next((path / name for name in _FILES if (path / name).is_file()), None)
        if layer := _LAYER.fullmatch(path.name):
            found[f"layer.{int(layer[1])}.", int(layer[2] or 0)] = path
        elif part := _META.fullmatch(path.name):
            found["", int(part[1])] = path
        elif inner is not None and (rank := _RANK.fullmatch(path.name)):
            if rank[2]:
                raise CheckpointError(
                    f"{str(folder)!r} holds the stages of a pipeline, in each of which layers are numbered from zero. "
                    "Nothing was read. Convert it with Megatron's tools/checkpoint/convert.py to one stage."
                )
            found["", int(rank[1])] = inner
    is_file = len(found) == 1 and all(not prefix and path.parent == folder for (prefix, _), path in found.items())
    return {} if is_file else found  # which is opened as any file


def open_parts(folder: Path, parts: Parts, open_file: Callable[[Path], Contents]) -> Contents:
    """Open all files of such a checkpoint as one.

    Raises:
        CheckpointError: A file is missing or damaged, or it is open how parts are to be joined.
    """
    count = max(number for _, number in parts) + 1
    prefixes = sorted({prefix for prefix, _ in parts}, key=natural)
    every = [(prefix, number) for prefix in prefixes for number in range(count)]
    absent = [f"part {number} of {prefix or folder.name}" for prefix, number in every if (prefix, number) not in parts]
    if absent:
        raise CheckpointError(
            f"{str(folder)!r} lacks {len(absent)} of its {len(every)} parts: {listed(absent)}. Nothing was "
            "read. Complete the download, or name one of the files to read that alone."
        )
    root: dict[str, object] = {}
    config: dict[str, object] = {}
    notes: dict[str, None] = {}
    done: Counter[str] = Counter()
    opened = [stat for path in parts.values() for stat in as_opened(path)]
    with reading(folder, "a checkpoint of several processes"):
        if count > 1 and (folder / _STATES).is_file():
            config |= saved_config(open_file(folder / _STATES).root, "")
        for prefix in prefixes:
            contents = [open_file(parts[prefix, number]) for number in range(count)]
            notes.update((note, None) for each in contents for note in each.notes)
            saved = [each.root for each in contents]
            config |= saved_config(saved[0], "model" if "model" in saved[0] else "")
            found = [dict(_flat(each.get("model", each), prefix)) for each in saved]
            if count == 1:
                root.update(found[0])
                continue
            version = saved[0].get("checkpoint_version", 3)
            if isinstance(version, float | int) and version < 2:
                raise CheckpointError("Its version keeps query, key and value apart in each part. Nothing was read.")
            root.update(_joined(found, *_stated(folder, config), done))
    if done:
        how = ", ".join(f"{number} {what}" for what, number in done.items())
        notes[
            f"Joined from {count} parts of tensor parallelism, by the width that the configuration states: {how}."
        ] = None
    return Contents(root, "" if prefixes == [""] else "checkpoint of layers", {}, config, tuple(notes), tuple(opened))


def _flat(value: object, prefix: str) -> Iterator[tuple[str, Value]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if isinstance(inner, Value):
                yield f"{prefix}{name}", inner
            elif isinstance(name, str):
                yield from _flat(inner, f"{prefix}{name}.")


def _stated(folder: Path, config: Mapping[str, object]) -> tuple[int, bool]:
    """Return the width of the network, and whether its MLPs are gated."""
    known: dict[str, object] = {}
    for place in (folder.parent, folder):
        known |= folder_config(place)[0]
        configs = place / "configs"
        for file in sorted(configs.iterdir()) if configs.is_dir() else ():
            known |= dict(_STATED.findall(file.read_bytes()[:_MAX_CONFIG_BYTES].decode(errors="replace")))
    known |= config
    widths = {int(str(known[name])) for name in _WIDTHS if str(known.get(name)).isdigit()}
    if len(widths) != 1:
        raise CheckpointError(
            f"{str(folder)!r} is split by tensor parallelism, and how it is to be joined follows from its "
            "configuration, which is not there. Nothing was read. Put it beside, as config.json with hidden_size."
        )
    return widths.pop(), known.get("swiglu") is True or "glu" in str(known.get("activation"))


def _joined(
    parts: Sequence[Mapping[str, Value]], width: int, is_gated: bool, done: Counter[str]
) -> Iterator[tuple[str, object]]:
    first = parts[0]
    if any(part.keys() != first.keys() for part in parts):
        raise ValueError("its parts hold tensors of other names")
    kinds = {key: {(part[key].shape, part[key].dtype) for part in parts} for key in first}
    if unlike := [key for key, found in kinds.items() if len(found) > 1]:
        raise ValueError(f"{unlike[0]} has other shapes or dtypes in other parts")
    matrices = [key for key, tensor in first.items() if len(tensor.shape) > 1]
    dims = {key: _dim(key, [part[key] for part in parts], width) for key in matrices}
    sizes = {split_key(key)[0]: first[key].shape[1] for key, dim in dims.items() if dim == 1}  # of inner layers
    for key, tensor in first.items():
        own = [part[key] for part in parts]
        module = split_key(key)[0]
        dim = dims.get(key)
        if key not in dims:
            dim = 0 if dims.get(f"{module}.weight") == 0 else None
        if dim is None:
            if key not in dims and not _are_equal(own):
                raise CheckpointError(f"{key} {list(tensor.shape)} is not the same in all parts. Nothing was read.")
            done["alike in all"] += 1
            yield key, tensor
            continue
        done["by columns" if dim else "by rows"] += 1
        after = next((size for name, size in sizes.items() if split_key(name)[0] == split_key(module)[0]), 0)
        is_pair = is_gated and not dim and tensor.shape[0] == 2 * after  # a gate and what it gates, in each part
        shape = list(tensor.shape)
        shape[dim] *= len(parts)
        yield key, StoredTensor(tuple(shape), tensor.dtype, partial(_concatenated, own, dim, is_pair))


def _concatenated(own: Sequence[Value], dim: int, is_pair: bool) -> Tensor:
    found = [tensor_of(value) for value in own]
    return torch.cat([each.chunk(2)[place] for place in (0, 1) for each in found] if is_pair else found, dim)


def _dim(key: str, own: Sequence[Value], width: int) -> int | None:
    """Return the dimension along which a matrix was split, None for one that was not."""
    rows, columns = own[0].shape[:2]
    if _are_equal(own):
        return None
    fits = [rows != width == columns, columns != width and width in (rows, columns * len(own))]
    if rows == columns == width:  # of four parts, those of both layers of an MLP are squares
        fits = [bool(names.search(key)) for names in (_BY_ROWS, _BY_COLUMNS)]
    if len(own[0].shape) > 2 or sum(fits) != 1:
        raise CheckpointError(
            f"{key} {list(own[0].shape)} is one of {len(own)} parts, and that the network is {width} wide does not "
            "tell along which dimension they are to be joined. Nothing was read. Convert it with its own tools."
        )
    return fits.index(True)


def _are_equal(values: Sequence[Value]) -> bool:
    first, *rest = (tensor_of(value).reshape(-1) for value in values)
    return all(torch.equal(first[:_SAMPLE], each[:_SAMPLE]) and torch.equal(first, each) for each in rest)
