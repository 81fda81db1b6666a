from __future__ import annotations

from html.parser import HTMLParser

import pytest

from autoalign.alignment import Alignment
from autoalign.reports.html import ROWS
from tests.reports.examples import FUSED, MIXED, hostile, unlike

ALLOWED = {"div", "strong", "table", "thead", "tbody", "tr", "th", "td", "details", "summary"}


class Fragment(HTMLParser):
    """The elements and the text of a fragment; elements must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open.append(tag)
        assert not {name for name, _ in attrs} - {"class", "style", "open", "scope", "colspan"}

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
        "the parts were told apart by their order alone",
        "split(dim 0, 16:32) of [32, 16]",
    ):
        assert said in fragment.text


def test_what_needs_attention_is_open() -> None:
    assert MIXED._repr_html_().count("<details open>") == 4
    assert "<details><summary>Matched" in MIXED._repr_html_()
    assert "<details open><summary>Matched" in FUSED._repr_html_()


def test_it_is_short_for_models_of_any_size() -> None:
    text = unlike(3000)._repr_html_()
    assert f"and {3000 - ROWS:,} more rows" in text
    assert len(text) < 40_000
