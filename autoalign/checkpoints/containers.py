"""Containers: which mappings inside a nested checkpoint are state dicts, and which of them is meant.

A training script saves several state dicts in one file. They are found by structure: every mapping with tensors below
it counts, whatever it is called, except the state of optimizers, schedulers and the like. A tree of mappings that
mirrors the module tree is one state dict, with joined keys, and so are trees of the same modules with different
tensors, as Flax keeps parameters and batch statistics apart.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np
from torch import Tensor

from autoalign.checkpoints.stored import StoredTensor, as_tensor, region_of, torch_dtype
from autoalign.errors import CheckpointError, InputError, did_you_mean
from autoalign.plan.regions import Region, narrowed
from autoalign.plan.specs import TensorSpec, packing_of, spec_of

# words in the names that people give to what they save; "model_state_dict" has three of them
_MODEL_WORDS = frozenset({"state", "model", "module", "net", "network", "student", "online", "generator", "params"})
_RIVAL_WORDS = frozenset({"discriminator", "critic", "d"})  # trained beside the model and seldom wanted: "net_d"
COPY_WORDS = frozenset({"ema", "teacher", "momentum", "target", "swa", "average", "averaged", "shadow"})
TRAINING_WORDS = frozenset(
    {"optimizer", "optimizers", "optim", "opt", "scaler", "scheduler", "schedulers", "amp", "rng", "callbacks", "loops"}
)
_PACKED = "_packed_params._packed_params"  # the end of the key of what torch's own quantised layers pack
_MIN_SHARED_SHAPES = 0.8  # share of the tensors of a state dict whose shapes a copy of it has
_MAX_SIZE_RATIO = 10  # of the largest state dict to one that is preferred
_MAX_DEPTH, _MAX_MAPPINGS = 64, 2**18  # mappings in each other, and in all


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a state dict and where it is kept, so that it is read only when it is asked for."""

    spec: TensorSpec
    owner: Mapping[str, object] = field(repr=False)
    name: str  # the tensor's key in its owner

    def read(self) -> Tensor:
        """Read the tensor, without its gradient history; a numpy array becomes a tensor over the same memory."""
        value = self.owner[self.name]
        if isinstance(value, Tensor):
            return value.detach()
        if isinstance(value, StoredTensor):
            return value.read()
        if isinstance(value, np.ndarray):
            return as_tensor(value, self.spec.dtype)
        raise InputError(f"{self.spec} was a tensor when the mapping was opened and is a {type(value)} now.")

    def read_region(self, region: Region) -> Tensor:
        """Read a part of the tensor; most formats give a view of what is mapped, or read the whole."""
        value = self.owner[self.name]
        return region_of(value, region) if isinstance(value, StoredTensor) else narrowed(self.read(), region)

    def packing(self) -> str | None:
        """Return the kind of a tensor whose elements are not its values, else None."""
        if type(self.owner) not in (dict, OrderedDict):
            return None
        value = self.owner[self.name]
        return packing_of(value) if isinstance(value, Tensor) else None

    @property
    def is_resident(self) -> bool:
        """True if reading the tensor allocates nothing and cannot fail."""
        if type(self.owner) not in (dict, OrderedDict):  # one that makes its values when asked may do anything
            return False
        value = self.owner[self.name]
        return value.is_mapped if isinstance(value, StoredTensor) else isinstance(value, Tensor)


@dataclass(frozen=True, slots=True)
class Container:
    """A mapping that is taken as one state dict."""

    path: str  # dotted, '' for the top level
    entries: tuple[Entry, ...]  # in the mapping's order
    extras: Mapping[str, object]  # all values but tensors, and each module's `_extra_state`
    state_metadata: Mapping[str, Mapping[str, object]] | None  # the `_metadata` of torch's state dicts, by module

    def __str__(self) -> str:
        return f"{self.path!r} ({len(self.entries)} tensors)"


@dataclass(frozen=True, slots=True)
class _Node:
    """A mapping of a checkpoint, without the mappings that hold no tensors."""

    owner: Mapping[str, object]
    children: dict[str, Entry | _Node]  # in one dict, because their order counts
    extras: dict[str, object]

    def nodes(self) -> dict[str, _Node]:
        return {name: child for name, child in self.children.items() if isinstance(child, _Node)}


def containers_of(root: Mapping[str, object]) -> tuple[Container, ...]:
    """Find the state dicts in a checkpoint, in its order; it is read once and not changed.

    >>> weight = np.zeros((2, 2))
    >>> saved = {"epoch": 3, "model": {"fc.weight": weight}, "optimizer": {"state": {0: {"exp_avg": weight}}}}
    >>> print(*containers_of(saved))
    'model' (1 tensors)
    >>> (tree,) = containers_of({"conv": {"weight": weight}, "fc": {"weight": weight}})
    >>> [entry.spec.key for entry in tree.entries]
    ['conv.weight', 'fc.weight']

    Raises:
        InputError: A numpy array is of a dtype that torch does not have, or the mappings do not end.
    """
    return tuple(_candidates(_tree(root, 0, count()), ""))


def preferred(containers: Sequence[Container]) -> Container:
    """Choose among several state dicts.

    One with less than a tenth of the tensors of the largest is passed over. Then weights as they were trained come
    before averaged copies of them (``ema``, ``teacher``, ``momentum``, ``swa``), well-known names (``state_dict``,
    ``model``, ``net``, ``student``, ``generator``) before others and before a discriminator, more tensors before
    fewer, and the first of equals.
    """
    largest = max(len(container.entries) for container in containers)

    def rank(container: Container) -> tuple[bool, tuple[bool, int], int]:
        size = len(container.entries)
        return _MAX_SIZE_RATIO * size < largest, _standing(container), -size

    return min(containers, key=rank)


def copies_of(chosen: Container, containers: Sequence[Container]) -> tuple[list[Container], bool]:
    """List the other state dicts that hold tensors of the same shapes.

    Returns:
        The copies; and True if the names speak for the chosen one, against each of them.
    """

    def shapes(container: Container) -> Counter[tuple[int, ...]]:
        return Counter(entry.spec.shape for entry in container.entries)

    own = shapes(chosen)
    copies = [
        other
        for other in containers
        if other is not chosen
        and (own & shapes(other)).total() >= _MIN_SHARED_SHAPES * max(len(chosen.entries), len(other.entries))
    ]
    return copies, all(_standing(chosen) < _standing(other) for other in copies)


def _standing(container: Container) -> tuple[bool, int]:
    """Rank a state dict by its path: weights before averages of them, then by how many names are not well known."""
    words = [name_words(name) for name in container.path.split(".")]
    unknown = sum(not found & (_MODEL_WORDS | COPY_WORDS) or bool(found & _RIVAL_WORDS) for found in words)
    return any(found & COPY_WORDS for found in words), unknown


def named_container(root: Mapping[str, object], name: str, containers: Sequence[Container]) -> Container:
    """Look up a state dict by its dotted path, the end of it or a word of its name, such as ema for model_ema.

    Any mapping with tensors below it can be named by its path.

    Raises:
        CheckpointError: No mapping with tensors has this name, or several have.
    """
    found = [container for container in containers if container.path == name]
    found = found or [container for container in containers if container.path.endswith(f".{name}")]
    if not found:
        nodes = [node for path, node in _paths(_tree(root, 0, count()), "") if path == name and node.children]
        found = [_state_dict(node, name) for node in nodes]
    found = found or [c for c in containers if name and name_words(name) <= name_words(c.path.rpartition(".")[2])]
    if len(found) == 1:
        return found[0]
    problem = "Several containers match" if found else "No container matches"
    raise CheckpointError(
        f"{problem} {name!r}, and none was taken in its place. "
        f"Name one of: {', '.join(map(str, found or containers)) or '(there are none)'}."
        f"{did_you_mean(name, [container.path for container in containers]) if not found else ''}"
    )


def _tree(mapping: Mapping[Any, object], depth: int, seen: Iterator[int]) -> _Node:
    if depth > _MAX_DEPTH or next(seen) >= _MAX_MAPPINGS:
        raise InputError(
            f"There are more than {_MAX_DEPTH} mappings in each other, or one holds itself, or there are more than "
            f"{_MAX_MAPPINGS} of them. Nothing was aligned. Give the state dict alone."
        )
    children: dict[str, Entry | _Node] = {}
    extras: dict[str, object] = {}
    for name, value in mapping.items():
        if not isinstance(name, str):  # an optimizer's state has integer keys
            continue
        if isinstance(value, list) and _are_parameters(name, value):
            value = {str(place): item for place, item in enumerate(value)}
        if name.endswith("_extra_state") and name.rpartition(".")[2] == "_extra_state":
            extras[name] = value
        elif isinstance(value, Tensor | StoredTensor) or (isinstance(value, np.ndarray) and _is_numeric(value)):
            children[name] = Entry(_spec(name, value, held=isinstance(mapping, dict)), mapping, name)
        elif isinstance(value, tuple) and name.endswith(_PACKED):
            children.update(_unpacked(name, value))
        elif not isinstance(value, Mapping):
            extras[name] = value
        elif not name_words(name) & TRAINING_WORDS:
            node = _tree(value, depth + 1, seen)
            if node.children:
                children[name] = node
            else:
                extras[name] = value
    return _Node(mapping, children, extras)


def _unpacked(name: str, value: tuple[object, ...]) -> Iterator[tuple[str, Entry]]:
    """Yield the weight and the bias of a layer that torch quantised, which are one value in its state dict."""
    owner = {key: part for key, part in zip(("weight", "bias"), value, strict=False) if isinstance(part, Tensor)}
    for part, tensor in owner.items():
        key = name.removesuffix(_PACKED) + part
        spec = spec_of(key, tensor)
        yield key, Entry(spec if spec.encoding else replace(spec, encoding="torch's packed bias"), owner, part)


def _are_parameters(name: str, items: Sequence[object]) -> bool:
    """Return True for parameters that are saved in their order without names, as averages of them often are."""
    are_tensors = bool(items) and all(isinstance(item, Tensor) for item in items)
    return are_tensors and bool(name_words(name) & (_MODEL_WORDS | COPY_WORDS))


def _is_numeric(array: np.ndarray) -> bool:
    return array.dtype.kind in "biufc" or (array.dtype.kind == "V" and array.dtype.names is None)


def _spec(key: str, value: Tensor | StoredTensor | np.ndarray, *, held: bool) -> TensorSpec:
    if isinstance(value, StoredTensor):
        return TensorSpec(key, value.shape, value.dtype, encoding=value.encoding)
    if isinstance(value, np.ndarray):
        dtype = torch_dtype(value.dtype)
        if dtype is None:
            raise InputError(
                f"{key} {list(value.shape)} is a numpy array of dtype {value.dtype}, which torch cannot take over. "
                "Nothing was aligned. Convert the array first, to float32 for example."
            )
        return TensorSpec(key, value.shape, dtype)
    # a mapping that makes its values when asked may have two of them in the same memory, one after the other
    return spec_of(key, value) if held else replace(spec_of(key, value), storage=None)


def _candidates(node: _Node, path: str) -> Iterator[Container]:
    nodes = node.nodes()
    if len(nodes) == len(node.children) == 1:
        ((name, child),) = nodes.items()
        yield from _candidates(child, _join(path, name))
    elif _are_apart(node):
        together = _collections(nodes)
        own = {name: child for name, child in node.children.items() if isinstance(child, Entry) or name in together}
        if own:
            yield _state_dict(replace(node, children=own), path)
        for name, child in nodes.items():
            if name not in together:
                yield from _candidates(child, _join(path, name))
    elif node.children:
        yield _state_dict(node, path)


def _are_apart(node: _Node) -> bool:
    """Return True if the mappings in a mapping are state dicts of their own and not parts of one."""
    nodes = node.nodes()
    if any("." in entry.name for _, entry in _flat(node, "")):  # there are whole state dicts, with joined keys
        return any(_has_named(name, child) for name, child in nodes.items()) or _has_copies(nodes.values())
    # In a tree of modules, `model` may as well be the module beside `lm_head`: what is below must tell.
    words = {name: name_words(name) for name in nodes}
    every = frozenset[str]().union(*words.values())
    if every & _RIVAL_WORDS and every & _MODEL_WORDS:
        return True
    keys = {name: frozenset(key for key, _ in _flat(child, "")) for name, child in nodes.items()}

    def are_copies(name: str, other: str) -> bool:
        shared = keys[name] & keys[other]
        nested = any("." in key for key in shared)  # while two layers have the same keys without being copies
        named = words[name] & COPY_WORDS and words[other] & _MODEL_WORDS
        return bool(2 * len(shared) >= min(len(keys[name]), len(keys[other])) and (nested or named))

    known = [name for name in nodes if words[name] & (_MODEL_WORDS | COPY_WORDS)]
    return any(are_copies(name, other) for name in known for other in nodes if name != other)


def _collections(nodes: Mapping[str, _Node]) -> frozenset[str]:
    """List the mappings that hold different tensors of the same modules: Flax's parameters and batch statistics.

    The same tensors of the same modules are those of a copy, or of another network.
    """
    taken: dict[str, frozenset[str]] = {}
    for name, node in nodes.items():
        if name_words(name) & (COPY_WORDS | _RIVAL_WORDS):
            continue
        keys = frozenset(key for key, _ in _flat(node, ""))
        modules = _modules(keys)
        known = frozenset().union(*taken.values())
        shared = modules & _modules(known)
        if not taken or (2 * len(shared) >= min(len(modules), len(_modules(known))) > 0 and not keys & known):
            taken[name] = keys
    return frozenset(taken) if len(taken) > 1 else frozenset()


def _modules(keys: Iterable[str]) -> frozenset[str]:
    return frozenset(module for key in keys if (module := key.rpartition(".")[0]))


def _has_named(name: str, node: _Node) -> bool:
    is_named = bool(name_words(name) & (_MODEL_WORDS | COPY_WORDS))
    return is_named or any(_has_named(*item) for item in node.nodes().items())


def _has_copies(nodes: Iterable[_Node]) -> bool:
    """Return True if two state dicts have the same keys and shapes; two layers of a module tree may, too."""
    seen: set[frozenset[tuple[str, tuple[int, ...]]]] = set()
    for node in nodes:
        entries = _state_dict(node, "").entries
        if any("." in entry.name for entry in entries):
            tensors = frozenset((entry.spec.key, entry.spec.shape) for entry in entries)
            if tensors in seen:
                return True
            seen.add(tensors)
    return False


def _state_dict(node: _Node, path: str) -> Container:
    entries: list[Entry] = []
    extras: dict[str, object] = {}
    state_metadata: dict[str, Mapping[str, object]] = {}
    for prefix, inner in _paths(node, ""):
        extras.update((_join(prefix, name), value) for name, value in inner.extras.items())
        modules: Mapping[str, Mapping[str, object]] = getattr(inner.owner, "_metadata", None) or {}
        state_metadata.update((_join(prefix, module), metadata) for module, metadata in modules.items())
    for key, entry in _flat(node, ""):
        entries.append(entry if entry.spec.key == key else replace(entry, spec=replace(entry.spec, key=key)))
    keys = Counter(entry.spec.key for entry in entries)
    if len(keys) < len(entries):
        raise InputError(
            f"Two tensors of the nested mappings have the key {keys.most_common(1)[0][0]!r}. Nothing was aligned. "
            "Give one of the mappings alone."
        )
    return Container(path, tuple(entries), extras, state_metadata or None)


def _flat(node: _Node, path: str) -> Iterator[tuple[str, Entry]]:
    for name, child in node.children.items():
        key = _join(path, name)
        if isinstance(child, Entry):
            yield key, child
        else:
            yield from _flat(child, key)


def _paths(node: _Node, path: str) -> Iterator[tuple[str, _Node]]:
    yield path, node
    for name, child in node.nodes().items():
        yield from _paths(child, _join(path, name))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def name_words(name: str) -> frozenset[str]:
    """Split a name into its words: ``"EMAModel_2"`` has the words ema and model."""
    return frozenset(word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name))
