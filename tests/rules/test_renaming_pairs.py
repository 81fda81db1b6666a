"""renaming_pairs: a few pairs of patterns do what is wanted, and nothing else that matters."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoalign.matching.scope import pinned_pairs
from autoalign.rules.renaming_pairs import Renamer


def never(_: str, __: str) -> bool:
    return False


def renamer(source: list[str], target: list[str]) -> Renamer:
    return Renamer(source, target, never)


BLOCKS = {
    f"h.{i}.{own}.{leaf}": f"layers.{i}.{other}.{leaf}"
    for i in range(4)
    for own, other in (("n1", "ln_a"), ("n2", "ln_b"))
    for leaf in ("weight", "bias")
}


def test_what_differs_in_numbers_and_last_names_is_one_pair() -> None:
    pairs = renamer(list(BLOCKS), list(BLOCKS.values())).pairs(BLOCKS)
    assert pairs == ((r"^h\.(\d+)\.n1\.", r"layers.\1.ln_a."), (r"^h\.(\d+)\.n2\.", r"layers.\1.ln_b."))


def test_an_exchange_is_one_pair_for_each_side_of_it() -> None:
    swapped = {key: key.replace("n1", "n3").replace("n2", "n1").replace("n3", "n2") for key in BLOCKS}
    pairs = renamer(list(BLOCKS), list(BLOCKS)).pairs(swapped)
    assert sorted(pairs) == [(r"^h\.(\d+)\.n1\.", r"h.\1.n2."), (r"^h\.(\d+)\.n2\.", r"h.\1.n1.")]


def test_a_pattern_names_the_blocks_where_others_must_not_be_named() -> None:
    wanted = {f"h.{i}.gamma": f"layers.{i}.weight" for i in (0, 2)}
    pairs = renamer([f"h.{i}.gamma" for i in range(4)], [f"layers.{i}.weight" for i in range(4)]).pairs(wanted)
    assert pairs == ((r"^h\.(0|2)\.gamma$", r"layers.\1.weight"),)


def test_what_is_harmless_may_be_named_as_well() -> None:
    wanted = {"h.0.n1.weight": "layers.0.ln_a.weight", "h.1.n1.weight": "layers.1.ln_a.weight"}
    known = Renamer(list(BLOCKS), list(BLOCKS.values()), lambda own, other: BLOCKS[own] == other)
    assert known.pairs(wanted) == ((r"^h\.(\d+)\.n1\.", r"layers.\1.ln_a."),)


def test_numbers_that_are_computed_are_spelled_out() -> None:
    wanted = {f"h.{i}.gamma": f"layers.{i + 1}.weight" for i in range(2)}
    assert renamer(list(wanted), list(wanted.values())).pairs(wanted) == tuple(wanted.items())


def test_a_number_follows_the_one_that_it_is_equal_to_everywhere() -> None:
    wanted = {f"a.{i}.b.{k}.c": f"x.{i}.y.{k}.z" for i in range(3) for k in range(2)}
    assert renamer(list(wanted), list(wanted.values())).pairs(wanted) == ((r"^a\.(\d+)\.b\.(\d+)\.c$", r"x.\1.y.\2.z"),)


@pytest.mark.parametrize("key", ["a(0).w", "a\\0.w", "a$.w", "a[0].(1).w", "a=.w", "007.w", "a.#.w"])
def test_special_characters_stand_for_themselves(key: str) -> None:
    wanted = {key: "b.w", key.replace("w", "v"): "b.v", f"{key}w": "\\1"}
    pairs = renamer(list(wanted), list(wanted.values())).pairs(wanted)
    assert pinned_pairs(pairs, list(wanted), list(wanted.values())) == {new: own for own, new in wanted.items()}


NAMES = st.lists(st.sampled_from(["a", "b", "0", "1", "2", "n1", "n2", "x0_1"]), min_size=1, max_size=4).map(".".join)


@given(st.lists(NAMES, unique=True, min_size=1), st.lists(NAMES, unique=True, min_size=1), st.data())
def test_align_takes_the_pairs_as_they_are_meant(source: list[str], target: list[str], data: Any) -> None:
    count = data.draw(st.integers(1, min(len(source), len(target))))
    wanted = dict(zip(source[:count], target[:count], strict=True))
    pairs = renamer(source, target).pairs(wanted)
    assert len(pairs) <= count
    assert pinned_pairs(pairs, source, target) == {new: own for own, new in wanted.items()}
