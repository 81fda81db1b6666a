"""The target's code alone tells what it does with its tensors, and whether order is to be believed of the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoalign
from autoalign.plan.matches import Match
from autoalign.plan.operations import Copy
from autoalign.verification.refinement import pairs_of
from autoalign.verification.roles import given_composed, is_in_order, roles_of
from benchmarks.cases.twins import ActorCritic, Anonymous, Convolutional, Dense, Merging, Renamed
from tests.pairs import tv
from tests.reference_models.encoders import GatedEncoder, SeparateEncoder
from tests.reference_models.parts import WIDTH
from tests.verification.test_decisions import Gated, filled_from


def test_an_order_that_shapes_show_to_be_at_random_tells_nothing() -> None:
    model = tv("squeezenet1_1")()
    source = Anonymous(tv("squeezenet1_1")())
    right = {own: key for key, own in source.keys.items()}
    found = autoalign.align(source.state_dict(), model)
    assert all(match.sources == (right[match.target],) for match in found.matches)
    assert len(found.ambiguous) > 20


def test_an_order_that_shapes_bear_out_is_believed() -> None:
    model = tv("squeezenet1_1")()
    source = {f"m{place // 2}.{'wb'[place % 2]}": tensor for place, tensor in enumerate(model.state_dict().values())}
    found = autoalign.align(source, model)
    assert [*found.mapping] == [*source]
    assert [*found.mapping.values()] == [*model.state_dict()]


@pytest.mark.parametrize("is_called", [False, True])
def test_towers_that_never_meet_have_no_order(is_called: bool) -> None:
    source, target = ActorCritic("a", "b", is_actor_first=True), ActorCritic("x", "y", is_actor_first=False)
    inputs = torch.randn(3, 8) if is_called else None
    found = autoalign.align(source.state_dict(), target, example_inputs=inputs)
    assert not found.matches
    assert len(found.ambiguous) == len(target.state_dict())
    assert all("never meets" in match.warnings[-1] for match in found.ambiguous)


class Symmetric(nn.Module):
    """Two branches that are used alike."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        for name in names:
            self.add_module(name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.get_submodule(name) for name in self.names)
        return torch.relu(first(x)) + torch.relu(second(x))


def test_branches_that_are_used_alike_have_no_order() -> None:
    found = autoalign.align(Symmetric("a", "b").state_dict(), Symmetric("x", "y"))
    assert not found.matches
    assert all("another one of its shape alike" in match.warnings[-1] for match in found.ambiguous)


class Attending(nn.Module):
    """Attention of four layers, written in several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        for name in "wxyz":
            self.add_module(name, nn.Linear(WIDTH, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = (self.get_submodule(name)(tokens) for name in "ywx")
        if self.way == "einsum":
            scores = torch.einsum("bid,bjd->bij", q, k).softmax(-1)
        elif self.way == "keys first":
            scores = (k @ q.transpose(1, 2)).softmax(1).transpose(1, 2)
        elif self.way == "turned":
            scores = (k @ q.transpose(1, 2)).transpose(1, 2).softmax(-1)
        else:
            scores = (q @ k.transpose(1, 2)).softmax(-1)
        mixed = (
            (v.transpose(1, 2) @ scores.transpose(1, 2)).transpose(1, 2) if self.way == "values first" else scores @ v
        )
        return self.get_submodule("z")(mixed)  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["products", "einsum", "values first", "keys first", "turned"])
def test_queries_keys_and_values_are_told_however_attention_is_written(way: str) -> None:
    roles = roles_of(autoalign.dataflow(Attending(way), torch.ones(1, 5, WIDTH)))
    assert roles == {"w.weight": "k", "x.weight": "v", "y.weight": "q", "z.weight": "o"}


def test_a_shortcut_is_the_shorter_branch_and_a_stem_is_none() -> None:
    roles = roles_of(autoalign.dataflow(tv("resnet18")(), torch.ones(1, 3, 64, 64)))
    assert roles == {f"layer{stage}.0.downsample.0.weight": "shortcut" for stage in (2, 3, 4)}


@pytest.mark.parametrize("make", [lambda: GatedEncoder("separate"), SeparateEncoder])
def test_made_up_names_are_read_as_what_the_code_does(make: Callable[[], nn.Module]) -> None:
    source, target = make(), Renamed(make(), seed=1)
    keys = filled_from(autoalign.align(source.state_dict(), target.state_dict()))
    alignment = autoalign.align(source.state_dict(), target)
    found = filled_from(alignment)
    assert keys.items() != found.items() <= target.keys.items()
    assert {key for key, own in target.keys.items() if "attn" in own or "mlp" in own} <= found.keys()
    assert alignment.notes[-1].startswith("Told by what the code of the model does with them: 3 v, 3 q, 3 k, 3 o")


def test_code_contradicts_names_that_tell_another_role() -> None:
    source, target = Gated("gate", "up", "down"), Gated("w3", "w1", "x")
    found = filled_from(autoalign.align(source.state_dict(), target))
    assert (found["w3.weight"], found["w1.weight"], found["x.weight"]) == ("gate.weight", "up.weight", "down.weight")


@pytest.mark.parametrize("order", ["0123456789", "0213456879", "1234056789"])
def test_layers_that_stand_in_about_one_order_tell_of_it(order: str) -> None:
    keys = [f"{number}.weight" for number in range(10)]
    matches = [Match(key, (f"{own}.weight",), Copy()) for key, own in zip(keys, order, strict=True)]
    assert is_in_order(matches, keys, keys)
    assert not is_in_order(matches, keys, keys[::-1])
    assert is_in_order(matches[:3], keys, keys[::-1])  # chance


def test_what_shares_a_shape_with_more_that_is_open_is_open_too() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("cat", "cow", "dog", "fox"):
                self.add_module(name, nn.Linear(3, 3))

    source = {"one.weight": torch.ones(3, 3), "one.bias": torch.ones(3)}
    assert not autoalign.align(source, Wide()).matches


@pytest.mark.parametrize(
    ("source", "target", "count"),
    [
        (Dense("units", newest_first=False), Dense("layers", newest_first=True), 16),
        (Convolutional("c1 c2 f1 f2", channels_last=True), Convolutional("a b fc out", channels_last=False), 1),
        (Merging("proj norm reduction head", unfolds=False), Merging("patches norm reduce out", unfolds=True), 3),
    ],
)
def test_an_order_in_which_a_layer_is_given_several_tensors_is_open_where_one_code_shows_it(
    source: nn.Module, target: nn.Module, count: int
) -> None:
    tensors, images = source.state_dict(), torch.ones(1, 3, 32, 32)
    asked = autoalign.align(tensors, target, example_inputs=images)
    unsure = [match for match in autoalign.align(tensors, target).matches if match.confidence < 0.9]
    assert {m.target for m in asked.ambiguous} == {m.target for m in unsure}
    assert len(unsure) == count
    both = autoalign.align(tensors, target, example_inputs=images, source_model=source)
    assert not both.ambiguous
    assert len(both.matches) == len(target.state_dict())


def test_a_layer_that_is_given_one_tensor_under_any_name_is_taken_as_it_is() -> None:
    class Pooled(Convolutional):
        """Whose third layer has the columns of a flattened image, and is given something else."""

        def forward(self, x: Tensor) -> Tensor:
            first, second, third, last = (self.get_submodule(name) for name in self.names)
            scores: Tensor = last(third(second(first(x)).mean((1, 2, 3))[:, None].expand(-1, 256)))
            return scores

    tensors = Convolutional("c1 c2 f1 f2", channels_last=True).state_dict()
    target = Pooled("a b fc out", channels_last=False)
    assert not autoalign.align(tensors, target, example_inputs=torch.ones(1, 3, 32, 32)).ambiguous


@pytest.mark.parametrize("is_batched", [False, True])
def test_a_flattened_image_is_told_from_tokens(*, is_batched: bool) -> None:
    class Tokens(nn.Module):
        """Layers that are given the channels at each place; the last is given the image."""

        def __init__(self) -> None:
            super().__init__()
            self.patches, self.mix, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 8), nn.Linear(128, 5)

        def forward(self, x: Tensor) -> Tensor:
            places = self.patches(x).movedim(-3, -1)
            scores: Tensor = self.head(self.mix(places).flatten(-3))
            return scores

    images = torch.ones(2, 3, 8, 8) if is_batched else torch.ones(3, 8, 8)
    assert given_composed(autoalign.dataflow(Tokens(), images)) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("registered", ["p r", "r p"])
@pytest.mark.parametrize("used", ["p r", "r p"])
def test_scale_and_shift_are_what_is_multiplied_and_what_is_added(used: str, registered: str) -> None:
    class Modulated(nn.Module):
        def __init__(self, used: str, registered: str) -> None:
            super().__init__()
            self.used = used.split()
            for name in registered.split():
                self.add_module(name, nn.Linear(WIDTH, WIDTH))
            self.norm, self.head = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            scale, shift = (self.get_submodule(name)(x) for name in self.used)
            scores: Tensor = self.head(self.norm(x) * (1 + scale) + shift)
            return scores

    source, target = Modulated("scale shift", "scale shift"), Modulated(used, registered)
    scale, shift = used.split()
    assert roles_of(autoalign.dataflow(target, torch.ones(2, WIDTH))) == {
        f"{scale}.weight": "scale",
        f"{shift}.weight": "shift",
    }
    found = filled_from(autoalign.align(source.state_dict(), target))
    assert (found[f"{scale}.weight"], found[f"{shift}.weight"]) == ("scale.weight", "shift.weight")


@pytest.mark.parametrize("way", ["beside a layer", "against its input"])
def test_a_gate_and_what_it_gates_are_no_scale_whatever_is_added(way: str) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH) for _ in "abcd")

        def forward(self, x: Tensor) -> Tensor:
            gate = self.a(x).sigmoid()
            added = self.c(x) if way == "beside a layer" else (1 - gate) * x
            return self.d(gate * self.b(x) + added)  # type: ignore[no-any-return]

    assert roles_of(autoalign.dataflow(Gated(), torch.ones(2, WIDTH))) == {"a.weight": "gate", "b.weight": "up"}


class Mixing(nn.Module):
    """Attention with its heads mixed before the softmax, or none; queries, or keys, are the first of their product."""

    def __init__(self, way: str, *, keys_first: bool) -> None:
        super().__init__()
        self.way, self.keys_first = way, keys_first
        self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH) for _ in "abcd")
        self.heads = nn.Linear(2, 2) if way == "mixed" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(-2, -3) for layer in (self.a, self.b, self.c))
        scores = (k @ q.mT).mT if self.keys_first else q @ k.mT
        weights = self.heads(scores.movedim(-3, -1)).movedim(-1, -3).softmax(-1)
        return self.d((weights @ v).transpose(-2, -3).flatten(-2))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("way", "count"), [("plain", 1), ("mixed", 5), ("mixed", 1)])
def test_queries_and_keys_are_not_exchanged_where_heads_are_mixed_or_there_is_one_token(way: str, count: int) -> None:
    tokens = torch.ones(1, count, WIDTH)
    own, other = (autoalign.dataflow(Mixing(way, keys_first=keys_first), tokens) for keys_first in (False, True))
    found = pairs_of(own, other, {})
    assert all(key == source for key, source in found.items())
    assert ("a.weight" in found) == ("b.weight" in found) == (count > 1)
    assert {"a.weight", "b.weight"}.isdisjoint(roles_of(other))


def test_one_query_is_told_from_its_keys_without_a_dimension_for_it() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in "abc")

        def forward(self, x: Tensor) -> Tensor:
            return torch.mv(self.c(x).T, torch.mv(self.b(x), self.a(x)[0]).softmax(0))

    roles = roles_of(autoalign.dataflow(Single(), torch.ones(5, WIDTH)))
    assert roles == {"a.weight": "q", "b.weight": "k", "c.weight": "v"}


class Decoder(nn.Module):
    """A step of a U-Net: what is upsampled beside features of the encoder."""

    def __init__(self, up: str, skip: str) -> None:
        super().__init__()
        self.up, self.skip = up, skip
        for name in sorted((up, skip)):
            self.add_module(name, nn.Conv2d(4, 4, 3, padding=1))
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        small = nn.functional.max_pool2d(x, 2)
        up = self.get_submodule(self.up)(nn.functional.interpolate(small, scale_factor=2))
        return self.last(torch.cat((self.get_submodule(self.skip)(x), up), 1))  # type: ignore[no-any-return]


def test_what_is_upsampled_is_told_from_what_skips_it() -> None:
    graph = autoalign.dataflow(Decoder("a", "b"), torch.ones(1, 4, 8, 8))
    assert roles_of(graph) == {"a.weight": "up", "b.weight": "skip"}


def _made_up(source: nn.Module, target: nn.Module, **options: Any) -> dict[str, str]:
    found = filled_from(autoalign.align(source, target.state_dict(), **options))
    return {key: own for key, own in found.items() if key in ("gate.weight", "up.weight", "down.weight")}


def test_the_code_of_the_source_alone_tells_made_up_names() -> None:
    gated = Gated("y", "z", "x", order=(1, 2, 0)), Gated("gate", "up", "down")
    assert _made_up(*gated) == {"gate.weight": "y.weight", "up.weight": "z.weight", "down.weight": "x.weight"}
    given = autoalign.align(gated[0].state_dict(), gated[1].state_dict(), source_model=gated[0])
    assert filled_from(given)["gate.weight"] == "y.weight"
    assert given.notes[-1].startswith("Told by what the code of the model does with them: ")


def test_source_code_that_cannot_be_called_is_a_note() -> None:
    source = Gated("y", "z", "x")
    source.register_forward_pre_hook(lambda *_: 1 / 0)
    given = autoalign.align(source.state_dict(), Gated("gate", "up", "down").state_dict(), source_model=source)
    assert "The code of the checkpoint was not called. Gated could not be called" in given.notes[-1]
    assert autoalign.align(source, Gated("gate", "up", "down").state_dict()).notes == given.notes[:-1]
