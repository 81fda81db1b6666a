"""Moves: what could be exchanged as well."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from autoalign.matching.moves import _filled_anew


def test_what_has_nothing_of_its_kind_to_take_instead_is_not_exchanged() -> None:
    state: Any = SimpleNamespace(own_of={10: 0, 11: 1}, other_of={0: 10, 1: 11}, kinds=([0, 1],))
    assert list(_filled_anew(state, {10: 1})) == []
