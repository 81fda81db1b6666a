"""The release: what is built of the checkout is complete, and runs where nothing but its requirements is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import autoalign

ROOT = Path(__file__).parent.parent
CODE = """
import sys, torch, autoalign
assert autoalign.__file__.startswith(sys.prefix), autoalign.__file__
torch.save({"0.weight": torch.ones(2, 3), "0.bias": torch.ones(2)}, "a.pth")
torch.save({"fc.weight": torch.ones(2, 3), "fc.bias": torch.ones(2)}, "b.pth")
alignment = autoalign.align("a.pth", "b.pth")  # reads weights.json and calibration.json
alignment.to_html("page.html")  # the templates of the page
autoalign.identify("a.pth")  # the index of architectures
print(len(alignment.matches))
"""


def run(*command: str | Path, cwd: Path) -> str:
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=known)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def interpreters() -> list[str]:
    """Return the newer interpreters of this machine that run, by version."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or "~/.pyenv").expanduser() / "versions"
    found = {}
    for minor in range(sys.version_info.minor + 1, 20):
        name = f"python3.{minor}"
        for program in (shutil.which(name), *pyenv.glob(f"*/bin/{name}")):
            if program and not subprocess.run([program, "-V"], capture_output=True).returncode:
                found[name] = str(program)
    return list(found.values())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is built of it."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def test_what_is_built_is_valid_and_complete(built: Sequence[Path], tmp_path: Path) -> None:
    pytest.importorskip("twine")
    sdist, wheel = built
    assert f"-{autoalign.__version__}-" in wheel.name
    checked = run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=tmp_path)
    assert checked.count("PASSED") == 2
    ours = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "autoalign").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name for name in names if ".dist-info/" not in name} == ours


@pytest.mark.skipif(os.name != "posix", reason="folders of an environment as on posix")
def test_the_wheel_runs_in_an_environment_of_its_own(built: Sequence[Path], tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", built[1], cwd=tmp_path)
    (packages,) = tmp_path.glob("venv/lib/*/site-packages")
    required = [entry for entry in sys.path if entry.endswith("site-packages")]  # those of the tests
    (packages / "required.pth").write_text("\n".join(required), encoding="utf-8")
    assert run(python, "-c", CODE, cwd=tmp_path) == "2"
    assert run(python.with_name("autoalign"), "--version", cwd=tmp_path) == f"autoalign {autoalign.__version__}"


@pytest.mark.parametrize("python", interpreters())
def test_newer_interpreters_compile_and_import_it(python: str, built: Sequence[Path], tmp_path: Path) -> None:
    """Without what it requires, whose compiled parts are those of the interpreter that runs the tests."""
    with zipfile.ZipFile(built[1]) as archive:
        archive.extractall(tmp_path)
    run(python, "-W", "error", "-m", "compileall", "-q", "autoalign", cwd=tmp_path)
    code = "import autoalign, autoalign.errors; print(autoalign.__version__)"
    assert run(python, "-W", "error", "-c", code, cwd=tmp_path) == autoalign.__version__


def test_the_changelog_begins_with_this_version() -> None:
    changes = (ROOT / "autoalign" / "loading" / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", changes, re.MULTILINE)[0] == autoalign.__version__


def test_the_versions_of_python_that_are_claimed_begin_with_the_lowest() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    claimed = [entry.rpartition(" ")[2] for entry in project["classifiers"] if ":: Python :: 3." in entry]
    assert project["requires-python"] == f">={claimed[0]}"
    assert claimed == [f"3.{minor}" for minor in range(11, 11 + len(claimed))]
