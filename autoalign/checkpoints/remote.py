"""Remote checkpoints: ``hf://owner/name`` through huggingface_hub, ``https://`` by a request of our own.

Downloads are kept in the cache of huggingface_hub or of torch.hub. Of a repository only the files of one checkpoint are
downloaded.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

from autoalign.checkpoints.formats.detection import index_of
from autoalign.errors import CheckpointError, DependencyError

_SCHEMES = ("hf://", "https://", "http://")
_LOCAL = frozenset({"127.0.0.1", "::1", "localhost"})
_REPOSITORY = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[^@]+?))?(?P<path>(/[^/@]+)*)/?")
_HASH = re.compile(r"-([a-f0-9]{8,64})\.[^.]+$")  # torch.hub's way to put the begin of a file's SHA-256 in its name
_TIMEOUT_SECONDS = 30.0  # in which a server sends nothing
_MAX_BYTES = 2**40  # of a file whose server announces its size
_MAX_UNANNOUNCED_BYTES = 2**34
_BLOCK_BYTES = 2**20
_KINDS = (  # of files, in the order of preference
    *(r"[^.]*\.safetensors\.index\.json", r"[^.]*\.safetensors", r"[^.]*\.bin\.index\.json", r"[^.]*\.bin"),
    *(r".*\.safetensors\.index.*\.json", r".*\.safetensors", r"[^.]*\.(pth|pt|ckpt)", r".*\.msgpack", r".*\.npz"),
    *(r".*\.gguf",),
)
_CONFIG_FILES = ("config.json", "adapter_config.json")
_TRAINING_STATE = re.compile(
    "optimizer|scheduler|scaler|rng_state|training_args|random_states|tokenizer", re.IGNORECASE
)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Return True if a path is the address of something to download."""
    return isinstance(path, str) and path.startswith(_SCHEMES)


def downloaded(address: str) -> Path:
    """Download a checkpoint, unless it was before, and return the path of its file or index.

    Args:
        address: ``hf://owner/name``, optionally with ``@revision`` and then the path of a file or folder in it; or
            ``https://...`` of a file or of the index of a sharded checkpoint. A fragment ``#sha256=...`` there, or a
            hash in the file's name as torch.hub has them, must be that of the file. Plain ``http://`` is for this
            machine only, since what it brings can be changed on the way; redirects are followed to where ``https``
            goes, and on this machine if they come from it.

    Raises:
        CheckpointError: There is no such checkpoint, its hash is another, or it cannot be reached; the server sends
            nothing for 30 seconds, less than it announced, or more than the disk or the limit holds.
        DependencyError: The package huggingface_hub is not installed.
    """
    if address.startswith("hf://"):
        return _from_hub(address)
    if not _is_allowed(address, is_local=True):
        raise CheckpointError(
            f"{address!r} would come by plain http, where anyone on the way can change it. Nothing was downloaded. "
            "Use https, or download the file and check it yourself."
        )
    return _from_address(address)


def _is_allowed(address: str, *, is_local: bool) -> bool:
    """Return True if an address may be fetched, by this machine itself or else by another that redirects to it."""
    try:
        parts = urlsplit(address)
        return parts.scheme == "https" or (is_local and parts.scheme == "http" and parts.hostname in _LOCAL)
    except ValueError:
        return False


def _from_address(address: str) -> Path:
    import torch

    address, _, fragment = address.partition("#")
    name = PurePosixPath(unquote(urlsplit(address).path)).name
    if name in ("", "..") or not name.isprintable():
        raise CheckpointError(f"{address!r} names no file. Nothing was downloaded.")
    # files of one name from several places are kept apart
    folder = (
        Path(torch.hub.get_dir()) / "checkpoints" / f"autoalign-{hashlib.sha256(address.encode()).hexdigest()[:16]}"
    )
    wanted = re.fullmatch(r"sha256=([0-9a-fA-F]{8,64})", fragment)
    if fragment and wanted is None:
        raise CheckpointError(f"#{fragment} is not a hash such as #sha256=0123456789abcdef. Nothing was downloaded.")
    found = _HASH.search(name)
    file = _download(address, folder / name, wanted[1].lower() if wanted else found[1] if found else "")
    if name.endswith(".json"):
        for shard in sorted(set(index_of(file).values())):
            _download(urljoin(address, shard), folder / shard, "")
    return file


def _download(address: str, file: Path, hash_prefix: str) -> Path:
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            _fetch(address, file, hash_prefix)
            return file
    except Exception as error:  # of the network, of the disk, or of the hash
        raise _unreachable(address, error) from error
    with file.open("rb") as stream:
        if hash_prefix and not hashlib.file_digest(stream, "sha256").hexdigest().startswith(hash_prefix):
            raise CheckpointError(
                f"{str(file)!r} was downloaded before and has another hash than {hash_prefix}. Delete it."
            )
    return file


def _fetch(address: str, file: Path, hash_prefix: str) -> None:
    """Download a file, which appears when all of it is there and has the right hash.

    Raises:
        OSError: It could not be reached or written.
        RuntimeError: It is not what was announced.
    """
    import urllib.request

    class Redirects(urllib.request.HTTPRedirectHandler):
        """Follows what would be allowed as an address."""

        def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
            if not _is_allowed(newurl, is_local=urlsplit(req.full_url).hostname in _LOCAL):
                raise OSError(f"it redirects to {newurl!r}, which is not followed")
            return super().redirect_request(req, fp, code, msg, headers, newurl)

    request = urllib.request.Request(address, headers={"User-Agent": "autoalign"})
    temporary = file.with_name(f".{secrets.token_hex(8)}.tmp")
    digest, size = hashlib.sha256(), 0
    try:
        with (
            urllib.request.build_opener(Redirects).open(request, timeout=_TIMEOUT_SECONDS) as response,
            temporary.open("xb") as stream,
        ):
            length = response.headers.get("Content-Length")
            announced = int(length) if length is not None else None
            free = shutil.disk_usage(file.parent).free
            limit = min(_MAX_UNANNOUNCED_BYTES if announced is None else _MAX_BYTES, free)
            if announced is not None and announced > limit:
                raise RuntimeError(f"it has {announced:,} bytes, and {limit:,} are allowed or free")
            with _shown(response, announced, file.name) as content:
                while block := content.read(_BLOCK_BYTES):
                    size += len(block)
                    if size > limit:
                        raise RuntimeError(f"it has more than {limit:,} bytes, which are allowed or free")
                    digest.update(block)
                    stream.write(block)
        if announced not in (None, size):
            raise RuntimeError(f"{size:,} of {announced:,} bytes came")
        if not digest.hexdigest().startswith(hash_prefix):
            raise RuntimeError(f"invalid hash value, expected {hash_prefix} and got {digest.hexdigest()}")
        temporary.replace(file)
    except TimeoutError as error:
        raise TimeoutError(f"nothing came for {_TIMEOUT_SECONDS:.0f} seconds") from error
    finally:
        temporary.unlink(missing_ok=True)


def _shown(content: Any, size: int | None, name: str) -> AbstractContextManager[Any]:
    """Show how much was read, if standard error is a terminal."""
    if not sys.stderr.isatty():
        return nullcontext(content)
    from rich.console import Console
    from rich.progress import wrap_file

    return wrap_file(content, size or 0, description=name, console=Console(stderr=True))


def _from_hub(address: str) -> Path:
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError as error:
        raise DependencyError.reading("hf:// addresses", "huggingface_hub", "hub") from error

    found = _REPOSITORY.fullmatch(address.removeprefix("hf://"))
    if found is None:
        raise CheckpointError(
            f"{address!r} is not an address such as 'hf://owner/name', 'hf://owner/name@revision' or "
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
        beside = [str(PurePosixPath(chosen).parent / name) for name in _CONFIG_FILES]
        folder = snapshot([chosen, *(name for name in beside if name in names)])
        if chosen.endswith(".index.json"):
            where["revision"] = folder.name  # the commit, so that all are of the same
            snapshot(str(PurePosixPath(chosen).parent / shard) for shard in set(index_of(folder / chosen).values()))
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
        found = [path for path in inside if re.fullmatch(kind, path.name) and not _TRAINING_STATE.search(path.name)]
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


def _unreachable(address: str, error: Exception) -> CheckpointError:
    lines = str(error).strip().splitlines() or [""]
    return CheckpointError(
        f"{address!r} could not be downloaded ({type(error).__name__}: {lines[0].rstrip('.')}). Nothing was read. "
        "Check the address and the connection, and that you have access."
    )
