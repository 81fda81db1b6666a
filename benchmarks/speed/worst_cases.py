"""Time and memory of the inputs that are worst for ``align``, each case in a process of its own.

Nothing but order tells thousands of alike layers apart whose names mean nothing, so that they should be ambiguous, and
soon. Patterns that never end are errors.

    python -m benchmarks.speed.worst_cases                         # all, as a table
    python -m benchmarks.speed.worst_cases "equal layers" 3000     # one measurement, as JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

import autoalign
from autoalign.plan.specs import TensorSpec
from benchmarks.cases.architectures import named_architecture
from benchmarks.cases.changes import changed
from benchmarks.cases.perturbations import on_meta
from benchmarks.speed.memory import peak_bytes

SECONDS_BUDGET = 10.0  # of all processors together
MEMORY_BUDGET = 10**9  # bytes above that before the first call
LIMIT = 120.0  # seconds that a process may take
EXPERTS = 64  # in each stack

Sides = tuple[dict[str, Tensor], dict[str, Tensor]]
LAYERS = {"attn": (16, 16), "up": (32, 16), "down": (16, 32), "norm": (16,)}  # of a block


@dataclass(frozen=True, slots=True)
class Point:
    """One case at one size."""

    case: str
    size: int
    matched: int  # tensors of the target
    ambiguous: int
    cpu_seconds: float
    peak_bytes: int
    error: str = ""

    @property
    def is_within_budget(self) -> bool:
        return self.cpu_seconds <= SECONDS_BUDGET and self.peak_bytes <= MEMORY_BUDGET


def _equal(random: Random, size: int) -> Sides:
    def side() -> dict[str, Tensor]:
        return {f"{_word(random)}.weight": _empty(16, 16) for _ in range(size)}

    return side(), side()


def _nested(random: Random, size: int) -> Sides:
    def side() -> dict[str, Tensor]:
        return {f"{'.'.join(_word(random, 3) for _ in range(4))}.weight": _empty(16, 16) for _ in range(size)}

    return side(), side()


def _thirds(random: Random, size: int) -> Sides:
    apart = {f"{_word(random)}.weight": _empty(8, 8) for _ in range(3 * size)}
    return apart, {f"{_word(random)}.weight": _empty(24, 8) for _ in range(size)}


def _experts(random: Random, size: int) -> Sides:
    """Make experts that are numbered, each with a name of its own, and the stacks that they fill."""
    apart = {
        f"l.{layer}.experts.{expert}.{_word(random)}.weight": _empty(8, 8)
        for layer in range(size)
        for expert in range(EXPERTS)
    }
    return apart, {f"layers.{layer}.{_word(random)}": _empty(EXPERTS, 8, 8) for layer in range(size)}


def _blocks(random: Random, size: int) -> Sides:
    """Make one list of equal blocks, whose layers have other names on both sides, in another order."""
    names, moved = {name: _word(random) for name in LAYERS}, random.sample(list(LAYERS), len(LAYERS))
    return (
        {f"h.{block}.{names[name]}.weight": _empty(*LAYERS[name]) for block in range(size) for name in moved},
        {
            f"net.layers.{block}.{name}.weight": _empty(*shape)
            for block in range(size)
            for name, shape in LAYERS.items()
        },
    )


def _levels(random: Random, size: int) -> Sides:
    """Make modules in each other, with a layer on every level."""

    def side() -> dict[str, Tensor]:
        names = [_word(random, 2) for _ in range(size)]
        return {".".join([*names[: depth + 1], "fc.weight"]): _empty(16, 16 + depth % 7) for depth in range(size)}

    return side(), side()


def _keys(_: Random, size: int) -> Sides:
    """Make layers of numbered experts, three keys each, under other words on both sides."""
    places = [(place // EXPERTS, place % EXPERTS) for place in range(size // 3)]
    shapes = {"gate": ("w1", (32, 16)), "up": ("w3", (32, 16)), "down": ("w2", (16, 32))}
    return (
        {
            f"layers.{n}.ffn.experts.{e}.{own}.weight": _empty(*shape)
            for n, e in places
            for own, shape in shapes.values()
        },
        {
            f"model.blocks.{n}.mlp.experts.{e}.{name}_proj.weight": _empty(*shapes[name][1])
            for n, e in places
            for name in shapes
        },
    )


def _anonymous(name: str) -> Callable[[Random, int], Sides]:
    """Return what makes an architecture's first tensors, and the same with numbers for names in an order at random."""

    def made(random: Random, size: int) -> Sides:
        architecture = named_architecture(name)
        assert architecture is not None
        specs = architecture.specs[:size]
        entries = changed(specs, "anonymous", random)
        source = on_meta(tuple(TensorSpec(entry.key, entry.shape, entry.dtype) for entry in entries))
        return source, on_meta(specs)

    return made


def _long_names(_: Random, size: int) -> Sides:
    return ({f"{'a' * 60}.{place}.weight": _empty(3, place + 1) for place in range(size)},) * 2


CASES: Mapping[str, tuple[Callable[[Random, int], Sides], int]] = {  # and their full size
    "equal layers": (_equal, 3_000),
    "equal nested layers": (_nested, 3_000),
    "thirds of fused layers": (_thirds, 300),
    "experts of stacks": (_experts, 96),
    "blocks of one list": (_blocks, 10_000),
    "levels of nesting": (_levels, 500),
    "keys of experts": (_keys, 300_000),
    "ResNet-152 without names or order": (_anonymous("torchvision.resnet152"), 932),
    "MViTv2-L without names or order": (_anonymous("timm.mvitv2_large"), 1_116),
    "rules that never end": (_long_names, 1_000),
    "exclude that never ends": (_long_names, 1_000),
}
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "rules that never end": {"rules": {r"(a|a)*$": "b"}},
    "exclude that never ends": {"exclude": r"re:(a|a)*$"},
}


def measure(share: float = 1.0) -> Iterator[Point]:
    """Measure every case at a share of its size."""
    for case, (_, size) in CASES.items():
        yield _in_process(case, max(round(size * share), 1))


def measured(case: str, size: int) -> Point:
    """Measure in this process; imports are done before it."""
    one = {"fc.weight": torch.empty(2, 3)}
    autoalign.align(one, {"head.weight": torch.empty(2, 3)})
    source, target = CASES[case][0](Random(size), size)
    before, start = peak_bytes(), time.process_time()
    matched = ambiguous = 0
    try:
        alignment = autoalign.align(source, target, **OPTIONS.get(case, {}))
        matched, ambiguous = len(alignment.matches), len(alignment.ambiguous)
    except autoalign.PatternError:
        assert case in OPTIONS
    return Point(case, size, matched, ambiguous, time.process_time() - start, max(peak_bytes() - before, 0))


def _in_process(case: str, size: int) -> Point:
    command = [sys.executable, "-m", "benchmarks.speed.worst_cases", case, str(size)]
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT, cwd=root)
    except subprocess.TimeoutExpired:
        return Point(case, size, 0, 0, 0.0, 0, "too slow")
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        return Point(case, size, 0, 0, 0.0, 0, lines[-1][:120])
    return Point(**json.loads(done.stdout))


def _word(random: Random, letters: int = 8) -> str:
    return "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=letters))


def _empty(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(asdict(measured(sys.argv[1], int(sys.argv[2])))))
    else:
        from benchmarks.figures.tables import worst_cases_table

        print(*worst_cases_table(list(measure())), sep="\n")
