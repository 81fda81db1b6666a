"""The field's own quantisers: what each stores of one weight, and the values that its own library makes of that.

``python -m tests.checkpoints.formats.writing`` writes ``written/`` anew with those that are installed; all of them run
on a CPU. llama.cpp's is its library ``ggml``, at the path in ``GGML_LIBRARY``; that in the package xllamacpp serves.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

WRITTEN = Path(__file__).with_name("written")
ROWS, COLUMNS, GROUP = 32, 64, 32
GGUF = "Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS IQ3_S TQ1_0 TQ2_0 MXFP4"


@dataclass(frozen=True)
class Written:
    """What a library stores of a layer, by the names after its own, and of the values."""

    parts: dict[str, Tensor]
    values: Tensor
    config: dict[str, object] = field(default_factory=dict)  # what stands beside it


def weight(name: str) -> Tensor:
    """Return what is quantised in ``written/``: for GGUF in rows of whole blocks."""
    torch.manual_seed(0)
    columns = 256 if name.startswith("gguf") else COLUMNS
    made = torch.randn(ROWS * COLUMNS // columns, columns)
    made[::5, :GROUP].abs_()  # whose zero points are 0
    return made


def linear(own: Tensor) -> nn.Linear:
    layer = nn.Linear(own.shape[1], len(own), bias=False)
    layer.weight.data = own.clone()
    return layer


def state(layer: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.detach().clone().contiguous() for key, tensor in layer.state_dict().items()}


def rounded(own: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scales and zero points, by outputs and groups of inputs."""
    groups = own.reshape(len(own), -1, GROUP)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2)
    scale = ((high - low) / (2**bits - 1)).half().float()
    return scale, (-low / scale).round()


def gptq(own: Tensor, *, bits: int = 4, form: str = "gptq", order: bool = False) -> Written:
    layers: Any = import_module("gptqmodel.nn_modules.qlinear.torch")
    formats: Any = import_module("gptqmodel.quantization").FORMAT
    rows, columns = own.shape
    places = torch.randperm(columns) if order else torch.arange(columns)
    packed = layers.TorchLinear(
        bits=bits,
        group_size=GROUP,
        sym=False,
        desc_act=order,
        in_features=columns,
        out_features=rows,
        bias=False,
        format=formats(form),
        register_buffers=True,
    )
    packed.pack(linear(own), *rounded(own[:, places], bits), (torch.arange(columns) // GROUP)[places.argsort()].int())
    packed.post_init()
    parts = state(packed)
    packed.scales = packed.scales.float()
    values = packed.dequantize_weight().T
    if form == "gptq":
        convert: Any = import_module("gptqmodel.utils.model").convert_gptq_v2_to_v1_format_module
        convert(packed, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
        parts["qzeros"] = state(packed)["qzeros"]
    return Written(parts, values, {"quant_method": "gptq", "bits": bits, "checkpoint_format": form})


def awq(own: Tensor) -> Written:
    layers: Any = import_module("awq.modules.linear.gemm")
    packing: Any = import_module("awq.utils.packing_utils")
    scale, zero = (part.T.contiguous() for part in rounded(own, 4))
    packed = layers.WQLinear_GEMM.from_linear(linear(own), 4, GROUP, scales=scale, zeros=zero)
    values = packing.dequantize_gemm(packed.qweight, packed.qzeros, packed.scales.float(), 4, GROUP).T
    return Written(state(packed), values, {"quant_method": "awq", "bits": 4, "version": "gemm"})


def awq_of_gptqmodel(own: Tensor, *, bits: int) -> Written:
    layers: Any = import_module("gptqmodel.nn_modules.qlinear.torch_awq")
    sizes = {"in_features": own.shape[1], "out_features": len(own)}
    packed = layers.AwqTorchLinear(bits=bits, group_size=GROUP, sym=False, desc_act=False, **sizes)
    packed.pack(linear(own), *rounded(own, bits))
    parts = state(packed)
    values = layers.dequantize_gemm(
        *(parts[name] for name in ("qweight", "qzeros")), parts["scales"].float(), bits, GROUP
    )
    meta = {"quantizer": [f"gptqmodel:{version('gptqmodel')}"]}
    return Written(parts, values.T, {"quant_method": "awq", "bits": bits, "version": "gemm", "meta": meta})


def modelopt_mxfp4(own: Tensor) -> Written:
    tensors: Any = import_module("modelopt.torch.quantization.qtensor")
    packed, scale = tensors.MXFP4QTensor.quantize(own, 32)
    values = packed.dequantize(torch.float32, scale=scale, block_sizes={-1: 32})
    return Written({"weight": packed._quantized_data, "weight_scale": scale.reshape(len(own), -1)}, values)


def modelopt_nvfp4(own: Tensor) -> Written:
    tensors: Any = import_module("modelopt.torch.quantization.qtensor")
    packed, scale, outer = tensors.NVFP4QTensor.quantize(own, 16)
    values = packed.dequantize(torch.float32, scale=scale, double_scale=outer, block_sizes={-1: 16})
    return Written({"weight": packed._quantized_data, "weight_scale": scale, "weight_scale_2": outer}, values)


def compressed(own: Tensor, *, preset: str) -> Written:
    package: Any = import_module("compressed_tensors.quantization")
    compressors: Any = import_module("compressed_tensors.compressors")
    utils: Any = import_module("compressed_tensors.quantization.utils")
    scheme = package.preset_name_to_scheme(preset, ["Linear"])
    scheme.weights.group_size = scheme.weights.group_size and min(scheme.weights.group_size, GROUP)
    config = package.QuantizationConfig(
        config_groups={"all": scheme}, quantization_status=package.QuantizationStatus.FROZEN
    )
    model = nn.Sequential(linear(own))
    package.apply_quantization_config(model, config)
    layer: Any = model[0]
    layer.weight_scale.data, values = fitted(layer, scheme.weights, utils)
    compressors.ModelCompressor(quantization_config=config).compress_model(model)
    return Written({key.removeprefix("0."): part for key, part in state(model).items()}, values)


def fitted(layer: Any, arguments: Any, utils: Any) -> tuple[Tensor, Tensor]:
    """Return the scales of a layer, and the values that are rounded by them."""
    own, outer = layer.weight.data, None
    if hasattr(layer, "weight_global_scale"):
        outer = utils.generate_gparam(own.min(), own.max())
        layer.weight_global_scale.data = outer
    blocks = own.reshape(len(own), -1, arguments.group_size) if arguments.group_size else own[:, None]
    if arguments.strategy == "tensor":
        blocks = own.reshape(1, -1)
    scale, zero = utils.calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments, global_scale=outer)
    forward: Any = import_module("compressed_tensors.quantization.lifecycle.forward")
    return scale, forward.fake_quantize(own, scale, zero, arguments, global_scale=outer)


def fp8_of_transformers(own: Tensor, *, form: str) -> Written:
    theirs: Any = import_module("transformers.integrations.finegrained_fp8")
    size = min(128, len(own) // 2, own.shape[1] // 4)
    config = SimpleNamespace(weight_block_size=(size, size), scale_fmt=form)
    parts = theirs.Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"weight": own})
    scale = parts["weight_scale_inv"].to(torch.float32)
    return Written(parts, theirs.Fp8Dequantize(None)._dequantize_one(parts["weight"], scale))


def ggml(weight: Tensor, *, name: str) -> Written:
    gguf: Any = import_module("gguf")
    library = ctypes.CDLL(os.environ["GGML_LIBRARY"])
    kind, own = gguf.GGMLQuantizationType[name], weight.numpy()
    block, size = gguf.GGML_QUANT_SIZES[kind]
    codes = np.zeros((len(own), own.shape[1] // block * size), np.uint8)
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (own, codes))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    rows = ctypes.c_int64(len(own)), ctypes.c_int64(own.shape[1])
    assert library.ggml_quantize_chunk(int(kind), *pointers, ctypes.c_int64(0), *rows, None) == codes.size
    values = np.zeros_like(own)
    dequantise = library["dequantize_row_" + name.lower().replace("_k", "_K")]
    dequantise(ctypes.c_void_p(codes.ctypes.data), ctypes.c_void_p(values.ctypes.data), ctypes.c_int64(own.size))
    return Written({"weight": torch.from_numpy(codes)}, torch.from_numpy(values))


def commit_of_ggml() -> str:
    library = ctypes.CDLL(os.environ["GGML_LIBRARY"])
    library.ggml_commit.restype = ctypes.c_char_p
    return str(library.ggml_commit().decode())


def int8_of_bitsandbytes(own: Tensor) -> Written:
    functional: Any = import_module("bitsandbytes.functional")
    codes, scale, _ = functional.int8_vectorwise_quant(own.half())
    return Written({"weight": codes, "SCB": scale}, functional.int8_vectorwise_dequant(codes, scale))


def four_bits_of_bitsandbytes(own: Tensor, *, kind: str, nested: bool = False) -> Written:
    functional: Any = import_module("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(own, quant_type=kind, compress_statistics=nested)
    parts = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return Written({"weight": codes, **parts}, functional.dequantize_4bit(codes, state))


def mlx(own: Tensor, *, bits: int) -> Written:
    core: Any = import_module("mlx.core")
    parts = core.quantize(core.array(own.numpy()), group_size=64, bits=bits)
    values = torch.tensor(np.array(core.dequantize(*parts, group_size=64, bits=bits)))
    names = "weight", "scales", "biases"
    return Written({name: torch.tensor(np.array(part)) for name, part in zip(names, parts, strict=True)}, values)


WRITERS: dict[str, tuple[str, Callable[[Tensor], Written]]] = {
    "gptq-4": ("gptqmodel", partial(gptq, bits=4, form="gptq")),
    "gptq-8": ("gptqmodel", partial(gptq, bits=8, form="gptq")),
    "gptq-3": ("gptqmodel", partial(gptq, bits=3, form="gptq")),
    "gptq-act-order": ("gptqmodel", partial(gptq, bits=4, form="gptq", order=True)),
    "gptq-v2": ("gptqmodel", partial(gptq, bits=4, form="gptq_v2")),
    "gptq-planar": ("gptqmodel", partial(gptq, bits=3, form="gptq_p")),
    "awq": ("autoawq", awq),
    **{f"awq-{bits}": ("gptqmodel", partial(awq_of_gptqmodel, bits=bits)) for bits in (3, 4, 8)},
    "mxfp4-modelopt": ("nvidia-modelopt", modelopt_mxfp4),
    "nvfp4-modelopt": ("nvidia-modelopt", modelopt_nvfp4),
    "mxfp4-compressed": ("compressed-tensors", partial(compressed, preset="MXFP4A16")),
    "nvfp4-compressed": ("compressed-tensors", partial(compressed, preset="NVFP4A16")),
    "int4-compressed": ("compressed-tensors", partial(compressed, preset="W4A16")),
    "fp8-tensor-compressed": ("compressed-tensors", partial(compressed, preset="FP8")),
    "fp8-compressed": ("compressed-tensors", partial(compressed, preset="FP8_DYNAMIC")),
    "int8-compressed": ("compressed-tensors", partial(compressed, preset="W8A8")),
    "fp8-blocks": ("transformers", partial(fp8_of_transformers, form="float")),
    "fp8-blocks-ue8m0": ("transformers", partial(fp8_of_transformers, form="ue8m0")),
    "int8-bitsandbytes": ("bitsandbytes", int8_of_bitsandbytes),
    "nf4-bitsandbytes": ("bitsandbytes", partial(four_bits_of_bitsandbytes, kind="nf4")),
    "fp4-bitsandbytes": ("bitsandbytes", partial(four_bits_of_bitsandbytes, kind="fp4")),
    "nf4-nested-bitsandbytes": ("bitsandbytes", partial(four_bits_of_bitsandbytes, kind="nf4", nested=True)),
    **{f"mlx-{bits}": ("mlx", partial(mlx, bits=bits)) for bits in (3, 4, 8)},
    **{f"gguf-{name}": ("llama.cpp", partial(ggml, name=name)) for name in GGUF.split()},
}


def save(found: Written, folder: Path) -> None:
    """Save a network of that layer and a norm."""
    folder.mkdir(exist_ok=True)
    parts = {f"fc.{name}": part.contiguous() for name, part in found.parts.items()}
    norm = {"norm.weight": torch.ones(found.values.shape[1])}
    if folder.name.startswith("gguf"):
        gguf: Any = import_module("gguf")
        writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
        kind = gguf.GGMLQuantizationType[folder.name.removeprefix("gguf-")]
        writer.add_tensor("fc.weight", parts["fc.weight"].numpy(), raw_dtype=kind)
        writer.add_tensor("norm.weight", norm["norm.weight"].numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return
    save_file(parts | norm, folder / "model.safetensors")
    if found.config:
        (folder / "config.json").write_text(json.dumps({"quantization_config": found.config}) + "\n")


def write_experts() -> None:
    """Write a small GPT-OSS with its experts in MXFP4, by ModelOpt's examples/gpt-oss, which must be on the path."""
    sys.modules["utils"] = SimpleNamespace(get_original_huggingface_quant_method=None)  # type: ignore[assignment] # of its trainer
    converter: Any = import_module("convert_oai_mxfp4_weight_only")
    transformers: Any = import_module("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 32, "head_dim": 16}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, **counts, num_experts_per_tok=2))
    folder = WRITTEN / "mxfp4-experts"
    converter.convert_and_save(model.bfloat16(), SimpleNamespace(save_pretrained=lambda _: None), str(folder))


def main() -> None:
    """Write what can be written here anew."""
    file, listed = WRITTEN / "values.npz", WRITTEN / "versions.json"
    values = dict(np.load(file)) if file.is_file() else {}
    versions = json.loads(listed.read_text()) if listed.is_file() else {}
    for name, (library, write) in WRITERS.items():
        try:
            found = write(weight(name))
        except (ImportError, KeyError) as error:
            print(f"{name} is left as it is: {error!r}")
            continue
        save(found, WRITTEN / name)
        values[name] = found.values.float().numpy()
        versions[library] = version(library) if library != "llama.cpp" else commit_of_ggml()
    np.savez_compressed(file, **values)
    listed.write_text(json.dumps(versions, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
