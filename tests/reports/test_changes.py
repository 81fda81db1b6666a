from __future__ import annotations

import torch

import autoalign
from autoalign.reports.changes import Change, blocks_of, change_rows, headline, render_changes_markdown


def moved() -> autoalign.Difference:
    """Compare two networks of 12 layers, of which the last two are moved by 3 % and the head is new."""
    torch.manual_seed(0)
    first = {
        f"model.layers.{i}.{name}.weight": torch.randn(8, 8 + j) for i in range(12) for j, name in enumerate("abc")
    }
    first |= {"head.weight": torch.randn(5, 8)}
    second = {key.replace("model.layers", "h"): value.clone() for key, value in first.items()}
    for i in (10, 11):
        second[f"h.{i}.b.weight"] *= 1.03
        second[f"h.{i}.c.weight"] *= 1.03
        second[f"h.{i}.a.weight"] *= 1.03
    second["head.weight"] = torch.randn(5, 8)
    return autoalign.diff(first, second)


def test_blocks_that_changed_alike_are_one_row() -> None:
    found = moved()
    start, *_ = str(found).splitlines()
    assert start.startswith("30 equal, 7 changed (head by 1")
    assert start.endswith(", h.{10,11} by 3 %)")
    rows = change_rows(found.alignment, found.changes)
    ((layers, head), (equal,)) = (rows[title] for title in (next(iter(rows)), "Equal: bit for bit"))
    assert (layers.keys, layers.cells) == (
        ("model.layers.{10,11}", "h.{10,11}"),
        ("6 x", "mean 3 %", "largest 3 %"),
    )
    assert head.keys == ("head",)
    assert (equal.keys, equal.tensors) == (("model.layers.{0...9}", "h.{0...9}"), 30)
    assert "### Changed" in render_changes_markdown(found.alignment, found.changes)


def test_a_block_pools_its_tensors_by_their_elements() -> None:
    changes = [Change("h.0.a", ("x.0.a",), "changed", 30, 0.1, 0.4), Change("h.0.b", ("y.0.b",), "equal", 10)]
    (block,) = blocks_of(changes)
    assert (block.first, block.second, block.verdict, block.largest) == ("x.0 + y.0", "h.0", "changed", 0.4)
    assert round(block.mean, 6) == 0.075


def test_nothing_in_common_is_said() -> None:
    found = autoalign.diff({"a.weight": torch.ones(3, 2)}, {"b.bias": torch.ones(7)})
    assert headline(found.alignment, ()) == "nothing to compare, 1 only in the first, 1 only in the second"
    assert found.to_dict()["only_second"] == [{"key": "b.bias", "shape": [7], "dtype": "float32"}]
    assert not found.equal
