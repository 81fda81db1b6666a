"""Properties of an alignment that hold for every input, checked on inputs that are made together with their truth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import permutations, product
from random import Random

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import autoalign
from autoalign.alignment import Alignment
from tests.strategies import (
    LEAVES,
    Case,
    Shapes,
    identical,
    in_alphabetical_order,
    perturbed,
    real_cases,
    renamed,
    reordered,
    shortened,
    tensors,
    transformer_cases,
    with_another_head,
    without_counters,
    wrapped,
    written_cases,
)

few = settings(
    max_examples=20,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # shrinking a whole network takes minutes and tells little
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
any_case = written_cases | perturbed()


def align(case: Case) -> Alignment:
    return autoalign.align(tensors(case.source), tensors(case.target))


def wrong(alignment: Alignment, case: Case) -> str:
    """The matches that contradict the truth, a line each."""
    return "\n".join(
        f"{match.target} <- {', '.join(match.sources)} ({match.confidence:.2f}), not {case.truth.get(match.target)}"
        for match in alignment.matches
        if match.sources != (case.truth.get(match.target),)
    )


def lost(alignment: Alignment, case: Case) -> str:
    """The target keys that have a source and did not get it, a line each."""
    return "\n".join(key for key in case.truth if alignment.status[key] != "matched")


@few
@given(any_case)
def test_every_target_key_has_one_status_and_the_lists_agree_with_it(case: Case) -> None:
    alignment = align(case)
    assert list(alignment.status) == list(case.target)
    listed = Counter(match.target for match in (*alignment.matches, *alignment.ambiguous))
    listed.update(mismatch.key for mismatch in alignment.mismatched_keys)
    assert set(listed.values()) <= {1}
    by_status = {
        status: [key for key, own in alignment.status.items() if own == status]
        for status in ("matched", "ambiguous", "mismatched", "missing")
    }
    assert sum(map(len, by_status.values())) == len(case.target)
    assert [match.target for match in alignment.matches] == by_status["matched"]
    assert {match.target for match in alignment.ambiguous} == set(by_status["ambiguous"])
    assert {mismatch.key for mismatch in alignment.mismatched_keys} == set(by_status["mismatched"])
    assert alignment.missing_keys == [key for key in case.target if alignment.status[key] != "matched"]


@few
@given(any_case)
def test_every_source_key_is_used_once_or_unexpected(case: Case) -> None:
    alignment = align(case)
    used = Counter(key for match in alignment.matches for key in match.sources)
    assert set(used.values()) <= {1}
    assert alignment.unexpected_keys == [key for key in case.source if key not in used]
    missing, unexpected = alignment
    assert (missing, unexpected) == (alignment.missing_keys, alignment.unexpected_keys)


@few
@given(any_case)
def test_what_is_loaded_has_the_targets_keys_and_shapes(case: Case) -> None:
    alignment = align(case)
    state_dict = alignment.state_dict()
    assert list(state_dict) == [match.target for match in alignment.matches]
    assert all(tuple(tensor.shape) == case.target[key] for key, tensor in state_dict.items())
    assert all(0.0 <= match.confidence <= 1.0 for match in (*alignment.matches, *alignment.ambiguous))


@few
@given(any_case)
def test_the_result_is_deterministic(case: Case) -> None:
    first, second = align(case), align(case)
    assert (first.matches, first.ambiguous, first.mismatched) == (second.matches, second.ambiguous, second.mismatched)


@few
@given(any_case)
def test_the_inputs_are_not_changed(case: Case) -> None:
    source, target = tensors(case.source), tensors(case.target)
    before = [[(key, id(tensor), tensor.shape, tensor._version) for key, tensor in d.items()] for d in (source, target)]
    autoalign.align(source, target)
    after = [[(key, id(tensor), tensor.shape, tensor._version) for key, tensor in d.items()] for d in (source, target)]
    assert before == after


@few
@given(any_case)
def test_a_network_aligned_with_itself_is_the_identity(case: Case) -> None:
    itself = identical(case.target)
    alignment = align(itself)
    assert (wrong(alignment, itself), lost(alignment, itself)) == ("", "")
    assert repr(alignment) == "<All keys matched successfully>"


@few
@given(any_case, st.randoms(use_true_random=False))
def test_equal_names_decide_in_any_order(case: Case, random: Random) -> None:
    keys = list(case.target)
    random.shuffle(keys)
    shuffled = Case({key: case.target[key] for key in keys}, case.target, {key: key for key in keys})
    alignment = align(shuffled)
    assert (wrong(alignment, shuffled), lost(alignment, shuffled)) == ("", "")


@settings(few, max_examples=40)
@given(written_cases)
def test_two_libraries_styles_of_one_network_are_matched_in_full(case: Case) -> None:
    alignment = align(case)
    assert (wrong(alignment, case), lost(alignment, case)) == ("", "")


@few
@given(wrapped())
def test_wrappers_prefixes_are_seen_through(case: Case) -> None:
    alignment = align(case)
    assert (wrong(alignment, case), lost(alignment, case)) == ("", "")


@few
@given(reordered())
def test_another_order_of_siblings_with_their_names_is_matched_in_full(case: Case) -> None:
    alignment = align(case)
    assert (wrong(alignment, case), lost(alignment, case)) == ("", "")


@few
@given(wrapped(in_alphabetical_order(with_another_head(without_counters()))))
def test_an_alphabetical_order_of_keys_is_matched_in_full(case: Case) -> None:
    alignment = align(case)
    assert (wrong(alignment, case), lost(alignment, case)) == ("", "")


@few
@given(wrapped(shortened()))
def test_blocks_that_one_side_lacks_are_missing_and_the_rest_is_matched(case: Case) -> None:
    alignment = align(case)
    assert (wrong(alignment, case), lost(alignment, case)) == ("", "")


@few
@given(with_another_head(renamed()))
def test_another_head_is_left_out_under_other_names_too(case: Case) -> None:
    alignment = align(case)
    assert wrong(alignment, case) == ""


@settings(few, max_examples=40)
@given(renamed())
def test_renaming_a_whole_side_never_makes_a_wrong_match(case: Case) -> None:
    assert wrong(align(case), case) == ""
    assert wrong(align(case.flipped()), case.flipped()) == ""


@settings(few, max_examples=40)
@given(perturbed())
def test_several_perturbations_at_once_never_make_a_wrong_match(case: Case) -> None:
    assert wrong(align(case), case) == ""


def test_nearly_all_of_a_network_is_found_if_only_torchs_own_names_are_left() -> None:
    shares = []

    @settings(few, max_examples=30)
    @given(shortened(with_another_head(renamed(spare=LEAVES))))
    def collect(case: Case) -> None:
        alignment = align(case)
        assert wrong(alignment, case) == ""
        shares.append(1 - len(lost(alignment, case).splitlines()) / len(case.truth))

    collect()
    assert sum(shares) / len(shares) > 0.97


NEUTRAL = [("left", "right"), ("a", "b"), ("first_net", "second_net")]


@st.composite
def two_towers(draw: st.DrawFn) -> tuple[Case, Case]:
    """A checkpoint of two equal networks, and a model of one of them: the truth for either one.

    Neither the networks' names nor, if they are registered layer by layer, their order tells which is wanted.
    """
    tower = draw(transformer_cases() | real_cases).target
    names = draw(st.sampled_from(NEUTRAL))
    prefix = draw(st.sampled_from(["", "net.", "backbone.body."]))
    by_layer = draw(st.booleans())
    pairs = [(name, key) for key in tower for name in names] if by_layer else list(product(names, tower))
    both = {f"{name}.{key}": tower[key] for name, key in pairs}
    one = {prefix + key: shape for key, shape in tower.items()}
    first, second = (Case(both, one, {prefix + key: f"{name}.{key}" for key in tower}) for name in names)
    return first, second


@few
@given(two_towers())
def test_two_equal_networks_are_ambiguous_and_never_mixed(towers: tuple[Case, Case]) -> None:
    alignment = align(towers[0])
    assert alignment.matches == ()
    assert set(alignment.status.values()) == {"ambiguous"}
    proposed = {match.target: match.sources[0] for match in alignment.ambiguous}
    assert proposed in (towers[0].truth, towers[1].truth)


@few
@given(two_towers())
def test_one_network_for_two_equal_ones_is_not_loaded_into_either(towers: tuple[Case, Case]) -> None:
    assert align(towers[0].flipped()).matches == ()


@few
@given(two_towers(), st.booleans())
def test_one_of_two_equal_networks_is_loaded_whole_if_the_other_is_excluded(
    towers: tuple[Case, Case], second: bool
) -> None:
    wanted, other = towers[second], towers[not second]
    prefix = next(iter(other.truth.values())).partition(".")[0]
    alignment = autoalign.align(tensors(wanted.source), tensors(wanted.target), exclude=prefix)
    assert (wrong(alignment, wanted), lost(alignment, wanted)) == ("", "")


@few
@given(two_towers(), st.booleans(), st.data())
def test_one_of_two_equal_networks_is_loaded_whole_if_a_rule_names_one_pair_of_it(
    towers: tuple[Case, Case], second: bool, data: st.DataObject
) -> None:
    wanted = towers[second]
    target, source = data.draw(st.sampled_from(list(wanted.truth.items())))
    alignment = autoalign.align(tensors(wanted.source), tensors(wanted.target), rules=[(source, target)])
    assert (wrong(alignment, wanted), lost(alignment, wanted)) == ("", "")


LAYERS: list[Shapes] = [
    {"weight": (4, 3), "bias": (4,)},
    {"weight": (4, 3)},
    {"weight": (4,), "bias": (4,)},
    {"weight": (3, 4)},
]
Network = dict[str, dict[str, Shapes]]  # groups of layers of tensors


def correspondences(source: Network, target: Network) -> Iterator[dict[str, str]]:
    """Yield every way to pair the groups, and in them the layers, such that all tensors fit, by trying all ways."""
    for groups in permutations(source):
        pairs = list(zip(groups, target, strict=True))
        if any(len(source[theirs]) != len(target[ours]) for theirs, ours in pairs):
            continue
        for orders in product(*(permutations(source[theirs]) for theirs in groups)):
            layers = [
                (f"{theirs}.{layer}", source[theirs][layer], f"{ours}.{own_layer}", target[ours][own_layer])
                for (theirs, ours), order in zip(pairs, orders, strict=True)
                for layer, own_layer in zip(order, target[ours], strict=True)
            ]
            if all(leaves == own_leaves for _, leaves, _, own_leaves in layers):
                yield {f"{own}.{leaf}": f"{path}.{leaf}" for path, _, own, leaves in layers for leaf in leaves}


def flat(network: Network) -> dict[str, tuple[int, ...]]:
    return {
        f"{group}.{layer}.{leaf}": shape
        for group, layers in network.items()
        for layer, leaves in layers.items()
        for leaf, shape in leaves.items()
    }


@st.composite
def tiny_networks(draw: st.DrawFn) -> tuple[Network, Network]:
    """A network of one to three groups of layers, under two sets of names, and in two orders within each group."""
    layers = st.lists(st.sampled_from(LAYERS), min_size=1, max_size=3)
    groups = draw(st.lists(layers, min_size=1, max_size=3))
    words = iter(draw(st.permutations([f"{first}{last}" for first in ("zor", "qui", "dru") for last in "bdfgklmps"])))
    target = {next(words): {next(words): leaves for leaves in layers} for layers in groups}
    shuffled = [draw(st.permutations(layers)) for layers in groups]
    source = {next(words): {next(words): leaves for leaves in layers} for layers in shuffled}
    return source, target


@settings(few, max_examples=100)
@given(tiny_networks())
def test_no_match_contradicts_every_correspondence_of_two_tiny_networks(networks: tuple[Network, Network]) -> None:
    source, target = networks
    truths = list(correspondences(source, target))
    assert truths
    alignment = autoalign.align(tensors(flat(source)), tensors(flat(target)))
    for match in alignment.matches:
        if match.confidence >= 0.9:  # what confidence promises; names say nothing here, and order is shuffled
            assert match.sources[0] in {truth[match.target] for truth in truths}, str(alignment)
