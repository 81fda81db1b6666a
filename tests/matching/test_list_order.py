"""Lists are matched in the order of their numbers, and member by member."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np
import pytest
import torch

import autoalign
from autoalign.matching.assignment import Assignment
from autoalign.matching.list_order import Repair, blocks_of, disordered, misnumbered, out_of_step


def assignment(pairs: Mapping[str, str]) -> tuple[Assignment, list[tuple[str, ...]], list[tuple[str, ...]]]:
    source, target = sorted(pairs.values()), list(pairs)
    size = len(pairs)
    chosen = Assignment(
        source=np.asarray([source.index(pairs[key]) for key in target]),
        target=np.arange(size),
        score=np.ones(size, np.float32),
        margin=np.ones(size, np.float32),
        runner_up=np.full(size, -1),
        names=np.zeros((size, size), np.float32),
        cues={},
    )
    return chosen, [tuple(key.split(".")) for key in source], [tuple(key.split(".")) for key in target]


def repaired(pairs: Mapping[str, str], repairs: Callable[..., Iterable[Repair]]) -> dict[str, str]:
    chosen, source, target = assignment(pairs)
    moved = dict(pairs)
    for repair in repairs(blocks_of(chosen, source, target, [0] * len(pairs))):
        moved.update({".".join(target[place]): ".".join(own) for place, own in repair.items()})
    return moved


@pytest.mark.parametrize("reverse", [False, True])
def test_a_list_that_is_matched_in_no_direction_is_put_in_order(reverse: bool) -> None:
    blocks = [f"{outer}.g.{inner}" for outer in range(3) for inner in range(2)]
    right = {
        f"h.{place}.{part}": f"{block}.{part}"
        for place, block in enumerate(reversed(blocks) if reverse else blocks)
        for part in "ab"
    }
    assert repaired(right, disordered) == right
    wrong = dict(right)
    for part in "ab":
        wrong |= {f"h.0.{part}": right[f"h.2.{part}"], f"h.2.{part}": right[f"h.0.{part}"]}
    assert repaired(wrong, disordered) == right


def test_equal_numbers_mean_the_same_member() -> None:
    by_numbers = partial(misnumbered, source=[("s", str(place), part) for place in range(5) for part in "ab"])
    right = {f"h.{place}.{part}": f"s.{place}.{part}" for place in range(5) for part in "ab"}
    wrong = {key: f"s.{(int(key[2]) - 1) % 5}.{key[-1]}" for key in right}
    assert repaired(wrong, by_numbers) == right
    assert repaired(right, by_numbers) == right
    reverse = {key: f"s.{4 - int(key[2])}.{key[-1]}" for key in right}
    assert repaired(reverse, by_numbers) == reverse


@pytest.mark.parametrize("gap", [1, 3])
def test_a_list_with_a_gap_keeps_its_numbers(gap: int) -> None:
    source = {f"layers.{n}.{part}.weight": torch.empty(6, 6) for n in range(6) for part in ("up", "down")}
    target = {key.replace("layers", "h"): tensor for key, tensor in source.items() if f".{gap}." not in key}
    alignment = autoalign.align(source, target)
    assert {match.target: match.sources[0] for match in alignment.matches} == {
        key: key.replace("h.", "layers.") for key in target
    }


def test_numbers_that_are_shifted_are_told_by_the_member_of_another_shape() -> None:
    shapes = {"w0": (12, 8), "w1": (12, 8), "w2": (8, 12)}
    source = {f"h.{block}.{name}.weight": torch.empty(shape) for block in range(3) for name, shape in shapes.items()}
    target = {re.sub(r"w(\d)", lambda found: f"w{int(found[1]) + 1}", key): tensor for key, tensor in source.items()}
    alignment = autoalign.align(source, {key.replace("h.", "units."): tensor for key, tensor in target.items()})
    wanted = dict(zip((key.replace("h.", "units.") for key in target), source, strict=True))
    assert {match.target: match.sources[0] for match in alignment.matches} == wanted


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ({"units.0.a": "cells.3.a", "units.1.a": "cells.4.a", "units.2.a": "cells.5.a"}, set()),
        ({"units.0.a": "cells.5.a", "units.1.a": "cells.4.a", "units.2.a": "cells.3.a"}, set()),
        ({"units.0.a": "cells.4.a", "units.1.a": "cells.5.a", "units.2.a": "cells.3.a"}, {0, 1, 2}),
        # what only one member has tells where the rest of it belongs
        (
            {"units.0.p": "cells.0.p", "units.0.a": "cells.1.a", "units.1.a": "cells.0.a", "units.1.q": "cells.1.q"},
            {1, 2},
        ),
        (
            {"units.0.a": "cells.0.a", "units.0.p": "cells.1.p", "units.1.a": "cells.1.a", "units.1.q": "cells.2.q"},
            set(),
        ),
        # the first member of the list fills what comes before the other list, the last one what comes after
        ({"stem.x.a": "cells.0.a", "units.0.a": "cells.1.a", "units.1.a": "cells.2.a"}, set()),
        ({"stem.x.a": "cells.2.a", "units.0.a": "cells.0.a", "units.1.a": "cells.1.a"}, {0, 1, 2}),
        # a member filled from elsewhere, and elsewhere by a member
        (
            {"units.0.a": "middle.a", "units.1.a": "cells.0.a", "units.2.a": "cells.1.a", "mid.x.a": "cells.2.a"},
            {1, 2, 3},
        ),
    ],
)
def test_lists_matched_as_no_network_has_them_are_found(pairs: Mapping[str, str], expected: set[int]) -> None:
    chosen, source, target = assignment(pairs)
    kinds = {path: "apq".index(path[-1]) for path in source}
    blocks = blocks_of(chosen, source, target, [kinds[tuple(own.split("."))] for own in pairs.values()])
    assert out_of_step(blocks, kinds, target, ordered=True) == expected
