"""Sizes of networks of transformers as their authors published them, written down here: nothing is downloaded.

They are from model cards, papers and the docstrings of the configurations, as far as the authors of this page know
them. A row is a name, the class that is built, and what differs from the defaults of its configuration. The default
configuration of every family is beside these, under the name of its class, whether or not anybody published weights
of it; where it cannot be built, since a default lacks a size, it stands here with that size. Left out are, of
transformers 5.24, LayoutLMv2, whose backbone is detectron2's, which no registry has; Granite4Vision, whose vocabulary
with the token of an image is not known here, and the vision tower of DiffusionGemma, whose depth is not; and the
wrappers of timm, whose models are timm's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Options = Mapping[str, Any]


def published() -> Iterator[tuple[str, str, Options]]:
    """Yield the name of each network, its class in transformers, and the options of its configuration."""
    for class_name, names, rows in _TABLES:
        for name, *values in rows:
            yield name, class_name, dict(zip(names.split(), values, strict=True))
    yield from _OTHERS


_BERT = "hidden_size num_hidden_layers num_attention_heads intermediate_size"
_KV = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size"
_T5 = "d_model num_layers num_heads d_ff d_kv"
_WHISPER = (
    "d_model encoder_layers decoder_layers encoder_attention_heads decoder_attention_heads encoder_ffn_dim "
    "decoder_ffn_dim num_mel_bins"
)


def _dilations(pairs: int) -> list[list[int]]:
    """Return those of Dinat's stages, of which the third has so many pairs of layers; no shape depends on them."""
    return [[1, 8, 1], [1, 4, 1, 4], [1, 2] * pairs, [1] * 5]


_TABLES: tuple[tuple[str, str, tuple[tuple[Any, ...], ...]], ...] = (
    (
        "BertModel",
        _BERT,
        (
            ("bert-base", 768, 12, 12, 3072),
            ("bert-large", 1024, 24, 16, 4096),
            ("bert-medium", 512, 8, 8, 2048),
            ("bert-small", 512, 4, 8, 2048),
            ("bert-mini", 256, 4, 4, 1024),
            ("bert-tiny", 128, 2, 2, 512),
            ("all-MiniLM-L6-v2", 384, 6, 12, 1536),
            ("all-MiniLM-L12-v2", 384, 12, 12, 1536),
        ),
    ),
    (
        "RobertaModel",
        f"vocab_size max_position_embeddings type_vocab_size {_BERT}",
        (("roberta-base", 50265, 514, 1, 768, 12, 12, 3072), ("roberta-large", 50265, 514, 1, 1024, 24, 16, 4096)),
    ),
    (
        "XLMRobertaModel",
        f"vocab_size max_position_embeddings type_vocab_size {_BERT}",
        (
            ("xlm-roberta-base", 250002, 514, 1, 768, 12, 12, 3072),
            ("xlm-roberta-large", 250002, 514, 1, 1024, 24, 16, 4096),
        ),
    ),
    (
        "AlbertModel",
        _BERT,
        (
            ("albert-base-v2", 768, 12, 12, 3072),
            ("albert-large-v2", 1024, 24, 16, 4096),
            ("albert-xlarge-v2", 2048, 24, 16, 8192),
            ("albert-xxlarge-v2", 4096, 12, 64, 16384),
        ),
    ),
    (
        "ElectraModel",
        f"embedding_size {_BERT}",
        (
            ("electra-small", 128, 256, 12, 4, 1024),
            ("electra-base", 768, 768, 12, 12, 3072),
            ("electra-large", 1024, 1024, 24, 16, 4096),
        ),
    ),
    ("ModernBertModel", _BERT, (("ModernBERT-large", 1024, 28, 16, 2624),)),
    (
        "EsmModel",
        f"vocab_size pad_token_id position_embedding_type {_BERT}",
        (
            ("esm2_t6_8M", 33, 1, "rotary", 320, 6, 20, 1280),
            ("esm2_t12_35M", 33, 1, "rotary", 480, 12, 20, 1920),
            ("esm2_t30_150M", 33, 1, "rotary", 640, 30, 20, 2560),
            ("esm2_t33_650M", 33, 1, "rotary", 1280, 33, 20, 5120),
            ("esm2_t36_3B", 33, 1, "rotary", 2560, 36, 40, 10240),
        ),
    ),
    (
        "GPT2Model",
        "n_embd n_layer n_head",
        (
            ("gpt2", 768, 12, 12),
            ("gpt2-medium", 1024, 24, 16),
            ("gpt2-large", 1280, 36, 20),
            ("gpt2-xl", 1600, 48, 25),
            ("distilgpt2", 768, 6, 12),
        ),
    ),
    (
        "GPTNeoModel",
        "hidden_size num_layers num_heads attention_types",
        (
            ("gpt-neo-125m", 768, 12, 12, [[["global", "local"], 6]]),
            ("gpt-neo-1.3B", 2048, 24, 16, [[["global", "local"], 12]]),
            ("gpt-neo-2.7B", 2560, 32, 20, [[["global", "local"], 16]]),
        ),
    ),
    (
        "GPTNeoXModel",
        f"vocab_size {_BERT}",
        (
            ("pythia-70m", 50304, 512, 6, 8, 2048),
            ("pythia-160m", 50304, 768, 12, 12, 3072),
            ("pythia-410m", 50304, 1024, 24, 16, 4096),
            ("pythia-1b", 50304, 2048, 16, 8, 8192),
            ("pythia-1.4b", 50304, 2048, 24, 16, 8192),
            ("pythia-2.8b", 50304, 2560, 32, 32, 10240),
            ("pythia-6.9b", 50432, 4096, 32, 32, 16384),
            ("pythia-12b", 50688, 5120, 36, 40, 20480),
            ("gpt-neox-20b", 50432, 6144, 44, 64, 24576),
        ),
    ),
    (
        "OPTModel",
        "hidden_size word_embed_proj_dim num_hidden_layers num_attention_heads ffn_dim do_layer_norm_before",
        (
            ("opt-125m", 768, 768, 12, 12, 3072, True),
            ("opt-350m", 1024, 512, 24, 16, 4096, False),
            ("opt-1.3b", 2048, 2048, 24, 32, 8192, True),
            ("opt-2.7b", 2560, 2560, 32, 32, 10240, True),
            ("opt-6.7b", 4096, 4096, 32, 32, 16384, True),
            ("opt-13b", 5120, 5120, 40, 40, 20480, True),
            ("opt-30b", 7168, 7168, 48, 56, 28672, True),
            ("opt-66b", 9216, 9216, 64, 72, 36864, True),
        ),
    ),
    (
        "BloomModel",
        "vocab_size hidden_size n_layer n_head",
        (
            ("bloom-560m", 250880, 1024, 24, 16),
            ("bloom-1b1", 250880, 1536, 24, 16),
            ("bloom-1b7", 250880, 2048, 24, 16),
            ("bloom-3b", 250880, 2560, 30, 32),
            ("bloom-7b1", 250880, 4096, 30, 32),
            ("bloom", 250880, 14336, 70, 112),
        ),
    ),
    (
        "LlamaModel",
        f"vocab_size {_KV}",
        (
            ("Llama-2-7b", 32000, 4096, 32, 32, 32, 11008),
            ("Llama-2-13b", 32000, 5120, 40, 40, 40, 13824),
            ("llama-30b", 32000, 6656, 60, 52, 52, 17920),
            ("llama-65b", 32000, 8192, 80, 64, 64, 22016),
            ("Llama-2-70b", 32000, 8192, 80, 64, 8, 28672),
            ("CodeLlama-34b", 32000, 8192, 48, 64, 8, 22016),
            ("Meta-Llama-3-8B", 128256, 4096, 32, 32, 8, 14336),
            ("Meta-Llama-3-70B", 128256, 8192, 80, 64, 8, 28672),
            ("Llama-3.1-405B", 128256, 16384, 126, 128, 8, 53248),
            ("Llama-3.2-1B", 128256, 2048, 16, 32, 8, 8192),
            ("Llama-3.2-3B", 128256, 3072, 28, 24, 8, 8192),
            ("TinyLlama-1.1B", 32000, 2048, 22, 32, 4, 5632),
            ("SmolLM-135M", 49152, 576, 30, 9, 3, 1536),
            ("SmolLM-360M", 49152, 960, 32, 15, 5, 2560),
            ("SmolLM-1.7B", 49152, 2048, 24, 32, 32, 8192),
            ("Yi-34B", 64000, 7168, 60, 56, 8, 20480),
        ),
    ),
    (
        "MistralModel",
        f"vocab_size head_dim {_KV}",
        (
            ("Mistral-7B", 32000, 128, 4096, 32, 32, 8, 14336),
            ("Mistral-Nemo-12B", 131072, 128, 5120, 40, 32, 8, 14336),
            ("Mistral-Small-24B", 131072, 128, 5120, 40, 32, 8, 32768),
        ),
    ),
    ("MixtralModel", _KV, (("Mixtral-8x7B", 4096, 32, 32, 8, 14336), ("Mixtral-8x22B", 6144, 56, 48, 8, 16384))),
    (
        "Qwen2Model",
        f"vocab_size {_KV}",
        (
            ("Qwen1.5-0.5B", 151936, 1024, 24, 16, 16, 2816),
            ("Qwen1.5-1.8B", 151936, 2048, 24, 16, 16, 5504),
            ("Qwen1.5-4B", 151936, 2560, 40, 20, 20, 6912),
            ("Qwen1.5-7B", 151936, 4096, 32, 32, 32, 11008),
            ("Qwen2-0.5B", 151936, 896, 24, 14, 2, 4864),
            ("Qwen2-1.5B", 151936, 1536, 28, 12, 2, 8960),
            ("Qwen2-7B", 152064, 3584, 28, 28, 4, 18944),
            ("Qwen2-72B", 152064, 8192, 80, 64, 8, 29568),
            ("Qwen2.5-3B", 151936, 2048, 36, 16, 2, 11008),
            ("Qwen2.5-14B", 152064, 5120, 48, 40, 8, 13824),
            ("Qwen2.5-32B", 152064, 5120, 64, 40, 8, 27648),
        ),
    ),
    (
        "Qwen3Model",
        f"head_dim {_KV}",
        (
            ("Qwen3-0.6B", 128, 1024, 28, 16, 8, 3072),
            ("Qwen3-1.7B", 128, 2048, 28, 16, 8, 6144),
            ("Qwen3-4B", 128, 2560, 36, 32, 8, 9728),
            ("Qwen3-8B", 128, 4096, 36, 32, 8, 12288),
            ("Qwen3-14B", 128, 5120, 40, 40, 8, 17408),
            ("Qwen3-32B", 128, 5120, 64, 64, 8, 25600),
        ),
    ),
    (
        "GemmaModel",
        f"head_dim {_KV}",
        (("gemma-2b", 256, 2048, 18, 8, 1, 16384), ("gemma-7b", 256, 3072, 28, 16, 16, 24576)),
    ),
    (
        "Gemma2Model",
        f"head_dim {_KV}",
        (
            ("gemma-2-2b", 256, 2304, 26, 8, 4, 9216),
            ("gemma-2-9b", 256, 3584, 42, 16, 8, 14336),
            ("gemma-2-27b", 128, 4608, 46, 32, 16, 36864),
        ),
    ),
    ("PhiModel", _BERT, (("phi-1_5", 2048, 24, 32, 8192), ("phi-2", 2560, 32, 32, 10240))),
    (
        "MambaModel",
        "hidden_size num_hidden_layers",
        (
            ("mamba-130m", 768, 24),
            ("mamba-370m", 1024, 48),
            ("mamba-790m", 1536, 48),
            ("mamba-1.4b", 2048, 48),
            ("mamba-2.8b", 2560, 64),
        ),
    ),
    (
        "T5Model",
        _T5,
        (
            ("t5-small", 512, 6, 8, 2048, 64),
            ("t5-base", 768, 12, 12, 3072, 64),
            ("t5-large", 1024, 24, 16, 4096, 64),
            ("t5-3b", 1024, 24, 32, 16384, 128),
            ("t5-11b", 1024, 24, 128, 65536, 128),
        ),
    ),
    *(
        (
            kind,
            f"feed_forward_proj {_T5}",
            (
                (f"{name}-small", "gated-gelu", 512, 8, 6, 1024, 64),
                (f"{name}-base", "gated-gelu", 768, 12, 12, 2048, 64),
                (f"{name}-large", "gated-gelu", 1024, 24, 16, 2816, 64),
                (f"{name}-xl", "gated-gelu", 2048, 24, 32, 5120, 64),
                (f"{name}-xxl", "gated-gelu", 4096, 24, 64, 10240, 64),
            ),
        )
        for kind, name in (("T5Model", "t5-v1_1"), ("T5EncoderModel", "t5-v1_1 encoder"))
    ),
    (
        "BartModel",
        "d_model encoder_layers decoder_layers encoder_attention_heads decoder_attention_heads encoder_ffn_dim "
        "decoder_ffn_dim",
        (("bart-base", 768, 6, 6, 12, 12, 3072, 3072), ("bart-large", 1024, 12, 12, 16, 16, 4096, 4096)),
    ),
    (
        "MarianModel",
        "vocab_size d_model encoder_layers decoder_layers encoder_attention_heads decoder_attention_heads "
        "encoder_ffn_dim decoder_ffn_dim max_position_embeddings",
        (("opus-mt", 58101, 512, 6, 6, 8, 8, 2048, 2048, 512),),
    ),
    (
        "WhisperModel",
        _WHISPER,
        (
            ("whisper-tiny", 384, 4, 4, 6, 6, 1536, 1536, 80),
            ("whisper-base", 512, 6, 6, 8, 8, 2048, 2048, 80),
            ("whisper-small", 768, 12, 12, 12, 12, 3072, 3072, 80),
            ("whisper-medium", 1024, 24, 24, 16, 16, 4096, 4096, 80),
            ("whisper-large-v2", 1280, 32, 32, 20, 20, 5120, 5120, 80),
            ("whisper-large-v3", 1280, 32, 32, 20, 20, 5120, 5120, 128),
            ("whisper-large-v3-turbo", 1280, 32, 4, 20, 20, 5120, 5120, 128),
            ("distil-large-v3", 1280, 32, 2, 20, 20, 5120, 5120, 128),
        ),
    ),
    *(
        (
            kind,
            f"{_BERT} feat_extract_norm do_stable_layer_norm conv_bias",
            (
                (f"{name}-base", 768, 12, 12, 3072, "group", False, False),
                (f"{name}-large", 1024, 24, 16, 4096, *large),
            ),
        )
        for kind, name, large in (
            ("Wav2Vec2Model", "wav2vec2", ("group", False, False)),
            ("Wav2Vec2Model", "wav2vec2-lv60", ("layer", True, True)),
            ("HubertModel", "hubert", ("layer", True, True)),
            ("WavLMModel", "wavlm", ("layer", True, False)),
        )
    ),
    *(
        (
            kind,
            f"patch_size image_size {_BERT}",
            (
                (f"{name}-base-patch16-224", 16, 224, 768, 12, 12, 3072),
                (f"{name}-large-patch16-224", 16, 224, 1024, 24, 16, 4096),
                (f"{name}-base-patch32-384", 32, 384, 768, 12, 12, 3072),
                (f"{name}-huge-patch14-224", 14, 224, 1280, 32, 16, 5120),
            ),
        )
        for kind, name in (("ViTModel", "vit"), ("ViTMAEModel", "vit-mae"), ("BeitModel", "beit"))
    ),
    (
        "DeiTModel",
        _BERT,
        (
            ("deit-tiny-distilled-patch16-224", 192, 12, 3, 768),
            ("deit-small-distilled-patch16-224", 384, 12, 6, 1536),
            ("deit-base-distilled-patch16-224", 768, 12, 12, 3072),
        ),
    ),
    (
        "Dinov2Model",
        "patch_size image_size hidden_size num_hidden_layers num_attention_heads use_swiglu_ffn",
        (
            ("dinov2-small", 14, 518, 384, 12, 6, False),
            ("dinov2-base", 14, 518, 768, 12, 12, False),
            ("dinov2-large", 14, 518, 1024, 24, 16, False),
            ("dinov2-giant", 14, 518, 1536, 40, 24, True),
        ),
    ),
    (
        "SwinModel",
        "embed_dim depths num_heads window_size image_size",
        (
            ("swin-tiny-patch4-window7-224", 96, [2, 2, 6, 2], [3, 6, 12, 24], 7, 224),
            ("swin-small-patch4-window7-224", 96, [2, 2, 18, 2], [3, 6, 12, 24], 7, 224),
            ("swin-base-patch4-window7-224", 128, [2, 2, 18, 2], [4, 8, 16, 32], 7, 224),
            ("swin-base-patch4-window12-384", 128, [2, 2, 18, 2], [4, 8, 16, 32], 12, 384),
            ("swin-large-patch4-window7-224", 192, [2, 2, 18, 2], [6, 12, 24, 48], 7, 224),
            ("swin-large-patch4-window12-384", 192, [2, 2, 18, 2], [6, 12, 24, 48], 12, 384),
        ),
    ),
    *(
        (
            kind,
            "depths hidden_sizes",
            (
                (f"{name}-tiny-224", [3, 3, 9, 3], [96, 192, 384, 768]),
                (f"{name}-small-224", [3, 3, 27, 3], [96, 192, 384, 768]),
                (f"{name}-base-224", [3, 3, 27, 3], [128, 256, 512, 1024]),
                (f"{name}-large-224", [3, 3, 27, 3], [192, 384, 768, 1536]),
                (f"{name}-xlarge-224", [3, 3, 27, 3], [256, 512, 1024, 2048]),
            ),
        )
        for kind, name in (("ConvNextModel", "convnext"), ("ConvNextV2Model", "convnextv2"))
    ),
    (
        "DinatModel",
        "embed_dim depths num_heads mlp_ratio layer_scale_init_value dilations",
        (
            ("dinat-mini-in1k-224", 64, [3, 4, 6, 5], [2, 4, 8, 16], 3.0, 0.0, _dilations(3)),
            ("dinat-tiny-in1k-224", 64, [3, 4, 18, 5], [2, 4, 8, 16], 3.0, 0.0, _dilations(9)),
            ("dinat-small-in1k-224", 96, [3, 4, 18, 5], [3, 6, 12, 24], 2.0, 1e-5, _dilations(9)),
            ("dinat-base-in1k-224", 128, [3, 4, 18, 5], [4, 8, 16, 32], 2.0, 1e-5, _dilations(9)),
        ),
    ),
    (
        "ResNetModel",
        "layer_type depths hidden_sizes",
        (
            ("resnet-18", "basic", [2, 2, 2, 2], [64, 128, 256, 512]),
            ("resnet-34", "basic", [3, 4, 6, 3], [64, 128, 256, 512]),
            ("resnet-50", "bottleneck", [3, 4, 6, 3], [256, 512, 1024, 2048]),
            ("resnet-101", "bottleneck", [3, 4, 23, 3], [256, 512, 1024, 2048]),
            ("resnet-152", "bottleneck", [3, 8, 36, 3], [256, 512, 1024, 2048]),
        ),
    ),
    (
        "SegformerModel",
        "depths hidden_sizes",
        (
            ("segformer-b0", [2, 2, 2, 2], [32, 64, 160, 256]),
            ("segformer-b1", [2, 2, 2, 2], [64, 128, 320, 512]),
            ("segformer-b2", [3, 4, 6, 3], [64, 128, 320, 512]),
            ("segformer-b3", [3, 4, 18, 3], [64, 128, 320, 512]),
            ("segformer-b4", [3, 8, 27, 3], [64, 128, 320, 512]),
            ("segformer-b5", [3, 6, 40, 3], [64, 128, 320, 512]),
        ),
    ),
    (
        "Gemma3TextModel",
        f"head_dim {_KV}",
        (
            ("gemma-3-270m", 256, 640, 18, 4, 1, 2048),
            ("gemma-3-1b", 256, 1152, 26, 4, 1, 6912),
            ("gemma-3-4b text", 256, 2560, 34, 8, 4, 10240),
            ("gemma-3-12b text", 256, 3840, 48, 16, 8, 15360),
            ("gemma-3-27b text", 128, 5376, 62, 32, 16, 21504),
        ),
    ),
    (
        "Phi3Model",
        f"vocab_size {_KV}",
        (
            ("Phi-3-mini", 32064, 3072, 32, 32, 32, 8192),
            ("Phi-3-medium", 32064, 5120, 40, 40, 10, 17920),
            ("phi-4", 100352, 5120, 40, 40, 10, 17920),
        ),
    ),
    (
        "OlmoModel",
        f"vocab_size {_KV}",
        (("OLMo-1B", 50304, 2048, 16, 16, 16, 8192), ("OLMo-7B", 50304, 4096, 32, 32, 32, 11008)),
    ),
    (
        "Olmo2Model",
        f"vocab_size {_KV}",
        (
            ("OLMo-2-1B", 100352, 2048, 16, 16, 16, 8192),
            ("OLMo-2-7B", 100352, 4096, 32, 32, 32, 11008),
            ("OLMo-2-13B", 100352, 5120, 40, 40, 40, 13824),
            ("OLMo-2-32B", 100352, 5120, 64, 40, 8, 27648),
        ),
    ),
    (
        "StableLmModel",
        f"use_qkv_bias vocab_size {_KV}",
        (
            ("stablelm-3b-4e1t", False, 50304, 2560, 32, 32, 32, 6912),
            ("stablelm-2-1_6b", True, 100352, 2048, 24, 32, 32, 5632),
        ),
    ),
    (
        "Starcoder2Model",
        f"vocab_size {_KV}",
        (
            ("starcoder2-3b", 49152, 3072, 30, 24, 2, 12288),
            ("starcoder2-7b", 49152, 4608, 32, 36, 4, 18432),
            ("starcoder2-15b", 49152, 6144, 40, 48, 4, 24576),
        ),
    ),
    (
        "MptModel",
        "vocab_size d_model n_layers n_heads",
        (("mpt-7b", 50432, 4096, 32, 32), ("mpt-30b", 50432, 7168, 48, 64)),
    ),
    (
        "CodeGenModel",
        "vocab_size n_embd n_layer n_head rotary_dim",
        (
            ("codegen-350M", 51200, 1024, 20, 16, 32),
            ("codegen-2B", 51200, 2560, 32, 32, 64),
            ("codegen-6B", 51200, 4096, 33, 16, 64),
            ("codegen-16B", 51200, 6144, 34, 24, 64),
        ),
    ),
    (
        "M2M100Model",
        "vocab_size encoder_layers decoder_layers encoder_ffn_dim decoder_ffn_dim",
        (
            ("m2m100_418M", 128112, 12, 12, 4096, 4096),
            ("m2m100_1.2B", 128112, 24, 24, 8192, 8192),
            ("nllb-200-distilled-600M", 256206, 12, 12, 4096, 4096),
            ("nllb-200-1.3B", 256206, 24, 24, 8192, 8192),
        ),
    ),
    (
        "PegasusModel",
        "vocab_size d_model encoder_layers decoder_layers encoder_ffn_dim decoder_ffn_dim",
        (("pegasus-large", 96103, 1024, 16, 16, 4096, 4096),),
    ),
    (
        "LongformerModel",
        f"vocab_size max_position_embeddings type_vocab_size {_BERT}",
        (
            ("longformer-base-4096", 50265, 4098, 1, 768, 12, 12, 3072),
            ("longformer-large-4096", 50265, 4098, 1, 1024, 24, 16, 4096),
        ),
    ),
    (
        "XLNetModel",
        "d_model n_layer n_head d_inner",
        (("xlnet-base-cased", 768, 12, 12, 3072), ("xlnet-large-cased", 1024, 24, 16, 4096)),
    ),
    (
        "Swinv2Model",
        "embed_dim depths num_heads window_size image_size",
        (
            ("swinv2-tiny-patch4-window8-256", 96, [2, 2, 6, 2], [3, 6, 12, 24], 8, 256),
            ("swinv2-small-patch4-window8-256", 96, [2, 2, 18, 2], [3, 6, 12, 24], 8, 256),
            ("swinv2-base-patch4-window8-256", 128, [2, 2, 18, 2], [4, 8, 16, 32], 8, 256),
            ("swinv2-base-patch4-window16-256", 128, [2, 2, 18, 2], [4, 8, 16, 32], 16, 256),
        ),
    ),
    (
        "Dinov2WithRegistersModel",
        "patch_size image_size hidden_size num_hidden_layers num_attention_heads use_swiglu_ffn",
        (
            ("dinov2-with-registers-small", 14, 518, 384, 12, 6, False),
            ("dinov2-with-registers-base", 14, 518, 768, 12, 12, False),
            ("dinov2-with-registers-large", 14, 518, 1024, 24, 16, False),
            ("dinov2-with-registers-giant", 14, 518, 1536, 40, 24, True),
        ),
    ),
    (
        "DINOv3ViTModel",
        f"num_register_tokens {_BERT}",
        (
            ("dinov3-vits16", 4, 384, 12, 6, 1536),
            ("dinov3-vitb16", 4, 768, 12, 12, 3072),
            ("dinov3-vitl16", 4, 1024, 24, 16, 4096),
        ),
    ),
    (
        "MobileViTModel",
        "hidden_sizes neck_hidden_sizes expand_ratio",
        (
            ("mobilevit-small", [144, 192, 240], [16, 32, 64, 96, 128, 160, 640], 4.0),
            ("mobilevit-x-small", [96, 120, 144], [16, 32, 48, 64, 80, 96, 384], 4.0),
            ("mobilevit-xx-small", [64, 80, 96], [16, 16, 24, 48, 64, 80, 320], 2.0),
        ),
    ),
    ("CvtModel", "depth", (("cvt-13", [1, 2, 10]), ("cvt-21", [1, 4, 16]))),
    (
        "VideoMAEModel",
        _BERT,
        (("videomae-base", 768, 12, 12, 3072), ("videomae-large", 1024, 24, 16, 4096)),
    ),
)

_DEBERTA = {
    "vocab_size": 128100,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
_LARGE = dict(zip(_BERT.split(), (1024, 24, 16, 4096), strict=True))
_SO400M = dict(zip(_BERT.split(), (1152, 27, 16, 4304), strict=True))

_SMALL_VITDET = {
    "model_type": "vitdet",
    **dict(zip(["hidden_size", "num_attention_heads", "num_channels", "image_size"], (384, 6, 4, 512), strict=True)),
    "window_block_indices": [0, 1, 3, 4, 6, 7, 9, 10],
    "residual_block_indices": [2, 5, 8, 11],
    "use_relative_position_embeddings": True,
    "out_features": ["stage12"],
}
_PADDLE_DETECTOR = {
    "scale_factor_list": [1, 2, 4, 8],
    "kernel_list": [3, 2, 2],
    "intraclass_block_config": {
        **{key: [1, 1, 0] for key in ("reduce_channel", "return_channel")},
        **{
            f"{name}_{ratio}ratio": values
            for ratio, size in (("long", 7), ("mid", 5), ("short", 3))
            for name, values in (
                ("vertical_long_to_small_conv", [[size, 1], 1, [size // 2, 0]]),
                ("horizontal_small_to_long_conv", [[1, size], 1, [0, size // 2]]),
                ("symmetric_conv_long", [size, 1, size // 2]),
            )
        },
    },
}
_FULL_ROPE = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}


def _sizes(*values: int) -> dict[str, int]:
    return dict(zip(["vocab_size", *_KV.split()], values, strict=True))


_QWEN4_EXP = {
    "hidden_size": 2560,
    "num_hidden_layers": 48,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "linear_num_value_heads": 48,
    "moe_intermediate_size": 640,
    "shared_expert_intermediate_size": 640,
    "eos_token_id": 248044,
    "ple_layer_ids": [2],
    "split_ngram_parts": 128,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 128,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 4,
    "output_gate_type": "sigmoid",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25},
}
_OTHERS: tuple[tuple[str, str, Options], ...] = (
    *(
        (name, "DebertaV2Model", {**_DEBERTA, **dict(zip(_BERT.split(), sizes, strict=True))})
        for name, sizes in (
            ("deberta-v3-xsmall", (384, 12, 6, 1536)),
            ("deberta-v3-small", (768, 6, 12, 3072)),
            ("deberta-v3-base", (768, 12, 12, 3072)),
            ("deberta-v3-large", (1024, 24, 16, 4096)),
        )
    ),
    *(
        (name, "CLIPModel", {"projection_dim": projection, "text_config": text, "vision_config": vision})
        for name, projection, text, vision in (
            ("clip-vit-base-patch32", 512, {}, {"patch_size": 32}),
            ("clip-vit-base-patch16", 512, {}, {"patch_size": 16}),
            (
                "clip-vit-large-patch14",
                768,
                {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
                {**_LARGE, "patch_size": 14},
            ),
            (
                "clip-vit-large-patch14-336",
                768,
                {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
                {**_LARGE, "patch_size": 14, "image_size": 336},
            ),
        )
    ),
    (
        "siglip-so400m-patch14-384",
        "SiglipModel",
        {"text_config": {**_SO400M}, "vision_config": {**_SO400M, "patch_size": 14, "image_size": 384}},
    ),
    (
        "sam-vit-large",
        "SamModel",
        {
            "vision_config": {
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "global_attn_indexes": [5, 11, 17, 23],
            }
        },
    ),
    (
        "sam-vit-huge",
        "SamModel",
        {
            "vision_config": {
                "hidden_size": 1280,
                "num_hidden_layers": 32,
                "num_attention_heads": 16,
                "global_attn_indexes": [7, 15, 23, 31],
            }
        },
    ),
    (
        "falcon-40b",
        "FalconModel",
        {
            "hidden_size": 8192,
            "num_hidden_layers": 60,
            "num_attention_heads": 128,
            "num_kv_heads": 8,
            "new_decoder_architecture": True,
        },
    ),
    (
        "Qwen3-30B-A3B",
        "Qwen3MoeModel",
        {
            **dict(zip(_KV.split(), (2048, 48, 32, 4, 6144), strict=True)),
            "head_dim": 128,
            "num_experts": 128,
            "moe_intermediate_size": 768,
        },
    ),
    *(
        (name, name, {"prediction_length": 24})
        for name in ("AutoformerModel", "InformerModel", "TimeSeriesTransformerModel")
    ),
    *((name, name, {"head_dim": 128}) for name in ("HunYuanDenseV1Model", "HunYuanMoEV1Model", "HunYuanVLTextModel")),
    ("HunYuanVLModel", "HunYuanVLModel", {"text_config": {"head_dim": 128}}),
    ("Ministral-8B", "MinistralModel", {"head_dim": 128, **_sizes(131072, 4096, 36, 32, 8, 12288)}),
    ("internlm3-8b", "LlamaModel", {"head_dim": 128, **_sizes(128512, 4096, 48, 32, 2, 10240)}),
    ("IQuest-Coder", "LlamaModel", {"head_dim": 128, **_sizes(76800, 5120, 80, 40, 8, 27648)}),
    (
        "sarvam MLA",
        "DeepseekV3Model",
        {
            **_sizes(262144, 4096, 32, 64, 64, 16384),
            "n_routed_experts": 128,
            "q_lora_rank": None,
            "first_k_dense_replace": 1,
        },
    ),
    (
        "sarvam MoE",
        "Glm4MoeModel",
        {
            **_sizes(262144, 4096, 19, 64, 4, 8192),
            "head_dim": 64,
            "moe_intermediate_size": 1024,
            "use_qk_norm": True,
        },
    ),
    ("nemotron", "NemotronModel", {"num_key_value_heads": 8}),
    ("Minitron-4B", "NemotronModel", {"head_dim": 128, **_sizes(256000, 3072, 32, 24, 8, 9216)}),
    ("Minitron-8B", "NemotronModel", {"head_dim": 128, **_sizes(256000, 4096, 32, 48, 8, 16384)}),
    (
        "dbrx",
        "DbrxModel",
        {
            "d_model": 6144,
            "n_heads": 48,
            "n_layers": 40,
            "vocab_size": 100352,
            "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000.0},
            "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
        },
    ),
    (
        "dots.llm1",
        "Dots1Model",
        {
            "hidden_size": 4096,
            "n_routed_experts": 128,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
        },
    ),
    (
        "LFM2-8B-A1B",
        "Lfm2MoeModel",
        {
            "num_hidden_layers": 24,
            "layer_types": ["full_attention" if n in (2, 6, 10, 14, 18, 21) else "conv" for n in range(24)],
        },
    ),
    (
        "DeepSeek-OCR-2",
        "DeepseekOcr2Model",
        {
            "text_config": {
                "vocab_size": 129280,
                "hidden_size": 1280,
                "intermediate_size": 6848,
                "num_hidden_layers": 12,
                "num_attention_heads": 10,
                "moe_intermediate_size": 896,
                "num_experts_per_tok": 6,
                "mlp_layer_types": ["dense", *["sparse"] * 11],
            },
            "vision_config": {"encoder_config": dict(zip(_KV.split(), (896, 24, 14, 2, 4864), strict=True))},
        },
    ),
    (
        "aya-vision-8b",
        "AyaVisionModel",
        {
            "vision_config": {
                "model_type": "siglip_vision_model",
                **_SO400M,
                "patch_size": 14,
                "image_size": 364,
                "vision_use_head": False,
            },
            "text_config": {"model_type": "cohere2", **_sizes(256000, 4096, 32, 32, 8, 14336)},
        },
    ),
    (
        "Perception-LM-1B",
        "PerceptionLMModel",
        {
            "text_config": {"model_type": "llama", **_sizes(128256, 2048, 16, 32, 8, 8192)},
            "vision_config": {
                "model_type": "timm_wrapper",
                "architecture": "vit_pe_core_large_patch14_336",
                "model_args": {
                    "depth": 23,
                    "embed_dim": 1024,
                    "global_pool": "",
                    "img_size": [448, 448],
                    "init_values": 0.1,
                    "ref_feat_shape": [32, 32],
                    "use_post_transformer_norm": False,
                },
            },
        },
    ),
    ("chameleon-7b", "ChameleonModel", {"vocabulary_map": {"<image>": 8711}}),
    ("Emu3", "Emu3Model", {"vocabulary_map": {"<image>": 151859}}),
    ("CohereCompassTextModel", "CohereCompassTextModel", _FULL_ROPE),
    ("CohereCompassModel", "CohereCompassModel", {"text_config": _FULL_ROPE}),
    (
        "Gemma4AssistantForCausalLM",
        "Gemma4AssistantForCausalLM",
        {
            "text_config": {
                "model_type": "gemma4_text",
                "hidden_size_per_layer_input": 0,
                "vocab_size_per_layer_input": 0,
            }
        },
    ),
    ("T5Gemma2Encoder", "T5Gemma2Encoder", {"text_config": {"dropout_rate": 0.0}}),
    ("moonshine-streaming-tiny", "MoonshineStreamingModel", {"num_key_value_heads": 8}),
    (
        "vitmatte-small",
        "VitMatteForImageMatting",
        {
            "backbone_config": _SMALL_VITDET,
            "fusion_hidden_sizes": [256, 128, 64, 32],
            "convstream_hidden_sizes": [48, 96, 192],
        },
    ),
    ("PP-OCRv5_server_det", "PPOCRV5ServerDetForObjectDetection", _PADDLE_DETECTOR),
    ("PP-OCRv6_medium_det", "PPOCRV6MediumDetForObjectDetection", _PADDLE_DETECTOR),
    *((name, name, {}) for name in ("MusicgenForConditionalGeneration", "MusicgenMelodyForConditionalGeneration")),
    ("Qwen3OmniMoeThinker", "Qwen3OmniMoeThinkerForConditionalGeneration", {}),
    (
        "Qwen3-Omni-30B-A3B talker",
        "Qwen3OmniMoeTalkerForConditionalGeneration",
        {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 768}},
    ),
    ("Qwen4-Exp text", "Qwen4ExpTextModel", _QWEN4_EXP),
    ("Qwen4-Exp", "Qwen4ExpModel", {"text_config": _QWEN4_EXP, "vision_config": {"out_hidden_size": 2560}}),
    (
        "diffusiongemma-26B-A4B text",
        "DiffusionGemmaEncoderTextModel",
        {
            **dict(zip(_KV.split(), (2816, 30, 16, 8, 2112), strict=True)),
            "num_experts": 128,
            "top_k_experts": 8,
            "moe_intermediate_size": 704,
            "global_head_dim": 512,
            "num_global_key_value_heads": 2,
        },
    ),
)
