"""Idioms: names that do not mean what they say, but for where something beside them shows that they do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from autoalign.units import Part

_AFTER_ATTENTION = re.compile(r"post_(attention|attn)(?=_|$)")
_AROUND_MLP = re.compile(r"(pre|post)_(mlp|feed_?forward|ffn|ffw)(?=_|$)")


def in_context(parts: Sequence[Part], others: Sequence[Part]) -> Sequence[Part]:
    """Let what is named after attention be what its name says, where one beside it is named before or after the MLP.

    Elsewhere it is the norm before the MLP. Where the other side has the name too, the name is enough.

    >>> parts = [Part(0, ("0", "post_attention_norm"), (8,), "float"), Part(1, ("0", "post_mlp_norm"), (8,), "float")]
    >>> in_context(parts, [])[0].path
    ('0', 'attn_post_norm')
    """
    around = set(filter(_AROUND_MLP.match, {name for part in parts for name in part.path}))
    if not around or any(map(_AFTER_ATTENTION.match, {name for part in others for name in part.path})):
        return parts
    beside = {part.path[:k] for part in parts for k, name in enumerate(part.path) if name in around}
    return [
        replace(
            part,
            path=tuple(
                _AFTER_ATTENTION.sub("attn_post", name) if part.path[:k] in beside else name
                for k, name in enumerate(part.path)
            ),
        )
        for part in parts
    ]
