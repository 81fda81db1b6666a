from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import autoalign
from autoalign.errors import CheckpointError, InputError
from autoalign.loading import diff as module
from autoalign.loading.diff import Difference, diff
from autoalign.reports.changes import Change, left_of

NAN, INF = math.nan, math.inf


def compared(one: Tensor, other: Tensor, **options: float) -> Change:
    (change,) = diff({"a": one}, {"a": other}, **options).changes  # type: ignore[arg-type]
    return change


@pytest.mark.parametrize(
    ("one", "other", "verdict", "mean", "largest", "one_sided"),
    [
        ([1.0, -4.0], [1.0, -3.0], "changed", 0.2, 0.25, 0),
        ([1.0, NAN], [1.0, NAN], "equal", 0, 0, 0),
        ([2.0, NAN], [3.0, NAN], "changed", 0.5, 0.5, 0),
        ([0.0], [-0.0], "close", 0, 0, 0),
        ([1.0, NAN], [1.0, 2.0], "changed", 0, INF, 1),
        ([1.0, 2.0, 3.0], [INF, 2.0, NAN], "changed", 0, INF, 2),
        ([INF, 1.0], [INF, 1.0], "equal", 0, 0, 0),
        ([INF], [-INF], "changed", 0, INF, 1),
        ([0.0, 0.0], [0.0, 0.5], "changed", 1, 1, 0),
        ([1e38, 3e38], [3e38, 1e38], "changed", 1, 2 / 3, 0),
        ([1.0, 1.0], [1.0, 1.0000001], "close", 6e-8, 1.2e-7, 0),
        ([], [], "equal", 0, 0, 0),
    ],
)
def test_changes_are_measured(
    one: list[float], other: list[float], verdict: str, mean: float, largest: float, one_sided: int
) -> None:
    found = compared(torch.tensor(one), torch.tensor(other))
    assert (found.verdict, found.one_sided) == (verdict, one_sided)
    assert [found.mean, found.largest] == pytest.approx([mean, largest], rel=0.02)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.uint64, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]
)
def test_every_dtype_is_compared(dtype: torch.dtype) -> None:
    one, other = torch.tensor([0, 1, 1]).to(dtype), torch.tensor([0, 1, 0]).to(dtype)
    assert compared(one, one.clone()).verdict == "equal"
    assert (compared(one, other).mean, compared(one, other).largest) == (0.5, 1)


def test_large_integers_differ_that_are_equal_when_rounded() -> None:
    assert 0 < compared(torch.tensor([2**62]), torch.tensor([2**62 + 1]), tolerance=0).largest < 1e-15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_close_and_a_small_change_beside_it_is_seen(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    one = torch.randn(64, 64)
    assert compared(one, one.to(dtype)).verdict == "close"
    assert compared(one.to(dtype), one).verdict == "close"
    assert compared(one, (one * 1.02).to(dtype)).verdict == "changed"
    assert compared(one, one.to(dtype), tolerance=0).verdict == ("close" if dtype == torch.float64 else "changed")


def test_large_and_strided_tensors_are_compared_in_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 64)
    monkeypatch.setattr(module, "_COPIED", 64)
    one = torch.arange(3 * 1000.0).reshape(3, 1000).T
    for other in (one.clone(memory_format=torch.contiguous_format), one.clone()):
        assert compared(one, other).verdict == "equal"
        other[-1, -1] += 2999
        found = compared(one, other)
        assert [found.largest, found.mean] == pytest.approx([1.0, 2 / 3000])  # of all values, not of one piece


class Block(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        for name in ("qkv",) if fused else ("query", "key", "value"):
            self.add_module(name, nn.Linear(8, 24 if fused else 8))
        self.add_module("proj" if fused else "dense", nn.Linear(8, 8))


def networks() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Make two state dicts of equal values, one of them fused and transposed."""
    torch.manual_seed(0)
    own = nn.ModuleDict({"layers": nn.ModuleList(Block(False) for _ in range(3)), "head": nn.Linear(8, 5)}).state_dict()
    target = nn.ModuleDict({"h": nn.ModuleList(Block(True) for _ in range(3)), "out": nn.Linear(8, 5)})
    return own, {key: value.clone() for key, value in autoalign.align(own, target).state_dict().items()}


@pytest.mark.parametrize("is_fused_first", [False, True])
def test_what_is_split_or_fused_is_compared_through_the_operation(is_fused_first: bool) -> None:
    own, other = networks()
    sides = (other, own) if is_fused_first else (own, other)
    assert len(other) == 14
    found = diff(*sides)
    assert found.equal
    assert str(found).startswith(f"{len(sides[1])} equal\n")
    other["h.2.qkv.weight"][8:16] *= 1.03
    found = diff(*sides)
    (changed,) = (change for change in found.changes if change.verdict == "changed")
    assert changed.target == ("layers.2.key.weight" if is_fused_first else "h.2.qkv.weight")
    assert changed.mean == pytest.approx(0.03, rel=0.1) if is_fused_first else 0.001 < changed.mean < 0.03
    assert not found.equal


def test_dequantised_values_are_compared() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 8)
    scale = weight.abs().amax() / 448
    coded = {"a.weight": (weight / scale).to(torch.float8_e4m3fn), "a.weight_scale": scale.reshape(1)}
    (change,) = diff(coded, {"a.weight": weight}).changes
    assert change.sources == ("a.weight", "a.weight_scale")
    assert change.verdict == "close"  # rounding to float8
    assert 0.01 < change.mean < 0.06


def test_what_is_ambiguous_or_of_another_shape_is_never_compared() -> None:
    first = {f"h.{i}.{name}.weight": torch.ones(4) for i in range(3) for name in "ab"}
    second = {f"h.{i}.{name}.weight": torch.zeros(4) for i in range(3) for name in ("one", "two")}
    second |= {"new.bias": torch.ones(7)}
    found = diff(first, second)
    assert found.changes == ()
    assert repr(found) == "<Difference: nothing to compare, 6 ambiguous, 1 only in the second>"
    assert [spec.key for spec in left_of(found.alignment)["only_second"]] == ["new.bias"]
    alignment = found.alignment.decided(found.alignment.choices[0].options[0])
    assert {change.mean for change in diff(first, second, alignment=alignment).changes} == {1.0}


def test_what_is_of_another_shape_is_listed() -> None:
    own, other = networks()
    other |= {"out.weight": torch.ones(7, 8), "out.bias": torch.ones(7)}
    found = diff(own, other)
    assert repr(found) == "<Difference: 12 equal, 2 of other shapes>"
    assert [item["key"] for item in found.to_dict()["mismatched"]] == ["out.weight", "out.bias"]
    assert not found.equal


def test_excluded_keys_are_no_difference() -> None:
    first, second = {"fc.bias": torch.ones(3), "a.bias": torch.ones(2)}, {"a.bias": torch.ones(2)}
    assert not diff(first, second).equal
    assert diff(first, second, exclude="fc").equal
    assert "1 excluded" in repr(diff(first, second, exclude="fc"))


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(0, 2)),
    st.dictionaries(st.sampled_from("abcd"), st.integers(0, 2)),
)
def test_every_key_is_counted_once(one: dict[str, int], other: dict[str, int]) -> None:
    first, second = ({f"{k}.bias": torch.full((ord(k),), v) for k, v in side.items()} for side in (one, other))
    found, left = (
        diff(first, second),
        [spec.key for specs in left_of(diff(first, second).alignment).values() for spec in specs],
    )
    keys = [key for change in found.changes for key in (change.target, *change.sources)]
    proposed = [key for match in found.alignment.ambiguous for key in match.sources]
    assert sorted([*keys, *left, *proposed]) == sorted([*first, *second])
    for change in found.changes:
        assert (change.verdict == "equal") == torch.equal(first[change.sources[0]], second[change.target])


def test_files_are_compared_and_the_result_is_json(tmp_path: Path) -> None:
    model, other = timm.create_model("resnet18"), timm.create_model("resnet18")
    other.load_state_dict(model.state_dict())
    nn.init.constant_(other.layer4[1].conv2.weight, NAN)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in other.state_dict().items()}}, tmp_path / "b.pth")
    seen: list[tuple[int, int]] = []
    found = diff(tmp_path / "a.safetensors", tmp_path / "b.pth", progress=lambda *step: seen.append(step))
    assert seen == [(done, 122) for done in range(1, 123)]
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["counts"] == {"equal": 121, "close": 0, "changed": 1}
    (worst,) = (block for block in data["blocks"] if block["verdict"] == "changed")
    assert (worst["second"], worst["largest"]) == ("module.layer4", "inf")
    assert f"{512 * 512 * 9:,} values are NaN or infinite on one side only" in found.render(width=200)
    found.to_html(tmp_path / "page.html")
    assert "<title>a.safetensors → b.pth</title>" in (tmp_path / "page.html").read_text("utf-8")


def test_equal_names_are_not_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    state_dict = timm.create_model("resnet18").state_dict()

    def search(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("autoalign.matching.match.match_sides", search)
    assert diff(state_dict, {key: value.clone() for key, value in state_dict.items()}).equal


def test_calls_that_cannot_be_meant(tmp_path: Path) -> None:
    own: dict[str, Tensor] = {"a": torch.zeros(1)}
    with pytest.raises(InputError, match=r"a of the checkpoint is on the meta device .* Nothing was compared\."):
        diff(own, {"a": torch.zeros(1, device="meta")})
    with pytest.raises(InputError, match=r"a of the checkpoint is on the meta device .* Nothing was compared\."):
        diff({"a": torch.zeros(1, device="meta")}, own)
    with pytest.raises(
        InputError, match=r"diff\(\) got .* 'tolerence'\. Did you mean 'tolerance'\? Nothing was compared"
    ):
        diff(own, own, tolerence=1)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="tolerance=-1 is not a share of values"):
        diff(own, own, tolerance=-1)
    with pytest.raises(InputError, match="alignment= takes an Alignment, not str"):
        diff(own, own, alignment="a")  # type: ignore[arg-type]
    save_file(own, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"was changed after it was opened.* Nothing was compared"):
        diff(
            tmp_path / "a.safetensors", own, progress=lambda *_: (tmp_path / "a.safetensors").write_bytes(b"") and None
        )


def test_a_difference_is_a_value_that_is_not_changed() -> None:
    found = diff({"a": torch.ones(2)}, {"a": torch.ones(2)})
    assert isinstance(found, Difference)
    with pytest.raises(AttributeError):
        found.changes = ()  # type: ignore[misc]
