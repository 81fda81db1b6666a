"""Memory of loading or converting a quantised file, for each scheme, beyond the plain model that is filled, in MiB.

The file holds two matrices and a norm. What is measured is the most that the anonymous memory of the process grows
during ``load`` and ``convert``, looked at every millisecond. It may be as much as the largest tensor takes in float32,
and 64 MiB; ``load`` takes a few pieces of it alone.

    python -m benchmarks.speed.dequantise [ROWS]
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import autoalign
from tests.memory import peak_of

COLUMNS = 4096
_MMAP_THRESHOLD = -3  # of glibc, as of ``malloc.h``
_WORDS, _HALF, _FP8 = torch.int32, torch.float16, torch.float8_e4m3fn

Parts = dict[str, Tensor]  # by the names after that of the layer


def _bits(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    numbers = torch.randint(0, 64, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8)
    return numbers.view(dtype)


def _four_bits(rows: int, *, nested: bool) -> Parts:
    state: dict[str, object] = {"blocksize": 64, "shape": [rows, COLUMNS]}
    count = rows * COLUMNS // 64
    parts = {"weight": _bits(rows * COLUMNS // 2, 1), "weight.quant_map": torch.rand(16)}
    if nested:
        state |= {"nested_blocksize": 256, "nested_offset": 0.5}
        parts |= {"weight.nested_absmax": torch.rand(count // 256), "weight.nested_quant_map": torch.rand(256)}
    stated = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    absmax = _bits(count) if nested else torch.rand(count)
    return parts | {"weight.absmax": absmax, "weight.quant_state.bitsandbytes__nf4": stated}


def _gptq(rows: int, width: int) -> Parts:
    groups = COLUMNS // 128
    zeros = _bits(groups, rows * width // 32, dtype=_WORDS)
    scales, index = _bits(groups, rows, dtype=_HALF), torch.arange(COLUMNS, dtype=_WORDS) // 128
    codes = _bits(COLUMNS * width // 32, rows, dtype=_WORDS)
    return {"qweight": codes, "qzeros": zeros, "scales": scales, "g_idx": index}


def _awq(rows: int, width: int) -> Parts:
    packed, groups = rows * width // 32, COLUMNS // 128
    codes, zeros = _bits(COLUMNS, packed, dtype=_WORDS), _bits(groups, packed, dtype=_WORDS)
    return {"qweight": codes, "qzeros": zeros, "scales": _bits(groups, rows, dtype=_HALF)}


def _mlx(rows: int, width: int) -> Parts:
    scales, biases = torch.rand(rows, COLUMNS // 64), torch.rand(rows, COLUMNS // 64)
    return {"weight": _bits(rows, COLUMNS * width // 32, dtype=torch.uint32), "scales": scales, "biases": biases}


def cases(rows: int) -> Iterator[tuple[str, Parts, dict[str, object]]]:
    """Yield schemes, what they store of a matrix, and what their configuration says."""
    fp8, int8 = _bits(rows, COLUMNS, dtype=_FP8), _bits(rows, COLUMNS, dtype=torch.int8)
    fp4, column = _bits(rows, COLUMNS // 2), torch.rand(rows, 1)
    by_sixteen = _bits(rows, COLUMNS // 16, dtype=_FP8)
    yield "FP8 in blocks", {"weight": fp8, "weight_scale_inv": torch.rand(rows // 128, COLUMNS // 128)}, {}
    yield "FP8 by row", {"weight": fp8, "weight_scale": column}, {}
    yield "FP8 by tensor", {"weight": fp8, "weight_scale": torch.rand(())}, {}
    yield "MXFP8", {"weight": fp8, "weight_scale": _bits(rows, COLUMNS // 32)}, {}
    yield "INT8 by row", {"weight": int8, "weight_scale": column, "weight_zero_point": int8[:, :1].contiguous()}, {}
    yield "LLM.int8", {"weight": int8, "SCB": column[:, 0].contiguous()}, {}
    yield "NF4", _four_bits(rows, nested=False), {}
    yield "NF4, nested", _four_bits(rows, nested=True), {}
    yield "GPTQ", _gptq(rows, 4), {}
    yield "GPTQ of 8 bits", _gptq(rows, 8), {}
    yield "GPTQ v2 in planes, 3 bits", _gptq(rows, 3), {"quant_method": "gptq", "checkpoint_format": "gptq_p"}
    yield "AWQ", _awq(rows, 4), {}
    yield "AWQ of 8 bits", _awq(rows, 8), {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}
    yield "MLX", _mlx(rows, 4), {}
    yield "MLX of 3 bits", _mlx(rows, 3), {}
    yield "MXFP4", {"weight_packed": fp4, "weight_scale": _bits(rows, COLUMNS // 32)}, {}
    yield "NVFP4", {"weight": fp4, "weight_scale": by_sixteen, "weight_scale_2": torch.tensor(0.5)}, {}
    shape, words = torch.tensor([rows, COLUMNS]), _bits(rows, COLUMNS // 8, dtype=_WORDS)
    packed = {"weight_packed": words, "weight_scale": torch.rand(rows, COLUMNS // 128), "weight_shape": shape}
    yield "compressed-tensors", packed, {}
    yield "GGUF Q4_K", {"weight": _bits(rows, COLUMNS // 256 * 144)}, {}
    yield "GGUF Q8_0", {"weight": _bits(rows, COLUMNS // 32 * 34)}, {}


def _write(folder: Path, scheme: str, parts: Parts, config: dict[str, object]) -> Path:
    norm = torch.ones(COLUMNS)
    if scheme.startswith("GGUF"):
        import gguf

        writer: Any = gguf.GGUFWriter(folder / "a.gguf", "llama")
        for number in range(2):
            kind = gguf.GGMLQuantizationType[scheme.removeprefix("GGUF ")]
            writer.add_tensor(f"layers.{number}.weight", parts["weight"].numpy(), raw_dtype=kind)
        writer.add_tensor("norm.weight", norm.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return folder / "a.gguf"
    saved = {f"layers.{number}.{name}": part.clone() for number in range(2) for name, part in parts.items()}
    save_file(saved | {"norm.weight": norm}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}), encoding="utf-8")
    return folder


def peaks(rows: int, calls: Sequence[str] = ("load", "convert")) -> Iterator[tuple[str, list[int]]]:
    """Yield the bytes beyond the model that each scheme takes in these calls."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(COLUMNS, rows, bias=False) for _ in range(2))
    model = nn.ModuleDict({"layers": layers, "norm": nn.RMSNorm(COLUMNS)})
    for number, (scheme, parts, config) in enumerate(cases(rows)):
        with tempfile.TemporaryDirectory() as folder:
            path = _write(Path(folder), scheme, parts, config)

            def load(path: Path = path) -> None:
                assert not autoalign.load(model, path).missing_keys

            def convert(path: Path = path, folder: str = folder) -> None:
                autoalign.convert(path, model, Path(folder, "out.safetensors"), strict=True, overwrite=True)

            measured = [{"load": load, "convert": convert}[name] for name in calls]
            for call in measured if not number else ():
                call()  # which imports all that it needs
            yield scheme, list(map(peak_of, measured))


def main() -> None:
    """Measure all schemes, with tensors of so many rows."""
    if sys.platform == "linux":  # else what one call freed is kept for the next, and not seen there
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**20)
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 6144
    print(f"| scheme, a tensor of {rows * COLUMNS * 4 >> 20} MiB | load | convert |\n| --- | ---: | ---: |")
    for scheme, found in peaks(rows):
        print(f"| {scheme} | {' | '.join(f'{peak / 2**20:.0f}' for peak in found)} |", flush=True)


if __name__ == "__main__":
    main()
