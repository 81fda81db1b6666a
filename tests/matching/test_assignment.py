"""Matching: the exact assignment at its end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

import autoalign
from autoalign.matching import assignment
from autoalign.matching.assignment import _exact_assignment, _sparse_assignment


def _table(height: int, width: int, seed: int) -> NDArray[np.float64]:
    random = np.random.default_rng(seed)
    return np.asarray(random.random((height, width)) * (random.random((height, width)) < 0.2))


@pytest.mark.parametrize("shape", [(20, 20), (30, 12), (12, 30), (1, 5)])
@pytest.mark.parametrize("seed", range(5))
def test_few_pairs_are_assigned_as_well_as_in_a_whole_table(shape: tuple[int, int], seed: int) -> None:
    table = _table(*shape, seed)
    table[0, 0] = 0.5
    rows, columns = np.nonzero(table)
    chosen = _sparse_assignment(table[rows, columns].astype(np.float32), rows, columns, shape)
    assert len(set(rows[chosen].tolist())) == len(set(columns[chosen].tolist())) == len(chosen)
    assert table[rows, columns][chosen].sum() == pytest.approx(table[linear_sum_assignment(table, maximize=True)].sum())


def test_a_large_assignment_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = (
        {f"{prefix}.{n}.{name}.weight": torch.empty(8, 8) for n in range(3) for name in names}
        for prefix, names in (("h", ("query", "key", "value")), ("layers", ("q", "k", "v")))
    )
    mapping = autoalign.align(source, target).mapping
    monkeypatch.setattr("autoalign.matching.assignment._MAX_DENSE_CELLS", 0)
    assert autoalign.align(source, target).mapping == mapping
    assert len(mapping) == 9


def test_the_sparse_way_chooses_as_well_as_the_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = _table(30, 20, 0) + 2
    rows, columns = np.nonzero(table > 2)
    score = table[rows, columns].astype(np.float32) + 1
    dense = _exact_assignment(score, rows, columns, table.shape)
    monkeypatch.setattr(assignment, "_MAX_DENSE_CELLS", 0)
    sparse = _exact_assignment(score, rows, columns, table.shape)
    assert score[sparse].sum() == pytest.approx(score[dense].sum())


def test_what_has_no_unit_in_common_is_assigned_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = np.array([0, 0, 1, 2, 2, 3]), np.array([0, 1, 1, 2, 3, 3])
    score = np.array([30, 31, 20, 30, 31, 20], dtype=np.float32)
    for most in (100, 0):
        monkeypatch.setattr(assignment, "_MAX_DENSE_CELLS", most)
        assert _exact_assignment(score, rows, columns, (4, 4)).tolist() == [0, 2, 3, 5]
