"""Folders stand in one order, along which data flows; each imports only what stands before it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

import autoalign

PACKAGE = Path(autoalign.__file__).parent
ORDER = (
    *("errors", "plan", "checkpoints", "rules", "matching", "reports", "alignment"),
    *("loading", "verification", "api", "integrations", "__init__", "cli", "__main__"),
)
# needed for a match or a screen, not for an import
LATE = ("gguf", "h5py", "huggingface_hub", "msgpack", "networkx", "rapidfuzz", "regex", "rich", "safetensors", "scipy")


def imported(tree: ast.AST, modules: set[str]) -> Iterator[str]:
    """Yield the modules of this package that a file imports: at once, in a function, or for types alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "autoalign":
            parent = node.module.removeprefix("autoalign").removeprefix(".")
            for alias in node.names:
                inner = f"{parent}.{alias.name}".removeprefix(".")
                yield inner if inner in modules else parent or "__init__"
        elif isinstance(node, ast.Import):
            yield from (name.name.partition(".")[2] for name in node.names if name.name.startswith("autoalign."))


def import_graph(files: dict[str, str]) -> nx.DiGraph[str]:
    """Draw who imports whom, from the sources of modules; a package is called as its folder."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    for name, source in files.items():
        graph.add_edges_from((name, other) for other in imported(ast.parse(source), set(files)))
    return graph


def own_files() -> dict[str, str]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path.read_text("utf-8")
        for path in PACKAGE.rglob("*.py")
    }


def uphill(graph: nx.DiGraph[str], order: tuple[str, ...]) -> set[tuple[str, str]]:
    """Collect the pairs of folders of which the first imports the second, which stands above it."""
    folders = ((name.partition(".")[0], other.partition(".")[0]) for name, other in graph.edges)
    return {(one, other) for one, other in folders if order.index(other) > order.index(one)}


def circles(graph: nx.DiGraph[str]) -> list[set[str]]:
    return [knot for knot in nx.strongly_connected_components(graph) if len(knot) > 1]


def test_each_folder_imports_only_what_stands_before_it() -> None:
    graph = import_graph(own_files())
    assert {name.partition(".")[0] for name in graph} <= set(ORDER)
    graph.remove_edges_from([edge for edge in graph.edges if edge[0] == "__init__"])  # which hands names on
    assert uphill(graph, ORDER) == set()


def test_no_files_import_each_other() -> None:
    graph = import_graph(own_files())
    graph.remove_node("__init__")
    assert circles(graph) == []


@pytest.mark.parametrize(
    "line",
    [
        "from autoalign.matching.names import words",
        "from autoalign.matching import names",
        "import autoalign.matching.names",
        "def f():\n    from autoalign.matching.names import words",
        "if TYPE_CHECKING:\n    from autoalign.matching.names import words",
    ],
)
def test_an_import_that_runs_up_is_seen_wherever_it_stands(line: str) -> None:
    graph = import_graph({"plan.keys": line, "matching.names": "from autoalign.plan.keys import stem"})
    assert uphill(graph, ORDER) == {("plan", "matching")}
    assert circles(graph) == [{"plan.keys", "matching.names"}]


def test_files_are_of_a_size_that_a_person_reads() -> None:
    long = {name: length for name, text in own_files().items() if (length := len(text.splitlines())) > 480}
    assert long == {}


def test_docstrings_say_what_is_returned() -> None:
    """The words that they do not begin with are not those of the field."""
    beginnings = {
        f"{name}: {docstring.partition(chr(10))[0]}"
        for name, text in own_files().items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (docstring := ast.get_docstring(node))
        if docstring.startswith(("Tell", "Whether", "Give ", "Say ", "Take "))
    }
    assert beginnings == set()


def test_importing_the_package_imports_nothing_that_is_only_needed_later() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import autoalign, autoalign.loading.load;"
        f"print(sorted(set({LATE!r}) & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
