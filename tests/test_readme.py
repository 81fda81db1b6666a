"""The README: what it says can be run is run as printed, and what it says is printed is printed."""

from __future__ import annotations

import doctest
import io
import re
import runpy
import shlex
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import autoalign
from autoalign import cli

ROOT = Path(__file__).parent.parent
PAGES = (
    *("README.md", "autoalign/loading/guide.md", "autoalign/integrations/guide.md"),
    *("autoalign/matching/limits.md", "autoalign/loading/CHANGELOG.md", "benchmarks/README.md"),
)

_BLOCK = re.compile(r"(?:<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_SET_UP = re.compile(r"(python3\.11 -m venv \.venv && )?\.venv/bin/")
_EXITS = re.compile(r" # exits with (\d)")
_CONFIDENCE = re.compile(r"  [01]\.\d\d\b")


@dataclass(frozen=True, slots=True)
class Block:
    """A block of code of a page, and the text that follows it as what it prints."""

    page: str
    mark: str  # the comment before it
    kind: str
    text: str
    line: int
    prints: str | None = None


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> Iterator[Block]:
    text = text_of(page)
    found = list(_BLOCK.finditer(text))
    for place, block in enumerate(found):
        after = found[place + 1] if place + 1 < len(found) else None
        follows = after and after["kind"] == "text" and not text[block.end() : after.start()].strip()
        line = text.count("\n", 0, block.start("kind")) + 1
        yield Block(
            page, block["mark"] or "", block["kind"], block["text"], line, after["text"] if after and follows else None
        )


def as_printed(text: str) -> str:
    return _CONFIDENCE.sub("  0.00", text)


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    """Run a block, and compare what it prints; ``...`` in what the page shows stands for anything."""
    printed = io.StringIO()
    code = compile("\n" * block.line + block.text, block.page, "exec")
    with warnings.catch_warnings(), redirect_stdout(printed), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # a reader sees them and goes on
        exec(code, namespace)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    shown, expected = as_printed(printed.getvalue()), as_printed(block.prints or "")
    assert doctest.OutputChecker().check_output(expected, shown, flags), f"{block.page}:{block.line} prints\n{shown}"


def run_shell(block: Block, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run each line of the command line in this process, as a shell would, and say which commands there were."""
    commands = []
    for line in block.text.splitlines():
        exits = _EXITS.search(line)
        program, *arguments = shlex.split(line, comments=True)
        assert program == "autoalign"
        output = None
        if ">" in arguments:
            output = arguments[arguments.index(">") + 1]
            arguments = arguments[: arguments.index(">")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert cli.main(arguments) == (int(exits[1]) if exits else 0), line
        shown = capsys.readouterr().out
        assert shown or "convert" in arguments, line
        if output:
            Path(output).write_text(shown, encoding="utf-8")
        commands.append(arguments[0])
    return commands


def test_the_recipes_and_the_command_line_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "readme"}
    ran = [block for block in blocks("README.md") if block.mark == "runs"]
    commands = []
    for block in ran:
        if block.kind == "python":
            run_python(block, namespace)
        else:
            commands += run_shell(block, capsys)
    assert len([block for block in ran if block.kind == "python"]) > 5
    assert {"inspect", "align", "load-check", "convert", "rules", "diff", "verify"} <= set(commands)
    again, first = (autoalign.open_checkpoint(name) for name in ("vit_again.pth", "vit"))
    assert len(again) == len(first)
    assert all((first[key] == again[key]).all() for key in again)
    exec(compile(Path("filter.py").read_text(encoding="utf-8"), "filter.py", "exec"), {})
    assert Path("diff.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_other_recipes_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "guide"}
    ran = [block for block in blocks("autoalign/loading/guide.md") if block.mark == "runs"]
    for block in ran:
        run_python(block, namespace)
    assert len(ran) > 4


@pytest.mark.usefixtures("registry")
def test_the_hooks_run_as_printed_where_their_libraries_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "hooks"}
    for block in blocks("autoalign/integrations/guide.md"):
        library = block.mark.removeprefix("needs ")
        if block.mark == "runs" or (library.isidentifier() and find_spec(library)):
            run_python(block, namespace)
    assert "alignment" in namespace


def test_the_script_for_sharded_models_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    (script,) = (block for block in blocks("autoalign/loading/guide.md") if block.mark == "runs as shard.py")
    (tmp_path / "shard.py").write_text(script.text, encoding="utf-8")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", **place}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["shard.py", "llama", "llama"])
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path("shard.py", run_name="__main__")
    assert capsys.readouterr().out == "<All keys matched successfully>\n"


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_or_says_what_it_needs(page: str) -> None:
    for block in blocks(page):
        known = block.mark.startswith(("runs", "needs ")) or block.kind == "text"
        set_up = block.kind == "sh" and all(_SET_UP.match(line) for line in block.text.splitlines())
        assert known or set_up, f"{page}:{block.line}"
        if block.kind == "python":
            compile(block.text, f"{page}:{block.line}", "exec")


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_links_to_is_there(page: str) -> None:
    text, folder = text_of(page), (ROOT / page).parent
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text)
    for file, heading in links:
        linked = folder / file if file else ROOT / page
        assert linked.is_file(), f"{page} links to {file}"
        assert not heading or heading in headings(linked.read_text(encoding="utf-8")), f"{page} links to #{heading}"
    assert all((folder / file).is_file() for file in re.findall(r'(?:src|srcset)="([^"]*)"', text))


def headings(text: str) -> set[str]:
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in found}


def test_the_readme_is_short_and_begins_with_what_runs() -> None:
    lines = text_of("README.md").splitlines()
    assert len(lines) <= 250
    assert any("autoalign demo" in line for line in lines[:10])
    assert any("<All keys matched successfully>" in line for line in lines[:30])
    assert "mermaid" not in text_of("README.md")


def test_the_reference_is_built_without_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pdoc = pytest.importorskip("pdoc.__main__")
    (line,) = (
        block.text for block in blocks("autoalign/loading/guide.md") if "pdoc" in block.text and block.kind == "sh"
    )
    program, *arguments = shlex.split(line.partition("&&")[2])
    assert program == ".venv/bin/pdoc"
    arguments[arguments.index("-o") + 1] = str(tmp_path)
    pdoc.cli(["--no-show-source", *arguments])  # a warning is an error
    assert capsys.readouterr() == ("", "")
    page = (tmp_path / "autoalign.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in page for name in autoalign.__all__ if name not in ("__version__", "hf"))
    hooks = (tmp_path / "autoalign" / "integrations" / "hf.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in hooks for name in ("from_pretrained", "register"))
    assert 'id="Alignment.explain"' in page
    assert f'id="{autoalign.__version__.replace(".", "")}"' in page  # the heading of the changelog
    assert "A sharded 70B" in (tmp_path / "autoalign" / "loading.html").read_text(encoding="utf-8")  # its guide
    assert "Where other libraries load models" in (tmp_path / "autoalign" / "integrations.html").read_text("utf-8")
    assert "Limits of matching" in (tmp_path / "autoalign" / "matching.html").read_text(encoding="utf-8")
