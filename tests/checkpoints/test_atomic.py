from __future__ import annotations

from pathlib import Path

import pytest

from autoalign.checkpoints.atomic import remove_abandoned, staged, staging_folder
from autoalign.errors import InputError, OutputError


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
