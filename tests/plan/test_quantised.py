"""Quantised tensors are left out and named with their scheme; into the same scheme they are copied as they are."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import autoalign
from autoalign.cli.app import main
from autoalign.errors import (
    IncompatibleTensorsError,
    InputError,
    NothingLoadedError,
    PairMismatchError,
    PartialLoadWarning,
    PatternError,
    RulesError,
)
from autoalign.plan.operations import output_shapes
from autoalign.plan.quantised import _divides, groups_of
from autoalign.plan.specs import TensorSpec, specs_of

WIDTH, HIDDEN, WORDS = 256, 512, 384

Layout = Callable[[int, int], dict[str, Tensor]]  # of a layer's outputs and inputs, to what is saved of its weight


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(WIDTH)
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, WIDTH // 2, bias=False)
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


def codes(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randint(0, 120, shape).to(dtype)


def fp8(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns).to(torch.float8_e4m3fn)


def fp8_in_blocks(rows: int, columns: int) -> dict[str, Tensor]:
    return {".weight": fp8(rows, columns), ".weight_scale_inv": torch.rand(-(-rows // 128), columns // 128)}


def fp8_in_blocks_of_another_name(rows: int, columns: int) -> dict[str, Tensor]:
    return {".weight": fp8(rows, columns), ".scale": torch.rand(-(-rows // 128), columns // 128)}


def fp8_by_row(rows: int, columns: int) -> dict[str, Tensor]:
    return {".weight": fp8(rows, columns), ".weight_scale": torch.rand(rows, 1)}


def fp8_by_tensor(rows: int, columns: int) -> dict[str, Tensor]:
    return {".weight": fp8(rows, columns), ".input_scale": torch.rand(()), ".weight_scale": torch.rand(())}


def fp8_scale_first(rows: int, columns: int) -> dict[str, Tensor]:
    return {".scale_weight": torch.rand(1), ".weight": fp8(rows, columns)}


def int8_of_bitsandbytes(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        ".weight": codes((rows, columns), torch.int8),
        ".SCB": torch.rand(rows),
        ".weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def int8_by_row(rows: int, columns: int) -> dict[str, Tensor]:
    return {".weight": codes((rows, columns), torch.int8), ".weight_scale": torch.rand(rows, 1).bfloat16()}


def four_bits_of_bitsandbytes(name: str) -> Layout:
    def layout(rows: int, columns: int) -> dict[str, Tensor]:
        return {
            ".weight": codes((rows * columns // 2, 1), torch.uint8),
            ".weight.absmax": codes((rows * columns // 64,), torch.uint8),
            ".weight.nested_absmax": torch.rand(-(-rows * columns // 64 // 256)),
            ".weight.nested_quant_map": torch.rand(256),
            ".weight.quant_map": torch.rand(16),
            f".weight.quant_state.bitsandbytes__{name}": codes((97,), torch.uint8),
        }

    return layout


def gptq(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        ".g_idx": torch.arange(columns, dtype=torch.int32) // 128,
        ".qweight": codes((columns // 8, rows), torch.int32),
        ".qzeros": codes((columns // 128, rows // 8), torch.int32),
        ".scales": torch.rand(columns // 128, rows).half(),
    }


def gptq_of_three_bits(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        ".qweight": codes((columns // 32 * 3, rows), torch.int32),
        ".qzeros": codes((columns // 128, rows // 32 * 3), torch.int32),
        ".scales": torch.rand(columns // 128, rows).half(),
    }


def awq(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        ".qweight": codes((columns, rows // 8), torch.int32),
        ".qzeros": codes((columns // 128, rows // 8), torch.int32),
        ".scales": torch.rand(columns // 128, rows).half(),
    }


def mlx(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        ".biases": torch.rand(rows, columns // 64).half(),
        ".scales": torch.rand(rows, columns // 64).half(),
        ".weight": codes((rows, columns // 8), torch.int32).view(torch.uint32),
    }


def mxfp4(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        "_blocks": codes((rows, columns // 32, 16), torch.uint8),
        "_scales": codes((rows, columns // 32), torch.uint8),
    }


def nvfp4(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        ".input_scale": torch.rand(()),
        ".weight": codes((rows, columns // 2), torch.uint8),
        ".weight_scale": torch.rand(rows, columns // 16).to(torch.float8_e4m3fn),
        ".weight_scale_2": torch.rand(()),
    }


def nvfp4_of_compressed_tensors(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        ".weight_global_scale": torch.rand(1),
        ".weight_packed": codes((rows, columns // 2), torch.uint8),
        ".weight_scale": torch.rand(rows, columns // 16).to(torch.float8_e4m3fn),
    }


def compressed_tensors(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        ".weight_packed": codes((rows, columns // 8), torch.int32),
        ".weight_scale": torch.rand(rows, columns // 128).bfloat16(),
        ".weight_shape": torch.tensor([rows, columns]),
        ".weight_zero_point": codes((rows // 8, columns // 128), torch.int32),
    }


def hqq(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        ".W_q": codes((rows * columns // 64 // 2, 64), torch.uint8),
        ".scale": torch.rand(rows * columns // 64, 1).half(),
        ".zero": torch.rand(rows * columns // 64, 1).half(),
    }


def quanto(rows: int, columns: int) -> dict[str, Tensor]:
    return {".weight._data": codes((rows, columns), torch.int8), ".weight._scale": torch.rand(rows, 1)}


def aqlm(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        ".codebooks": torch.rand(1, 256, 1, 8).half(),
        ".codes": codes((rows, columns // 8, 1), torch.int8),
        ".scales": torch.rand(rows, 1, 1, 1).half(),
    }


SCHEMES: dict[Layout, str] = {
    fp8_in_blocks: "FP8 in blocks (weight with weight_scale_inv)",
    fp8_in_blocks_of_another_name: "FP8 in blocks (weight with scale)",
    fp8_by_row: "FP8 by row (weight with weight_scale)",
    fp8_by_tensor: "FP8 by tensor (weight with input_scale, weight_scale)",
    fp8_scale_first: "FP8 by tensor (weight with scale_weight)",
    int8_of_bitsandbytes: "LLM.int8 (weight with SCB, weight_format)",
    int8_by_row: "INT8 by row (weight with weight_scale)",
    four_bits_of_bitsandbytes("nf4"): "NF4 (weight with absmax, nested_absmax, nested_quant_map, quant_map, "
    "quant_state.bitsandbytes__nf4)",
    four_bits_of_bitsandbytes("fp4"): "FP4 (weight with absmax, nested_absmax, nested_quant_map, quant_map, "
    "quant_state.bitsandbytes__fp4)",
    gptq: "GPTQ (qweight with g_idx, qzeros, scales)",
    gptq_of_three_bits: "GPTQ (qweight with qzeros, scales)",
    awq: "AWQ (qweight with qzeros, scales)",
    mlx: "MLX (weight with biases, scales)",
    mxfp4: "MXFP4 (*_blocks with *_scales)",
    nvfp4: "NVFP4 (weight with input_scale, weight_scale, weight_scale_2)",
    nvfp4_of_compressed_tensors: "NVFP4 (weight_packed with weight_global_scale, weight_scale)",
    compressed_tensors: "compressed-tensors (weight_packed with weight_scale, weight_shape, weight_zero_point)",
    hqq: "packed uint8 in blocks (W_q with scale, zero)",
    quanto: "INT8 by row (_data with _scale)",
    aqlm: "int8 codes of a table (codes with codebooks, scales)",
}
NAMES = [scheme.partition(" (")[0].replace(" ", "-") + f"-{number}" for number, scheme in enumerate(SCHEMES.values())]
every_scheme = pytest.mark.parametrize(("layout", "scheme"), SCHEMES.items(), ids=NAMES)


def renamed(key: str) -> str:
    for ours, theirs in (
        ("embed.", "tok_embeddings."),
        ("layers.", "blocks."),
        ("attn_norm", "attention_norm"),
        ("mlp_norm", "ffn_norm"),
        ("q_proj", "attention.wq"),
        ("k_proj", "attention.wk"),
        ("up_proj", "feed_forward.w_up"),
        ("down_proj", "feed_forward.w_down"),
    ):
        key = key.replace(ours, theirs)
    return key


def state_dict(layout: Layout) -> tuple[dict[str, Tensor], set[str]]:
    """Return what is saved of a quantised network, and the keys of what is quantised."""
    found: dict[str, Tensor] = {}
    quantised: set[str] = set()
    for key, tensor in Network().state_dict().items():
        parts = {key: tensor}
        if "proj" in key:
            parts = {key.removesuffix(".weight") + name: part for name, part in layout(*tensor.shape).items()}
            quantised |= parts.keys()
        found |= parts
    return found, quantised


class Quantised(nn.Module):
    """A network with buffers of the keys, shapes and dtypes of a state dict."""

    def __init__(self, held: dict[str, Tensor]) -> None:
        super().__init__()
        for key, tensor in held.items():
            module: nn.Module = self
            *path, name = key.split(".")
            for component in path:
                if component not in module._modules:
                    module.add_module(component, nn.Module())
                module = module.get_submodule(component)
            module.register_buffer(name, torch.zeros_like(tensor))


@every_scheme
def test_codes_are_left_out_everywhere_and_named_with_their_scheme(
    layout: Layout, scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, quantised = state_dict(layout)
    model = Network()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    text = f"8 tensors quantised as {scheme}"
    with pytest.warns(PartialLoadWarning, match=r"8 keep their values: .*" + re.escape(f"Left out: {text}.")):
        alignment = autoalign.load(model, source, dequantise=False)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key] if "proj" in key else source[key])
    assert set(alignment.unexpected_keys) == quantised
    assert all("proj" in key for key in alignment.missing_keys)
    assert any(text in note and "Without dequantise=False" in note for note in alignment.notes)
    name = scheme.partition(" (")[0]
    assert f"quantised as {name}, and its elements are not values" in " ".join(str(alignment).split())
    assert any(f"quantised as {name}" in line for line in alignment.explain(min(quantised)).why)
    with pytest.raises(IncompatibleTensorsError, match=re.escape(f"Left out: {text}. Load the checkpoint from before")):
        autoalign.load(model, source, strict=True, dequantise=False)

    save_file(source, tmp_path / "a.safetensors")
    aligned = autoalign.align(tmp_path / "a.safetensors", model, dequantise=False)
    assert set(aligned.unexpected_keys) == quantised
    assert not aligned.ambiguous
    assert not [key for key in aligned.rules().apply(source) if "proj" in key and key in before]
    with pytest.warns(PartialLoadWarning, match=re.escape(f"Left out: {text}.")):
        autoalign.convert(tmp_path / "a.safetensors", model, tmp_path / "b.safetensors", dequantise=False)
    assert load_file(tmp_path / "b.safetensors").keys() == {key for key in before if "proj" not in key}
    main(["inspect", str(tmp_path / "a.safetensors")])
    assert f"quantised: {text}" in " ".join(capsys.readouterr().out.split())
    save_file(before, tmp_path / "model.safetensors")
    main(["align", "--no-dequantise", str(tmp_path / "a.safetensors"), str(tmp_path / "model.safetensors")])
    assert f"Left out: {text}" in " ".join(capsys.readouterr().out.split())


@every_scheme
def test_under_other_names_no_code_is_loaded_and_what_is_loaded_is_right(layout: Layout, scheme: str) -> None:
    given, _ = state_dict(layout)
    source = {renamed(key): tensor for key, tensor in given.items()}
    model = Network()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.warns(PartialLoadWarning, match=rf"Left out: 8 tensors quantised as {re.escape(scheme)}"):
        alignment = autoalign.load(model, source, dequantise=False)
    loaded = {match.target for match in alignment.matches}
    assert loaded == {key for key in before if "proj" not in key}
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, source[renamed(key)] if key in loaded else before[key])


@every_scheme
def test_a_wholly_quantised_checkpoint_is_refused_by_its_scheme(layout: Layout, scheme: str) -> None:
    given, quantised = state_dict(layout)
    source = {key: tensor for key, tensor in given.items() if key in quantised}
    model = Network()
    message = re.escape(f"Left out: 8 tensors quantised as {scheme}. Their elements are codes, not values. ")
    with pytest.raises(
        NothingLoadedError, match=message + r"Load the checkpoint from before .* dequantise it first"
    ) as caught:
        autoalign.load(model, source, dequantise=False)
    assert "unrelated" not in str(caught.value)
    with pytest.raises(NothingLoadedError, match=re.escape(f"quantised as {scheme}")):
        autoalign.align(source, model, dequantise=False).raise_if_nothing_matched()


def test_scales_of_square_matrices_belong_to_columns_where_those_of_others_do() -> None:
    """EETQ saves matrices turned, in an order of a GPU, with scales that would fit the rows of the square ones."""

    def eetq(rows: int, columns: int) -> dict[str, Tensor]:
        return {".weight": codes((columns, rows), torch.int8), ".weight_scales": torch.rand(rows).half()}

    source, quantised = state_dict(eetq)
    assert source["layers.0.q_proj.weight"].shape == (WIDTH, WIDTH)
    alignment = autoalign.align(source, Network(), min_confidence=0)
    assert set(alignment.unexpected_keys) == quantised
    alone = {key: tensor for key, tensor in state_dict(int8_by_row)[0].items() if "q_proj" in key}
    assert len(autoalign.align(alone, Network()).matches) == 2


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_columns_may_be_packed_in_words_by_any_number_of_bits(bits: int) -> None:
    """As GPTQModel does for AWQ; of fewer outputs than inputs the words are no part of the scales either way."""
    rows, columns, groups = 128, 256, 8
    specs = [
        TensorSpec("k_proj.qweight", (columns, rows * bits // 32), torch.int32),
        TensorSpec("k_proj.qzeros", (groups, rows * bits // 32), torch.int32),
        TensorSpec("k_proj.scales", (groups, rows), torch.float16),
    ]
    found = groups_of(specs)
    assert found.keys() == {spec.key for spec in specs}
    group = found["k_proj.qweight"].group
    assert (group.scheme, group.is_whole) == ("AWQ", True)
    config = {"quantization_config": {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}}
    operation = group.dequantise({}, config)
    assert operation is not None
    assert output_shapes(operation, [spec.shape for spec in group.specs]) == [(rows, columns)]


@pytest.mark.parametrize("name", ["_weight_qdata", "weight_packed", "weight_codes", "qweight", "weight"])
def test_the_values_of_a_weight_have_its_name(name: str) -> None:
    """By which its layout is told: squares under other names are taken for turned ones."""
    torch.manual_seed(0)
    model = Network()
    source = {key: tensor for key, tensor in model.state_dict().items() if "proj" not in key}
    scale_name = name.replace("qdata", "scale") if "qdata" in name else "weight_scale"
    for key, tensor in model.state_dict().items():
        if "proj" in key:
            scale = tensor.abs().amax(1, keepdim=True) / 127
            source[key.replace("weight", name)] = (tensor / scale).round().to(torch.int8)
            source[key.replace("weight", scale_name)] = scale
    alignment = autoalign.align(source, model)
    values = alignment.state_dict()
    assert values.keys() == model.state_dict().keys()
    assert all(torch.allclose(values[key], tensor, atol=0.05) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("layout", [hqq, aqlm])
def test_a_scheme_whose_values_are_not_known_is_left_out(layout: Layout) -> None:
    source, quantised = state_dict(layout)
    alignment = autoalign.align(source, Network())
    assert set(alignment.unexpected_keys) == quantised
    assert any(f"Left out: 8 tensors quantised as {SCHEMES[layout]}" in note for note in alignment.notes)


@every_scheme
def test_into_the_same_scheme_all_is_copied_as_it_is(layout: Layout, scheme: str, tmp_path: Path) -> None:
    source, _ = state_dict(layout)
    saved = {f"module.{key}": tensor for key, tensor in source.items()}
    target = {key: torch.zeros_like(tensor) for key, tensor in source.items()}
    alignment = autoalign.convert(saved, target, tmp_path / "a.safetensors", strict=True, dtype=torch.bfloat16)
    for key, tensor in load_file(tmp_path / "a.safetensors").items():
        assert torch.equal(tensor, source[key] if "proj" in key else source[key].bfloat16())
        assert "proj" not in key or tensor.dtype == source[key].dtype
    assert not [note for note in alignment.notes if "quantised" in note], scheme
    if any(f"{key}." in other for key in source for other in source):
        return  # such as "weight" beside "weight.absmax", which modules have by hooks alone
    model = Quantised(source)
    autoalign.load(model, saved, strict=True)
    assert all(torch.equal(tensor, source[key]) for key, tensor in model.state_dict().items())


# torch's own


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:UserWarning:torch")
@pytest.mark.parametrize("saved", [False, True])
def test_layers_that_torch_quantised_are_dequantised_or_left_out(saved: bool, tmp_path: Path) -> None:
    from torch.ao.nn.quantized import Conv2d, Linear

    conv: Any = Conv2d(3, 8, 3)  # type: ignore[no-untyped-call]
    fc: Any = Linear(8, 4)  # type: ignore[no-untyped-call]
    scales, zeros = torch.rand(8).double(), torch.zeros(8, dtype=torch.int64)
    kernel = torch.quantize_per_channel(torch.randn(8, 3, 3, 3), scales, zeros, 0, torch.qint8)
    conv.set_weight_bias(kernel, torch.rand(8))
    fc.set_weight_bias(torch.quantize_per_tensor(torch.randn(4, 8), 0.02, 0, torch.qint8), torch.rand(4))
    held = nn.ModuleDict({"conv": conv, "fc": fc}).state_dict()
    held["norm.weight"] = torch.rand(8)
    torch.save(held, tmp_path / "a.pt")
    source: Any = tmp_path / "a.pt" if saved else held
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3), "fc": nn.Linear(8, 4), "norm": nn.RMSNorm(8)})
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.warns(PartialLoadWarning, match=r"Left out: 2 tensors quantised as torch's qint8"):
        left_out = autoalign.load(model, source, min_confidence=0, dequantise=False)
    assert {"conv.scale", "conv.zero_point", "fc.scale", "fc.zero_point"} < set(left_out.unexpected_keys)
    assert {"conv.weight", "fc.weight", "fc.bias"} < set(left_out.unexpected_keys)
    for key in ("conv.weight", "fc.weight", "fc.bias"):
        assert torch.equal(model.state_dict()[key], before[key])
    alignment = autoalign.load(model, source, strict=True)
    wanted = {"conv.weight": conv.weight().dequantize(), "fc.weight": fc.weight().dequantize()}
    wanted |= {"conv.bias": conv.bias(), "fc.bias": fc.bias(), "norm.weight": held["norm.weight"]}
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in model.state_dict().items())
    alignment.save(tmp_path / "a.json")
    assert autoalign.Alignment.read(tmp_path / "a.json").applied_to(source, model) == alignment
    with pytest.warns(PartialLoadWarning, match=r"keep their values: conv.weight"):
        into = autoalign.load(nn.ModuleDict({"conv": conv, "fc": fc, "norm": nn.RMSNorm(8)}), model)
    assert not {match.target for match in into.matches} & {"conv.weight", "fc.weight", "fc.bias"}


# Stacks, other schemes, parts


def test_stacked_experts_share_the_stem_of_their_names() -> None:
    experts, width = 4, 64
    source = {
        "mlp.router.weight": torch.rand(experts, width),
        "mlp.experts.gate_up_proj_bias": torch.rand(experts, 2 * width),
        "mlp.experts.gate_up_proj_blocks": codes((experts, 2 * width, width // 32, 16), torch.uint8),
        "mlp.experts.gate_up_proj_scales": codes((experts, 2 * width, width // 32), torch.uint8),
        "mlp.experts.down_proj_blocks": codes((experts, width, width // 32, 16), torch.uint8),
        "mlp.experts.down_proj_scales": codes((experts, width, width // 32), torch.uint8),
        "mlp.experts.w1": codes((experts, width, width), torch.int8),
        "mlp.experts.w1_scale": torch.rand(experts, width),
        "mlp.experts.w2": torch.rand(experts, width, width),
        "mlp.experts.w2_scale": torch.rand(experts, width),
    }
    found = groups_of(specs_of(source))
    assert found.keys() == {key for key in source if re.search(r"_(blocks|scales)$|w1", key)}
    assert {member.group.names for member in found.values()} == {
        "*_blocks with *_scales",
        "* with *_scale",
    }


def test_another_scheme_takes_no_codes_and_values_go_into_no_codes() -> None:
    source, quantised = state_dict(int8_of_bitsandbytes)
    for layout in (fp8_in_blocks, int8_by_row, gptq):
        target, theirs = state_dict(layout)
        alignment = autoalign.align(source, target)
        if layout is int8_by_row:  # the same scheme, with the scales in another shape
            assert not [match for match in alignment.matches if match.target.endswith("scale")]
        assert set(alignment.unexpected_keys) == quantised
        assert set(alignment.missing_keys) == theirs
        assert any(note.startswith("Not filled: 8 tensors quantised as") for note in alignment.notes)
    values = Network().state_dict()
    alignment = autoalign.align(values, source)
    assert set(alignment.missing_keys) == quantised
    assert set(alignment.unexpected_keys) == {key for key in values if "proj" in key}


def test_codes_do_not_go_without_their_scales() -> None:
    source, quantised = state_dict(fp8_in_blocks)
    target = {key: torch.zeros_like(tensor) for key, tensor in source.items()}
    lost = "layers.0.q_proj.weight_scale_inv"
    target[lost] = torch.zeros(256, 1)  # of another reach
    alignment = autoalign.align(source, target)
    assert set(alignment.missing_keys) == {lost, "layers.0.q_proj.weight"}
    alignment = autoalign.align(source, {**source}, exclude=lost)
    assert set(alignment.missing_keys) == {lost, "layers.0.q_proj.weight"}
    alignment = autoalign.align(source, Network(), exclude="weight_scale_inv")  # that makes no values of codes
    assert set(alignment.unexpected_keys) == quantised


def test_rules_make_no_values_of_codes() -> None:
    source, _ = state_dict(fp8_in_blocks)
    model = Network()
    given = {f"old.{key}": tensor for key, tensor in source.items()}
    with pytest.warns(PartialLoadWarning, match=r"8 keep their values"):
        autoalign.load(model, given, rules={r"^old\.": ""}, dequantise=False)
    key = "layers.0.q_proj.weight"
    with pytest.raises(
        PatternError, match=rf"fill '{key}' from 'old.{key}', but 'old.{key}' is quantised as FP8 in blocks"
    ):
        autoalign.load(model, given, rules=[(f"old.{key}", key)], dequantise=False)
    with pytest.raises(PatternError, match=r"'old.layers.0.q_proj.weight_scale_inv' is quantised as FP8 in blocks"):
        autoalign.load(model, given, rules=[(f"old.{key}_scale_inv", key)])
    assert autoalign.load(model, given, rules=[(f"old.{key}", key)]).explain(key).status == "matched"
    fused = {"q.weight": torch.rand(128, 256), "k.weight": torch.rand(128, 256), "v.weight": torch.rand(128, 256)}
    rules = autoalign.align(fused, {"qkv.weight": torch.empty(384, 256)}).rules()
    coded = {f"{name}{part}": value for name in "qkv" for part, value in fp8_in_blocks(128, 256).items()}
    with pytest.raises(
        RulesError, match=r"q.weight \[128, 256\] float8_e4m3fn is quantised as FP8 in blocks: .*concatenate"
    ):
        rules.apply(coded)


def test_an_alignment_that_takes_codes_for_values_is_not_applied() -> None:
    source = {"fc.weight": torch.rand(8, 4), "fc.scale": torch.rand(8)}
    alignment = autoalign.align(source, {"fc.weight": torch.empty(8, 4), "fc.scale": torch.empty(8)})
    source["fc.weight"] = codes((8, 4), torch.int8)
    with pytest.raises(PairMismatchError, match=r"takes codes for values: .*fc.weight. Nothing was loaded"):
        alignment.applied_to(source, {"fc.weight": torch.empty(8, 4), "fc.scale": torch.empty(8)})


def test_a_model_with_codes_is_not_given_another_dtype() -> None:
    source, _ = state_dict(fp8_in_blocks)
    model = Quantised(source)
    with pytest.raises(InputError, match=r"dtype= would change the codes .* layers.0.q_proj.weight \(FP8 in blocks\)"):
        autoalign.load(model, source, dtype=torch.bfloat16)
    assert model.state_dict()["layers.0.q_proj.weight"].dtype == torch.float8_e4m3fn


def test_small_floats_and_integers_of_their_own_are_values() -> None:
    """Learned scales beside weights of eight bits, integer tables, masks and counters make nothing quantised."""
    held = {
        "logit_scale": torch.ones(()),
        "fc.weight": fp8(64, 32),
        "fc.scale": torch.ones(64),
        "cosine.weight": fp8(64, 32),
        "cosine.scale": torch.ones(()),
        "norm.scale": torch.ones(64).to(torch.float8_e4m3fn),
        "cast.weight": fp8(64, 32),
        "cast.weight_scale": torch.ones(64, 1).to(torch.float8_e4m3fn),
        "conv.weight_g": torch.ones(64, 1),
        "conv.weight_v": fp8(64, 32),
        "attn.logit_scale": torch.ones(4, 1, 1),
        "attn.relative_position_index": torch.zeros(49, 49, dtype=torch.int32),
        "attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "attn.scale": torch.ones(8),
        "block.layer_scale_1": torch.ones(64),
        "block.layer_scale_1.gamma": torch.ones(64),
        "bn.num_batches_tracked": torch.zeros((), dtype=torch.int32),
        "bn.weight": torch.ones(64),
        "quant.codebook": torch.ones(512, 64),
        "quant.codes": torch.zeros(16, dtype=torch.int32),
        "fake.weight": torch.ones(64, 32),
        "fake.weight_scale": torch.ones(64),
        "fake.weight_zero_point": torch.zeros(64, dtype=torch.int32),
        "fake.observer_enabled": torch.ones(1, dtype=torch.uint8),
    }
    assert not groups_of(specs_of(held))
    alignment = autoalign.align({f"module.{key}": tensor for key, tensor in held.items()}, held)
    assert not alignment.missing_keys


def test_a_small_float_with_a_learned_scale_is_loaded_as_a_value() -> None:
    source = {"fc.weight": fp8(64, 32), "fc.scale": torch.rand(64), "norm.weight": torch.rand(64)}
    target = {key: torch.zeros(tensor.shape) for key, tensor in source.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alignment = autoalign.align(source, target)
    assert alignment.mapping == {key: key for key in source}


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [
        (4, 128, True),  # blocks of 32
        (3, 8, True),  # of 3, 3 and 2
        (5, 8, False),  # of 2: they would be four
        (32, 8, True),  # bytes of eight bits in words
        (24, 8, True),  # four values in each
        (25, 8, False),
        (0, 8, False),
    ],
)
def test_blocks_make_up_a_dimension(count: int, size: int, expected: bool) -> None:
    assert _divides(count, size) is expected
