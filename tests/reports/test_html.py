"""The page, its data, and the short form for notebooks."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import autoalign
from autoalign.alignment import Alignment
from autoalign.errors import InputError
from autoalign.plan.matches import Candidate, Match, Mismatch
from autoalign.plan.operations import Concatenate, Copy
from autoalign.reports.html import MAX_ROWS, document, page_data, script_safe
from autoalign.reports.rows import escaped
from tests.alignments import spec
from tests.reports.examples import FUSED, HOSTILE, MIXED, hostile, many, unlike


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


def test_the_package_need_not_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: pytest.fail(f"asked for {name}"))
    assert autoalign.__version__ in document(MIXED)


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
    with pytest.raises(InputError, match=r"cannot be written to .*: No such file or directory"):
        MIXED.to_html(tmp_path / "absent" / "report.html")
    with pytest.raises(InputError, match=r"cannot be written to .*: Is a directory"):
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


def keys(side: dict[str, Any], names: list[str]) -> list[str]:
    """Write the keys of a side from its page data, in the order of its tensors."""
    path: list[str] = []
    found = []
    for name, depth in zip(side["name"], side["depth"], strict=True):
        place = depth if depth >= 0 else -1 - depth
        path[place:] = [names[name]]
        if depth < 0:
            found.append(".".join(path))
    return found


def read_back(data: dict[str, Any]) -> list[tuple[str, str, tuple[str, ...], str, float]]:
    source, target = (keys(data[side], data["names"]) for side in ("source", "target"))
    links = data["links"]
    return [
        (
            data["statuses"][links["status"][k]],
            target[links["target"][k]],
            tuple(source[of] for of in ([sources] if isinstance(sources, int) else sources)),
            data["operations"][links["operation"][k]][0],
            links["confidence"][k],
        )
        for k, sources in enumerate(links["sources"])
    ]


@pytest.mark.parametrize("alignment", [MIXED, FUSED, hostile()], ids=["mixed", "fused", "hostile"])
def test_the_data_hold_the_alignment(alignment: Alignment) -> None:
    data = json.loads(json.dumps(page_data(alignment)))
    found = [("adapted" if m.operation.adapts else "matched", m) for m in alignment.matches]
    found += [("ambiguous", match) for match in alignment.ambiguous]
    expected = [
        (
            status,
            escaped(match.target),
            tuple(map(escaped, match.sources)),
            str(match.operation),
            round(match.confidence, 4),
        )
        for status, match in found
    ]
    expected += [("mismatched", escaped(m.key), (escaped(m.source_key),), "copy", 1.0) for m in alignment.mismatched]
    assert read_back(data) == expected
    for side, specs in (("source", alignment.source_specs), ("target", alignment.target_specs)):
        said = {
            key: (tuple(data["shapes"][shape]), data["dtypes"][dtype])
            for key, shape, dtype in zip(
                keys(data[side], data["names"]), data[side]["shape"], data[side]["dtype"], strict=True
            )
        }
        assert said == {escaped(spec.key): (spec.shape, str(spec.dtype).removeprefix("torch.")) for spec in specs}


def test_what_is_left_has_its_reason_and_its_nearest_counterpart() -> None:
    data = page_data(MIXED)
    target, source = (keys(data[side], data["names"]) for side in ("target", "source"))
    left = {target[row[0]]: data["texts"][row[1]] for row in data["target"]["left"]}
    reason = "all 6 source tensors of this shape have other counterparts"
    assert left == {"extra.weight": reason, "pooler.weight": "excluded"}
    unused = {source[row[0]]: row for row in data["source"]["left"]}
    assert sorted(unused) == sorted(MIXED.unexpected_keys)
    assert data["texts"][unused["fc.weight"][1]].startswith("ambiguous: ") or len(unused["fc.weight"]) >= 2


def test_the_nearest_counterpart_says_how_its_shape_differs() -> None:
    source, target = {"head.weight": torch.empty(1000, 8)}, {"body": torch.empty(3), "head.weights": torch.empty(10, 8)}
    alignment = replace(autoalign.align(source | {"body": torch.empty(3)}, target), mismatched=())
    data = page_data(alignment)
    ((place, _, near, text),) = data["target"]["left"]
    assert keys(data["target"], data["names"])[place] == "head.weights"
    assert keys(data["source"], data["names"])[near] == "head.weight"
    assert data["texts"][text] == "dim 0: 1000, needs 10"


def test_evidence_alternatives_and_warnings() -> None:
    match = Match(
        "t", ("s",), Copy(), 0.7, {"name": 0.12345}, (Candidate(("r", "s"), Concatenate(0), 0.0),), ("look <here>",)
    )
    data = page_data(Alignment((match,), (), (), (spec("s", 3), spec("r", 3)), (spec("t", 3),)))
    links = data["links"]
    assert data["evidence"][links["evidence"][0]] == {"name": 0.123}
    assert [data["texts"][text] for text in links["warnings"][0]] == ["look <here>"]
    ((sources, operation),) = links["alternatives"][0]
    assert [keys(data["source"], data["names"])[place] for place in sources] == ["r", "s"]
    assert data["operations"][operation] == ["concatenate(dim 0)", "concatenate"]


def test_repeated_blocks_are_runs_on_both_sides() -> None:
    data = page_data(FUSED)
    assert [length for _, length in data["source"]["runs"]] == [12]
    assert [length for _, length in data["target"]["runs"]] == [12]


def test_tied_tensors_that_are_used_are_not_left() -> None:
    weight = torch.rand(4, 3)
    alignment = autoalign.align({"a.weight": weight, "b.weight": weight}, {"a.weight": torch.empty(4, 3)})
    assert page_data(alignment)["source"]["left"] == []


def test_the_size_grows_with_the_tensors_and_not_with_their_names() -> None:
    small, large = (len(json.dumps(page_data(many(count)), separators=(",", ":"))) for count in (500, 5000))
    assert large < 11 * small
    assert large < 80 * 5000  # bytes a match


def test_data_of_an_empty_alignment() -> None:
    data = page_data(Alignment((), (), (), (), ()))
    assert data["links"]["target"] == []
    assert data["source"]["name"] == []


def test_mismatched_tensors_are_joined() -> None:
    alignment = replace(MIXED, mismatched=(Mismatch("head.weight", "fc.weight", (10, 16), (1000, 16)),))
    assert ("mismatched", "head.weight", ("fc.weight",), "copy", 1.0) in read_back(page_data(alignment))


def test_hostile_keys_stay_different() -> None:
    found = keys(page_data(hostile())["target"], page_data(hostile())["names"])
    assert len(set(found)) == len(HOSTILE)
    assert all(key.isprintable() for key in found)


ALLOWED = {"div", "strong", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "iframe"}
FRAME = {"sandbox", "allow", "srcdoc", "style", "title"}


class Fragment(HTMLParser):
    """The elements and the text of a fragment; elements must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.frame: dict[str, str | None] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open.append(tag)
        allowed = FRAME if tag == "iframe" else {"class", "style", "open", "scope", "colspan"}
        assert not {name for name, _ in attrs} - allowed
        if tag == "iframe":
            self.frame = dict(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("alignment", [MIXED, FUSED, hostile()], ids=["mixed", "fused", "hostile"])
def test_the_short_form_is_plain_markup(alignment: Alignment) -> None:
    fragment = Fragment(alignment._repr_html_())
    assert set(fragment.tags) <= ALLOWED
    assert fragment.text.isprintable()


def test_it_says_what_matters() -> None:
    fragment = Fragment(MIXED._repr_html_())
    for said in (
        "13 of 18 target tensors are filled from 10 of 15 source tensors. 1 of the others were excluded.",
        "Note: The container 'ema' was taken.",
        "blocks.{0...2}.norm.{weight,bias}→ layers.{0...2}.ln.{weight,bias}",
        "Mismatched: the counterpart has another shape (2)",
        "the parts are distinguished by their order alone",
        "split(dim 0, 16:32) of [32, 16]",
    ):
        assert said in fragment.text


def test_what_needs_attention_is_open() -> None:
    assert MIXED._repr_html_().count("<details open>") == 4
    assert "<details><summary>Matched" in MIXED._repr_html_()
    assert "<details open><summary>Matched" in FUSED._repr_html_()


def test_it_is_short_for_models_of_any_size() -> None:
    text = unlike(3000)._repr_html_()
    assert "<iframe" not in text
    assert f"and {3000 - MAX_ROWS:,} more rows" in text
    assert len(text) < 40_000


def test_the_picture_is_the_page_in_a_frame_that_reaches_nothing() -> None:
    frame = Fragment(MIXED._repr_html_()).frame
    assert frame["srcdoc"] == document(MIXED)
    assert frame["sandbox"] == "allow-scripts"  # without those, no other rights: not even its own origin


def test_a_comparison_shows_itself() -> None:
    first, second = {"a.weight": torch.ones(4, 2)}, {"b.weight": torch.full((4, 2), 1.5)}
    fragment = Fragment(autoalign.diff(first, second)._repr_html_())
    assert "1 changed (b by 50 %)" in fragment.text
    assert "mean 50 %" in fragment.text
    assert "by 10 % and more" in (fragment.frame["srcdoc"] or "")


def test_results_of_a_few_lines_show_themselves() -> None:
    explained = Fragment(MIXED.explain("one.weight")._repr_html_())
    assert "one.weight (target): ambiguous" in explained.text
    assert {"table", "td"} <= set(explained.tags)
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    verified = Fragment(autoalign.verify(model, model, torch.randn(2, 3))._repr_html_())
    assert verified.text.startswith("Proven equalThe outputs are equal")
    other = nn.Sequential(nn.Linear(3, 3), nn.GELU())
    assert Fragment(autoalign.verify(model, other, torch.randn(2, 3))._repr_html_()).text.startswith("NOT equal")


def test_rules_show_themselves_and_keys_are_no_markup() -> None:
    source, target = {"<b>a.weight": torch.ones(3, 2)}, {"c.weight": torch.ones(3, 2)}
    html = autoalign.align(source, target).rules()._repr_html_()
    assert "1 rules" not in html
    assert "&lt;b&gt;a" in html
    assert "<b>" not in html
