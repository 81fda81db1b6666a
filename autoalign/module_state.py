"""What a module's state dict holds beside its tensors: versions, extra states, and counters that old ones lack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from autoalign.alignment import Alignment
from autoalign.checkpoint import Checkpoint
from autoalign.names import LEVELS
from autoalign.operations import Copy


def source_modules(alignment: Alignment) -> dict[str, str]:
    """Map each of the model's modules to the checkpoint's, where everything that was found for it comes from one.

    Modules correspond if the rest of the keys below them is the same.
    """
    found: dict[str, set[str]] = {}
    for source_key, key in alignment.mapping.items():
        theirs, ours = source_key.rsplit(".", LEVELS), key.rsplit(".", LEVELS)
        while theirs and ours and theirs[-1] == ours[-1]:
            del theirs[-1], ours[-1]
            found.setdefault(".".join(ours), set()).add(".".join(theirs))
    return {module: sources.pop() for module, sources in found.items() if len(sources) == 1}


def absent_counters(
    model: nn.Module, source: Checkpoint, alignment: Alignment, modules: Mapping[str, str]
) -> frozenset[str]:
    """List the BatchNorm counters that a checkpoint has not got because it is older than they are.

    As with torch, such a counter is not missing: BatchNorm's version is below 2 or unknown.
    """
    versions = source.state_metadata or {}
    own_modules = dict(model.named_modules(remove_duplicate=False))
    matched = {match.target.rpartition(".")[0] for match in alignment.matches}
    counters = set()
    for key, status in alignment.status.items():
        path, _, name = key.rpartition(".")
        if name != "num_batches_tracked" or status != "missing" or key in alignment.excluded or path not in matched:
            continue
        origin = modules.get(path)
        if not isinstance(own_modules.get(path), _NormBase):
            continue
        if origin is not None:
            version = versions.get(origin, {}).get("version")
            if f"{origin}.{name}".lstrip(".") in source or (isinstance(version, int) and version >= 2):
                continue
        counters.add(key)
    return frozenset(counters)


def without_counters(alignment: Alignment, counters: frozenset[str], fate: str) -> Alignment:
    """Take the counters that a checkpoint is too old for out of what an alignment is to fill, with a note."""
    if not counters:
        return alignment
    kept = tuple(spec for spec in alignment.target_specs if spec.key not in counters)
    note = f"{len(counters)} num_batches_tracked {fate}: the checkpoint is from before torch had them."
    return replace(alignment, target_specs=kept, notes=(*alignment.notes, note))


def extra_states(source: Checkpoint, targets: Mapping[str, object], modules: Mapping[str, str]) -> dict[str, object]:
    """Find the extra state of each module that has one in the checkpoint's module that corresponds to it."""
    own = {key: translated(key, modules) for key in targets if key.rpartition(".")[2] == "_extra_state"}
    return {key: source.extras[source_key] for key, source_key in own.items() if source_key in source.extras}


def translated(key: str, modules: Mapping[str, str]) -> str:
    """Translate a key by the nearest module above it that corresponds, since its own may hold no tensors."""
    parts = key.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        origin = modules.get(".".join(parts[:depth]))
        if origin is not None:
            return ".".join(filter(None, (origin, *parts[depth:])))
    return key


def state_metadata(
    source: Checkpoint,
    alignment: Alignment,
    targets: Mapping[str, Tensor],
    modules: Mapping[str, str],
    counters: frozenset[str],
) -> dict[str, dict[str, object]]:
    """Say which version each module's tensors are of, for the upgrades that modules do on their own.

    A module whose tensors were all found as they are, under their own names, may be of the checkpoint's version. The
    rest was brought into the model's own layout already, so it is of the model's own version.
    """
    metadata = {path: dict(entry) for path, entry in getattr(targets, "_metadata", {}).items()}
    as_they_are = {
        match.target
        for match in alignment.matches
        if isinstance(match.operation, Copy) and match.target.rpartition(".")[2] == match.sources[0].rpartition(".")[2]
    }
    changed = {spec.key.rpartition(".")[0] for spec in alignment.target_specs if spec.key not in as_they_are}
    direct = {key.rpartition(".")[0] for key in as_they_are} - changed
    versions = source.state_metadata or {}
    for path, origin in modules.items():
        if path in direct and origin in versions:
            metadata[path] = dict(versions[origin])
    metadata.update((key.rpartition(".")[0], {}) for key in counters)  # so that torch makes them up
    return metadata
