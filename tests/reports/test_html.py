from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoalign.alignment import Alignment
from autoalign.errors import InputError
from autoalign.reports.html import document, page_data, script_safe
from tests.reports.examples import FUSED, MIXED, hostile, many


class Page(HTMLParser):
    """The elements of a page, and the text of those that matter here."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        assert tag
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open][-1] += data


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def policy_of(page: Page) -> str:
    (content,) = [
        attributes["content"] or ""
        for tag, attributes in page.tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    return content


@pytest.mark.parametrize("alignment", [MIXED, FUSED, hostile()], ids=["mixed", "fused", "hostile"])
def test_the_page_needs_nothing_but_itself(alignment: Alignment) -> None:
    page = Page(document(alignment))
    for tag, attributes in page.tags:
        assert tag not in {"iframe", "object", "embed", "base", "form", "img"}
        for name, value in attributes.items():
            if name in {"src", "href", "action", "srcset", "data"}:
                assert value == "data:,"
            assert not name.startswith("on")
            assert name != "style"  # which the policy would not allow
    policy = policy_of(page)
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    (style,), (_, script) = page.texts["style"], page.texts["script"]
    for text in (style, script):
        assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
        assert "url(" not in text
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


@pytest.mark.parametrize("alignment", [MIXED, FUSED, hostile()], ids=["mixed", "fused", "hostile"])
def test_keys_are_data_and_never_markup(alignment: Alignment) -> None:
    page, plain = Page(document(alignment)), Page(document(MIXED))
    names = [tag for tag, _ in page.tags if tag not in {"rect", "svg", "div", "title", "span", "strong", "ul", "li"}]
    assert names == [tag for tag, _ in plain.tags if tag in names]
    assert json.loads(page.texts["script"][0]) == json.loads(json.dumps(page_data(alignment)))


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10))
def test_any_text_is_safe_within_a_script(value: object) -> None:
    text = script_safe(value)
    assert text.isascii()
    assert not set(text) & set("<>&")
    assert json.loads(text) == value


def test_the_page_says_what_the_text_says() -> None:
    text = document(MIXED, title="<twins>")
    assert "<title>&lt;twins&gt;</title>" in text
    assert f"{len(MIXED.matches)} of {len(MIXED.target_specs)} target tensors are filled from" in text
    assert "1 of the others were excluded" in text
    assert "The container &#x27;ema&#x27; was taken." in text
    assert "Ambiguous: proposed, but not loaded" in text  # for readers without scripts
    assert 'aria-label="matched 13, mismatched 2, ambiguous 1, missing 2"' in text


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("before")
    path.chmod(0o640)
    MIXED.to_html(path, title="A title")
    text = path.read_text(encoding="utf-8")
    assert text == document(MIXED, title="A title")
    assert path.stat().st_mode & 0o777 == 0o640
    assert names(tmp_path) == ["report.html"]


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    FUSED.to_html(str(tmp_path / "report.html"))
    assert (tmp_path / "report.html").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_places_that_are_no_place_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no folder .* Nothing was written"):
        MIXED.to_html(tmp_path / "absent" / "report.html")
    with pytest.raises(InputError, match="which is a folder"):
        MIXED.to_html(tmp_path)
    with pytest.raises(InputError, match="cannot be written to"):
        MIXED.to_html(tmp_path / ("long" * 100 + ".html"))
    with pytest.raises(InputError, match="cannot be written to 'null"):
        MIXED.to_html("null\0")
    with pytest.raises(InputError, match="cannot be written to '3'"):
        MIXED.to_html(3)  # type: ignore[arg-type]
    assert names(tmp_path) == []


def test_a_broken_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match=r"No space left on device\. What was there is unchanged"):
        MIXED.to_html(path)
    assert path.read_text() == "before"
    assert names(tmp_path) == ["report.html"]


def test_a_page_of_5000_matches_is_small() -> None:
    text = document(many(5000))
    assert 5000 < len(text) < 1_000_000


def test_the_files_of_the_page_are_in_the_package() -> None:
    root = Path(sys.modules["autoalign"].__file__ or "").parent / "reports" / "page"
    assert {path.name for path in root.iterdir()} == {
        "report.html",
        "report.css",
        *(f"{name}.js" for name in ("model", "rows", "layout", "view", "panel", "main")),
    }
    used = re.findall(r"\{\{(\w+)\}\}", (root / "report.html").read_text(encoding="utf-8"))
    assert len(used) == len(set(used)) + 1  # the title twice
