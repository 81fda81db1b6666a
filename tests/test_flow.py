"""The modules stand in one order, along which data flows, and each imports only what stands before it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import autoalign

FLOW = (
    # values
    *("errors", "expressions", "specs", "operations", "joining", "adaptations", "vocabulary", "names"),
    *("quantised", "matches", "inversion"),
    # alignment -> rules
    *("relative", "serial", "resizing", "indices", "rules", "fitting", "moves", "drafts", "wording", "induction"),
    *("exports.renaming", "exports.transformers", "exports.python"),
    # what a person reads
    *("replacing", "folding", "leftovers", "layout", "totals", "report", "markdown", "summary", "tree"),
    "networkx_graph",
    *("html.tree", "html.data", "html.document", "html.notebook"),
    # any format -> tensor specs
    *("garbage", "arrays", "stored", "containers", "config"),
    *(
        "formats.budget",
        "formats.safetensors",
        "formats.pickle_costs",
        "formats.pickled",
        "formats.torchscript",
        "formats.npz",
        "formats.gguf",
        "formats.msgpack",
        "formats.file",
        "formats.sharded",
        "formats.distributed",
        "formats.distributed_writing",
        "formats.unfinished",
        "formats.folder",
    ),
    *("hub", "checkpoint", "saving"),
    # the module graph
    *("graph", "units", "idioms", "leaves", "kernels", "namesakes", "renaming"),
    # a call of a model
    *("transaction", "preservation", "execution"),
    # candidates -> matching -> alignment
    *(
        "candidates",
        "fusion",
        "scope",
        "evidence",
        "calibration",
        "matching",
        "crossings",
        "lists",
        "vacancies",
        "instances",
        "exchange",
        "mismatches",
        "decision",
        "islands",
        "directions",
        "lone",
        "rotary",
        "doubts",
        "assembly",
        *("adaptable", "grids", "positions", "shared_rows", "adapting"),
        "patterns",
        "align_options",
        "pairing",
        "same_names",
        "repeats",
        "aligning",
    ),
    # why, and proof by a call of both
    *("explanation", "alignment", "api"),
    *("recording", "comparing", "counterparts", "divergence", "settings", "causes", "trials"),
    *("subject", "search", "verification", "verifying"),
    # the only part that moves data
    *("module_state", "lazy_modules", "progress", "mapped", "copying", "model_lock", "values", "reading"),
    *("regions", "rendezvous", "sharded", "preparing", "conflicts", "loading"),
    *("blocks", "writers.safetensors", "writers.staging", "converting", "differing"),
    # the command line
    "demo",
    *("cli.codes", "cli.terminal", "cli.options", "cli.targets", "cli.reports"),
    *(
        "cli.commands.align",
        "cli.commands.load_check",
        "cli.commands.convert",
        "cli.commands.rules",
        "cli.commands.inspect",
        "cli.commands.diff",
        "cli.commands.verify",
        "cli.commands.demo",
        "cli.commands.completion",
    ),
    *("cli.app", "__main__"),
)
# what rules offer as methods stands in modules that read rules
BACKWARDS_WHEN_CALLED = {("rules", f"exports.{module}") for module in ("python", "renaming", "transformers")}
# needed for a match or a screen, not for an import
LATE = ("gguf", "huggingface_hub", "msgpack", "networkx", "rapidfuzz", "regex", "rich", "safetensors", "scipy")


def own_imports(tree: ast.AST, *, deferred: bool) -> Iterator[str]:
    """Yield the modules of this package that a file imports: when it is imported, or ``deferred`` to a call."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        is_function = isinstance(node, ast.FunctionDef)
        if not deferred and isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("autoalign."):
            yield node.module.removeprefix("autoalign.")
        if not (is_function and not deferred):
            yield from own_imports(node, deferred=deferred and not is_function)


def imported_by_module(*, deferred: bool) -> dict[str, set[str]]:
    package = Path(autoalign.__file__).parent
    return {
        ".".join(path.relative_to(package).with_suffix("").parts): set(
            own_imports(ast.parse(path.read_text(encoding="utf-8")), deferred=deferred)
        )
        for path in package.rglob("*.py")
        if path.stem != "__init__"
    }


def test_every_module_has_its_place_in_the_flow() -> None:
    assert set(imported_by_module(deferred=False)) == set(FLOW)
    assert len(FLOW) == len(set(FLOW))


def test_each_module_imports_only_what_stands_before_it() -> None:
    backwards = {
        (module, imported)
        for module, names in imported_by_module(deferred=False).items()
        for imported in names
        if FLOW.index(imported) >= FLOW.index(module)
    }
    assert backwards == set()


def test_an_import_that_is_deferred_to_a_call_stands_before_too() -> None:
    backwards = {
        (module, imported)
        for module, names in imported_by_module(deferred=True).items()
        for imported in names
        if FLOW.index(imported) >= FLOW.index(module)
    }
    assert backwards == BACKWARDS_WHEN_CALLED


def test_the_reading_of_imports_sees_both_kinds() -> None:
    tree = ast.parse(
        "if TYPE_CHECKING:\n    from autoalign.a import x\nfrom autoalign.b import x\n"
        "class C:\n    from autoalign.c import x\n    def f(self):\n        from autoalign.d import x\n"
    )
    assert set(own_imports(tree, deferred=False)) == {"b", "c"}
    assert set(own_imports(tree, deferred=True)) == {"d"}


def test_importing_the_package_imports_nothing_that_is_only_needed_later() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import autoalign, autoalign.loading;"
        f"print(sorted(set({LATE!r}) & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
