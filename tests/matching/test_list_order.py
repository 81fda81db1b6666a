"""Short lists that one side may number the other way round are not loaded where nothing tells."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import autoalign
from autoalign.matching.list_order import REVERSIBLE

WIDTHS = (8, 12, 16, 24)


class Pyramid(nn.Module):
    """A backbone of four levels, and a decoder from the last to the first, which may be listed in either direction."""

    def __init__(self, names: Sequence[str], *, reverse: bool, levels: int = 4) -> None:
        super().__init__()
        self.names, self.reverse, self.levels = names, reverse, levels
        self.stem = nn.Conv2d(3, WIDTHS[0], 3, padding=1)
        stage, lateral, fusion = names
        for level in range(levels):
            before = WIDTHS[max(level - 1, 0)]
            self.add_module(stage.format(level, level + 1), nn.Conv2d(before, WIDTHS[level], 3, padding=1))
        for level in range(levels):
            self.add_module(lateral.format(level, level + 1), nn.Conv2d(WIDTHS[level], 10, 1))
        for level in range(levels):
            block = nn.Sequential(nn.Conv2d(10, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 10, 1))
            self.add_module(fusion.format(level, level + 1), block)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        parts = [[self.get_submodule(name.format(k, k + 1)) for k in range(self.levels)] for name in self.names]
        stages, laterals, fusions = parts
        features = [x := torch.relu(stage(x)) for stage in stages]
        result = torch.zeros(())
        for level in reversed(range(self.levels)):
            place = self.levels - 1 - level if self.reverse else level
            result = torch.as_tensor(fusions[place](laterals[level](features[level]) + result))
        return result


FROM_ONE = ("stage{1}", "lateral{1}", "refine{1}")
FROM_NOUGHT = ("stage_{0}", "convs_{0}", "fusion_{0}")


def test_a_list_of_levels_that_are_numbered_otherwise_is_not_loaded() -> None:
    source, target = Pyramid(FROM_ONE, reverse=False), Pyramid(FROM_NOUGHT, reverse=True)
    alignment = autoalign.align(source.state_dict(), target.state_dict())
    proposed = {match.target: match for match in alignment.ambiguous}
    assert set(proposed) == {key for key in target.state_dict() if key.startswith("fusion")}
    match = proposed["fusion_0.2.bias"]
    assert match.sources == ("refine1.2.bias",)
    assert [other.sources for other in match.alternatives] == [("refine4.2.bias",)]
    assert match.warnings == (REVERSIBLE,)
    assert len(alignment.matches) + len(proposed) == len(target.state_dict())


@pytest.mark.parametrize("reverse", [False, True])
def test_a_call_of_both_tells_the_direction(reverse: bool) -> None:
    torch.manual_seed(0)
    source, target = Pyramid(FROM_ONE, reverse=False), Pyramid(FROM_NOUGHT, reverse=reverse)
    alignment = autoalign.align(source.state_dict(), target.state_dict())
    assert alignment.ambiguous
    verification = autoalign.verify(source, target, torch.rand(1, 3, 8, 8), alignment=alignment)
    assert verification.alignment is not None
    matches = {match.target: match.sources[0] for match in verification.alignment.matches}
    assert matches["fusion_0.0.weight"] == ("refine4.0.weight" if reverse else "refine1.0.weight")
    assert len(matches) == len(target.state_dict())


def test_equal_numbers_tell() -> None:
    source, target = Pyramid(FROM_NOUGHT, reverse=False), Pyramid(("s{0}", "l{0}", "f{0}"), reverse=False)
    alignment = autoalign.align(source.state_dict(), target.state_dict())
    assert len(alignment.matches) == len(target.state_dict())
    assert all(match.confidence >= 0.9 for match in alignment.matches)


def test_two_members_are_no_levels() -> None:
    source, target = Pyramid(FROM_ONE, reverse=False, levels=2), Pyramid(FROM_NOUGHT, reverse=False, levels=2)
    alignment = autoalign.align(source.state_dict(), target.state_dict())
    assert len(alignment.matches) == len(target.state_dict())
    assert {match.target for match in alignment.matches if match.confidence < 0.9} == {
        key for key in target.state_dict() if key.startswith("fusion")
    }
