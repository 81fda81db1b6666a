"""Quantised tensors of each published format are loaded as the values that a reference computes of them."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import autoalign
from autoalign.errors import AutoAlignError, CheckpointError, InputError, PairMismatchError, RulesError
from autoalign.plan.dequantise import Dequantise, is_dequantised, is_sure
from autoalign.plan.operations import Copy, Operation, Split, Transpose, chain, output_shapes
from autoalign.plan.quantised import as_values, groups_of
from autoalign.plan.regions import Regional, divided, evaluated, narrowed, put_together
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


def four_bits_of_bitsandbytes(name: str, *, nested: bool, storage: torch.dtype = torch.uint8) -> Writer:
    """Linear4bit, as bitsandbytes' own dequantize_4bit reads it."""
    nf4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0]
    nf4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    fp4 = [0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25]
    table = torch.tensor(nf4 if name == "nf4" else fp4 + [-value for value in fp4])

    def write(weight: Tensor) -> Saved:
        blocks = weight.reshape(-1, 64)
        largest = blocks.abs().amax(1)
        state = {"quant_type": name, "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
        parts = {}
        if nested:
            offset, around = float(largest.mean()), (largest - largest.mean()).reshape(-1, 256)
            outer, steps = around.abs().amax(1), torch.linspace(-1, 1, 256)
            inner = ((around / outer[:, None])[..., None] - steps).abs().argmin(-1)
            largest = (steps[inner] * outer[:, None]).flatten() + offset
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            parts = {"weight.nested_absmax": outer, "weight.nested_quant_map": steps}
        places = ((blocks / largest[:, None])[..., None] - table).abs().argmin(-1).flatten()
        packed = ((places[::2] << 4) | places[1::2]).to(torch.uint8)
        parts |= {
            "weight": packed.view(storage)[:, None],
            "weight.absmax": inner.flatten().to(torch.uint8) if nested else largest,
            "weight.quant_map": table.clone(),
            f"weight.quant_state.bitsandbytes__{name}": torch.tensor(
                list(json.dumps(state).encode()), dtype=torch.uint8
            ),
        }
        return Saved(parts, (table[places].reshape(-1, 64) * largest[:, None]).reshape(weight.shape))

    return write


def packed(numbers: Tensor, bits: int) -> Tensor:
    """Pack the numbers of each row into 32-bit words, bit by bit from the lowest."""
    flags = (numbers.long()[..., None] >> torch.arange(bits)) & 1
    words = (flags.flatten(1).reshape(len(numbers), -1, 32) << torch.arange(32)).sum(2)
    return (words - (words >> 31 << 32)).to(torch.int32)


def rounded(weight: Tensor, bits: int, size: int, *, symmetric: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, zero points and scales (both with a column for each group of inputs) of a weight."""
    groups = weight.reshape(len(weight), -1, size)
    low, high = groups.amin(2), groups.amax(2)
    scale = ((high - low) / (2**bits - 1)).half()
    zero = (-low / scale).round().clamp(1, 2**bits - 1)
    if symmetric:
        scale, zero = (2 * groups.abs().amax(2) / (2**bits - 1)).half(), torch.full_like(zero, 2 ** (bits - 1))
    codes = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
    return codes.reshape(weight.shape).long(), zero.long(), scale


def gptq(bits: int, *, order: bool = False, index: bool = True, symmetric: bool = False, version: int = 1) -> Writer:
    """AutoGPTQ's QuantLinear, as its forward reads it: scales[g_idx] * (weight - zeros[g_idx])."""

    def write(weight: Tensor) -> Saved:
        places = torch.randperm(weight.shape[1]) if order else torch.arange(weight.shape[1])
        codes, zero, scale = rounded(weight[:, places], bits, 64, symmetric=symmetric)
        codes = codes[:, places.argsort()]
        group = (torch.arange(weight.shape[1]) // 64)[places.argsort()]
        values = (codes - zero[:, group]).float() * scale[:, group].float()
        stored = zero.T if version == 2 else zero.T - 1
        parts = {
            "qweight": packed(codes, bits).T.contiguous(),
            "qzeros": packed(stored, bits),
            "scales": scale.T.contiguous(),
        }
        return Saved(parts | ({"g_idx": group.int()} if index else {}), values)

    return write


def awq(weight: Tensor) -> Saved:
    """AutoAWQ's WQLinear_GEMM: columns of outputs in a word, in some order."""
    codes, zero, scale = rounded(weight, 4, 128)

    def words(numbers: Tensor) -> Tensor:
        return packed(numbers.T.reshape(numbers.shape[1], -1, 8)[..., (0, 2, 4, 6, 1, 3, 5, 7)].flatten(1), 4)

    values = (codes - zero.repeat_interleave(128, 1)).float() * scale.repeat_interleave(128, 1).float()
    return Saved({"qweight": words(codes), "qzeros": words(zero), "scales": scale.T.contiguous()}, values)


def mlx(bits: int) -> Writer:
    """mx.quantize in groups of 64, as mx.dequantize reads it."""

    def write(weight: Tensor) -> Saved:
        groups = weight.reshape(len(weight), -1, 64)
        bias = groups.amin(2)
        scale = (groups.amax(2) - bias) / (2**bits - 1)
        codes = ((groups - bias[..., None]) / scale[..., None]).round()
        values = (codes * scale[..., None] + bias[..., None]).reshape(weight.shape)
        words = packed(codes.reshape(weight.shape), bits).view(torch.uint32)
        return Saved({"weight": words, "scales": scale, "biases": bias}, values)

    return write


def pack_quantized(bits: int, *, symmetric: bool) -> Writer:
    """compressed-tensors' own, whose decompress computes in the dtype of the scale; with the order of activations."""

    def write(weight: Tensor) -> Saved:
        codes, zero, scale = rounded(weight, bits, 128, symmetric=symmetric)
        group = torch.randint(0, weight.shape[1] // 128, (weight.shape[1],))
        values = (codes - zero[:, group]).float() * scale[:, group].float()
        parts = {"weight_packed": packed(codes, bits), "weight_scale": scale, "weight_g_idx": group.int()}
        parts |= {"weight_shape": torch.tensor(weight.shape)}
        return Saved(parts if symmetric else parts | {"weight_zero_point": packed(zero.T, bits).T.contiguous()}, values)

    return write


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def fp4(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest floats of four bits, two in a byte, and their values."""
    places = (blocks[..., None] - E2M1).abs().argmin(-1)
    return (places[..., ::2] | (places[..., 1::2] << 4)).to(torch.uint8), E2M1[places]


def mxfp4(*, in_blocks: bool) -> Writer:
    """OpenAI's files (".blocks"), and compressed-tensors' mxfp4-pack-quantized."""

    def write(weight: Tensor) -> Saved:
        blocks = weight.reshape(len(weight), -1, 32)
        power = (blocks.abs().amax(2) / 6).log2().ceil()
        codes, values = fp4(blocks / 2 ** power[..., None])
        scale = (power + 127).to(torch.uint8)
        values = (values * 2 ** power[..., None]).reshape(weight.shape)
        if in_blocks:
            return Saved({"weight.blocks": codes, "weight.scales": scale}, values)
        return Saved({"weight_packed": codes.flatten(1), "weight_scale": scale}, values)

    return write


def nvfp4(name: str) -> Writer:
    """ModelOpt multiplies by its second scale, and compressed-tensors divides."""

    def write(weight: Tensor) -> Saved:
        blocks = weight.reshape(len(weight), -1, 16)
        outer = weight.abs().max() / (6 * 448)
        scale = (blocks.abs().amax(2) / 6 / outer).to(torch.float8_e4m3fn)
        whole = scale.float() * outer if name == "weight_scale_2" else scale.float() / (1 / outer)
        codes, values = fp4(blocks / whole[..., None])
        parts = {"weight_scale": scale, name: outer if name == "weight_scale_2" else (1 / outer)[None]}
        parts["weight" if name == "weight_scale_2" else "weight_packed"] = codes.flatten(1)
        return Saved(parts, (values * whole[..., None]).reshape(weight.shape))

    return write


WRITERS: dict[str, Writer] = {
    "FP8 in blocks": fp8(128, "weight_scale_inv"),
    "FP8 by row": fp8_by_row,
    "FP8 by tensor": fp8_by_tensor,
    "MXFP8": mxfp8,
    "LLM.int8": llm_int8,
    "INT8 by row": int8_with_zero_points,
    "NF4": four_bits_of_bitsandbytes("nf4", nested=True),
    "NF4, not nested": four_bits_of_bitsandbytes("nf4", nested=False),
    "NF4 in bfloat16": four_bits_of_bitsandbytes("nf4", nested=False, storage=torch.bfloat16),
    "FP4": four_bits_of_bitsandbytes("fp4", nested=True),
    "GPTQ": gptq(4),
    "GPTQ of 8 bits by activations": gptq(8, order=True),
    "GPTQ of 3 bits": gptq(3),
    "GPTQ of 2 bits, symmetric": gptq(2, symmetric=True),
    "GPTQ without an index": gptq(4, index=False),
    "GPTQ, second version, symmetric": gptq(4, version=2, symmetric=True),
    "AWQ": awq,
    "MLX": mlx(4),
    "MLX of 3 bits": mlx(3),
    "MLX of 8 bits": mlx(8),
    "MXFP4": mxfp4(in_blocks=True),
    "MXFP4 of compressed-tensors": mxfp4(in_blocks=False),
    "NVFP4": nvfp4("weight_scale_2"),
    "NVFP4 of compressed-tensors": nvfp4("weight_global_scale"),
    "compressed-tensors": pack_quantized(4, symmetric=True),
    "compressed-tensors with zero points": pack_quantized(8, symmetric=False),
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
    scheme = re.sub(r" (without|in bf|of [\dc]|with zero|in bfloat).*|, .*", "", scheme)
    model = Network()
    alignment = autoalign.load(model, path, strict=True)
    assert_loaded(model.state_dict(), source, saved)
    assert any(f"Dequantised to float32: 10 tensors quantised as {scheme} (" in note for note in alignment.notes)
    assert f"dequantise({scheme})" in str(alignment)
    assert not alignment.ambiguous
    assert_loaded(alignment.rules().apply(load_file(path)), source, saved)
    exported: dict[str, object] = {}
    exec(alignment.rules().to_python("convert"), exported)
    assert callable(exported["convert"])
    assert_loaded(exported["convert"](load_file(path)), source, saved)
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
    rules = alignment.rules()
    written: dict[str, object] = {}
    exec(rules.to_python("convert"), written)
    assert callable(written["convert"])
    for applied in (rules.apply(source), written["convert"](source)):
        assert all(torch.equal(applied[key], tensor) for key, tensor in values.items())


@every_scheme
def test_any_region_and_the_json_form_give_the_same(scheme: str) -> None:
    torch.manual_seed(0)
    written = WRITERS[scheme](torch.randn(256, 512))
    specs = specs_of(written.parts)
    ((key, (group, operation)),) = as_values(specs, groups_of(specs), {}, written.parts, {}).groups.items()
    assert key == "weight"
    assert is_dequantised(operation)
    assert from_plain(to_plain(operation)) == operation
    tensors = [written.parts[spec.key] for spec in group.specs]
    inputs = [Regional(tuple(t.shape), t.dtype, lambda region, t=t: narrowed(t, region)) for t in tensors]  # type: ignore[misc]
    (lazy,) = evaluated(operation, inputs)
    (whole,) = operation.apply(tensors)
    region = ((17, 100), (130, 3))
    assert lazy.dtype == whole.dtype == torch.float32
    assert torch.equal(lazy.read(region), narrowed(whole, region))


def pieces(operation: Operation, tensors: list[Tensor], most: int) -> Tensor:
    shape = output_shapes(operation, [tuple(tensor.shape) for tensor in tensors])[0]
    found = list(divided(operation, tensors, most=most))
    assert len(found) > 1 or prod(shape) <= most
    return put_together(found, shape, torch.float32)


@every_scheme
def test_pieces_are_those_of_the_whole(scheme: str) -> None:
    torch.manual_seed(1)
    written = WRITERS[scheme](torch.randn(384, 256))
    specs = specs_of(written.parts)
    (((group, operation)),) = as_values(specs, groups_of(specs), {}, written.parts, {}).groups.values()
    tensors = [written.parts[spec.key] for spec in group.specs]
    (whole,) = operation.apply(tensors)
    for step, most in ((Copy(), 2**14), (Transpose(), 2**14), (Split(0, 33, 300), 2**14)):
        (wanted,) = step.apply([whole])
        assert torch.equal(pieces(chain(operation, step), tensors, most), wanted)


def test_blocks_that_do_not_end_with_rows_stay_whole() -> None:
    """Neither those of a flat format nor of three rows each, of which a part would be read as of other blocks."""
    state = torch.tensor(list(json.dumps({"blocksize": 64, "shape": [3, 50]}).encode()), dtype=torch.uint8)
    flat = torch.randint(0, 256, (75, 1), dtype=torch.uint8), torch.rand(3), torch.rand(16), state
    threes = torch.randint(-99, 99, (120, 8), dtype=torch.int8), torch.rand(40, 1)
    last = torch.randn(576, 300).to(torch.float8_e4m3fn), torch.rand(5, 3)
    for operation, tensors in (
        (Dequantise("NF4", ("codes", "scale", "table", "layout"), (3, 50)), flat),
        (Dequantise("INT8 in blocks", ("codes", "scale")), threes),
        (Dequantise("FP8 in blocks", ("codes", "scale")), last),
    ):
        (whole,) = operation.apply(tensors)
        for start, count in ((0, 1), (1, 2), (2, 1)) if len(whole) == 3 else ((0, 6), (7, 50), (90, 30), (119, 1)):
            inputs = [Regional(tuple(t.shape), t.dtype, lambda region, t=t: narrowed(t, region)) for t in tensors]  # type: ignore[misc]
            (lazy,) = evaluated(operation, inputs)
            region = ((start, count), (0, whole.shape[1]))
            assert torch.equal(lazy.read(region), narrowed(whole, region))


def test_a_part_of_gptq_is_of_the_version_that_all_of_it_shows() -> None:
    """Zero points that are all in the middle are those of the second version, but not if only some rows have them."""
    zeros = torch.cat([torch.full((2, 64), 8), torch.full((2, 64), 3)], 1)
    parts = [packed(torch.randint(0, 16, (128, 64)), 4).T.contiguous(), packed(zeros, 4), torch.rand(2, 128).half()]
    operation = Dequantise("GPTQ", ("codes", "zero", "scale"))
    assert torch.equal(pieces(operation, parts, 2**11), operation.apply(parts)[0])


@pytest.mark.parametrize(
    ("operation", "shapes"),
    [
        (Dequantise("LLM.int8", ("codes", "scale")), [(4, 3), (5,)]),
        (Dequantise("LLM.int8", ("codes", "scale")), [(4, 3)]),
        (Dequantise("MLX", ("codes", "scale", "zero")), [(4, 8), (4, 1), (4, 2)]),
    ],
)
def test_tensors_that_do_not_fit_are_refused(operation: Dequantise, shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match=r"does not fit tensors of shapes .* Nothing was converted"):
        operation.apply([torch.zeros(shape) for shape in shapes])


def test_only_schemes_without_choices_are_sure() -> None:
    assert is_sure(Dequantise("INT8 by row", ("codes", "scale")))
    assert not is_sure(Dequantise("LLM.int8", ("codes", "scale")))  # whose format may be a GPU's
    assert not is_sure(Copy())


def test_no_rows_are_no_values() -> None:
    shapes = {(4, 3): torch.int8, (4,): torch.float32}
    given = [Regional(shape, dtype, lambda _: torch.empty(0)) for shape, dtype in shapes.items()]
    (values,) = evaluated(Dequantise("LLM.int8", ("codes", "scale")), given)
    assert values.read(((0, 0), (0, 3))).shape == (0, 3)


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


def test_experts_in_blocks_are_those_of_transformers_which_turns_them() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source = {}
    for name, rows in (("gate_up_proj", 128), ("down_proj", 64)):
        source[f"experts.{name}_blocks"] = torch.randint(0, 256, (4, rows, 2, 16), dtype=torch.uint8)
        source[f"experts.{name}_scales"] = torch.randint(120, 130, (4, rows, 2), dtype=torch.uint8)
    target = {"experts.gate_up_proj": torch.empty(4, 64, 128), "experts.down_proj": torch.empty(4, 64, 64)}
    alignment = autoalign.align(source, target)
    assert {str(match.operation) for match in alignment.matches} == {"dequantise(MXFP4) + permute[0, 2, 1]"}
    values = alignment.state_dict()
    assert values.keys() == target.keys()
    for key, tensor in values.items():
        parts = source[f"{key}_blocks"], source[f"{key}_scales"]
        assert torch.equal(tensor, convert_moe_packed_tensors(*parts, dtype=torch.float32))


def saved_with_config(folder: Path, write: Writer, config: dict[str, object]) -> tuple[Path, dict[str, Saved]]:
    source, saved = quantised(Network(), write)
    save_file(source, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder, saved


def test_a_config_tells_the_version_of_gptq(tmp_path: Path) -> None:
    """Without one, zero points are those of the first version, as in all files but those that say so."""
    config: dict[str, object] = {"quantization_config": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}}
    path, saved = saved_with_config(tmp_path, gptq(4, version=2), config)
    alignment = autoalign.align(path, Network())
    values = alignment.state_dict()
    assert all(torch.equal(values[key], each.values) for key, each in saved.items())
    assert "dequantise(GPTQ v2)" in str(alignment)


def test_a_config_tells_the_groups_of_mlx(tmp_path: Path) -> None:
    """Four bits in groups of 64 take as much as eight in groups of 32."""

    def write(weight: Tensor) -> Saved:
        halves = mlx(8)(torch.cat([weight.reshape(-1, 32)] * 2, 1))
        parts = {name: part.reshape(len(weight), -1) for name, part in halves.parts.items() if name != "weight"}
        words = halves.parts["weight"].reshape(-1, 2, 8)[:, 0].reshape(len(weight), -1)
        return Saved({"weight": words, **parts}, halves.values[:, :32].reshape(weight.shape))

    settings = {"group_size": 64, "bits": 4} | {
        f"layers.{number}.{name}_proj": {"group_size": 32, "bits": 8}
        for number in range(2)
        for name in ("q", "k", "v", "up", "down")
    }
    path, saved = saved_with_config(tmp_path, write, {"quantization": settings})
    values = autoalign.align(path, Network()).state_dict()
    assert all(torch.equal(values[key], each.values) for key, each in saved.items())
    (tmp_path / "config.json").write_text(json.dumps({"quantization": {"group_size": 7}}))
    assert not set(autoalign.align(path, Network()).state_dict()) & saved.keys()


@pytest.mark.parametrize(
    ("scheme", "part", "change"),
    [
        ("NF4", "weight.quant_state.bitsandbytes__nf4", lambda part: part[:-2]),
        ("NF4", "weight.quant_state.bitsandbytes__nf4", lambda part: part.to("meta")),
        ("NF4", "weight.absmax", lambda part: part[:-1]),
        ("GPTQ", "g_idx", lambda part: part[:-1]),
        ("GPTQ", "qzeros", lambda part: part[:, :-1]),
        ("AWQ", "scales", lambda part: part[:, :-1]),
        ("MLX", "biases", lambda part: part[:, :-1]),
        ("MXFP4", "weight.scales", lambda part: part[:, :-1]),
        ("NVFP4", "weight_scale_2", lambda part: part.repeat(2)),
        ("INT8 by row", "weight_zero_point", lambda part: part[:-1]),
        ("compressed-tensors", "weight_shape", lambda part: part - 1),
        ("compressed-tensors", "weight_shape", lambda part: part - torch.tensor([0, 1])),
        ("compressed-tensors", "weight_g_idx", lambda part: part[:-1]),
    ],
)
def test_companions_that_do_not_belong_to_the_codes_leave_them_out(
    scheme: str, part: str, change: Callable[[Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    source, saved = quantised(Network(), WRITERS[scheme])
    key = f"layers.1.up_proj.{part}"
    source[key] = change(source[key])
    alignment = autoalign.align(source, Network())
    assert alignment.missing_keys == ["layers.1.up_proj.weight"]
    assert {match.target for match in alignment.matches} >= saved.keys() - {"layers.1.up_proj.weight"}
    assert {other for other in source if other.startswith("layers.1.up_proj.")} <= set(alignment.unexpected_keys)


def test_an_index_beyond_the_groups_is_an_error_before_anything_is_changed() -> None:
    source, _ = quantised(Network(), gptq(4))
    source["layers.1.up_proj.g_idx"][3] = 99
    model = Network()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"dequantise\(GPTQ\)' of a tensor of shape \[512, 256\] failed: index 99"
    ):
        autoalign.load(model, source)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


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
    with pytest.raises(CheckpointError, match=r"weight_format is not 0, .*Nothing was converted"):
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


def spoiled(r: random.Random, tensor: Tensor) -> Tensor:
    """Change a tensor of a format in a way that no writer would."""
    match r.randrange(9):
        case 0:
            return tensor.reshape(-1)
        case 1 if tensor.dim():
            return tensor.narrow(r.randrange(tensor.dim()), 0, r.randrange(2))
        case 2 if tensor.dim() > 1:
            return tensor.transpose(0, 1).contiguous()
        case 3:
            return tensor[None]
        case 4:
            return tensor.to(r.choice((torch.float16, torch.int32, torch.int64, torch.uint8, torch.int8, torch.bool)))
        case 5:
            return torch.full_like(tensor.to(torch.float32), r.choice((float("nan"), float("inf"), -1.0, 1e30)))
        case 6 if tensor.numel():
            noise = torch.randint(0, 256, (tensor.nbytes,), dtype=torch.uint8)
            return noise.view(tensor.dtype).reshape(tensor.shape)
        case 7:
            return tensor.to("meta")
    return torch.cat([tensor.reshape(-1)] * 2)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_spoiled_companions_raise_errors_of_ours_alone() -> None:
    for seed in range(int(os.environ.get("AUTOALIGN_FUZZ", "300"))):
        r = random.Random(seed)
        torch.manual_seed(seed)
        name = r.choice(list(WRITERS))
        parts = WRITERS[name](torch.randn(256, 256)).parts
        for key in r.sample(list(parts), min(len(parts), r.choice((1, 1, 2)))):
            parts[key] = spoiled(r, parts[key])
            if r.random() < 0.1:
                del parts[key]
        source = {f"fc.{key}": part for key, part in parts.items()} | {"norm.weight": torch.ones(256)}
        model = nn.ModuleDict({"fc": nn.Linear(256, 256, bias=False), "norm": nn.RMSNorm(256)})
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        try:
            alignment = autoalign.load(model, source, min_confidence=r.choice((0.0, 0.5)))
            assert {match.target for match in alignment.matches} <= before.keys()
            assert str(alignment)
            raw = [m for m in alignment.matches if "fc.weight" in m.target and not is_dequantised(m.operation)]
            are_values = all(source[match.sources[0]].is_floating_point() for match in raw)
            assert are_values or len(parts) == 1, (seed, name)
        except AutoAlignError:
            assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()), (seed, name)
        except Exception as error:
            raise AssertionError(f"{name} with seed {seed}: {type(error).__name__}: {error}") from error


def write_gguf(model: nn.Module, path: Path, name: str) -> None:
    gguf: Any = pytest.importorskip("gguf")
    kind, writer = gguf.GGMLQuantizationType[name], gguf.GGUFWriter(path, "llama")
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    for key, tensor in model.state_dict().items():
        codes = gguf.quants.quantize(tensor.numpy(), kind) if "proj" in key else tensor.numpy()
        writer.add_tensor(key, codes, raw_dtype=kind if "proj" in key else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.filterwarnings("ignore")
def test_a_trained_llama_answers_as_before_it_was_quantised(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 384}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    source = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(0, 384, (4, 24))
    optimizer = torch.optim.AdamW(source.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        source(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    with torch.no_grad():
        wanted = source(input_ids=tokens).logits.argmax(-1)
    schemes = ("FP8 in blocks", "LLM.int8", "NF4", "GPTQ", "AWQ", "MXFP4", "NVFP4", "MLX", "compressed-tensors")
    for scheme in (*schemes, "Q8_0", "Q4_0"):
        path = tmp_path / scheme
        if scheme in WRITERS:
            saved, _ = quantised(source, WRITERS[scheme])
            save_file({key: tensor.contiguous() for key, tensor in saved.items()}, path)
        else:
            write_gguf(source, path, scheme)
        model = transformers.LlamaForCausalLM(config)
        assert not autoalign.load(model, path).missing_keys, scheme
        with torch.no_grad():
            got = model(input_ids=tokens).logits.argmax(-1)
        assert (got == wanted).float().mean() > 0.9, scheme


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_load_in_any_scheme_takes_memory_for_pieces_of_a_tensor_alone() -> None:
    """Some 20 MiB, whatever its size; with its codes and its values, a tensor of 48 MiB would take 54 to 72."""
    code = 'import json\nfrom benchmarks.speed.dequantise import peaks\nprint(json.dumps(list(peaks(3072, ["load"]))))'
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # memory is given back when it is free
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    measured = json.loads(done.stdout)
    assert len(measured) == 20
    assert not [(name, peak) for name, (peak,) in measured if peak > 42 * 2**20]
