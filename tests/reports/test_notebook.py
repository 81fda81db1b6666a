"""What notebooks show."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import autoalign
from autoalign.alignment import Alignment
from autoalign.reports.html import document
from autoalign.reports.notebook import MAX_ROWS
from tests.reports.examples import FUSED, MIXED, hostile, unlike

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
