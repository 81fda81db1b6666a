"""Checkpoints that are elsewhere: ``hf://owner/name`` through huggingface_hub, ``https://`` by a request of our own.

What was downloaded is kept in the cache of huggingface_hub or of torch.hub. Of a repository only the files of one
checkpoint are downloaded.
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
_TIMEOUT = 30.0  # seconds in which a server sends nothing
_LARGEST = 2**40  # bytes of a file whose server announces its size
_LARGEST_UNANNOUNCED = 2**34
_BLOCK = 2**20  # bytes
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
            machine only, since what it brings can be changed on the way; redirects are followed to where ``https``
            goes, and on this machine if they come from it.

    Raises:
        CheckpointError: There is no such checkpoint, it is not the one that its hash says, or it cannot be reached; the
            server sends nothing for 30 seconds, less than it announced, or more than the disk or the limit holds.
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
        raise CheckpointError(f"#{fragment} is no hash such as #sha256=0123456789abcdef. Nothing was downloaded.")
    found = _HASH.search(name)
    file = _download(address, folder / name, wanted[1].lower() if wanted else found[1] if found else None)
    if name.endswith(".json"):
        for shard in sorted(_inside(file)):
            _download(urljoin(address, shard), folder / shard, None)
    return file


def _download(address: str, file: Path, hash_prefix: str | None) -> Path:
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            _fetch(address, file, hash_prefix or "")
            return file
    except Exception as error:  # of the network, of the disk, or of the hash
        raise _unreachable(address, error) from error
    if hash_prefix is not None and not _sha256(file).startswith(hash_prefix):
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
        """Goes where the address itself might have led."""

        def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
            if not _is_allowed(newurl, is_local=urlsplit(req.full_url).hostname in _LOCAL):
                raise OSError(f"it redirects to {newurl!r}, which is not followed")
            return super().redirect_request(req, fp, code, msg, headers, newurl)

    request = urllib.request.Request(address, headers={"User-Agent": "autoalign"})
    temporary = file.with_name(f".{secrets.token_hex(8)}.tmp")
    digest, size = hashlib.sha256(), 0
    try:
        with (
            urllib.request.build_opener(Redirects).open(request, timeout=_TIMEOUT) as response,
            temporary.open("xb") as stream,
        ):
            length = response.headers.get("Content-Length")
            announced = int(length) if length is not None else None
            free = shutil.disk_usage(file.parent).free
            most = min(_LARGEST_UNANNOUNCED if announced is None else _LARGEST, free)
            if announced is not None and announced > most:
                raise RuntimeError(f"it has {announced:,} bytes, and {most:,} are allowed or free")
            with _shown(response, announced, file.name) as content:
                while block := content.read(_BLOCK):
                    size += len(block)
                    if size > most:
                        raise RuntimeError(f"it has more than {most:,} bytes, which are allowed or free")
                    digest.update(block)
                    stream.write(block)
        if announced not in (None, size):
            raise RuntimeError(f"{size:,} of {announced:,} bytes came")
        if not digest.hexdigest().startswith(hash_prefix):
            raise RuntimeError(f"invalid hash value, expected {hash_prefix} and got {digest.hexdigest()}")
        temporary.replace(file)
    except TimeoutError as error:
        raise TimeoutError(f"nothing came for {_TIMEOUT:.0f} seconds") from error
    finally:
        temporary.unlink(missing_ok=True)


def _shown(content: Any, size: int | None, name: str) -> AbstractContextManager[Any]:
    """Show how much is read, where a person may be looking."""
    if not sys.stderr.isatty():
        return nullcontext(content)
    from rich.console import Console
    from rich.progress import wrap_file

    return wrap_file(content, size or 0, description=name, console=Console(stderr=True))


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
