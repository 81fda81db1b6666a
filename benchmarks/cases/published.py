"""Sizes of networks of transformers as their authors published them, which stand in ``published.txt``."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_suffix(".txt")


def published() -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield the name of each network, its class in transformers, and the options of its configuration.

    >>> next(published())
    ('bert-base', 'BertModel', {'hidden_size': 768, 'num_hidden_layers': 12, 'num_attention_heads': 12, \
'intermediate_size': 3072})
    """
    class_name, names = "", list[str]()
    for line in _FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            name, _, values = line.strip().partition(" =")
            yield name, class_name, dict(zip(names, literal_eval(f"[{values.strip()}]"), strict=True))
        elif not line.startswith("#"):
            class_name, _, options = line.partition(":")
            names = options.split()
