"""Every table of words: those that people use for one role in a network, and those that tell layouts and code apart.

They are evidence for the matcher, never a verdict, and name roles, not architectures. A word that is not listed stands
for itself.
"""

from __future__ import annotations

import re
from itertools import permutations

# canonical word -> other spellings. A spelling may stand for several words ("wte" is a token embedding).
SYNONYMS: dict[str, str] = {
    # layer types
    "conv": "convolution conv1d conv2d conv3d",
    "norm": "normalization batchnormalization layernormalization groupnormalization layernorm ln lnorm bn batchnorm "
    "batchnorm2d bnorm gn groupnorm rmsnorm nrm",
    "proj": "projection projector",
    "linear": "lin dense einsum",
    "embed": "embedding embeddings embeds emb",
    # attention
    "attn": "attention att mha msa multiheadattention multiheaddotproductattention",
    "self attn": "sa selfattn selfattention slfattn",
    "cross attn": "ca crossattn crossattention encdecattention encdecattn encoderattn xattn",
    "q": "query queries wq qw qs",
    "k": "key keys wk kw ks",
    "v": "value values val wv vw vs",
    "o": "wo",
    "qkv": "wqkv querykeyvalue cattn inproj",
    "kv": "wkv keyvalue",
    "qk": "wqk",
    # recurrence
    "ih": "i2h x2h inputproj",
    "hh": "h2h recurrent recurrence hidden",
    # feed-forward
    "mlp": "ffn ffw ff feedforward postattention postattn",
    "gate": "w1 wg fc12",
    "up": "w3 fc11",
    "down": "w2",
    "gateup": "w12 w13 wg1",
    "in": "intermediate fc1 lin1 linear1 dense1 wi densehto4h",
    "out": "fc2 lin2 linear2 dense2 output outputs dense4htoh",
    "expand": "expansion exp excite excitation",
    "reduce": "reduction squeeze",
    "depthwise": "dw dwconv",
    "pointwise": "pw",
    # tokens and positions
    "pos": "position positions positional",
    "tok": "token tokens word words",
    "tok embed": "wte",
    "pos embed": "wpe posembed",
    "cls": "class classification",
    "reg": "regression",
    "bbox": "bboxes box boxes",
    "dist": "distillation distilled distil",
    "rel": "relative",
    "spec": "spectrogram",
    "patch": "patches",
    # structure
    "encoder block": "encoderblock",
    "block": "blocks blk layer layers resblock resblocks h unit units",
    "stage": "stages",
    "shortcut": "downsample skip residual identity",
    "stem embed": "embedder",
    "head": "heads classifier logits",
    "scale": "gamma ls lambda layerscale g",
    "bias": "beta shift offset b biases",
    "weight": "kernel w weights",
    "var": "variance",
    "vision": "visual image img vit",
    "text": "language txt",
    "encoder": "enc",
    "decoder": "dec",
    "model": "network net module",
    "add": "added",
    "pre": "before prior macaron",
    "post": "after",
    "last": "final",
    "reverse": "reversed backward",
    "lora": "",
    "content": "",
}

# Words that tell the place of a layer among those that are alike, in the order of a block.
ORDINALS: dict[str, int] = {
    "input": 1,
    "in": 1,
    "forward": 1,
    "first": 1,
    "self": 1,
    "gate": 1,
    "expand": 1,
    "depthwise": 2,
    "attn": 2,
    "second": 2,
    "up": 2,
    "cross": 3,
    "mlp": 4,
    "out": 5,
    "reverse": 5,
    "last": 5,
}

# Words for types of layers, and for modules of any kind, which say nothing of what they are for.
LAYER_TYPES: frozenset[str] = frozenset({"conv", "norm", "linear", "proj", "weight", "bias"})
MODULE_TYPES: frozenset[str] = frozenset({"block", "stage", "model"})

# What the parts of a fused projection are.
ROLES: frozenset[str] = frozenset({"q", "k", "v"})

# Words that others are written on to, as in "kpos" and "prenorm".
PREFIXES: tuple[str, ...] = ("pre", "post", *sorted(ROLES))

# What networks predict, wherever in a path it stands: a head for one of them is none for another.
OUTPUTS: tuple[str, ...] = ("mask bbox keypoint", "mask reg cls", "bbox cls")

# Sets of words of which at most one is true of a tensor: a different one on each side speaks against the pair.
RIVALS: tuple[str, ...] = (
    "q k v o",
    "gate up down",
    "in out",
    "encoder decoder",
    "self cross",
    "pos tok type",
    "cls dist mask",
    "ih hh",
    "mean var",
    "vision text",
    "reduce expand",
    "depthwise pointwise",
    "row column",
    "online ema",
    "student teacher",
    *OUTPUTS,
)

# Words that often stand for one another, though not always.
RELATED: tuple[tuple[str, str, float], ...] = (
    ("proj", "linear", 0.6),
    ("proj", "o", 0.4),
    ("linear", "fc", 0.6),
    ("o", "out", 0.8),
    ("out", "down", 0.5),
    ("in", "up", 0.4),
    ("input", "down", 0.5),
    ("in", "gate", 0.4),
    ("shortcut", "proj", 0.4),
    ("head", "fc", 0.5),
    ("head", "proj", 0.2),
    ("head", "out", 0.3),
    ("head", "reverse", 0.8),
    ("actor", "policy", 0.8),
    ("actor", "pi", 0.8),
    ("critic", "v", 0.6),
    ("critic", "vf", 0.8),
    ("context", "add", 0.5),
    ("text", "add", 0.5),
    ("context", "text", 0.6),
    ("stage", "block", 0.5),
    ("stem", "patch", 0.4),
    ("scale", "weight", 0.4),
    ("embed", "linear", 0.2),
    ("last", "out", 0.3),
)

# Words for tensors that hold several roles -> the roles in the order in which they hold them, which may be of several
# kinds: the gates of an LSTM are input, forget, cell and output, those of a GRU reset, update and new.
FUSED: dict[str, tuple[tuple[str, ...], ...]] = {
    "qkv": (("q", "k", "v"), ("q", "kv"), ("qk", "v")),
    "kv": (("k", "v"),),
    "gateup": (("gate", "up"),),
    "ih": (("ii", "if", "ig", "io"), ("ir", "iz", "in")),
    "hh": (("hi", "hf", "hg", "ho"), ("hr", "hz", "hn")),
}

# What the gates are called besides the second letter of their roles.
GATES: dict[str, tuple[str, ...]] = {
    "r": ("reset",),
    "z": ("update",),
    "n": ("new", "candidate"),
    "i": ("input",),
    "f": ("forget",),
    "g": ("cell", "c"),
    "o": ("output",),
}

# The words of a fused tensor's name in code that takes the first half for the gate.
GATE_FIRST: frozenset[tuple[str, ...]] = frozenset({("linear", "in"), ("weight", "in"), ("gating", "linear")})

# Names that fused tensors have in code that lays the roles out head by head.
INTERLEAVED: frozenset[str] = frozenset({"query_key_value", "linear_qkv", "c_qkv"})

# Names in code that merges patches by torch's Unfold, which has the channels before the places of a patch.
UNFOLDING: frozenset[str] = frozenset({"w_msa"})

# Names that together tell Hugging Face's code.
HUGGING_FACE_STYLE: frozenset[str] = frozenset({"self_attn", "input_layernorm"})

# Words for layers that give the scale and shift of an adaptive norm.
MODULATION: frozenset[str] = frozenset({"ada", "modulation", "film", "mod"})

# What configs call the number of heads, the width that they share, and the rows of one head.
CONFIG_HEADS: tuple[tuple[str, ...], ...] = (
    ("num_attention_heads", "n_heads", "n_head", "num_heads", "encoder_attention_heads", "attention.head_count"),
    ("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "hidden_dim", "embedding_length"),
    ("head_dim", "kv_channels", "head_size", "d_kv", "attention.key_length"),
)

# Of two encoders of these roles the first, that of keys, is a moving average of the second, that of queries.
MOMENTUM_PAIR: tuple[frozenset[str], frozenset[str]] = (frozenset({"k"}), frozenset({"q"}))

# What classifiers are called; what tables of embeddings are called, and what those of other rows than tokens.
CLASSIFIER_WORDS: frozenset[str] = frozenset({"head", "fc", "logits"})
EMBEDDING_WORDS: frozenset[str] = frozenset({"tok", "embed", "vocab"})
NO_VOCABULARY: frozenset[str] = frozenset({"pos", "rel", "patch"})

# Words of which a table of absolute positions has none.
NO_POSITIONS: frozenset[str] = frozenset({"q", "rel", "type", "bias", "linear", "proj", "conv", "norm"})

# Tokens that have positions of their own -> words in the names of their parameters.
TOKENS: dict[str, frozenset[str]] = {
    "class token": frozenset({"cls"}),
    "distillation token": frozenset({"dist"}),
    "register": frozenset({"register", "registers", "reg"}),
}

# Which of them may stand before a grid, in this order.
TOKENS_BEFORE_GRID: tuple[tuple[str, ...], ...] = (
    (),
    ("class token",),
    ("class token", "distillation token"),
    ("class token", "register"),
    ("class token", "distillation token", "register"),
)

# What modules and configurations call the sizes of a grid, of an image and of a patch.
GRID_ATTRIBUTES: tuple[str, ...] = ("grid_size", "window_size")
IMAGE_ATTRIBUTES: tuple[str, ...] = ("image_size", "img_size")
PATCH_ATTRIBUTE: str = "patch_size"

# Modules that wrappers of torch and its kin put around others: they say nothing of what stands inside.
WRAPPERS: frozenset[str] = frozenset(
    {
        "_orig_mod",  # torch.compile
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "_forward_module",  # Lightning's Fabric
        "averaged_model",
    }
)

# Names of fused tensors that hold blocks in some code and, where keys are shared among queries, groups in other code.
GROUPED: frozenset[str] = frozenset({"wqkv"})

# Names that together, beside a config like Meta's, tell code which rotates neighbouring rows of queries and keys.
META_STYLE: frozenset[str] = frozenset({"wq", "wk", "tok_embeddings"})

# What the config beside a checkpoint of Meta's or Mistral's code holds.
META_CONFIG: frozenset[str] = frozenset({"dim", "n_layers", "n_heads", "norm_eps"})

# Types of models of which Hugging Face's code rotates neighbouring rows (read off transformers 5.24).
PAIRED_TYPES: str = (
    "blt codegen cohere cohere2 cohere2_moe ernie4_5 ernie4_5_moe ernie4_5_vl_moe glm glm4 glm4v glm_ocr gptj helium "
    "hy_v4_vl llama4 moonshine moonshine_streaming openai_privacy_filter roformer"
)

# Architectures in the header of a GGUF file whose rows llama.cpp puts in pairs, and whose rows it leaves in halves.
GGUF_PAIRS: str = (
    "arcee arctic baichuan bailingmoe chameleon deci granite granitehybrid granitemoe internlm2 llada llama "
    "llama-embed minicpm mistral3 olmo smollm3 xverse"
)
GGUF_HALVES: str = (
    "afmoe apertus bailingmoe2 bitnet dbrx dots1 dream eurobert exaone exaone-moe exaone4 falcon falcon-h1 gemma "
    "gemma-embedding gemma2 gemma3 gemma3n gemma4 gpt-oss gptneox grok grovemoe hunyuan-dense hunyuan-moe jais2 lfm2 "
    "lfm2moe llada-moe mimo2 minimax-m2 modern-bert nemotron nomic-bert nomic-bert-moe olmo2 olmoe openelm "
    "pangu-embedded phi2 phi3 phimoe qwen qwen2 qwen2moe qwen3 qwen3moe qwen3next rnd1 seed_oss smallthinker stablelm "
    "starcoder2 step35"
)

# The last word of a name -> the kind of value it holds; kinds that differ never match, "other" matches any parameter.
KINDS: dict[str, str] = {
    "weight": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "mean",
    "var": "var",
}

# Kinds of values that torch's layers hold -> their names there.
TORCH_NAMES: dict[str, str] = {
    "weight": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "count": "num_batches_tracked",
}

# Names of norms after attention, which stand before the MLP unless others of the block are named around the MLP.
AFTER_ATTENTION = re.compile(r"post_(attention|attn)(?=_|$)")
AROUND_MLP = re.compile(r"(pre|post)_(mlp|feed_?forward|ffn|ffw)(?=_|$)")

# How the names of matrices end that JAX, Keras and TensorFlow lay out as (in, out).
KERNELS: tuple[str, ...] = ("kernel", "reverse_embeddings")

# What torch calls the tensors that it computes a weight of, and where it keeps them -> how such names ended before.
PARAMETRISED: dict[str, str] = {"original0": "weight_g", "original1": "weight_v", "original": "weight_orig"}
PARAMETRISATIONS: tuple[str, ...] = ("parametrizations", "weight")

# The collections in which Flax, and MXNet, keep what a module owns.
COLLECTIONS: frozenset[str] = frozenset({"params", "batch_stats", "arg", "aux"})

# Whole names of values -> their kind, and what else they tell: a norm's statistics, and what Keras calls embeddings.
WHOLE_NAMES: dict[str, tuple[str, str]] = {
    "running_mean": ("mean", ""),
    "running_var": ("var", ""),
    "num_batches_tracked": ("count", ""),
    "moving_mean": ("mean", ""),
    "moving_var": ("var", ""),
    "moving_variance": ("var", ""),
    "rolling_mean": ("mean", ""),  # of Darknet
    "rolling_variance": ("var", ""),
    "avg_mean": ("mean", ""),  # of Chainer
    "avg_var": ("var", ""),
    "rm": ("mean", ""),
    "riv": ("var", ""),
    "weight_gain": ("gain", ""),  # of weight normalisation
    "embeddings": ("weight", ""),
    "reverse_embeddings": ("weight", "reverse"),
}


def _spellings() -> dict[str, tuple[str, ...]]:
    table = {spelling: tuple(words.split()) for words, others in SYNONYMS.items() for spelling in others.split()}
    table.update((words, (words,)) for words in SYNONYMS if " " not in words)
    for role in (role for word in ("ih", "hh") for roles in FUSED[word] for role in roles):
        for gate in (role[1], *GATES[role[1]]):  # as in "W_xr", "x2r", "h2reset" and "input_r"
            for side in {"i": ("i", "x", "input"), "h": ("h", "hidden")}[role[0]]:
                table.update({f"{side}{gate}": (role,), f"{side}2{gate}": (role,)})
    return table


SPELLINGS: dict[str, tuple[str, ...]] = _spellings()


def _rival_pairs(rows: tuple[str, ...]) -> frozenset[tuple[str, str]]:
    return frozenset(pair for words in rows for pair in permutations(words.split(), 2))


RIVAL_PAIRS = _rival_pairs(RIVALS)
RIVAL_OUTPUTS = _rival_pairs(OUTPUTS)
RELATED_PAIRS: dict[tuple[str, str], float] = {
    pair: value for first, second, value in RELATED for pair in ((first, second), (second, first))
}

# Words that have a meaning here, and those that join others.
KNOWN: frozenset[str] = frozenset(
    word
    for known in (
        *SPELLINGS.values(),
        *(words.split() for words in RIVALS),
        *(row[:2] for row in RELATED),
        ("to", "of"),
    )
    for word in known
)
