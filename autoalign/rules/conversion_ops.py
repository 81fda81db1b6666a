"""Operations of rules that transformers has none for, as ``ConversionOps`` of its own.

It imports transformers, and stands alone since a model keeps its conversions and is pickled with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor
from transformers.core_model_loading import ConversionOps

from autoalign.errors import RulesError
from autoalign.plan.operations import Operation


class Apply(ConversionOps):  # type: ignore[misc]
    """Fills each target by an operation of ours on all sources, which are in the model's dtype by then."""

    supports_many_to_many = True

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.operations = tuple(operations)

    def convert(
        self,
        input_dict: Mapping[str, Any],
        source_patterns: Sequence[str],
        target_patterns: Sequence[str],
        **_: object,
    ) -> dict[str, Tensor]:
        lists = [input_dict[pattern] for pattern in source_patterns]
        tensors = [each[0] if isinstance(each, list) else each for each in lists]
        filled = zip(target_patterns, self.operations, strict=True)
        return {target: operation.apply(tensors)[0] for target, operation in filled}

    def __repr__(self) -> str:
        return ", ".join(map(str, self.operations))

    @property
    def reverse_op(self) -> NoReturn:
        raise RulesError(
            f"'{self!r}' cannot be turned back. Nothing was saved. Save the model in its own names: "
            "save_pretrained(..., save_original_format=False)."
        )
