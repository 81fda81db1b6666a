"""Configurations: what a model's makers wrote down about it, found beside a checkpoint, in it, or at a module.

A configuration is kept as it is, as far as it is plain data (what JSON knows); what its names mean is the reader's
business. It is never required: one that cannot be read becomes a note.
"""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

# Names of the setting that rotates neighbouring rows of a query or key together, instead of the halves of each head.
ROTARY_SETTINGS: tuple[str, ...] = (
    "rotary_interleaved",
    "rotary_emb_interleaved",
    "rope_interleaved",
    "rope_interleave",
)

_FILES = ("config.json", "params.json", "adapter_config.json")  # of Hugging Face and many others, Meta, and PEFT
_KEYS = ("args", "config", "hparams", "hyper_parameters", "model_args")  # in saved mappings; later ones say more
_ATTRIBUTES = (*ROTARY_SETTINGS, "head_dim")  # of modules, that say what a config may say
_MAX_FILE_BYTES = 2**24
_MAX_VALUES = 2**16  # mappings and lists, since a script may have saved anything

Config = dict[str, object]


def folder_config(folder: Path) -> tuple[Config, tuple[str, ...]]:
    """Read the configurations in a folder, of which earlier ones win; also return notes on those that cannot be read.

    That of an adapter may stand beside that of its network.
    """
    config, notes = Config(), []
    for file in (folder / name for name in _FILES):
        try:
            if not file.is_file():
                continue
            if file.stat().st_size > _MAX_FILE_BYTES:
                raise ValueError(f"it has more than {_MAX_FILE_BYTES} bytes")
            found = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError(f"it holds a {type(found).__name__}")
            config = _plain_mapping(found) | config
        except (OSError, ValueError, RecursionError) as error:
            notes.append(f"The configuration {str(file)!r} was not read: {error}.")
    return config, tuple(notes)


def saved_config(root: Mapping[str, object], container: str) -> Config:
    """Gather the configurations that are saved along with a state dict, as ``config`` or ``hyper_parameters``.

    >>> saved_config({"model": {"a.weight": nn.Parameter()}, "args": {"n_head": 4}, "config": {"n_head": 8}}, "model")
    {'n_head': 8}

    Args:
        root: What was saved.
        container: The dotted path of the state dict; a configuration stands beside it or above it.
    """
    levels, node, rest = [root], root, container
    while rest:
        # a name may have dots of its own
        name = next((name for name in node if isinstance(name, str) and f"{rest}.".startswith(f"{name}.")), None)
        inner = None if name is None else node[name]
        if name is None or not isinstance(inner, Mapping):
            break
        node, rest = inner, rest[len(name) + 1 :]
        levels.append(node)
    config: Config = {}
    for level in levels:
        for key in _KEYS:
            value = level.get(key) if key in level else None
            value = getattr(value, "fields", value)  # of an object that was not made, such as an argparse.Namespace
            if isinstance(value, Mapping):
                config |= _plain_mapping(value)
    return config


def header_config(metadata: Mapping[str, str]) -> Config:
    """Read the configuration of an adapter that diffusers writes into the header of a safetensors file.

    >>> header_config({"lora_adapter_metadata": '{"r": 4, "lora_alpha": 8}'})
    {'r': 4, 'lora_alpha': 8}
    """
    try:
        found = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):  # it may say anything
        return {}
    return _plain_mapping(found) if isinstance(found, dict) else {}


def module_config(module: nn.Module) -> tuple[Config, tuple[str, ...]]:
    """Read the configuration of a module, or of the only one inside it; also return a note where that fails.

    >>> model = nn.Linear(2, 2)
    >>> model.config = {"num_heads": 4, "activation": nn.functional.gelu}
    >>> module_config(nn.Sequential(model))
    ({'num_heads': 4}, ())

    How it rotates queries and keys may also be set at the module itself.

    >>> model.rotary_interleaved = False
    >>> module_config(model)
    ({'num_heads': 4, 'rotary_interleaved': False}, ())
    """
    stated: Config = {}
    try:
        while True:
            found = {name: getattr(module, name, None) for name in _ATTRIBUTES}
            stated = {name: value for name, value in found.items() if isinstance(value, int)} | stated
            if hasattr(module, "config"):
                return _plain_mapping(_as_mapping(module.config)) | stated, ()
            children = list(islice(module.children(), 2))
            if len(children) != 1:
                return stated, ()
            (module,) = children
    except Exception as error:  # it is code of others
        return stated, (f"The configuration of {type(module).__name__} was not read: {type(error).__name__}: {error}.",)


def _as_mapping(config: object) -> Mapping[Any, object]:
    if isinstance(config, Mapping):
        return config
    to_dict = getattr(config, "to_dict", None)
    if callable(to_dict) and not isinstance(config, type):  # which says more than the fields of a dataclass
        found = to_dict()
        return found if isinstance(found, Mapping) else {}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    return vars(config) if isinstance(config, Namespace) else {}


def _plain_mapping(mapping: Mapping[Any, object]) -> Config:
    try:
        found = _plain(mapping, {})
    except RecursionError:  # lists in lists without end
        return {}
    return found if isinstance(found, dict) else {}


_OTHER = object()  # stands for what is not plain data


def _plain(value: object, known: dict[int, object]) -> object:
    """Convert a value to plain data; ``known`` has what each mapping and list became, since one may hold itself."""
    if value is None or isinstance(value, str | int | float):
        return value
    if id(value) in known:
        return known[id(value)]
    if len(known) >= _MAX_VALUES:
        return _OTHER
    known[id(value)] = _OTHER
    if isinstance(value, Mapping) or dataclasses.is_dataclass(value) or isinstance(value, Namespace):
        items = {str(key): _plain(item, known) for key, item in _as_mapping(value).items()}
        known[id(value)] = {key: item for key, item in items.items() if item is not _OTHER}
    elif isinstance(value, list | tuple):
        known[id(value)] = [item for item in (_plain(item, known) for item in value) if item is not _OTHER]
    return known[id(value)]
