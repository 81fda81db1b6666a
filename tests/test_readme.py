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
from pathlib import Path
from typing import Any

import pytest

import autoalign
from autoalign import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

_BLOCK = re.compile(r"(?:<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_SET_UP = re.compile(r"(python3\.11 -m venv \.venv && )?\.venv/bin/")
_EXITS = re.compile(r" # exits with (\d)")
_CONFIDENCE = re.compile(r"  [01]\.\d\d\b")


@dataclass(frozen=True, slots=True)
class Block:
    """A block of code, and the text that follows it as what it prints."""

    mark: str  # the comment before it
    kind: str
    text: str
    line: int
    prints: str | None = None


def blocks() -> Iterator[Block]:
    found = list(_BLOCK.finditer(README))
    for place, block in enumerate(found):
        after = found[place + 1] if place + 1 < len(found) else None
        follows = after and after["kind"] == "text" and not README[block.end() : after.start()].strip()
        line = README.count("\n", 0, block.start("kind")) + 1
        yield Block(
            block["mark"] or "", block["kind"], block["text"], line, after["text"] if after and follows else None
        )


def as_printed(text: str) -> str:
    return _CONFIDENCE.sub("  0.00", text)


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    """Run a block, and compare what it prints; ``...`` in what the README shows stands for anything."""
    printed = io.StringIO()
    code = compile("\n" * block.line + block.text, "README.md", "exec")
    with warnings.catch_warnings(), redirect_stdout(printed), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # a reader sees them and goes on
        exec(code, namespace)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    shown, expected = as_printed(printed.getvalue()), as_printed(block.prints or "")
    assert doctest.OutputChecker().check_output(expected, shown, flags), f"README.md:{block.line} prints\n{shown}"


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
    ran = [block for block in blocks() if block.mark == "runs"]
    commands = []
    for block in ran:
        if block.kind == "python":
            run_python(block, namespace)
        else:
            commands += run_shell(block, capsys)
    assert len([block for block in ran if block.kind == "python"]) > 8
    assert {"inspect", "align", "load-check", "convert", "rules", "diff", "verify"} <= set(commands)
    again, first = (autoalign.open_checkpoint(name) for name in ("bert_again.safetensors", "bert"))
    assert len(again) == len(first) - 2  # without the pooler
    assert all((first[key] == again[key]).all() for key in again)
    exec(compile(Path("filter.py").read_text(encoding="utf-8"), "filter.py", "exec"), {})
    assert Path("report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_script_for_sharded_models_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    (script,) = (block for block in blocks() if block.mark == "runs as shard.py")
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


def test_every_block_runs_or_says_what_it_needs() -> None:
    for block in blocks():
        known = block.mark.startswith(("runs", "needs ")) or block.kind in ("text", "mermaid")
        set_up = block.kind == "sh" and all(_SET_UP.match(line) for line in block.text.splitlines())
        teaser = block.line < 12
        assert known or set_up or teaser, f"README.md:{block.line}"
        if block.kind == "python":
            compile(block.text, f"README.md:{block.line}", "exec")


def test_what_the_readme_links_to_is_there() -> None:
    headings = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", README, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]*)\)", README)) <= headings
    files = re.findall(r'(?:src|srcset)="([^"]*)"', README)
    assert files
    assert all((ROOT / file).is_file() for file in files)


def test_the_reference_is_built_without_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pdoc = pytest.importorskip("pdoc.__main__")
    (line,) = (block.text for block in blocks() if "pdoc" in block.text and block.kind == "sh")
    program, *arguments = shlex.split(line.partition("&&")[2])
    assert program == ".venv/bin/pdoc"
    arguments[arguments.index("-o") + 1] = str(tmp_path)
    pdoc.cli(arguments)  # a warning is an error
    assert capsys.readouterr() == ("", "")
    page = (tmp_path / "autoalign.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in page for name in autoalign.__all__ if name != "__version__")
    assert 'id="Alignment.explain"' in page
