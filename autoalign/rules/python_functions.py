"""The functions of ``plan`` that exported Python calls, as source without annotations and docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

from autoalign.plan import dequantise, parametrised
from autoalign.plan.dequantise import SCHEMES, Dequantise
from autoalign.plan.parametrised import PARAMETRISATIONS, Combine

_WORD = re.compile(r"\b[A-Za-z_]\w*")
_VALUES = """
def _values(tensors, roles, compute, shape_of):
    found = []
    for start in range(0, len(tensors), len(roles)):
        inputs = dict(zip(roles, tensors[start : start + len(roles)], strict=True))
        shape = shape_of({role: tuple(tensor.shape) for role, tensor in inputs.items()})
        if shape is None:
            raise ValueError("codes and scales do not fit together")
        found.append(compute(inputs, shape))
    return found
"""


@dataclass(frozen=True, slots=True)
class Function:
    """A function or a constant, as source."""

    lines: tuple[str, ...]
    imports: frozenset[str]


def call_of(step: Dequantise | Combine, tensors: str) -> str:
    """Write the call that computes what an operation does to a list of tensors, of that name."""
    if isinstance(step, Combine):
        name, count = _name(PARAMETRISATIONS[step.scheme].weight), step.arity
        return f"[{name}({tensors}[i : i + {count}]) for i in range(0, len({tensors}), {count})]"
    scheme = SCHEMES[step.scheme]
    shape = f"lambda _: {tuple(step.shape)}" if step.shape else _name(scheme.shape)
    return f"_values({tensors}, {tuple(step.roles)}, {_name(scheme.values)}, {shape})"


def _name(function: Any) -> str:
    if isinstance(function, partial):
        given = "".join(f", {name}={value!r}" for name, value in function.keywords.items())
        return f"partial({_name(function.func)}{given})"
    return str(function.__name__)


def functions_in(lines: Iterable[str]) -> list[Function]:
    """Return the functions that are called in some lines, and those that they call, in an order in which they work."""
    words = {word for line in lines for word in _WORD.findall(line)}
    found = [Function(tuple(_VALUES.strip().splitlines()), frozenset())] if "_values" in words else []
    for module in (dequantise, parametrised):
        nodes, imports = _parts(module)
        needed: set[str] = set()
        left = [word for word in words if word.startswith("_") or word == "mlx_shape"]
        while left:
            name = left.pop()
            if name in nodes and name not in needed:
                needed.add(name)
                left += [node.id for node in ast.walk(nodes[name]) if isinstance(node, ast.Name)]
        for name, node in nodes.items():
            if name in needed:
                used = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} & imports.keys()
                found.append(Function(tuple(ast.unparse(node).splitlines()), frozenset(imports[each] for each in used)))
    if "partial" in words:
        found.append(Function((), frozenset({"from functools import partial"})))
    return found


class _Plain(ast.NodeTransformer):
    """Leaves out annotations and docstrings."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.returns = None
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        return ast.Assign([node.target], node.value, lineno=node.lineno) if node.value else node


@cache
def _parts(module: ModuleType) -> tuple[dict[str, ast.AST], dict[str, str]]:
    """Return the functions and constants of a module by name, and the lines that import other names."""
    nodes: dict[str, ast.AST] = {}
    imports: dict[str, str] = {}
    for node in ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports |= {name.asname or name.name: _import(node, name) for name in node.names}
        elif isinstance(node, ast.FunctionDef):
            nodes[node.name] = _Plain().visit(node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            nodes[node.targets[0].id] = node
    return nodes, imports


def _import(node: ast.Import | ast.ImportFrom, name: ast.alias) -> str:
    return f"import {name.name}" if isinstance(node, ast.Import) else f"from {node.module} import {name.name}"
