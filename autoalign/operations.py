"""Operations that turn checkpoint tensors into a model tensor, as values.

An operation takes a list of tensors and gives a list of tensors, so that operations compose: most apply to each tensor,
``Chain`` applies one after another, ``Grouped`` applies one to every run of ``size`` tensors. The
operation of a match, applied to its sources, gives one tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Operation(ABC):
    """Base of all operations. Operations never change their inputs; results may be views of them."""

    @abstractmethod
    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Apply the operation to its inputs, in the order of ``Match.sources``."""

    @property
    def takes_part(self) -> bool:
        """Whether elements of a source are left out, as in a split."""
        return False

    @property
    def adapts(self) -> bool:
        """Whether values are changed, made up or kept from the target, so that the result is no copy."""
        return False

    def __str__(self) -> str:
        return type(self).__name__.lower()


@dataclass(frozen=True, slots=True)
class Copy(Operation):
    """The tensor as it is."""

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)


@dataclass(frozen=True, slots=True)
class Reshape(Operation):
    """The same elements in the same order under another shape.

    >>> Reshape((1, 2)).apply([torch.tensor([3, 4])])
    [tensor([[3, 4]])]
    """

    shape: tuple[int, ...]

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.reshape(self.shape) for tensor in tensors]

    def __str__(self) -> str:
        return f"reshape{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Transpose(Operation):
    """A matrix with its two dimensions exchanged."""

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.transpose(0, 1) for tensor in tensors]


@dataclass(frozen=True, slots=True)
class Permute(Operation):
    """The dimensions in another order: output dimension ``k`` is input dimension ``dims[k]``.

    >>> Permute((3, 2, 0, 1)).apply([torch.empty(3, 5, 8, 16)])[0].shape
    torch.Size([16, 8, 3, 5])
    """

    dims: tuple[int, ...]

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.permute(self.dims) for tensor in tensors]

    def __str__(self) -> str:
        return f"permute{list(self.dims)}"


@dataclass(frozen=True, slots=True)
class Split(Operation):
    """The part ``start : start + length`` of dimension ``dim``.

    >>> Split(0, 1, 2).apply([torch.arange(4)])
    [tensor([1, 2])]
    """

    dim: int
    start: int
    length: int

    @property
    def takes_part(self) -> bool:
        return True

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.narrow(self.dim, self.start, self.length) for tensor in tensors]

    def __str__(self) -> str:
        return f"split(dim {self.dim}, {self.start}:{self.start + self.length})"


@dataclass(frozen=True, slots=True)
class Unstack(Operation):
    """Slice ``index`` of dimension ``dim``, without that dimension."""

    dim: int
    index: int

    @property
    def takes_part(self) -> bool:
        return True

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.select(self.dim, self.index) for tensor in tensors]

    def __str__(self) -> str:
        return f"unstack(dim {self.dim}, {self.index})"


@dataclass(frozen=True, slots=True)
class Concatenate(Operation):
    """All inputs joined along dimension ``dim``.

    >>> Concatenate(0).apply([torch.zeros(1), torch.ones(2)])
    [tensor([0., 1., 1.])]
    """

    dim: int

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(tensors), dim=self.dim)]

    def __str__(self) -> str:
        return f"concatenate(dim {self.dim})"


@dataclass(frozen=True, slots=True)
class Stack(Operation):
    """All inputs, of one shape, joined along a new dimension ``dim``."""

    dim: int

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.stack(list(tensors), dim=self.dim)]

    def __str__(self) -> str:
        return f"stack(dim {self.dim})"


@dataclass(frozen=True, slots=True)
class Grouped(Operation):
    """``operation`` on every run of ``size`` inputs, such as gate and up of each expert before they are stacked."""

    size: int
    operation: Operation

    @property
    def takes_part(self) -> bool:
        return self.operation.takes_part

    @property
    def adapts(self) -> bool:
        return self.operation.adapts

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [
            result
            for start in range(0, len(tensors), self.size)
            for result in self.operation.apply(tensors[start : start + self.size])
        ]

    def __str__(self) -> str:
        return f"{self.operation} by {self.size}"


@dataclass(frozen=True, slots=True)
class Parallel(Operation):
    """An operation of its own for each input."""

    operations: tuple[Operation, ...]

    @property
    def takes_part(self) -> bool:
        return any(operation.takes_part for operation in self.operations)

    @property
    def adapts(self) -> bool:
        return any(operation.adapts for operation in self.operations)

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [
            result
            for operation, tensor in zip(self.operations, tensors, strict=True)
            for result in operation.apply([tensor])
        ]

    def __str__(self) -> str:
        return "(" + ", ".join(str(operation) for operation in self.operations) + ")"


@dataclass(frozen=True, slots=True)
class Chain(Operation):
    """Several operations, one after another.

    >>> print(Chain((Transpose(), Concatenate(0))))
    transpose + concatenate(dim 0)
    """

    steps: tuple[Operation, ...]

    @property
    def takes_part(self) -> bool:
        return any(step.takes_part for step in self.steps)

    @property
    def adapts(self) -> bool:
        return any(step.adapts for step in self.steps)

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        results = list(tensors)
        for step in self.steps:
            results = step.apply(results)
        return results

    def __str__(self) -> str:
        return " + ".join(str(step) for step in self.steps)


def chain(*steps: Operation) -> Operation:
    """Compose operations, leaving out those that change nothing.

    >>> chain(Copy(), Transpose())
    Transpose()
    """
    flat = [inner for step in steps for inner in (step.steps if isinstance(step, Chain) else (step,))]
    needed = [step for step in flat if not isinstance(step, Copy)]
    if not needed:
        return Copy()
    return needed[0] if len(needed) == 1 else Chain(tuple(needed))
