from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import autoalign

ROOT = Path(__file__).parent.parent


def test_every_name_of_the_package_is_there() -> None:
    assert sorted(autoalign.__all__, key=str.casefold) == sorted(set(autoalign.__all__), key=str.casefold)
    assert all(getattr(autoalign, name) is not None for name in autoalign.__all__)
    assert dir(autoalign) == sorted(autoalign.__all__)


def test_type_checkers_see_the_names_of_the_package_where_they_are() -> None:
    seen = {"__version__"}
    for node in ast.walk(ast.parse((ROOT / "autoalign" / "__init__.py").read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("autoalign."):
            for alias in node.names:
                assert alias.name == alias.asname  # which is how a name is handed on
                assert getattr(autoalign, alias.name) is getattr(sys.modules[str(node.module)], alias.name)
                seen.add(alias.name)
    assert seen == set(autoalign.__all__)


def test_functions_are_not_hidden_by_modules() -> None:
    code = (
        "import autoalign.matching.match, autoalign.loading.load, autoalign.cli; print(autoalign.align, autoalign.load)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert re.fullmatch(r"<function align at .*> <function load at .*>\n", done.stdout)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'autoalign' has no attribute 'unknown'"):
        autoalign.unknown  # type: ignore[attr-defined]  # noqa: B018


def test_every_error_is_of_the_package() -> None:
    errors = [getattr(autoalign, name) for name in autoalign.__all__ if name.endswith("Error")]
    assert len(errors) > 5
    assert all(issubclass(error, autoalign.AutoAlignError) for error in errors)
    defined = inspect.getmembers(sys.modules["autoalign.errors"], inspect.isclass)
    assert {name for name, value in defined if value.__module__ == "autoalign.errors"} <= set(autoalign.__all__)


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import autoalign; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert {name.partition(".")[0] for name in done.stdout.split()} - sys.stdlib_module_names == {"autoalign"}


def test_only_the_program_changes_the_warning_filters() -> None:
    """They are the whole process's: what a thread puts back may be what another has just ignored."""
    package = ROOT / "autoalign"
    changing = re.compile(r"catch_warnings|simplefilter|filterwarnings|resetwarnings|showwarning")
    files = {file.relative_to(package) for file in package.rglob("*.py") if changing.search(file.read_text("utf-8"))}
    assert {file.parts[0] for file in files} <= {"cli"}, files


def test_the_files_that_the_script_for_the_lowest_versions_names_are_there() -> None:
    named = re.findall(r"tests/\S+", (ROOT / ".ci" / "lowest").read_text(encoding="utf-8"))
    assert named
    assert all((ROOT / name).is_file() for name in named)


def test_the_readme_gives_the_line_that_is_run_as_the_test() -> None:
    *_, line = (ROOT / ".ci" / "run").read_text(encoding="utf-8").strip().splitlines()
    assert f"\n{line}\n" in (ROOT / "README.md").read_text(encoding="utf-8")
    for tool in ("ruff check", "ruff format --check", "mypy", "python -m benchmarks.coverage"):
        assert f".venv/bin/{tool}" in line


def test_what_is_needed_to_run_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split("[<>=]", requirement)[0] for requirement in project["dependencies"]}
    imported = {
        name
        for path in (ROOT / "autoalign").rglob("*.py")
        for name in re.findall(r"^ *(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    extras = project["optional-dependencies"]
    optional = {
        re.split("[<>=]", requirement)[0]
        for extra in ("demo", "formats", "hub", "transformers")
        for requirement in extras[extra]
    }
    hooks = {re.split("[<>=]", requirement)[0] for requirement in extras["integrations"]}
    assert imported - sys.stdlib_module_names - {"autoalign"} - hooks == declared | optional
