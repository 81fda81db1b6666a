from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autoalign.checkpoints.atomic import remove_abandoned, staged, staging_folder, unfinished
from autoalign.checkpoints.checkpoint import open_checkpoint
from autoalign.errors import CheckpointError, InputError, OutputError


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_files_get_their_names_when_all_are_written(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("old")
    (tmp_path / "stale").write_text("old")
    with staged(tmp_path, ["a", "b"], ["b", "stale"]) as paths:
        for path in paths:
            path.write_text("new")
        assert not (tmp_path / "a").exists()
        assert (tmp_path / "b").read_text() == "old"
    assert names_in(tmp_path) == ["a", "b"]
    assert (tmp_path / "b").read_text() == "new"


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError, ZeroDivisionError])
def test_a_broken_run_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "b").write_text("old")

    def broken_run() -> None:
        with staged(tmp_path, ["a", "b"], ["b"]) as paths:
            paths[0].write_text("new")
            raise error("no more")

    with pytest.raises(error, match="no more"):
        broken_run()
    assert names_in(tmp_path) == ["b"]
    assert (tmp_path / "b").read_text() == "old"


def test_folders_that_were_made_go_with_it_and_others_stay(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "inner"

    def broken_run() -> None:
        with staged(folder, ["a"]) as (path,):
            path.write_text("new")
            raise InputError("no more")

    with pytest.raises(InputError, match="no more"):
        broken_run()
    assert names_in(tmp_path) == []


def test_what_cannot_be_named_takes_back_what_was(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "inside").write_text("kept")

    def broken_run() -> None:
        with staged(tmp_path, ["a", "b"]) as paths:
            for path in paths:
                path.write_text("new")

    with pytest.raises(OutputError, match=r"a' could not be written: .* Nothing is left of it"):
        broken_run()
    assert names_in(tmp_path) == ["b", "b/inside"]


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with (
        pytest.raises(OutputError, match=r"could not be written: .*Not a directory"),
        staged(tmp_path / "file" / "inner", ["a"]),
    ):
        pass
    assert names_in(tmp_path) == ["file"]


def test_hidden_folders_are_removed_when_nobody_writes_there(tmp_path: Path) -> None:
    used, abandoned, other = (tmp_path / f".{name}.tmp" for name in ("a.01234567", "a.89abcdef", "b.01234567"))
    abandoned.mkdir()
    (abandoned / "a").write_text("half")
    (tmp_path / ".a.00000000.tmp").write_text("of an earlier version")
    other.mkdir()
    with staging_folder(used):
        remove_abandoned(tmp_path, "a")
        assert names_in(tmp_path) == [used.name, other.name]
    assert names_in(tmp_path) == [other.name]


MARKER = ".m.safetensors.index.json.0123abcd.tmp"
INDEX, WHOLE = "m.safetensors.index.json", "m.safetensors"
PLAIN = ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]
MARKED = [f"m-89abcdef-0000{number}-of-00002.safetensors" for number in (1, 2)]


@pytest.mark.parametrize(
    ("names", "listed", "left"),
    [
        ([INDEX, *PLAIN, *MARKED], PLAIN, MARKED),
        ([INDEX, *PLAIN, *MARKED], MARKED, PLAIN),
        ([INDEX, PLAIN[1], *MARKED], MARKED, PLAIN[1:]),
        ([INDEX, WHOLE, *MARKED], MARKED, [WHOLE]),
        ([INDEX, WHOLE, *PLAIN], PLAIN, [WHOLE]),
        ([WHOLE, MARKED[0]], [], MARKED[:1]),
        ([WHOLE, *PLAIN], [], PLAIN),
        ([*PLAIN, *MARKED], [], MARKED),
        (PLAIN[:1], [], PLAIN[:1]),
        (PLAIN, [], []),
        ([WHOLE, "n-00001-of-00002.safetensors", "m-n-00001-of-00002.safetensors"], [], []),
    ],
)
def test_one_output_counts(names: list[str], listed: list[str], left: list[str]) -> None:
    assert unfinished([*names, MARKER], listed) == set(left)
    assert unfinished(names, listed) == set()  # where nobody was killed, a person is asked


def test_files_that_are_being_written_are_not_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / WHOLE)
    (tmp_path / ".m-00002-of-00012.safetensors.0123abcd.tmp").write_bytes((tmp_path / WHOLE).read_bytes()[:-1])
    (tmp_path / MARKER).mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / PLAIN[0])
    assert open_checkpoint(tmp_path)["a"].tolist() == [1, 1]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": PLAIN[0]}}))
    assert open_checkpoint(tmp_path)["a"].tolist() == [0, 0]
    (tmp_path / MARKER).rmdir()
    with pytest.raises(CheckpointError, match=r"it holds 2 checkpoints, such as"):
        open_checkpoint(tmp_path)
