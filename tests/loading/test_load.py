from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import autoalign
from autoalign.alignment import Alignment
from autoalign.api import load
from autoalign.checkpoints.checkpoint import checkpoint_of, open_checkpoint
from autoalign.errors import (
    AlignmentError,
    CheckpointError,
    ChoiceWarning,
    IncompatibleTensorsError,
    InputError,
    NothingLoadedError,
    PartialLoadWarning,
    ValueWarning,
)
from tests.matching.test_operation_pairs import LLAMA
from tests.reference_models.llama import MetaLlama

M = TypeVar("M", bound=nn.Module)


class Block(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, 3, bias=False)
        self.bn = nn.BatchNorm2d(out)


class Network(nn.Module):
    """Tensors of different shapes under names of its own, so that there is one right alignment."""

    def __init__(self, classes: int = 7) -> None:
        super().__init__()
        self.stem = Block(3, 4)
        self.body = Block(4, 6)
        self.head = nn.Linear(6, classes)


class Renamed(nn.Module):
    """The same as ``Network`` under other names and in another nesting."""

    def __init__(self, classes: int = 7) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, classes)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.proj = nn.Linear(5, 5)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embedding.weight


def scrambled(module: M, seed: int = 0) -> M:
    """Fill a module with values of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 100)
    return module


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items() if isinstance(value, Tensor)}


def assert_same(module: nn.Module, expected: dict[str, Tensor]) -> None:
    actual = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, rtol=0, atol=0, msg=key)


def values(module: nn.Module) -> list[Tensor]:
    return list(module.state_dict().values())


@pytest.fixture
def source() -> Network:
    return scrambled(Network(), seed=1)


# What is loaded


def test_same_names(source: Network) -> None:
    model = Network()
    alignment = load(model, source.state_dict(), strict=True)
    assert_same(model, snapshot(source))
    assert repr(alignment) == "<All keys matched successfully>"


def test_other_names(source: Network) -> None:
    model = Renamed()
    missing, unexpected = load(model, source.state_dict(), strict=True)
    assert (missing, unexpected) == ([], [])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(values(model), values(source), strict=True))


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy", "module", "checkpoint", "wrapped"])
def test_every_kind_of_checkpoint(tmp_path: Path, source: Network, kind: str) -> None:
    path, state_dict = tmp_path / "model", source.state_dict()
    if kind == "safetensors":
        save_file(state_dict, path)
    elif kind in {"zip", "legacy"}:
        torch.save({"epoch": 3, "model": state_dict}, path, _use_new_zipfile_serialization=kind == "zip")
    others: dict[str, nn.Module | Mapping[str, object]] = {
        "module": source,
        "checkpoint": checkpoint_of(state_dict),
        "wrapped": {"ckpt": {"model": {f"module.{key}": value for key, value in state_dict.items()}}},
    }
    model = Network()
    load(model, others.get(kind, path), strict=True)
    assert_same(model, snapshot(source))


def test_container_is_chosen_and_can_be_named(source: Network) -> None:
    averaged = scrambled(Network(), seed=2)
    saved = {"ema": averaged.state_dict(), "model": source.state_dict()}
    model = Network()
    with pytest.warns(
        ChoiceWarning, match=r"The container 'model' \(14 tensors\) was taken.*container= to take .*'ema'"
    ):
        alignment = load(model, saved)
    assert_same(model, snapshot(source))
    assert any("The container 'model' (14 tensors) was taken" in note for note in alignment.notes)
    load(model, saved, container="ema")
    assert_same(model, snapshot(averaged))
    with pytest.raises(CheckpointError, match="No container matches 'swa'"):
        load(model, saved, container="swa")
    assert_same(model, snapshot(averaged))


def test_of_copies_that_nothing_tells_apart_none_is_loaded(source: Network) -> None:
    saved = {"G_A": source.state_dict(), "G_B": scrambled(Network(), seed=2).state_dict()}
    model = Network()
    before = snapshot(model)
    with pytest.raises(NothingLoadedError, match=r"that nothing tells apart.*container= to choose: 'G_A'.*'G_B'"):
        load(model, saved)
    assert_same(model, before)
    load(model, saved, container="G_B")
    assert_same(model, saved["G_B"])
    called = nn.ModuleDict({"G_B": Network()})
    load(called, saved)  # by its own name; its values are those of this container
    assert_same(called["G_B"], saved["G_B"])


def test_checkpoint_is_not_changed(source: Network) -> None:
    state_dict: Any = source.state_dict()
    before, metadata = dict(state_dict), str(state_dict._metadata)
    load(Renamed(), state_dict)
    assert list(state_dict) == list(before)
    assert all(state_dict[key] is before[key] for key in before)
    assert str(state_dict._metadata) == metadata
    assert_same(source, snapshot(scrambled(Network(), seed=1)))


def test_a_model_may_be_loaded_with_views_of_itself() -> None:
    model: Any = scrambled(nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)))
    first, second = snapshot(model).values()
    swapped = {"0.weight": model[1].weight, "1.weight": model[0].weight}
    load(model, swapped)
    assert_same(model, {"0.weight": second, "1.weight": first})


def test_reshaped_tensor_is_loaded() -> None:
    model = nn.Conv2d(4, 3, 1)
    linear = nn.Linear(4, 3)
    load(model, linear.state_dict(), strict=True)
    assert torch.equal(model.weight.flatten(1), linear.weight)


# In place: links, dtypes, devices


def test_parameters_keep_their_identity_and_the_optimizer_its_links(source: Network) -> None:
    model = Renamed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    load(model, source)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    model.fc.bias.grad = torch.ones_like(model.fc.bias)
    optimizer.step()
    torch.testing.assert_close(model.fc.bias, source.head.bias - 0.1)


def test_dtype_and_requires_grad_of_the_model_are_kept(source: Network) -> None:
    model = Renamed()
    model.fc.weight.requires_grad_(False)
    load(
        model,
        {key: value.bfloat16() if value.is_floating_point() else value for key, value in snapshot(source).items()},
    )
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.fc.weight, source.head.weight.bfloat16().float())
    assert not model.fc.weight.requires_grad
    assert model.fc.bias.requires_grad


def test_memory_format_of_the_model_is_kept(source: Network) -> None:
    model = Renamed().to(memory_format=torch.channels_last)
    load(model, source)
    assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.conv2.weight, source.body.conv.weight)


def test_integers_are_cast_as_torch_does() -> None:
    model = nn.Linear(2, 1)
    load(model, {"weight": torch.tensor([[3, 4]]), "bias": torch.tensor([5], dtype=torch.int8)})
    assert model.weight.tolist() == [[3.0, 4.0]]
    assert model.bias.item() == 5.0


@pytest.mark.parametrize("given", ["embedding.weight", "head.weight", "both"])
@pytest.mark.parametrize("assign", [False, True])
def test_tied_parameters_are_filled_and_stay_tied(given: str, assign: bool) -> None:
    theirs = snapshot(scrambled(Tied()))
    left_out = {"embedding.weight", "head.weight"} - ({given} if given != "both" else set(theirs))
    model = Tied()
    load(model, {key: value for key, value in theirs.items() if key not in left_out}, assign=assign)
    assert model.head.weight is model.embedding.weight
    assert_same(model, theirs)


@pytest.mark.parametrize("assign", [False, True])
def test_leaving_out_one_of_two_tied_keys_does_not_untie_them(assign: bool) -> None:
    theirs = snapshot(scrambled(Tied()))
    model = Tied()
    load(model, theirs, exclude="head", assign=assign)
    assert model.head.weight is model.embedding.weight
    assert_same(model, theirs)


# Meta models and assign


def test_assign_fills_a_meta_model(source: Network) -> None:
    with torch.device("meta"):
        model = Renamed()
    model.conv1.weight.requires_grad_(False)
    load(model, source.state_dict(), assign=True, strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(values(model), values(source), strict=True))
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert source.stem.conv.weight.requires_grad


def test_assign_keeps_the_dtype_of_the_model(source: Network) -> None:
    with torch.device("meta"):
        model = Renamed().half()
    load(model, source, assign=True)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert model.get_buffer("bn1.num_batches_tracked").dtype == torch.int64
    assert torch.equal(model.fc.weight, source.head.weight.half())


def test_assign_fills_parameters_of_integers() -> None:
    model = nn.Linear(2, 3)
    model.weight = nn.Parameter(torch.zeros(3, 2, dtype=torch.int8), requires_grad=False)
    load(model.to("meta"), {"weight": torch.full((3, 2), 5, dtype=torch.int8), "bias": torch.ones(3)}, assign=True)
    assert model.weight.dtype == torch.int8
    assert model.weight.tolist() == [[5, 5]] * 3


@pytest.mark.parametrize("kind", ["safetensors", "zip"])
def test_assigned_tensors_are_those_of_the_mapped_file(tmp_path: Path, source: Network, kind: str) -> None:
    path = tmp_path / "model"
    with torch.device("meta"):
        model = Network()
    save: Any = save_file if kind == "safetensors" else torch.save
    save(source.state_dict(), path)
    load(model, path, assign=True)
    with Path("/proc/self/maps").open() as maps:
        mapped = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(str(path))]
    ranges = [(int(start, 16), int(end, 16)) for start, end in mapped]
    for tensor in values(model):
        assert any(start <= tensor.data_ptr() < end for start, end in ranges)
    with torch.no_grad():
        model.head.weight.zero_()  # stays in memory
    assert torch.equal(open_checkpoint(path)["head.weight"], source.head.weight)
    path.unlink()  # as a file is that another one takes the place of
    model.head.weight.data.copy_(source.head.weight)
    assert_same(model, snapshot(source))


def test_meta_model_without_assign_is_refused(source: Network) -> None:
    with torch.device("meta"):
        model = Renamed()
    with pytest.raises(InputError, match=r"14 tensors of the model are on the meta device.*Pass assign=True"):
        load(model, source)
    assert all(tensor.is_meta for tensor in values(model))


@pytest.mark.parametrize("assign", [False, True])
def test_meta_checkpoint_is_refused(assign: bool) -> None:
    with torch.device("meta"):
        source = Network()
    model = scrambled(Renamed())
    before = snapshot(model)
    with pytest.raises(InputError, match=r"of the checkpoint is on the meta device and has no values"):
        load(model, source, assign=assign)
    assert_same(model, before)


def test_partly_filled_meta_model_is_warned_about() -> None:
    with torch.device("meta"):
        model = Network(classes=3)
    with pytest.warns(PartialLoadWarning, match=r"2 stay on meta, without values: head.weight, head.bias"):
        load(model, Network(), assign=True)
    assert [key for key, tensor in model.state_dict().items() if tensor.is_meta] == ["head.weight", "head.bias"]


# What is not loaded


def test_partial_load_warns_once_and_names_what_is_left(source: Network) -> None:
    model = scrambled(Renamed(classes=3))
    before = snapshot(model)
    with pytest.warns(
        PartialLoadWarning, match=r"Loading 12 of 14 tensors \(9\d\.\d %.*2 keep.*fc.weight, fc.bias"
    ) as caught:
        alignment = load(model, source)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert alignment.missing_keys == ["fc.weight", "fc.bias"]
    assert alignment.unexpected_keys == ["head.weight", "head.bias"]
    assert torch.equal(model.fc.weight, before["fc.weight"])
    assert torch.equal(model.conv1.weight, source.stem.conv.weight)


def test_what_the_caller_left_out_is_not_warned_about(source: Network) -> None:
    model = scrambled(Network())
    before = snapshot(model)
    missing, unexpected = load(model, source, exclude="head")
    assert missing == unexpected == ["head.weight", "head.bias"]
    assert torch.equal(model.head.weight, before["head.weight"])


def test_strict_refuses_before_anything_is_changed(source: Network) -> None:
    model = scrambled(Renamed(classes=3))
    before = snapshot(model)
    with pytest.raises(IncompatibleTensorsError, match=r"(?s)fc\.weight.*was not changed.\nPass strict=False") as info:
        load(model, source, strict=True)
    assert isinstance(info.value.alignment, Alignment)
    assert_same(model, before)


def test_warning_turned_into_an_error_leaves_the_model_as_it_was(source: Network) -> None:
    model = scrambled(Renamed(classes=3))
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PartialLoadWarning, match="Loading 12 of 14 tensors"):
            load(model, source)
    assert_same(model, before)


def test_nothing_to_load_says_why() -> None:
    model = scrambled(nn.Sequential(nn.Linear(3, 5)))
    before = snapshot(model)
    with pytest.raises(
        NothingLoadedError, match=r"(?s)No tensor of <Checkpoint: 1 tensors.*2 tensors of Sequential"
    ) as info:
        load(model, {"unrelated.filter": torch.zeros(64, 3, 7, 7)})
    assert "2 of the model's tensors have a size that no tensor of the checkpoint has" in info.value.details
    assert "model was not changed" in str(info.value)
    assert_same(model, before)


def test_nothing_to_load_names_mismatched_shapes() -> None:
    with pytest.raises(NothingLoadedError, match=r"weight \[5, 3\]  nearest: weight \[5, 4\]"):
        load(nn.Linear(3, 5, bias=False), {"weight": torch.zeros(5, 4)})


def test_the_warning_names_ambiguous_layouts() -> None:
    text = r"6 keep .*\(6 ambiguous\)\. Ambiguous: right shape, but rotary layouts differ .*\n.*alignment\.choices"
    with pytest.warns(PartialLoadWarning, match=text):
        load(LLAMA(), MetaLlama().state_dict())


def test_the_warning_counts_all_that_keeps_its_values_by_reason() -> None:
    def block() -> nn.Module:
        return nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)})

    def network(classes: int) -> nn.ModuleDict:
        blocks = nn.ModuleList(block() for _ in range(12))
        return nn.ModuleDict({"stem": nn.Linear(3, 8), "blocks": blocks, "fc": nn.Linear(8, classes)})

    source = network(5).state_dict()
    text = r"50 keep their values: fc.weight, fc.bias \(2 of another shape, 48 excluded\)"
    with pytest.warns(PartialLoadWarning, match=text):
        load(network(7), source, exclude="re:fc[12]")
    with pytest.warns(
        PartialLoadWarning, match=r"Of the checkpoint, 2 are not used\.\nalignment.explain\('fc.weight'\) says"
    ):
        load(network(7), source)
    text = r"4 keep their values: stem.weight, stem.bias \(2 without a source, 2 excluded\)"
    with pytest.warns(PartialLoadWarning, match=text):
        load(network(5), {key: source[key] for key in source if "stem" not in key}, exclude="fc")


def test_nothing_to_load_because_all_is_excluded() -> None:
    with pytest.raises(NothingLoadedError, match=r"2 keys were left out by include and exclude"):
        load(nn.Linear(3, 5), nn.Linear(3, 5).state_dict(), exclude=("weight", "bias"))


@pytest.mark.parametrize("model", [None, {"weight": torch.zeros(1)}, "model.pt"])
def test_model_must_be_a_module(model: object) -> None:
    with pytest.raises(InputError, match=r"Expected an nn.Module to load into, not \w+. Nothing was loaded"):
        load(model, {"weight": torch.zeros(1)})  # type: ignore[arg-type]


def test_unknown_option_is_refused(source: Network) -> None:
    with pytest.raises(TypeError, match=r"'strcit'. Did you mean 'strict'\? Nothing was loaded"):
        load(Network(), source, strcit=True)  # type: ignore[call-arg]


# Log and progress


def test_one_line_is_logged(source: Network, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="autoalign"):
        load(Renamed(), source)
    (record,) = [record for record in caplog.records if record.name == "autoalign.loading.load"]
    assert record.levelno == logging.INFO
    assert record.getMessage().startswith(
        "Loaded 14 of 14 tensors (100.0 % of the elements) of Renamed from <Checkpoint"
    )
    assert record.getMessage().endswith("0 keys missing, 0 unexpected.")


def test_progress_counts_the_tensors(source: Network) -> None:
    steps: list[tuple[int, int]] = []
    load(Renamed(), source, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(done, 14) for done in range(1, 15)]


@pytest.mark.parametrize("progress", [None, True, False])
def test_progress_may_be_a_switch(source: Network, progress: bool | None) -> None:
    load(Renamed(), source, progress=progress)


# What torch's own loading does beside copying


class Versioned(nn.Linear):
    """Version 2 stores a scale in the weight that version 1 did not."""

    _version = 2
    seen: object

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):  # type: ignore[no-untyped-def]
        self.seen = local_metadata.get("version")
        if self.seen == 1:
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"] * 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def versioned_state_dict(version: int) -> Any:
    state_dict: Any = nn.Sequential(Versioned(3, 2)).state_dict()
    state_dict._metadata["0"]["version"] = version
    return state_dict


@pytest.mark.parametrize("prefix", ["", "module."])
def test_module_upgrades_an_older_version_of_itself(prefix: str) -> None:
    old = versioned_state_dict(1)
    state_dict: Any = OrderedDict((prefix + key, value) for key, value in old.items())
    state_dict._metadata = {prefix + path: entry for path, entry in old._metadata.items()}
    model: Any = nn.Sequential(Versioned(3, 2))
    load(model, state_dict)
    assert torch.equal(model[0].weight, old["0.weight"] * 2)


def test_tensors_brought_into_the_present_layout_are_not_upgraded_again() -> None:
    renamed = {"0.kernel": torch.ones(2, 3), "0.offset": torch.ones(2)}
    model: Any = nn.Sequential(Versioned(3, 2))
    load(model, renamed, rules={"0.kernel": "0.weight", "0.offset": "0.bias"})
    assert model[0].seen == 2
    assert torch.equal(model[0].weight, torch.ones(2, 3))


def test_state_dict_without_versions_is_of_the_models_own() -> None:
    model: Any = nn.Sequential(Versioned(3, 2))
    load(model, dict(versioned_state_dict(1)))
    assert model[0].seen == 2


@pytest.mark.parametrize("with_versions", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_counters_that_old_checkpoints_lack_are_not_missing(source: Network, with_versions: bool, assign: bool) -> None:
    full: Any = source.state_dict()
    old: Any = OrderedDict((key, value) for key, value in full.items() if "num_batches" not in key)
    if with_versions:
        old._metadata = {path: {"version": 1} for path in full._metadata}
    with torch.device("meta" if assign else "cpu"):
        model = Network()
    if not assign:
        model.get_buffer("stem.bn.num_batches_tracked").fill_(5)
    alignment = load(model, old, strict=True, assign=assign)
    assert alignment.missing_keys == []
    assert any("2 num_batches_tracked keep" in note for note in alignment.notes)
    assert model.get_buffer("stem.bn.num_batches_tracked").item() == (0 if assign else 5)
    # as torch says
    assert Network().load_state_dict(old, strict=False).missing_keys == []


def test_counter_that_a_present_checkpoint_lacks_is_missing(source: Network) -> None:
    state_dict = source.state_dict()  # which says that its BatchNorm is of version 2
    del state_dict["stem.bn.num_batches_tracked"]
    with pytest.warns(PartialLoadWarning, match="1 keep their values: stem.bn.num_batches_tracked"):
        missing, _ = load(Network(), state_dict)
    assert missing == Network().load_state_dict(state_dict, strict=False).missing_keys


class Stateful(nn.Linear):
    """Carries an extra state."""

    def __init__(self, width: int, out: int, note: str = "") -> None:
        super().__init__(width, out)
        self.note = note

    def get_extra_state(self) -> dict[str, str]:
        return {"note": self.note}

    def set_extra_state(self, state: dict[str, str]) -> None:
        if state["note"] == "broken":
            raise ValueError("broken extra state")
        self.note = state["note"]


def test_extra_state_follows_its_module() -> None:
    source = nn.ModuleDict({"first": nn.Linear(2, 3), "second": Stateful(3, 4, "kept")})
    model: Any = nn.ModuleDict({"a": nn.Linear(2, 3), "b": Stateful(3, 4)})
    load(model, source.state_dict())
    assert model["b"].note == "kept"


def test_extra_state_of_a_module_without_tensors() -> None:
    class Mode(nn.Module):
        note = ""

        def get_extra_state(self) -> str:
            return self.note

        def set_extra_state(self, state: str) -> None:
            self.note = state

    mine, theirs = Mode(), Mode()
    theirs.note = "kept"
    source = nn.Sequential(nn.Linear(2, 3), theirs).state_dict()
    load(nn.Sequential(nn.Linear(2, 3), mine), {f"module.{key}": value for key, value in source.items()})
    assert mine.note == "kept"


def test_load_hooks_run_with_the_models_keys(source: Network) -> None:
    model: Any = Renamed()
    seen: list[str] = []

    def before(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
        assert module is model.fc
        seen.extend(key for key in state_dict if key.startswith(prefix))

    model.fc.register_load_state_dict_pre_hook(before)
    model.register_load_state_dict_post_hook(lambda module, _: seen.append(type(module).__name__))
    load(model, source)
    assert seen == ["fc.weight", "fc.bias", "Renamed"]


# All or nothing


def fail(*_: object) -> None:
    raise ValueError("from a hook")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt("from a hook")


def replace_data(module: Any, *_: object) -> None:
    module.fc.weight.data = torch.zeros(1)
    module.bn2 = nn.BatchNorm2d(1)
    module.extra = nn.Parameter(torch.zeros(1))
    raise ValueError("from a hook")


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("hook", "error"), [(fail, ValueError), (interrupt, KeyboardInterrupt), (replace_data, ValueError)]
)
@pytest.mark.parametrize("when", ["before the last module", "at the end"])
def test_failing_hook_leaves_the_model_as_it_was(
    source: Network, hook: Callable[..., None], error: type[BaseException], when: str, assign: bool
) -> None:
    model: Any = scrambled(Renamed())
    parameters = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    before = snapshot(model)
    if when == "at the end":
        model.register_load_state_dict_post_hook(hook)
    else:
        model.fc.register_load_state_dict_pre_hook(lambda *_: hook(model))
    with pytest.raises(error, match="from a hook"):
        load(model, source, assign=assign)
    assert_same(model, before)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == parameters


def test_failing_extra_state_leaves_the_model_as_it_was() -> None:
    model: Any = nn.Sequential(Stateful(2, 3, "first"), Stateful(3, 4, "second"))
    source = nn.Sequential(Stateful(2, 3, "new"), Stateful(3, 4, "broken"))
    before = snapshot(model)
    with pytest.raises(ValueError, match="broken extra state"):
        load(model, source)
    assert_same(model, before)
    assert [layer.note for layer in model] == ["first", "second"]


class Picky(nn.Linear):
    """Reports an error for its tensors, as torch does for sizes."""

    def _load_from_state_dict(self, *args):  # type: ignore[no-untyped-def]
        args[-1].append("size mismatch for a reason of its own")


def test_error_that_a_module_reports_leaves_the_model_as_it_was() -> None:
    model = scrambled(nn.Sequential(nn.Linear(2, 3), Picky(3, 4)))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="size mismatch for a reason of its own"):
        load(model, nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)))
    assert_same(model, before)


def test_tensor_that_cannot_be_copied_into_leaves_the_model_as_it_was() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    model[1].register_buffer("expanded", torch.ones(1).expand(9))
    scrambled(model[0])
    before = snapshot(model)
    state_dict = {**{key: torch.zeros_like(value) for key, value in before.items()}}
    with pytest.raises(RuntimeError, match=r"(?s)Error\(s\) in loading state_dict.*1.expanded"):
        load(model, state_dict)
    assert_same(model, before)


def test_failing_read_leaves_the_model_as_it_was(source: Network) -> None:
    class Broken(dict[str, Tensor]):
        reads = 0

        def __getitem__(self, key: str) -> Tensor:
            self.reads += 1
            if self.reads == 9:
                raise OSError("the disk is gone")
            return super().__getitem__(key)

    model = scrambled(Renamed())
    before = snapshot(model)
    with pytest.raises(OSError, match="the disk is gone"):
        load(model, Broken(source.state_dict()))
    assert_same(model, before)


def test_failing_progress_leaves_the_model_as_it_was(source: Network) -> None:
    def progress(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt("enough")

    model = scrambled(Renamed())
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt, match="enough"):
        load(model, source, progress=progress)
    assert_same(model, before)


def test_values_that_cannot_be_looked_at_are_loaded_and_named(source: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails while others are copied may not fail the load, since those are in the model already."""

    def exhausted(_tensor: Tensor) -> int:
        raise MemoryError

    model = scrambled(Renamed())
    monkeypatch.setattr("autoalign.loading.values.nan_count", exhausted)
    with pytest.warns(ValueWarning, match=r"14 tensors could not be checked for NaN: \w+"):
        alignment = load(model, source.state_dict())
    assert any("could not be checked" in note for note in alignment.notes)
    assert torch.equal(model.fc.weight, source.head.weight)


def test_tensor_of_another_shape_than_announced_leaves_the_model_as_it_was() -> None:
    state_dict = {"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}
    checkpoint = checkpoint_of(state_dict)
    state_dict["bias"] = torch.zeros(5)
    model = scrambled(nn.Linear(2, 1))
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"size mismatch for bias: bias was read with shape \[5\] where \[1\]"):
        load(model, checkpoint)
    assert_same(model, before)


class Renaming(nn.Linear):
    """Gives keys in its state dict that it does not take back."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out)
        hooks: Any = self
        hooks.register_state_dict_post_hook(self.rename)

    @staticmethod
    def rename(_module: nn.Module, state_dict: dict[str, Tensor], prefix: str, _: object) -> None:
        state_dict[prefix + "kernel"] = state_dict.pop(prefix + "weight")


def test_keys_that_a_model_does_not_take_back_are_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 3), Renaming(3, 4))
    before = snapshot(model)
    with pytest.raises(AlignmentError, match=r"does not take 1 of the keys that its own state_dict gives: 1.kernel"):
        load(model, nn.Sequential(nn.Linear(2, 3), Renaming(3, 4)))
    assert_same(model, before)


def test_only_a_model_with_hooks_is_copied(source: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[str] = []

    def counted(name: str) -> Callable[..., Tensor]:
        method = getattr(Tensor, name)

        def call(*args: object, **options: object) -> Tensor:
            copies.append(name)
            return method(*args, **options)  # type: ignore[no-any-return]

        return call

    model: Any = Renamed()
    state_dict = source.state_dict()
    for name in ("to", "clone"):
        monkeypatch.setattr(Tensor, name, counted(name))
    load(model, state_dict)
    assert copies == []
    model.register_load_state_dict_post_hook(lambda *_: None)
    load(model, state_dict)
    assert copies == ["to"] * 14


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """Send this process an interrupt, with Python's usual handler in place."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, handler)


def test_interrupt_between_two_copies_waits_until_all_are_done(
    source: Network, ctrl_c: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Tensor.copy_
    copied: list[int] = []

    def interrupted_copy(self: Tensor, other: Tensor) -> Tensor:
        copied.append(self.numel())
        if len(copied) == 5:
            ctrl_c()
        return copy(self, other)

    model = Renamed()
    monkeypatch.setattr(Tensor, "copy_", interrupted_copy)
    with pytest.raises(KeyboardInterrupt):
        load(model, source)
    assert len(copied) == 14
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(values(model), values(source), strict=True))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_load_in_another_thread(source: Network) -> None:
    model = Renamed()
    thread = threading.Thread(target=load, args=(model, source))
    thread.start()
    thread.join()
    assert torch.equal(model.fc.weight, source.head.weight)


def test_a_module_that_keeps_its_dtype_is_not_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    """Values are checked against the dtype that the model has, not the one that was asked for."""

    class Keeping(nn.Linear):
        def _apply(self, fn: object, recurse: bool = True) -> Keeping:  # noqa: ARG002
            return self

    model = Keeping(2, 1, bias=False)
    model.register_load_state_dict_pre_hook(lambda *_: None)  # type: ignore[no-untyped-call]
    autoalign.load(model, {"weight": torch.full((1, 2), 1e6)}, dtype="float16")
    assert model.weight.tolist() == [[1e6, 1e6]]
    assert not recwarn.list


def test_inputs_beside_an_alignment_are_refused_by_their_name() -> None:
    model = nn.Linear(2, 1)
    alignment = autoalign.align(model, model)
    with pytest.raises(InputError, match="example_inputs would change it"):
        autoalign.load(model, model, alignment=alignment, example_inputs=torch.ones(1, 2))
