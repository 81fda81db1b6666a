from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from autoalign.reports.module_tree import DEPTH, TensorRow, Tree, tree


def keys_of(found: Tree) -> dict[int, str]:
    """Write the key of each tensor of a tree, by its place among the leaves."""
    path: list[str] = []
    keys = {}
    for name, depth, tensor in zip(found.names, found.depths, found.tensors, strict=True):
        path[depth:] = [name]
        if tensor >= 0:
            keys[tensor] = ".".join(path)
    return keys


components = st.sampled_from(["a", "b", "layers", "weight", "", "0", "1", "2", "3", "10", "norm1", "norm2"])
keys = st.lists(st.lists(components, min_size=1, max_size=5).map(".".join), unique=True, max_size=30)


@given(keys)
def test_every_key_is_in_the_tree_once(found: list[str]) -> None:
    assert keys_of(tree([TensorRow(key, None) for key in found])) == dict(enumerate(found))


@given(keys, st.data())
def test_the_members_of_a_run_say_the_same(found: list[str], data: st.DataObject) -> None:
    leaves = [TensorRow(key, data.draw(st.sampled_from("xy")), (data.draw(st.integers(0, 3)),)) for key in found]
    made = tree(leaves)
    for first, length in made.runs.items():
        size = made.ends[first] - first
        members = [range(first + k * size, first + (k + 1) * size) for k in range(length)]
        assert all(made.depths[member[0]] == made.depths[first] for member in members)
        for place in range(size):
            nodes = [member[place] for member in members]
            if place:
                assert len({made.names[node] for node in nodes}) == 1
            tensors = [made.tensors[node] for node in nodes]
            if tensors[0] >= 0:
                assert len({leaves[tensor].said for tensor in tensors}) == 1
                numbers = [leaves[tensor].numbers[0] for tensor in tensors]
                assert numbers == sorted(numbers)
    shown = made.representatives()
    assert all(shown[node] <= node and shown[shown[node]] == shown[node] for node in range(len(shown)))


def blocks(count: int, partner: dict[int, int] | None = None) -> list[TensorRow]:
    partner = partner or {}
    return [
        TensorRow(f"layers.{i}.{name}", name, (partner.get(i, i),)) for i in range(count) for name in ("weight", "bias")
    ]


def test_repeated_blocks_are_a_run() -> None:
    assert tree(blocks(12)).runs == {1: 12}


def test_a_run_ends_where_the_counterparts_do_not_go_on() -> None:
    reversed_order = tree(blocks(3, {0: 2, 1: 1, 2: 0}))
    assert reversed_order.runs == {}
    two_stages = tree(
        [TensorRow(f"blocks.{i}.weight", None, (i // 3, i % 3)) for i in range(6)]  # as stages.{0,1}.{0...2}
    )
    assert two_stages.runs == {1: 3, 7: 3}


def test_runs_within_runs() -> None:
    leaves = [TensorRow(f"layers.{i}.experts.{k}.weight", None, (i, k)) for i in range(2) for k in range(4)]
    found = tree(leaves)
    assert found.runs == {1: 2, 3: 4, 13: 4}
    assert {found.names[node] for node in set(found.representatives())} == {"layers", "0", "experts", "weight"}


def test_siblings_apart_are_no_run() -> None:
    found = tree([TensorRow("conv1", 0), TensorRow("bn1", 1), TensorRow("conv2", 0), TensorRow("bn2", 1)])
    assert found.runs == {}


def test_numbers_that_could_not_be_written_back_are_names() -> None:
    assert tree([TensorRow("layers.01.w", 0), TensorRow("layers.02.w", 0)]).runs == {}


def test_a_tensor_and_a_module_may_have_one_name() -> None:
    found = tree([TensorRow("a", None), TensorRow("a.b", None)])
    assert keys_of(found) == {0: "a", 1: "a.b"}


def test_the_depth_has_a_limit() -> None:
    key = ".".join("a" * 10_000)
    found = tree([TensorRow(key, None)])
    assert keys_of(found) == {0: key}
    assert max(found.depths) == DEPTH
