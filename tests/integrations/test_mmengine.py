"""mmengine's own ``load_checkpoint``, by the renamings of an alignment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import autoalign

runner = pytest.importorskip("mmengine.runner")


class Network(nn.Module):
    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        for number in range(2):
            block = nn.Module()
            block.add_module(first, nn.Conv2d(2, 2, number + 1))
            block.add_module(second, nn.BatchNorm2d(2))
            self.add_module(f"{first}_stage{number}", block)


def test_load_checkpoint_renames_by_them(tmp_path: Path) -> None:
    theirs, ours = Network("conv", "bn"), Network("convolution", "normalization")
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "theirs.pth")
    alignment = autoalign.align(str(tmp_path / "theirs.pth"), ours)
    alignment.raise_if_incomplete()
    revise_keys = alignment.rules().to_revise_keys()
    runner.load_checkpoint(ours, str(tmp_path / "theirs.pth"), strict=True, revise_keys=revise_keys)
    values = alignment.state_dict()
    assert all(torch.equal(value, values[key]) for key, value in ours.state_dict().items())
