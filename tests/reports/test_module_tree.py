"""The folded module tree, and what ``inspect`` writes of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoalign.plan.specs import TensorSpec
from autoalign.reports.module_tree import (
    MAX_DEPTH,
    Leaf,
    Tree,
    build_tree,
    copies_of,
    prefix_of,
    render_tree,
    size_text,
)


def keys_of(found: Tree) -> dict[int, str]:
    """Write the key of each tensor of a tree, by its place among the leaves."""
    path: list[str] = []
    keys = {}
    for name, depth, tensor in zip(found.names, found.depths, found.tensors, strict=True):
        path[depth:] = [name]
        if tensor >= 0:
            keys[tensor] = ".".join(path)
    return keys


COMPONENTS = st.sampled_from(["a", "b", "layers", "weight", "", "0", "1", "2", "3", "10", "norm1", "norm2"])
KEYS = st.lists(st.lists(COMPONENTS, min_size=1, max_size=5).map(".".join), unique=True, max_size=30)


@given(KEYS)
def test_every_key_is_in_the_tree_once(found: list[str]) -> None:
    assert keys_of(build_tree([Leaf(key, None) for key in found])) == dict(enumerate(found))


@given(KEYS, st.data())
def test_the_members_of_a_run_say_the_same(found: list[str], data: st.DataObject) -> None:
    leaves = [Leaf(key, data.draw(st.sampled_from("xy")), (data.draw(st.integers(0, 3)),)) for key in found]
    made = build_tree(leaves)
    for first, run in made.runs.items():
        size = made.ends[first] - first
        members = [range(first + k * size, first + (k + 1) * size) for k in range(len(run))]
        assert run == [member[0] for member in members]
        assert all(made.depths[member[0]] == made.depths[first] for member in members)
        for place in range(size):
            nodes = [member[place] for member in members]
            if place:
                assert len({made.names[node] for node in nodes}) == 1
            tensors = [made.tensors[node] for node in nodes]
            if tensors[0] >= 0:
                assert len({leaves[tensor].signature for tensor in tensors}) == 1
                numbers = [leaves[tensor].numbers[0] for tensor in tensors]
                assert numbers == sorted(numbers)
    shown = made.representatives()
    assert all(shown[node] <= node and shown[shown[node]] == shown[node] for node in range(len(shown)))


def lengths(found: Tree) -> dict[int, int]:
    return {first: len(run) for first, run in found.runs.items()}


def blocks(count: int, partner: dict[int, int] | None = None) -> list[Leaf]:
    partner = partner or {}
    return [Leaf(f"layers.{i}.{name}", name, (partner.get(i, i),)) for i in range(count) for name in ("weight", "bias")]


def test_repeated_blocks_are_a_run() -> None:
    assert lengths(build_tree(blocks(12))) == {1: 12}


def test_a_run_ends_where_the_counterparts_do_not_go_on() -> None:
    reversed_order = build_tree(blocks(3, {0: 2, 1: 1, 2: 0}))
    assert reversed_order.runs == {}
    two_stages = build_tree(
        [Leaf(f"blocks.{i}.weight", None, (i // 3, i % 3)) for i in range(6)]  # as stages.{0,1}.{0...2}
    )
    assert lengths(two_stages) == {1: 3, 7: 3}


def test_runs_within_runs() -> None:
    leaves = [Leaf(f"layers.{i}.experts.{k}.weight", None, (i, k)) for i in range(2) for k in range(4)]
    found = build_tree(leaves)
    assert lengths(found) == {1: 2, 3: 4, 13: 4}
    assert {found.names[node] for node in set(found.representatives())} == {"layers", "0", "experts", "weight"}


def test_siblings_apart_are_no_run() -> None:
    found = build_tree([Leaf("conv1", 0), Leaf("bn1", 1), Leaf("conv2", 0), Leaf("bn2", 1)])
    assert found.runs == {}


def test_numbers_that_could_not_be_written_back_are_names() -> None:
    assert build_tree([Leaf("layers.01.w", 0), Leaf("layers.02.w", 0)]).runs == {}


def test_a_tensor_and_a_module_may_have_one_name() -> None:
    found = build_tree([Leaf("a", None), Leaf("a.b", None)])
    assert keys_of(found) == {0: "a", 1: "a.b"}


def test_the_depth_has_a_limit() -> None:
    key = ".".join("a" * 10_000)
    found = build_tree([Leaf(key, None)])
    assert keys_of(found) == {0: key}
    assert max(found.depths) == MAX_DEPTH


def specs(*keys: str, shape: tuple[int, ...] = (2,)) -> list[TensorSpec]:
    return [TensorSpec(key, shape, torch.float32) for key in keys]


def rendered(*keys: str) -> list[str]:
    return [" ".join(line.split()) for line in render_tree(specs(*keys), dtype="float32")]


def counted(tree: Tree, module: int = -1) -> int:
    """Count the tensors below a module, where a run is counted by its first member and its length."""
    count, folded = 0, set[int]()
    for child in tree.children(module):
        if child not in folded:
            run = tree.runs.get(child, [child])
            folded.update(run)
            count += len(run) * (1 if tree.tensors[child] >= 0 else counted(tree, child))
    return count


@given(st.sets(st.text("ab01.{", min_size=1, max_size=7), max_size=12))
def test_no_tensor_is_lost_or_made_up(keys: set[str]) -> None:
    assert counted(build_tree([Leaf(key, None) for key in sorted(keys)], apart=True)) == len(keys)
    assert all(len(line.splitlines()) == 1 for line in render_tree(specs(*sorted(keys))))


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


def test_blocks_fold_in_any_order() -> None:
    assert rendered(*(f"h.{i}.weight" for i in sorted(range(12), key=str))) == ["h.{0...11} 12 x 8 B weight [2]"]


def test_blocks_of_other_shapes_stay_apart() -> None:
    assert [" ".join(line.split()) for line in render_tree([*specs("s.0.w"), *specs("s.1.w", shape=(3,))])] == [
        "s 20 B 2 tensors",
        "0 8 B w [2] float32",
        "1 12 B w [3] float32",
    ]


def test_nested_lists_keep_their_counts() -> None:
    assert rendered(*(f"stages.{i}.blocks.{j}.weight" for i in range(2) for j in range(3))) == [
        "stages.{0,1} 2 x 24 B 3 tensors",
        "blocks.{0...2} 3 x 8 B weight [2]",
    ]


def test_a_name_may_be_a_tensor_and_a_module() -> None:
    assert rendered("a", "a.b") == ["a [2]", "a 8 B b [2]"]


def test_names_that_would_break_lines_are_escaped() -> None:
    assert rendered("a\x1b[2J.w\n", "\u202eb") == [r"\u202eb [2]", r"a\x1b[2J 8 B w\n [2]"]


def test_a_depth_hides_what_is_below() -> None:
    lines = render_tree(specs("a.b.c.w", "a.b.d.w", "a.e.w", "f"), dtype="float32", depth=2)
    assert [line.split()[0] for line in lines] == ["f", "a", "b", "e"]


def test_a_narrow_tree_loses_nothing() -> None:
    key = "encoder.embeddings.patch_embeddings.projection"
    found = [
        *specs(f"{key}.weight", shape=(192, 3, 16, 16)),
        *specs(f"{key}.bias", "encoder.table", shape=(1, 197, 192)),
    ]
    narrow = render_tree(found, dtype="float32", width=60)
    assert max(map(len, narrow)) <= 60
    assert (
        " ".join(narrow).replace(",", " ").split()
        == " ".join(render_tree(found, dtype="float32")).replace(",", " ").split()
    )


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
