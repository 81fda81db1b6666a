"""Small networks with the parameter names and layouts of published implementations.

Each class computes what its counterpart in another library computes, from parameters that have the names, the nesting,
the shapes and the order of rows of the code that it stands for. So a conversion is checked by what a network
computes, and not by a second conversion. What a class stands for is said in its docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

WIDTH = 32
HEADS = 4
KV_HEADS = 2  # of grouped-query attention
HEAD_DIM = WIDTH // HEADS
HIDDEN = 56
DEPTH = 3
VOCABULARY = 97
CONTEXT = 24  # longest sequence of the models with a table of positions
EXPERTS = 4
CLASSES = 10
IMAGE, PATCH = 32, 8
SEQUENCE = (IMAGE // PATCH) ** 2 + 1  # patches and a class token

Rotation = Callable[[Tensor], Tensor]
Flat = dict[str, NDArray[np.float32]]

linear = partial(nn.Linear, bias=False)


# What all of them are made of.


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int = HEADS,
    kv_heads: int | None = None,
    *,
    causal: bool = False,
    rotate: Rotation | None = None,
) -> Tensor:
    """Attention over [batch, length, heads * head_dim], whose rows are ordered head by head."""

    def apart(x: Tensor, count: int) -> Tensor:
        return x.view(*x.shape[:-1], count, -1).transpose(1, 2)

    queries, keys, values = apart(q, heads), apart(k, kv_heads or heads), apart(v, kv_heads or heads)
    if rotate is not None:
        queries, keys = rotate(queries), rotate(keys)
    repeats = heads // (kv_heads or heads)
    keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
    mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal)
    return mixed.transpose(1, 2).flatten(2)


def _turn(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Turn pairs of coordinates [..., length, pairs] by angles that grow with the position."""
    length, count = first.shape[-2:]
    angles = torch.outer(torch.arange(length), 10000.0 ** (-torch.arange(count) / count))
    return first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()


def rotate_halves(x: Tensor, size: int = HEAD_DIM) -> Tensor:
    """Rotate coordinate k of each head with k + size / 2, and leave those from ``size`` on: Hugging Face's Llama."""
    first, second = _turn(*x[..., :size].chunk(2, -1))
    return torch.cat([first, second, x[..., size:]], -1)


def rotate_pairs(x: Tensor, size: int = HEAD_DIM) -> Tensor:
    """Rotate each even coordinate of each head with its neighbour: Meta's Llama, torchtune, GLM."""
    turned = torch.stack(_turn(x[..., 0:size:2], x[..., 1:size:2]), -1).flatten(-2)
    return torch.cat([turned, x[..., size:]], -1)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class RMSNorm(nn.Module):
    """A norm whose gain is called ``weight`` or otherwise."""

    def __init__(self, eps: float = 1e-6, name: str = "weight") -> None:
        super().__init__()
        self.eps = eps
        self.name = name
        self.register_parameter(name, nn.Parameter(torch.ones(WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_parameter(self.name) * F.rms_norm(x, (WIDTH,), eps=self.eps)


class SwiGLU(nn.Module):
    """A gated layer whose three matrices have the names that are given, in this order: gate, up, down."""

    def __init__(self, gate: str, up: str, down: str) -> None:
        super().__init__()
        self.names = gate, up, down
        shapes = {gate: (WIDTH, HIDDEN), down: (HIDDEN, WIDTH), up: (WIDTH, HIDDEN)}
        for name in sorted(shapes):
            self.add_module(name, linear(*shapes[name]))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in self.names)
        result: Tensor = down(F.silu(gate(x)) * up(x))
        return result


# Encoders: torch's own, and one with separate projections.


class SeparateAttention(nn.Module):
    """Attention of four linear layers."""

    def __init__(self, names: str = "q_proj k_proj v_proj out_proj", *, bias: bool = True) -> None:
        super().__init__()
        self.names = names.split()
        for name in self.names:
            self.add_module(name, nn.Linear(WIDTH, WIDTH, bias=bias))

    def forward(self, x: Tensor, *, causal: bool = False) -> Tensor:
        q, k, v, out = (self.get_submodule(name) for name in self.names)
        result: Tensor = out(attend(q(x), k(x), v(x), causal=causal))
        return result


class TorchEncoder(nn.Module):
    """``nn.TransformerEncoder``, norms after the additions, below a projection."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(self.encoder(self.embedding(tokens)))
        return result


class _SeparateLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = SeparateAttention()
        self.linear1 = nn.Linear(WIDTH, HIDDEN)
        self.linear2 = nn.Linear(HIDDEN, WIDTH)
        self.norm1 = nn.LayerNorm(WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.self_attn(x))
        result: Tensor = self.norm2(x + self.linear2(self.linear1(x).relu()))
        return result


class SeparateEncoder(nn.Module):
    """What ``TorchEncoder`` computes, with a projection each for query, key and value, as fairseq has them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(_SeparateLayer() for _ in range(DEPTH))
        self.output_projection = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.output_projection(x)
        return result


# GPT-2.


class _NanoAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)
        self.n_head = HEADS

    def forward(self, x: Tensor, *, causal: bool) -> Tensor:
        result: Tensor = self.c_proj(attend(*self.c_attn(x).chunk(3, -1), causal=causal))
        return result


class GPTBlock(nn.Module):
    """A block with its norms first, of submodules with the given names."""

    def __init__(self, names: str, attention: nn.Module, mlp: tuple[str, str]) -> None:
        super().__init__()
        self.names = norm1, attn, norm2, last = names.split()
        self.mlp_names = mlp
        layers = {mlp[0]: nn.Linear(WIDTH, 4 * WIDTH), mlp[1]: nn.Linear(4 * WIDTH, WIDTH)}
        modules = {norm1: nn.LayerNorm(WIDTH), attn: attention, norm2: nn.LayerNorm(WIDTH), last: nn.ModuleDict(layers)}
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        norm1, attention, norm2, mlp = (self.get_submodule(name) for name in self.names)
        x = x + attention(norm1(x), causal=True)
        up, down = (mlp.get_submodule(name) for name in self.mlp_names)
        result: Tensor = x + down(F.gelu(up(norm2(x))))
        return result


class NanoGPT(nn.Module):
    """nanoGPT: Hugging Face's names for GPT-2, with ``nn.Linear`` where that has (in, out) matrices."""

    def __init__(self) -> None:
        super().__init__()
        blocks = (GPTBlock("ln_1 attn ln_2 mlp", _NanoAttention(), ("c_fc", "c_proj")) for _ in range(DEPTH))
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, WIDTH),
                "wpe": nn.Embedding(CONTEXT, WIDTH),
                "h": nn.ModuleList(blocks),
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )
        self.lm_head = linear(WIDTH, VOCABULARY)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        transformer: Any = self.transformer
        x = transformer.wte(tokens) + transformer.wpe(torch.arange(tokens.shape[1]))
        for block in transformer.h:
            x = block(x)
        result: Tensor = self.lm_head(transformer.ln_f(x))
        return result


class SeparateGPT(nn.Module):
    """GPT-2 with a linear layer each for query, key and value, as in textbooks."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position_embedding = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(
            GPTBlock("norm1 attention norm2 feed_forward", SeparateAttention("query key value out"), ("up", "down"))
            for _ in range(DEPTH)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = linear(WIDTH, VOCABULARY)
        self.head.weight = self.token_embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.position_embedding(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(self.norm(x))
        return result


# Llama and what descends from it.


class _GroupedAttention(nn.Module):
    """Causal grouped-query attention of four linear layers with the given names: q, k, v, out."""

    def __init__(self, names: str, rotate: Rotation, *, kv_heads: int = KV_HEADS, bias: bool = False) -> None:
        super().__init__()
        self.names = names.split()
        self.rotate = rotate
        self.num_heads, self.num_kv_heads, self.head_dim = HEADS, kv_heads, HEAD_DIM
        for name, rows in zip(self.names, (HEADS, kv_heads, kv_heads, HEADS), strict=True):
            self.add_module(name, nn.Linear(WIDTH, rows * HEAD_DIM, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, out = (self.get_submodule(name) for name in self.names)
        mixed = attend(q(x), k(x), v(x), HEADS, self.num_kv_heads, causal=True, rotate=self.rotate)
        result: Tensor = out(mixed)
        return result


class _DecoderBlock(nn.Module):
    """A block with its norms first; the names are those of norm, attention, norm and feed-forward layer."""

    def __init__(self, modules: Mapping[str, nn.Module], names: str) -> None:
        super().__init__()
        self.names = names.split()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        norm1, attention, norm2, mlp = (self.get_submodule(name) for name in self.names)
        x = x + attention(norm1(x))
        result: Tensor = x + mlp(norm2(x))
        return result


def _decode(embed: nn.Module, blocks: nn.ModuleList, norm: nn.Module, head: nn.Module, tokens: Tensor) -> Tensor:
    x = embed(tokens)
    for block in blocks:
        x = block(x)
    result: Tensor = head(norm(x))
    return result


class MetaLlama(nn.Module):
    """Llama as Meta publishes it; files of its first versions hold the rotation's frequencies too."""

    def __init__(self, *, frequencies: bool = True) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = RMSNorm()
        self.output = linear(WIDTH, VOCABULARY)
        self.layers = nn.ModuleList(
            _DecoderBlock(
                {
                    "attention": _GroupedAttention("wq wk wv wo", rotate_pairs),
                    "feed_forward": SwiGLU("w1", "w3", "w2"),
                    "attention_norm": RMSNorm(),
                    "ffn_norm": RMSNorm(),
                },
                "attention_norm attention ffn_norm feed_forward",
            )
            for _ in range(DEPTH)
        )
        if frequencies:
            self.rope = nn.Module()
            self.rope.register_buffer("freqs", 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))

    def forward(self, tokens: Tensor) -> Tensor:
        return _decode(self.tok_embeddings, self.layers, self.norm, self.output, tokens)


class TorchtuneLlama(nn.Module):
    """Llama in torchtune: Hugging Face's names for the projections, and Meta's order of their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            _DecoderBlock(
                {
                    "attn": _GroupedAttention("q_proj k_proj v_proj output_proj", rotate_pairs),
                    "mlp": SwiGLU("w1", "w3", "w2"),
                    "sa_norm": RMSNorm(name="scale"),
                    "mlp_norm": RMSNorm(name="scale"),
                },
                "sa_norm attn mlp_norm mlp",
            )
            for _ in range(DEPTH)
        )
        self.norm = RMSNorm(name="scale")
        self.output = linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return _decode(self.tok_embeddings, self.layers, self.norm, self.output, tokens)


class _LitAttention(nn.Module):
    """Fused query, key and value, one after another (``qkv``) or group by group of heads (``attn``, as it once was)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM))
        self.proj = linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.get_submodule(self.name)(x)
        if self.name == "qkv":
            q, k, v = rows.split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], -1)
        else:
            groups = rows.unflatten(-1, (KV_HEADS, HEADS // KV_HEADS + 2, HEAD_DIM))
            q, k, v = groups[..., :-2, :].flatten(2), groups[..., -2, :].flatten(2), groups[..., -1, :].flatten(2)
        result: Tensor = self.proj(attend(q, k, v, HEADS, KV_HEADS, causal=True, rotate=rotate_halves))
        return result


class LitLlama(nn.Module):
    """Llama in litgpt, whose fused projection has had two names and two orders of rows."""

    def __init__(self, fused: str = "qkv") -> None:
        super().__init__()
        self.lm_head = linear(WIDTH, VOCABULARY)
        blocks = (
            _DecoderBlock(
                {
                    "norm_1": RMSNorm(),
                    "attn": _LitAttention(fused),
                    "norm_2": RMSNorm(),
                    "mlp": SwiGLU("fc_1", "fc_2", "proj"),
                },
                "norm_1 attn norm_2 mlp",
            )
            for _ in range(DEPTH)
        )
        modules = {"wte": nn.Embedding(VOCABULARY, WIDTH), "h": nn.ModuleList(blocks), "ln_f": RMSNorm()}
        self.transformer = nn.ModuleDict(modules)

    def forward(self, tokens: Tensor) -> Tensor:
        transformer: Any = self.transformer
        return _decode(transformer.wte, transformer.h, transformer.ln_f, self.lm_head, tokens)


class _Experts(nn.Module):
    """A router and a module for each expert, two of which are used for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(SwiGLU("w1", "w3", "w2") for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.gate(x).softmax(-1).topk(2, -1)
        weights = torch.zeros(*x.shape[:-1], EXPERTS).scatter(-1, chosen, share / share.sum(-1, keepdim=True))
        outputs = torch.stack([expert(x) for expert in self.experts], -1)
        return (outputs * weights[..., None, :]).sum(-1)


def _llama_body(blocks: nn.ModuleList, norm: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"embed_tokens": nn.Embedding(VOCABULARY, WIDTH), "layers": blocks, "norm": norm})


class Mixtral4(nn.Module):
    """Mixtral in version 4 of transformers, with modules of its own for each expert."""

    def __init__(self) -> None:
        super().__init__()
        blocks = nn.ModuleList(
            _DecoderBlock(
                {
                    "self_attn": _GroupedAttention("q_proj k_proj v_proj o_proj", rotate_halves),
                    "block_sparse_moe": _Experts(),
                    "input_layernorm": RMSNorm(),
                    "post_attention_layernorm": RMSNorm(),
                },
                "input_layernorm self_attn post_attention_layernorm block_sparse_moe",
            )
            for _ in range(DEPTH)
        )
        self.model = _llama_body(blocks, RMSNorm())
        self.lm_head = linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        model: Any = self.model
        return _decode(model.embed_tokens, model.layers, model.norm, self.lm_head, tokens)


class MistralMixtral(nn.Module):
    """Mixtral as Mistral publishes it, with Meta's names and rotation."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = RMSNorm()
        self.output = linear(WIDTH, VOCABULARY)
        self.layers = nn.ModuleList(
            _DecoderBlock(
                {
                    "attention": _GroupedAttention("wq wk wv wo", rotate_pairs),
                    "attention_norm": RMSNorm(),
                    "ffn_norm": RMSNorm(),
                    "feed_forward": _Experts(),
                },
                "attention_norm attention ffn_norm feed_forward",
            )
            for _ in range(DEPTH)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return _decode(self.tok_embeddings, self.layers, self.norm, self.output, tokens)


class _PlainMLP(nn.Module):
    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=bias)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(F.gelu(self.up_proj(x)))
        return result


class _ParallelBlock(nn.Module):
    def __init__(self, kv_heads: int, rotate: Rotation, *, bias: bool) -> None:
        super().__init__()
        names = "q_proj k_proj v_proj o_proj"
        self.self_attn = _GroupedAttention(names, rotate, kv_heads=kv_heads, bias=bias)
        self.mlp = _PlainMLP(bias=bias)
        self.input_layernorm = nn.LayerNorm(WIDTH)
        self.post_attention_layernorm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.self_attn(self.input_layernorm(x)) + self.mlp(self.post_attention_layernorm(x))
        return result


class ParallelDecoder(nn.Module):
    """What GPT-NeoX and Falcon compute, with Llama's names: attention beside the feed-forward layer."""

    def __init__(self, kv_heads: int, rotated: int, *, bias: bool) -> None:
        super().__init__()
        rotate = partial(rotate_halves, size=rotated)
        blocks = nn.ModuleList(_ParallelBlock(kv_heads, rotate, bias=bias) for _ in range(DEPTH))
        self.model = _llama_body(blocks, nn.LayerNorm(WIDTH))
        self.lm_head = linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        model: Any = self.model
        return _decode(model.embed_tokens, model.layers, model.norm, self.lm_head, tokens)


class _ChatGLMAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.dense = linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.query_key_value(x)
        q, k, v = rows.split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], -1)
        rotate = partial(rotate_pairs, size=HEAD_DIM // 2)
        result: Tensor = self.dense(attend(q, k, v, HEADS, KV_HEADS, causal=True, rotate=rotate))
        return result


class _ChatGLMLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense_h_to_4h = linear(WIDTH, 2 * HIDDEN)
        self.dense_4h_to_h = linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.dense_h_to_4h(x).chunk(2, -1)
        result: Tensor = self.dense_4h_to_h(F.silu(gate) * up)
        return result


class ChatGLM(nn.Module):
    """The second generation of ChatGLM: Megatron's names, with query, key and value one after another."""

    def __init__(self) -> None:
        super().__init__()
        blocks = nn.ModuleList(
            _DecoderBlock(
                {
                    "input_layernorm": RMSNorm(),
                    "self_attention": _ChatGLMAttention(),
                    "post_attention_layernorm": RMSNorm(),
                    "mlp": _ChatGLMLayer(),
                },
                "input_layernorm self_attention post_attention_layernorm mlp",
            )
            for _ in range(DEPTH)
        )
        embedding = nn.ModuleDict({"word_embeddings": nn.Embedding(VOCABULARY, WIDTH)})
        encoder = nn.ModuleDict({"layers": blocks, "final_layernorm": RMSNorm()})
        self.transformer = nn.ModuleDict(
            {"embedding": embedding, "encoder": encoder, "output_layer": linear(WIDTH, VOCABULARY)}
        )

    def forward(self, tokens: Tensor) -> Tensor:
        model: Any = self.transformer
        words, encoder = model.embedding.word_embeddings, model.encoder
        return _decode(words, encoder.layers, encoder.final_layernorm, model.output_layer, tokens)


# Gated layers whose two halves are fused in either order.


class _Gated(nn.Module):
    """A gated layer with fused halves; ``gate_first`` tells which of them goes through the activation."""

    def __init__(self, names: tuple[str, str], *, gate_first: bool) -> None:
        super().__init__()
        self.names = names
        self.gate_first = gate_first
        for name, layer in zip(names, (nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH)), strict=True):
            *above, last = name.split(".")
            parent: nn.Module = self
            for part in above:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, layer)

    def forward(self, x: Tensor) -> Tensor:
        fused, down = (self.get_submodule(name) for name in self.names)
        first, second = fused(x).chunk(2, -1)
        result: Tensor = down(F.gelu(first) * second if self.gate_first else first * F.gelu(second))
        return result


class _SeparateGated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, HIDDEN)
        self.up_proj = nn.Linear(WIDTH, HIDDEN)
        self.down_proj = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))
        return result


class GatedEncoder(nn.Module):
    """Blocks with gated layers: ``separate``, ``w12`` (gate first, as DINOv2) or ``net`` (gate last, as diffusers)."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        fused = {"w12": (("w12", "w3"), True), "net": (("net.0.proj", "net.2"), False)}
        names = {"separate": "norm1 self_attn norm2 mlp", "w12": "norm1 attn norm2 mlp", "net": "norm1 attn1 norm3 ff"}
        attention = {"separate": "q_proj k_proj v_proj o_proj", "w12": "q k v proj", "net": "to_q to_k to_v to_out"}

        def block() -> nn.Module:
            norm1, attn, norm2, mlp = names[layout].split()
            gated = _SeparateGated() if layout == "separate" else _Gated(fused[layout][0], gate_first=fused[layout][1])
            modules = {
                norm1: nn.LayerNorm(WIDTH),
                attn: SeparateAttention(attention[layout]),
                norm2: nn.LayerNorm(WIDTH),
                mlp: gated,
            }
            return _DecoderBlock(modules, names[layout])

        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return _decode(self.embed, self.blocks, self.norm, self.head, tokens)


# CLIP.

TEXT_WIDTH, TEXT_HEADS, SHARED_WIDTH = 24, 3, 20


class _ResidualAttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        result: Tensor = x + self.mlp["c_proj"](quick_gelu(self.mlp["c_fc"](self.ln_2(x))))
        return result


class _ResidualTower(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_ResidualAttentionBlock(width, heads) for _ in range(DEPTH))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class _VisionTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(WIDTH))
        self.positional_embedding = nn.Parameter(torch.zeros(SEQUENCE, WIDTH))
        self.ln_pre = nn.LayerNorm(WIDTH)
        self.transformer = _ResidualTower(WIDTH, HEADS)
        self.ln_post = nn.LayerNorm(WIDTH)
        self.proj = nn.Parameter(torch.zeros(WIDTH, SHARED_WIDTH))

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        result: Tensor = self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj
        return result


class OpenAIClip(nn.Module):
    """CLIP as OpenAI publishes it: fused attention, and bare projections that are multiplied from the right."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = _VisionTower()
        self.transformer = _ResidualTower(TEXT_WIDTH, TEXT_HEADS)
        self.token_embedding = nn.Embedding(VOCABULARY, TEXT_WIDTH)
        self.positional_embedding = nn.Parameter(torch.zeros(CONTEXT, TEXT_WIDTH))
        self.ln_final = nn.LayerNorm(TEXT_WIDTH)
        self.text_projection = nn.Parameter(torch.zeros(TEXT_WIDTH, SHARED_WIDTH))
        self.logit_scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens: Tensor, images: Tensor) -> Tensor:
        mask = torch.full((CONTEXT, CONTEXT), -torch.inf).triu(1)
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding, mask)
        x = self.ln_final(x)[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection
        text, image = F.normalize(x, dim=-1), F.normalize(self.visual(images), dim=-1)
        return torch.cat([text.flatten(), image.flatten(), (self.logit_scale.exp() * text @ image.T).flatten()])


# What JAX and TensorFlow store: kernels of (in, out), convolutions of (height, width, in, out).


class Kernel(nn.Module):
    """A linear layer with a kernel of input and output dimensions, over which a sum is taken as einsum's."""

    def __init__(self, *shape: int, contracted: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(shape))
        self.bias = nn.Parameter(torch.zeros(shape[contracted:])) if bias else None
        self.contracted = contracted

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.tensordot(x, self.kernel, self.contracted)
        return result if self.bias is None else result + self.bias


class KernelConv(nn.Module):
    """A convolution with a kernel of (height, width, in, out), or (height, width, channels, 1) for a depthwise one."""

    def __init__(self, *shape: int, stride: int = 1, padding: int = 0, bias: bool = False, depthwise: bool = False):
        super().__init__()
        self.name = "depthwise_kernel" if depthwise else "kernel"
        self.register_parameter(self.name, nn.Parameter(torch.zeros(shape)))
        self.bias = nn.Parameter(torch.zeros(shape[-1])) if bias else None
        self.stride, self.padding, self.groups = stride, padding, shape[2] if depthwise else 1

    def forward(self, x: Tensor) -> Tensor:
        order = (2, 3, 0, 1) if self.name == "depthwise_kernel" else (3, 2, 0, 1)
        kernel = self.get_parameter(self.name).permute(order)
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding, groups=self.groups)


class KernelNorm(nn.Module):
    """A layer norm with other names for its gain and offset."""

    def __init__(self, gain: str, offset: str, eps: float) -> None:
        super().__init__()
        self.names, self.eps = (gain, offset), eps
        self.register_parameter(gain, nn.Parameter(torch.ones(WIDTH)))
        self.register_parameter(offset, nn.Parameter(torch.zeros(WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        gain, offset = (self.get_parameter(name) for name in self.names)
        return F.layer_norm(x, (WIDTH,), gain, offset, self.eps)


class KernelBatchNorm(nn.Module):
    """A batch norm with other names; in training mode it takes the statistics of the batch as its own."""

    def __init__(self, width: int, gain: str, offset: str, mean: str, variance: str) -> None:
        super().__init__()
        self.names, self.statistics = (gain, offset), (mean, variance)
        self.register_parameter(gain, nn.Parameter(torch.ones(width)))
        self.register_parameter(offset, nn.Parameter(torch.zeros(width)))
        self.register_buffer(mean, torch.zeros(width))
        self.register_buffer(variance, torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        gain, offset = (self.get_parameter(name) for name in self.names)
        mean, variance = (self.get_buffer(name) for name in self.statistics)
        return F.batch_norm(x, mean, variance, gain, offset, training=self.training, momentum=1.0)


def _chain(modules: Mapping[str, nn.Module]) -> nn.Sequential:
    chain = nn.Sequential()
    for name, module in modules.items():
        chain.add_module(name, module)
    return chain


FLAX_DEPTH = 11  # so that encoderblock_10 comes before encoderblock_2 in a file sorted by name


class _FlaxAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = Kernel(WIDTH, HEADS, HEAD_DIM)
        self.key = Kernel(WIDTH, HEADS, HEAD_DIM)
        self.value = Kernel(WIDTH, HEADS, HEAD_DIM)
        self.out = Kernel(HEADS, HEAD_DIM, WIDTH, contracted=2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).transpose(1, 2) for layer in (self.query, self.key, self.value))
        result: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2))
        return result


class _FlaxBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        norm = partial(KernelNorm, "scale", "bias", 1e-6)
        self.LayerNorm_0 = norm()
        self.MultiHeadDotProductAttention_1 = _FlaxAttention()
        self.LayerNorm_2 = norm()
        layers = {"Dense_0": Kernel(WIDTH, HIDDEN), "act": nn.GELU(), "Dense_1": Kernel(HIDDEN, WIDTH)}
        self.MlpBlock_3 = _chain(layers)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.MultiHeadDotProductAttention_1(self.LayerNorm_0(x))
        result: Tensor = x + self.MlpBlock_3(self.LayerNorm_2(x))
        return result


class FlaxViT(nn.Module):
    """The vision transformer as its authors publish it, from Flax: attention kernels with a dimension of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.embedding = KernelConv(PATCH, PATCH, 3, WIDTH, stride=PATCH, bias=True)
        self.Transformer = nn.Module()
        table = nn.Module()
        table.pos_embedding = nn.Parameter(torch.zeros(1, SEQUENCE, WIDTH))
        self.Transformer.add_module("posembed_input", table)
        for index in range(FLAX_DEPTH):
            self.Transformer.add_module(f"encoderblock_{index}", _FlaxBlock())
        self.Transformer.add_module("encoder_norm", KernelNorm("scale", "bias", 1e-6))
        self.head = Kernel(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        body: Any = self.Transformer
        x = self.embedding(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + body.posembed_input.pos_embedding
        for index in range(FLAX_DEPTH):
            x = body.get_submodule(f"encoderblock_{index}")(x)
        result: Tensor = self.head(body.encoder_norm(x)[:, 0])
        return result


class _FlaxResNetBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        norm = partial(KernelBatchNorm, outputs, "scale", "bias", "mean", "var")
        self.Conv_0 = KernelConv(3, 3, inputs, outputs, stride=stride, padding=1)
        self.BatchNorm_0 = norm()
        self.Conv_1 = KernelConv(3, 3, outputs, outputs, padding=1)
        self.BatchNorm_1 = norm()
        self.conv_proj = KernelConv(1, 1, inputs, outputs, stride=stride) if inputs != outputs else None
        self.norm_proj = norm() if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        inner = self.BatchNorm_1(self.Conv_1(self.BatchNorm_0(self.Conv_0(x)).relu()))
        shortcut = x if self.conv_proj is None or self.norm_proj is None else self.norm_proj(self.conv_proj(x))
        result: Tensor = (inner + shortcut).relu()
        return result


RESNET_STAGES = ((64, 2), (128, 1), (256, 1), (512, 1))  # width and blocks


class FlaxResNet(nn.Module):
    """The residual network of Flax's own example, whose blocks are numbered through all stages.

    The first convolution and the pooling pad as torchvision's do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv_init = KernelConv(7, 7, 3, 64, stride=2, padding=3)
        self.bn_init = KernelBatchNorm(64, "scale", "bias", "mean", "var")
        inputs, self.blocks = 64, 0
        for stage, (width, count) in enumerate(RESNET_STAGES):
            for index in range(count):
                block = _FlaxResNetBlock(inputs, width, 2 if stage and not index else 1)
                self.add_module(f"ResNetBlock_{self.blocks}", block)
                inputs, self.blocks = width, self.blocks + 1
        self.Dense_0 = Kernel(512, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(self.bn_init(self.conv_init(images)).relu(), 3, 2, 1)
        for index in range(self.blocks):
            x = self.get_submodule(f"ResNetBlock_{index}")(x)
        result: Tensor = self.Dense_0(x.mean((2, 3)))
        return result


MOBILE_STAGES = ((1, 8, 1, 1), (6, 16, 2, 2), (6, 24, 1, 2))  # expansion, width, blocks, stride
MOBILE_LAST = 1280


class KerasMobileNet(nn.Module):
    """MobileNetV2 with the layer names of keras.applications, which pads otherwise where it strides."""

    def __init__(self) -> None:
        super().__init__()
        norm = partial(KernelBatchNorm, gain="gamma", offset="beta", mean="moving_mean", variance="moving_variance")
        self.residual: dict[str, bool] = {}
        self.add_module("Conv1", KernelConv(3, 3, 3, 32, stride=2, padding=1))
        self.add_module("bn_Conv1", norm(32))
        inputs, number = 32, 0
        for expansion, width, count, stride in MOBILE_STAGES:
            for index in range(count):
                name = f"block_{number}_" if number else "expanded_conv_"
                hidden, step = inputs * expansion, 1 if index else stride
                if expansion > 1:
                    self.add_module(f"{name}expand", KernelConv(1, 1, inputs, hidden))
                    self.add_module(f"{name}expand_BN", norm(hidden))
                depthwise = KernelConv(3, 3, hidden, 1, stride=step, padding=1, depthwise=True)
                self.add_module(f"{name}depthwise", depthwise)
                self.add_module(f"{name}depthwise_BN", norm(hidden))
                self.add_module(f"{name}project", KernelConv(1, 1, hidden, width))
                self.add_module(f"{name}project_BN", norm(width))
                self.residual[name] = step == 1 and inputs == width
                inputs, number = width, number + 1
        self.add_module("Conv_1", KernelConv(1, 1, inputs, MOBILE_LAST))
        self.add_module("Conv_1_bn", norm(MOBILE_LAST))
        self.add_module("predictions", Kernel(MOBILE_LAST, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        layer: Any = self._modules
        x = F.relu6(layer["bn_Conv1"](layer["Conv1"](images)))
        for name, residual in self.residual.items():
            inner = x
            if f"{name}expand" in layer:
                inner = F.relu6(layer[f"{name}expand_BN"](layer[f"{name}expand"](inner)))
            inner = F.relu6(layer[f"{name}depthwise_BN"](layer[f"{name}depthwise"](inner)))
            inner = layer[f"{name}project_BN"](layer[f"{name}project"](inner))
            x = x + inner if residual else inner
        x = F.relu6(layer["Conv_1_bn"](layer["Conv_1"](x)))
        result: Tensor = layer["predictions"](x.mean((2, 3)))
        return result


class _BertLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        norm = partial(KernelNorm, "gamma", "beta", 1e-12)
        heads = nn.ModuleDict({name: Kernel(WIDTH, WIDTH) for name in ("query", "key", "value")})
        output = nn.ModuleDict({"dense": Kernel(WIDTH, WIDTH), "LayerNorm": norm()})
        self.attention = nn.ModuleDict({"self": heads, "output": output})
        self.intermediate = nn.ModuleDict({"dense": Kernel(WIDTH, HIDDEN)})
        self.output = nn.ModuleDict({"dense": Kernel(HIDDEN, WIDTH), "LayerNorm": norm()})

    def forward(self, x: Tensor) -> Tensor:
        heads, after, output = (dict(m.items()) for m in (*self.attention.values(), self.output))  # type: ignore[operator]
        mixed = attend(heads["query"](x), heads["key"](x), heads["value"](x))
        x = after["LayerNorm"](x + after["dense"](mixed))
        inner = output["dense"](F.gelu(self.intermediate["dense"](x)))
        result: Tensor = output["LayerNorm"](x + inner)
        return result


class TensorFlowBert(nn.Module):
    """BERT as its authors publish it, from TensorFlow: (in, out) kernels, square ones too."""

    def __init__(self) -> None:
        super().__init__()
        embeddings = nn.Module()
        for name, rows in (("position", CONTEXT), ("token_type", 2), ("word", VOCABULARY)):
            embeddings.register_parameter(f"{name}_embeddings", nn.Parameter(torch.zeros(rows, WIDTH)))
        embeddings.add_module("LayerNorm", KernelNorm("gamma", "beta", 1e-12))
        encoder = nn.ModuleDict({f"layer_{index}": _BertLayer() for index in range(DEPTH)})
        pooler = nn.ModuleDict({"dense": Kernel(WIDTH, WIDTH)})
        self.bert = nn.ModuleDict({"embeddings": embeddings, "encoder": encoder, "pooler": pooler})

    def forward(self, tokens: Tensor) -> Tensor:
        bert: Any = self.bert
        tables = bert.embeddings
        length = tokens.shape[1]
        x = tables.word_embeddings[tokens] + tables.position_embeddings[:length] + tables.token_type_embeddings[0]
        x = tables.LayerNorm(x)
        for layer in bert.encoder.values():
            x = layer(x)
        pooled = bert.pooler.dense(x[:, 0]).tanh()
        return torch.cat([x.flatten(), pooled.flatten()])


def flat_arrays(model: nn.Module, *, separator: str = "/", suffix: str = "", ordered: bool = True) -> Flat:
    """The tensors of a model under one dictionary, as ``.npz`` files and TensorFlow checkpoints hold them."""
    items = [(key.replace(".", separator) + suffix, value.numpy()) for key, value in model.state_dict().items()]
    return dict(sorted(items) if ordered else items)


def flax_collections(model: nn.Module) -> dict[str, Any]:
    """The tensors of a model as nested dictionaries, with running statistics in a collection of their own."""
    statistics = {key for key, _ in model.named_buffers()}
    result: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for key, value in sorted(flat_arrays(model, separator=".").items()):
        node = result["batch_stats" if key in statistics else "params"]
        *above, last = key.split(".")
        for name in above:
            node = node.setdefault(name, {})
        node[last] = value
    return result


# Recurrent networks.

RNN_INPUT, RNN_WIDTH, RNN_LAYERS = 12, 20, 2
Step = Callable[[Tensor, Any], tuple[Tensor, Any]]  # input and state -> output and state


def _unroll(step: Step, x: Tensor, state: Any) -> Tensor:
    outputs = []
    for position in range(x.shape[1]):
        output, state = step(x[:, position], state)
        outputs.append(output)
    return torch.stack(outputs, 1)


class TorchTagger(nn.Module):
    """A recurrent network of torch between an embedding and a linear layer."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU], layers: int = RNN_LAYERS, *, silent: str = "") -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, RNN_INPUT)
        self.rnn = kind(RNN_INPUT, RNN_WIDTH, layers, batch_first=True)
        self.fc = nn.Linear(RNN_WIDTH, CLASSES)
        if silent:
            nn.init.zeros_(self.rnn.get_parameter(silent))

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.fc(self.rnn(self.embedding(tokens))[0])
        return result


class _GateCell(nn.Module):
    """A cell with a matrix and a bias for each gate, ``W_ii`` and ``b_ii`` in the notation of torch's documentation."""

    def __init__(self, inputs: int, gates: str) -> None:
        super().__init__()
        self.gates = gates
        for source, columns in (("i", inputs), ("h", RNN_WIDTH)):
            for gate in gates:
                self.register_parameter(f"W_{source}{gate}", nn.Parameter(torch.zeros(RNN_WIDTH, columns)))
                self.register_parameter(f"b_{source}{gate}", nn.Parameter(torch.zeros(RNN_WIDTH)))

    def _sum(self, source: str, gate: str, x: Tensor) -> Tensor:
        return F.linear(x, self.get_parameter(f"W_{source}{gate}"), self.get_parameter(f"b_{source}{gate}"))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        hidden, cell = state
        if self.gates == "ifgo":
            i, f, g, o = (self._sum("i", gate, x) + self._sum("h", gate, hidden) for gate in "ifgo")
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
        else:
            r, z = ((self._sum("i", gate, x) + self._sum("h", gate, hidden)).sigmoid() for gate in "rz")
            n = (self._sum("i", "n", x) + r * self._sum("h", "n", hidden)).tanh()
            hidden = (1 - z) * n + z * hidden
        return hidden, (hidden, cell)


class GateTagger(nn.Module):
    """A recurrent network written out: one matrix for each gate, ``ifgo`` for an LSTM and ``rzn`` for a GRU."""

    def __init__(self, gates: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, RNN_INPUT)
        self.cells = nn.ModuleList(_GateCell(RNN_WIDTH if index else RNN_INPUT, gates) for index in range(RNN_LAYERS))
        self.out = nn.Linear(RNN_WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        zeros = x.new_zeros(len(x), RNN_WIDTH)
        for cell in self.cells:
            x = _unroll(cell, x, (zeros, zeros))
        result: Tensor = self.out(x)
        return result


class _KerasCell(nn.Module):
    """Keras' LSTM (gates i, f, c, o; one bias) or GRU (gates z, r, h; a row of the bias for each side)."""

    def __init__(self, gates: int) -> None:
        super().__init__()
        self.gates = gates
        self.kernel = nn.Parameter(torch.zeros(RNN_INPUT, gates * RNN_WIDTH))
        self.recurrent_kernel = nn.Parameter(torch.zeros(RNN_WIDTH, gates * RNN_WIDTH))
        self.bias = nn.Parameter(torch.zeros((4 * RNN_WIDTH,) if gates == 4 else (2, 3 * RNN_WIDTH)))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        hidden, cell = state
        if self.gates == 4:
            i, f, g, o = (x @ self.kernel + hidden @ self.recurrent_kernel + self.bias).chunk(4, -1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
        else:
            z, r, n = (x @ self.kernel + self.bias[0]).chunk(3, -1)
            hidden_z, hidden_r, hidden_n = (hidden @ self.recurrent_kernel + self.bias[1]).chunk(3, -1)
            update = (z + hidden_z).sigmoid()
            hidden = update * hidden + (1 - update) * (n + (r + hidden_r).sigmoid() * hidden_n).tanh()
        return hidden, (hidden, cell)


class KerasTagger(nn.Module):
    """A recurrent network in Keras' layout, of one layer: ``lstm`` or ``gru``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.ParameterDict({"embeddings": torch.zeros(VOCABULARY, RNN_INPUT)})
        cell = nn.ModuleDict({f"{kind}_cell": _KerasCell(4 if kind == "lstm" else 3)})
        self.add_module(kind, cell)
        self.dense = Kernel(RNN_WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding["embeddings"][tokens]
        zeros = x.new_zeros(len(x), RNN_WIDTH)
        result: Tensor = self.dense(_unroll(self.get_submodule(f"{self.kind}.{self.kind}_cell"), x, (zeros, zeros)))
        return result


# Patches through a linear layer.


class _PreNorm(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.fn(self.norm(x))
        return result


class _FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = linear(WIDTH, 3 * WIDTH)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.to_out(attend(*self.to_qkv(x).chunk(3, -1)))
        return result


class _FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Dropout(0.0), nn.Linear(HIDDEN, WIDTH)
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)
        return result


class PatchViT(nn.Module):
    """The vision transformer of vit-pytorch, whose patches are flattened with the channels last; first on request."""

    def __init__(self, *, channels_first: bool = False) -> None:
        super().__init__()
        self.channels_first = channels_first
        self.pos_embedding = nn.Parameter(torch.zeros(1, SEQUENCE, WIDTH))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.to_patch_embedding = nn.Sequential(nn.Identity(), nn.Linear(3 * PATCH * PATCH, WIDTH))
        self.transformer = nn.Module()
        pairs = (nn.ModuleList([_PreNorm(_FusedAttention()), _PreNorm(_FeedForward())]) for _ in range(DEPTH))
        self.transformer.add_module("layers", nn.ModuleList(pairs))
        self.mlp_head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # batch, channels, rows, columns, h, w
        order = (0, 2, 3, 1, 4, 5) if self.channels_first else (0, 2, 3, 4, 5, 1)
        x = self.to_patch_embedding(patches.permute(order).flatten(3).flatten(1, 2))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embedding
        body: Any = self.transformer
        for attention, feed_forward in body.layers:
            x = feed_forward(attention(x))
        result: Tensor = self.mlp_head(x[:, 0])
        return result


# Diffusion transformers, whose last norm is modulated by a shift and a scale, in either order.


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def _waves(times: Tensor) -> Tensor:
    angles = times[:, None] * 10000.0 ** (-torch.arange(WIDTH // 2) / (WIDTH // 2))
    return torch.cat([angles.cos(), angles.sin()], -1)


class _DiTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "proj": nn.Linear(WIDTH, WIDTH)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 4 * WIDTH), "fc2": nn.Linear(4 * WIDTH, WIDTH)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, -1)
        mixed = attend(*self.attn["qkv"](_modulate(x, shift, scale)).chunk(3, -1))
        x = x + gate[:, None] * self.attn["proj"](mixed)
        inner = F.gelu(self.mlp["fc1"](_modulate(x, shift2, scale2)), approximate="tanh")
        result: Tensor = x + gate2[:, None] * self.mlp["fc2"](inner)
        return result


class _FinalLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 3 * PATCH * PATCH)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, -1)
        result: Tensor = self.linear(_modulate(x, shift, scale))
        return result


class DiT(nn.Module):
    """A diffusion transformer with its authors' names; every modulation gives the shift before the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, PATCH, PATCH)})
        times = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.t_embedder = nn.ModuleDict({"mlp": times})
        self.blocks = nn.ModuleList(_DiTBlock() for _ in range(DEPTH))
        self.final_layer = _FinalLayer()

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        x = self.x_embedder["proj"](images).flatten(2).transpose(1, 2)
        condition = self.t_embedder["mlp"](_waves(times))
        for block in self.blocks:
            x = block(x, condition)
        result: Tensor = self.final_layer(x, condition)
        return result


class _DiffusersBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.ModuleDict({"linear": nn.Linear(WIDTH, 6 * WIDTH)})
        heads: dict[str, nn.Module] = {name: nn.Linear(WIDTH, WIDTH) for name in ("to_q", "to_k", "to_v")}
        self.attn = nn.ModuleDict(heads | {"to_out": nn.Sequential(nn.Linear(WIDTH, WIDTH))})
        first = nn.ModuleDict({"proj": nn.Linear(WIDTH, 4 * WIDTH)})
        self.ff = nn.ModuleDict({"net": nn.ModuleList([first, nn.Identity(), nn.Linear(4 * WIDTH, WIDTH)])})

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.norm1["linear"](F.silu(condition)).chunk(6, -1)
        normed = _modulate(x, shift, scale)
        mixed = attend(*(self.attn[name](normed) for name in ("to_q", "to_k", "to_v")))
        x = x + gate[:, None] * self.attn["to_out"](mixed)
        net: Any = self.ff["net"]
        inner = F.gelu(net[0]["proj"](_modulate(x, shift2, scale2)), approximate="tanh")
        result: Tensor = x + gate2[:, None] * net[2](inner)
        return result


class DiffusersDiT(nn.Module):
    """What ``DiT`` computes, with the names of diffusers; the last modulation gives the scale before the shift."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, PATCH, PATCH)})
        times = {"linear_1": nn.Linear(WIDTH, WIDTH), "linear_2": nn.Linear(WIDTH, WIDTH)}
        self.time_text_embed = nn.ModuleDict({"timestep_embedder": nn.ModuleDict(times)})
        self.transformer_blocks = nn.ModuleList(_DiffusersBlock() for _ in range(DEPTH))
        self.norm_out = nn.ModuleDict({"linear": nn.Linear(WIDTH, 2 * WIDTH)})
        self.proj_out = nn.Linear(WIDTH, 3 * PATCH * PATCH)

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        x = self.pos_embed["proj"](images).flatten(2).transpose(1, 2)
        embedder: Any = self.time_text_embed["timestep_embedder"]
        condition = embedder.linear_2(F.silu(embedder.linear_1(_waves(times))))
        for block in self.transformer_blocks:
            x = block(x, condition)
        scale, shift = self.norm_out["linear"](F.silu(condition)).chunk(2, -1)
        result: Tensor = self.proj_out(_modulate(x, shift, scale))
        return result
