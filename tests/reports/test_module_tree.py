from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoalign.plan.specs import TensorSpec
from autoalign.reports.module_tree import Branch, copies_of, prefix_of, render_tree, size_text, tree_of


def specs(*keys: str, shape: tuple[int, ...] = (2,)) -> list[TensorSpec]:
    return [TensorSpec(key, shape, torch.float32) for key in keys]


def rendered(*keys: str) -> list[str]:
    return [" ".join(line.split()) for line in render_tree(tree_of(specs(*keys)), dtype="float32")]


def counted(branch: Branch) -> int:
    return sum(len(leaf.names) for leaf in branch.leaves) + sum(b.times * counted(b) for b in branch.branches)


@given(st.sets(st.text("ab01.{", min_size=1, max_size=7), max_size=12))
def test_no_tensor_is_lost_or_made_up(keys: set[str]) -> None:
    tree = tree_of(specs(*sorted(keys)))
    assert tree.tensors == len(keys) == counted(tree)
    assert tree.elements == 2 * len(keys)
    assert tree.bytes == 8 * len(keys)
    assert all(len(line.splitlines()) == 1 for line in render_tree(tree))


def test_blocks_fold_that_hold_the_same() -> None:
    assert rendered(*(f"h.{i}.fc.{leaf}" for i in range(3) for leaf in ("weight", "bias"))) == [
        "h.{0...2}.fc 3 x 16 B {weight,bias} [2]"
    ]


def test_blocks_that_alternate_fold_in_two() -> None:
    keys = [f"h.{i}.{'attn' if i % 2 else 'mixer'}.weight" for i in range(6)]
    assert rendered(*keys) == [
        "h 48 B 6 tensors",
        "{0,2,4}.mixer 3 x 8 B weight [2]",
        "{1,3,5}.attn 3 x 8 B weight [2]",
    ]


def test_blocks_of_other_shapes_stay_apart() -> None:
    assert [
        " ".join(line.split()) for line in render_tree(tree_of([*specs("s.0.w"), *specs("s.1.w", shape=(3,))]))
    ] == ["s 20 B 2 tensors", "0 8 B w [2] float32", "1 12 B w [3] float32"]


def test_nested_lists_keep_their_counts() -> None:
    tree = tree_of(specs(*(f"stages.{i}.blocks.{j}.weight" for i in range(2) for j in range(3))))
    assert rendered(*(f"stages.{i}.blocks.{j}.weight" for i in range(2) for j in range(3))) == [
        "stages.{0,1} 2 x 24 B 3 tensors",
        "blocks.{0...2} 3 x 8 B weight [2]",
    ]
    assert tree.tensors == 6


def test_a_name_may_be_a_tensor_and_a_module() -> None:
    assert rendered("a", "a.b") == ["a [2]", "a 8 B b [2]"]


def test_names_that_would_break_lines_are_escaped() -> None:
    assert rendered("a\x1b[2J.w\n", "\u202eb") == [r"\u202eb [2]", r"a\x1b[2J 8 B w\n [2]"]


def test_a_depth_hides_what_is_below() -> None:
    lines = render_tree(tree_of(specs("a.b.c.w", "a.b.d.w", "a.e.w", "f")), dtype="float32", depth=2)
    assert [line.split()[0] for line in lines] == ["f", "a", "b", "e"]


def test_very_deep_names_are_shown() -> None:
    assert len(rendered(".".join("x" * 5000), "y")) > 1


@pytest.mark.parametrize(
    ("keys", "prefix"),
    [
        (["module.a.w", "module.b.w"], ("module.", 2)),
        (["_orig_mod.module.a.w", "_orig_mod.module.b.w"], ("_orig_mod.module.", 2)),
        ([*(f"bert.{i}.w" for i in range(19)), "cls.w"], ("bert.", 19)),
        (["a.w", "b.w"], ("", 0)),
        (["layer1.0.w", "layer1.1.w"], ("", 0)),
        (["a.w"], ("", 0)),
        ([], ("", 0)),
    ],
)
def test_a_prefix_is_what_nearly_all_have(keys: list[str], prefix: tuple[str, int]) -> None:
    assert prefix_of(specs(*keys)) == prefix


def test_copies_are_large_and_equal() -> None:
    own = ["a.w", "b.w", "c.w"]
    both = [f"module.{side}.{key}" for side in ("student", "teacher") for key in own]
    assert copies_of(specs(*both)) == ("module.student", "module.teacher")
    assert copies_of(specs(*both, "module.student.d.w")) == ()
    assert copies_of(specs(*(f"layers.{i}.{key}" for i in range(3) for key in own))) == ()


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1000, "1.0 kB"), (10**12, "1.0 TB"), (5 * 10**15, "5000.0 TB")]
)
def test_sizes_are_decimal(count: int, text: str) -> None:
    assert size_text(count) == text
