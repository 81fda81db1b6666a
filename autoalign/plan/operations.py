"""Operations that turn checkpoint tensors into a model tensor, as values.

An operation maps a list of tensors to a list of tensors, so that operations compose: most apply to each tensor,
``Chain`` applies one after another, ``Grouped`` applies one to every run of ``size`` tensors. The operation of a match
maps its sources to one tensor. ``trace`` finds how each input is restored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from autoalign.errors import NotInvertibleError

Shape = tuple[int, ...]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Trace:
    """Where one input of an operation went, and how it is restored from there."""

    output: int  # which of the outputs holds it
    view: Operation  # which part of the input it is: Copy for all of it
    restore: Operation  # from that output back to this part


KINDS: dict[str, type[Operation]] = {}  # by their names in JSON; each class registers itself


@dataclass(frozen=True, slots=True)
class Operation(ABC):
    """Base of all operations. Operations never change their inputs; results may be views of them."""

    def __init_subclass__(cls) -> None:
        KINDS[cls.__name__] = cls

    @abstractmethod
    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Apply the operation to its inputs, in the order of ``Match.sources``."""

    @property
    def parts(self) -> tuple[Operation, ...]:
        """The operations that this one is made of."""
        return ()

    @property
    def arity(self) -> int:
        """How many inputs become one result beside others in ``Parallel``."""
        return 1

    @property
    def takes_part(self) -> bool:
        """True if elements of a source are left out, as in a split."""
        return any(part.takes_part for part in self.parts)

    def trace(self, shapes: Sequence[Shape]) -> list[Trace]:  # noqa: ARG002, others need them
        """Follow each input, of the given shapes, to the output that holds it.

        Raises:
            NotInvertibleError: The operation changes values, so that no input can be restored.
        """
        raise NotInvertibleError(f"'{self}' changes values; its inputs cannot be restored.")

    @property
    def adapts(self) -> bool:
        """True if values are changed, made up or kept from the target, so that the result is no copy."""
        return any(part.adapts for part in self.parts)

    def __str__(self) -> str:
        return type(self).__name__.lower()


@dataclass(frozen=True, slots=True)
class Single(Operation, ABC):
    """Base of the operations on one tensor, which do the same with each input."""

    @abstractmethod
    def apply_to(self, tensor: Tensor) -> Tensor:
        """Apply the operation to one tensor."""

    def undone(self, shape: Shape) -> Operation:  # noqa: ARG002, others need it
        """Return the operation from the result back to an input of this shape; most operations undo themselves."""
        return self

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [self.apply_to(tensor) for tensor in tensors]

    def trace(self, shapes: Sequence[Shape]) -> list[Trace]:
        if self.takes_part:
            return [Trace(place, self, Copy()) for place in range(len(shapes))]
        return [Trace(place, Copy(), self.undone(shape)) for place, shape in enumerate(shapes)]


@dataclass(frozen=True, slots=True)
class Copy(Single):
    """The tensor as it is."""

    def apply_to(self, tensor: Tensor) -> Tensor:
        return tensor


@dataclass(frozen=True, slots=True)
class Reshape(Single):
    """The same elements in the same order under another shape.

    >>> Reshape((1, 2)).apply([torch.tensor([3, 4])])
    [tensor([[3, 4]])]
    """

    shape: tuple[int, ...]

    def apply_to(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.shape)

    def __str__(self) -> str:
        return f"reshape{list(self.shape)}"

    def undone(self, shape: Shape) -> Operation:
        return Reshape(tuple(shape))


@dataclass(frozen=True, slots=True)
class Transpose(Single):
    """A matrix with its two dimensions exchanged."""

    def apply_to(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1)


@dataclass(frozen=True, slots=True)
class Permute(Single):
    """The dimensions in another order: output dimension ``k`` is input dimension ``dims[k]``.

    >>> Permute((3, 2, 0, 1)).apply([torch.empty(3, 5, 8, 16)])[0].shape
    torch.Size([16, 8, 3, 5])
    """

    dims: tuple[int, ...]

    def apply_to(self, tensor: Tensor) -> Tensor:
        return tensor.permute(self.dims)

    def __str__(self) -> str:
        return f"permute{list(self.dims)}"

    def undone(self, shape: Shape) -> Operation:  # noqa: ARG002
        return Permute(tuple(self.dims.index(dim) for dim in range(len(self.dims))))


@dataclass(frozen=True, slots=True)
class Flip(Single):
    """The slices of dimension ``dim`` in reverse order.

    >>> Flip(0).apply([torch.tensor([1, 2])])
    [tensor([2, 1])]
    """

    dim: int

    def apply_to(self, tensor: Tensor) -> Tensor:
        return tensor.flip(self.dim)

    def __str__(self) -> str:
        return f"flip(dim {self.dim})"


@dataclass(frozen=True, slots=True)
class Split(Single):
    """The part ``start : start + length`` of dimension ``dim``.

    >>> Split(0, 1, 2).apply([torch.arange(4)])
    [tensor([1, 2])]
    """

    dim: int
    start: int
    length: int

    takes_part = True

    def apply_to(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(self.dim, self.start, self.length)

    def __str__(self) -> str:
        return f"split(dim {self.dim}, {self.start}:{self.start + self.length})"


@dataclass(frozen=True, slots=True)
class Unstack(Single):
    """Slice ``index`` of dimension ``dim``, without that dimension."""

    dim: int
    index: int

    takes_part = True

    def apply_to(self, tensor: Tensor) -> Tensor:
        return tensor.select(self.dim, self.index)

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

    def trace(self, shapes: Sequence[Shape]) -> list[Trace]:
        lengths = [shape[self.dim] for shape in shapes]
        return [Trace(0, Copy(), Split(self.dim, sum(lengths[:k]), length)) for k, length in enumerate(lengths)]


@dataclass(frozen=True, slots=True)
class Stack(Operation):
    """All inputs, of one shape, joined along a new dimension ``dim``."""

    dim: int

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.stack(list(tensors), dim=self.dim)]

    def __str__(self) -> str:
        return f"stack(dim {self.dim})"

    def trace(self, shapes: Sequence[Shape]) -> list[Trace]:
        return [Trace(0, Copy(), Unstack(self.dim, index)) for index in range(len(shapes))]


@dataclass(frozen=True, slots=True)
class InsertZeros(Operation):
    """A tensor of zeros before input ``index``, such as the bias of a key projection that has none.

    >>> InsertZeros(0, (1,)).apply([torch.ones(1)])
    [tensor([0.]), tensor([1.])]
    """

    index: int
    shape: Shape

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [*tensors[: self.index], tensors[0].new_zeros(self.shape), *tensors[self.index :]]

    def trace(self, shapes: Sequence[Shape]) -> list[Trace]:
        return [Trace(place + (place >= self.index), Copy(), Copy()) for place in range(len(shapes))]

    def __str__(self) -> str:
        return f"zeros{list(self.shape)} at {self.index}"


@dataclass(frozen=True, slots=True)
class Grouped(Operation):
    """``operation`` on every run of ``size`` inputs, such as gate and up of each expert before they are stacked."""

    size: int
    operation: Operation

    @property
    def parts(self) -> tuple[Operation, ...]:
        return (self.operation,)

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        groups = (tensors[start : start + self.size] for start in range(0, len(tensors), self.size))
        return [result for group in groups for result in self.operation.apply(group)]

    def __str__(self) -> str:
        return f"{self.operation} by {self.size}"

    def trace(self, shapes: Sequence[Shape]) -> list[Trace]:
        groups = [self.operation.trace(shapes[start : start + self.size]) for start in range(0, len(shapes), self.size)]
        return _numbered(groups)


@dataclass(frozen=True, slots=True)
class Parallel(Operation):
    """An operation of its own for each input, or for as many as it takes."""

    operations: tuple[Operation, ...]

    @property
    def parts(self) -> tuple[Operation, ...]:
        return self.operations

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [result for operation, own in self.runs(tensors) for result in operation.apply(own)]

    def runs(self, inputs: Sequence[T]) -> list[tuple[Operation, Sequence[T]]]:
        """Pair each operation with its own inputs."""
        ends = list(accumulate(operation.arity for operation in self.operations))
        if ends[-1] != len(inputs):
            raise ValueError(f"'{self}' takes {ends[-1]} inputs, not {len(inputs)}")
        starts = zip(self.operations, ends, strict=True)
        return [(operation, inputs[end - operation.arity : end]) for operation, end in starts]

    def __str__(self) -> str:
        return "(" + ", ".join(str(operation) for operation in self.operations) + ")"

    def trace(self, shapes: Sequence[Shape]) -> list[Trace]:
        return _numbered([step.trace(own) for step, own in self.runs(shapes)])


@dataclass(frozen=True, slots=True)
class Chain(Operation):
    """Several operations, one after another.

    >>> print(Chain((Transpose(), Concatenate(0))))
    transpose + concatenate(dim 0)
    """

    steps: tuple[Operation, ...]

    @property
    def parts(self) -> tuple[Operation, ...]:
        return self.steps

    @property
    def arity(self) -> int:
        return self.steps[0].arity

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        results = list(tensors)
        for step in self.steps:
            results = step.apply(results)
        return results

    def __str__(self) -> str:
        return " + ".join(str(step) for step in self.steps)

    def trace(self, shapes: Sequence[Shape]) -> list[Trace]:
        traces, current = Copy().trace(shapes), list(shapes)
        forward: list[Operation | None] = [Copy()] * len(shapes)  # from each input so far; None once it was joined
        for step in self.steps:
            then = [step.trace(current)[trace.output] for trace in traces]
            alone = [_on_one(step, trace.output) for trace in traces]
            forward = [
                chain(before, own) if before and own else None for before, own in zip(forward, alone, strict=True)
            ]
            traces = [
                Trace(after.output, *self._part(before, after, whole))
                for before, after, whole in zip(traces, then, forward, strict=True)
            ]
            current = output_shapes(step, current)
        return traces

    def _part(self, before: Trace, after: Trace, forward: Operation | None) -> tuple[Operation, Operation]:
        if isinstance(after.view, Copy):
            return before.view, chain(after.restore, before.restore)
        if forward is None:
            raise NotInvertibleError(f"'{self}' takes a part of what it joins; its inputs cannot be restored.")
        return forward, Copy()


def chain(*steps: Operation) -> Operation:
    """Compose operations, leaving out those that change nothing and those that undo each other.

    >>> chain(Copy(), Transpose())
    Transpose()
    >>> chain(Permute((2, 0, 1)), Permute((1, 2, 0)))
    Copy()
    """
    needed: list[Operation] = []
    for step in (inner for given in steps for inner in steps_of(given)):
        if needed and _undoes(step, needed[-1]):
            needed.pop()
        else:
            needed.append(step)
    if len(needed) < 2:
        return needed[0] if needed else Copy()
    return Chain(tuple(needed))


def in_parallel(operations: Sequence[Operation]) -> Operation:
    """Combine operations that have an input each; if all are the same, that one does for every input."""
    return operations[0] if len(set(operations)) == 1 else Parallel(tuple(operations))


def _undoes(second: Operation, first: Operation) -> bool:
    """True if two operations, one after the other, leave dimensions as they were."""
    if isinstance(first, Permute) and isinstance(second, Permute) and len(first.dims) == len(second.dims):
        return all(first.dims[dim] == place for place, dim in enumerate(second.dims))
    return isinstance(first, Transpose) and isinstance(second, Transpose)


def _numbered(groups: Sequence[Sequence[Trace]]) -> list[Trace]:
    """Number the outputs of operations side by side."""
    result: list[Trace] = []
    offset = 0
    for traces in groups:
        result += [replace(trace, output=trace.output + offset) for trace in traces]
        offset += max(trace.output for trace in traces) + 1
    return result


def _on_one(operation: Operation, place: int) -> Operation | None:
    """Return what an operation does to one of its inputs alone; None where it joins it with others."""
    if isinstance(operation, Parallel):
        return operation.operations[place]
    if isinstance(operation, InsertZeros):
        return Copy()
    return None if isinstance(operation, Concatenate | Stack | Grouped) else operation


def output_shapes(operation: Operation, shapes: Sequence[Shape]) -> list[Shape]:
    """Compute the shapes of an operation's results from those of its inputs.

    >>> output_shapes(Concatenate(0), [(1, 3), (2, 3)])
    [(3, 3)]
    """
    return [tuple(tensor.shape) for tensor in operation.apply([torch.empty(shape, device="meta") for shape in shapes])]


def steps_of(operation: Operation) -> tuple[Operation, ...]:
    """List the steps of an operation, without those that change nothing."""
    if isinstance(operation, Chain):
        return operation.steps
    return () if isinstance(operation, Copy) else (operation,)
