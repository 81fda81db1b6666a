"""Regular expressions of the caller: what they match is what ``re`` matches, and they end."""

from __future__ import annotations

import json
import re
import time
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import autoalign
from autoalign import InputError, PatternError, Rule, Rules
from autoalign.plan import keys as expressions
from autoalign.plan.keys import TimeLimit, compiled

ENDLESS = "(a|a)*$"
KEY = "a" * 60 + "!"
SIDE = {KEY: torch.ones(2, 2), "weight": torch.ones(3)}


@pytest.fixture(autouse=True)
def _short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "_SECONDS_PER_CALL", 0.2)


def from_json(pattern: str) -> Rules:
    rule = {"sources": [pattern], "targets": ["b"]}
    return Rules.from_json(json.dumps({"version": 1, "notes": [], "rules": [rule]}))


@pytest.mark.parametrize(
    ("call", "undone"),
    [
        (lambda pattern: autoalign.align(SIDE, SIDE, exclude=f"re:{pattern}"), "aligned"),
        (lambda pattern: autoalign.align(SIDE, SIDE, exclude=["weight", re.compile(pattern)]), "aligned"),
        (lambda pattern: autoalign.align(SIDE, SIDE, include=f"re:{pattern}"), "aligned"),
        (lambda pattern: autoalign.align(SIDE, SIDE, rules={pattern: "weight"}), "aligned"),
        (lambda pattern: autoalign.align(SIDE, SIDE, rules=[("weight", "weight"), (pattern, "weight")]), "aligned"),
        (lambda pattern: Rules((Rule(("x",), ("y",)), Rule((pattern,), ("b",)))).apply(SIDE), "converted"),
        (lambda pattern: Rules((Rule((pattern,), ("b",)),)).rule_of(KEY), "converted"),
        (lambda pattern: from_json(pattern).apply(SIDE), "converted"),
    ],
)
def test_a_pattern_without_end_is_an_error_that_names_it(call: Callable[[str], object], undone: str) -> None:
    message = rf"The regular expression '\(a\|a\)\*\$' takes too long on 'a{{60}}!'\. Nothing was {undone}"
    since = time.process_time()
    with pytest.raises(PatternError, match=message):
        call(ENDLESS)
    assert time.process_time() - since < 5


def test_what_takes_re_for_ever_and_can_be_answered_is_answered() -> None:
    alignment = autoalign.align(SIDE, SIDE, exclude="re:(a+)+$")
    assert alignment.notes == ("exclude='re:(a+)+$' matches no key of either side.",)
    assert from_json("(a+)+$").apply(SIDE).keys() == SIDE.keys()


def test_the_time_is_that_of_the_whole_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "_SECONDS_PER_KEY", 0.0)
    side = {f"{'a' * 15}!{number}": torch.ones(1) for number in range(2000)}  # each is soon searched
    TimeLimit(1, "", seconds=60).search(compiled(ENDLESS), next(iter(side)))
    since = time.process_time()
    with pytest.raises(PatternError, match=r"takes too long on 'a{15}!"):
        autoalign.align(side, side, exclude=f"re:{ENDLESS}")
    assert time.process_time() - since < 5


def test_renamings_that_double_a_key_again_and_again_are_refused() -> None:
    rules = [("^(.*)$", rf"\1\1x{number}") for number in range(60)]
    with pytest.raises(
        PatternError, match=r"The rule '\^\(\.\*\)\$' -> .* makes keys longer without end\. Nothing was aligned"
    ):
        autoalign.align({"ab": torch.ones(1)}, {"c": torch.ones(1)}, rules=rules)


@pytest.mark.parametrize("pattern", ["(?:(?:a{1000}){1000}){1000}", "((x{400}){20}y{30}){20}"])
def test_repetitions_in_each_other_are_bounded(pattern: str) -> None:
    with pytest.raises(PatternError, match=r"in each other more than 100,000 times\. Nothing was aligned"):
        autoalign.align(SIDE, SIDE, exclude=f"re:{pattern}")


def test_repetitions_beside_each_other_are_not() -> None:
    assert compiled(r"(\d{4})-" * 20).match("1234-" * 20)


def test_a_pattern_over_bytes_is_refused() -> None:
    with pytest.raises(InputError, match=r"b'fc' is a regular expression over bytes, not text"):
        compiled(re.compile(b"fc"))  # type: ignore[arg-type]


def test_a_replacement_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(PatternError, match=r"The replacement '.+2' does not fit '\(w\)': .* Nothing was aligned"):
        autoalign.align(SIDE, SIDE, rules={"(w)": r"\2"})


@pytest.mark.parametrize("flags", ["(?i)A", "(?x) a b"])
def test_rules_take_no_flags_for_all_of_a_pattern(flags: str) -> None:
    with pytest.raises(PatternError, match="has named groups, references or flags"):
        Rules((Rule((flags,), ("b",)),))
    assert list(
        Rules((Rule(("(?i:A)",), ("b",)), Rule(("C",), ("d",)))).apply({"a": torch.ones(1), "c": torch.ones(1)})
    ) == ["b", "c"]


def test_of_many_rules_the_one_that_takes_long_is_named() -> None:
    rules = Rules((*(Rule((rf"^x{number}\.",), ("y.",)) for number in range(50)), Rule((ENDLESS,), ("b",))))
    with pytest.raises(PatternError, match=r"The regular expression '\(a\|a\)\*\$' takes too long"):
        rules.apply(SIDE)


def spans(match: re.Match[str] | None) -> object:
    return match and [match.span(group) for group in range(match.re.groups + 1)]


@pytest.mark.parametrize(
    ("pattern", "flags"),
    [
        (r"(?:ab){e}", 0),
        (r"a{i<=1}", 0),
        (r"a{,2}b{}c{x", 0),
        (r"\{[{}]+\}", 0),
        (r"[]a]+[^]a]", 0),
        (r"[\]\[a]+", 0),
        (r"\N{LATIN SMALL LETTER A}+", 0),
        ("A", re.IGNORECASE),
        (r"\w+$", re.ASCII),
        (r"^b", re.MULTILINE),
        (r"a.b", re.DOTALL),
        (r"a  b # [", re.VERBOSE),
        (r"(?<!a)b(?=c)", 0),
        (r"(?>a+)b|a*+c", 0),
    ],
)
@pytest.mark.parametrize("text", ["ab{e}", "abc", "aé", "a\nb", "aab{}c{x", "{[]a]}", "a{i<=1}", "aaac", "AB", ""])
def test_patterns_match_as_with_re(pattern: str, flags: int, text: str) -> None:
    given = re.compile(pattern, flags)
    assert spans(compiled(given).search(text)) == spans(given.search(text))


PIECES = (
    *(
        "a",
        "b",
        "e",
        "1",
        ".",
        "^",
        "$",
        "(",
        ")",
        "(?:",
        "(?=",
        "(?!",
        "(?i:",
        "|",
        "*",
        "+",
        "?",
        "??",
        "[",
        "]",
        "[^",
    ),
    *("-", ":", ",", "=", "!", "<", "&", "~", "{", "}", "{1}", "{,2}", "{1,}", "\\", r"\d", r"\w", r"\b", r"\."),
)


@given(st.lists(st.sampled_from(PIECES), max_size=9).map("".join), st.text("ab1.{}[]:-,e=A\n", max_size=8))
@example("[[:a:]]", "a]")
@example("[a[b]{e}", "[{e}")
@example("a{e}{e}", "a{e}}")
def test_any_pattern_matches_as_with_re(pattern: str, text: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            known = re.compile(pattern)
    except (re.error, FutureWarning):
        return
    assert spans(compiled(pattern).search(text)) == spans(known.search(text))
    assert spans(compiled(pattern).match(text)) == spans(known.match(text))
    changed: tuple[str, int] = TimeLimit(1, "").subn(compiled(pattern), "<x>", text)
    assert changed == known.subn("<x>", text)


@given(st.lists(st.sampled_from(PIECES), max_size=9).map("".join), st.text("ab1.{}[]:-,e=A\n", max_size=8))
def test_where_parts_are_kept_apart_changes_nothing(pattern: str, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expressions, "_MAX_RUN", 1)
        expressions._compiled.cache_clear()
        test_any_pattern_matches_as_with_re.hypothesis.inner_test(pattern, text)  # type: ignore[attr-defined]
    expressions._compiled.cache_clear()


@pytest.mark.parametrize(
    ("part", "text"), [(r"m\.", "m."), ("m", "m"), ("m-", "m-"), ("[m][/]", "m/"), ("(?:m)(?:x)", "mx"), (r"\x6d", "m")]
)
def test_long_text_that_repeats_itself_is_soon_found(part: str, text: str) -> None:
    since = time.process_time()
    for pattern in (compiled(rf"{part * 3000}!"), compiled(rf"^{part * 3000}(\d+)(?P<{'n' * 99}>!)")):
        assert pattern.search(f"{text * 3000}{'1' if pattern.groups else ''}!", timeout=60)
        assert not pattern.search(text * 3001, timeout=60)
    assert time.process_time() - since < 30


def test_a_pattern_of_thousands_of_words_is_soon_compiled() -> None:
    since = time.process_time()
    side: dict[str, Tensor] = {f"w{number}.x": torch.ones(1) for number in range(5000)}
    alignment = autoalign.align(side, {}, exclude="re:" + "|".join(rf"\bw{number}\b" for number in range(3000)))
    assert len(alignment.excluded) == 3000
    assert time.process_time() - since < 30


def test_parts_are_counted_with_what_repeats_them() -> None:
    with pytest.raises(PatternError, match="repeats parts in each other more than 100,000 times"):
        compiled("(a*b{1000}){1000}")


def test_without_time_left_nothing_is_matched() -> None:
    with pytest.raises(PatternError, match="takes too long"):
        TimeLimit(0, "Nothing was done.", seconds=0).search(compiled("a"), "a")
