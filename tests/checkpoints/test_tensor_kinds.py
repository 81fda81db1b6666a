"""Tensors of every dtype and kind: round trips through files, casts, and what is left out with a reason."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autoalign.api import convert, load
from autoalign.checkpoints.checkpoint import checkpoint_of, open_checkpoint
from autoalign.errors import IncompatibleTensorsError, InputError, PartialLoadWarning, ValueWarning
from autoalign.loading.transaction import transaction

DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.complex64),
)

UNREADABLE = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64)  # in legacy files


class Holder(nn.Module):
    """Tensors of any kind under the names of a small network."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def values(dtype: torch.dtype) -> dict[str, Tensor]:
    numbers = torch.tensor([[1, 0, 2], [3, 1, 0]]).to(dtype)
    return {"table": numbers, "scale": torch.tensor(1).to(dtype), "nothing": torch.empty(0, 3).to(dtype)}


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_equal(model: nn.Module, expected: nn.Module) -> None:
    for key, tensor in expected.state_dict().items():
        found = model.state_dict()[key]
        assert (found.dtype, found.shape, bits(found)) == (tensor.dtype, tensor.shape, bits(tensor)), key


SAVERS: dict[str, Callable[[dict[str, Tensor], Path], object]] = {
    "safetensors": lambda state_dict, path: save_file(state_dict, path),
    "torch": lambda state_dict, path: torch.save(state_dict, path),
    "legacy": lambda state_dict, path: torch.save(state_dict, path, _use_new_zipfile_serialization=False),
    "distributed": lambda state_dict, path: _distributed(state_dict, path),
    "memory": lambda _state_dict, _path: None,
}


def _distributed(state_dict: dict[str, Tensor], path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    save(state_dict, checkpoint_id=path, no_dist=True)


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, saver: str) -> None:
    if saver == "legacy" and (dtype in UNREADABLE):
        pytest.skip("torch does not read them back")
    source = Holder(values(dtype))
    model = Holder({key: torch.zeros_like(tensor) for key, tensor in values(dtype).items()})
    renamed = {f"module.{key}": tensor for key, tensor in source.state_dict().items()}
    SAVERS[saver](renamed, tmp_path / "saved")
    checkpoint: Any = renamed if saver == "memory" else tmp_path / "saved"
    assert load(model, checkpoint, strict=True).coverage == 1
    assert_equal(model, source)
    with torch.device("meta"):
        empty = Holder({key: torch.zeros(t.shape, dtype=t.dtype) for key, t in values(dtype).items()})
    load(empty, checkpoint, strict=True, assign=True)
    assert_equal(empty, source)


def test_tensors_of_any_layout_in_memory() -> None:
    base = torch.arange(24.0)
    source: dict[str, Tensor] = {
        "transposed": base[:6].reshape(3, 2).t(),
        "expanded": torch.tensor([[7.0]]).expand(2, 3),
        "strided": base[::4],
        "shared": base[2:6],
        "overlapping": base[4:8],
        "parameter": nn.Parameter(torch.ones(5), requires_grad=True),
        "channels_last": torch.rand(1, 2, 3, 4).to(memory_format=torch.channels_last),
    }
    model = Holder({key: torch.zeros(tensor.shape) for key, tensor in source.items()})
    pointers = {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
    with pytest.warns(PartialLoadWarning, match=r"2 keep their values: layer.weight, layer.bias"):
        load(model, source)
    for key, tensor in source.items():
        assert torch.equal(model.get_buffer(key), tensor.detach())
    assert {key: tensor.data_ptr() for key, tensor in model.state_dict().items()} == pointers
    assert not any(tensor.requires_grad for tensor in model.buffers())


def test_parameters_keep_whether_they_require_gradients() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    load(model, nn.Linear(2, 2).requires_grad_(False))
    assert (model.weight.requires_grad, model.bias.requires_grad) == (True, False)
    load(model, nn.Linear(2, 2).requires_grad_(False), assign=True)
    assert (model.weight.requires_grad, model.bias.requires_grad) == (True, False)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("layouts", [("sparse", "dense"), ("dense", "sparse"), ("sparse", "sparse")])
def test_sparse_tensors(layouts: tuple[str, str], assign: bool) -> None:
    dense = torch.tensor([[0.0, 2.0], [0.0, 3.0], [1.0, 0.0]])
    source, target = (
        Holder({"table": tensor.to_sparse() if layout == "sparse" else tensor.clone()})
        for layout, tensor in zip(layouts, (dense, torch.zeros(3, 2)), strict=True)
    )
    load(target, source, assign=assign, strict=True)
    found = target.get_buffer("table")
    assert found.is_sparse is (layouts[1] == "sparse")
    assert torch.equal(found.to_dense(), dense)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")
def test_sparse_tensors_of_a_file(tmp_path: Path) -> None:
    dense = torch.tensor([[0.0, 2.0], [0.0, 3.0], [1.0, 0.0]])
    source = Holder({"table": dense.to_sparse()})
    torch.save({f"net.{key}": tensor for key, tensor in source.state_dict().items()}, tmp_path / "a.pt")
    target = Holder({"table": torch.zeros(3, 2)})
    load(target, tmp_path / "a.pt", strict=True)
    assert torch.equal(target.get_buffer("table"), dense)


# Casts


@pytest.mark.parametrize(
    ("source", "target", "loss"),
    [
        (torch.float32, torch.float8_e4m3fn, "float32 to float8_e4m3fn: values are rounded to 8 bits"),
        (torch.float32, torch.int64, "float32 to int64: fractions are cut off"),
        (torch.float32, torch.bool, "float32 to bool: all but zero becomes True"),
        (torch.int64, torch.uint8, "int64 to uint8: values from 0 to 300 do not fit"),
    ],
)
@pytest.mark.parametrize("saved", [False, True])
def test_a_lossy_cast_is_reported_everywhere(
    tmp_path: Path, source: torch.dtype, target: torch.dtype, loss: str, saved: bool
) -> None:
    given = Holder({"table": torch.tensor([[0, 300], [1, 2]]).to(source)})
    model = Holder({"table": torch.zeros(2, 2).to(target)})
    save_file(given.state_dict(), tmp_path / "a")
    with pytest.warns(ValueWarning, match=rf"1 tensors of the model have a dtype that .*: table \({loss}"):
        alignment = load(model, tmp_path / "a" if saved else given)
    (match,) = (match for match in alignment.matches if match.target == "table")
    assert match.warnings == (f"the cast loses values, {loss}",)
    assert f"Note: 1 tensors of the model have a dtype that cannot hold the values: table ({loss}" in " ".join(
        str(alignment).split()
    )
    assert torch.equal(model.get_buffer("table"), given.get_buffer("table").to(target))


def test_values_that_become_infinite_are_reported_and_rounding_is_not() -> None:
    source, model = nn.Linear(2, 2), nn.Linear(2, 2).half()
    load(model, source)
    assert torch.equal(model.weight, source.weight.half())
    with torch.no_grad():
        source.weight[0, 0] = 1e5
    with pytest.warns(ValueWarning, match=r"weight \(float32 to float16: values up to 1e\+05 become infinite\)"):
        load(model, source)


@pytest.mark.parametrize("saved", [False, True])
def test_an_unwanted_cast_can_be_an_error_that_changes_nothing(tmp_path: Path, saved: bool) -> None:
    model = Holder({"table": torch.zeros(2, 2, dtype=torch.int64)})
    before = copy.deepcopy(model)
    source = Holder({"table": torch.rand(2, 2)})
    save_file(source.state_dict(), tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ValueWarning)
        with pytest.raises(ValueWarning, match=r"table \(float32 to int64"):
            load(model, tmp_path / "a" if saved else source)
    assert_equal(model, before)


def test_nan_of_a_model_that_is_loaded_into_itself_is_looked_for_before_it_is_overwritten() -> None:
    model = Holder({"first": torch.full((2,), torch.nan), "second": torch.ones(2)})
    with pytest.warns(ValueWarning, match=r"1 tensors of the checkpoint have NaN: first \(2 of 2\)"):
        load(model, model.state_dict(), rules=[("first", "second"), ("second", "first")])
    assert bool(model.get_buffer("second").isnan().all())


@pytest.mark.parametrize("saved", [False, True])
def test_nan_is_reported_with_the_keys_of_the_checkpoint(tmp_path: Path, saved: bool) -> None:
    source, model = nn.Linear(3, 2), nn.Linear(3, 2)
    with torch.no_grad():
        source.weight.fill_(torch.nan)
    state_dict = {f"module.fc.{key}": tensor for key, tensor in source.state_dict().items()}
    save_file(state_dict, tmp_path / "a")
    with pytest.warns(
        ValueWarning, match=r"1 tensors of the checkpoint have NaN: module.fc.weight \(6 of 6\)"
    ) as caught:
        alignment = load(model, tmp_path / "a" if saved else state_dict)
    assert [warning.filename for warning in caught] == [__file__]
    assert "1 tensors of the checkpoint have NaN: module.fc.weight (6 of 6)." in alignment.notes
    assert bool(model.weight.isnan().all())


# dtype and device


def test_dtype_converts_the_model_as_it_is_loaded() -> None:
    source = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model = copy.deepcopy(source)
    first = model[0].weight
    alignment = load(model, {f"net.{key}": t for key, t in source.state_dict().items()}, dtype=torch.bfloat16)
    assert model[0].weight is first  # so that an optimizer keeps it
    for key, tensor in source.state_dict().items():
        wanted = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert torch.equal(model.state_dict()[key], wanted)
        assert model.state_dict()[key].dtype == wanted.dtype
    assert alignment.target_tensors["0.weight"].dtype == torch.bfloat16
    assert "copy, float32 to bfloat16" in str(alignment)


@pytest.mark.parametrize("assign", [False, True])
def test_dtype_and_device_of_a_partly_filled_model(assign: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5))
    with pytest.warns(PartialLoadWarning, match=r"2 keep their values"):
        load(
            model,
            {"0.weight": torch.ones(2, 3), "0.bias": torch.ones(2)},
            assign=assign,
            dtype=torch.half,
            device="cpu",
        )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_a_model_on_meta_is_made_in_a_dtype() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    source = nn.Linear(3, 2)
    load(model, source, assign=True, dtype=torch.bfloat16, device="cpu")
    assert torch.equal(model.weight, source.weight.bfloat16())


def test_a_conversion_is_undone_if_the_load_fails() -> None:
    model: Any = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    state = [(parameter, parameter.data_ptr(), parameter.dtype, parameter.grad) for parameter in model.parameters()]

    def fail(*_: object) -> None:
        raise ValueError("from a hook")

    model.register_load_state_dict_post_hook(fail)
    with pytest.raises(ValueError, match="from a hook"):
        load(model, nn.Linear(3, 2), dtype=torch.float64)
    for parameter, (same, pointer, dtype, grad) in zip(model.parameters(), state, strict=True):
        assert parameter is same
        assert (parameter.data_ptr(), parameter.dtype, parameter.grad.dtype) == (pointer, dtype, dtype)
        assert parameter.grad is grad


@pytest.mark.cuda
@pytest.mark.parametrize("assign", [False, True])
def test_device_moves_the_model_as_it_is_loaded(tmp_path: Path, assign: bool) -> None:
    source, model = nn.Linear(3, 2), nn.Linear(3, 2)
    save_file(source.state_dict(), tmp_path / "a")
    load(model, tmp_path / "a", device="cuda", dtype=torch.bfloat16, assign=assign)
    assert model.weight.device.type == "cuda"
    assert torch.equal(model.weight.cpu(), source.weight.bfloat16())


# Lazy modules


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.conv = nn.LazyConv1d(5, 3)
        self.norm = nn.LazyBatchNorm1d()
        self.head = nn.LazyLinear(2)


class Known(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.conv = nn.Conv1d(7, 5, 3)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(9, 2)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("names", [str, "module.{}".format, lambda key: key.replace("stem", "first")])
@pytest.mark.parametrize("assign", [False, True])
def test_lazy_modules_take_the_shapes_of_the_checkpoint(names: Callable[[str], str], assign: bool) -> None:
    model: Any = Lazy()
    source = Known()
    state_dict = {names(key): tensor for key, tensor in source.state_dict().items()}
    alignment = load(model, state_dict, strict=True, assign=assign)
    assert_equal(model, source)
    assert type(model.head.weight) is nn.Parameter
    assert any("tensors of lazy modules have the shapes of those with their names" in note for note in alignment.notes)
    assert model.head(torch.ones(1, 9)).shape == (1, 2)  # which makes it what it stands for
    assert type(model.head) is nn.Linear


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_modules_of_corresponding_modules() -> None:
    source = nn.ModuleDict({"backbone": nn.Linear(4, 6), "classifier": nn.Linear(6, 3)})
    model = nn.ModuleDict({"body": nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.LazyLinear(3)})})
    given = {f"body.a.{key}": t for key, t in source["backbone"].state_dict().items()}
    given |= {f"body.b.{key}": t for key, t in source["classifier"].state_dict().items()}
    load(model, {key.replace("body", "trunk"): tensor for key, tensor in given.items()}, strict=True)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in given.items())


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_tensors_without_a_source_stay_lazy_and_a_failed_load_makes_them_lazy_again() -> None:
    model: Any = Lazy()
    with pytest.warns(PartialLoadWarning):
        alignment = load(model, nn.ModuleDict({"stem": nn.Linear(4, 6)}))
    assert any("8 tensors of lazy modules stay without a shape" in note for note in alignment.notes), alignment.notes
    assert model.head.has_uninitialized_params()
    with pytest.raises(ValueError, match="now"), transaction(model, keep_values=True):  # noqa: PT012
        model.load_state_dict(Known().state_dict())
        raise ValueError("now")
    assert model.head.has_uninitialized_params()
    load(model, Known(), strict=True)
    assert model.head.weight.shape == (2, 9)


def test_align_alone_says_what_to_do_about_lazy_modules() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.LazyLinear(2)
    with pytest.raises(InputError, match=r"2 tensors of LazyLinear have no shape yet: weight, bias.*load, too"):
        checkpoint_of(model)


# Packed tensors


def quantised() -> Tensor:
    return torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore:.*quantiz:UserWarning", "ignore:.*quantiz:DeprecationWarning")
def test_quantised_tensors_of_torch_are_dequantised_or_left_out_with_a_reason() -> None:
    source = nn.Linear(4, 3).state_dict()
    source["weight"] = quantised()
    model = nn.Linear(4, 3)
    before = model.weight.detach().clone()
    with pytest.warns(PartialLoadWarning, match=r"1 keep their values: weight"):
        alignment = load(model, source, min_confidence=0.3, dequantise=False)  # a bias alone is not so sure
    assert torch.equal(model.weight, before)
    assert alignment.missing_keys == alignment.unexpected_keys == ["weight"]
    assert any("Left out: 1 tensors quantised as torch's qint8" in note for note in alignment.notes)
    with pytest.raises(IncompatibleTensorsError, match=r"1 of 2 target tensors has no compatible source"):
        load(model, source, strict=True, min_confidence=0.3, dequantise=False)
    load(model, source, strict=True)
    assert torch.equal(model.weight, quantised().dequantize())


def test_a_wrapper_of_several_tensors_in_the_model_is_left_out_with_a_reason() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    packed = TwoTensor(torch.zeros(3, 4), torch.ones(3, 4))
    model[0].weight = nn.Parameter(packed)
    with pytest.warns(PartialLoadWarning, match=r"1 keep their values: 0.weight"):
        alignment = load(model, nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), min_confidence=0.3)
    assert list(alignment.status) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert alignment.status["0.weight"] == "missing"
    assert any(note.startswith("Of the model, 1 tensors are quantised") for note in alignment.notes)


def test_reading_what_is_held_takes_no_second_copy(tmp_path: Path) -> None:
    state_dict = {"a": torch.ones(2), "b": torch.zeros(3)}
    for saver in ("safetensors", "torch", "legacy"):
        SAVERS[saver](state_dict, tmp_path / saver)
        checkpoint = open_checkpoint(tmp_path / saver)
        assert checkpoint.is_resident
        assert checkpoint["a"].data_ptr() == checkpoint["a"].data_ptr()


def test_a_dtype_may_be_named_and_what_is_none_is_an_error() -> None:
    model, source = nn.Linear(2, 2), {"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}
    load(model, source, dtype="bfloat16", device="cpu")
    assert model.weight.dtype == torch.bfloat16
    wrong: Any
    for wrong in ("nonsense", torch.int8, 3):
        with pytest.raises(InputError, match=r"is not a dtype of weights, such as 'bfloat16'. Nothing was loaded"):
            load(model, source, dtype=wrong)
    with pytest.raises(InputError, match=r"device='nonsense' is not the name of a device. Nothing was loaded"):
        load(model, source, device="nonsense")


def test_sparse_tensors_of_another_number_of_elements_are_assigned(tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self, value: Tensor) -> None:
            super().__init__()
            self.register_buffer("value", value)
            self.register_buffer("other", torch.zeros(7))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the layout a beta
        wanted, empty = torch.eye(5).to_sparse_csr(), torch.zeros(5, 5).to_sparse_csr()
        torch.save({"net.value": wanted, "net.other": torch.ones(7)}, tmp_path / "a")
        model = Holder(empty)
        with pytest.raises(InputError, match=r"torch copies no 5 into it. The model was not changed. Pass assign=True"):
            load(model, tmp_path / "a")
        assert model.value is empty
        load(model, tmp_path / "a", assign=True, strict=True)
        assert torch.equal(model.value.to_dense(), torch.eye(5))
        for format_ in ("safetensors", "dcp"):
            with pytest.raises(InputError, match=r"no plain tensor|and not a plain tensor of all its values"):
                convert(tmp_path / "a", model, tmp_path / "b", format=format_)
            assert not (tmp_path / "b").exists()
