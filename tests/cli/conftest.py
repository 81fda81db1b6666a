from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.factories import Network


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    torch.manual_seed(0)
    save_file(Network().state_dict(), tmp_path / "net.safetensors", {"license": "MIT"})
    return str(tmp_path / "net.safetensors")
