"""Of two towers of one shape, only a name tells which one a checkpoint has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import autoalign

TOWER = {"conv1": (8, 3, 3, 3), "conv2": (12, 8, 3, 3), "conv3": (16, 12, 3, 3)}
TRUNK = {"stem": (10, 32, 3, 3), "body.0": (10, 10, 3, 3), "body.1": (10, 10, 3, 3), "head": (5, 10, 1, 1)}


def network(*towers: str) -> dict[str, Tensor]:
    shapes = {f"{tower}.{name}": shape for tower in towers for name, shape in TOWER.items()}
    shapes |= {f"trunk.{name}": shape for name, shape in TRUNK.items()}
    return {f"{name}.weight": torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("is_source", [False, True])
def test_a_tower_that_is_left_over_is_a_rival(named: bool, is_source: bool) -> None:
    both, one = network("image_encoder", "depth_encoder"), network("depth" if named else "net")
    source, target = (both, one) if is_source else (one, both)
    alignment = autoalign.align(source, target)
    matched = {match.target: match.sources[0] for match in alignment.matches}
    assert sum("trunk" in key for key in matched) == len(TRUNK)
    towers = {key: source for key, source in matched.items() if "trunk" not in key}
    if named:
        assert {key.rpartition("conv")[2]: own.rpartition("conv")[2] for key, own in towers.items()} == {
            f"{n}.weight": f"{n}.weight" for n in (1, 2, 3)
        }
        assert all("depth" in key and "depth" in own for key, own in towers.items())
    else:
        assert towers == {}
