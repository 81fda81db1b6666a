"""Fresh values carry the signal through any network; coverage is measured by changing tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import autoalign
from autoalign.verification.run import preserved, record
from autoalign.verification.session import Session, fresh_values, noticed

IMAGES = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def deviations(model: nn.Module, values: dict[str, Tensor] | None) -> dict[str, float]:
    """The standard deviation of what each layer gives, by its name."""
    layers = {name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.BatchNorm2d)}
    calls = record(model, IMAGES, layers, values).calls
    return {call.module: float(call.gave[0].std()) for call in calls if call.module in layers}


@pytest.mark.parametrize(
    "build",
    [
        lambda: torchvision.models.inception_v3(init_weights=False),
        lambda: torchvision.models.mobilenet_v2(),
        lambda: timm.create_model("mobileone_s0"),  # whose branches add up in each block
        lambda: timm.create_model("convnext_atto"),
    ],
)
def test_each_layer_passes_the_signal_on(build: Callable[[], Any]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with preserved(model):
        values = fresh_values(model, IMAGES, set(before))
        own, fresh = deviations(model, None), deviations(model, values)
    assert min(own.values()) < 0.02 or max(own.values()) > 1000
    assert 0.2 < min(fresh.values()) < max(fresh.values()) < 5
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


class Faded(nn.Module):
    """A layer that sees next to nothing of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(1e-9 * self.first(x))
        return result


def test_a_faded_signal_is_not_hidden_by_a_bias() -> None:
    model, x = Faded(), torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    with preserved(model):
        values = fresh_values(model, x, set(model.state_dict()))
        assert values is not None
        outputs = [record(model, inputs, (), values).outputs[""] for inputs in (x, x.flip(0))]
    assert float((outputs[0] - outputs[1]).abs().max()) > 0.5


class Tied(nn.Module):
    """Tied weights, constants, and what takes no values."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(4)
        self.temperature = nn.Parameter(torch.tensor(20.0))
        self.other = nn.Linear(4, 4)
        self.register_buffer("table", torch.full((4,), -1e4))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.norm(self.embedding(x))) / self.temperature
        return result


def test_tied_tensors_stay_tied_and_constants_as_they_are() -> None:
    model = Tied()
    keys = set(model.state_dict()) - {"other.weight", "other.bias"}
    with preserved(model):
        values = fresh_values(model, torch.arange(9), keys)
    assert values is not None
    assert values.keys() == keys - {"table", "norm.num_batches_tracked"}
    assert values["head.weight"] is values["embedding.weight"]
    assert 10 < float(values["temperature"]) < 40
    assert float(values["norm.running_var"].min()) > 0.4
    gains, offsets = values["norm.weight"], values["norm.bias"]
    assert len(set(gains.tolist())) == len(set(offsets.tolist())) == 4
    assert float(gains.min()) > 0.3


class Singular(nn.Module):
    """A network that is finite with its own values alone."""

    def __init__(self, *, raises: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(3))
        self.raises = raises

    def forward(self, x: Tensor) -> Tensor:
        if self.raises and bool((self.scale != 0).any()):
            raise ValueError("not zero")
        return x.log() * 0 if bool((self.scale == 0).all()) else x / (x - x)


@pytest.mark.parametrize("raises", [False, True])
def test_a_network_that_fails_on_fresh_values_gets_none(*, raises: bool) -> None:
    model = Singular(raises=raises)
    with preserved(model):
        assert fresh_values(model, torch.ones(3), {"scale"}) is None


ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Partial(nn.Module):
    """A network that uses some of its tensors, some of them in vain."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.gain = nn.Parameter(torch.ones(6))
        self.key_bias = nn.Parameter(torch.ones(1))  # the softmax takes it out again
        self.head, self.aux = nn.Linear(6, 3), nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("order", torch.tensor([2, 0, 1, 5, 4, 3]))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.norm(self.stem(x))[:, self.order]
        weights = (x + self.key_bias).softmax(-1)
        result: Tensor = self.head(x * weights * self.gain)
        return result


USED = {"stem.weight", "stem.bias", "gain", "head.weight", "head.bias", "order"}
USED |= {f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var")}


def measured(source: nn.Module, target: nn.Module, seconds: float = 60.0) -> tuple[set[str], set[str]]:
    alignment = autoalign.align(source, target)
    with preserved(source, target):
        session = Session(source, target, (ROWS, ROWS), alignment, None)
        fills = session.fills(session.matches.values())
        return noticed(session, session.call(session.known, fills), fills, seconds)


def test_what_is_used_in_vain_and_what_is_not_used_is_not_covered() -> None:
    source, target = Partial(), Partial()
    before = [tensor.clone() for tensor in (*source.state_dict().values(), *target.state_dict().values())]
    assert measured(source, target) == (USED, {"key_bias"})
    after = (*source.state_dict().values(), *target.state_dict().values())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_tensor_of_its_own_module_is_measured_there_and_not_with_the_whole() -> None:
    model = Partial()
    measured(Partial(), model)
    # both calls; the root again, and for each of its own, for that without effect with large changes too
    assert model.calls == 2 + 1 + len({"gain", "key_bias", "order"}) + 2


def test_what_there_is_no_time_for_is_not_covered() -> None:
    assert measured(Partial(), Partial(), seconds=0) == (set(), set())


class Uncopied:
    """An argument of a module that cannot be copied."""

    def __deepcopy__(self, memo: object) -> None:
        raise TypeError("cannot be copied")


class Once(nn.Linear):
    """A layer that takes another argument, and may refuse to be called again."""

    def __init__(self, *, refuses: bool) -> None:
        super().__init__(6, 6)
        self.refuses, self.calls = refuses, 0

    def forward(self, x: Tensor, other: object = None) -> Tensor:  # noqa: ARG002
        self.calls += 1
        if self.refuses and self.calls > 2:  # once for the outputs, and once to measure
            raise ValueError("called again")
        return super().forward(x)


class Two(nn.Module):
    """A layer of that kind, and another."""

    def __init__(self, inner: Once, other: object) -> None:
        super().__init__()
        self.inner, self.other, self.layer = inner, other, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(self.inner(x, self.other))
        return result


@pytest.mark.parametrize(("refuses", "other"), [(False, None), (True, None), (False, Uncopied())])
def test_only_the_module_that_cannot_be_called_again_is_not_covered(*, refuses: bool, other: object) -> None:
    found, _ = measured(Two(Once(refuses=False), None), Two(Once(refuses=refuses), other))
    inner = set() if refuses or other else {"inner.weight", "inner.bias"}
    assert found == {"layer.weight", "layer.bias"} | inner
