"""Checkpoints that are elsewhere: ``hf://owner/name`` through huggingface_hub, ``https://`` through torch.hub.

Both keep what they download in their own caches. Of a repository only the files of one checkpoint are downloaded.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

from autoalign.errors import CheckpointError, DependencyError
from autoalign.formats.sharded import index_of

_SCHEMES = ("hf://", "https://", "http://")
_LOCAL = frozenset({"127.0.0.1", "::1", "localhost"})
_REPOSITORY = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[^@]+?))?(?P<path>(/[^/@]+)*)/?")
_HASH = re.compile(r"-([a-f0-9]{8,64})\.[^.]+$")  # torch.hub's way to put the begin of a file's SHA-256 in its name
_KINDS = (  # of files, in the order of preference
    *(r"[^.]*\.safetensors\.index\.json", r"[^.]*\.safetensors", r"[^.]*\.bin\.index\.json", r"[^.]*\.bin"),
    *(r".*\.safetensors\.index.*\.json", r".*\.safetensors", r"[^.]*\.(pth|pt|ckpt)", r".*\.msgpack", r".*\.npz"),
    *(r".*\.gguf",),
)
_BESIDE = ("config.json", "adapter_config.json")  # what says more of the network
_NO_MODEL = re.compile(r"(optimizer|scheduler|scaler|rng_state|training_args|random_states|tokenizer)", re.IGNORECASE)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the address of something to download."""
    return isinstance(path, str) and path.startswith(_SCHEMES)


def downloaded(address: str) -> Path:
    """Download a checkpoint, unless it was before, and say where it is.

    Args:
        address: ``hf://owner/name``, optionally with ``@revision`` and then the path of a file or folder in it; or
            ``https://...`` of a file or of the index of a sharded checkpoint. A fragment ``#sha256=...`` there, or a
            hash in the file's name as torch.hub has them, must be that of the file. Plain ``http://`` is for this
            machine only, since what it brings can be changed on the way.

    Raises:
        CheckpointError: There is no such checkpoint, it is not the one that its hash says, or it cannot be reached.
        DependencyError: The package huggingface_hub is not installed.
    """
    if address.startswith("hf://"):
        return _from_hub(address)
    parts = urlsplit(address)
    if parts.scheme == "http" and parts.hostname not in _LOCAL:
        raise CheckpointError(
            f"{address!r} would come by plain http, where anyone on the way can change it. Nothing was downloaded. "
            "Use https, or download the file and check it yourself."
        )
    return _from_address(address)


def _from_address(address: str) -> Path:
    import torch

    address, _, fragment = address.partition("#")
    name = PurePosixPath(unquote(urlsplit(address).path)).name
    if not name:
        raise CheckpointError(f"{address!r} names no file. Nothing was downloaded.")
    # files of one name from several places are kept apart
    folder = (
        Path(torch.hub.get_dir()) / "checkpoints" / f"autoalign-{hashlib.sha256(address.encode()).hexdigest()[:16]}"
    )
    wanted = re.fullmatch(r"sha256=([0-9a-fA-F]{8,64})", fragment)
    if fragment and wanted is None:
        raise CheckpointError(f"#{fragment} is no hash such as #sha256=0123456789abcdef. Nothing was downloaded.")
    found = _HASH.search(name)
    file = _download(address, folder / name, wanted[1].lower() if wanted else found[1] if found else None)
    if name.endswith(".json"):
        for shard in sorted(_inside(file)):
            _download(urljoin(address, shard), folder / shard, None)
    return file


def _download(address: str, file: Path, hash_prefix: str | None) -> Path:
    import torch

    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(address, str(file), hash_prefix, progress=sys.stderr.isatty())
        except Exception as error:  # of the network, of the disk, or of the hash
            raise _unreachable(address, error) from error
    elif hash_prefix is not None and not _sha256(file).startswith(hash_prefix):
        raise CheckpointError(
            f"{str(file)!r} was downloaded before and has another hash than {hash_prefix}. Delete it."
        )
    return file


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _from_hub(address: str) -> Path:
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError as error:
        raise DependencyError.reading("hf:// addresses", "huggingface_hub", "hub") from error

    found = _REPOSITORY.fullmatch(address.removeprefix("hf://"))
    if found is None:
        raise CheckpointError(
            f"{address!r} is no address such as 'hf://owner/name', 'hf://owner/name@revision' or "
            "'hf://owner/name/file.safetensors'. Nothing was downloaded."
        )
    where: dict[str, Any] = {"repo_id": found["name"], "revision": found["revision"]}
    where["endpoint"] = os.environ.get("HF_ENDPOINT") or None
    within = found["path"].strip("/")

    def snapshot(names: Iterable[str], **options: Any) -> Path:
        return Path(snapshot_download(**where, allow_patterns=[glob.escape(name) for name in names], **options))

    try:
        api = HfApi(endpoint=where["endpoint"])
        try:
            info = api.model_info(where["repo_id"], revision=where["revision"])
            names = [file.rfilename for file in info.siblings or ()]
        except Exception as error:
            if getattr(error, "response", None) is not None:  # the hub was reached and refused
                raise
            return _found_locally(snapshot, within, address, error)
        chosen = _chosen(names, within, address)
        beside = [str(PurePosixPath(chosen).parent / name) for name in _BESIDE]
        folder = snapshot([chosen, *(name for name in beside if name in names)])
        if chosen.endswith(".index.json"):
            where["revision"] = folder.name  # the commit, so that all are of the same
            snapshot(str(PurePosixPath(chosen).parent / shard) for shard in _inside(folder / chosen))
    except CheckpointError:
        raise
    except Exception as error:  # of the network, of the hub, or of the disk
        raise _unreachable(address, error) from error
    return folder / chosen


def _found_locally(snapshot: Callable[..., Path], within: str, address: str, error: Exception) -> Path:
    """Find what was downloaded before, where the hub cannot be reached."""
    try:
        folder = snapshot([], local_files_only=True)
    except Exception:
        raise error from None
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return folder / _chosen(names, within, address)


def _chosen(names: Sequence[str], within: str, address: str) -> str:
    """Choose the checkpoint among the files of a repository."""
    if within in names:
        return within
    inside = [PurePosixPath(name) for name in names if str(PurePosixPath(name).parent) == (within or ".")]
    for kind in _KINDS:
        found = [path for path in inside if re.fullmatch(kind, path.name) and not _NO_MODEL.search(path.name)]
        if len(found) == 1:
            return str(found[0])
        if found:
            named = ", ".join(str(path) for path in found[:3])
            raise CheckpointError(
                f"{address!r} holds several checkpoints, such as {named}. Nothing was downloaded. Name one of them: "
                f"{address.rstrip('/')}/{found[0].name}."
            )
    listed = ", ".join(sorted(names)[:5]) or "nothing"
    raise CheckpointError(f"{address!r} holds no checkpoint. Nothing was downloaded. It has {listed}.")


def _inside(index: Path) -> set[str]:
    """List the files of an index, all of which must be beside it."""
    names = set(index_of(index).values())
    outside = [name for name in names if PurePosixPath(name).name != name or "\\" in name]
    if outside:
        raise CheckpointError(
            f"The index {str(index)!r} lists {outside[0]!r}, which is not beside it. It was not fetched."
        )
    return names


def _unreachable(address: str, error: Exception) -> CheckpointError:
    lines = str(error).strip().splitlines() or [""]
    return CheckpointError(f"{address!r} could not be downloaded ({type(error).__name__}: {lines[0]}).")
