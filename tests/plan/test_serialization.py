"""Operations as plain data: what is nested without end is refused in few words."""

from __future__ import annotations

from typing import Any

import pytest

from autoalign import InputError
from autoalign.plan.operations import Chain, Copy
from autoalign.plan.serialization import check_operation, from_plain, integer


def nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


def test_what_is_nested_too_deeply_is_refused() -> None:
    operation = Copy()
    for _ in range(20):
        operation = Chain((operation,))  # type: ignore[assignment]
    with pytest.raises(TypeError, match="operations are nested too deeply"):
        check_operation(operation)
    with pytest.raises(InputError, match="lists are nested too deeply"):
        from_plain({"kind": "Reshape", "shape": nested(1, 60)})
    with pytest.raises(TypeError, match="this list is not a whole number"):
        integer(nested(1, 100_000))
