"""Files of ``torch.save``; zip files that are not the same to all readers, or larger than they are."""

from __future__ import annotations

import io
import pickle
import struct
import threading
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autoalign.api import load
from autoalign.checkpoints.checkpoint import open_checkpoint
from autoalign.checkpoints.formats.torch_pickle import check_archive, members_of
from autoalign.checkpoints.stored import TooCostlyError
from autoalign.errors import CheckpointError, DependencyError, PartialLoadWarning


def test_loads_in_threads_leave_warnings_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({f"net.{key}": tensor for key, tensor in nn.Linear(2, 2).state_dict().items()}, tmp_path / "a.pt")
    load(nn.Linear(2, 2), tmp_path / "a.pt")  # imports scipy, which adds filters of its own
    before = list(warnings.filters)
    read, together = torch.load, threading.Barrier(4, timeout=60)

    def read_together(*args: Any, **options: Any) -> object:
        together.wait()
        return read(*args, **options)

    monkeypatch.setattr(torch, "load", read_together)
    for _ in range(10):
        threads = [threading.Thread(target=load, args=(nn.Linear(2, 2), tmp_path / "a.pt")) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert list(warnings.filters) == before
    with pytest.raises(PartialLoadWarning, match="1 keep their values"):  # an error in these tests
        load(nn.Linear(2, 2), {"weight": torch.ones(2, 2)})


def test_warnings_of_torch_are_passed_on(tmp_path: Path) -> None:
    saved = {"weight": torch.ones(2), "device": torch.device("cpu")}  # which torch reads itself
    torch.save(saved, tmp_path / "a.pt", pickle_protocol=3)
    with pytest.warns(UserWarning, match="Detected pickle protocol 3"):
        assert open_checkpoint(tmp_path / "a.pt")["weight"].tolist() == [1, 1]
    with pytest.raises(UserWarning, match="Detected pickle protocol 3"):  # and not as a damaged file
        open_checkpoint(tmp_path / "a.pt")


def test_torch_that_may_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(DependencyError, match=r"torch 2\.5\.1\+cpu may run code .* Install torch 2\.7 or later"):
        open_checkpoint(tmp_path / "a.pt")


def member(name: bytes, content: bytes, *, packed: bool = False, extra: bytes = b"") -> tuple[bytes, bytes]:
    """Make what a zip file has of a member: where it is, and in the directory, but for its place."""
    data = zlib.compress(content, 9, -15) if packed else content
    method, checksum = 8 * packed, zlib.crc32(content)
    sizes = struct.pack("<III", checksum, len(data), len(content))
    local = struct.pack("<IHHHHH", 0x04034B50, 20, 0, method, 0, 0x21) + sizes
    central = struct.pack("<IHHHHHH", 0x02014B50, 20, 20, 0, method, 0, 0x21) + sizes
    central += struct.pack("<HHHHHI", len(name), len(extra), 0, 0, 0, 0)
    return local + struct.pack("<HH", len(name), 0) + name + data, central + b"%s" + name + extra


def directory(members: list[tuple[bytes, bytes]]) -> tuple[bytes, list[bytes]]:
    content, entries = b"", []
    for local, central in members:
        entries.append(central.replace(b"%s", struct.pack("<I", len(content)), 1))
        content += local
    return content, entries


def large_end(count: int, size: int, start: int) -> bytes:
    return struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size, start)


def two_directories(shown: bytes, hidden: bytes) -> bytes:
    """Make a zip file in which Python finds the first of two contents of a pickle, and torch the second."""
    members = [member(b"a/version", b"3\n"), member(b"a/data.pkl", shown), member(b"a/data.pkl", hidden, packed=True)]
    content, (version, first, second) = directory(members)
    for pickled in (second, first):
        start, entries = len(content), version + pickled
        content += entries
        end, content = len(content), content + large_end(2, len(entries), start)
        if pickled is second:
            place = struct.pack("<IIQI", 0x07064B50, 0, end, 1)
    return content + place + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, *[2**16 - 1] * 2, *[2**32 - 1] * 2, 0)


def test_a_file_with_two_directories_is_not_read(tmp_path: Path) -> None:
    content = two_directories(pickle.dumps({"a": 1}, 2), bytes(2**26))
    (tmp_path / "a.pt").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert [info.file_size for info in archive.infolist()] == [2, 17]
    with pytest.raises(CheckpointError, match=r"it may be read as two different zip files"):
        open_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("large", [False, True])
@given(
    before=st.binary(max_size=3), between=st.binary(max_size=3), comment=st.binary(max_size=3), more=st.integers(-1, 1)
)
def test_only_one_directory_right_before_the_end_is_taken(
    large: bool, before: bytes, between: bytes, comment: bytes, more: int
) -> None:
    content, entries = directory([member(b"a/data.pkl", b"N."), member(b"a/version", b"3\n")])
    size, count = len(b"".join(entries)), len(entries) + more
    end = large_end(count, size, len(content)) + struct.pack("<IIQI", 0x07064B50, 0, len(content) + size, 1)
    end = between + (end if large else b"")
    end += struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count, count, size, len(content), len(comment))
    whole = before + content + b"".join(entries) + end + comment
    if before or between or comment or more:
        with pytest.raises(ValueError, match=r"two different zip files|zip"):
            members_of(io.BytesIO(whole), len(whole))
    else:
        assert check_archive(io.BytesIO(whole), len(whole)) == 2
        assert [info.filename for info in members_of(io.BytesIO(whole), len(whole))] == ["a/data.pkl", "a/version"]


def test_a_member_has_one_size() -> None:
    extra = struct.pack("<HHQ", 1, 8, 2) * 2
    content, entries = directory([member(b"a/data.pkl", b"N.", extra=extra)])
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 1, 1, len(entries[0]), len(content), 0)
    whole = content + entries[0] + end
    with pytest.raises(ValueError, match=r"two different zip files"):
        members_of(io.BytesIO(whole), len(whole))


def test_members_are_counted_before_they_are_listed() -> None:
    count = 2**18 + 1
    end = large_end(count, 0, 0) + struct.pack("<IIQI", 0x07064B50, 0, 0, 1)
    whole = end + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0, 0, 0, 0, 0)
    with pytest.raises(TooCostlyError, match=r"it has 262,145 members, of 262,144 at most"):
        members_of(io.BytesIO(whole), len(whole))


@pytest.mark.parametrize("count", [1, 2**16])
def test_what_torch_and_python_write_is_taken(tmp_path: Path, count: int) -> None:
    if count == 1:
        torch.save({"a": torch.ones(3)}, tmp_path / "a")
    else:  # so many that the end is a large one
        with zipfile.ZipFile(tmp_path / "a", "w") as archive:
            for number in range(count):
                archive.writestr(f"a/{number}", b"")
    size = (tmp_path / "a").stat().st_size
    assert len(members_of(tmp_path / "a", size)) >= count


def test_a_record_that_is_marked_as_a_folder_is_refused(tmp_path: Path) -> None:
    """Torch reads the data of a tensor in such a one as whatever was in memory, where the file is not mapped."""
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for info in old.infolist():
            info.external_attr = 0x10 if info.filename.endswith("/data/0") else 0
            new.writestr(info, old.read(info))
    with pytest.raises(CheckpointError, match=r"data/0 is marked as a folder, of which torch reads whatever"):
        open_checkpoint(tmp_path / "b.pt")


def test_a_record_of_torch_that_is_compressed_is_refused(tmp_path: Path) -> None:
    """Torch reads it as whatever was in memory, so that what comes of it is left to chance."""
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for info in old.infolist():
            packed = zipfile.ZIP_DEFLATED if info.filename.endswith("/.data/serialization_id") else zipfile.ZIP_STORED
            new.writestr(info.filename, old.read(info), packed)
    with pytest.raises(CheckpointError, match=r"serialization_id is compressed, which torch reads as whatever"):
        open_checkpoint(tmp_path / "b.pt")
