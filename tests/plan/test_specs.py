"""What is known of a tensor without its values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autoalign.plan.specs import packing_of, spec_of


class Wrapper(Tensor):
    def untyped_storage(self) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(("module", "name"), [("elsewhere", "Packed"), ("torchao.quantization", None)])
def test_a_class_that_packs_its_values_is_named_unless_it_is_known(module: str, name: str | None) -> None:
    methods = dict.fromkeys(("__tensor_flatten__", "__tensor_unflatten__"))
    packed = type("Packed", (Tensor,), {"__module__": module, **methods})
    assert packing_of(torch.ones(1).as_subclass(packed)) == name


def test_a_tensor_without_a_storage_has_none() -> None:
    assert spec_of("a", torch.ones(2).as_subclass(Wrapper)).storage is None
