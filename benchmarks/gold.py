"""The gold cases that may lie beside this project: real pairs with an expression for every target tensor."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import autoalign
from autoalign.matches import Match

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "alignbench"


@dataclass(frozen=True, slots=True)
class GoldCase:
    """Two filled state dicts; a case too large to fill is on meta, and judged by the keys that a match reads."""

    name: str
    group: str
    source: dict[str, Tensor]
    target: dict[str, Tensor]
    expressions: Mapping[str, Mapping[str, Any] | None]  # for each target key that counts
    on_meta: bool

    @property
    def gold_count(self) -> int:
        return sum(expression is not None for expression in self.expressions.values())

    def is_right(self, match: Match, alignment: autoalign.Alignment) -> bool:
        """Judge a match of ``align(source, target)``, proposed or loaded."""
        expression = self.expressions[match.target]
        if expression is None:
            return False
        if self.on_meta:
            return bool(set(match.sources) == scorer().gold_sources(expression))
        return self.is_value_right(match.target, alignment.tensor(match))

    def is_value_right(self, key: str, tensor: Tensor) -> bool:
        """Compare a tensor with the gold one."""
        expression = self.expressions[key]
        if expression is None:
            return False
        gold = scorer().evaluate(expression, self.source, list(self.target[key].shape))
        return bool(scorer().same(tensor, gold))


def is_available() -> bool:
    """Tell whether the cases lie beside this project."""
    return (FOLDER / "score.py").is_file()


def paths() -> list[Path]:
    """List the cases' files; empty without them."""
    return sorted((FOLDER / "cases").glob("*.json.gz"))


def gold_cases(only: str = "") -> Iterator[GoldCase]:
    """Read the cases whose name contains a text, one at a time."""
    return (read(path) for path in paths() if only in path.name)


def read(path: Path) -> GoldCase:
    """Read one case and fill it as the cases' own scoring script does, with ties as a model has them."""
    case = json.loads(gzip.decompress(path.read_bytes()))
    elements = sum(prod(shape) for side in ("source", "target") for _, shape, _ in case[side])
    on_meta = elements > scorer().METADATA_ONLY
    source, target = (
        {key: _tensor(key, shape, dtype, side, on_meta) for key, shape, dtype in case[side]}
        for side in ("source", "target")
    )
    for first, *aliases in [] if on_meta else case.get("tied_source", []):
        source.update(dict.fromkeys(aliases, source[first]))
    first_of: dict[str, str] = {}
    for key, expression in case["gold"].items():
        if expression and "copy" in expression and key in target:
            target[key] = target[first_of.setdefault(expression["copy"], key)]
    ignored = set(case.get("dont_care", []))
    expressions = {key: case["gold"].get(key) for key in target if key not in ignored}
    return GoldCase(case["name"], scorer().group(case), source, target, expressions, on_meta)


@cache
def scorer() -> ModuleType:
    """The cases' own scoring script, as a module."""
    spec = importlib.util.spec_from_file_location("alignbench_score", FOLDER / "score.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _tensor(key: str, shape: list[int], dtype: str, side: str, on_meta: bool) -> Tensor:
    if on_meta:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    filled: Tensor = scorer().fill(key, shape, dtype, side)
    return filled
