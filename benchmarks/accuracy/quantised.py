"""A small Llama, quantised by the field's own libraries and loaded into the plain model: are its answers the same?

It is trained for a minute on a language of rules and chance, in which most words follow from the three before. Each
library quantises every projection of it (``tests.checkpoints.formats.writing``), and the file is loaded with autoalign.
Shown are the largest difference of a value to what the library itself makes of its file, and the share of positions of
new texts for which the most likely word is that of the model before it was quantised.

    python -m benchmarks.accuracy.quantised [SCHEME ...]

Those whose library is not installed are left out; ``GGML_LIBRARY`` names that of llama.cpp.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import autoalign
from tests.checkpoints.formats.writing import WRITERS, Written

WORDS, LENGTH, STEPS = 384, 48, 400
SCHEMES = (
    *("fp8-blocks", "int8-bitsandbytes", "nf4-bitsandbytes", "gptq-4", "gptq-8", "awq", "mxfp4-modelopt"),
    *("gguf-Q4_K", "gguf-Q8_0"),
)


def texts(count: int, seed: int) -> Tensor:
    """Make texts in which a word mostly follows from the three before it."""
    chance = torch.Generator().manual_seed(seed)
    found = torch.randint(0, WORDS, (count, LENGTH), generator=chance)
    for place in range(3, LENGTH):
        first, second, third = (found[:, place - back] for back in (3, 2, 1))
        follows = (first % 4 + 5 * (second % 6) + 31 * (third % 12)) % WORDS
        is_free = torch.rand(count, generator=chance) < 0.1
        found[:, place] = torch.where(is_free, found[:, place], follows)
    return found


def trained() -> Any:
    """Train the model until it predicts most words."""
    transformers: Any = import_module("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": WORDS}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(STEPS):
        batch = texts(16, step)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return model.eval()


def quantised(model: Any, name: str) -> tuple[dict[str, Tensor], dict[str, Written]]:
    """Return what is saved, and what a library made of each projection."""
    saved: dict[str, Tensor] = {}
    written: dict[str, Written] = {}
    for key, tensor in model.state_dict().items():
        if "proj" not in key:
            saved[key] = tensor.clone()
            continue
        written[key] = WRITERS[name][1](tensor.detach().clone())
        saved |= {f"{key.removesuffix('weight')}{part}": value for part, value in written[key].parts.items()}
    return saved, written


def write(saved: dict[str, Tensor], written: dict[str, Written], name: str, folder: Path) -> Path:
    """Write a file of GGUF, or of safetensors with its configuration."""
    if not name.startswith("gguf"):
        save_file({key: tensor.contiguous() for key, tensor in saved.items()}, folder / "model.safetensors")
        config = next(iter(written.values())).config
        (folder / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
        return folder
    gguf: Any = import_module("gguf")
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    for key, tensor in saved.items():
        kind = gguf.GGMLQuantizationType[name.removeprefix("gguf-")] if key in written else None
        writer.add_tensor(key, tensor.numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


def measure(model: Any, name: str) -> tuple[str, float, float]:
    """Return the scheme as autoalign names it, the largest difference of a value, and the share of equal answers."""
    saved, written = quantised(model, name)
    plain = type(model)(model.config).eval()
    with tempfile.TemporaryDirectory() as folder:
        alignment = autoalign.load(plain, write(saved, written, name, Path(folder)), strict=True)
    values = plain.state_dict()
    largest = max(float((values[key] - each.values.float()).abs().max()) for key, each in written.items())
    assert all(torch.equal(values[key], tensor) for key, tensor in model.state_dict().items() if key not in written)
    batch = texts(64, 10**6)
    with torch.no_grad():
        answers = [each(input_ids=batch).logits.argmax(-1)[:, 3:] for each in (model, plain)]
    note = next(note for note in alignment.notes if note.startswith("Dequantised"))
    return note.split(" as ")[1].split(" (")[0], largest, float((answers[0] == answers[1]).float().mean())


def main() -> None:
    """Measure the schemes that are named, or the commonest."""
    warnings.simplefilter("ignore")
    model = trained()
    batch = texts(64, 10**6)
    with torch.no_grad():
        right = model(input_ids=batch[:, :-1]).logits.argmax(-1)[:, 2:] == batch[:, 3:]
    print(f"The model predicts {right.float().mean():.0%} of the words; at most 90 % follow from others.\n")
    print("| file | scheme | largest difference | equal answers, % |\n| --- | --- | ---: | ---: |")
    for name in sys.argv[1:] or SCHEMES:
        try:
            scheme, largest, share = measure(model, name)
        except (ImportError, KeyError) as error:
            print(f"| {name} | not installed: {error} | | |")
            continue
        print(f"| {name} | {scheme} | {largest:.1g} | {100 * share:.1f} |", flush=True)


if __name__ == "__main__":
    main()
