"""What is known of a tensor without its values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autoalign.plan.specs import spec_of


class Wrapper(Tensor):
    def untyped_storage(self) -> Any:
        raise NotImplementedError


def test_a_tensor_without_a_storage_has_none() -> None:
    assert spec_of("a", torch.ones(2).as_subclass(Wrapper)).storage is None
