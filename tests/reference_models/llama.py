"""Llama and what descends from it, as several libraries store them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference_models.parts import (
    DEPTH,
    EXPERTS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    VOCABULARY,
    WIDTH,
    DecoderBlock,
    RMSNorm,
    Rotation,
    SwiGLU,
    attend,
    decode,
    linear,
    rotate_halves,
    rotate_pairs,
)


class _GroupedAttention(nn.Module):
    """Causal grouped-query attention of four linear layers with the given names: q, k, v, out."""

    def __init__(self, names: str, rotate: Rotation | None, *, kv_heads: int = KV_HEADS, bias: bool = False) -> None:
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


class MetaLlama(nn.Module):
    """Llama as Meta publishes it; files of its first versions hold the rotation's frequencies too."""

    def __init__(self, *, frequencies: bool = True) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = RMSNorm()
        self.output = linear(WIDTH, VOCABULARY)
        self.layers = nn.ModuleList(
            DecoderBlock(
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
        return decode(self.tok_embeddings, self.layers, self.norm, self.output, tokens)


class TorchtuneLlama(nn.Module):
    """Llama in torchtune: Hugging Face's names for the projections, and Meta's order of their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            DecoderBlock(
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
        return decode(self.tok_embeddings, self.layers, self.norm, self.output, tokens)


class _FusedAttention(nn.Module):
    """Fused query, key and value, one after another or, ``grouped``, for one group of heads after another."""

    def __init__(self, fused: str, out: str, *, grouped: bool, rotate: Rotation | None = rotate_halves) -> None:
        super().__init__()
        self.names, self.grouped, self.rotate = (fused, out), grouped, rotate
        self.add_module(fused, linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM))
        self.add_module(out, linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        fused, out = (self.get_submodule(name) for name in self.names)
        rows = fused(x)
        if self.grouped:
            groups = rows.unflatten(-1, (KV_HEADS, HEADS // KV_HEADS + 2, HEAD_DIM))
            q, k, v = groups[..., :-2, :].flatten(2), groups[..., -2, :].flatten(2), groups[..., -1, :].flatten(2)
        else:
            q, k, v = rows.split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], -1)
        result: Tensor = out(attend(q, k, v, HEADS, KV_HEADS, causal=True, rotate=self.rotate))
        return result


class LitLlama(nn.Module):
    """Llama in litgpt, whose fused projection is ``qkv`` in blocks and was ``attn`` in groups of heads."""

    def __init__(self, fused: str = "qkv") -> None:
        super().__init__()
        self.lm_head = linear(WIDTH, VOCABULARY)
        blocks = (
            DecoderBlock(
                {
                    "norm_1": RMSNorm(),
                    "attn": _FusedAttention(fused, "proj", grouped=fused == "attn"),
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
        return decode(transformer.wte, transformer.h, transformer.ln_f, self.lm_head, tokens)


class OwnLlama(nn.Module):
    """Llama under names of a person's own, with either rotation; two names of projections are a fused one and the last.

    With ``context`` it has a table of positions and rotates nothing.
    """

    def __init__(self, names: str, rotate: Rotation | None, context: int = 0, *, bias: bool = False) -> None:
        super().__init__()
        projections = names.split()

        def attention() -> nn.Module:
            if len(projections) == 2:
                return _FusedAttention(*projections, grouped=False, rotate=rotate)
            return _GroupedAttention(names, rotate, bias=bias)

        self.emb = nn.Embedding(VOCABULARY, WIDTH)
        if context:
            self.pos_emb = nn.Embedding(context, WIDTH)
        self.blocks = nn.ModuleList(
            DecoderBlock(
                {
                    "n1": RMSNorm(name="gain"),
                    "attn": attention(),
                    "n2": RMSNorm(name="gain"),
                    "mlp": SwiGLU("w1", "w3", "w2"),
                },
                "n1 attn n2 mlp",
            )
            for _ in range(DEPTH)
        )
        self.norm_out = RMSNorm(name="gain")
        self.unembed = linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return decode(self.emb, self.blocks, self.norm_out, self.unembed, tokens)


class InternLM(nn.Module):
    """The second generation of InternLM: Meta's names, Hugging Face's rotation, and ``wqkv`` in groups of heads."""

    def __init__(self) -> None:
        super().__init__()
        blocks = nn.ModuleList(
            DecoderBlock(
                {
                    "attention": _FusedAttention("wqkv", "wo", grouped=True),
                    "feed_forward": SwiGLU("w1", "w3", "w2"),
                    "attention_norm": RMSNorm(),
                    "ffn_norm": RMSNorm(),
                },
                "attention_norm attention ffn_norm feed_forward",
            )
            for _ in range(DEPTH)
        )
        modules = {"tok_embeddings": nn.Embedding(VOCABULARY, WIDTH), "layers": blocks, "norm": RMSNorm()}
        self.model = nn.ModuleDict(modules)
        self.output = linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        model: Any = self.model
        return decode(model.tok_embeddings, model.layers, model.norm, self.output, tokens)


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
            DecoderBlock(
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
        return decode(model.embed_tokens, model.layers, model.norm, self.lm_head, tokens)


class MistralMixtral(nn.Module):
    """Mixtral as Mistral publishes it, with Meta's names and rotation."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = RMSNorm()
        self.output = linear(WIDTH, VOCABULARY)
        self.layers = nn.ModuleList(
            DecoderBlock(
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
        return decode(self.tok_embeddings, self.layers, self.norm, self.output, tokens)


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
        return decode(model.embed_tokens, model.layers, model.norm, self.lm_head, tokens)


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
            DecoderBlock(
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
        return decode(words, encoder.layers, encoder.final_layernorm, model.output_layer, tokens)
