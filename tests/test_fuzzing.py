"""Public calls over made-up keys, shapes, options and files raise errors of ours alone, and what they give holds."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import autoalign
from autoalign import Alignment
from tests.fuzzing import run

DEEP = ".".join(f"m{index % 7}" for index in range(3000))
KEYS = {
    "490 components": ".".join(f"m{index % 7}" for index in range(490)),
    "3,000 components": DEEP,
    "3,000 components in another network": ".".join(f"b{index % 5}" for index in range(3000)),
    "5,000 digits": "layers." + "1" * 5000,
    "5,000 digits in a word": "fc" + "9" * 5000 + ".proj",
}


@pytest.mark.parametrize("chunk", range(10))
def test_nothing_but_errors_of_ours(chunk: int, tmp_path: Path) -> None:
    faults = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(50 * chunk, 50 * chunk + 50):
            folder = tmp_path / str(seed)
            folder.mkdir()
            faults += run(seed, folder).faults
    assert faults == []


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("other", ["the same", "another prefix", "other names"])
def test_keys_of_any_length_go_through_every_call(name: str, other: str, tmp_path: Path) -> None:
    base, leaves = KEYS[name], [f"fc{index}.{leaf}" for index in range(3) for leaf in ("weight", "bias")]
    prefixes = {"the same": (base, base), "another prefix": (f"net.{base}", base), "other names": (base, "x.y")}[other]
    source, target = (
        {f"{prefix}.{leaf}": torch.rand(4 + place, 3) for place, leaf in enumerate(leaves)} for prefix in prefixes
    )
    alignment = autoalign.align(source, target)
    assert len(alignment.matches) == len(leaves)
    assert "6 of 6 target tensors are filled" in str(alignment)
    assert str(alignment.explain(alignment.matches[0].target))
    alignment.to_html(tmp_path / "a.html")
    alignment.to_networkx()
    alignment.save(tmp_path / "a.json")
    assert Alignment.read(tmp_path / "a.json").to_dict() == alignment.to_dict()
    rules = alignment.rules()
    made = rules.apply(source)
    assert all(torch.equal(made[key], tensor) for key, tensor in alignment.state_dict().items())
    assert rules.to_python()
    assert alignment.inverse().state_dict().keys() == source.keys()
    autoalign.convert(source, target, tmp_path / "c.safetensors")
    assert set(autoalign.open_checkpoint(tmp_path / "c.safetensors")) == set(target)
