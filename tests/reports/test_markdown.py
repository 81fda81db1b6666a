from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from autoalign import align
from autoalign.reports.text import escape_markdown, markdown_code, render_markdown

KEYS = st.dictionaries(st.text("ab`|\n\\_*<.", min_size=1, max_size=6), st.integers(1, 3), min_size=1, max_size=5)


@given(KEYS, KEYS)
def test_tables_have_whole_rows_whatever_the_keys(one: dict[str, int], other: dict[str, int]) -> None:
    sides = ({key: torch.empty(size, device="meta") for key, size in side.items()} for side in (one, other))
    width = 0
    for line in render_markdown(align(*sides)).split("\n"):
        if line.startswith("| keys |"):
            width = line.count("|")
        if line.startswith("|"):
            assert line.replace(r"\|", "").count("|") == width


@given(st.text("a`|", min_size=1))
def test_code_is_closed_by_what_opens_it(text: str) -> None:
    written = markdown_code(text)
    fence = written[: len(written) - len(written.lstrip("`"))]
    inner = written[len(fence) : -len(fence)]
    assert written.endswith(fence)
    assert fence not in inner
    assert inner.strip().replace(r"\|", "|") == text


def test_words_are_shown_as_they_are() -> None:
    assert escape_markdown("<b> a*b* `c`") == r"\<b\> a\*b\* \`c\`"
