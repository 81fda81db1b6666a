"""Dataflow: what one call of a module computes from what, as a networkx graph, recorded on tensors without data.

A dispatch mode sees every operation below autograd, whatever Python does around it. Where Python asks for a value that
is not there, it gets one: what depends on no parameter and no large input is computed, and of the rest every condition
is assumed to hold and every mask to hold everywhere.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from itertools import chain
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map, tree_map_only

from autoalign.errors import InputError, TraceError
from autoalign.loading.transaction import snapshot
from autoalign.plan.keys import numbers
from autoalign.verification.example_inputs import guessed_inputs
from autoalign.verification.run import arguments_of, flat_tensors, quiet

_MAX_COMPUTED = 1 << 14  # elements of a tensor without parameters behind it that is computed
_MAX_OPERATIONS = 30_000  # of a call, which else might loop over values that are not there
_MAX_TRIED = 12  # guessed inputs
_MAX_REASONS = 3  # that are listed
_SAME = frozenset({"detach", "alias", "lift_fresh"})  # operations that leave a tensor as it is


def dataflow(module: nn.Module, example_inputs: object = None) -> nx.DiGraph:
    """Return the graph of one call of a module: which tensors and operations feed which.

    The call is made in evaluation mode on tensors without data, so that it takes no memory and works on the meta device
    too; the module is left as it was. What a call does for some inputs only may be missing.

    Nodes are keys of the state dict (of tied tensors the first), numbers of operations in their order,
    ``"input:NAME"``, ``"output:PATH"`` and ``"constant:NUMBER"``. All have ``kind`` (``"parameter"``, ``"buffer"``,
    ``"operation"``, ``"input"``, ``"output"``, ``"constant"``), ``shape`` and ``dtype`` (of the first result).
    Operations have ``operation`` (the name in aten), ``settings`` (their arguments that are no tensors) and ``module``
    (the path of the module that runs them). Where modules of equal class and shapes are listed, what is in them has
    ``repeated``, the list's path, and ``member``, the number.
    Edges have ``arguments``, the names of the arguments that the node is given as, and ``results``, the number of each
    among the results of the node before.

    The graph has ``graph["inputs"]``, what the module was called with, and ``graph["assumed"]``, which operations were
    given values by assumption.

    >>> graph = dataflow(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), torch.ones(1, 3))
    >>> [graph.nodes[node]["operation"] for node in graph if graph.nodes[node]["kind"] == "operation"]
    ['t', 'addmm', 'relu']
    >>> dataflow(nn.Linear(3, 2)).graph["inputs"]
    'vectors [1, 8, 3] by the first Linear'

    Args:
        module: What is called.
        example_inputs: What it is called with, as ``execution_order`` takes it; by default guessed.

    Raises:
        TraceError: The module cannot be called so; the text has the reason.
    """
    graph, _ = traced(module, example_inputs)
    return graph


def traced(module: nn.Module, example_inputs: object = None) -> tuple[nx.DiGraph, object]:
    """Return the graph of one call of a module, see ``dataflow``, and what it was called with."""
    if not isinstance(module, nn.Module):
        raise InputError(f"Expected an nn.Module to call, not {type(module).__name__}. Nothing was called.")
    given = [(example_inputs, "as given")] if example_inputs is not None else guessed_inputs(module)
    reasons: dict[str, str] = {}
    for (inputs, said), _ in zip(given, range(_MAX_TRIED), strict=False):
        try:
            with _put_back(module):
                graph = _recorded(module, inputs)
        except Exception as error:  # any, since the code is not ours
            text = str(error).strip().splitlines() or ["without a message"]
            reasons.setdefault(f"{type(error).__name__}: {text[0]}", said)
        else:
            graph.graph["inputs"] = said
            return graph, inputs
    why = [f"{reason} (inputs: {said})" for reason, said in reasons.items()][:_MAX_REASONS]
    raise TraceError(
        f"{type(module).__name__} could not be called on tensors without data: {'; '.join(why) or 'no inputs fit'}. "
        "Give example_inputs=, what it is called with: a tensor, a tuple of its arguments, or a dict of keyword "
        "arguments."
    )


def inputs_within(module: nn.Module, inputs: object, path: str) -> tuple[Any, ...] | None:
    """Return what a module inside is called with first in a call of one: arguments, and keyword arguments last.

    Tensors that no parameter and no large input is behind have their values, and others random ones, the same for the
    same shapes in the same order. What is no tensor, number, text or collection of such, such as a cache, is None.
    None is returned where the module is not called.

    Raises:
        TraceError: The call fails.
    """
    found: list[tuple[Any, ...]] = []
    try:
        with _put_back(module):
            _recorded(module, inputs, (path, found.append))
    except Exception as error:  # any, since the code is not ours
        raise TraceError(f"{type(module).__name__} could not be called on tensors without data: {error}") from error
    return found[0] if found else None


@contextmanager
def _put_back(module: nn.Module) -> Iterator[None]:
    """Leave modules with the attributes that they have, whatever a call keeps of its tensors in them."""
    with ExitStack() as stack:
        for inner in module.modules():
            held = {name: copy(value) for name, value in vars(inner).items() if type(value) in (dict, list)}
            stack.callback(_set_attributes, inner, dict(vars(inner)), held)
        stack.callback(snapshot(module, keep_values=False))
        stack.enter_context(quiet(module))
        logger = logging.getLogger("torch._subclasses.fake_tensor")  # which logs what it raises
        stack.callback(setattr, logger, "disabled", logger.disabled)
        logger.disabled = True
        if "torch._dynamo" in sys.modules:  # or compiled functions would be traced by it
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _set_attributes(module: nn.Module, attributes: Mapping[str, Any], held: Mapping[str, Any]) -> None:
    """Set the attributes of a module, and what its dictionaries and lists hold, such as tables that it keeps."""
    vars(module).clear()
    vars(module).update(attributes)
    for name, values in held.items():
        attributes[name].clear()
        (attributes[name].update if isinstance(values, dict) else attributes[name].extend)(values)


def _recorded(
    module: nn.Module, inputs: object, watched: tuple[str, Callable[[tuple[Any, ...]], None]] | None = None
) -> nx.DiGraph:
    """Record a call; what is ``watched`` is the path of a module inside, and what takes its inputs."""
    recorder = _Recorder()
    names = {id(inner): name for name, inner in reversed([*module.named_modules()])}

    def enter(inner: nn.Module, _: object) -> None:
        recorder.modules.append(names.get(id(inner), recorder.modules[-1]))

    def leave(*_: object) -> None:
        recorder.modules.pop()

    with ExitStack() as stack:
        known: dict[int, Tensor] = {}
        keys = {*module.state_dict(keep_vars=True)}
        for prefix, inner in module.named_modules():
            for kind, registry in (("parameter", inner._parameters), ("buffer", inner._buffers)):
                for name, tensor in registry.items():
                    key = f"{prefix}.{name}".removeprefix(".")
                    if tensor is not None and id(tensor) not in known:
                        known[id(tensor)] = recorder.stand_in(tensor, key, kind if key in keys else "constant")
                    if tensor is not None:
                        registry[name] = known[id(tensor)]
        arguments, options = arguments_of(inputs)
        placed = flat_tensors({**dict(enumerate(arguments)), **options})
        fakes = {id(tensor): recorder.stand_in(tensor, f"input:{name}", "input") for name, tensor in placed.items()}
        arguments, options = tree_map_only(Tensor, lambda tensor: fakes.get(id(tensor), tensor), (arguments, options))
        stack.callback(register_module_forward_pre_hook(enter).remove)
        if watched is not None:
            path, take = watched
            hook = module.get_submodule(path).register_forward_pre_hook(
                lambda _, args, kwargs: take((*recorder.with_values(args), recorder.with_values(kwargs))),
                with_kwargs=True,
            )
            stack.callback(hook.remove)
        stack.callback(register_module_forward_hook(leave, always_call=True).remove)
        stack.enter_context(recorder.fake_mode)
        stack.enter_context(recorder)
        outputs = flat_tensors(module(*arguments, **options))
    for name, tensor in outputs.items():
        recorder.add_output(name, tensor)
    graph = recorder.graph
    graph.graph["assumed"] = sorted(recorder.assumed)
    _mark_repeated(graph, module)
    return graph


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record operations on fake tensors, while entered after ``fake_mode``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.graph: nx.DiGraph = nx.DiGraph()
        self.modules = [""]  # that are running, the innermost last
        self.assumed: set[str] = set()
        self._held: dict[int, Tensor] = {}  # all tensors that were seen, so that no two have one id
        self._fakes: dict[int, Tensor] = {}  # of tensors with data
        self._made_by: dict[int, tuple[object, int]] = {}  # the node of a tensor, and its number among the results
        self._written: dict[int, tuple[object, int]] = {}  # the same of the last operation that changed a storage
        self._computed: dict[int, Tensor] = {}  # the values of small tensors without parameters behind them
        self._count = 0

    def stand_in(self, tensor: Tensor, name: str, kind: str) -> Tensor:
        """Return a tensor without data on the CPU in place of one, as a node."""
        with self.fake_mode:
            fake: Tensor = (
                torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
                if tensor.layout is torch.strided
                else torch.empty(tensor.shape, dtype=tensor.dtype)
            )
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=False)
        self.graph.add_node(name, kind=kind, shape=tuple(tensor.shape), dtype=tensor.dtype)
        self._keep(fake, (name, 0))
        self._held[id(tensor)] = tensor
        if kind in ("input", "constant") and tensor.numel() <= _MAX_COMPUTED:
            with _disable_current_modes():
                self._compute(fake, tensor.detach().clone())
        return fake

    def _keep(self, tensor: Tensor, made_by: tuple[object, int]) -> None:
        self._held[id(tensor)] = tensor
        self._made_by[id(tensor)] = made_by

    def _compute(self, fake: Tensor, value: Any) -> None:
        if isinstance(value, Tensor) and value.numel() <= _MAX_COMPUTED and value.device.type == "cpu":
            self._computed[id(fake)] = value
            self._held[id(value)] = value

    def _fake(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._fakes:
            self._fakes[id(tensor)] = self.stand_in(tensor, f"constant:{len(self._fakes)}", "constant")
        return self._fakes[id(tensor)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, self._fake, (args, kwargs or {}))
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        name = func._schema.name.rpartition("::")[2]
        given = list(_named_tensors(func, args, kwargs))
        values = self._values(func, args, kwargs, given)
        try:
            result = func(*args, **kwargs)
        except RuntimeError:  # such as one that says that its shape depends on values
            if values is None and name not in _ASSUMED:
                raise
            result = self._without_data(name, func, args, kwargs, values)
        tensors = [result] if isinstance(result, Tensor) else result if isinstance(result, list | tuple) else []
        known = values if isinstance(values, list | tuple) else [values] * len(tensors)
        if name in _SAME and given:
            self._keep(result, self._made_by[id(given[0][1])])
        elif any(isinstance(tensor, Tensor) for tensor in tensors):
            self._add(func, name, given, tensors, _settings(func, args, kwargs))
        for tensor, value in zip(tensors, known, strict=False):
            if isinstance(tensor, Tensor):
                self._compute(tensor, value)
        return result

    def _add(
        self,
        func: Any,
        name: str,
        given: Sequence[tuple[str, Tensor]],
        results: Sequence[Any],
        settings: Mapping[str, object],
    ) -> None:
        """Add an operation with what it is given; a tensor that was changed in place is from what changed it too."""
        node, self._count = self._count, self._count + 1
        if self._count > _MAX_OPERATIONS:
            raise OverflowError(f"more than {_MAX_OPERATIONS:,} operations")
        first = next(tensor for tensor in results if isinstance(tensor, Tensor))
        self.graph.add_node(
            node,
            kind="operation",
            operation=name,
            settings=settings,
            module=self.modules[-1],
            shape=tuple(first.shape),
            dtype=first.dtype,
        )
        for argument, tensor in given:
            self._connect(tensor, node, argument)
        for place, tensor in enumerate(results):
            if isinstance(tensor, Tensor):
                self._keep(tensor, (node, place))
        if func._schema.is_mutable:
            changed = {argument.name for argument in func._schema.arguments if argument.is_write}
            for argument, tensor in given:
                if argument.partition(".")[0] in changed:
                    self._keep(tensor, (node, 0))
                    self._written[tensor.untyped_storage()._cdata] = node, 0

    def _connect(self, tensor: Tensor, node: object, argument: str) -> None:
        made, written = self._made_by[id(tensor)], self._written.get(tensor.untyped_storage()._cdata)
        is_late = written is not None and (not isinstance(made[0], int) or written[0] > made[0])  # type: ignore[operator]
        for before, place in dict.fromkeys([made, written] if written and is_late else [made]):
            edge = self.graph.get_edge_data(before, node, {"arguments": (), "results": ()})
            arguments, results = (*edge["arguments"], argument), (*edge["results"], place)
            self.graph.add_edge(before, node, arguments=arguments, results=results)

    def with_values(self, given: Any) -> Any:
        """Return nested arguments with values in their tensors: those that are known, and random ones."""
        counts: Counter[object] = Counter()

        def valued(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf if isinstance(leaf, bool | int | float | str) else None
            if id(leaf) in self._computed:
                return self._computed[id(leaf)].clone()
            shape = tuple(leaf.shape)
            counts[shape] += 1
            values = torch.randn(shape, generator=torch.Generator().manual_seed(counts[shape]))
            return values if leaf.is_floating_point() else values.abs().to(leaf.dtype)

        with _disable_current_modes():
            return tree_map(valued, given)

    def add_output(self, name: str, tensor: Tensor) -> None:
        """Add what the module returns as a node."""
        node, tensor = f"output:{name}", self._fake(tensor)
        self.graph.add_node(node, kind="output", shape=tuple(tensor.shape), dtype=tensor.dtype)
        self._connect(tensor, node, "result")

    def _values(self, func: Any, args: Any, kwargs: Any, given: Sequence[tuple[str, Tensor]]) -> Any:
        """Compute an operation where all that it is given has values; None where not."""
        if not all(id(tensor) in self._computed for _, tensor in given):
            return None
        sizes = args[0] if args and not given and isinstance(args[0], list | tuple) else ()
        if any(isinstance(size, int) and size > _MAX_COMPUTED for size in chain(sizes, args)):
            return None
        args, kwargs = tree_map_only(Tensor, lambda tensor: self._computed[id(tensor)], (args, kwargs))
        try:
            with _disable_current_modes():
                return func(*args, **kwargs)
        except Exception:  # the call on fake tensors says more of it
            return None

    def _without_data(self, name: str, func: Any, args: Any, kwargs: Any, values: Any) -> Any:
        """Return a result of the shape or the value that an operation has by its values, or else by assumption."""
        if isinstance(values, Tensor):
            return self.fake_mode.from_tensor(values)
        if values is not None:
            return values
        self.assumed.add(name)
        return _ASSUMED[name](func, args, kwargs)


def _named_tensors(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that an operation is given, by the names of its arguments and their numbers in lists."""
    names = [argument.name for argument in func._schema.arguments]
    for name, value in chain(zip(names, args, strict=False), kwargs.items()):
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, list | tuple):
            yield from ((f"{name}.{place}", item) for place, item in enumerate(value) if isinstance(item, Tensor))


def _settings(func: Any, args: Any, kwargs: Any) -> dict[str, object]:
    """Return the arguments of an operation that hold no tensors, by their names."""
    named = chain(zip((argument.name for argument in func._schema.arguments), args, strict=False), kwargs.items())
    return {
        name: value for name, value in named if not isinstance(next(iter(flat_tensors(value).values()), None), Tensor)
    }


def _one_value(_: Any, args: Any, __: Any) -> Any:
    return args[0].reshape(-1)[:1], torch.empty(args[0].shape, dtype=torch.long), torch.empty(1, dtype=torch.long)


def _everywhere(func: Any, args: Any, kwargs: Any) -> Any:
    """Index by masks as if they held everywhere."""
    indices: list[Tensor | None] = []
    for index in args[1]:
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        indices += [torch.empty(index.numel(), dtype=torch.long)] * index.dim() if is_mask else [index]
    return func(args[0], indices, *args[2:], **kwargs)


# what is assumed of operations whose results depend on values
_ASSUMED: dict[str, Callable[[Any, Any, Any], Any]] = {
    "_local_scalar_dense": lambda _, args, __: (
        args[0].dtype == torch.bool or (1.0 if args[0].is_floating_point() else 1)
    ),
    "equal": lambda *_: True,
    "nonzero": lambda _, args, __: torch.empty((args[0].numel(), args[0].dim()), dtype=torch.long),
    "index": _everywhere,
    "masked_select": lambda _, args, __: (args[0] * args[1]).reshape(-1),
    "_unique2": _one_value,
    "unique_consecutive": _one_value,
    "_grouped_mm": lambda _, args, __: torch.empty((*args[0].shape[:-1], args[1].shape[-1]), dtype=args[0].dtype),
    "nms": lambda _, args, __: torch.empty(args[0].shape[0], dtype=torch.long),
}


def _mark_repeated(graph: nx.DiGraph, module: nn.Module) -> None:
    """Mark nodes in members of lists whose members have the same class and shapes, of nested ones the innermost."""
    marks: dict[str, tuple[str, int]] = {}
    for path, inner in module.named_modules():
        alike: dict[object, list[str]] = {}
        for name, child in inner.named_children():
            if numbers(name):
                shapes = tuple((key, tensor.shape) for key, tensor in child.named_parameters())
                alike.setdefault((type(child), shapes), []).append(name)
        for names in alike.values():
            if len(names) > 1:
                marks |= {f"{path}.{name}".removeprefix("."): (path, numbers(name)[-1]) for name in names}
    found: dict[str, tuple[str, int] | None] = {"": None}

    def mark_of(path: str) -> tuple[str, int] | None:
        if path not in found:
            found[path] = marks[path] if path in marks else mark_of(path.rpartition(".")[0])
        return found[path]

    for node, data in graph.nodes.items():
        place = data["module"] if data["kind"] == "operation" else str(node).rpartition(".")[0]
        if data["kind"] in ("operation", "parameter", "buffer") and (mark := mark_of(place)):
            data["repeated"], data["member"] = mark
