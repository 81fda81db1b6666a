"""Code decides what keys leave open: twins with names that tell nothing, and what code must not decide."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import autoalign
from autoalign.alignment import Alignment
from autoalign.errors import InputError
from autoalign.verification.roles import CODE
from benchmarks.accuracy.localisation import randomise as with_values
from benchmarks.cases.twins import Anonymous
from tests.reference_models.encoders import GatedEncoder, SeparateEncoder, TorchEncoder


class Twin(nn.Module):
    """Layers of one shape by their names, in the order of registration; what is done with them is in subclasses."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)

    def run(self, name: str, x: Tensor) -> Tensor:
        return self.get_submodule(name)(x)  # type: ignore[no-any-return]


class Gated(Twin):
    """A gated MLP: gate, up and down."""

    def __init__(self, gate: str, up: str, down: str, order: tuple[int, int, int] = (0, 1, 2)) -> None:
        names = gate, up, down
        super().__init__(*(names[place] for place in order))
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.names
        return self.head(self.run(down, nn.functional.silu(self.run(gate, x)) * self.run(up, x)))  # type: ignore[no-any-return]


class Chained(Twin):
    """Layers one after the other."""

    def __init__(self, *names: str) -> None:
        super().__init__(*names)
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = torch.relu(self.run(name, x))
        return self.head(x)  # type: ignore[no-any-return]


class Attending(Twin):
    """Attention, as its products or as one function."""

    def __init__(self, names: str, *, is_fused: bool, is_turned: bool = False) -> None:
        super().__init__(*sorted(names))
        self.names, self.is_fused, self.is_turned = names, is_fused, is_turned

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, out = (self.get_submodule(name) for name in self.names)
        query, key, value = (layer(x)[:, None] for layer in (q, k, v))
        if self.is_fused:
            mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        elif self.is_turned:
            mixed = (key @ query.transpose(-1, -2) / 2).softmax(-2).transpose(-1, -2) @ value
        else:
            scores = query @ key.transpose(-1, -2) / 2
            scores.clone()  # as code that keeps them has it
            mixed = scores.softmax(-1) @ value
        return self.head(out(mixed.squeeze(1)))  # type: ignore[no-any-return]


def filled_from(alignment: Alignment) -> dict[str, str]:
    return {match.target: match.sources[0] for match in alignment.matches}


def test_gate_and_up_are_told_by_what_is_done_with_them() -> None:
    source, target = Gated("w1", "w3", "w2"), Gated("x", "y", "z", order=(1, 2, 0))
    alignment = autoalign.align(source.state_dict(), target, source_model=source)
    right = {"x": "w1", "y": "w3", "z": "w2", "head": "head"}
    assert filled_from(alignment) == {
        f"{b}.{name}": f"{a}.{name}" for b, a in right.items() for name in ("weight", "bias")
    }
    assert all(match.evidence[CODE] == 1 for match in alignment.matches)
    assert any("The code of both models decided" in note for note in alignment.notes)
    assert filled_from(autoalign.align(source.state_dict(), target.state_dict())) != filled_from(alignment)


@pytest.mark.parametrize("is_turned", [False, True])
def test_queries_keys_and_values_are_told_whether_attention_is_one_function_or_two_products(*, is_turned: bool) -> None:
    source, target = Attending("qkvo", is_fused=False, is_turned=is_turned), Attending("wxyz", is_fused=True)
    pairs = dict(zip("wxyz", "qkvo", strict=True)) | {"head": "head"}
    right = {f"{b}.{kind}": f"{a}.{kind}" for b, a in pairs.items() for kind in ("weight", "bias")}
    assert filled_from(autoalign.align(source.state_dict(), target, source_model=source)) == right
    assert filled_from(autoalign.align(source, target)) == right  # by graphs alone, since nobody asked for a search


def test_a_convolution_of_single_positions_is_a_product() -> None:
    class Convolving(Gated):
        def run(self, name: str, x: Tensor) -> Tensor:
            layer = self.get_submodule(name)
            weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
            return nn.functional.conv1d(x.transpose(1, 2), weight[..., None], bias).transpose(1, 2)

    source, target = Gated("w1", "w3", "w2"), Convolving("x", "y", "z", order=(1, 2, 0))
    assert filled_from(autoalign.align(source.state_dict(), target, source_model=source))["x.bias"] == "w1.bias"


def test_code_at_hand_is_not_asked_where_keys_leave_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def unasked(*_: object) -> None:
        raise AssertionError("code was asked")

    for place in ("decisions", "roles"):
        monkeypatch.setattr(f"autoalign.verification.{place}.traced", unasked)
    source = Chained("fc1", "fc2", "fc3")
    for side in (source, source.state_dict()):
        assert autoalign.align(side, Chained("linear1", "linear2", "linear3")).coverage == 1
    with pytest.raises(AssertionError, match="code was asked"):
        autoalign.align(source, Chained(*"xyz"))
    with pytest.raises(AssertionError, match="code was asked"):
        autoalign.align(source.state_dict(), Chained(*"xyz"))
    with pytest.raises(AssertionError, match="code was asked"):
        autoalign.align(source, Chained("linear1", "linear2", "linear3"), source_model=source)


def test_order_tells_nothing_if_the_model_registers_what_it_uses_in_another_order() -> None:
    class Backwards(Chained):
        def __init__(self, *names: str) -> None:
            super().__init__(*reversed(names))
            self.names = names

    source = Chained(*"abc")
    assert autoalign.align(source.state_dict(), Backwards(*"xyz").state_dict()).coverage == 1
    assert autoalign.align(source.state_dict(), Chained(*"xyz")).ambiguous == ()
    alignment = autoalign.align(source.state_dict(), Backwards(*"xyz"))
    assert {match.target for match in alignment.ambiguous} == {"x.weight", "x.bias", "z.weight", "z.bias"}
    assert "uses it in another order" in alignment.ambiguous[0].warnings[0]
    right = filled_from(autoalign.align(source, Backwards(*"xyz")))
    assert (right["x.weight"], right["z.weight"]) == ("a.weight", "c.weight")
    inputs = torch.ones(2, 4)
    by_use = autoalign.align(source.state_dict(), Backwards(*"xyz"), example_inputs=inputs)
    assert filled_from(by_use)["x.weight"] == "a.weight"


def test_branches_that_are_alike_are_told_by_their_place_in_what_is_concatenated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("autoalign.verification.probe._MAX_ELEMENTS", 9)  # no call is needed
    torchvision, timm = pytest.importorskip("torchvision"), pytest.importorskip("timm")
    with torch.device("meta"):
        original, target = torchvision.models.inception_v3(init_weights=False), timm.create_model("inception_v3")
    right = filled_from(autoalign.align(original, target))
    source = Anonymous(original.eval())
    by_keys = autoalign.align(source.state_dict(), target)
    assert by_keys.ambiguous
    assert {key: source.keys[own] for key, own in filled_from(by_keys).items()} != right
    alignment = autoalign.align(source.state_dict(), target, source_model=source)
    assert {key: source.keys[own] for key, own in filled_from(alignment).items()} == right
    assert len(right) == 566


def test_a_match_that_code_contradicts_is_ambiguous_where_the_networks_are_not_the_same() -> None:
    class Longer(Chained):
        def __init__(self, *names: str) -> None:
            super().__init__(*names)
            self.more = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.more(super().forward(x))  # type: ignore[no-any-return]

    source, target = Chained("first", "second"), Longer("second", "first")
    alignment = autoalign.align(source.state_dict(), target, source_model=source)
    (doubted,) = (match for match in alignment.ambiguous if match.target == "first.weight")
    assert doubted.sources == ("first.weight",)
    assert doubted.alternatives[0].sources == ("second.weight",)
    assert doubted.warnings == ("by its code, the model uses it as the source uses second.weight",)
    assert filled_from(alignment).keys() == {"head.weight", "head.bias"}


def test_where_all_is_the_same_code_decides_against_names_but_not_against_rules() -> None:
    source, target = Chained("first", "second"), Chained("second", "first")
    right = {"first.weight": "second.weight", "second.weight": "first.weight"}
    assert filled_from(autoalign.align(source.state_dict(), target, source_model=source)).items() >= right.items()
    rules = {f"{name}.{kind}": f"{name}.{kind}" for name in ("first", "second") for kind in ("weight", "bias")}
    ruled = autoalign.align(source.state_dict(), target, source_model=source, rules=list(rules.items()))
    assert filled_from(ruled)["first.weight"] == "first.weight"


def test_a_difference_between_the_codes_does_not_spread() -> None:
    class Normed(Chained):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.dim() > 9 else torch.tanh(super().forward(torch.sin(x)))

    source, target = Chained("a", "b", "c"), Normed("x", "y", "z")
    alignment = autoalign.align(source.state_dict(), target, source_model=source)
    assert filled_from(alignment)["y.weight"] == "b.weight"


def test_tied_tensors_stay_together() -> None:
    class Tied(nn.Module):
        def __init__(self, *names: str) -> None:
            super().__init__()
            self.embed, self.body, self.out = nn.Embedding(9, 4), Chained(*names), nn.Linear(2, 9, bias=False)
            self.body.head, self.out = nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.body(self.embed(ids)))  # type: ignore[no-any-return]

    source, target = Tied("first", "second"), Tied("second", "first")
    found = filled_from(autoalign.align(source.state_dict(), target, source_model=source))
    assert found["out.weight"] == found["embed.weight"]
    assert found["body.first.weight"] == "body.second.weight"
    assert len(found) == len(target.state_dict())


def test_inputs_that_cannot_be_guessed_may_be_given() -> None:
    class Picky(Gated):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape != (5, 4):
                raise ValueError("not this")
            return super().forward(x)

    source, target = Gated("w1", "w3", "w2"), Picky("x", "y", "z", order=(1, 2, 0))
    without = autoalign.align(source.state_dict(), target, source_model=source)
    assert "Picky could not be called" in without.notes[-1]
    alignment = autoalign.align(source.state_dict(), target, source_model=source, example_inputs=torch.ones(5, 4))
    assert filled_from(alignment)["x.weight"] == "w1.weight"


def test_code_that_cannot_be_called_is_a_note() -> None:
    class Stuck(Gated):
        def forward(self, _: Tensor) -> Tensor:
            raise ValueError("no")

    source, target = Stuck("w1", "w3", "w2"), Gated("x", "y", "z")
    alignment = autoalign.align(source.state_dict(), target, source_model=source)
    assert filled_from(alignment) == filled_from(autoalign.align(source.state_dict(), target))
    assert "The code of both models was not compared. Stuck could not be called" in alignment.notes[-1]


def test_a_checkpoint_may_have_a_prefix_that_its_code_has_not() -> None:
    source, target = Gated("w1", "w3", "w2"), Gated("x", "y", "z", order=(1, 2, 0))
    wrapped = {f"module.{key}": tensor for key, tensor in source.state_dict().items()}
    assert filled_from(autoalign.align(wrapped, target, source_model=source))["x.weight"] == "module.w1.weight"


def test_code_of_another_checkpoint_is_an_error() -> None:
    source, target = Gated("w1", "w3", "w2"), Gated("x", "y", "z")
    with pytest.raises(InputError, match=r"source_model= is not the code of this checkpoint: of 2 tensors of Conv2d"):
        autoalign.align(source.state_dict(), target, source_model=nn.Conv2d(3, 8, 3))


def test_every_call_takes_the_code_also_by_its_name(tmp_path: Path) -> None:
    spec = f"{__name__}:Gated('w1', 'w3', 'w2')"
    source, target = Gated("w1", "w3", "w2"), Gated("x", "y", "z", order=(1, 2, 0))
    wanted = source.state_dict()
    autoalign.load(target, wanted, source_model=spec)
    assert torch.equal(target.state_dict()["x.weight"], wanted["w1.weight"])
    written = autoalign.convert(
        wanted, Gated("x", "y", "z", order=(1, 2, 0)), tmp_path / "a.safetensors", source_model=spec
    )
    assert filled_from(written)["x.weight"] == "w1.weight"
    with pytest.raises(InputError, match="and source_model would change it"):
        autoalign.load(target, wanted, alignment=written, source_model=spec)
    with pytest.raises(InputError, match=r"source_model= takes an nn.Module, or a text that names one"):
        autoalign.align(wanted, target, source_model=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["apart", "joined", "reordered"])
def test_fused_tensors_without_names_are_told_by_their_parts(way: str) -> None:
    make = {
        "apart": (TorchEncoder, SeparateEncoder),
        "joined": (SeparateEncoder, TorchEncoder),
        "reordered": (lambda: GatedEncoder("net"), lambda: GatedEncoder("w12")),
    }[way]
    tokens = torch.arange(9)[None]
    original = with_values(make[0](), 1)
    source, target = Anonymous(original), with_values(make[1](), 2)
    assert autoalign.align(source.state_dict(), target).coverage < 1 or way != "reordered"
    alignment = autoalign.load(target, source.state_dict(), source_model=source)
    assert alignment.missing_keys == []
    assert torch.allclose(target(tokens), original(tokens), atol=1e-5)


def test_parts_are_proposed_alone_where_networks_cannot_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoalign.verification.probe._MAX_ELEMENTS", 9)
    source, target = Anonymous(TorchEncoder().eval()), SeparateEncoder()
    alignment = autoalign.align(source.state_dict(), target, source_model=source)
    (proposed,) = (match for match in alignment.ambiguous if match.target == "layers.1.self_attn.k_proj.weight")
    assert source.keys[proposed.sources[0]] == "encoder.layers.1.self_attn.in_proj_weight"
    assert str(proposed.operation) == "split(dim 0, 32:64)"
    assert proposed.warnings == ("the parts are told by code, and where they begin is assumed",)
    assert all("self_attn" in match.target for match in alignment.ambiguous)
    named = TorchEncoder().eval()
    assert autoalign.align(named.state_dict(), target, source_model=named).ambiguous == ()


class Mixed(nn.Module):
    """Two layers whose outputs are added, and two that no call uses."""

    def __init__(self, names: str, *, share: float) -> None:
        super().__init__()
        self.names, self.share = names, share
        for name in names:
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.get_submodule(name) for name in self.names[:2])
        return torch.tanh(first(x)) + self.share * torch.tanh(second(x))


def test_what_neither_names_nor_code_tell_apart_is_ambiguous() -> None:
    source, target = Mixed("abcd", share=1), Mixed("wxyz", share=1)
    by_keys = autoalign.align(source.state_dict(), target)
    assert by_keys.coverage == 1
    alignment = autoalign.align(source.state_dict(), target, source_model=source)
    assert {match.target[0] for match in alignment.ambiguous} == {"y", "z"}
    assert all("neither its name nor" in match.warnings[-1] for match in alignment.ambiguous)


def test_the_last_module_of_its_kind_is_told_by_all_others() -> None:
    source, target = Chained("more", "a", "b"), Chained("x", "y", "spare")
    source.names, target.names = ("a", "b"), ("x", "y")
    filled = filled_from(autoalign.align(source.state_dict(), target, source_model=source))
    assert (filled["x.weight"], filled["spare.weight"], filled["spare.bias"]) == (
        "a.weight",
        "more.weight",
        "more.bias",
    )


def test_a_square_weight_is_taken_as_it_is_between_layers_of_torch() -> None:
    class Kinds(nn.Module):
        def __init__(self, names: str, order: str) -> None:
            super().__init__()
            self.names = names
            layers = dict(zip(names, (nn.Linear(4, 4), nn.Conv1d(4, 4, 1)), strict=True))
            for name in order:
                self.add_module(name, layers[name])

        def forward(self, x: Tensor) -> Tensor:
            linear, convolution = (self.get_submodule(name) for name in self.names)
            return torch.tanh(convolution(torch.tanh(linear(x)).transpose(1, 2)))

    source, target = Kinds("ab", "ba"), Kinds("xy", "xy")
    filled = filled_from(autoalign.align(source.state_dict(), target, source_model=source))
    assert filled == {"x.weight": "a.weight", "x.bias": "a.bias", "y.weight": "b.weight", "y.bias": "b.bias"}
