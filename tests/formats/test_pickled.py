from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from autoalign.checkpoint import open_checkpoint
from autoalign.errors import PartialLoadWarning
from autoalign.loading import load


@pytest.fixture
def switching() -> Iterator[None]:
    """Have threads take turns as often as can be."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("switching")
def test_loads_in_threads_leave_warnings_as_they_are(tmp_path: Path) -> None:
    torch.save({f"net.{key}": tensor for key, tensor in nn.Linear(2, 2).state_dict().items()}, tmp_path / "a.pt")
    load(nn.Linear(2, 2), tmp_path / "a.pt")  # imports scipy, which adds filters of its own
    before = list(warnings.filters)
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
