"""What is known of a tensor without its values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autoalign.plan.specs import packing_of, spec_of


class Wrapper(Tensor):
    def untyped_storage(self) -> Any:
        raise NotImplementedError


def test_a_tensor_of_a_class_that_packs_its_values_is_named() -> None:
    assert packing_of(torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged)) == "NestedTensor"


def test_a_tensor_without_a_storage_has_none() -> None:
    assert spec_of("a", torch.ones(2).as_subclass(Wrapper)).storage is None
