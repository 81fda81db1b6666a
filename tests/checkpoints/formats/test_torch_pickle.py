from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autoalign.api import load
from autoalign.checkpoints.checkpoint import open_checkpoint
from autoalign.errors import DependencyError, PartialLoadWarning


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
    torch.save({"weight": torch.ones(2)}, tmp_path / "a.pt", pickle_protocol=3)
    with pytest.warns(UserWarning, match="Detected pickle protocol 3"):
        assert open_checkpoint(tmp_path / "a.pt")["weight"].tolist() == [1, 1]
    with pytest.raises(UserWarning, match="Detected pickle protocol 3"):  # and not as a damaged file
        open_checkpoint(tmp_path / "a.pt")


def test_torch_that_may_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(DependencyError, match=r"torch 2\.5\.1\+cpu may run code .* Install torch 2\.7 or later"):
        open_checkpoint(tmp_path / "a.pt")
