"""Alike layers that could trade places: what tells them apart, and what is said where nothing does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoalign
from autoalign.matching import swaps
from autoalign.matching.swaps import Instance

WIDTH, INNER = 48, 80


def block(names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """List the shapes of a transformer's block under other names for its layers."""
    shapes = {
        "norm1": (WIDTH,),
        **{f"self.{role}": (WIDTH, WIDTH) for role in "qkvo"},
        "norm2": (WIDTH,),
        **{f"cross.{role}": (WIDTH, WIDTH) for role in "qkvo"},
        "norm3": (WIDTH,),
        "gate": (INNER, WIDTH),
        "up": (INNER, WIDTH),
        "down": (WIDTH, INNER),
    }
    return {names.get(name, names.get(name.partition(".")[0], "") + name[-2:]): shape for name, shape in shapes.items()}


def network(names: Mapping[str, str], prefix: str, *, in_order: bool) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (100, WIDTH)}
    for depth in range(3):
        shapes |= {f"{prefix}.{depth}.{name}.weight": shape for name, shape in block(names).items()}
    shapes["out.weight"] = (30, WIDTH)
    return {key: torch.empty(shapes[key], device="meta") for key in (shapes if in_order else sorted(shapes))}


PLAIN = {"norm1": "norm1", "norm2": "norm2", "norm3": "norm3", "self": "attn1", "cross": "attn2"}
PLAIN |= {"gate": "ffn.fc_1", "up": "ffn.fc_2", "down": "ffn.proj"}
SPOKEN = {"norm1": "self_attn_norm", "norm2": "cross_attn_norm", "norm3": "mlp_norm", "self": "self_attn"}
SPOKEN |= {"cross": "cross_attn", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
MUTE = {"norm1": "na", "norm2": "nb", "norm3": "nc", "self": "alpha", "cross": "beta"}
MUTE |= {"gate": "m.x", "up": "m.y", "down": "m.z"}


def truth(names: Mapping[str, str], others: Mapping[str, str]) -> dict[str, str]:
    own, other = (list(block(of)) for of in (names, others))
    pairs = {f"h.{n}.{b}.weight": f"layers.{n}.{a}.weight" for n in range(3) for a, b in zip(own, other, strict=True)}
    return pairs | {"embed.weight": "embed.weight", "out.weight": "out.weight"}


@pytest.mark.parametrize("in_order", [False, True])
def test_ordinals_tell_alike_layers_apart(in_order: bool) -> None:
    source, target = network(SPOKEN, "layers", in_order=in_order), network(PLAIN, "h", in_order=True)
    rotated = {"rotary_interleaved": False, "head_dim": 8}  # else queries and keys are ambiguous
    alignment = autoalign.align({"model": source, "config": rotated}, {"model": target, "config": rotated})
    assert {match.target: match.sources[0] for match in alignment.matches} == truth(SPOKEN, PLAIN)


def test_nothing_that_tells_is_ambiguous_with_the_exchange_as_alternative() -> None:
    source, target = network(MUTE, "layers", in_order=False), network(PLAIN, "h", in_order=True)
    alignment = autoalign.align(source, target)
    right = truth(MUTE, PLAIN)
    assert all(right[match.target] == match.sources[0] for match in alignment.matches)
    proposed = {match.target: match for match in alignment.ambiguous}
    assert {"h.0.norm1.weight", "h.1.ffn.fc_1.weight", "h.2.ffn.fc_2.weight"} <= set(proposed)
    match = proposed["h.1.ffn.fc_1.weight"]
    assert {match.sources, match.alternatives[0].sources} == {
        ("layers.1.m.x.weight",),
        ("layers.1.m.y.weight",),
    }
    assert match.warnings == proposed["h.0.ffn.fc_2.weight"].warnings
    assert "nothing tells h.#.ffn.fc_1 from h.#.ffn.fc_2" in match.warnings[0]


class Gated(nn.Module):
    """Two layers of one shape that only a call tells apart."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.names = first, second
        self.stem = nn.Linear(6, WIDTH)
        for name in (first, second):
            self.add_module(name, nn.Linear(WIDTH, INNER))
        self.head = nn.Linear(INNER, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        first, second = (self.get_submodule(name) for name in self.names)
        x = torch.tanh(self.stem(inputs))
        return torch.as_tensor(self.head(torch.sigmoid(first(x)) * second(x)))


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_a_call_of_both_tells_what_nothing_else_does(names: tuple[str, str]) -> None:
    torch.manual_seed(0)
    source, target = Gated(*names), Gated("one", "other")
    in_file = {key: source.state_dict()[key] for key in sorted(source.state_dict())}
    alignment = autoalign.align(in_file, target)
    assert {match.target.partition(".")[0] for match in alignment.ambiguous} == {"one", "other"}
    verification = autoalign.verify(source, target, torch.rand(4, 6), alignment=alignment)
    assert verification.equal
    assert {match.target: match.sources[0] for match in verification.alignment.matches}["one.weight"] == (
        f"{names[0]}.weight"
    )


def fused(prefix: str, parts: Mapping[str, str]) -> dict[str, Tensor]:
    """Two streams, each with a fused projection and one of as many rows as it has for a query."""
    shapes: dict[str, tuple[int, ...]] = {"patch.weight": (WIDTH, 12), "tokens.weight": (WIDTH, 20)}
    for depth in range(2):
        for stream in ("img", "txt"):
            around = f"{prefix}.{depth}.{stream}_attn"
            shapes |= {f"{around}.{name}.weight": shape for name, shape in (("qkv", (3 * WIDTH, WIDTH)),)}
            shapes |= {f"{around}.{parts['out']}.weight": (WIDTH, WIDTH), f"{around}.norm.scale": (WIDTH,)}
        shapes[f"{prefix}.{depth}.mlp.weight"] = (INNER, WIDTH)
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def test_a_query_goes_to_a_query_although_another_name_is_more_alike() -> None:
    source = fused("blocks", {"out": "proj"})
    target: dict[str, Tensor] = {}
    for key, tensor in source.items():
        depth = key.split(".")[1] if key.startswith("blocks") else ""
        added = "add_{}_proj" if ".txt_attn" in key else "to_{}"
        if key.endswith("qkv.weight"):
            target |= {f"h.{depth}.attn.{added.format(role)}.weight": tensor[:WIDTH] for role in "qkv"}
        elif key.endswith("proj.weight"):
            target[f"h.{depth}.attn.{'to_add_out' if '.txt_attn' in key else 'to_out'}.weight"] = tensor
        elif key.endswith("scale"):
            target[f"h.{depth}.{'norm_context' if '.txt_attn' in key else 'norm'}.weight"] = tensor
        else:
            target[key.replace("blocks", "h")] = tensor
    alignment = autoalign.align({key: source[key] for key in sorted(source)}, target)
    for match in (*alignment.matches, *alignment.ambiguous):
        if ".attn." in match.target:
            assert match.sources[0].endswith("proj.weight" if "out" in match.target else "qkv.weight"), match


def test_lists_of_one_name_run_in_one_direction() -> None:
    widths = {0: (40, 40), 1: (40, 32), 2: (32, 24), 3: (24, 16)}
    source, target = {}, {}
    for stage, (before, after) in widths.items():
        for place in range(3):
            tensor = torch.empty(after, before if place == 0 else after, 3, 3)
            source[f"output_blocks.{3 * stage + place}.0.weight"] = tensor
            target[f"up.{stage}.resnets.{place}.weight"] = tensor
    alignment = autoalign.align(dict(reversed(source.items())), target)
    assert {match.target: match.sources[0] for match in alignment.matches} == dict(zip(target, source, strict=True))


@pytest.mark.parametrize("name", ["post_attention_layernorm", "attention_layernorm"])
def test_what_is_named_after_attention_is_read_in_its_context(name: str) -> None:
    def side(names: tuple[str, ...], prefix: str) -> dict[str, Tensor]:
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (100, WIDTH)}
        for depth in range(3):
            shapes |= {f"{prefix}.{depth}.attn.{role}.weight": (WIDTH, WIDTH) for role in ("q", "k", "v", "o")}
            shapes |= {
                f"{prefix}.{depth}.mlp.{part}.weight": (WIDTH, INNER)[:: 1 if part == "down" else -1]
                for part in ("up", "down")
            }
            shapes |= {f"{prefix}.{depth}.{norm}.weight": (WIDTH,) for norm in names}
        return {key: torch.empty(shapes[key], device="meta") for key in sorted(shapes)}

    source = side((name, "post_mlp_layernorm"), "layers")
    target = side(("attn_ln", "mlp_ln"), "h")
    matches = {match.target: match.sources[0] for match in autoalign.align(source, target).matches}
    assert matches["h.1.attn_ln.weight"] == f"layers.1.{name}.weight"
    assert matches["h.1.mlp_ln.weight"] == "layers.1.post_mlp_layernorm.weight"


Kernel = Callable[[Tensor], Tensor]


@pytest.mark.parametrize("is_heads_first", [False, True])
def test_kernels_that_keep_heads(is_heads_first: bool) -> None:
    heads, size = 4, 10
    torch.manual_seed(0)
    torch_side: dict[str, Tensor] = {"embed.weight": torch.rand(50, WIDTH)}
    other: dict[str, Tensor] = {"embedding/embeddings": torch_side["embed.weight"]}
    for depth in range(2):
        for role in ("query", "key", "value"):
            weight = torch.rand(heads * size, WIDTH)
            torch_side[f"layers.{depth}.attn.{role}.weight"] = weight
            kernel = weight.T.reshape(WIDTH, heads, size)
            other[f"block_{depth}/attention/{role}/kernel"] = kernel.transpose(0, 1) if is_heads_first else kernel
        output = torch.rand(WIDTH, heads * size)
        torch_side[f"layers.{depth}.attn.out.weight"] = output
        other[f"block_{depth}/attention/attention_output/kernel"] = output.T.reshape(heads, size, WIDTH)
        torch_side[f"layers.{depth}.norm.weight"] = torch.rand(WIDTH)
        other[f"block_{depth}/norm/scale"] = torch_side[f"layers.{depth}.norm.weight"]
    loaded = autoalign.align(other, torch_side).state_dict()
    assert loaded.keys() == torch_side.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in torch_side.items())
    back = autoalign.align(torch_side, other).state_dict()
    assert all(torch.equal(back[key], tensor) for key, tensor in other.items())


def _direction_of(partners: list[tuple[int, ...]]) -> int:
    if len(partners) < 2 or len(set(partners)) < len(partners):
        return 0
    return (partners == sorted(partners)) - (partners == sorted(partners, reverse=True))


def test_the_direction_of_the_others_of_a_list_is_that_of_the_list_without_two() -> None:
    random = Random(0)
    found = Counter[int]()
    for _ in range(3_000):
        count = random.randint(2, 7)
        partners: list[tuple[int, ...]] = [(number + random.randint(0, 1),) for number in range(count)]
        if random.random() < 0.5:
            partners.reverse()
        first, second = sorted(random.sample(range(count), 2))
        if random.random() < 0.5:
            partners[first], partners[second] = partners[second], partners[first]
        one = Instance((("h", str(first)), ("h", str(second))), (("b", "0"), ("b", "1")), (), 0)
        others = [partner for place, partner in enumerate(partners) if place not in (first, second)]
        run: dict[tuple[int, ...], tuple[int, ...]] = {(place,): partner for place, partner in enumerate(partners)}
        direction = swaps._direction(run, one)
        assert direction == _direction_of(others), (partners, first, second)
        found[direction] += 1
    assert min(found[way] for way in (-1, 0, 1)) > 100


def test_a_list_is_read_once_however_many_of_its_members_could_be_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = list[object]()
    read = swaps._run_of

    def counted(*arguments: Any) -> Any:
        reads.append(arguments)
        return read(*arguments)

    monkeypatch.setattr(swaps, "_run_of", counted)
    random = Random(0)
    source, target = (
        {f"{name}.{n}.{random.choice('abc')}x.weight": torch.empty(8, 8) for n in range(40)} for name in ("h", "blocks")
    )
    assert len(autoalign.align(source, target).matches) == 40
    assert 1 <= len(reads) <= 4  # once in each round
