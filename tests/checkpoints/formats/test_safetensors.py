from __future__ import annotations

import io
import json
import sys
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from autoalign.checkpoints.formats.safetensors import header, in_file_order, write_safetensors
from autoalign.checkpoints.stored import DTYPES
from autoalign.errors import InputError
from autoalign.plan.specs import TensorSpec, specs_of

READABLE = sorted({*safetensors.torch._TYPES} & {*DTYPES})  # by the library; it holds E8M0 and does not read it back


def written(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    stream = io.BytesIO()
    write_safetensors(stream, in_file_order(specs_of(tensors)), lambda spec: tensors[spec.key], metadata or {})
    return stream.getvalue()


def same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = [side.contiguous().reshape(-1).view(torch.uint8) for side in (one, other)]
    return torch.equal(flat[0], flat[1])


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Tensors of all dtypes, of bits of all kinds, scalars, empty ones and ones of odd strides among them."""
    dtype = DTYPES[draw(st.sampled_from(READABLE))]
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    numel = torch.Size(shape).numel()
    data = draw(st.binary(min_size=numel * dtype.itemsize, max_size=numel * dtype.itemsize))
    if dtype == torch.bool:
        data = bytes(byte & 1 for byte in data)
    raw = torch.tensor(list(data), dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(shape) if numel else torch.empty(shape, dtype=dtype)
    return tensor.mT if tensor.ndim > 1 and draw(st.booleans()) else tensor


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(
    st.dictionaries(TEXTS.filter(lambda key: key != "__metadata__"), tensors(), max_size=5),
    st.dictionaries(TEXTS, TEXTS, max_size=3),
)
def test_the_library_reads_back_every_bit(state_dict: dict[str, Tensor], metadata: dict[str, str]) -> None:
    data = written(state_dict, metadata)
    read = safetensors.torch.load(data)
    assert read.keys() == state_dict.keys()
    assert all(same_bits(read[key], tensor) for key, tensor in state_dict.items())
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    listed = json.loads(data[8 : 8 + length])
    assert listed.pop("__metadata__", {}) == metadata
    for key, entry in listed.items():  # so that readers may map it into memory
        assert entry["data_offsets"][0] % state_dict[key].dtype.itemsize == 0


@given(st.lists(st.sampled_from(READABLE), min_size=1, max_size=1), st.integers(0, 5))
def test_a_file_of_one_tensor_is_the_librarys_own(names: list[str], size: int) -> None:
    tensor = torch.zeros(size, dtype=DTYPES[names[0]])
    assert written({"a": tensor}, {"format": "pt"}) == safetensors.torch.save({"a": tensor}, {"format": "pt"})


def test_the_order_of_the_model_is_kept_among_tensors_of_equal_width() -> None:
    dtypes = {"b": torch.float16, "a": torch.float32, "10": torch.int8, "9": torch.bfloat16, "8": torch.int32}
    specs = [TensorSpec(key, (1,), dtype) for key, dtype in dtypes.items()]
    assert [spec.key for spec in in_file_order(specs)] == ["a", "8", "b", "9", "10"]


def test_large_tensors_of_any_strides_go_through_in_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.rand((1, 3, 2**21 + 1), generator=generator).permute(0, 2, 1)
    long = torch.rand((2**21 + 3, 2), generator=generator)[:, 1:]
    views = {"wide": wide, "long": long, "expanded": torch.ones(1).expand(2**22 + 1)}
    read = safetensors.torch.load(written(views))
    assert all(torch.equal(read[key], tensor) for key, tensor in views.items())


def test_views_that_torch_has_not_carried_out_are_written_as_their_values() -> None:
    value = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    read = safetensors.torch.load(
        written({"conj": value.conj(), "neg": value.conj().imag, "grad": nn.Parameter(value)})
    )
    assert read["conj"].tolist() == [1 - 2j, 3 + 4j]
    assert read["neg"].tolist() == [-2, 4]
    assert read["grad"].tolist() == value.tolist()


def test_values_are_converted_to_the_announced_dtype() -> None:
    stream = io.BytesIO()
    specs = [TensorSpec("a", (2,), torch.bfloat16)]
    write_safetensors(stream, specs, lambda _: torch.tensor([1.0, 3.14159], dtype=torch.float64), {})
    assert safetensors.torch.load(stream.getvalue())["a"].tolist() == [1.0, 3.140625]


def test_big_endian_machines_write_the_same_file(monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = {"i": torch.tensor([0x0403, 0x0605], dtype=torch.int16), "c": torch.zeros(1, dtype=torch.complex64)}
    swapped["c"].view(torch.uint8).copy_(torch.arange(8))
    monkeypatch.setattr(sys, "byteorder", "big")
    data = written(swapped)
    assert data[-12:] == bytes([3, 2, 1, 0, 7, 6, 5, 4, 4, 3, 6, 5])


@pytest.mark.parametrize("dtype", [torch.complex128, torch.qint8])
def test_dtypes_that_the_format_has_not_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=r"safetensors has no such dtype. Nothing was written. Pass dtype="):
        header([TensorSpec("a", (1,), dtype)], {})


def test_what_is_no_plain_tensor_is_refused() -> None:
    with pytest.raises(InputError, match=r"a is a torch.sparse_coo and not a plain tensor"):
        written({"a": torch.eye(2).to_sparse()})


def test_names_that_the_format_cannot_hold_are_refused() -> None:
    spec = TensorSpec("__metadata__", (1,), torch.float32)
    with pytest.raises(InputError, match="can be called '__metadata__'"):
        header([spec], {"format": "pt"})
    with pytest.raises(InputError, match=r"a.udc80b.*in a key or in the metadata, is not Unicode text"):
        header([TensorSpec("a\udc80b", (1,), torch.float32)], {})
    with pytest.raises(InputError, match="readers of safetensors take 100000000"):
        header([replace(spec, key="a")], {"long": "x" * 10**8})
