from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from autoalign.reports.rows import escape_markdown, fold, markdown_code, printable


def folded(*rows: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [row.texts for row in fold([(keys, None) for keys in rows])]


def test_blocks_fold_on_both_sides_also_when_shifted() -> None:
    rows = [(f"layer.{i}.norm.weight", f"blocks.{i + 1}.ln.weight") for i in range(12)]
    assert folded(*rows) == [("layer.{0...11}.norm.weight", "blocks.{1...12}.ln.weight")]


def test_an_index_that_stands_twice_in_a_key_is_one_index() -> None:
    assert folded(*[(f"block{i}.block{i}-0.f",) for i in (1, 2, 3)]) == [("block{1...3}.block{1...3}-0.f",)]


def test_nested_indices_fold_where_all_combinations_are_there() -> None:
    assert folded(*[(f"stages.{i}.{j}.w", f"s{i}.b{j}.w") for i in range(4) for j in range(2)]) == [
        ("stages.{0...3}.{0,1}.w", "s{0...3}.b{0,1}.w")
    ]


def test_stages_of_different_depth_are_rows_of_their_own() -> None:
    keys = [(f"stages.{i}.{j}.w",) for i, depth in enumerate((3, 3, 4)) for j in range(depth)]
    assert folded(*keys) == [("stages.{0,1}.{0...2}.w",), ("stages.2.{0...3}.w",)]


def test_a_flat_list_against_a_nested_one_shows_which_belongs_to_which() -> None:
    rows = [(f"stages.{i}.{j}.w", f"blocks.{3 * i + j}.w") for i in range(2) for j in range(3)]
    assert folded(*rows) == [("stages.0.{0...2}.w", "blocks.{0...2}.w"), ("stages.1.{0...2}.w", "blocks.{3...5}.w")]


def test_indices_nested_the_other_way_round_are_not_written_as_parallel() -> None:
    rows = [(f"layers.{i}.experts.{j}", f"experts.{j}.layers.{i}") for i in range(2) for j in range(2)]
    assert folded(*rows) == [
        ("layers.0.experts.{0,1}", "experts.{0,1}.layers.0"),
        ("layers.1.experts.{0,1}", "experts.{0,1}.layers.1"),
    ]


def test_reversed_blocks_are_not_folded() -> None:
    assert len(folded(*[(f"up.{i}", f"down.{2 - i}") for i in range(3)])) == 3


def test_numbers_with_gaps() -> None:
    assert folded(*[(f"net.{i}.weight",) for i in (0, 1, 2, 5, 6, 9)]) == [("net.{0...2,5,6,9}.weight",)]
    assert folded(*[(f"net.{i}.weight",) for i in (1, 4, 8, 16, 19, 24, 31, 40)]) == [
        ("net.{1,4,8,16,19,...,40}.weight",)
    ]


def test_a_number_that_its_value_does_not_give_back_is_a_name() -> None:
    keys = [("block.01",), ("block.1",), ("block.10000000000",)]
    assert folded(*keys) == keys


def test_siblings_fold() -> None:
    leaves = ("weight", "bias", "running_mean", "running_var")
    assert folded(*[(f"bn1.{leaf}", f"norm.{leaf}") for leaf in leaves]) == [
        ("bn1.{weight,bias,running_mean,...}", "norm.{weight,bias,running_mean,...}")
    ]
    assert folded(("ln.gamma", "norm.weight"), ("ln.beta", "norm.bias")) == [("ln.{gamma,beta}", "norm.{weight,bias}")]


def test_siblings_of_different_parents_do_not_fold() -> None:
    assert len(folded(("a.weight", "x.weight"), ("b.bias", "x.bias"))) == 2


def test_rows_that_disagree_in_a_field_do_not_fold() -> None:
    rows = [((f"layers.{i}.w",), "small" if i < 2 else "large") for i in range(4)]
    assert [(row.texts, row.fields) for row in fold(rows)] == [
        (("layers.{0,1}.w",), "small"),
        (("layers.{2,3}.w",), "large"),
    ]


def test_a_key_without_a_name_or_a_number() -> None:
    assert folded(("",), ("scale",), ("a..b",)) == [("",), ("scale",), ("a..b",)]


def stands_for(text: str, key: str) -> bool:
    """True if a key is one of those that a folded text stands for."""

    def alternatives(listed: str) -> str:
        parts = listed.split(",")
        if "..." in parts:  # some are left out
            return r"\w+"
        spans = [part.split("...") for part in parts]
        return "|".join(
            re.escape(name)
            for first, *last in spans
            for name in (map(str, range(int(first), int(last[0]) + 1)) if last else [first])
        )

    parts = re.split(r"\{(.*?)\}", text)
    pattern = "".join(f"(?:{alternatives(part)})" if odd % 2 else re.escape(part) for odd, part in enumerate(parts))
    return re.fullmatch(pattern, key) is not None


KEYS = st.builds(
    lambda stem, numbers, leaf: ".".join([stem, *map(str, numbers), leaf]),
    st.sampled_from(["layers", "stages.x"]),
    st.lists(st.integers(0, 5), max_size=2),
    st.sampled_from(["weight", "bias", "gamma"]),
)


@given(st.dictionaries(KEYS, st.tuples(KEYS, st.booleans()), max_size=40))
def test_each_row_is_a_member_of_one_fold_that_stands_for_it(partners: dict[str, tuple[str, bool]]) -> None:
    rows = [((key, other), field) for key, (other, field) in partners.items()]
    folds = fold(rows)
    assert sorted(member for row in folds for member in row.members) == list(range(len(rows)))
    for row in folds:
        for member in row.members:
            keys, fields = rows[member]
            assert fields == row.fields
            assert all(stands_for(text, key) for text, key in zip(row.texts, keys, strict=True))


@settings(max_examples=50)
@given(st.text(max_size=50))
def test_text_is_printable_and_keeps_its_lines(text: str) -> None:
    made = printable(text, kept="\n")
    assert made.count("\n") == text.count("\n")
    assert all(line.isprintable() for line in made.split("\n"))


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
