"""What a wrapper puts into keys changes no match."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn

import autoalign


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 16)  # n x 2n, as a layer that gives scale and shift
        self.mlp = _Mlp(16)
        self.blocks = nn.ModuleList(_Mlp(16) for _ in range(3))
        self.head = nn.Linear(16, 10)


WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "averaged_model")
_AT: dict[str, Callable[[str, str], str]] = {
    "around all": lambda key, name: f"{name}.{key}",
    "around each block": lambda key, name: ".".join(
        f"{part}.{name}" if before == "blocks" else part for before, part in _pairs(key)
    ),
    "around each mlp": lambda key, name: key.replace("mlp.", f"mlp.{name}."),
}


def _pairs(key: str) -> list[tuple[str, str]]:
    parts = key.split(".")
    return list(zip(["", *parts], parts, strict=False))


@pytest.mark.parametrize("where", _AT)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_changes_no_match(wrapper: str, where: str) -> None:
    plain: dict[str, Tensor] = _Net().state_dict()
    wrapped = {_AT[where](key, wrapper): value for key, value in plain.items()}
    expected = {_AT[where](key, wrapper): key for key in plain}
    assert autoalign.align(wrapped, plain).mapping == expected
    assert autoalign.align(plain, wrapped).mapping == {key: name for name, key in expected.items()}


def test_a_compiled_model_takes_its_own_state_dict() -> None:
    net = _Net()
    compiled = cast("nn.Module", torch.compile(_Net()))
    alignment = autoalign.load(compiled, net.state_dict(), strict=True)
    assert len(alignment.matches) == len(net.state_dict())
