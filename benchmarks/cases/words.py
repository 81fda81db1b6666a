"""Words for perturbed names: what different hands call the same thing, and words that mean nothing.

Written down from key lists of many libraries, and apart from the matcher's own vocabulary on purpose: some of these
words it knows, some it does not.
"""

from __future__ import annotations

import re
from random import Random

SYNONYMS: dict[str, tuple[str, ...]] = {
    "conv": ("convolution", "cnv", "conv2d", "c2d"),
    "bn": ("batchnorm", "batch_norm", "normalization", "bnorm"),
    "norm": ("normalization", "layer_norm", "nrm", "layernorm"),
    "ln": ("layer_norm", "layernorm", "lnorm"),
    "attn": ("attention", "self_attention", "mha", "att"),
    "attention": ("attn", "att", "mha"),
    "mlp": ("ffn", "feed_forward", "ff", "feedforward"),
    "ffn": ("mlp", "feed_forward", "ff"),
    "fc": ("linear", "dense", "lin"),
    "linear": ("fc", "dense", "lin"),
    "dense": ("fully", "densely"),
    "proj": ("projection", "prj", "project"),
    "qkv": ("in_proj", "wqkv", "qkv_proj"),  # not query_key_value, which stands for rows laid out head by head
    "q": ("query", "to_q", "wq"),
    "k": ("key", "to_k", "wk"),
    "v": ("value", "to_v", "wv"),
    "embed": ("embedding", "emb", "embeddings"),
    "pos": ("position", "positional"),
    "cls": ("class",),
    "patch": ("patches", "img2patch"),
    "block": ("blk", "unit", "module"),
    "blocks": ("units", "blks", "layers", "h"),
    "layer": ("unit", "lyr"),
    "layers": ("blocks", "units", "h"),
    "stage": ("level", "stg", "phase"),
    "stages": ("levels", "phases", "groups"),
    "features": ("backbone", "trunk", "body"),
    "backbone": ("body", "feature_extractor"),
    "stem": ("entry", "root", "first"),
    "head": ("classifier", "cls_head", "logits"),
    "classifier": ("head", "prediction_head"),
    "downsample": ("shortcut", "skip", "identity_proj"),
    "shortcut": ("downsample", "skip"),
    "branch": ("path", "arm"),
    "branches": ("paths", "arms"),
    "dw": ("depthwise", "dwconv"),
    "pw": ("pointwise", "pwconv"),
    "dwconv": ("depthwise", "dw_conv"),
    "pwconv": ("pointwise", "pw_conv"),
    "se": ("squeeze_excite", "squeeze_excitation", "se_module"),
    "gamma": ("layer_scale", "scale", "lambda"),
    "scale": ("gain", "scl"),
    "encoder": ("enc",),
    "decoder": ("dec",),
    "transformer": ("trf", "xformer"),
    "expand": ("expansion", "widen"),
    "reduce": ("reduction", "squeeze"),
    "relative": ("rel",),
    "rel": ("relative",),
    "denseblock": ("dense_block", "dense_stage"),
    "denselayer": ("dense_layer", "dense_unit"),
    "transition": ("trans", "between"),
    "output": ("out",),
    "out": ("output",),
}

# the names that a layer has for its own tensors, in schemes that are in use; keys are torch's names
LEAF_SCHEMES: tuple[dict[str, str], ...] = (
    {"weight": "w", "bias": "b", "running_mean": "mean", "running_var": "var"},
    {"running_mean": "moving_mean", "running_var": "moving_variance"},
    {"weight": "weights", "bias": "biases", "running_mean": "mu", "running_var": "sigma2"},
)
NORM_LEAVES: dict[str, str] = {"weight": "gamma", "bias": "beta"}  # where the layer is a norm, in any scheme
LEAVES = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked"})

WRAPPERS = (
    "module",
    "model",
    "_orig_mod",
    "backbone",
    "net",
    "encoder.model",
    "student",
    "base_model.model",
    "wrapped",
)
LEVELS = ("inner", "fn", "layer", "module", "op", "body", "wrapped")
ADAPTERS = ("adapter", "lora", "prompt_pool", "probe", "aux")

_WORD = re.compile(r"[A-Za-z]+")
_ONSETS, _VOWELS, _CODAS = (
    ("b", "d", "g", "k", "l", "m", "n", "p", "r", "t", "v", "z"),
    "aeiou",
    ("", "", "n", "r", "x"),
)


def words_of(name: str) -> list[str]:
    """List the words of a name, without its digits and separators.

    >>> words_of("layer1_norm2d")
    ['layer', 'norm', 'd']
    """
    return _WORD.findall(name)


def with_words(name: str, words: dict[str, str]) -> str:
    """Put other words in the place of those of a name.

    >>> with_words("attn_norm2.fc1", {"attn": "mha", "fc": "dense"})
    'mha_norm2.dense1'
    """
    return _WORD.sub(lambda found: words.get(found[0], found[0]), name)


def made_up(random: Random) -> str:
    """Make a word of two or three syllables that means nothing."""
    return "".join(
        random.choice(_ONSETS) + random.choice(_VOWELS) + random.choice(_CODAS) for _ in range(random.choice((2, 3)))
    )
