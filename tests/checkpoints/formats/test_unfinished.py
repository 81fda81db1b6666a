from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autoalign.checkpoints.atomic import unfinished
from autoalign.checkpoints.checkpoint import open_checkpoint
from autoalign.errors import CheckpointError

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
