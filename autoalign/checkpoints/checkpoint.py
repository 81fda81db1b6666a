"""Checkpoints: one side of an alignment, whatever it was given as, with its tensors read only when asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from autoalign.checkpoints.config import Config, folder_config, header_config, module_config, saved_config
from autoalign.checkpoints.containers import Container, containers_of, copies_of, named_container, preferred
from autoalign.checkpoints.formats.detection import format_of
from autoalign.checkpoints.paths import Given, is_given, open_given
from autoalign.errors import CheckpointError, InputError, kind_of, listed
from autoalign.plan.keys import LEVELS
from autoalign.plan.matches import Caution
from autoalign.plan.quantised import Members, groups_of
from autoalign.plan.regions import Region, narrowed
from autoalign.plan.specs import TensorSpec

if TYPE_CHECKING:
    import networkx as nx

Side: TypeAlias = nn.Module | Mapping[str, object] | Given


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint(Mapping[str, Tensor]):
    """A state dict whose keys, shapes and dtypes are known and whose tensors are read lazily, without gradients.

    >>> import torch
    >>> checkpoint = checkpoint_of({"epoch": 3, "model": {"fc.weight": torch.ones(2, 3)}})
    >>> checkpoint
    <Checkpoint: 1 tensors, 6 elements, float32, container 'model'>
    >>> checkpoint["fc.weight"]
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """

    specs: tuple[TensorSpec, ...]
    read: Callable[[str], Tensor]  # from a key of `specs` to its tensor
    read_region: Callable[[str, Region], Tensor] | None = None  # a part of a tensor; None where that is read as a whole
    is_resident: bool = False  # all is in memory or mapped: reading allocates nothing and cannot fail
    path: str | None = None  # of the file; None for what was in memory
    opened: tuple[tuple[Path, os.stat_result], ...] = ()  # the files as they were when they were opened
    container: str = ""  # dotted path of the state dict that was taken, '' for the top level
    containers: tuple[str, ...] = ("",)  # all that could have been taken
    copies: tuple[str, ...] = ()  # others of these with tensors of the same shapes, where nobody said which to take
    is_decided: bool = True  # names speak for this one, against each of these copies
    notes: tuple[str, ...] = ()  # statements for the report
    metadata: Mapping[str, str] = field(default_factory=dict)  # a safetensors file's own
    extras: Mapping[str, object] = field(
        default_factory=dict
    )  # all values but tensors, and each module's `_extra_state`
    config: Mapping[str, object] = field(default_factory=dict)  # its makers' own, as it is; {} where there is none
    state_metadata: Mapping[str, Mapping[str, object]] | None = None  # a torch state dict's `_metadata`
    root: Mapping[str, object] | None = None  # the whole of what the containers are in
    left_out: tuple[TensorSpec, ...] = ()  # packed tensors, as quantised ones are, which are not in `specs`
    module: nn.Module | None = None  # the module whose state dict this is, where it was given as one

    @cached_property
    def _spec_of(self) -> dict[str, TensorSpec]:
        return {spec.key: spec for spec in self.specs}

    @property
    def all_specs(self) -> tuple[TensorSpec, ...]:
        """``specs``, then what was left out."""
        return (*self.specs, *self.left_out)

    @cached_property
    def quantised(self) -> Members:
        """The tensors that are values only together with others, and these, by key."""
        return groups_of(self.all_specs)

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._spec_of:
            raise KeyError(key)
        return self.read(key)

    @property
    def format(self) -> str | None:
        """What its file is of, such as ``"safetensors"``; None if it is several files, or was in memory."""
        return format_of(self.opened[0][0]) if len(self.opened) == 1 else None

    def spec(self, key: str) -> TensorSpec:
        """Return what is known of a tensor."""
        return self._spec_of[key]

    def region(self, key: str, region: Region) -> Tensor:
        """Read the part of a tensor that starts, in each dimension, at the first number and is as long as the second.

        Mapped files and pieces of distributed checkpoints are read in this part only, other formats as a whole.

        >>> import torch
        >>> checkpoint_of({"a": torch.arange(6).reshape(2, 3)}).region("a", ((1, 1), (0, 2)))
        tensor([[3, 4]])
        """
        return narrowed(self[key], region) if self.read_region is None else self.read_region(key, region)

    def to_networkx(self) -> nx.DiGraph:
        """Return the tree of modules, with an edge from each to what it holds, as a graph; no tensor is read.

        Nodes are named ``"tensor:KEY"`` and ``"module:PATH"``; the path of the whole is empty. All have ``kind``,
        ``path`` (of a tensor, its key) and ``elements``, tensors ``shape`` and ``dtype``, and modules ``tensors``, the
        number of tensors in them. All attributes are texts and numbers.

        >>> import networkx, torch
        >>> keys = [f"layers.{i}.fc.{leaf}" for i in range(2) for leaf in ("weight", "bias")]
        >>> tree = checkpoint_of({key: torch.ones(2) for key in keys}).to_networkx()
        >>> tree.nodes["module:layers"]
        {'kind': 'module', 'path': 'layers', 'tensors': 4, 'elements': 8}
        >>> list(tree["module:layers"])
        ['module:layers.0', 'module:layers.1']
        >>> networkx.is_arborescence(tree)
        True
        """
        return module_graph(self.all_specs)

    def require_unchanged(self, advice: str = "Nothing was read. Open it again when it is complete.") -> None:
        """Make sure that no file was written to since it was opened: mapped data that was cut off ends a process.

        Replacing a file by another is no change: what has the first one open still reads that.

        Args:
            advice: What was not done, and what to do.

        Raises:
            CheckpointError: One was.
        """
        for path, before in self.opened:
            try:
                now = path.stat()
            except OSError:  # deleted, but still there for what has it open
                continue
            same = (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
            if now.st_ino == before.st_ino and not same:
                raise CheckpointError(
                    f"{str(path)!r} was changed after it was opened: it has {now.st_size:,} bytes and had "
                    f"{before.st_size:,}. {advice}"
                )

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


def open_checkpoint(path: Given, *, container: str | None = None) -> Checkpoint:
    """Open a file or a folder of any format, told by its content, without reading tensor data where that is possible.

    Formats are safetensors, files of torch (of ``torch.save``, Lightning, DeepSpeed's merged ones), TorchScript
    archives, npz files, GGUF, msgpack and HDF5 files (which need ``autoalign[formats]``), sharded checkpoints with or
    without an index, folders as Hugging Face, PEFT and training scripts leave them, of DeepSpeed's ZeRO (put together
    in float32), of ``torch.distributed.checkpoint``, and of layers and parts of tensor parallelism (GPT-NeoX, Megatron,
    Meta; joined where a configuration says how). Files in archives are read where they stand, unless these are packed.

    No code of a file ever runs: pickles are read without looking up what classes and functions they name, or by torch
    with ``weights_only=True``. Tensors are kept, also those of whole modules, and a note says what was ignored.
    Tensors are mapped into memory or read one by one; only msgpack files and older ones of torch are read as a whole.
    Mapping is what makes this fast, and its price is that a file that another process cuts while a tensor of it is used
    ends this one; put a new file in its place instead of writing to it, as ``convert`` does.

    Args:
        path: A file, the index of a sharded checkpoint, or a folder, also with ``~``. Several files are one checkpoint:
            a pattern, such as ``"model-*.safetensors"``, or a list. Or an address: ``hf://owner/name``, optionally
            with ``@revision`` and the path of a file in it, or ``https://...`` of a file or an index; what it leads to
            is downloaded once (see ``autoalign.checkpoints.remote``). Or a file that is open for reading bytes, such as
            ``io.BytesIO``, of which a temporary copy is made.
        container: Which of several state dicts in the file to take, by its dotted path, such as ``"ema"``; by
            default the one that ``checkpoints.containers.preferred`` names. ``notes`` says which one was taken.

    Raises:
        CheckpointError: The file cannot be read, holds no tensors, or has no such container; or there are several in
            the folder.
        InputError: It is not a path.
        DependencyError: The package that reads the format is not installed.
        UnsafeCheckpointError: The file is of a class that only code of others can read.
    """
    try:
        contents, files, name = open_given(path)
    except OSError as error:  # such as of a name that is too long
        raise CheckpointError(f"{str(path)!r} could not be read: {error.strerror}. Nothing was read.") from error
    if container and contents.flat:
        raise CheckpointError(f"{name!r} is a flat {contents.flat} without containers, such as {container!r}.")
    try:
        checkpoint = _of_mapping(contents.root, container, name)
    except InputError as error:
        raise CheckpointError(f"{name!r} cannot be used. {error}") from error
    config, notes = Config(), tuple[str, ...]()
    for folder in dict.fromkeys(file if file.is_dir() else file.parent for file in files):  # the first wins
        found, more = folder_config(folder)
        config, notes = found | config, notes + more
    return replace(
        checkpoint,
        path=name,
        opened=contents.opened,
        notes=(*checkpoint.notes, *contents.notes, *notes),
        metadata=contents.metadata,
        config={**config, **header_config(contents.metadata), **contents.config, **checkpoint.config},
    )


def checkpoint_of(side: Side, *, container: str | None = None) -> Checkpoint:
    """Return one side of an alignment as a checkpoint; the side itself is not changed.

    Args:
        side: A module, a path, an open checkpoint, or a mapping of tensors or numpy arrays, nested as training scripts
            save it. A module's tied parameters keep an equal ``storage`` in ``specs``.
        container: As in ``open_checkpoint``.

    Raises:
        InputError: The side is of another kind, a mapping without tensors, or a module with uninitialized parameters.
        CheckpointError: As in ``open_checkpoint``.
    """
    if isinstance(side, Checkpoint):
        if container is None or (container == side.container and not side.copies):
            return side
        other = _of_mapping(side if side.root is None else side.root, container, side.path)
        return replace(other, opened=side.opened, metadata=side.metadata, config={**side.config, **other.config})
    if isinstance(side, nn.Module):
        lazy = uninitialized(side)
        if lazy:
            raise InputError(
                f"{len(lazy)} tensors of {type(side).__name__} have no shape yet: {', '.join(list(lazy)[:3])}. Nothing "
                "was aligned. Call the model once on an example input, which initializes lazy modules; load, too, "
                "gives them the shapes of tensors with their names."
            )
        return of_module(side, side.state_dict(keep_vars=True), container=container)
    if isinstance(side, Mapping):
        return _of_mapping(side, container)
    if is_given(side):
        return open_checkpoint(side, container=container)
    raise InputError(
        f"Expected an nn.Module, a mapping of tensors, a path or a Checkpoint, not {kind_of(side)}. "
        "Nothing was aligned."
    )


def uninitialized(module: nn.Module) -> dict[str, Tensor]:
    """List the tensors of a module that have no shape yet."""
    items = module.state_dict(keep_vars=True).items()
    return {key: value for key, value in items if isinstance(value, Tensor) and is_lazy(value)}


def of_module(module: nn.Module, state_dict: Mapping[str, object], *, container: str | None = None) -> Checkpoint:
    """Return the state dict of a module as a checkpoint that knows the module."""
    checkpoint = _of_mapping(state_dict, container)
    config, notes = module_config(module)
    return replace(checkpoint, module=module, config=config, notes=(*checkpoint.notes, *notes))


def _of_mapping(root: Mapping[str, object], container: str | None, path: str | None = None) -> Checkpoint:
    if container is not None and not isinstance(container, str):
        raise InputError(f"container= takes a name, not {type(container).__name__}. Nothing was aligned.")
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
    packed = {entry.spec: kind for entry in chosen.entries if (kind := entry.packing())}
    if packed:
        chosen = replace(chosen, entries=tuple(entry for entry in chosen.entries if entry.spec not in packed))
    entries = {entry.spec.key: entry for entry in chosen.entries}
    notes = []
    if packed:
        names = listed([f"{spec.key} ({kind})" for spec, kind in packed.items()])
        notes.append(
            f"{len(packed)} tensors are quantised or packed in another way, and their elements are not values: they "
            f"were left out: {names}. Load before quantising, or dequantise first."
        )
    copies, is_decided = copies_of(chosen, containers) if container is None else ([], True)
    if len(containers) > 1 and container is None:
        others = ", ".join(str(other) for other in containers if other.path != chosen.path)
        note = (
            f"The container {chosen} was taken, trained weights and well-known names first. "
            f"Pass container= to take another: {others}."
            if is_decided
            else f"The container {chosen} is one of {len(copies) + 1} that nothing tells apart, and nothing is loaded. "
            f"Pass container= to choose: {chosen}, {others}."
        )
        notes.append(Caution(note) if copies else note)
    return Checkpoint(
        specs=tuple(entry.spec for entry in chosen.entries),
        read=lambda key: entries[key].read(),
        read_region=lambda key, region: entries[key].read_region(region),
        is_resident=all(entry.is_resident for entry in chosen.entries),
        path=path,
        container=chosen.path,
        containers=tuple(other.path for other in containers),
        copies=tuple(copy.path for copy in copies),
        is_decided=is_decided,
        notes=tuple(notes),
        extras=chosen.extras,
        config=saved_config(root, chosen.path),
        state_metadata=chosen.state_metadata,
        root=root,
        left_out=tuple(packed),
    )


def module_graph(specs: Iterable[TensorSpec], status: Mapping[str, str] | None = None) -> nx.DiGraph:
    """Build the tree of the modules and tensors of one side, as ``Checkpoint.to_networkx``.

    >>> import torch
    >>> graph = module_graph([TensorSpec("fc.weight", (2, 3), torch.float32)])
    >>> list(graph.edges)
    [('module:', 'module:fc'), ('module:fc', 'tensor:fc.weight')]
    >>> graph.nodes["module:fc"]
    {'kind': 'module', 'path': 'fc', 'tensors': 1, 'elements': 6}
    >>> graph.nodes["tensor:fc.weight"]
    {'kind': 'tensor', 'path': 'fc.weight', 'shape': '[2, 3]', 'dtype': 'float32', 'elements': 6}

    Args:
        specs: The tensors, in order.
        status: That of each key, for an attribute ``status``; that of a module is that of all tensors in it, or
            ``"mixed"``.
    """
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_node("module:", kind="module", path="")
    for spec in specs:
        above = "module:"
        *parts, _ = spec.key.split(".", LEVELS)
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            module = f"module:{path}"
            if module not in graph:
                graph.add_node(module, kind="module", path=path)
                graph.add_edge(above, module, relation="contains")
            above = module
        tensor = f"tensor:{spec.key}"
        facts = {"shape": str(list(spec.shape)), "dtype": spec.dtype_name, "elements": spec.numel}
        graph.add_node(tensor, kind="tensor", path=spec.key, **facts)
        if status is not None:
            graph.nodes[tensor]["status"] = status[spec.key]
        graph.add_edge(above, tensor, relation="contains")
    for node in reversed(list(nx.topological_sort(graph))):
        data, inner = graph.nodes[node], [graph.nodes[child] for child in graph[node]]
        if data["kind"] == "module":
            data["tensors"] = sum(child.get("tensors", 1) for child in inner)
            data["elements"] = sum(child["elements"] for child in inner)
            if status is not None:
                found = {child["status"] for child in inner}
                data["status"] = found.pop() if len(found) == 1 else "mixed"
    return graph
