"""Quantised tensors of each published format are loaded as the values that a reference computes of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import autoalign
from autoalign.errors import InputError, PairMismatchError, RulesError
from autoalign.plan.dequantise import Dequantise
from autoalign.plan.quantised import as_values, groups_of
from autoalign.plan.regions import Regional, evaluated, narrowed
from autoalign.plan.serialization import from_plain, to_plain
from autoalign.plan.specs import specs_of

WIDTH, HIDDEN, WORDS = 256, 512, 384


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(WIDTH)
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, WIDTH // 2, bias=False)
        self.v_proj = nn.Linear(WIDTH, WIDTH // 2, bias=False)
        self.mlp_norm = nn.RMSNorm(WIDTH)
        self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.RMSNorm(WIDTH)
        for parameter in self.parameters():
            nn.init.normal_(parameter)


@dataclass(frozen=True)
class Saved:
    """What a format stores of a weight, and the values that its own code makes of that."""

    parts: dict[str, Tensor]  # by the names after that of the layer
    values: Tensor
    tolerance: float = 0.0  # relative, where the reference rounds to 16 bits


Writer = Callable[[Tensor], Saved]


def fp8(size: int, name: str) -> Writer:
    """DeepSeek-V3's format, as transformers' Fp8Dequantize reads it."""

    def write(weight: Tensor) -> Saved:
        rows, columns = weight.shape
        blocks = weight.reshape(rows // size, size, columns // size, size)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        values = (codes.float() * scale[:, None, :, None]).reshape(rows, columns)
        return Saved({"weight": codes.reshape(rows, columns), name: scale}, values)

    return write


def fp8_by_row(weight: Tensor) -> Saved:
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return Saved({"weight": codes, "weight_scale": scale}, codes.float() * scale.float())


def fp8_by_tensor(weight: Tensor) -> Saved:
    scale = weight.abs().max() / 57344
    codes = (weight / scale).to(torch.float8_e5m2)
    parts = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(3.0)}
    return Saved(parts, codes.float() * scale)


def mxfp8(weight: Tensor) -> Saved:
    """As torchao and Blackwell kernels have it: a power of two for 32 values."""
    blocks = weight.reshape(len(weight), -1, 32)
    power = (blocks.abs().amax(2).log2().floor() - 8).to(torch.int32)
    codes = (blocks / 2.0 ** power[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    values = (codes.float() * 2.0 ** power[..., None]).flatten(1)
    return Saved({"weight": codes.flatten(1), "weight_scale": (power + 127).to(torch.uint8)}, values)


def llm_int8(weight: Tensor) -> Saved:
    """bitsandbytes' Linear8bitLt, as its int8_vectorwise_dequant reads it."""
    largest = weight.abs().amax(1)
    codes = (weight / largest[:, None] * 127).round().to(torch.int8)
    parts = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return Saved(parts, codes * largest.view(-1, 1) * 0.007874015748031496)


def int8_with_zero_points(weight: Tensor) -> Saved:
    """compressed-tensors' int-quantized."""
    low, high = weight.aminmax(dim=1, keepdim=True)
    scale = (high - low) / 255
    zero = (-128 - low / scale).round().to(torch.int8)
    codes = (weight / scale + zero).round().clamp(-128, 127).to(torch.int8)
    values = (codes.float() - zero.float()) * scale
    return Saved({"weight": codes, "weight_scale": scale, "weight_zero_point": zero}, values)


WRITERS: dict[str, Writer] = {
    "FP8 in blocks": fp8(128, "weight_scale_inv"),
    "FP8 by row": fp8_by_row,
    "FP8 by tensor": fp8_by_tensor,
    "MXFP8": mxfp8,
    "LLM.int8": llm_int8,
    "INT8 by row": int8_with_zero_points,
}
every_scheme = pytest.mark.parametrize("scheme", WRITERS)


def quantised(model: nn.Module, write: Writer) -> tuple[dict[str, Tensor], dict[str, Saved]]:
    """Return what is saved of a model whose projections are quantised, and what they are by its keys."""
    found: dict[str, Tensor] = {}
    saved: dict[str, Saved] = {}
    for key, tensor in model.state_dict().items():
        if "proj" not in key:
            found[key] = tensor.clone()
            continue
        saved[key] = write(tensor)
        found |= {f"{key.removesuffix('weight')}{name}": part for name, part in saved[key].parts.items()}
    return found, saved


def assert_loaded(values: dict[str, Tensor], source: dict[str, Tensor], saved: dict[str, Saved]) -> None:
    for key, tensor in values.items():
        wanted = saved[key].values if key in saved else source[key]
        torch.testing.assert_close(
            tensor, wanted.to(tensor.dtype), rtol=saved[key].tolerance if key in saved else 0, atol=0
        )


@every_scheme
def test_values_are_those_of_the_reference_wherever_they_are_computed(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, saved = quantised(Network(), WRITERS[scheme])
    path = tmp_path / "a.safetensors"
    save_file(source, path)
    model = Network()
    alignment = autoalign.load(model, path, strict=True)
    assert_loaded(model.state_dict(), source, saved)
    assert any(f"Dequantised to float32: 10 tensors quantised as {scheme} (" in note for note in alignment.notes)
    assert f"dequantise({scheme})" in str(alignment)
    assert not alignment.ambiguous
    assert_loaded(alignment.rules().apply(load_file(path)), source, saved)
    alignment.save(tmp_path / "a.json")
    again = autoalign.Alignment.read(tmp_path / "a.json").applied_to(path, model)
    assert again == alignment
    autoalign.convert(path, model, tmp_path / "b.safetensors", strict=True, dtype=torch.bfloat16)
    written = load_file(tmp_path / "b.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert_loaded(written, source, saved)
    left_out = autoalign.align(path, model, dequantise=False)
    assert set(left_out.missing_keys) == saved.keys()


@every_scheme
def test_fused_with_others_and_under_other_names_the_values_are_the_same(scheme: str) -> None:
    torch.manual_seed(0)
    source, saved = quantised(Network(), WRITERS[scheme])
    lone = "layers.0.k_proj"  # one that was left as it is
    source = {key: tensor for key, tensor in source.items() if not key.startswith(f"{lone}.")}
    source[f"{lone}.weight"] = saved.pop(f"{lone}.weight").values
    target = {f"net.{key}".replace("q_proj", "qkv_proj"): tensor for key, tensor in Network().state_dict().items()}
    target = {key: tensor for key, tensor in target.items() if not re.search("[kv]_proj", key.replace("qkv", ""))}
    for number in range(2):
        target[f"net.layers.{number}.qkv_proj.weight"] = torch.empty(2 * WIDTH, WIDTH)
    alignment = autoalign.align(source, target)
    values = alignment.state_dict()
    assert values.keys() == target.keys()
    for key, tensor in values.items():
        parts = [key.removeprefix("net.").replace("qkv", name) for name in ("qkv" if "qkv" in key else "q")]
        wanted = torch.cat([saved[part].values if part in saved else source[part] for part in parts])
        torch.testing.assert_close(tensor, wanted, rtol=max(each.tolerance for each in saved.values()), atol=0)
    applied = alignment.rules().apply(source)
    assert all(torch.equal(applied[key], tensor) for key, tensor in values.items())


@every_scheme
def test_any_region_and_the_json_form_give_the_same(scheme: str) -> None:
    torch.manual_seed(0)
    written = WRITERS[scheme](torch.randn(256, 512))
    specs = specs_of(written.parts)
    ((key, (group, operation)),) = as_values(specs, groups_of(specs), {}).groups.items()
    assert key == "weight"
    assert from_plain(to_plain(operation)) == operation
    tensors = [written.parts[spec.key] for spec in group.specs]
    inputs = [Regional(tuple(t.shape), t.dtype, lambda region, t=t: narrowed(t, region)) for t in tensors]  # type: ignore[misc]
    (lazy,) = evaluated(operation, inputs)
    (whole,) = operation.apply(tensors)
    region = ((17, 100), (130, 3))
    assert lazy.dtype == whole.dtype == torch.float32
    assert torch.equal(lazy.read(region), narrowed(whole, region))


def test_blocks_need_not_fill_the_last_row_and_column() -> None:
    codes = torch.randn(192, 300).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3)
    wanted = codes.float() * scale.repeat_interleave(128, 0)[:192].repeat_interleave(128, 1)[:, :300]
    (values,) = Dequantise("FP8 in blocks", ("codes", "scale")).apply([codes, scale])
    assert torch.equal(values, wanted)


def test_experts_in_one_tensor_have_blocks_too() -> None:
    codes = torch.randn(3, 256, 128).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2, 1)
    source = {"experts.gate_up_proj": codes, "experts.gate_up_proj_scale_inv": scale}
    target = {"experts.gate_up_proj": torch.empty(3, 256, 128)}
    values = autoalign.align(source, target).state_dict()["experts.gate_up_proj"]
    assert torch.equal(values, codes.float() * scale.repeat_interleave(128, 1))


@pytest.mark.parametrize("scale", [(4, 2), (512,), (3, 1)], ids=str)
def test_scales_that_do_not_fit_are_left_out_with_their_codes(scale: tuple[int, ...]) -> None:
    """A scale of the transposed matrix, of its columns, and of blocks of no size are none that are known."""
    source = {"fc.weight": torch.randn(256, 512).to(torch.float8_e4m3fn), "fc.weight_scale": torch.rand(scale)}
    alignment = autoalign.align(source, {"fc.weight": torch.empty(256, 512)})
    assert alignment.missing_keys == ["fc.weight"]


def test_codes_in_the_order_of_a_gpu_are_refused_before_anything_is_changed() -> None:
    source, _ = quantised(Network(), llm_int8)
    source["layers.1.up_proj.weight_format"] += 1
    model = Network()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=r"weight_format is not 0: .*Nothing was dequantised"):
        autoalign.load(model, source)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_what_is_not_quantised_is_not_dequantised() -> None:
    source, _ = quantised(Network(), fp8_by_row)
    model = Network()
    alignment = autoalign.align(source, model)
    source = {key: tensor.float() for key, tensor in source.items()}
    with pytest.raises(PairMismatchError, match=r"takes codes for values"):
        alignment.applied_to(source, model)
    with pytest.raises(RulesError, match=r"are not quantised, which 'dequantise\(FP8 by row\)' is for"):
        alignment.rules().apply(source)


@pytest.mark.parametrize("data", [{"scheme": "Q"}, {"roles": ["scale"]}, {"roles": ["codes", "zero"]}, {"scheme": 3}])
def test_operations_that_no_scheme_knows_are_refused(data: dict[str, object]) -> None:
    plain = {"kind": "Dequantise", "scheme": "FP8 by row", "roles": ["codes", "scale"], "shape": []}
    assert from_plain(plain) == Dequantise("FP8 by row", ("codes", "scale"))
    with pytest.raises(InputError, match=r"is not an operation of autoalign"):
        from_plain(plain | data)


def test_rows_of_a_dequantised_head_are_adapted_to_the_target() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1000, 256)
    saved = fp8_by_row(weight)
    source = {"body.weight": torch.randn(256, 256), **{f"fc.{name}": part for name, part in saved.parts.items()}}
    own = torch.randn(1010, 256)
    target = {"body.weight": torch.empty(256, 256), "fc.weight": own}
    alignment = autoalign.align(source, target, adapt=("head", "vocab"), min_confidence=0)
    assert torch.equal(alignment.state_dict()["fc.weight"], torch.cat([saved.values, own[1000:]]))
