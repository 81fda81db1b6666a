"""One file of any format, told by its content and never by its name."""

from __future__ import annotations

from pathlib import Path

from autoalign.errors import CheckpointError
from autoalign.formats.budget import members_of
from autoalign.formats.gguf import is_gguf, open_gguf
from autoalign.formats.msgpack import is_msgpack, open_msgpack
from autoalign.formats.npz import is_npz, open_npz
from autoalign.formats.pickled import is_pickled, open_pickled
from autoalign.formats.safetensors import is_safetensors, open_safetensors
from autoalign.formats.torchscript import is_torchscript, open_torchscript
from autoalign.stored import Contents

FORMATS = {
    "safetensors": open_safetensors,
    "torch": open_pickled,
    "TorchScript": open_torchscript,
    "npz": open_npz,
    "GGUF": open_gguf,
    "msgpack": open_msgpack,
}  # the first is the first that is taken where a folder has several
_HEAD = 2**12  # bytes of a file that are looked at


def open_file(file: Path) -> Contents:
    """Open a file of any of ``FORMATS``.

    Raises:
        CheckpointError: The file cannot be read, is damaged or of none of the formats.
        DependencyError: The package that reads its format is not installed.
    """
    name = format_of(file)
    if name is not None:
        return FORMATS[name](file)
    head = head_of(file)[:32]
    content = f"begins with {head!r}" if head else "is empty"
    raise CheckpointError(
        f"{str(file)!r} is neither a file of torch nor of safetensors: it {content}. Nothing was read. "
        f"Other formats that are known are {', '.join(list(FORMATS)[2:])}. "
        "Check that the download is complete and no web page or pointer file."
    )


def format_of(file: Path) -> str | None:
    """Say which of ``FORMATS`` a file is of, if any.

    Raises:
        CheckpointError: The file cannot be read.
    """
    head = head_of(file)
    if is_gguf(head):  # first, since to safetensors its magic is the length of a header
        return "GGUF"
    if is_safetensors(head, file.stat().st_size):
        return "safetensors"
    if is_npz(head):
        return "npz"
    if is_pickled(head):
        return "TorchScript" if is_torchscript(_members(file)) else "torch"
    return "msgpack" if is_msgpack(head) else None


def head_of(file: Path) -> bytes:
    """Read the beginning of a file.

    Raises:
        CheckpointError: The file cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return stream.read(_HEAD)
    except OSError as error:
        raise CheckpointError(f"{str(file)!r} could not be read: {error}.") from error


def _members(file: Path) -> list[str]:
    try:
        return [info.filename for info in members_of(file, file.stat().st_size)]
    except Exception:  # no zip file, or a damaged one, which fails as what it is taken for
        return []
