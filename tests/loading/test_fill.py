from __future__ import annotations

import io
import itertools
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autoalign.api import load
from autoalign.loading import fill as copying
from autoalign.loading.fill import Fill, Progress, copies_in_place, copy_all, progress_of
from autoalign.loading.transaction import memory_of
from autoalign.plan.dequantise import Dequantise
from autoalign.plan.operations import Operation
from tests.plan.test_regions import CASES, Shape, tensors

WITHOUT_A_VIEW = {"flip(dim 1)", "zeros[2] at 1 + concatenate(dim 0)", "resize positions 2x2 -> 3x4 (bicubic)"}


def ignored(_done: int, _size: int) -> None:
    pass


@pytest.mark.parametrize(("operation", "shapes"), CASES, ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_operations_that_move_elements_fill_a_target_in_place(
    operation: Operation, shapes: list[Shape], strided: bool
) -> None:
    sources = tensors(shapes)
    (expected,) = operation.apply(sources)
    target = torch.full_like(expected, -1)
    if strided:  # as in the channels_last format
        target = torch.full([2 * size for size in expected.shape], -1.0)[
            tuple(slice(None, None, 2) for _ in target.shape)
        ]
    fill = copies_in_place(operation, sources, target)
    if fill is None:
        assert str(operation) in WITHOUT_A_VIEW or strided
        return
    assert str(operation) not in WITHOUT_A_VIEW
    assert all(memory_of(part) == memory_of(target) for part, _ in fill.copies)
    copy_all([fill], ignored)
    assert torch.equal(target, expected)


def test_large_copies_are_made_in_several_threads_and_those_of_one_memory_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(copying, "_MIN_PARALLEL_BYTES", 1)
    monkeypatch.setattr(copying, "_BATCH_BYTES", 64)
    targets = [torch.zeros(10) for _ in range(8)]
    fills = [Fill(target, ((target, torch.full((10,), float(place))),)) for place, target in enumerate(targets)]
    twice = [Fill(targets[0], ((targets[0], torch.full((10,), value)),)) for value in (5.0, 6.0, 7.0)]
    steps: list[tuple[int, int]] = []
    copy_all([*fills, *twice], lambda done, size: steps.append((done, size)))
    assert [int(target[0]) for target in targets] == [7, 1, 2, 3, 4, 5, 6, 7]
    assert all(bool((target == target[0]).all()) for target in targets)
    assert steps == sorted(steps)
    assert steps[-1] == (11, 11 * 40)


def large_fills(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], list[Fill]]:
    """Make copies of 0, 1, ... that are worth threads."""
    monkeypatch.setattr(copying, "_MIN_PARALLEL_BYTES", 1)
    monkeypatch.setattr(copying, "_BATCH_BYTES", 64)
    targets = [torch.full((20,), -1.0) for _ in range(16)]
    return targets, [Fill(t, ((t, torch.full((20,), float(place))),)) for place, t in enumerate(targets)]


@pytest.mark.parametrize("allowed", [0, 1, 2])
@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()], ids=repr)
def test_copies_are_made_where_no_more_threads_can_be_started(
    monkeypatch: pytest.MonkeyPatch, allowed: int, error: Exception
) -> None:
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def limited(thread: threading.Thread) -> None:
        if len(started) == allowed:
            raise error
        started.append(thread)
        start(thread)

    targets, fills = large_fills(monkeypatch)
    monkeypatch.setattr(threading.Thread, "start", limited)
    steps: list[int] = []
    copy_all(fills, lambda done, _size: steps.append(done))
    assert [target.tolist() for target in targets] == [[float(place)] * 20 for place in range(16)]
    assert steps == list(range(1, 17))
    assert len(started) == allowed
    assert not any(thread.is_alive() for thread in started)


@pytest.mark.parametrize("is_parallel", [True, False])
def test_all_copies_are_made_even_if_a_step_fails(monkeypatch: pytest.MonkeyPatch, is_parallel: bool) -> None:
    def step(_done: int, _size: int) -> None:
        raise ValueError("the screen is gone")

    targets, fills = large_fills(monkeypatch)
    if not is_parallel:
        monkeypatch.setattr(copying, "_MIN_PARALLEL_BYTES", 10**9)
    with pytest.raises(ValueError, match="the screen is gone"):
        copy_all(fills, step)
    assert [int(target[0]) for target in targets] == list(range(16))


@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."),
        MemoryError(),
    ],
    ids=repr,
)
def test_copies_for_which_there_is_no_memory_are_made_in_parts(
    monkeypatch: pytest.MonkeyPatch, most: int, error: Exception
) -> None:
    copy = Tensor.copy_

    def limited(self: Tensor, other: Tensor) -> Tensor:
        if self.numel() > most:
            raise error
        return copy(self, other)

    source, target = torch.arange(35.0).reshape(5, 7).t(), torch.zeros(7, 5, dtype=torch.float64)
    monkeypatch.setattr(Tensor, "copy_", limited)
    copy_all([Fill(target, ((target, source),))], ignored)
    assert torch.equal(target, source.double())


def test_a_copy_that_fails_otherwise_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []

    def broken(self: Tensor, _other: Tensor) -> Tensor:
        copied.append(self.numel())
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(Tensor, "copy_", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        copy_all([Fill(torch.zeros(8), ((torch.zeros(8), torch.ones(8)),))], ignored)
    assert copied == [8]


def test_an_error_of_a_copy_is_raised_when_the_others_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, fills = large_fills(monkeypatch)
    fills[3] = Fill(targets[3], ((targets[3], torch.zeros(7)),))
    with pytest.raises(RuntimeError, match="must match the size"):
        copy_all(fills, ignored)
    assert [int(target[0]) for target in targets] == [0, 1, 2, -1, *range(4, 16)]


def test_copies_change_versions_and_no_gradients() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    version = parameter._version
    copy_all([Fill(parameter.detach(), ((parameter.detach(), torch.ones(3)),))], ignored)
    assert parameter.tolist() == [1, 1, 1]
    assert parameter._version == version + 1
    assert parameter.requires_grad
    assert parameter.is_leaf


def test_copies_of_other_dtypes_are_casts() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for source, target in itertools.permutations(dtypes, 2):
        given, into = torch.tensor([1.5, -2.0], dtype=source), torch.zeros(2, dtype=target)
        copy_all([Fill(into, ((into, given),))], ignored)
        assert into.tolist() == [1.5, -2]


def test_a_fill_knows_its_size() -> None:
    tensor: Tensor = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert Fill(tensor, ()).size == 2 * prod(tensor.shape)


class Screen(io.StringIO):
    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def shown(
    monkeypatch: pytest.MonkeyPatch, progress: Progress | bool | None, *, terminal: bool, seconds: float = 0
) -> str:
    screen = Screen(terminal=terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_of(progress, 3, 3000, time.perf_counter() - seconds) as step:
        for done in (1, 2, 3):
            step(done, 1000 * done)
    return screen.getvalue()


@pytest.mark.parametrize(
    ("progress", "terminal", "seconds", "expected"),
    [
        (None, True, 0.0, False),
        (None, True, 3.0, True),
        (None, False, 3.0, False),
        (False, True, 3.0, False),
        (True, False, 0.0, True),
        (True, True, 0.0, True),
    ],
)
def test_when_there_is_a_bar(
    monkeypatch: pytest.MonkeyPatch, progress: bool | None, terminal: bool, seconds: float, expected: bool
) -> None:
    text = shown(monkeypatch, progress, terminal=terminal, seconds=seconds)
    assert ("Loading" in text and "3/3 tensors" in text) is expected
    assert bool(text) is expected


def test_a_bar_of_a_load_is_on_stderr_alone(capsys: pytest.CaptureFixture[str]) -> None:
    load(nn.Linear(2, 2), nn.Linear(2, 2), progress=True)
    captured = capsys.readouterr()
    assert "2/2 tensors" in captured.err
    assert captured.out == ""


def test_a_bar_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[str] = []
    made = copying._bar(transient=True)
    monkeypatch.setattr(made, "stop", lambda: stopped.append("stopped"))
    monkeypatch.setattr(copying, "_bar", lambda **_: made)
    with pytest.raises(ValueError, match="now"), progress_of(True, 1, 1, 0.0) as step:  # noqa: PT012
        step(0, 0)
        raise ValueError("now")
    assert stopped == ["stopped"]


def test_a_bar_that_fails_does_not_fail_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Screen):
        def write(self, _text: str) -> int:
            raise BrokenPipeError("nobody reads it")

    monkeypatch.setattr(sys, "stderr", Broken(terminal=True))
    model, source = nn.Linear(2, 1), nn.Linear(2, 1)
    load(model, source.state_dict(), progress=True)
    assert torch.equal(model.weight, source.weight)


_PEAK = """
import sys
from torch import nn
from autoalign import load
from tests.memory import peak_of

model = nn.ModuleDict({f"layer{number}": nn.Linear(4096, 3072, bias=False) for number in range(6)}).bfloat16()
load(model, sys.argv[1])  # imports what it needs
nn.init.zeros_(model["layer0"].weight)
peak = peak_of(lambda: load(model, sys.argv[1], strict=True))
print(peak, all(bool((layer.weight == 0.5).all()) for layer in model.values()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", ["weight_scale_inv", "SCB"])  # whose values cannot fail, and can
def test_dequantised_tensors_are_not_all_in_memory_beside_the_model(tmp_path: Path, name: str) -> None:
    tensors = {}
    for number in range(6):
        dtype, value = (torch.int8, 127) if name == "SCB" else (torch.float8_e4m3fn, 2.0)
        tensors[f"layer{number}.weight"] = torch.full((3072, 4096), value).to(dtype)
        tensors[f"layer{number}.{name}"] = torch.full((3072,), 0.5) if name == "SCB" else torch.full((24, 32), 0.25)
    save_file(tensors, tmp_path / "a.safetensors")
    command = [sys.executable, "-c", _PEAK, str(tmp_path / "a.safetensors")]
    peak, is_right = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert is_right == "True"
    assert int(peak) < 3 * (3 * 2**24)  # half of what all six would take in float32


@pytest.mark.parametrize(("name", "count"), [("weight_scale_inv", 1 + 4), ("SCB", 2 * 4)])
def test_what_cannot_fail_is_dequantised_once(
    name: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of the largest is computed for trial, and values that may be found wrong are all looked at first."""
    source = {}
    for number in range(4):
        codes = torch.randint(-100, 100, (2048, 2560))
        scale = torch.rand(2048, 1 if name == "SCB" else 2560).reshape(2048, -1)[:, 0]
        source[f"layer{number}.weight"] = codes.to(torch.int8 if name == "SCB" else torch.float8_e4m3fn)
        source[f"layer{number}.{name}"] = scale if name == "SCB" else scale[:, None].clone()
    source["layer2." + name][0] = torch.nan
    save_file(source, tmp_path / "a.safetensors")
    model = nn.ModuleDict({f"layer{number}": nn.Linear(2560, 2048, bias=False) for number in range(4)})
    made, values = [], Dequantise.values

    def counted(self: Dequantise, inputs: Mapping[str, Tensor], shape: Shape) -> Tensor:
        if not inputs["codes"].is_meta:
            made.append(prod(shape))
        return values(self, inputs, shape)

    monkeypatch.setattr(Dequantise, "values", counted)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        load(model, tmp_path / "a.safetensors", strict=True)
    assert sum(made) == count * 2048 * 2560
    assert max(made) <= 2**21
    assert "1 tensors of the checkpoint have NaN: layer2.weight (2,560 of 5,242,880)" in str(found[-1].message)
    wanted = source["layer3.weight"].float() * source[f"layer3.{name}"].reshape(-1, 1) / (127 if name == "SCB" else 1)
    torch.testing.assert_close(model.state_dict()["layer3.weight"], wanted)
