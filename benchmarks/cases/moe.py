"""One mixture of experts at any size, under two names: the published one and that of its own inference code.

The architecture is DeepSeek-V3's (arXiv 2412.19437): latent attention, leading dense layers, layers of routed and
shared experts, a layer for the prediction of a further token, and 8-bit weights with a scale for each block of
128 x 128. All shapes follow from its numbers; the tensors are on meta.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Place = tuple[int, ...]  # (), (layer,) or (layer, expert)
Entry = tuple[Place, str, str, tuple[int, ...], torch.dtype]  # where, the role there, the leaf, and what it is

_BLOCK = 128  # rows and columns that share a scale


@dataclass(frozen=True, slots=True)
class MoE:
    """The numbers of one size; those of DeepSeek-V3 by default."""

    layers: int = 61
    dense_layers: int = 3  # the first ones
    experts: int = 256
    further_layers: int = 1  # layers that predict a further token
    hidden: int = 7168
    inner: int = 18432  # of the dense layers
    expert_inner: int = 2048
    heads: int = 128
    query_rank: int = 1536
    key_value_rank: int = 512
    head: int = 128  # without the rotary part
    rotary: int = 64
    vocabulary: int = 129280


# the same network with other numbers of layers and experts, by about how many tensors it has
SIZES: dict[int, MoE] = {
    1_000: MoE(layers=6, dense_layers=1, experts=24),
    9_100: MoE(layers=26, dense_layers=2, experts=57),
    91_000: MoE(),
    300_000: MoE(layers=102, experts=496),
}


@dataclass(frozen=True, slots=True)
class Naming:
    """The names that one implementation gives, and the order in which it registers."""

    layers: str
    experts: str
    roles: Mapping[str, str]
    leaves: Mapping[str, str]
    parts: tuple[str, ...]  # of a feed-forward network
    is_gate_first: bool  # whether the router comes before the experts

    def key(self, place: Place, role: str, leaf: str) -> str:
        """Name a tensor of a role.

        >>> PUBLISHED.key((3, 5), "expert gate", "scale")
        'model.layers.3.mlp.experts.5.gate_proj.weight_scale_inv'
        >>> INFERENCE.key((3, 5), "expert gate", "scale")
        'layers.3.ffn.experts.5.w1.scale'
        """
        layer = f"{self.layers}.{place[0]}." if place else ""
        expert = f"{self.experts}.{place[1]}." if len(place) > 1 else ""
        return f"{layer}{expert}{self.roles[role]}.{self.leaves.get(leaf, leaf)}"


def state_dict(moe: MoE, naming: Naming) -> dict[str, Tensor]:
    """Make the state dict in one naming."""
    return {
        naming.key(place, role, leaf): torch.empty(shape, dtype=dtype, device="meta")
        for place, role, leaf, shape, dtype in _entries(moe, naming)
    }


def truth(moe: MoE, source: Naming, target: Naming) -> dict[str, str]:
    """Map each key of the target's naming to the source's."""
    return {
        target.key(place, role, leaf): source.key(place, role, leaf)
        for place, role, leaf, _, _ in _entries(moe, target)
    }


def _entries(moe: MoE, naming: Naming) -> Iterator[Entry]:
    """List all tensors by their roles, in the order of a naming."""
    norm = (moe.hidden,)
    yield _plain((), "embed", (moe.vocabulary, moe.hidden))
    for layer in range(moe.layers + moe.further_layers):
        place = (layer,)
        if layer >= moe.layers:
            yield _plain(place, "further embed", (moe.vocabulary, moe.hidden))
            yield _plain(place, "further embed norm", norm)
            yield _plain(place, "further hidden norm", norm)
            yield _plain(place, "further proj", (moe.hidden, 2 * moe.hidden))
        yield from _attention(moe, place)
        if layer < moe.dense_layers:
            yield from _feed_forward(place, "mlp", moe.hidden, moe.inner, naming)
        else:
            yield from _experts(moe, layer, naming)
        yield _plain(place, "attn norm", norm)
        yield _plain(place, "ffn norm", norm)
        if layer >= moe.layers:
            yield _plain(place, "further norm", norm)
            yield _plain(place, "further head", (moe.vocabulary, moe.hidden))
    yield _plain((), "norm", norm)
    yield _plain((), "head", (moe.vocabulary, moe.hidden))


def _experts(moe: MoE, layer: int, naming: Naming) -> Iterator[Entry]:
    router = (
        _plain((layer,), "gate", (moe.experts, moe.hidden)),
        ((layer,), "gate", "bias", (moe.experts,), torch.float32),
    )
    yield from router if naming.is_gate_first else ()
    for expert in range(moe.experts):
        yield from _feed_forward((layer, expert), "expert", moe.hidden, moe.expert_inner, naming)
    yield from () if naming.is_gate_first else router
    yield from _feed_forward((layer,), "shared", moe.hidden, moe.expert_inner, naming)


def _attention(moe: MoE, place: Place) -> Iterator[Entry]:
    values = moe.heads * moe.head
    yield from _scaled(place, "q_a", (moe.query_rank, moe.hidden))
    yield _plain(place, "q norm", (moe.query_rank,))
    yield from _scaled(place, "q_b", (moe.heads * (moe.head + moe.rotary), moe.query_rank))
    yield from _scaled(place, "kv_a", (moe.key_value_rank + moe.rotary, moe.hidden))
    yield _plain(place, "kv norm", (moe.key_value_rank,))
    yield from _scaled(place, "kv_b", (2 * values, moe.key_value_rank))
    yield from _scaled(place, "o", (moe.hidden, values))


def _feed_forward(place: Place, role: str, hidden: int, inner: int, naming: Naming) -> Iterator[Entry]:
    for part in naming.parts:
        yield from _scaled(place, f"{role} {part}", (hidden, inner) if part == "down" else (inner, hidden))


def _plain(place: Place, role: str, shape: tuple[int, ...]) -> Entry:
    return place, role, "weight", shape, torch.bfloat16


def _scaled(place: Place, role: str, shape: tuple[int, int]) -> Iterator[Entry]:
    yield place, role, "weight", shape, torch.float8_e4m3fn
    rows, columns = (-(-size // _BLOCK) for size in shape)
    yield place, role, "scale", (rows, columns), torch.float32


def _feed_forward_roles(mlp: str, words: Mapping[str, str]) -> dict[str, str]:
    """Name the parts of the dense, the routed and the shared networks, for a form such as ``{}_proj``."""
    forms = {"mlp": f"{mlp}.{{}}", "expert": "{}", "shared": f"{mlp}.shared_experts.{{}}"}
    return {f"{role} {part}": form.format(word) for role, form in forms.items() for part, word in words.items()}


_FURTHER = {
    "further embed norm": "enorm",
    "further hidden norm": "hnorm",
    "further proj": "eh_proj",
    "further norm": "shared_head.norm",
    "further head": "shared_head.head",
}
PUBLISHED = Naming(
    layers="model.layers",
    experts="mlp.experts",
    roles={
        "embed": "model.embed_tokens",
        "norm": "model.norm",
        "head": "lm_head",
        "attn norm": "input_layernorm",
        "ffn norm": "post_attention_layernorm",
        "q_a": "self_attn.q_a_proj",
        "q norm": "self_attn.q_a_layernorm",
        "q_b": "self_attn.q_b_proj",
        "kv_a": "self_attn.kv_a_proj_with_mqa",
        "kv norm": "self_attn.kv_a_layernorm",
        "kv_b": "self_attn.kv_b_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate",
        "further embed": "embed_tokens",
        **_feed_forward_roles("mlp", {part: f"{part}_proj" for part in ("gate", "up", "down")}),
        **_FURTHER,
    },
    leaves={"scale": "weight_scale_inv", "bias": "e_score_correction_bias"},
    parts=("gate", "up", "down"),
    is_gate_first=False,
)
INFERENCE = Naming(
    layers="layers",
    experts="ffn.experts",
    roles={
        "embed": "embed",
        "norm": "norm",
        "head": "head",
        "attn norm": "attn_norm",
        "ffn norm": "ffn_norm",
        "q_a": "attn.wq_a",
        "q norm": "attn.q_norm",
        "q_b": "attn.wq_b",
        "kv_a": "attn.wkv_a",
        "kv norm": "attn.kv_norm",
        "kv_b": "attn.wkv_b",
        "o": "attn.wo",
        "gate": "ffn.gate",
        "further embed": "embed",
        **_feed_forward_roles("ffn", {"gate": "w1", "down": "w2", "up": "w3"}),
        **_FURTHER,  # the inference code leaves this layer out; these are the published names
    },
    leaves={},
    parts=("gate", "down", "up"),
    is_gate_first=True,
)
