"""verify: equal models are equal, and where two differ it names the place and the cause."""

from __future__ import annotations

import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoalign
from autoalign.alignment import Alignment
from autoalign.errors import InputError, UnequalModelsError
from autoalign.plan.matches import Verified
from autoalign.plan.operations import Flip, Operation, Transpose, chain
from autoalign.verification.verify import verify
from benchmarks.accuracy.localisation import SUBJECTS, Way, measure
from benchmarks.accuracy.localisation import randomise as with_values
from benchmarks.cases import twins
from tests.matching.test_operation_pairs import DOUBTED_PAIRS, LLAMA, NOISE, PHI3, TOKENS, Pair, hf, randomise
from tests.pairs import randomise as like_images
from tests.pairs import tm, tv
from tests.reference_models.encoders import GatedEncoder
from tests.reference_models.parts import CONTEXT, DEPTH
from tests.reference_models.vision import DiffusersDiT, DiT

INPUTS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
BERT = hf("Bert", "Model", max_position_embeddings=CONTEXT)


def network() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 8, 3, padding=1),
            norm1=nn.BatchNorm2d(8),
            act=nn.GELU(),
            conv2=nn.Conv2d(8, 8, 3, padding=1, groups=2),
            norm2=nn.GroupNorm(2, 8),
            pool=nn.AdaptiveAvgPool2d(2),
            flat=nn.Flatten(),
            fc=nn.Linear(32, 5),
        )
    )


def renamed(model: nn.Sequential) -> nn.Sequential:
    names = dict(zip(["conv1", "norm1", "act", "conv2", "norm2", "pool", "flat", "fc"], "abcdefgh", strict=True))
    return nn.Sequential(OrderedDict((names[name], module) for name, module in model.named_children()))


@pytest.fixture
def pair() -> tuple[Any, Any]:
    """A source, and a target that was loaded from it."""
    source, target = with_values(network(), 1), renamed(network())
    target.load_state_dict(dict(zip(target.state_dict(), source.state_dict().values(), strict=True)))
    return source, target


def snapshot(model: nn.Module) -> list[Any]:
    tensors = [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return [tensors, hooks, [module.training for module in model.modules()]]


def assert_unchanged(model: nn.Module, before: list[Any]) -> None:
    tensors, *rest = snapshot(model)
    assert all(torch.equal(own, other) for own, other in zip(tensors, before[0], strict=True))
    assert rest == before[1:]


def test_a_loaded_target_is_equal_as_it_is(pair: tuple[Any, Any]) -> None:
    source, target = pair
    target.b.eval()
    target.train()
    target.e.eval()
    before = [snapshot(model) for model in pair]
    state = torch.get_rng_state()
    verification = verify(source, target, INPUTS)
    assert verification.equal
    assert verification.as_it_is
    assert (verification.first_divergence, verification.taken, verification.trials) == (None, (), 0)
    assert verification.compared == 10  # inputs and outputs of five layers
    assert verification.alignment.coverage == 1
    assert torch.equal(torch.get_rng_state(), state)
    for model, known in zip(pair, before, strict=True):
        assert_unchanged(model, known)


def test_a_target_that_was_not_loaded_is_verified_by_the_alignments_values() -> None:
    source, target = with_values(network(), 1), with_values(renamed(network()), 2)
    before = snapshot(target)
    verification = verify(source, target, INPUTS)
    assert verification.equal
    assert not verification.as_it_is
    assert_unchanged(target, before)
    target.load_state_dict(verification.alignment.state_dict())
    assert verify(source, target, INPUTS).as_it_is


@pytest.mark.parametrize(
    ("change", "module", "text"),
    [
        (lambda m: setattr(m.b, "eps", 0.5), "b", "eps 1e-05 / 0.5"),
        (lambda m: setattr(m.e, "eps", 0.5), "e", "eps 1e-05 / 0.5"),
        (lambda m: setattr(m.a, "padding", (0, 0)), "a", "padding 1 / 0"),
        (lambda m: setattr(m.d, "stride", (2, 2)), "d", "stride 1 / 2"),
        (lambda m: vars(m.d).update(dilation=(2, 2), padding=(2, 2)), "d", "dilation 1 / 2"),
        (lambda m: setattr(m.e, "num_groups", 4), "e", "num_groups 2 / 4"),
        (lambda m: setattr(m, "c", nn.ReLU()), "d", "between b and d, outside of modules with tensors: GELU"),
        (lambda m: setattr(m, "c", nn.GELU("tanh")), "d", "GELU(approximate='none') / GELU(approximate='tanh')"),
        (lambda m: setattr(m, "f", nn.AdaptiveMaxPool2d(2)), "h", "AdaptiveAvgPool2d"),
    ],
)
def test_a_setting_that_differs_is_named(
    pair: tuple[Any, Any], change: Callable[[Any], object], module: str, text: str
) -> None:
    source, target = pair
    change(target)
    verification = verify(source, target, INPUTS)
    divergence = verification.first_divergence
    assert not verification.equal
    assert divergence is not None
    assert divergence.target_module == module
    assert divergence.source_module == dict(zip("abcdefgh", dict(source.named_children()), strict=True))[module]
    assert divergence.cause == "configuration"
    assert text in divergence.detail
    assert verification.max_difference > verification.tolerance


@pytest.mark.parametrize("change", [{"momentum": 0.5}, {"training": True}])
def test_settings_without_effect_in_evaluation_are_none(pair: tuple[Any, Any], change: Mapping[str, Any]) -> None:
    source, target = pair
    for name, value in change.items():
        setattr(target.b, name, value)
    assert verify(source, target, INPUTS).equal


class Functional(nn.Module):
    """A layer whose activation is a function and no module."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
        self.choice = [activation]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.choice[0](self.up(x)))
        return result


def test_an_activation_outside_of_modules_is_named() -> None:
    source, target = Functional(nn.functional.gelu), Functional(nn.functional.relu)
    target.load_state_dict(source.state_dict())
    divergence = verify(source, target, torch.randn(4, 6)).first_divergence
    assert divergence is not None
    assert (divergence.target_module, divergence.between, divergence.cause) == ("down", ("up", "down"), "configuration")
    assert "gelu / relu" in divergence.detail


ACTIVATIONS = [nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Identity]


@pytest.mark.parametrize("shift", [0.0, 20.0])
@pytest.mark.parametrize(("own", "other"), [*permutations(ACTIVATIONS, 2)])
def test_another_activation_is_named_whatever_the_values(
    own: Callable[[], nn.Module], other: Callable[[], nn.Module], shift: float
) -> None:
    """A ReLU, or none, gives on what other layers of the source give, where all is positive."""
    source = with_values(nn.Sequential(nn.Linear(3, 3), own(), nn.Linear(3, 3)), 1)
    with torch.no_grad():
        source.get_parameter("0.bias").add_(shift)
    target = nn.Sequential(OrderedDict(fc1=nn.Linear(3, 3), act=other(), fc2=nn.Linear(3, 3)))
    target.load_state_dict(dict(zip(target.state_dict(), source.state_dict().values(), strict=True)))
    verification = verify(source, target, torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) - 0.5)
    assert not verification.equal  # although large and positive values pass through both alike
    divergence = verification.first_divergence
    assert divergence is not None
    assert (divergence.target_module, divergence.between, divergence.cause) == ("fc2", ("fc1", "fc2"), "configuration")


def test_other_weights_are_told_from_another_setting(pair: tuple[Any, Any]) -> None:
    source, target = pair
    with torch.no_grad():
        target.d.weight[0] += 0.1
    target.e.eps = 0.5
    divergence = verify(source, target, INPUTS).first_divergence
    assert divergence is not None
    assert (divergence.source_module, divergence.target_module, divergence.cause) == ("conv2", "d", "weights")
    assert divergence.keys == ("d.weight",)
    assert "d.weight differs from what conv2.weight gives by" in divergence.detail


def test_tensors_that_got_nothing_are_named(pair: tuple[Any, Any]) -> None:
    source, target = pair
    target.h = nn.Linear(32, 7)
    verification = verify(source, target, INPUTS, exclude="fc")
    assert verification.max_difference == float("inf")
    divergence = verification.first_divergence
    assert divergence is not None
    assert (divergence.target_module, divergence.cause, divergence.keys) == ("h", "missing", ("h.weight", "h.bias"))
    (note,) = verification.notes
    assert note.startswith("No outputs have the same size: {'': [2, 5]} of the source, {'': [2, 7]} of the target.")


def test_outputs_that_cannot_be_compared_are_neither_equal_nor_a_divergence(pair: tuple[Any, Any]) -> None:
    source, target = pair
    verification = verify(source, nn.Sequential(target, nn.ZeroPad1d(1)), INPUTS)
    assert not verification.equal
    assert verification.first_divergence is None
    assert verification.compared == 10
    assert "Wrap one of them" in str(verification)


def test_borders_of_modules_that_are_drawn_elsewhere_are_no_divergence() -> None:
    """A norm of timm holds the activation that follows it, and torchvision's does not."""
    source = like_images(tv("regnet_y_400mf")(), 64, seed=1)
    target: Any = tm("regnety_004")()
    target.load_state_dict(autoalign.align(source, target).state_dict())
    images = torch.randn(1, 3, 64, 64)
    verification = verify(source, target, images)
    assert verification.equal
    assert verification.first_divergence is None
    target.s2.b1.conv2.bn.eps = 1.0
    divergence = verify(source, target, images).first_divergence
    assert divergence is not None
    assert divergence.target_module == "s2.b1.conv2.bn"
    assert divergence.detail == "eps 1e-05 / 1.0 (source / target)."


class Pointwise(nn.Module):
    """A layer on the pixels of an image: as a convolution, or as a linear layer on a list of them."""

    def __init__(self, *, convolution: bool) -> None:
        super().__init__()
        self.up = nn.Conv2d(4, 6, 1) if convolution else nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.down = nn.Conv2d(6, 5, 1) if convolution else nn.Linear(6, 5)
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        if not self.convolution:
            x = x.flatten(2).transpose(1, 2)
            x = self.norm(self.up(x))
        else:
            x = self.norm(self.up(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        result: Tensor = self.down(x)
        return result


def test_layouts_of_activations_are_reconciled() -> None:
    source, target = Pointwise(convolution=True), Pointwise(convolution=False)
    images = torch.randn(2, 4, 3, 5)
    assert verify(source, target, images, alignment=aligned(source, target)).equal
    target.norm.eps = 0.5
    divergence = verify(source, target, images, alignment=aligned(source, target)).first_divergence
    assert divergence is not None
    assert (divergence.target_module, divergence.cause) == ("norm", "configuration")


def aligned(source: nn.Module, target: nn.Module) -> Alignment:
    return autoalign.align(source, target, rules=[(key, key) for key in source.state_dict()])


@dataclass
class Output:
    """What some models return."""

    logits: Tensor
    hidden: tuple[Tensor, ...]


class Returning(nn.Module):
    """A model that takes and returns its tensors in a form of its own."""

    def __init__(self, layer: nn.Linear, form: str) -> None:
        super().__init__()
        self.layer, self.form = layer, form

    def forward(self, x: Tensor, *, bias: Tensor) -> Any:
        hidden = self.layer(x)
        logits = hidden + bias
        forms = {"tensor": logits, "tuple": (logits, hidden), "dict": {"logits": logits, "hidden": (hidden,)}}
        return forms.get(self.form, Output(logits, (hidden,)))


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict", "dataclass"])
@pytest.mark.parametrize("other", ["tensor", "dict"])
def test_inputs_and_outputs_may_have_any_form(form: str, other: str) -> None:
    layer, x, bias = nn.Linear(3, 4), torch.randn(2, 3), torch.randn(4)
    source, target = Returning(layer, form), Returning(layer, other)
    verification = verify(source, target, {"x": x, "bias": bias}, target_inputs=(x, {"bias": bias}))
    assert verification.equal
    assert len(verification.outputs) == (2 if "tensor" not in (form, other) else 1)
    other_bias = verify(source, target, {"x": x, "bias": bias}, target_inputs=(x, {"bias": bias + 1}))
    assert not other_bias.equal


def test_models_of_less_precision_are_compared_with_more_tolerance(pair: tuple[Any, Any]) -> None:
    source, target = pair
    verification = verify(source, target.bfloat16(), INPUTS, target_inputs=INPUTS.bfloat16())
    assert verification.equal
    assert 0 < verification.max_difference < verification.tolerance == 5e-2
    strict = verify(source, target, INPUTS, target_inputs=INPUTS.bfloat16(), tolerance=1e-6)
    assert not strict.equal
    assert strict.first_divergence is not None
    assert strict.first_divergence.cause == "precision"


def test_a_difference_that_does_not_show_is_told(pair: tuple[Any, Any]) -> None:
    source, target = pair
    target.b.num_batches_tracked += 5
    verification = verify(source, target, INPUTS)
    assert verification.equal
    assert verification.first_divergence is not None
    assert verification.first_divergence.keys == ("b.num_batches_tracked",)
    assert "does not show in the outputs" in verification.first_divergence.detail


def test_values_without_effect_are_told_from_an_alignment_that_is_wrong() -> None:
    """The bias of a key projection moves all scores of a query alike."""
    source, target = with_values(BERT(), 1), with_values(BERT(), 2)
    target.load_state_dict(source.state_dict())
    key = "encoder.layer.1.attention.self.key.bias"
    with torch.no_grad():
        target.get_parameter(key).mul_(2)
    verification = verify(source, target, TOKENS)
    assert not verification.equal  # the projection gives something else, whatever becomes of it
    assert verification.max_difference < verification.tolerance
    assert verification.first_divergence is not None
    assert verification.first_divergence.keys == (key,)
    assert str(verification).startswith("The outputs are equal, but NOT what modules compute on the way: ")
    assert verify(source, target, TOKENS, alignment=autoalign.align(source, target)).as_it_is


class Fading(nn.Module):
    """Branches whose signals fade, as those of deep networks with initial weights do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.left = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        self.right = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        result: Tensor = self.head(1e-7 * (self.left(x) + self.right(x)))
        return result


def _exchange(model: nn.Module, first: str, second: str) -> None:
    state = model.state_dict()
    model.load_state_dict(state | {first: state[second].clone(), second: state[first].clone()})


@pytest.mark.parametrize("given", [False, True])
def test_outputs_in_which_a_signal_has_faded_prove_nothing(*, given: bool) -> None:
    source, target = with_values(Fading(), 1), Fading()
    target.load_state_dict(source.state_dict())
    assert verify(source, target, ROWS).equal
    _exchange(target, "left.0.weight", "right.0.weight")
    alignment = autoalign.align(source, target) if given else None
    verification = verify(source, target, ROWS, alignment=alignment)
    assert verification.max_difference < 1e-5 < verification.tolerance
    assert not verification.equal
    assert verification.first_divergence is not None
    assert verification.first_divergence.difference > 0.1
    assert (verification.first_divergence.target_module, verification.first_divergence.cause) == ("left.0", "weights")
    assert "left.0.weight holds what right.0.weight should" in verification.first_divergence.detail


def test_an_alignment_that_exchanges_faded_branches_is_wrong() -> None:
    source, target = with_values(Fading(), 1), with_values(Fading(), 2)
    wrong = _exchanged(autoalign.align(source, target), "left.0", "right.0")
    verification = verify(source, target, ROWS, alignment=wrong)
    assert verification.max_difference < verification.tolerance
    assert not verification.equal


def test_the_initial_weights_of_a_deep_network_are_told_apart() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        source: Any = tv("inception_v3", init_weights=False)().eval()
    target: Any = tv("inception_v3", init_weights=False)().eval()
    target.load_state_dict(source.state_dict())
    _exchange(target, "Mixed_5b.branch5x5_2.conv.weight", "Mixed_5d.branch5x5_2.conv.weight")
    images = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    verification = verify(source, target, images)
    assert verification.max_difference < 1e-5
    assert not verification.equal
    assert verification.first_divergence is not None
    assert verification.first_divergence.keys == ("Mixed_5b.branch5x5_2.conv.weight",)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Mixed_5b.branch5x5_2.conv.weight", "Mixed_5d.branch5x5_2.conv.weight"),
        ("Mixed_5c.branch3x3dbl_2.bn.weight", "Mixed_5c.branch3x3dbl_3.bn.weight"),  # both are all ones
        ("Mixed_6c.branch7x7_1.bn.running_var", "Mixed_6c.branch7x7dbl_1.bn.running_var"),
    ],
)
def test_a_load_and_its_own_alignment_are_no_proof(first: str, second: str) -> None:
    """All values are those of the alignment, and the outputs are equal, since no signal reaches them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        source, target = (tv("inception_v3", init_weights=False)().eval() for _ in range(2))
    right = autoalign.align(source, target)
    fills = {match.target: (match.sources, match.operation) for match in right.matches}
    wrong = spoilt(right, {first: fills[second], second: fills[first]})
    target.load_state_dict(wrong.state_dict())
    images = torch.randn(1, 3, 75, 75, generator=torch.Generator().manual_seed(0))
    verification = verify(source, target, images, alignment=wrong, trials=0)
    assert verification.max_difference < verification.tolerance
    assert not verification.equal
    assert verification.first_divergence is not None
    assert verification.first_divergence.keys[0] in (first, second)
    assert verification.alignment.verified == Verified(False, verification.max_difference)
    if "conv" not in first:
        return
    found = verify(source, target, images, alignment=wrong)
    assert found.equal
    assert {match.target for match in found.taken} == {first, second}


@pytest.mark.parametrize("layer", ["conv1", "fc"])
def test_rows_in_another_order_are_blamed_on_the_layer_that_gives_them(layer: str, pair: tuple[Any, Any]) -> None:
    source, target = pair
    key, name = f"{layer}.weight", dict(zip(dict(source.named_children()), "abcdefgh", strict=True))[layer]
    alignment = autoalign.align(source, target)
    wrong = spoilt(alignment, {f"{name}.weight": ((key,), Flip(0))})
    autoalign.load(target, source, alignment=wrong)
    divergence = verify(source, target, INPUTS, alignment=wrong, trials=0).first_divergence
    assert divergence is not None
    assert (divergence.target_module, divergence.cause, divergence.keys) == (name, "weights", (f"{name}.weight",))


class Beside(nn.Module):
    """A head of small values beside one of large ones."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.large, self.small, self.factor = nn.Linear(6, 9), nn.Linear(6, 9), factor

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([1e3 * self.large(x), self.factor * self.small(x)], 1)


def test_a_small_channel_counts_beside_a_large_one() -> None:
    source, target = with_values(Beside(1.0), 1), Beside(1.01)
    target.load_state_dict(source.state_dict())
    rows = torch.randn(9, 6)
    verification = verify(source, target, rows)
    with torch.no_grad():
        want, got = source(rows), target(rows)
    assert float((want - got).abs().max()) < 1e-4 * float(want.abs().max())
    assert not verification.equal
    assert verification.max_difference == pytest.approx(0.01, rel=0.01)
    target.factor = 1.0
    assert verify(source, target, rows).equal


class Caching(nn.Module):
    """A module that keeps what it derived of a parameter for as long as it is in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain = nn.Linear(6, 6), nn.Parameter(torch.ones(6))
        self.cache: list[Tensor] = []

    def train(self, mode: bool = True) -> Caching:
        self.cache = []
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if not self.cache:
            self.cache = [self.gain * 2]
        result: Tensor = self.layer(x) * self.cache[0]
        return result


def test_what_a_module_keeps_of_its_tensors_is_neither_used_nor_left() -> None:
    source, target = with_values(Caching(), 1), Caching().eval()
    target(ROWS)  # keeps what was before the load
    autoalign.load(target, source)
    before = snapshot(target)
    verification = verify(source, target, ROWS)
    assert (verification.equal, verification.coverage) == (True, 1.0)
    assert_unchanged(target, before)
    assert torch.equal(target(ROWS), source(ROWS))


class Auxiliary(nn.Module):
    """A head for training beside that for use, a bias without effect, and counters."""

    def __init__(self, *, shifted: bool = False) -> None:
        super().__init__()
        self.norm, self.head, self.aux = nn.BatchNorm1d(6), nn.Linear(6, 3), nn.Sequential(nn.Linear(6, 3))
        self.shift = nn.Parameter(torch.ones(1)) if shifted else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = x if self.shift is None else (x + self.shift).softmax(-1)
        result: Tensor = self.aux(x) if self.training else self.head(x)
        return result


def test_what_the_call_does_not_use_is_not_covered() -> None:
    source, target = with_values(Auxiliary(), 1), Auxiliary()
    alignment = autoalign.load(target, source)
    assert alignment.verified is None
    verification = verify(source, target, ROWS, alignment=alignment)
    assert verification.equal
    assert (verification.coverage, verification.uncovered) == (6 / 8, ("aux.0.weight", "aux.0.bias"))
    text = "Verified: equal; 75.0 % of the tensors are covered; not covered: aux (2)."
    assert str(verification).splitlines()[1] == text
    assert verification.alignment.verified == Verified(True, 0.0, 6 / 8, verification.uncovered)
    assert f"Note: {text}" in str(verification.alignment)
    assert verification.alignment == alignment
    assert verification.alignment.inverse().verified is None
    _exchange(target, "aux.0.bias", "head.bias")
    target.head.load_state_dict(source.get_submodule("head").state_dict())
    verification = verify(source, target, ROWS, alignment=alignment)
    assert not verification.equal  # it is known to be wrong, although it does not show
    assert verification.first_divergence is not None
    assert verification.first_divergence.keys == ("aux.0.bias",)


def test_a_tensor_without_effect_is_not_covered() -> None:
    source, target = with_values(Auxiliary(shifted=True), 1), Auxiliary(shifted=True)
    autoalign.load(target, source)
    verification = verify(source, target, ROWS)
    assert verification.equal
    assert set(verification.uncovered) == {"shift", "aux.0.weight", "aux.0.bias"}
    text = str(verification)
    assert "Verified: equal; 66.6 % of the tensors are covered; not covered: aux (2), shift." in text
    assert "Note: No value of shift has any effect on what this call computes." in text


@pytest.mark.parametrize(("inputs", "factor"), [(torch.zeros(3, 6), 1.0), (torch.randn(3, 6), math.nan)])
def test_inputs_that_are_alike_and_outputs_that_are_not_finite_prove_nothing(inputs: Tensor, factor: float) -> None:
    class Scale(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * factor

    source, target = (nn.Sequential(nn.Linear(6, 6), Scale(), nn.Linear(6, 2)) for _ in range(2))
    with pytest.raises(UnequalModelsError, match=r"is not proven to compute(.|\n)*give others, such as random ones"):
        autoalign.load(target, source, verify=inputs)


class Attending(nn.Module):
    """Attention over embedded tokens, with queries, keys and values in the order of the names; one weight is idle."""

    def __init__(self, names: str) -> None:
        super().__init__()
        self.names, self.embedding, self.idle = names, nn.Embedding(9, 8), nn.Parameter(torch.randn(8))
        for name in "abc":
            self.register_parameter(name, nn.Parameter(torch.randn(8, 8)))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        given = self.embedding(tokens) * mask[..., None] + (self.idle - self.idle)
        q, k, v = (given @ self.get_parameter(name) for name in self.names)
        return (q @ k.mT).softmax(-1) @ v  # type: ignore[no-any-return]


@pytest.mark.parametrize("is_random", [False, True])
def test_tokens_are_inputs_that_may_be_alike(*, is_random: bool) -> None:
    source, target = Attending("abc"), Attending("abc" if is_random else "bac")
    target.load_state_dict(source.state_dict())
    tokens = torch.arange(10).reshape(2, 5) % 9 if is_random else torch.zeros(2, 5, dtype=torch.long)
    found = autoalign.verify(source, target, (tokens, torch.ones(2, 5)))
    assert found.equal == is_random
    assert any("inputs are all alike" in note for note in found.notes) != is_random


class Rarely(nn.Module):
    """A network that uses a tensor, which seldom shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.limit = nn.Linear(6, 6), nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(torch.minimum(x, self.limit + 50))
        return result


def test_a_tensor_whose_change_is_not_seen_leaves_equality_unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoalign.verification.session._LARGE", 100.0)
    source, target = Rarely(), Rarely()
    autoalign.load(target, source)
    verification = verify(source, target, ROWS)
    assert not verification.equal
    assert (verification.max_difference, verification.unproven) == (0.0, ("limit",))
    text = str(verification)
    assert text.startswith("The outputs are equal, but NOT proven to be: ")
    assert "A change in limit would not have been noticed." in text


class Logarithm(nn.Module):
    """A network that gives no finite outputs on values that may be negative."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x.abs()).log()
        return result


def test_models_that_fail_on_fresh_values_are_verified_by_their_own() -> None:
    source, target = Logarithm(), Logarithm()
    with torch.no_grad():
        source.layer.weight.abs_()
        source.layer.bias.abs_()
    autoalign.load(target, source)
    verification = verify(source, target, ROWS)
    assert (verification.equal, verification.coverage) == (True, 1.0)
    assert verification.notes == (
        "The source gives no finite outputs on fresh values, so that only its own were compared.",
    )


class ActiveNorm(nn.LayerNorm):
    """A norm that contains the activation that follows it, as timm has it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Pooled(nn.Module):
    """A norm, an activation inside or behind it, and a head on the mean."""

    def __init__(self, *, inside: bool) -> None:
        super().__init__()
        self.norm, self.head = ActiveNorm(6) if inside else nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = x if isinstance(self.norm, ActiveNorm) else x.relu()
        result: Tensor = self.head(x.mean(1))
        return result


@pytest.mark.parametrize("inside", [False, True])
def test_an_activation_inside_or_behind_a_layer_is_no_difference(*, inside: bool) -> None:
    source, target = with_values(Pooled(inside=inside), 1), Pooled(inside=not inside)
    target.load_state_dict(source.state_dict())
    verification = verify(source, target, torch.randn(2, 5, 6))
    assert (verification.equal, verification.first_divergence) == (True, None)
    with torch.no_grad():
        target.get_parameter("norm.weight").add_(0.1)
    assert not verify(source, target, torch.randn(2, 5, 6)).equal


def test_what_a_verification_prints(pair: tuple[Any, Any]) -> None:
    source, target = pair
    target.b.eps = 0.5
    text = re.sub(r"\d\.\de[-+]\d\d", "#", str(verify(source, target, INPUTS)))
    assert text == (
        "The outputs are NOT equal: largest relative difference #, tolerance 1e-04; 10 inputs and outputs of modules "
        "compared, the target called as it is.\n"
        "First divergence: b (source: norm1), by #: configuration. eps 1e-05 / 0.5 (source / target)."
    )


def test_inputs_that_do_not_fit_are_refused(pair: tuple[Any, Any]) -> None:
    source, target = pair
    before = [snapshot(model) for model in pair]
    with pytest.raises(InputError, match="Sequential cannot be called on the example inputs"):
        verify(source, target, torch.randn(1, 2))
    with pytest.raises(InputError, match="Sequential cannot be called on the example inputs"):
        verify(source, target, INPUTS, target_inputs=torch.randn(1, 2))
    for model, known in zip(pair, before, strict=True):
        assert_unchanged(model, known)


def test_other_things_than_models_are_refused(pair: tuple[Any, Any]) -> None:
    source, target = pair
    with pytest.raises(InputError, match=r"verify calls two nn\.Modules, not a dict"):
        verify(dict(source.state_dict()), target, INPUTS)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="checked as it is, and exclude would change it"):
        verify(source, target, INPUTS, alignment=autoalign.align(source, target), exclude="0")
    with pytest.raises(InputError, match="2 keys of its source are not in Sequential"):
        verify(
            source, target, INPUTS, alignment=autoalign.align({"x.weight": torch.ones(2), "y": torch.ones(2)}, target)
        )
    with pytest.raises(InputError, match="has tensors on the meta device"):
        verify(source, network().to("meta"), INPUTS)


DOUBTS = [
    "Meta Llama without frequencies -> transformers.Llama",
    "transformers.Llama -> torchtune Llama",
    "Mistral's Mixtral -> transformers 5 Mixtral",
    "transformers.Llama -> InternLM2",
    "gated, fused with the gate last -> gated, separate",
    "timm.VisionTransformer -> vit-pytorch, patches with channels last",
]


@pytest.mark.parametrize("name", DOUBTS)
def test_a_layout_that_nothing_shows_is_found(name: str) -> None:
    (pair,) = (pair for pair in DOUBTED_PAIRS if isinstance(pair, Pair) and pair.name == name)
    source, target = randomise(pair.source(), pair.inputs, seed=1), pair.target().eval()
    alignment = autoalign.align(source.state_dict(), target.state_dict())
    assert alignment.ambiguous
    verification = verify(source, target, pair.inputs, alignment=alignment)
    assert verification.equal
    assert verification.taken
    assert verification.alignment.ambiguous == ()
    assert verification.trials < 10
    assert verification.first_divergence is not None
    assert {match.target for match in verification.taken} <= {match.target for match in verification.alignment.matches}
    target.load_state_dict(verification.alignment.state_dict(), strict=False)
    assert verify(source, target, pair.inputs, alignment=verification.alignment).first_divergence is None


def test_a_target_that_was_loaded_in_part_is_completed() -> None:
    (pair,) = (p for p in DOUBTED_PAIRS if isinstance(p, Pair) and p.name == DOUBTS[4])
    source, target = randomise(pair.source(), pair.inputs, seed=1), pair.target().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        autoalign.load(target, source.state_dict())
    verification = verify(source, target, pair.inputs)
    assert verification.equal
    assert verification.as_it_is
    assert verification.first_divergence is not None
    assert verification.first_divergence.cause == "missing"
    assert len(verification.taken) == 4 * DEPTH  # weights and biases of two projections


def halves() -> tuple[nn.Module, nn.Module]:
    """A source and a target whose fused halves stand in another order, which nothing but a call shows."""
    return with_values(GatedEncoder("net"), 1), with_values(GatedEncoder("w12"), 2)


@pytest.mark.parametrize("form", ["module", "state dict", "meta", "prefixed"])
def test_a_load_is_proved_and_corrected(form: str) -> None:
    source, model = halves()
    checkpoint: Any = source if form == "module" else source.state_dict()
    if form == "prefixed":
        checkpoint = {f"module.{key}": tensor for key, tensor in checkpoint.items()}
    code = None if form == "module" else GatedEncoder("net").to("meta" if form == "meta" else "cpu")
    alignment = autoalign.load(model, checkpoint, verify=TOKENS, source_model=code)
    assert alignment.verified is not None
    assert (alignment.verified.equal, alignment.verified.coverage) == (True, 1.0)
    assert alignment.missing_keys == []
    with torch.no_grad():
        assert torch.allclose(model(*TOKENS), source(*TOKENS), atol=1e-5)


def test_a_load_of_a_network_without_names_is_proved_on_inputs_that_nobody_could_guess() -> None:
    source, model = twins.Anonymous(with_values(DiT(), 1)), DiffusersDiT().eval()
    loaded = autoalign.load(model, source.state_dict(), verify=NOISE, source_model=source)
    assert (loaded.coverage, loaded.verified) == (1.0, Verified(True, 0.0, 1.0))


def test_a_load_that_cannot_be_proved_is_not_carried_out() -> None:
    source, model = halves()
    before = [snapshot(model), [id(tensor) for tensor in model.parameters()]]
    first = next(module for module in model.modules() if isinstance(module, nn.LayerNorm))
    first.eps = 0.5
    text = r"would not compute what .* does(.|\n)*eps.*0\.5(.|\n)*Nothing was loaded\."
    with pytest.raises(UnequalModelsError, match=text) as error:
        autoalign.load(model, source.state_dict(), verify=TOKENS, source_model=GatedEncoder("net"), dtype="float64")
    assert error.value.verification.first_divergence.cause == "configuration"
    assert_unchanged(model, before[0])
    assert [id(tensor) for tensor in model.parameters()] == before[1]
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}


def test_a_load_with_strict_is_complete_once_it_is_proved() -> None:
    (pair,) = (p for p in DOUBTED_PAIRS if isinstance(p, Pair) and p.name == DOUBTS[4])
    source, target = randomise(pair.source(), pair.inputs, seed=1), pair.target().eval()
    with pytest.raises(autoalign.IncompatibleTensorsError, match="12 of 59 target tensors"):
        autoalign.load(target, source.state_dict(), strict=True)
    assert autoalign.load(target, source, strict=True, verify=pair.inputs).missing_keys == []
    before = snapshot(target)
    wider = nn.ModuleDict({"a": target, "b": nn.Linear(2, 2)})
    wider.forward = target.forward
    with pytest.raises(autoalign.IncompatibleTensorsError, match=r"b\.weight"):
        autoalign.load(wider, source, strict=True, verify=pair.inputs)
    assert_unchanged(target, before)


def test_a_load_can_be_proved_only_with_the_code_of_its_checkpoint(pair: tuple[Any, Any]) -> None:
    source, target = pair
    state = source.state_dict()
    with pytest.raises(InputError, match="needs the checkpoint's own code to compare with"):
        autoalign.load(target, state, verify=INPUTS)
    with pytest.raises(InputError, match="is not the code of this checkpoint: 2 tensors of Sequential are not in it"):
        autoalign.load(target, state, verify=INPUTS, source_model=nn.Sequential(network(), nn.Linear(9, 9)))
    with pytest.raises(InputError, match=r"Expected an nn\.Module to load into, not OrderedDict"):
        autoalign.load(state, source, verify=INPUTS)
    with pytest.raises(InputError, match=r"on the meta device, and verify= calls it\. Nothing was loaded"):
        autoalign.load(network().to("meta"), source, verify=INPUTS)


def spoilt(alignment: Alignment, fills: Mapping[str, tuple[tuple[str, ...], Operation]]) -> Alignment:
    changed = tuple(
        replace(match, sources=fills[match.target][0], operation=fills[match.target][1])
        if match.target in fills
        else match
        for match in alignment.matches
    )
    return replace(alignment, matches=changed)


def _exchanged(alignment: Alignment, first: str, second: str) -> Alignment:
    """Exchange two projections in all layers."""
    fills = {match.target: (match.sources, match.operation) for match in alignment.matches}
    return spoilt(
        alignment,
        {
            key.replace(own, other): fill
            for own, other in ((first, second), (second, first))
            for key, fill in fills.items()
            if own in key
        },
    )


def _transposed(alignment: Alignment, name: str) -> Alignment:
    fills = {m.target: (m.sources, chain(m.operation, Transpose())) for m in alignment.matches if name in m.target}
    return spoilt(alignment, fills)


@pytest.mark.parametrize(
    ("source", "target", "spoil", "module"),
    [
        (LLAMA, LLAMA, partial(_exchanged, first="gate_proj", second="up_proj"), "model.layers.0.mlp.gate_proj"),
        (PHI3, LLAMA, partial(_exchanged, first="gate_proj", second="up_proj"), "model.layers.0.mlp.gate_proj"),
        (LLAMA, LLAMA, partial(_transposed, name="o_proj"), "model.layers.0.self_attn.o_proj"),
        (BERT, BERT, partial(_exchanged, first="query", second="value"), "encoder.layer.0.attention.self.query"),
        (BERT, BERT, partial(_exchanged, first="key", second="value"), "encoder.layer.0.attention.self.key"),
    ],
)
def test_what_often_goes_wrong_in_all_layers_is_found(
    source: Callable[[], nn.Module],
    target: Callable[[], nn.Module],
    spoil: Callable[[Alignment], Alignment],
    module: str,
) -> None:
    own, other = with_values(source(), 1), with_values(target(), 2)
    right = autoalign.align(own, other)
    verification = verify(own, other, TOKENS, alignment=spoil(right))
    assert verification.equal
    assert verification.first_divergence is not None
    assert (verification.first_divergence.target_module, verification.first_divergence.cause) == (module, "weights")
    found, wanted = verification.alignment.state_dict(), right.state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert len(verification.taken) % DEPTH == 0
    none = verify(own, other, TOKENS, alignment=spoil(right), trials=0)
    assert (none.equal, none.trials, none.taken) == (False, 0, ())
    none = verify(own, other, TOKENS, alignment=spoil(right), seconds=0)
    assert (none.equal, none.trials) == (False, 0)


class Halves(nn.Module):
    """A gated layer whose fused rows come in halves."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.down = nn.Linear(5, 16), nn.Linear(8, 5)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.fused(x).tensor_split(2, -1)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.parts(x)
        return self.down(nn.functional.silu(gate) * up)  # type: ignore[no-any-return]


class Turns(Halves):
    """The same, with rows by turns."""

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.fused(x)[..., ::2], self.fused(x)[..., 1::2]


class TurnsGateLast(Turns):
    """The same, each gate after what it is for."""

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().parts(x)[::-1]


class TorchGates(nn.Module):
    """A recurrent layer of torch, with gates in its order: reset, update, new."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(5, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0])  # type: ignore[no-any-return]


class OtherGates(TorchGates):
    """The same, written out: update, reset, new."""

    def forward(self, x: Tensor) -> Tensor:
        state, states = x.new_zeros(len(x), 8), []
        names = "weight_ih_l0", "bias_ih_l0", "weight_hh_l0", "bias_hh_l0"
        weight, bias, also_weight, also_bias = (self.cell.get_parameter(name) for name in names)
        for step in x.unbind(1):
            given, kept = step @ weight.T + bias, state @ also_weight.T + also_bias
            (z, r, n), (also_z, also_r, also_n) = given.tensor_split(3, -1), kept.tensor_split(3, -1)
            update, new = (z + also_z).sigmoid(), (n + (r + also_r).sigmoid() * also_n).tanh()
            state = (1 - update) * new + update * state
            states.append(state)
        return self.head(torch.stack(states, 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("source", "target"),
    [(Halves, Turns), (Turns, Halves), (Halves, TurnsGateLast), (TurnsGateLast, Halves), (TorchGates, OtherGates)],
)
def test_rows_by_turns_and_gates_of_recurrent_layers_in_another_order_are_found(
    source: Callable[[], nn.Module], target: Callable[[], nn.Module]
) -> None:
    own, other = source(), target()
    inputs = torch.randn(2, 4, 5)
    alignment = autoalign.load(other, own, verify=inputs)
    assert alignment.verified is not None
    assert alignment.verified.equal
    assert torch.allclose(own(inputs), other(inputs), atol=1e-5)


def test_halves_that_are_fused_on_both_sides_in_another_order_are_found() -> None:
    source = with_values(GatedEncoder("net"), 1)
    target = with_values(GatedEncoder("w12"), 2)
    verification = verify(source, target, TOKENS)
    assert verification.equal
    assert verification.trials < 30
    assert len(verification.taken) == 2 * DEPTH  # weights and biases
    target.load_state_dict(verification.alignment.state_dict())
    again = verify(source, target, TOKENS)
    assert (again.equal, again.as_it_is, again.first_divergence) == (True, True, None)
    restored = verification.alignment.inverse().state_dict()
    assert all(torch.equal(restored[key], tensor) for key, tensor in source.state_dict().items())


@pytest.mark.parametrize(
    ("source", "target", "inputs"),
    [
        (twins.Dense("a", newest_first=False), twins.Dense("a", newest_first=True), torch.randn(2, 3, 16, 16)),
        (
            twins.Convolutional("a b c d", channels_last=True),
            twins.Convolutional("a b c d", channels_last=False),
            torch.randn(2, 3, 32, 32),
        ),
        (
            twins.Merging("a b c d", unfolds=False),
            twins.Merging("a b c d", unfolds=True),
            torch.randn(2, 3, 32, 32),
        ),
    ],
)
def test_features_that_are_given_in_another_order_are_found(
    source: nn.Module, target: nn.Module, inputs: torch.Tensor
) -> None:
    with_values(source, 1)
    alignment = autoalign.align(source, target)
    assert not verify(source, target, inputs, alignment=alignment, trials=0).equal
    verification = verify(source, target, inputs, alignment=alignment)
    assert verification.equal
    assert verification.trials < 30
    target.load_state_dict(verification.alignment.state_dict())
    assert torch.allclose(target.eval()(inputs), source.eval()(inputs), atol=1e-5)


@pytest.mark.parametrize("way", ["loaded", "given"])
@pytest.mark.parametrize(
    ("name", "trials"),
    [
        ("torchvision.resnet18 -> timm.resnet18", 2),
        ("transformers.Bert -> transformers.Bert", 6),
        ("transformers.Phi3 -> transformers.Llama", 6),
    ],
)
def test_the_module_of_a_misplaced_tensor_is_located(name: str, trials: int, way: Way) -> None:
    (subject,) = (subject for subject in SUBJECTS if subject.name == name)
    result, missed = measure(subject, trials, way)
    assert (result.located, missed) == (trials, [])


@pytest.mark.cuda
def test_models_on_different_devices_are_compared(pair: tuple[Any, Any]) -> None:
    source, target = pair
    verification = verify(source, target.cuda(), INPUTS)
    assert verification.equal
    target.b.eps = 0.5
    divergence = verify(source, target, INPUTS).first_divergence
    assert divergence is not None
    assert divergence.target_module == "b"
