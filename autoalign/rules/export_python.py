"""Rules as the Python source of a function that needs torch alone, laid out as formatters do.

What it calls of ``plan``, to dequantise or to combine, stands before it, without annotations and docstrings.
"""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

from autoalign.errors import InputError, RulesError
from autoalign.plan import dequantise, parametrised
from autoalign.plan.dequantise import SCHEMES, Dequantise
from autoalign.plan.operations import (
    Concatenate,
    Flip,
    Grouped,
    InsertZeros,
    Operation,
    Parallel,
    Permute,
    Reshape,
    Split,
    Stack,
    Transpose,
    Unstack,
    steps_of,
)
from autoalign.plan.parametrised import PARAMETRISATIONS, Combine
from autoalign.plan.serialization import check_operation
from autoalign.rules.rule import SLICE, Arithmetic, Rule, tokens_of
from autoalign.rules.size_free import Each, Pick, Portion, Regroup, Sized, ZerosLike

_WIDTH = 88  # of a line, as formatters have it by default
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

_Group = Callable[[int], str]  # how the code reads a capture


def source_of(rules: Sequence[Rule], name: str) -> str:
    """Write rules as the source of a function; see ``Rules.to_python``."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise InputError(f"{name!r} is not a valid function name. Nothing was written.")
    body: list[str] = []
    joined: list[str] = []
    refused: list[str] = []
    for number, rule in enumerate(rules):
        try:
            first, second = _rule(rule, number)
        except _NoShortFormError:
            refused.append(f"  {rule}")
            continue
        body += first
        joined += second
    if refused:
        raise RulesError(
            f"{len(refused)} of {len(rules)} rules hold operations that have no short form in Python, such as those of "
            "adapt. Nothing was written. Use rules.apply instead.\n" + "\n".join(refused)
        )
    functions = _functions_in([*body, *joined])
    imports = {"import re"} if rules else set[str]()
    imports |= {"import torch"} if any("torch." in line for line in (*body, *joined)) else set()
    imports |= {line for each in functions for line in each.imports}
    first = sorted((line for line in imports if "torch" not in line), key=lambda line: (line.startswith("from"), line))
    torch_imports = sorted(imports - {*first}, key=lambda line: (line.startswith("from"), line))
    lines = [
        *([*first, ""] if first else []),
        *([*torch_imports, ""] if torch_imports else []),
        *([""] if rules else []),
        *(line for each in functions for line in (*each.lines, "", "")),
        f"def {name}(state_dict, model=None):",
        '    """Rename and convert the tensors of a checkpoint; those that no rule takes keep their names."""',
        "    result = {}",
        *(["    parts = {}"] if joined else []),
        "    for key, tensor in state_dict.items():",
        *_indented(body, 2),
        "        result[key] = tensor",
    ]
    if joined:
        lines += ["    for whole, found in parts.items():"]
        lines += _indented(["inputs = [found[place] for place in sorted(found)]", *joined], 2)
    laid_out = [line for text in [*lines, "    return result", ""] for line in _laid_out(text)]
    return "\n".join(laid_out)


class _NoShortFormError(Exception):
    """An operation that is not written as Python."""


def _rule(rule: Rule, number: int) -> tuple[list[str], list[str]]:
    """Write a rule: the lines for each key, and the lines for tensors that are joined, once all are there."""
    for operation in rule.operations:
        check_operation(operation)  # its fields become code, and must be numbers
    listed = f"(?P<{SLICE}>" in rule.sources[0]
    if len(rule.sources) == 1 and not listed:
        return [*_matched(rule.sources[0]), *_indented([*_alone(rule), "continue"], 1)], []
    body: list[str] = []
    for place, source in enumerate(rule.sources):
        pattern = re.compile(source)
        groups = [group for group in range(1, pattern.groups + 1) if group not in pattern.groupindex.values()]
        parts = ", ".join([str(number), *(f"match[{group}]" for group in groups), "key[match.end() :]"])
        member = f'int(match["{SLICE}"])' if listed else "0"
        body += _matched(source)
        lines = [f"whole = ({parts})", f"parts.setdefault(whole, {{}})[{member}, {place}] = tensor", "continue"]
        body += _indented(lines, 1)
    count = len(rule.sources)
    lacking = f"len(inputs) % {count}" if listed else f"len(inputs) != {count}"
    after = []
    if count > 1:
        after += [f"if {lacking}:", '    raise KeyError(f"a part is missing: {whole}")']
    place_of = {group: index for index, group in enumerate(groups, start=1)}
    variable = "part" if len(rule.targets) > 1 else "inputs"
    for target, operation in rule.fills:
        after += ["part = list(inputs)"] if variable == "part" else []
        after += _steps(steps_of(operation), variable, several=True)
        after += _named(target, lambda group: f"whole[{place_of[group]}]")
        after += [f"result[name + whole[-1]] = {variable}[0]"]
    return body, [f"if whole[0] == {number}:", *_indented(after, 1)]


def _matched(source: str) -> list[str]:
    return [_OPEN.join(["match = re.match(", _text(source, raw=True), "key"]), "if match:"]


def _alone(rule: Rule) -> list[str]:
    """Write what is done with a tensor that is not joined with others."""
    lines = []
    for target, operation in rule.fills:
        steps = steps_of(operation)
        variable = "tensor" if len(rule.targets) == 1 or not steps else "part"
        if variable == "part":
            lines.append("part = tensor")
        loop = next((place for place, step in enumerate(steps) if isinstance(step, Each)), None)
        if any(isinstance(step, Pick) for step in steps):  # one tensor is taken several times
            lines += [f"inputs = [{variable}]", *_steps(steps, "inputs", several=True), f"{variable} = inputs[0]"]
        else:
            lines += _steps(steps[:loop], variable)
        naming = _named(target, lambda group: f"match[{group}]")
        if loop is None:
            lines += [*naming, f"result[name + key[match.end() :]] = {variable}"]
            continue
        inner = [*_steps(steps[loop + 1 :], "piece"), *naming, "result[name + key[match.end() :]] = piece"]
        dim = steps[loop].dim  # type: ignore[attr-defined]
        lines += [f"for {SLICE}, piece in enumerate({variable}.unbind({dim})):", *_indented(inner, 1)]
    return lines


def _steps(steps: Sequence[Operation], variable: str, *, several: bool = False) -> list[str]:
    return [line for step in steps for line in _step(step, variable, several=several)]


def _step(step: Operation, variable: str, *, several: bool) -> list[str]:
    """Write a step on a tensor, or on a list of them."""
    if several:
        match step:
            case Concatenate(dim):
                return [f"{variable} = [torch.cat({variable}, dim={dim})]"]
            case Stack(dim):
                return [f"{variable} = [torch.stack({variable}, dim={dim})]"]
            case InsertZeros(index, shape):
                return [f"{variable}.insert({index}, {variable}[0].new_zeros({tuple(shape)}))"]
            case ZerosLike(index, like):
                return [f"{variable}.insert({index}, {variable}[0].new_zeros({variable}[{like}].shape))"]
            case Pick(places):
                return [f"{variable} = [{', '.join(f'{variable}[{place}]' for place in places)}]"]
            case Dequantise() | Combine():
                return [f"{variable} = {_call_of(step, variable)}"]
            case Parallel(operations) if any(own.arity > 1 for own in operations):
                lines = ["made = []"]
                for own, run in step.runs(range(sum(own.arity for own in operations))):
                    lines += [f"own = {variable}[{run[0]} : {run[-1] + 1}]"]
                    lines += [*_steps(steps_of(own), "own", several=True), "made += own"]
                return [*lines, f"{variable} = made"]
            case Parallel(operations):
                each = (_steps(steps_of(own), f"{variable}[{place}]") for place, own in enumerate(operations))
                return [line for lines in each for line in lines]
            case Sized(shapes, operation):
                wanted = f"[{', '.join(str(tuple(shape)) for shape in shapes)}]"
                refusal = _refusal(f"[tuple(x.shape) for x in {variable}] != {wanted}")
                return [*refusal, *_steps(steps_of(operation), variable, several=True)]
            case Grouped(size, operation):
                inner = _steps(steps_of(operation), "group", several=True)
                return [
                    "groups = []",
                    f"for start in range(0, len({variable}), {size}):",
                    *_indented([f"group = {variable}[start : start + {size}]", *inner, "groups += group"], 1),
                    f"{variable} = groups",
                ]
        inner = _step(step, "x", several=False)
        if len(inner) > 1 or _OPEN in inner[0]:
            return [f"for place, x in enumerate({variable}):", *_indented([*inner, f"{variable}[place] = x"], 1)]
        return [f"{variable} = [{inner[0].removeprefix('x = ')} for x in {variable}]"]
    x = variable
    match step:
        case Dequantise() if step.arity == 1:
            return [f"({x},) = {_call_of(step, f'[{x}]')}"]
        case Transpose():
            return [f"{x} = {x}.transpose(0, 1)"]
        case Permute(dims):
            return [f"{x} = {x}.permute{tuple(dims)}"]
        case Flip(dim):
            return [f"{x} = {x}.flip({dim})"]
        case Reshape(shape):
            return [f"{x} = {x}.reshape({tuple(shape)})"]
        case Split(dim, start, length):
            return [f"{x} = {x}.narrow({dim}, {start}, {length})"]
        case Unstack(dim, index):
            return [f"{x} = {x}.select({dim}, {index})"]
        case Portion(dim, start, 1, of):
            return [f"{x} = {x}.unflatten({dim}, ({of}, -1)).select({dim}, {start})"]
        case Portion(dim, start, length, of):
            parts = f"{x}.unflatten({dim}, ({of}, -1)).narrow({dim}, {start}, {length})"
            return [f"{x} = {parts}.flatten({dim}, {dim + 1})"]
        case Regroup(dims):
            sizes = [
                str(dim) if isinstance(dim, int) else " * ".join(f"{x}.shape[{d}]" for d in dim) or "1" for dim in dims
            ]
            return [_OPEN.join([f"{x} = {x}.reshape(", *(sizes or ["()"])])]
        case Sized((shape,), operation):
            return [*_refusal(f"tuple({x}.shape) != {tuple(shape)}"), *_steps(steps_of(operation), x)]
    raise _NoShortFormError


def _refusal(condition: str) -> list[str]:
    return [f"if {condition}:", '    raise ValueError("this holds for tensors of other sizes")']


def _named(target: str, group: _Group) -> list[str]:
    """Write the lines that assign ``name``."""
    before: list[str] = []
    parts: list[tuple[str, bool]] = []  # True: it is code
    for token in tokens_of(target):
        if isinstance(token, str):
            parts.append((token, False))
        elif isinstance(token, int):
            parts.append((group(token), True))
        elif token.is_plain:
            parts.append((group(token.groups[0]) if token.groups else SLICE, True))
        else:
            variable = f"i{len(before)}"
            before.append(f"{variable} = {_code(token, group)}")
            parts.append((variable, True))
    if not any(is_code for _, is_code in parts):
        return [*before, f"name = {_text(''.join(text for text, _ in parts))}"]
    texts = [text for text, is_code in parts if not is_code]
    if all(text.isprintable() and not set(text) & set("\"'\\") for text in texts):
        body = "".join(
            f"{{{text}}}" if is_code else text.replace("{", "{{").replace("}", "}}") for text, is_code in parts
        )
        return [*before, f'name = f"{body}"']
    return [*before, "name = " + " + ".join(f"str({text})" if is_code else _text(text) for text, is_code in parts)]


def _code(arithmetic: Arithmetic, group: _Group) -> str:
    """Write arithmetic in Python; a table is a dict, which raises a KeyError beyond its range."""

    class Written(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            text = node.id if node.id == SLICE else f"int({group(int(node.id[1:]))})"
            return ast.parse(text, mode="eval").body

        def visit_Tuple(self, node: ast.Tuple) -> ast.AST:
            return ast.Dict([ast.Constant(place) for place in range(len(node.elts))], list(node.elts))

    tree = ast.parse(ast.unparse(arithmetic.tree), mode="eval").body
    return ast.unparse(Written().visit(tree))


def _text(text: str, *, raw: bool = False) -> str:
    """Write a string, in double quotes where that needs no more escapes."""
    if raw and "\\" in text and text.isprintable() and '"' not in text and not text.endswith("\\"):
        return f'r"{text}"'
    written = repr(text)
    return f'"{written[1:-1]}"' if written[0] == "'" and '"' not in text else written


_OPEN = "\0"  # begins a line that may be broken: its parts follow, to be laid out when its indent is known


def _laid_out(line: str) -> Iterator[str]:
    """Break a line that is too long, as formatters do."""
    indent = line[: len(line) - len(line.lstrip(" "))]
    start, *arguments = line.split(_OPEN)
    whole = f"{start}{', '.join(arguments)})" if arguments else line
    if len(whole) <= _WIDTH:
        yield whole
        return
    if not arguments and (table := re.fullmatch(r"( *i\d+ = .*?)\{(.*)\}(.*)", whole)):
        start, arguments, end = table[1] + "{", table[2].split(", "), "}" + table[3]
    elif not arguments:
        left, _, right = whole.partition(" = ")
        breaks = right[:1] in ('"', "'", "f") and len(indent) + 4 + len(right) <= _WIDTH
        yield from [f"{left} = (", f"{indent}    {right}", f"{indent})"] if breaks else [whole]
        return
    else:
        end = ")"
    yield start
    inner = f"{indent}    {', '.join(arguments)}"
    if len(inner) <= _WIDTH and end == ")":
        yield inner
    else:
        yield from (f"{indent}    {argument}," for argument in arguments)
    yield indent + end


def _indented(lines: Sequence[str], by: int) -> list[str]:
    return [f"{'    ' * by}{line}" for line in lines]


@dataclass(frozen=True, slots=True)
class _Function:
    """A function or a constant, as source."""

    lines: tuple[str, ...]
    imports: frozenset[str]


def _call_of(step: Dequantise | Combine, tensors: str) -> str:
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


def _functions_in(code: Iterable[str]) -> list[_Function]:
    """Return the functions that are called in some lines, and those that they call, in an order in which they work."""
    words = {word for line in code for word in _WORD.findall(line)}
    found = [_Function(tuple(_VALUES.strip().splitlines()), frozenset())] if "_values" in words else []
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
                found.append(
                    _Function(tuple(ast.unparse(node).splitlines()), frozenset(imports[each] for each in used))
                )
    if "partial" in words:
        found.append(_Function((), frozenset({"from functools import partial"})))
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
