"""Projections of attention that keep heads apart, and those that join them."""

from __future__ import annotations

from functools import reduce
from pathlib import Path

import pytest
import torch

import autoalign
from autoalign.matching.stacks import unstacked
from autoalign.plan.specs import specs_of
from tests.matching.round_trips import Tensors, aligned_both_ways, linear

_WIDTH, _HEADS, _SIZE, _HIDDEN = 12, 3, 5, 20
_ROLES = ("q", "k", "v")
_INNER = _HEADS * _SIZE


def _joined(*, square: bool = False) -> Tensors:
    inner = _WIDTH if square else _INNER
    tensors = linear("embed", _WIDTH, 7)
    for block in range(3):
        for name in _ROLES:
            tensors |= linear(f"blocks.{block}.attn.{name}", inner, _WIDTH)
        tensors |= linear(f"blocks.{block}.attn.o", _WIDTH, inner)
        tensors |= linear(f"blocks.{block}.fc1", _HIDDEN, _WIDTH) | linear(f"blocks.{block}.fc2", _WIDTH, _HIDDEN)
        tensors |= {f"blocks.{block}.norm.weight": torch.rand(_WIDTH), f"blocks.{block}.norm.bias": torch.rand(_WIDTH)}
    return tensors | linear("head", 4, _WIDTH)


def _apart(joined: Tensors, layout: str, *, biased: bool = True) -> Tensors:
    """Keep heads apart: ``layout`` orders heads (h), their rows (d) and the width (w)."""
    apart = {}
    for key, tensor in joined.items():
        *module, name, leaf = key.split(".")
        if name in _ROLES and leaf == "weight":
            tensor = torch.einsum(f"hdw->{layout}", tensor.reshape(_HEADS, -1, _WIDTH))
        elif name == "o" and leaf == "weight":
            tensor = torch.einsum(f"whd->{layout}", tensor.reshape(_WIDTH, _HEADS, -1))
        elif name in _ROLES and biased:
            tensor = tensor.reshape(_HEADS, -1)
        apart[f"{'.'.join(module)}.{leaf[0].upper()}_{name}" if module[-1:] == ["attn"] else key] = tensor
    return apart


@pytest.mark.parametrize("layout", ["whd", "hwd", "hdw"])
@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_heads_may_be_kept_apart(layout: str, square: bool, biased: bool, tmp_path: Path) -> None:
    joined = _joined(square=square)
    aligned_both_ways(joined, _apart(joined, layout, biased=biased), tmp_path / "a.json")


def test_heads_may_be_kept_apart_in_two_ways(tmp_path: Path) -> None:
    joined = _joined()
    for layout in ("whd", "hdw"):
        aligned_both_ways(_apart(joined, "hwd"), _apart(joined, layout), tmp_path / "a.json")
    same = {key.replace("W_", "weight_"): tensor for key, tensor in _apart(joined, "hwd").items()}
    (alignment, *_) = aligned_both_ways(_apart(joined, "hwd"), same, tmp_path / "a.json")
    assert {str(match.operation) for match in alignment.matches} == {"copy"}


def test_heads_show_that_other_matrices_hold_their_inputs_first() -> None:
    joined = {key: tensor for key, tensor in _joined().items() if not key.endswith("bias") or "norm" in key}
    apart = {}
    for key, tensor in _apart(joined, "hwd").items():
        is_mlp = ".fc" in key
        apart[key.replace(".fc1.weight", ".W_in").replace(".fc2.weight", ".W_out")] = tensor.T if is_mlp else tensor
    loaded = autoalign.align(dict(sorted(apart.items())), joined).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in joined.items() if ".fc" in key)


@pytest.mark.parametrize("layout", ["hwd", "whd"])
def test_matrices_that_stand_as_in_torch_beside_heads_are_copied(layout: str) -> None:
    joined = {key: tensor for key, tensor in _joined(square=True).items() if not key.endswith("bias") or "norm" in key}
    joined |= {"pos.weight": torch.rand(_WIDTH, _WIDTH), "head.weight": torch.rand(_WIDTH, _WIDTH)}
    names = {".fc1.": ".mlp.up.", ".fc2.": ".mlp.down."}
    joined = {reduce(lambda text, pair: text.replace(*pair), names.items(), key): of for key, of in joined.items()}
    for own, other in ((_apart(joined, layout), joined), (joined, _apart(joined, layout))):
        found = {match.target: (match.sources, str(match.operation)) for match in autoalign.align(own, other).matches}
        as_they_are = {key: ((key,), "copy") for key in joined if "attn" not in key}
        assert found | as_they_are == found


def test_heads_that_both_sides_keep_apart_are_copied() -> None:
    """The kernels of one side are no matrices to be turned, since the other side has parameters of their shape."""
    target = {f"h.{n}.attn.{role}": torch.rand(8, 2, 4) for n in range(3) for role in _ROLES}
    target |= {f"h.{n}.ff.{name}": torch.rand(8, 8) for n in range(3) for name in ("weight", "other")}
    source = {key if ".ff" in key else f"{key}.kernel": tensor for key, tensor in target.items()}
    loaded = autoalign.align(source, target).state_dict()
    assert all(torch.equal(loaded[f"h.0.attn.{role}"], target[f"h.0.attn.{role}"]) for role in _ROLES)


def test_what_both_sides_keep_as_it_is_joins_no_heads(tmp_path: Path) -> None:
    joined, relative = _joined(), {f"blocks.{block}.attn.r_kernel": torch.rand(12, 3, 5) for block in range(3)}
    apart = {key: value for key, value in _apart(joined, "whd").items() if "attn" not in key}
    for block in range(3):
        for key, tensor in _apart({k: v for k, v in joined.items() if f"{block}.attn" in k}, "whd").items():
            leaf, name = key.rsplit(".", 1)[1].split("_")
            apart[f"blocks.{block}.attn.{name}/{'kernel' if leaf == 'W' else 'bias'}"] = tensor
        apart[f"blocks.{block}.attn.r/kernel"] = relative[f"blocks.{block}.attn.r_kernel"]
    for alignment in aligned_both_ways(joined | relative, apart, tmp_path / "a.json"):
        assert sum(str(match.operation) == "copy" for match in alignment.matches if "attn.r" in match.target) == 3


def test_heads_that_are_kept_apart_may_be_fused(tmp_path: Path) -> None:
    joined = _joined()
    fused = {}
    for key, tensor in joined.items():
        if ".attn.q." in key:
            fused[key.replace(".q.", ".qkv.")] = torch.cat([joined[key.replace(".q.", f".{role}.")] for role in _ROLES])
        elif not {"k", "v"} & set(key.split(".")):
            fused[key] = tensor
    aligned_both_ways(fused, _apart(joined, "hwd"), tmp_path / "a.json")


def test_heads_of_another_size_are_not_joined() -> None:
    listed = {
        f"attn.heads.{head}.{role}.weight": torch.rand(_SIZE, _WIDTH) for head in range(_HEADS) for role in _ROLES
    }
    joined = {f"attn.{role}.weight": torch.rand(_INNER + 1, _WIDTH) for role in _ROLES}
    specs = specs_of(joined)
    assert unstacked(specs, specs_of(listed)) == (specs, {})


@pytest.mark.parametrize("fused", [True, False])
def test_heads_may_be_modules(fused: bool, tmp_path: Path) -> None:
    """As in the lectures that build a GPT from scratch."""
    joined = _joined()
    apart, whole = {}, {}
    for key, tensor in joined.items():
        *module, name, leaf = key.split(".")
        if name not in _ROLES:
            apart[key] = whole[key] = tensor
            continue
        for head, rows in enumerate(tensor.chunk(_HEADS)):
            role = {"q": "query", "k": "key", "v": "value"}[name]
            apart[f"{'.'.join(module)}.heads.{head}.{role}.{leaf}"] = rows.clone()
        fusing = torch.cat([joined[f"{'.'.join(module)}.{role}.{leaf}"] for role in _ROLES])
        whole |= {f"{'.'.join(module)}.c_attn.{leaf}": fusing} if fused else {key: tensor}
    aligned_both_ways(whole, apart, tmp_path / "a.json")
