"""Weights that a parametrisation computes fill plain ones, with the values that torch's own code gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import autoalign
from autoalign.errors import InputError
from autoalign.plan.parametrised import Combine, parametrised
from autoalign.plan.serialization import from_plain, to_plain
from autoalign.plan.specs import specs_of

old: Any = nn.utils
made: Any = parametrizations.weight_norm


def masked(layer: nn.Module) -> nn.Module:
    pruned: nn.Module = prune.random_unstructured(layer, "weight", 0.5)  # type: ignore[no-untyped-call]
    return pruned


Wrap = Callable[..., nn.Module]
WRAPS: dict[str, tuple[Wrap, str]] = {
    "weight norm": (parametrizations.weight_norm, "weight norm"),
    "weight norm of torch 1": (old.weight_norm, "weight norm"),
    "weight norm of the whole": (partial(made, dim=None), "weight norm"),
    "weight norm of columns": (partial(made, dim=1), "weight norm"),
    "spectral norm": (parametrizations.spectral_norm, "spectral norm"),
    "spectral norm of torch 1": (old.spectral_norm, "spectral norm"),
    "mask": (masked, "mask"),
}
every_wrap = pytest.mark.parametrize("name", WRAPS)


class Network(nn.Module):
    def __init__(self, wrap: Wrap) -> None:
        super().__init__()
        self.first = wrap(nn.Conv1d(6, 8, 3))
        self.blocks = nn.ModuleList(wrap(nn.Conv1d(8, 8, 5)) for _ in range(2))
        self.up = wrap(nn.ConvTranspose1d(8, 8, 4))
        self.head = wrap(nn.Linear(8, 5))
        self.norm = nn.BatchNorm1d(8)


def trained(wrap: Wrap) -> Network:
    torch.manual_seed(0)
    network = Network(wrap)
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    layers = (network.first, *network.blocks, network.up, network.head)
    for _ in range(20):  # which the vectors of spectral norm are found by
        for layer in layers:
            layer(torch.randn(2, 8 if layer is not network.first else 6, *[9] * (layer is not network.head)))
    return network.eval()


def plain(layer: nn.Module) -> nn.Module:
    return layer


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@every_wrap
def test_a_plain_model_gets_the_weights_that_torch_computes(name: str, tmp_path: Path) -> None:
    wrap, scheme = WRAPS[name]
    source, model = trained(wrap), Network(plain)
    alignment = autoalign.load(model, source.state_dict(), strict=True)
    for path in ("first", "blocks.0", "blocks.1", "up", "head"):
        layer: Any = source.get_submodule(path)
        own: Any = model.get_submodule(path)
        torch.testing.assert_close(own.weight, layer.weight, rtol=1e-6, atol=1e-6)
        assert torch.equal(own.bias, layer.bias)
    assert f"Combined: 5 weights, from what {scheme} computes them of." in alignment.notes
    assert f"combine({scheme})" in str(alignment)
    rules = alignment.rules()
    written: dict[str, object] = {}
    exec(rules.to_python("convert"), written)
    assert callable(written["convert"])
    for values in (rules.apply(source.state_dict()), written["convert"](source.state_dict())):
        assert torch.equal(values["head.weight"], model.state_dict()["head.weight"])
    alignment.save(tmp_path / "a.json")
    again = autoalign.Alignment.read(tmp_path / "a.json").applied_to(source.state_dict(), model)
    assert again == alignment


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@every_wrap
def test_a_model_with_the_same_parametrisation_gets_its_tensors(name: str) -> None:
    wrap, _ = WRAPS[name]
    source = trained(wrap).state_dict()
    alignment = autoalign.align({f"net.{key}": tensor for key, tensor in source.items()}, Network(wrap))
    assert alignment.mapping == {f"net.{key}": key for key in source}
    assert not alignment.notes


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@every_wrap
def test_a_plain_weight_does_not_fill_a_part_of_one_that_is_computed(name: str) -> None:
    wrap, _ = WRAPS[name]
    network = Network(wrap)
    alignment = autoalign.align(trained(plain).state_dict(), network)
    parts = {spec.key for weight in parametrised(specs_of(network.state_dict())) for spec in weight.specs}
    assert parts
    assert parts.isdisjoint(match.target for match in alignment.matches)
    assert {match.target for match in alignment.matches} >= {"head.bias", "norm.running_var"}


def test_a_rule_that_names_a_part_takes_that_alone() -> None:
    source = {"a.weight_g": torch.ones(3, 1), "a.weight_v": torch.rand(3, 2)}
    target = {"fc.weight": torch.empty(3, 2)}
    (match,) = autoalign.align(source, target, rules=[("a.weight_v", "fc.weight")]).matches
    assert match.sources == ("a.weight_v",)


def test_what_only_sounds_like_a_parametrisation_is_left_alone() -> None:
    shapes = {
        "image_v": (3, 2),
        "image_g": (4, 1),
        "weight_v": (3, 2),
        "head.original": (3, 2),
        "fc.weight_orig": (3, 2),
        "fc.weight_mask": (2, 2),
        "a.weight_v": (3, 2),
        "a.weight_g": (3, 1),
        "a.weight": (3, 2),
        "b.parametrizations.weight.original1": (3, 2),
    }
    assert not parametrised(specs_of({key: torch.empty(shape) for key, shape in shapes.items()}))


def test_operations_are_checked() -> None:
    operation = Combine("weight norm")
    assert from_plain(to_plain(operation)) == operation
    with pytest.raises(InputError, match="is not a known parametrisation"):
        from_plain({"kind": "Combine", "scheme": "weights"})
    with pytest.raises(InputError, match=r"does not fit tensors of shapes \[3, 2\], \[2, 1\]"):
        operation.apply([torch.ones(3, 2), torch.ones(2, 1)])


class Average(nn.Module):
    """Named as LitEma does: each parameter is a buffer whose name has no dots."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.register_buffer("decay", torch.tensor(0.99))
        self.register_buffer("num_updates", torch.tensor(3))
        for name, parameter in model.named_parameters():
            self.register_buffer(name.replace(".", ""), parameter.detach() + 1)


class Blocks(nn.Module):
    """Eleven blocks, so that numbers run into each other without dots."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        stem, first, norm = names
        blocks = [nn.ModuleDict({first: nn.Linear(4, 4), norm: nn.LayerNorm(4)}) for _ in range(11)]
        self.add_module(stem, nn.ModuleList(blocks))


def with_average() -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"diffusion_model": Blocks("h", "fc", "ln")})
    return nn.ModuleDict({"model": model, "model_ema": Average(model), "vae": nn.Linear(5, 5)})


@pytest.mark.parametrize("exclude", ["model", "model.diffusion_model"])
@pytest.mark.parametrize("names", [("h", "fc", "ln"), ("layers", "linear", "norm")], ids=["same", "other names"])
def test_averages_whose_names_have_no_dots(exclude: str, names: tuple[str, str, str]) -> None:
    source, model = with_average(), Blocks(*names)
    alignment = autoalign.load(model, source.state_dict(), exclude=exclude)
    wanted = [parameter + 1 for parameter in source.get_submodule("model").parameters()]
    assert all(torch.equal(own, want) for own, want in zip(model.parameters(), wanted, strict=True))
    note = "44 names without dots were read with them: model_ema.diffusion_modelh0fcweight as model_ema.0.fc.weight."
    assert note in alignment.notes
    assert alignment.matches[0].sources == ("model_ema.diffusion_modelh0fcweight",)
    values = alignment.rules().apply(source.state_dict())
    assert torch.equal(values[f"{names[0]}.10.{names[1]}.weight"], wanted[40])


def test_trained_weights_come_before_averages_of_them() -> None:
    source, model = with_average(), Blocks("layers", "linear", "norm")
    with pytest.warns(autoalign.ChoiceWarning, match=r"'model\.diffusion_model\.h' was taken, not 'model_ema'"):
        alignment = autoalign.load(model, source.state_dict())
    assert alignment.mapping["model.diffusion_model.h.10.ln.bias"] == "layers.10.norm.bias"


def test_names_without_dots_are_recovered_from_the_other_side() -> None:
    average, model = with_average().get_submodule("model_ema"), Blocks("h", "fc", "ln")
    for prefix in ("", "model_ema."):
        saved = {f"{prefix}{key}": tensor for key, tensor in average.state_dict().items()}
        alignment = autoalign.align(saved, model)
        assert not alignment.missing_keys
        assert alignment.mapping[f"{prefix}diffusion_modelh10lnbias"] == "h.10.ln.bias"
    same = autoalign.align(average.state_dict(), average)
    assert not any(same)
    assert not same.notes
